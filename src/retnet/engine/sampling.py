"""From logits to the next token. Pure functions of tensors: chance comes in as numbers, not as state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from retnet.settings import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults sample from the model's own distribution, unchanged.

    The order is repetition penalty, temperature, top-k, top-p, min-p; each leaves the likeliest token standing.

    Attributes:
        temperature: the logits are divided by it. 0 is greedy: the likeliest token, whatever the other
            fields say.
        top_k: only the `top_k` likeliest tokens stay; of equal ones those with the smaller ids. 0 keeps all.
        top_p: only the fewest likeliest tokens stay whose probability reaches `top_p` (Holtzman et al.
            2020). The probabilities are those after temperature and `top_k`. 1 keeps all.
        min_p: only tokens at least `min_p` times as probable as the likeliest stay (Nguyen et al. 2024). 0
            keeps all.
        repetition_penalty: above 1 discourages tokens already seen: their positive logits are divided by
            it, their negative ones multiplied (Keskar et al. 2019, section 4.1, in its usual signed form).
            1 changes nothing.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self._require("temperature", self.temperature >= 0, "a number of 0 (greedy) or more")
        self._require(
            "top_k", self.top_k >= 0 and isinstance(self.top_k, int), "a whole number, 0 (all) or more"
        )
        self._require("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1 (all)")
        self._require("min_p", 0 <= self.min_p <= 1, "a number from 0 (all) to 1")
        self._require("repetition_penalty", self.repetition_penalty > 0, "a number above 0 (1 is no penalty)")

    def _require(self, field: str, allowed: bool, meaning: str) -> None:
        value = getattr(self, field)
        if not allowed or not math.isfinite(value):
            raise UserError(f"{field} must be {meaning}, got {value!r}")


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The distribution the next token is drawn from.

    Args:
        logits: [B, V], any floating type; computed in fp64. −∞ forbids a token.
        sampling: the steps to apply.
        seen: [B, V] bool, the tokens the repetition penalty is for; None is none.

    Returns:
        [B, V] fp64; each row sums to 1 and at least its likeliest token is above 0.

    Raises:
        UserError: a row of logits with a NaN, with +∞, or with nothing but −∞.
    """
    scores = logits.double()
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    best = scores.amax(-1, keepdim=True)  # NaN wins a maximum
    if not bool(torch.isfinite(best).all()):
        raise UserError("the model's logits are not finite numbers: its weights have diverged or are damaged")
    if sampling.temperature == 0:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).double()
    scores = (scores - best) / sampling.temperature  # ≤ 0, and 0 for the likeliest at any temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(~_likeliest(scores, sampling.top_k), -math.inf)
    if sampling.top_p < 1:
        scores = scores.masked_fill(~_nucleus(scores, sampling.top_p), -math.inf)
    if sampling.min_p > 0:
        scores = scores.masked_fill(scores < math.log(sampling.min_p), -math.inf)
    return scores.softmax(-1)


def sample(logits: Tensor, sampling: Sampling, draws: Tensor, seen: Tensor | None = None) -> Tensor:
    """Chooses a token a row by inverting the cumulative distribution, so a row depends on its own draw alone.

    Args:
        logits: [B, V], any floating type.
        sampling: the steps to apply.
        draws: [B] fp64, uniform on [0, 1).
        seen: [B, V] bool, the tokens the repetition penalty is for; None is none.

    Returns:
        [B] int64, ids of tokens whose probability is above 0.

    Raises:
        UserError: see `probabilities`.
    """
    cumulative = probabilities(logits, sampling, seen).cumsum(-1)
    threshold = (
        draws[:, None].to(cumulative) * cumulative[:, -1:]
    )  # below the last: the sum is 1 but for rounding
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def _likeliest(scores: Tensor, count: int) -> Tensor:
    """Which tokens are the `count` likeliest, of equal ones those with the smaller ids: [B, V] bool."""
    last = scores.topk(count).values[:, -1:]
    above, equal = scores > last, scores == last
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _nucleus(scores: Tensor, mass: float) -> Tensor:
    """Which tokens are the fewest likeliest whose probability reaches `mass`: [B, V] bool."""
    ranked, order = torch.sort(scores, dim=-1, descending=True, stable=True)  # probabilities have more ties
    chances = ranked.softmax(-1)
    likelier = chances.cumsum(-1) - chances  # probability of everything of a better rank; 0 for the first
    return torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, likelier < mass)
