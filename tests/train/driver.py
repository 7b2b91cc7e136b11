"""Runs `retnet train` in a process that kills itself, with SIGKILL, before the n-th call of a function.

Its words: CONFIG RUN_DIR [--resume] [--kill module:function:n] [--signal SIGTERM@module:function:n]
"""

import importlib
import os
import signal
import sys


def wrap(target: str, act) -> None:
    """Makes the n-th call of a function do `act` first; target is ``module:attribute.path:n``."""
    module, path, n = target.split(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    plain, calls = getattr(owner, name), iter(range(1, 10**9))

    def counted(*args, **options):
        if next(calls) == int(n):
            act()
        return plain(*args, **options)

    setattr(owner, name, counted)


def main() -> None:
    words = sys.argv[1:]
    if "--kill" in words:
        at = words.index("--kill")
        _, target = words[at : at + 2]
        del words[at : at + 2]
        wrap(target, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if "--signal" in words:
        at = words.index("--signal")
        _, spec = words[at : at + 2]
        del words[at : at + 2]
        name, target = spec.split("@")
        wrap(target, lambda: os.kill(os.getpid(), getattr(signal, name)))
    from retnet import cli

    config, run_dir, *rest = words
    sys.argv = ["retnet", "train", config, "--run-dir", run_dir, *rest]
    cli.main()
