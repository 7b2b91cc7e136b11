"""Training and validation split of corpora, without duplicates: every text once, on one side."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from retnet.data import content, sources
from retnet.data.config import DataConfig, as_tuple
from retnet.data.content import Contents
from retnet.data.manifest import CorpusEntry
from retnet.data.remote import without_keys
from retnet.data.sources import TEXT, Problem, Source
from retnet.errors import UserError, printable, reason_of

DIVISION = 1  # number of the rule that divides text into sides; whoever changes the rule adds one
_KINDS_COUNTED = 100  # by name, of what one corpus leaves out; the manifest would not end otherwise
Taken = dict[tuple[bool, str], str]  # (text or records, `Content.identity`) → where it was found first


class Gathered(NamedTuple):
    """The text of a configuration.

    Attributes:
        corpora: as the manifest names them.
        sources: what is read, with the split decided as far as names decide it.
        problems: what is not, and why.
    """

    corpora: list[CorpusEntry]
    sources: list[Source]
    problems: list[Problem]


class _Listed(NamedTuple):
    corpus: CorpusEntry
    sources: list[Source]
    problems: list[Problem]
    identities: list[str]  # of all its files, also those that were there before


def gather(
    config: DataConfig, *, verify: bool = False, on_bytes: Callable[[int], None] | None = None
) -> Gathered:
    """Finds all text of a configuration.

    Every file is known by its content. What was there before is left out, whatever its name, and what is validated on
    is never trained on.

    Args:
        config: names the corpora.
        verify: read every file, also those that are known from before (see `Contents`).
        on_bytes: called with the number of bytes read since.

    Raises:
        UserError: no such corpus, no text in it, the same text on both sides, or too little to split.
    """
    with Contents(verify=verify, on_bytes=on_bytes) as contents:
        taken: Taken = {}
        validation = [_listed(spec, contents, taken) for spec in as_tuple(config.validation or ())]
        taken = {key: f"{place}, which is validated on" for key, place in taken.items()}
        train = [_listed(spec, contents, taken) for spec in as_tuple(config.corpus)]
    _refuse_the_same(train, validation)
    listed = [*train, *validation]
    problems = [problem for one in listed for problem in one.problems]
    sides = [
        [source._replace(corpus=number) for number, one in enumerate(side) for source in one.sources]
        for side in (train, validation)
    ]
    for name, side, specs in zip(
        ("corpus", "validation"), sides, (config.corpus, config.validation), strict=True
    ):
        if not side and specs is not None:
            first = f": {problems[0]}" if problems else ""
            named = without_keys(", ".join(as_tuple(specs)))
            raise UserError(f"no text is left in data.{name} ({named}){first}")
    if config.validation is None:
        found = hold_out(sides[0], config.validation_fraction)
    else:
        found = [source._replace(validation=side == 1) for side in (0, 1) for source in sides[side]]
    return Gathered([one.corpus for one in listed], found, problems)


def distinct(found: Iterable[Source], contents: Contents, taken: Taken) -> Iterator[Source | Problem]:
    """Sources in order, with their content known; a problem in place of each that is no text, or was there before.

    Args:
        found: of one corpus.
        contents: reads them.
        taken: what was there before; what is found is added.
    """
    for source in found:
        held = contents.of(source)
        if held.refused:
            yield Problem(printable(source.path), 0, "not text", held.refused)
            continue
        source = source._replace(digest=held.digest, identity=held.identity, size=held.size)
        key = (source.kind in TEXT, held.identity)
        if key in taken and (held.size or source.kind == "hf"):  # empty files are told as what they are
            yield Problem(printable(source.path), 0, "duplicate", f"the same text as {taken[key]}")
            continue
        taken[key] = printable(source.path)
        yield source


def found_in(
    specs: Iterable[str], on_problem: Callable[[Problem], None], taken: Taken | None = None
) -> Iterator[Source]:
    """The sources of corpora that are read without a split, one after the other, every text once.

    Args:
        specs: the corpora.
        on_problem: called for what is left out.
        taken: what was there before, see `distinct`.
    """
    taken = {} if taken is None else taken
    with Contents() as contents:
        for spec in specs:
            found = sources.find(spec)
            for problem in sources.left_out(spec, found):
                on_problem(problem)
            for one in distinct(found.sources, contents, taken):
                if isinstance(one, Problem):
                    on_problem(one)
                else:
                    yield one


def hold_out(found: list[Source], fraction: float) -> list[Source]:
    """Decides the split of text files by a hash of their names; beside records, which may hold the same texts, of the text.

    Few files may leave one side empty; then the end of the largest is held out, cut at a line.

    Raises:
        UserError: too little text to have two sides.
    """
    if any(source.kind not in TEXT for source in found):
        return [
            s._replace(validation=content_share(s.identity) < fraction) if s.kind in TEXT else s
            for s in found
        ]
    decided = [s._replace(validation=share(s.name) < fraction) for s in found]
    if len({s.validation for s in decided if s.size}) == 2:
        return decided
    largest = max(found, key=lambda s: s.size)
    if not largest.size and (why := _broken(largest)):
        raise UserError(
            f"no text can be read in {len(found)} files; the first: {without_keys(printable(largest.path))}: {why}"
        )
    wanted = min(int(fraction * sum(s.size for s in found)), largest.size // 2)
    cut = _line_start(largest, largest.size - wanted)
    if not 0 < cut < largest.size:
        raise UserError(
            f"too little text to split: the largest of {len(found)} files has {largest.size} bytes; "
            "add text, raise data.validation_fraction, or name a data.validation corpus"
        )
    decided = [s._replace(validation=False) for s in found]
    where = found.index(largest)
    head, tail = decided[where]._replace(stop=cut), decided[where]._replace(start=cut, validation=True)
    return [*decided[:where], head, tail, *decided[where + 1 :]]


def is_held_out(source: Source, share: float, fraction: float) -> bool:
    """Whether a document whose hash is `share` belongs to the validation split."""
    return share < fraction if source.validation is None else source.validation


def share(name: str) -> float:
    """A hash in [0, 1) of a name: it always falls on the same side of a split."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def text_share(text: str) -> float:
    """A hash in [0, 1) of a text: wherever it stands, in a file or a record, it falls on the same side of a split."""
    alike = text.replace("\r\n", "\n").encode("utf-8", "surrogateescape")
    return content_share(hashlib.sha256(alike).hexdigest())


def content_share(identity: str) -> float:
    """The `text_share` of a file, from its `Content.identity`."""
    return int(identity[:12], 16) / 2**48


def text_fingerprint(found: Iterable[Source], *, validation: bool) -> str:
    """SHA-256 of the text on one side: the contents of its files in order, and which parts of them.

    Files of records, whose documents are divided by their own hashes, count on both sides.

    Args:
        found: the sources of a corpus, their contents known, their sides decided.
        validation: the side that is validated on, or else the one that is trained on.
    """
    here = [s for s in found if s.validation is None or s.validation is validation]
    texts = [(s.kind in TEXT, s.digest, s.start, s.stop) for s in here]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _listed(spec: str, contents: Contents, taken: Taken) -> _Listed:
    found = sources.find(spec)
    kept, problems = [], sources.left_out(spec, found)
    for one in distinct(found.sources, contents, taken):
        if isinstance(one, Problem):
            problems.append(one)
        else:
            kept.append(one)
    every = [contents.of(source) for source in found.sources]
    left_out = found.left_out + Counter(p.kind for p in problems if p.kind != "left out")
    corpus = CorpusEntry(
        name=without_keys(spec),
        files=len(kept),
        bytes=sum(source.size for source in kept),
        sha256=hashlib.sha256("\n".join(held.digest for held in every).encode()).hexdigest(),
        left_out=_capped(left_out),
    )
    return _Listed(corpus, kept, problems, [held.identity for held in every])


def _refuse_the_same(train: list[_Listed], validation: list[_Listed]) -> None:
    for one in train:
        for other in validation:
            if one.identities == other.identities:
                raise UserError(
                    f"data.corpus {one.corpus.name!r} and data.validation {other.corpus.name!r} are the same text; "
                    "name another one of them, or leave data.validation out to hold out a part of the corpus"
                )


def _capped(counts: Counter[str]) -> dict[str, int]:
    most = dict(counts.most_common(_KINDS_COUNTED))
    rest = sum(counts.values()) - sum(most.values())
    return most | ({"others": rest} if rest else {})


def _broken(source: Source) -> str:
    """Why nothing can be read of a file; empty where there is nothing."""
    try:
        for _ in content.chunks(source):
            break
    except UserError:
        raise
    except content.BROKEN as error:
        return reason_of(error)
    return ""


def _line_start(source: Source, offset: int) -> int:
    """The first line start at or after `offset`; when the rest is one line, the first character start."""
    line = b""
    try:
        for chunk in content.chunks(source._replace(start=max(offset - 1, 0))):
            line += chunk
            if b"\n" in line or len(line) > 1 << 20:
                break
    except UserError:
        raise
    except content.BROKEN:
        return 0
    line = line[: line.find(b"\n") + 1] or line
    if line.endswith(b"\n") and offset - 1 + len(line) < source.size:
        return offset - 1 + len(line)
    return offset + next((i for i, byte in enumerate(line[1:]) if byte & 0xC0 != 0x80), 0)
