"""How a command ends: its standard streams are there, and whatever goes wrong with files or memory is one sentence.

`sentence` is held around every verb. What a verb opens or writes says itself what it was for (`retnet.errors.told`);
here is said what nobody expected, in the same words.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from retnet.errors import UserError, one_line, printable, shortage, told

MISTAKE = 2  # exit status after a mistake of the user, as click's own
STDOUT = 1  # number of the file


class _StandardOutput(io.FileIO):
    """Standard output, whose errors name it: the system says only that there is no space left."""

    def write(self, content: Any, /) -> int:  # noqa: ANN401
        try:
            return super().write(content)
        except BrokenPipeError:
            raise
        except OSError as error:
            _forget_output()
            raise UserError(
                f"cannot write standard output: {error.strerror}; what was written to files is whole"
            ) from None


def run(command: Callable[[], object]) -> NoReturn:
    """Runs the whole command line, says what went wrong in one line, and ends the process."""
    status: str | int | None = 0
    try:
        _streams()
        command()
    except SystemExit as end:
        status = end.code
    except UserError as error:
        status = _say(error)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        status = _say(error)
    except BrokenPipeError:  # nobody reads any more, and whoever closed the pipe knows
        _forget_output()
        status = status or MISTAKE
    sys.exit(status)


@contextmanager
def sentence(arguments: Sequence[str]) -> Iterator[None]:
    """Around a verb: refuses what no verb can work with, and makes a `UserError` of every error of files.

    Raises:
        UserError: an argument is not UTF-8, the current directory is gone, or files or memory fail inside.
    """
    for argument in arguments:
        if printable(argument) != argument:
            raise UserError(
                f"the argument {printable(argument)!r} is not UTF-8 text; write it in UTF-8, or rename the file it names"
            )
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory is gone; change to one that is there") from None
    try:
        with told(f"go on with retnet {arguments[0]}" if arguments else "go on"):
            yield
    except (MemoryError, RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError) or not (why := shortage(error)):
            raise
        raise UserError(
            f"memory ran out: {why}; take less at once: shorter texts, smaller batches, or a smaller model"
        ) from error


def _streams() -> None:
    """Opens what is closed of the three standard files, or the next file opened would get its number and its output.

    Raises:
        UserError: there is no standard output, so that nobody would see what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
    if sys.stderr is None:  # closed: progress goes nowhere
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  until the process ends
    if sys.stdout is None:
        raise UserError("standard output is closed; send it to a file, or to /dev/null")
    with suppress(OSError, ValueError):  # no file of the system: that of a test
        old = sys.__stdout__
        if old is not None and sys.stdout is old and old.fileno() == STDOUT:
            raw = io.BufferedWriter(_StandardOutput(STDOUT, "w", closefd=False))
            sys.stdout = io.TextIOWrapper(raw, old.encoding, old.errors, line_buffering=old.line_buffering)


def _forget_output() -> None:
    """Lets what still waits to be printed go nowhere, or Python would try, and complain, again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    os.close(nowhere)


def _say(error: UserError) -> int:
    with suppress(OSError):  # standard error is full, or nobody reads it
        click.echo(f"retnet: error: {one_line(str(error))}", err=True)
    return MISTAKE
