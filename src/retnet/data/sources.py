"""Which files a corpus consists of. Nothing is read here but names, sizes and times.

What is not read is counted: by its ending where it is of no kind that is known, and by what it is where it is no file.
"""

from __future__ import annotations

import fnmatch
import glob
import importlib.machinery
import importlib.util
import os
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path, PurePath
from typing import NamedTuple

from retnet.data import remote
from retnet.errors import UserError, one_line, printable
from retnet.io import not_a_file

TEXT = (".txt", ".md", ".py")  # one document each
RECORDS = (".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")  # may follow any of them but .parquet, which compresses itself
KINDS = f"{' '.join((*TEXT, *RECORDS))} (all but the last also with {' '.join(COMPRESSIONS)} behind)"
# Of the standard library: what belongs to others, caches, test suites, and records of how this Python was built.
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_NOT_STDLIB |= {"encodings"}  # tables that are nearly copies of each other, so held-out ones would be known
_BUILD_RECORDS = ("config-", "_sysconfig")


class Problem(NamedTuple):
    """Something in a corpus that could not be used, or only after mending.

    Attributes:
        file: where.
        line: which line, row or record, from 1; 0 for the whole file.
        kind: ``left out`` (of a whole corpus: how many files of which kinds are not read), ``unreadable``,
            ``not text`` (UTF-16, NUL bytes, …), ``duplicate``, ``bad JSON``, ``no text``, ``empty document`` (all left
            out), or ``invalid UTF-8`` and ``byte order mark`` (kept, after mending).
        message: what is wrong, for people.
    """

    file: str
    line: int
    kind: str
    message: str

    def __str__(self) -> str:
        file, message = map(remote.without_keys, (self.file, self.message))
        place = f"{file}:{self.line}" if self.line else file
        return one_line(f"{place}: {self.kind}: {message}" if message else f"{place}: {self.kind}")


class Source(NamedTuple):
    """A file, a part of one, or a streamed dataset.

    Attributes:
        kind: a suffix of `TEXT` or `RECORDS`, or ``hf``.
        path: of the file, a URL, or the name of the dataset.
        name: the path below its corpus; its hash decides the split of text files.
        compression: a suffix of `COMPRESSIONS`, or empty.
        size: bytes of the file; once `content.examine` has read it, those of what is compressed in it. 0 where unknown.
        stamp: changes whenever the file is written.
        digest: SHA-256 of the text (of tables, the bytes); empty until it has been read.
        identity: of the text whatever its line endings, likewise.
        start: first byte of the content read (text files).
        stop: one past the last byte read; None for the end.
        validation: decided already, or None to let hashes decide.
        corpus: number of the corpus in its list.
    """

    kind: str
    path: str
    name: str
    compression: str = ""
    size: int = 0
    stamp: str = ""
    digest: str = ""
    identity: str = ""
    start: int = 0
    stop: int | None = None
    validation: bool | None = None
    corpus: int = 0


class CorpusFiles(NamedTuple):
    """What one corpus consists of.

    Attributes:
        sources: what is read, in an order that does not depend on the file system.
        left_out: what is not, by kind (an ending, ``hidden``, ``pipe``, …) → how many.
        problems: files and folders that cannot be read.
    """

    sources: list[Source]
    left_out: Counter[str]
    problems: list[Problem]


def find(spec: str) -> CorpusFiles:
    """The files of one corpus.

    Links are followed, each folder is read once, and hidden files and folders are left out.

    Raises:
        UserError: there is no such corpus, or nothing in it can be read.
    """
    if spec == "stdlib" or spec.startswith("package:"):
        return _python(spec)
    if spec.startswith("hf:") and not spec.startswith("hf://"):
        from retnet.data.hub import identity

        return CorpusFiles([Source("hf", spec, spec, stamp=identity(spec))], Counter(), [])
    path = Path(os.path.expanduser(spec))
    found = CorpusFiles([], Counter(), [])
    if remote.is_url(spec):
        _at_url(spec, found)
    elif os.path.isdir(path):
        for file in _walk([path], found):
            _add(found, file, file.relative_to(path))
    elif glob.has_magic(spec) and not os.path.exists(path):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        for file in sorted(_matching(path, found)):
            if os.path.isdir(file):
                found.left_out["folder"] += 1
            else:
                _add(found, file, file.relative_to(root))
    else:
        _one_file(spec, path, found)
    if not found.sources:
        has = _counted(found.left_out) + "".join(f"; {problem}" for problem in found.problems[:1])
        raise UserError(
            f"the corpus {remote.without_keys(spec)!r} has no file of the kinds {KINDS}{f'; it has {has}' if has else ''}"
        )
    return found


def left_out(spec: str, found: CorpusFiles) -> list[Problem]:
    """What has to be said of a corpus before it is read."""
    said = [Problem(spec, 0, "left out", _counted(found.left_out))] if found.left_out else []
    return said + found.problems


def stamp_of(status: os.stat_result) -> str:
    """What changes whenever a file is written: nobody can set the time of its last change (ctime) back."""
    s = status
    return f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"


def current_stamp(path: str) -> str:
    """The `Source.stamp` that a file has now, here or at a URL.

    Raises:
        OSError: it is gone.
    """
    return remote.stamp(path) if remote.is_url(path) else stamp_of(Path(path).stat())


def _at_url(spec: str, found: CorpusFiles) -> None:
    for file in remote.files(spec):
        kind, compression = _kind(file.name)
        if any(part.startswith(".") for part in PurePath(file.name).parts):
            found.left_out["hidden"] += 1
        elif not kind:
            found.left_out[_ending(file.name)] += 1
        else:
            found.sources.append(Source(kind, file.url, file.name, compression, file.size, file.stamp))


def _one_file(spec: str, path: Path, found: CorpusFiles) -> None:
    if not os.path.lexists(path):
        raise UserError(
            f"no corpus {spec!r}: give 'stdlib', package:NAME, a file, folder, glob or URL, or hf:NAME"
        )
    _add(found, path, PurePath(path.name))
    if found.problems:
        raise UserError(f"cannot read {spec}: {found.problems[0].message}")
    if found.sources:
        return
    if what := not_a_file(path.stat().st_mode):
        raise UserError(f"cannot read {spec}: it is a {what}, not a file; save its text to one first")
    raise UserError(f"cannot read {spec}: not one of {KINDS}")


def _python(spec: str) -> CorpusFiles:
    """Source and documentation of the standard library or a package; what else these hold is no part of the corpus."""
    root = Path(sysconfig.get_path("stdlib")) if spec == "stdlib" else _package(spec)
    every = CorpusFiles([], Counter(), [])
    for file in _walk([root], every, _NOT_STDLIB):
        name = file.relative_to(root)
        if spec != "stdlib" or not str(name).startswith(_BUILD_RECORDS):
            _add(every, file, name)
    ours = [source for source in every.sources if source.kind in TEXT and not source.compression]
    return CorpusFiles(ours, Counter(), every.problems)


def _package(spec: str) -> Path:
    name = spec.removeprefix("package:")
    found = package_folder(name)
    if found is None:
        raise UserError(f"no corpus {spec!r}: there is no installed Python package {name!r} that is a folder")
    return found


def package_folder(name: str) -> Path | None:
    """The folder of an installed Python package, which is not imported; None where there is none.

    Folders of the path are looked through first: asking all finders changes more than it should, since that of setuptools
    takes whoever looks for pip to be pip, and from then on nothing that compiles C++ can be imported in this process.
    """
    if not name.isidentifier():
        return None
    found = importlib.machinery.PathFinder.find_spec(name) or importlib.util.find_spec(name)
    return Path(places[0]) if found and (places := list(found.submodule_search_locations or ())) else None


def _add(found: CorpusFiles, path: Path, name: PurePath) -> None:
    """Puts a file where it belongs: sources, problems, or the counts of what is left out."""
    kind, compression = _kind(path.name)
    try:
        status = path.stat()
    except OSError as error:
        found.problems.append(Problem(printable(path), 0, "unreadable", f"{error.strerror}{_link(path)}"))
        return
    if what := not_a_file(status.st_mode):
        found.left_out[what] += 1
    elif not kind:
        found.left_out[_ending(path.name)] += 1
    else:
        source = Source(kind, str(path), name.as_posix(), compression, status.st_size, stamp_of(status))
        found.sources.append(source)


def _link(path: Path) -> str:
    try:
        return f" (a link to {printable(os.readlink(path))})"
    except OSError:  # it is none, or not ours to read
        return ""


def _kind(name: str) -> tuple[str, str]:
    """A suffix of `TEXT` or `RECORDS` and one of `COMPRESSIONS`, whatever their case; empty for a file of no known kind."""
    name = name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    kind = next((suffix for suffix in (*TEXT, *RECORDS) if name.endswith(suffix)), "")
    return (kind, compression) if kind and not (compression and kind == ".parquet") else ("", "")


def _ending(name: str) -> str:
    """What files of no known kind are counted by: ``.png``, ``.tar.gz``, ``no ending``."""
    suffixes = PurePath(name.lower()).suffixes
    compressed = len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS
    return printable("".join(suffixes[-2:] if compressed else suffixes[-1:])) or "no ending"


def _matching(pattern: Path, found: CorpusFiles) -> list[Path]:
    """What a glob names. Below ``**`` folders are walked as those of a corpus are: a circle of links ends there too."""
    parts = pattern.parts
    if "**" not in parts:
        return list(map(Path, glob.glob(str(pattern))))
    begin = parts.index("**")
    starts = glob.glob(str(Path(*parts[:begin]))) if begin else ["."]
    folders = [Path(start) for start in sorted(starts) if os.path.isdir(start)]
    below = CorpusFiles([], Counter(), [])
    hidden = any(part.startswith(".") for part in parts[begin:])
    files = _walk(folders, below, hidden=hidden)
    named = [file for file in files if _fits(file.parts[begin:], parts[begin:])]
    found.problems.extend(below.problems)
    found.left_out.update({kind: count for kind, count in below.left_out.items() if kind != "hidden"})
    return named


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the names along a path are those of a glob.

    ``**`` stands for any number of folders; what is hidden is named by a dot alone.
    """
    if not pattern:
        return not names
    further = bool(names) and names[0].startswith(".") <= pattern[0].startswith(".")
    if pattern[0] == "**":
        return _fits(names, pattern[1:]) or (further and _fits(names[1:], pattern))
    return further and fnmatch.fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _walk(
    roots: Iterable[Path], found: CorpusFiles, without: Container[str] = (), hidden: bool = False
) -> Iterator[Path]:
    """Everything below folders that is no folder, sorted; folders in `without` and, by default, hidden names are left out.

    Linked folders come last, so that a folder reached in several ways has the name of the straight one.
    """
    seen: set[tuple[int, int]] = set()
    walked: list[Path] = []  # where walks began: a link to what holds one of these leads around in a circle
    waiting = deque(roots)
    while waiting:
        start = waiting.popleft()
        real = Path(os.path.realpath(start))
        if any(one != real and one.is_relative_to(real) for one in walked):
            found.left_out["link to a folder around it"] += 1
            continue
        for folder, folders, files in os.walk(start, onerror=_told(found)):
            try:
                status = os.stat(folder)
            except OSError as error:  # gone since it was listed
                _told(found)(error)
                continue
            if (status.st_dev, status.st_ino) in seen:
                found.left_out["link to a folder read already"] += 1
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            walked += [real] if folder == str(start) else []
            if not hidden:
                dotted = sum(name.startswith(".") for name in (*folders, *files))
                found.left_out.update({"hidden": dotted} if dotted else {})
                files = [name for name in files if not name.startswith(".")]
                folders[:] = [name for name in folders if not name.startswith(".")]
            inside = [name for name in sorted(folders) if name not in without]
            waiting += [Path(folder, name) for name in inside if Path(folder, name).is_symlink()]
            folders[:] = [name for name in inside if not Path(folder, name).is_symlink()]
            yield from (Path(folder, name) for name in sorted(files))


def _told(found: CorpusFiles) -> Callable[[OSError], None]:
    def add(error: OSError) -> None:
        where = printable(error.filename)
        found.problems.append(Problem(where, 0, "unreadable", f"{error.strerror} (a folder)"))

    return add


def _counted(counts: Counter[str]) -> str:
    """``3 × .png, 1 × pipe``, the most frequent first, a dozen at most."""
    words = [f"{count:,} × {kind}" for kind, count in counts.most_common(12)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(12))
    return ", ".join([*words, f"{rest:,} × others"] if rest else words)
