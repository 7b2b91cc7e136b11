"""Data loader: batches of packed documents as a function of (seed, position), so its state is one integer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from retnet.data.mixture import Mixture
from retnet.data.order import permute
from retnet.data.shards import TokenShards
from retnet.settings import UserError

IGNORED = -100  # a target that counts for nothing


class Batch(NamedTuple):
    """B windows of T tokens.

    Attributes:
        tokens: int64 [B, T].
        targets: int64 [B, T], the token after each; that of a document's last token is the next document's BOS, which
            serves as end of text. −100 where there is none.
        cu_seqlens: int32 [N + 1], boundaries in the B·T tokens taken row by row: every row and every document starts
            one; first 0, last B·T. State must not cross them.
        documents: N ids, of the document that each of the N segments belongs to; −1 for padding.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    documents: tuple[int, ...]


class Batches:
    """All batches of a stream of tokens.

    The stream is cut into windows: window w holds tokens [w·T, w·T + T) and their successors as targets, so that every
    token but the first is a target exactly once. The last window is padded with BOS, in a segment of its own,
    with targets −100; so is the only window of a stream shorter than T. Training takes the windows in an order that
    is a new permutation each epoch; epochs follow without a gap, so a batch may hold the end of one and the
    beginning of the next. A mixture takes them from several corpora, each a stream with epochs of its own.

    Args:
        shards: the tokens.
        seq_len: T.
        batch_size: B, over all ranks.
        seed: of the order.
        mixture: which corpus each row comes from; None: all of them are one stream.

    Raises:
        UserError: a size below 1, nothing to predict, or a mixture of more or fewer corpora than there are.
    """

    def __init__(
        self, shards: TokenShards, *, seq_len: int, batch_size: int, seed: int, mixture: Mixture | None = None
    ) -> None:
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if shards.num_tokens < 2:
            raise UserError(f"the corpus has {shards.num_tokens} tokens; 2 are needed to predict anything")
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self._shards, self._mixture = shards, mixture or Mixture()
        corpora = shards.corpora if mixture else (shards.num_tokens,)
        if len(corpora) != self._mixture.num_corpora:
            raise UserError(
                f"data.weights has {self._mixture.num_corpora} numbers, and the prepared text knows of {len(corpora)} "
                "corpora; give one weight for each, and none to a corpus whose text another holds (text of older versions "
                "is prepared again from its corpora)"
            )
        self._starts = [0, *accumulate(corpora)]  # of the corpora in the stream
        sizes = [-(-max(tokens - 1, 0) // seq_len) for tokens in corpora]  # in windows
        for number, size in enumerate(sizes):
            if not size and self._mixture.uses(number):
                raise UserError(
                    f"data.corpus number {number + 1} has {corpora[number]} tokens to train on, and a weight; "
                    "take it out, or set its weight to 0"
                )
        self._windows = [0, *accumulate(sizes)]
        self.num_windows = self._windows[-1]

    def __len__(self) -> int:
        """Batches that one epoch takes, rounded up."""
        return -(-self.num_windows // self.batch_size)

    def batch(self, position: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """The batch at `position`, counted from the start of training, across epochs.

        Args:
            position: from 0.
            rank: which share of the rows, from 0.
            world_size: into how many equal shares the rows are cut; all shares in order make the same batch for any.

        Raises:
            UserError: `batch_size` is not a multiple of `world_size`.
        """
        first, count = self._rows(position, rank, world_size)
        corpora, numbers = self._mixture.places(first, count)
        windows = np.empty(count, np.uint64)
        for corpus, (start, stop) in enumerate(pairwise(self._windows)):
            here = corpora == corpus
            epoch, index = np.divmod(numbers[here], np.uint64(max(stop - start, 1)))
            windows[here] = np.uint64(start) + permute(index, max(stop - start, 1), self.seed, epoch)
        return self._gather(windows)

    def epochs(self, position: int) -> list[float]:
        """How often each corpus was read through before the batch at `position`."""
        rows = self._mixture.before(position * self.batch_size)
        sizes = [max(stop - start, 1) for start, stop in pairwise(self._windows)]
        return [count / size for count, size in zip(rows, sizes, strict=True)]

    def in_order(self, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """All windows once, in the order of the stream: every token but the first is a target exactly once.

        All batches have the same shape on every rank; rows past the last window are padding, with all targets −100.
        Weigh losses by the number of targets that count.
        """
        for position in range(len(self)):
            first, count = self._rows(position, rank, world_size)
            yield self._gather(np.arange(first, first + count, dtype=np.uint64))

    def _rows(self, position: int, rank: int, world_size: int) -> tuple[int, int]:
        """The first row of this rank's share of a batch, counted from the start of training, and how many there are."""
        if self.batch_size % world_size:
            raise UserError(
                f"batch_size {self.batch_size} cannot be divided evenly over {world_size} processes"
            )
        if position < 0 or not 0 <= rank < world_size:
            raise ValueError(f"position {position}, rank {rank} of {world_size}")
        share = self.batch_size // world_size
        return position * self.batch_size + rank * share, share

    def _span(self, window: int) -> tuple[int, int]:
        """[start, stop) of a window's tokens and last target in the stream; empty past the last one."""
        corpus = bisect_right(self._windows, window, hi=len(self._windows) - 1) - 1
        start = self._starts[corpus] + (window - self._windows[corpus]) * self.seq_len
        return start, min(start + self.seq_len + 1, self._starts[corpus + 1])

    def _gather(self, windows: NDArray[np.uint64]) -> Batch:
        T, bos = self.seq_len, self._shards.bos_id
        content = np.full((len(windows), T + 1), bos, np.int64)  # [B, T + 1]
        lengths = np.empty(len(windows), np.int64)  # tokens that are there, targets included
        documents = np.full(len(windows), -1, np.int64)  # of each row's first token
        for row, window in enumerate(windows.tolist()):
            start, stop = self._span(window)
            found = self._shards.tokens(start, stop)
            content[row, : len(found)] = found
            lengths[row] = len(found)
            if len(found):
                documents[row] = self._shards.document_at(start)
        tokens, targets = content[:, :-1].copy(), content[:, 1:].copy()
        starts = tokens == bos  # [B, T]; BOS stands nowhere but at the start of a document
        starts[:, 0] = True
        padded = [(row, length) for row, length in enumerate(lengths.tolist()) if length <= T]
        for row, length in padded:
            targets[row, max(length - 1, 0) :] = IGNORED
            starts[row, length:] = False
            starts[row, length : length + 1] = True  # all padding is one segment
        where = np.flatnonzero(starts)
        ends = np.cumsum(np.count_nonzero(starts, axis=1))  # of rows, in segments
        ids = np.arange(len(where)) + np.repeat(documents - np.append(0, ends[:-1]), np.diff(ends, prepend=0))
        for row, length in padded:
            if length < T:
                ids[ends[row] - 1] = -1
        cu_seqlens = np.append(where, tokens.size).astype(np.int32)
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            torch.from_numpy(cu_seqlens),
            tuple(ids.tolist()),
        )
