"""Which files a corpus consists of, and which of them are for validation. Nothing is read here but names and sizes."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Container, Iterator
from itertools import takewhile
from pathlib import Path, PurePath
from typing import NamedTuple

from retnet.settings import UserError

TEXT = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_ALLOWED = " ".join((*TEXT, *RECORDS))
# Of the standard library: what belongs to others, caches, test suites, and records of how this Python was built.
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_NOT_STDLIB |= {"encodings"}  # tables that are nearly copies of each other, so held-out ones would be known
_BUILD_RECORDS = ("config-", "_sysconfig")


class Source(NamedTuple):
    """A file, a part of one, or a streamed dataset.

    Attributes:
        kind: a suffix of `TEXT` or `RECORDS`, ``hf``, or ``?`` for a file of no known kind.
        path: of the file, or the name of the dataset.
        name: the path below its corpus; its hash decides the split of text files.
        size: bytes; 0 where unknown.
        identity: changes when the content does.
        start: first byte read (text files).
        stop: one past the last byte read; None for the end.
        validation: decided already, or None to let hashes decide.
    """

    kind: str
    path: str
    name: str
    size: int
    identity: str
    start: int = 0
    stop: int | None = None
    validation: bool | None = None


def find(spec: str) -> list[Source]:
    """The sources of one corpus, in an order that does not depend on the file system.

    Hidden files and folders are left out; in a folder, so are files of other kinds.

    Raises:
        UserError: there is no such file, or a folder or glob has no readable kind of file.
    """
    if spec == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [file.relative_to(root) for file in _walk(root, TEXT, _NOT_STDLIB)]
        return [_source(root / file, file) for file in files if not str(file).startswith(_BUILD_RECORDS)]
    if spec.startswith("package:"):
        root = _package(spec)
        return [_source(file, file.relative_to(root)) for file in _walk(root, TEXT, _NOT_STDLIB)]
    if spec.startswith("hf:"):
        from retnet.data.hub import identity

        return [Source("hf", spec, spec, 0, identity(spec))]
    path = Path(spec)
    if path.is_dir():
        found = [_source(file, file.relative_to(path)) for file in _walk(path, TEXT + RECORDS)]
    elif glob.has_magic(spec) and not path.exists():
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        files = sorted(Path(name) for name in glob.glob(spec, recursive=True))
        found = [_source(file, file.relative_to(root)) for file in files if not file.is_dir()]
        found = [] if all(source.kind == "?" for source in found) else found
    elif path.exists():
        found = [_source(path, PurePath(path.name))]
        if found[0].kind == "?":
            raise UserError(f"cannot read {spec}: not one of {_ALLOWED}")
    else:
        raise UserError(
            f"no corpus {spec!r}: give 'stdlib', package:NAME, a file, a folder, a glob, or hf:NAME"
        )
    if not found:
        raise UserError(f"the corpus {spec!r} has no file of the kinds {_ALLOWED}")
    return found


def _package(spec: str) -> Path:
    """The folder of an installed Python package, which is not imported."""
    name = spec.removeprefix("package:")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"no corpus {spec!r}: there is no installed Python package {name!r} that is a folder")
    return Path(next(iter(found.submodule_search_locations)))


def hold_out(sources: list[Source], fraction: float) -> list[Source]:
    """Decides the split of text files by a hash of their names.

    Few files may leave one side empty; then the end of the largest is held out, cut at a line.

    Raises:
        UserError: too little text to have two sides.
    """
    if any(source.kind not in TEXT for source in sources):
        return [s._replace(validation=share(s.name) < fraction) if s.kind in TEXT else s for s in sources]
    decided = [s._replace(validation=share(s.name) < fraction) for s in sources]
    if len({s.validation for s in decided if s.size}) == 2:
        return decided
    largest = max(sources, key=lambda s: s.size)
    wanted = min(int(fraction * sum(s.size for s in sources)), largest.size // 2)
    cut = _line_start(largest.path, largest.size - wanted)
    if not 0 < cut < largest.size:
        raise UserError(
            f"too little text to split: the largest of {len(sources)} files has {largest.size} bytes; "
            "add text, raise data.validation_fraction, or name a data.validation corpus"
        )
    decided = [s._replace(validation=False) for s in sources]
    where = sources.index(largest)
    head, tail = decided[where]._replace(stop=cut), decided[where]._replace(start=cut, validation=True)
    return [*decided[:where], head, tail, *decided[where + 1 :]]


def is_held_out(source: Source, share: float, fraction: float) -> bool:
    """Whether a document whose hash is `share` belongs to the validation split."""
    return share < fraction if source.validation is None else source.validation


def share(text: str) -> float:
    """A hash in [0, 1): the same text always falls on the same side of a split."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _source(path: Path, name: PurePath) -> Source:
    kinds = [kind for kind in (*TEXT, *RECORDS) if path.name.endswith(kind)]
    try:
        stat = path.stat()
        size, identity = stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}"
    except OSError as error:  # a dangling link: reading it will report it
        size, identity = 0, str(error.strerror)
    return Source(kinds[0] if kinds else "?", str(path), name.as_posix(), size, identity)


def _walk(root: Path, kinds: tuple[str, ...], without: Container[str] = ()) -> Iterator[Path]:
    """The files of these kinds below `root`, sorted; hidden names and folders named in `without` are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in without)
        for name in sorted(files):
            if name.endswith(kinds) and not name.startswith("."):
                yield Path(folder, name)


def _line_start(path: str, offset: int) -> int:
    """The first line start at or after `offset`; when the rest is one line, the first character start."""
    try:
        with open(path, "rb") as file:
            file.seek(max(offset - 1, 0))
            line = file.readline(1 << 20)
    except OSError:
        return 0
    if line.endswith(b"\n") and offset - 1 + len(line) < Path(path).stat().st_size:
        return offset - 1 + len(line)
    return offset + next((i for i, byte in enumerate(line[1:]) if byte & 0xC0 != 0x80), 0)
