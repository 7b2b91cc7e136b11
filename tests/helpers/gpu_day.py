"""What the tests of a GPU day share."""

import psutil

from tools.gpu_day.plan import Part


def part(step, name, seconds, rank, least=0.0):
    """A part that needs nothing."""
    return Part(step, name, seconds, rank, "", least)


def gone(pid):
    """Whether a process has ended, be it that nobody has asked how."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
