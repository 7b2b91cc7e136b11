"""Writer of token shards, segment by segment: a finished one survives a kill, an unfinished one is redone."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from retnet.data.manifest import Shard, Split
from retnet.errors import told
from retnet.io import move, write_bytes

EXAMPLES = 100  # problems kept in words; all are counted


class Segment(msgspec.Struct, frozen=True):
    """One shard of each split, finished together, and where reading goes on: source number, event within it.

    `corpora` are the tokens of the training shard by the corpus that they are from.
    """

    source: int
    event: int
    train: Shard | None
    validation: Shard | None
    problems: dict[str, int]
    examples: list[str]
    corpora: dict[int, int] = {}


class ShardWriter:
    """One shard in the making: tokens go to a temporary file, which gets its name when it is complete."""

    def __init__(self, directory: Path, name: str) -> None:
        self.tokens = 0
        self._bytes = 0
        self._offsets = array("Q")
        self._sha256 = hashlib.sha256()
        self._path = directory / f"{name}.tokens"
        self._temporary = directory / f"{name}.tokens.tmp"
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed in `close`

    def start_document(self, bos: NDArray[np.integer]) -> None:
        """Begins a document with its BOS, given as an array of one."""
        self._offsets.append(self.tokens)
        self.append(bos, 0)

    def append(self, tokens: NDArray[np.integer], num_bytes: int) -> None:
        """Adds tokens that stand for `num_bytes` bytes of text."""
        content = tokens.tobytes()
        self._file.write(content)
        self._sha256.update(content)
        self.tokens += len(tokens)
        self._bytes += num_bytes

    def close(self) -> Shard | None:
        """Makes the shard permanent; None when nothing was written."""
        finish_file = self.tokens > 0
        if finish_file:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if not finish_file:
            self._temporary.unlink()
            return None
        move(self._temporary, self._path)
        offsets = np.asarray(self._offsets, dtype="<u8").tobytes()
        write_bytes(self._path.with_suffix(".offsets"), offsets)
        return Shard(
            name=self._path.stem,
            tokens=self.tokens,
            documents=len(self._offsets),
            bytes=self._bytes,
            tokens_sha256=self._sha256.hexdigest(),
            offsets_sha256=hashlib.sha256(offsets).hexdigest(),
        )

    def stop(self) -> None:
        """Lets go of the file, finished or not."""
        with suppress(OSError):  # of a disk that is full, which was said
            self._file.close()


class Segments:
    """The segments of a folder: those finished earlier, and the one being written.

    Attributes:
        done: the finished ones, in order.
    """

    def __init__(self, directory: Path, dtype: np.dtype, bos_id: int) -> None:
        self._directory = directory
        self._bos = np.array([bos_id], dtype=dtype)
        self.done = self._finished()
        self._open()

    @property
    def cursor(self) -> tuple[int, int]:
        """Source number and event within it at which the segment being written began."""
        return (self.done[-1].source, self.done[-1].event) if self.done else (0, 0)

    @property
    def tokens(self) -> int:
        """Tokens in the segment being written."""
        return sum(writer.tokens for writer in self._writers.values())

    def add(
        self, validation: bool, first: bool, tokens: NDArray[np.integer], num_bytes: int, corpus: int = 0
    ) -> None:
        """Adds a piece of a document."""
        writer = self._writers["validation" if validation else "train"]
        if first:
            writer.start_document(self._bos)
        writer.append(tokens, num_bytes)
        if not validation:
            self._corpora[corpus] += len(tokens) + first

    def problem(self, kind: str, words: str) -> None:
        """Counts a problem."""
        self._problems[kind] += 1
        if len(self._examples) < EXAMPLES:
            self._examples.append(words)

    def commit(self, source: int, event: int) -> None:
        """Finishes a segment: after this, a restart goes on at event `event` of source `source`."""
        shards = {split: writer.close() for split, writer in self._writers.items()}
        segment = Segment(
            source,
            event,
            shards["train"],
            shards["validation"],
            self._problems,
            self._examples,
            self._corpora,
        )
        write_bytes(self._record(len(self.done)), msgspec.json.encode(segment))
        self.done.append(segment)
        self._open()

    def close(self, num_corpora: int = 1) -> tuple[Split, Split, dict[str, int], list[str]]:
        """Ends writing: train, validation, problems by kind, the first problems in words."""
        for writer in self._writers.values():
            writer.close()
        problems: Counter[str] = Counter()
        for segment in self.done:
            problems.update(segment.problems)
        examples = [words for segment in self.done for words in segment.examples][:EXAMPLES]
        train = _split([segment.train for segment in self.done])
        corpora = sum((Counter(segment.corpora) for segment in self.done), Counter[int]())
        if len(corpora) > 1:  # a list of one and its twins is that one
            train = msgspec.structs.replace(train, corpora=[corpora[number] for number in range(num_corpora)])
        return train, _split([segment.validation for segment in self.done]), dict(problems), examples

    def stop(self) -> None:
        """Lets go of the segment being written, whatever became of it."""
        for writer in self._writers.values():
            writer.stop()

    def forget(self) -> None:
        """Removes the records of segments, which a manifest replaces."""
        for number in range(len(self.done)):
            self._record(number).unlink()

    def _open(self) -> None:
        number = len(self.done)
        self._writers = {
            split: ShardWriter(self._directory, f"{split}-{number:05d}") for split in ("train", "validation")
        }
        self._problems: Counter[str] = Counter()
        self._examples: list[str] = []
        self._corpora: Counter[int] = Counter()

    def _record(self, number: int) -> Path:
        return self._directory / f"segment-{number:05d}.json"

    def _finished(self) -> list[Segment]:
        """The segments that an earlier run finished. Their shards were on disk before their records."""
        done: list[Segment] = []
        while (record := self._record(len(done))).is_file():
            with told(f"read {record}", "delete that folder, and the text is prepared anew"):
                done.append(msgspec.json.decode(record.read_bytes(), type=Segment))
        return done


def _split(shards: list[Shard | None]) -> Split:
    there = [shard for shard in shards if shard is not None]
    return Split(
        documents=sum(shard.documents for shard in there),
        tokens=sum(shard.tokens for shard in there),
        bytes=sum(shard.bytes for shard in there),
        shards=there,
    )
