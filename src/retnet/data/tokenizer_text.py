"""Training text of a tokenizer: the part of the corpora that a vocabulary is learned from."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator

from retnet.data.config import DataConfig, as_tuple
from retnet.data.readers import Piece, read
from retnet.data.sources import Problem, Source
from retnet.data.split import found_in, is_held_out
from retnet.data.tokenizer import Tokenizer

MAX_BYTES = 1 << 30  # of text: more would change little, and the words it has must fit into memory


def read_texts(
    corpora: str | tuple[str, ...],
    text_field: str,
    on_problem: Callable[[Problem], None],
    *,
    max_bytes: int = MAX_BYTES,
) -> Iterator[str]:
    """All texts of corpora, in pieces, one after the other.

    `max_bytes` of UTF-8 end it after the piece that reaches them.
    """

    def texts() -> Iterator[str]:
        for source in found_in(as_tuple(corpora), on_problem):
            for content in read(source, text_field):
                if isinstance(content, Piece):
                    yield content.text
                else:
                    on_problem(content)

    return _first(max_bytes, texts())


def learn(
    config: DataConfig,
    found: list[Source],
    on_piece: Callable[[int, Piece], None],
    held_out: Container[float],
) -> Tokenizer:
    """Learns the tokenizer ``bpe:SIZE`` of a configuration, from the first `MAX_BYTES` of what is not held out.

    Args:
        config: names the tokenizer, the field of records, and the fraction that is held out.
        found: its sources, with the split decided as far as names decide it. What is wrong with them is left to be
            told when they are read for their tokens.
        on_piece: called with the number of a source and a piece that was read from it.
        held_out: hashes of texts that are validated on wherever they stand.
    """
    assert config.learned_vocab is not None

    def texts() -> Iterator[str]:
        for number, source in enumerate(found):
            for content in () if source.validation else read(source, config.text_field, held_out):
                if isinstance(content, Piece):
                    on_piece(number, content)
                    if not is_held_out(source, content.share, config.validation_fraction):
                        yield content.text

    return Tokenizer.train(_first(MAX_BYTES, texts()), config.learned_vocab)


def _first(max_bytes: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield text
        max_bytes -= len(text.encode())
        if max_bytes <= 0:
            return
