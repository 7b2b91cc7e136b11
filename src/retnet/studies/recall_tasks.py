"""Synthetic tasks of recall: associative recall of key-value pairs (MQAR), and needle in a haystack.

Both are made anew for every step, from its number and the seed alone: there is no data set, and no row is seen twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.settings import Checked, Count


@dataclass(frozen=True)
class Vocabulary(Checked):
    """How many tokens the tasks have of each kind: keys first, then values, then those of the haystack."""

    keys: Count = 128
    values: Count = 128
    fillers: Count = 64

    @property
    def size(self) -> int:
        """Of the embedding."""
        return self.keys + self.values + self.fillers


class Asked(NamedTuple):
    """Rows of a task: the last tokens of each row are keys that were seen before, and asked for are their values.

    Attributes:
        tokens: int64 [B,T].
        answers: int64 [B,Q], those after the last Q tokens.
    """

    tokens: Tensor
    answers: Tensor


def pairs(vocabulary: Vocabulary, rows: int, count: int, generator: torch.Generator) -> Asked:
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): k₁ v₁ k₂ v₂ … and then all keys, shuffled.

    Args:
        vocabulary: of which `count` different keys are drawn for each row; values may repeat.
        rows: B.
        count: pairs of a row, each asked for once: T = 3 · count.
        generator: that draws.
    """
    keys, values = _drawn(vocabulary, rows, count, generator)
    order = torch.rand(rows, count, generator=generator).argsort(1)
    told = torch.stack([keys, values], dim=2).flatten(1)
    return Asked(torch.cat([told, keys.gather(1, order)], dim=1), values.gather(1, order))


def needles(vocabulary: Vocabulary, rows: int, length: int, count: int, generator: torch.Generator) -> Asked:
    """Needles in a haystack: pairs of a key and a value anywhere among random fillers, and at the end their keys.

    Args:
        vocabulary: of which keys, values and fillers are drawn.
        rows: B.
        length: T, the questions included; at least 3 · count.
        count: needles of a row, each asked for once.
        generator: that draws.
    """
    keys, values = _drawn(vocabulary, rows, count, generator)
    first = vocabulary.keys + vocabulary.values
    hay = torch.randint(first, vocabulary.size, (rows, length - count), generator=generator)
    # sorted places among the fillers that are left once each pair is taken for one of them; then room is made
    left = length - 2 * count
    places = torch.rand(rows, left, generator=generator).argsort(1)[:, :count].sort(1).values
    places = places + torch.arange(count)
    order = torch.rand(rows, count, generator=generator).argsort(1)
    hay.scatter_(1, places, keys).scatter_(1, places + 1, values)
    return Asked(torch.cat([hay, keys.gather(1, order)], dim=1), values.gather(1, order))


def _drawn(
    vocabulary: Vocabulary, rows: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Keys [B,count], no two of a row alike, and values [B,count]."""
    keys = torch.rand(rows, vocabulary.keys, generator=generator).argsort(1)[:, :count]
    values = torch.randint(
        vocabulary.keys, vocabulary.keys + vocabulary.values, (rows, count), generator=generator
    )
    return keys, values
