"""Data preparation, from a `DataConfig` to token shards: read in order, tokenised on all cores, written in segments."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from retnet.data import manifest
from retnet.data.config import DataConfig, as_tuple
from retnet.data.encoding import ReadEvent, Reading, cores, dtype_of, encoded
from retnet.data.readers import PIECE, Piece, Shares
from retnet.data.shards import Prepared, load
from retnet.data.sources import TEXT, Problem, Source
from retnet.data.split import DIVISION, Gathered, gather, is_held_out, text_fingerprint
from retnet.data.tokenizer import Tokenizer
from retnet.data.tokenizer_text import learn
from retnet.data.writer import EXAMPLES, Segments
from retnet.errors import UserError, told
from retnet.io import write_bytes

SHARD_TOKENS = 64 << 20  # per segment: what a kill can lose at most
_LEARNED = 1 << 20  # bytes between words on a tokenizer that is learned
_RECOGNISED = 64 << 20  # bytes between words on files that are read to know them
_log = logging.getLogger("retnet.data")


class PreparationProgress(NamedTuple):
    """How far preparing has come: bytes of the sources read, of how many (0: unknown), documents and tokens written.

    Files that were not seen before are read once to know their content, and a tokenizer that is learned takes a pass
    of its own: `before` says so, while there are no tokens yet.
    """

    bytes_read: int
    bytes_total: int
    documents: int
    tokens: int
    before: str = ""

    @property
    def words(self) -> str:
        """What is there, for a person."""
        if self.before:
            return self.before
        return f"{self.documents:,} documents, {self.tokens:,} tokens"


def prepare(
    config: DataConfig,
    *,
    on_progress: Callable[[PreparationProgress], None] | None = None,
    on_problem: Callable[[Problem], None] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    verify: bool = False,
) -> Prepared:
    """Makes the token shards of a configuration, or finds them made.

    They lie in ``config.cache / fingerprint``; the fingerprint covers the content of the sources (not their paths), the
    tokenizer and the split, so a change of any of them prepares anew. Files that were read before are not read again
    while their times, sizes and inodes are the same (see `retnet.data.content.Contents`). Killed, it goes on after the
    last finished segment when called again, and gives the same bytes. Several processes may call it at once: one works,
    the others wait. The shards do not depend on the number of cores.

    Args:
        config: what to prepare.
        on_progress: called every few megabytes.
        on_problem: called for everything in the sources that was left out or mended; all are counted in the manifest.
        shard_tokens: tokens per segment.
        verify: read every file of the sources and every shard again, and trust no times and sizes.

    Raises:
        UserError: no such corpus or tokenizer, no text in it, the same text in corpus and validation, nothing on one
            side of the split, a file that changes while it is read, or a damaged folder.
    """
    given = None if config.learned_vocab else Tokenizer.load(config.tokenizer)
    if (folder := manifest.prepared_folder(config.corpus)) is not None:
        return _already_prepared(config, folder, given, verify)
    gathered = gather(config, verify=verify, on_bytes=_Recognising(on_progress))
    found = gathered.sources
    fingerprint = _fingerprint(config, found, given, shard_tokens)
    directory = Path(os.path.expanduser(config.cache)) / fingerprint[:16]
    report = _Report(found, on_progress, on_problem)
    for problem in gathered.problems:
        report.problem(problem)
    if not os.path.isfile(directory / manifest.MANIFEST):
        with _alone_in(directory):
            if not (directory / manifest.MANIFEST).is_file():
                held_out = _held_out(config, found)
                tokenizer = _tokenizer_of(
                    directory, lambda: given or learn(config, found, report.learning, held_out)
                )
                segments = Segments(directory, dtype_of(tokenizer), tokenizer.bos_id)
                try:
                    _fill(segments, config, found, held_out, tokenizer, shard_tokens, report)
                    num_corpora = len(as_tuple(config.corpus))
                    _complete(segments, directory, fingerprint, tokenizer, gathered, num_corpora)
                finally:
                    segments.stop()
    prepared = load(directory, verify=verify or None)
    # The same text may have been prepared from other paths, with other files beside it.
    listed, read_ = list(map(str, gathered.problems)), prepared.manifest.examples[prepared.manifest.listed :]
    renamed = msgspec.structs.replace(
        prepared.manifest,
        corpora=gathered.corpora,
        examples=[*listed, *read_][:EXAMPLES],
        listed=len(listed),
        train_text=text_fingerprint(found, validation=False),
        validation_text=text_fingerprint(found, validation=True),
    )
    return prepared._replace(manifest=renamed)


class _Recognising:
    """Tells now and then how much has been read to know what files hold."""

    def __init__(self, on_progress: Callable[[PreparationProgress], None] | None) -> None:
        self._on_progress, self._read, self._told = on_progress, 0, 0

    def __call__(self, num_bytes: int) -> None:
        self._read += num_bytes
        if self._on_progress and self._read >= self._told + _RECOGNISED:
            self._told = self._read
            words = f"reading files not seen before, {self._read / 1e9:,.1f} GB"
            self._on_progress(PreparationProgress(self._read, 0, 0, 0, words))


class _Report:
    """Counts for progress, and hands problems on."""

    def __init__(
        self,
        found: list[Source],
        on_progress: Callable[[PreparationProgress], None] | None,
        on_problem: Callable[[Problem], None] | None,
    ) -> None:
        sizes = [(source.size if source.stop is None else source.stop) - source.start for source in found]
        self._before = np.cumsum([0, *sizes])
        self._on_progress, self._on_problem = on_progress, on_problem
        self.documents = self.tokens = self._told = 0

    def problem(self, problem: Problem) -> None:
        if self._on_problem:
            self._on_problem(problem)

    def learning(self, source: int, piece: Piece) -> None:
        read_so_far, total = int(self._before[source]) + piece.position, int(self._before[-1])
        if self._on_progress and read_so_far >= self._told:
            self._told = read_so_far + _LEARNED
            self._on_progress(PreparationProgress(read_so_far, total, 0, 0, "learning the tokenizer"))

    def progress(self, event: ReadEvent) -> None:
        if self._on_progress:
            position = event.content.position if isinstance(event.content, Piece) else 0
            read_so_far = int(self._before[event.source]) + position
            self._on_progress(
                PreparationProgress(read_so_far, int(self._before[-1]), self.documents, self.tokens)
            )


def _tokenizer_of(directory: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer of a folder. It is there before the first token, so that whoever goes on after a kill has the same."""
    file = directory / manifest.TOKENIZER
    if not file.is_file():
        write_bytes(file, make().content)
    return Tokenizer.load(file)


def _fill(
    segments: Segments,
    config: DataConfig,
    found: list[Source],
    held_out: Container[float],
    tokenizer: Tokenizer,
    shard_tokens: int,
    report: _Report,
) -> None:
    """Reads, tokenises and writes everything that earlier segments do not hold."""
    reading = Reading(found, config.text_field, held_out)
    for batch in encoded(reading.events(*segments.cursor, len(found)), tokenizer, cores()):
        for event, tokens, num_bytes in batch:
            content = event.content
            if isinstance(content, Problem):
                segments.problem(content.kind, str(content))
                report.problem(content)
                continue
            validation = is_held_out(found[event.source], content.share, config.validation_fraction)
            segments.add(validation, content.first, tokens, num_bytes, found[event.source].corpus)
            report.documents += content.first
            report.tokens += len(tokens) + content.first
            if segments.tokens >= shard_tokens:
                segments.commit(event.source, event.number + 1)
        report.progress(batch[-1].event)
    segments.commit(len(found), 0)


def _held_out(config: DataConfig, found: list[Source]) -> Container[float]:
    """The texts that must not be trained on. Where hashes decide the split, the same text has the same side anyway."""
    if config.validation is None:
        return ()
    return Shares((source for source in found if source.validation), config.text_field)


def _complete(
    segments: Segments,
    directory: Path,
    fingerprint: str,
    tokenizer: Tokenizer,
    gathered: Gathered,
    num_corpora: int,
) -> None:
    """Writes the tokenizer and the manifest, which makes the folder a finished one."""
    train, validation, problems, examples = segments.close(num_corpora)
    examples = [*map(str, gathered.problems), *examples][:EXAMPLES]
    for split, name in ((train, "train"), (validation, "validation")):
        if not split.documents:
            shutil.rmtree(directory)
            told = Counter(problem.kind for problem in gathered.problems) + Counter(problems)
            raise UserError(_nothing(name, train.documents + validation.documents, told, examples))
    dtype: Literal["uint16", "uint32"] = "uint16" if dtype_of(tokenizer).itemsize == 2 else "uint32"
    whole = manifest.Manifest(
        format=manifest.FORMAT,
        version=manifest.VERSION,
        fingerprint=fingerprint,
        dtype=dtype,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        corpora=gathered.corpora,
        problems=problems,
        examples=examples,
        train=train,
        validation=validation,
        listed=min(len(gathered.problems), EXAMPLES),
    )
    write_bytes(directory / manifest.MANIFEST, msgspec.json.format(msgspec.json.encode(whole), indent=1))
    segments.forget()


def _nothing(split: str, documents: int, problems: Counter[str], examples: list[str]) -> str:
    found = ", ".join(f"{count} × {kind}" for kind, count in problems.items())
    seen = f" ({found}; the first: {examples[0]})" if found else ""
    if not documents:
        return f"the corpus is empty: no document has any text{seen}"
    return (
        f"none of the {documents} documents falls into the {split} split{seen}; add text, change "
        "data.validation_fraction, or name a data.validation corpus"
    )


def _fingerprint(config: DataConfig, found: list[Source], given: Tokenizer | None, shard_tokens: int) -> str:
    """SHA-256 of everything that decides the bytes of the shards."""
    texts = [(s.kind in TEXT, s.digest, s.start, s.stop, s.validation) for s in found]
    fraction = config.validation_fraction if config.validation is None else None
    tokenizer = given.fingerprint if given else config.tokenizer
    rules = [manifest.VERSION, PIECE, shard_tokens, tokenizer, config.text_field, fraction]
    if given and given.marks_beginnings:  # later pieces had such marks before
        rules.append("pieces know what stands before them")
    if any(s.kind not in TEXT for s in found):  # they were known by another hash before
        rules.append("records are known by SHA-256, whatever their line endings")
    files = Counter(s.corpus for s in found if not s.validation)
    if len(files) > 1:  # older versions did not count the tokens of each corpus
        numbers = [files[number] for number in range(len(as_tuple(config.corpus)))]
        rules.append(f"tokens are counted by corpus {numbers}")
    if DIVISION != 1 and fraction is not None:  # the first rule had no number here
        rules.append(f"divided by rule {DIVISION}")
    return hashlib.sha256(json.dumps([rules, texts]).encode()).hexdigest()


def _already_prepared(config: DataConfig, folder: Path, given: Tokenizer | None, verify: bool) -> Prepared:
    prepared = load(folder, verify=verify or None)
    if given is None or given.fingerprint != prepared.tokenizer.fingerprint:
        file = prepared.directory / manifest.TOKENIZER
        raise UserError(f"{folder} was prepared with another tokenizer; set data.tokenizer to {str(file)!r}")
    if config.validation is not None:
        raise UserError(f"{folder} is prepared and has its own validation split; leave data.validation out")
    return prepared


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Holds a folder for this process alone; the lock falls when the process does.

    Raises:
        UserError: nothing can be written there, from the start or at some time.
    """
    with told(f"write to {directory}", "set data.cache to another folder"):
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")  # noqa: SIM115  `with lock` below
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning(
                "%s cannot be locked (%s); see to it that only one process prepares it",
                directory,
                error.strerror,
            )
        # of the text come no errors: what cannot be read of it is a problem
        with told(f"write to {directory}", "what is finished stays, and the next call goes on there"):
            directory.mkdir(exist_ok=True)  # whoever held the lock before may have given up and cleaned up
            yield
