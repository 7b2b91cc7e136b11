"""`UserError`: a user's mistake, printed without a traceback; `told`: makes one of any error of files.

What goes wrong with files after the start (a full disk, a folder that vanished, a library that cannot read what it finds)
comes in many kinds. `told` makes one sentence of them all, where a file is opened or written and it is known what for;
the command line holds one around every verb, for whatever nobody expected.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# module → its error; none of them is imported for this: what is not loaded has raised nothing
_OF_LIBRARIES = {
    "json": "JSONDecodeError",
    "lzma": "LZMAError",
    "msgspec": "MsgspecError",
    "pyarrow": "ArrowException",
    "safetensors": "SafetensorError",
    "sqlite3": "Error",
    "tomllib": "TOMLDecodeError",
    "zlib": "error",
}


_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|array is too big|Maximum allowed (size|dimension)"
    r"|Storage size calculation overflowed|multiplication overflow",
    re.IGNORECASE,
)
_ASKED = re.compile(r"(Unable to allocate|[Tt]ried to allocate) [\d.,]+ (bytes|[KMGTPE]?i?B)")


class UserError(ValueError):
    """A mistake the user can mend. Command lines print its message alone, never a traceback."""


def require_packages(who_needs: str, extra: str, *modules: str) -> None:
    """Refuses to begin without packages that only some work needs.

    Args:
        who_needs: them, such as ``"reports need"``.
        extra: of this package, which brings them.
        modules: names that they are imported by.

    Raises:
        UserError: the first that is missing, and how to install it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{who_needs} {module}, which is missing; pip install 'retnet[{extra}]'")


@contextmanager
def told(doing: str, whole: str = "") -> Iterator[None]:
    """Makes one sentence of every error of files in the block: what could not be done, why, and what is still whole.

    A pipe that nobody reads any more is left as it is: whoever closed it knows.

    Args:
        doing: what the block does, such as ``"write runs/demo/config.toml"``.
        whole: what stays usable when it fails, and how to go on.

    Raises:
        UserError: ``cannot {doing}: {reason}; {whole}``.
    """
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except file_errors() as error:
        reason = reason_of(error, without=doing)
        raise UserError(f"cannot {doing}: {reason}{f'; {whole}' if whole else ''}") from error


def file_errors() -> tuple[type[BaseException], ...]:
    """What the system, and the libraries loaded here, raise for files that cannot be read, written or understood."""
    found = [
        getattr(sys.modules[module], name) for module, name in _OF_LIBRARIES.items() if module in sys.modules
    ]
    return (OSError, EOFError, UnicodeError, *found)


def shortage(error: BaseException) -> str:
    """Which memory was asked for in vain, in words; empty of an error that is about something else.

    Python and numpy raise MemoryError, torch a RuntimeError, both others where a size is beyond all counting.
    """
    words = " ".join(printable(str(error)).split())
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(words):
        return ""
    asked = _ASKED.search(words)
    return asked[0].rstrip(".") if asked else words[:200]


def reason_of(error: BaseException, without: str = "") -> str:
    """Why, in words: of the system's errors its own, behind the file where that is not in `without` already."""
    if isinstance(error, OSError) and error.strerror:
        if not isinstance(error.filename, (str, bytes, os.PathLike)):
            return error.strerror
        file = printable(error.filename)
        reason = f"{error.strerror}{_in_the_way(os.fsdecode(error.filename), error.errno)}"
        return reason if file in without else f"{file}: {reason}"
    if isinstance(error, EOFError):
        return "it ends too early"
    words = " ".join(printable(str(error)).split())
    return words[:400] or type(error).__name__


def dangling(path: str | bytes | os.PathLike[str]) -> str:
    """What to add to a message about a path where nothing is: where a link leads that leads nowhere."""
    found = os.path.islink(path) and not os.path.exists(path)
    return f" (it is a link to {printable(os.readlink(os.fsdecode(path)))})" if found else ""


def _in_the_way(path: str, error: int | None) -> str:
    """What to add where something else stands in place of a folder: a file, or a link that leads nowhere."""
    there = path
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    it = "it" if there == path else printable(there)
    if found := dangling(there):
        return found.replace("it", it, 1)
    file = error in (errno.EEXIST, errno.ENOTDIR) and os.path.isfile(there)
    return f" ({it} is a file)" if file else ""


def printable(path: str | bytes | os.PathLike[str]) -> str:
    """A path as it can be printed and stored: names of files need not be UTF-8, and what is not becomes U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", os.fsdecode(path))


def one_line(text: str) -> str:
    """A message as one line: names of files may have line breaks and other control characters, which are escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: found[0].encode("unicode_escape").decode(), text)
