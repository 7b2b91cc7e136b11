"""Token sampling: temperature, top-k, top-p, min-p, penalties and logit bias, each row of a batch by its own parameters.

Pure functions of tensors: chance comes in as numbers, not as state. A row's outcome depends on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from retnet.engine.sampling_kernel import REACHED, SamplingCall, sampler
from retnet.settings import At, Checked, UserError

Bias = tuple[tuple[int, float], ...]

NOT_FINITE = "the model's logits are not finite numbers: its weights have diverged or are damaged"
NUCLEUS = 256  # tokens
_ALL = slice(None)


@dataclass(frozen=True)
class Sampling(Checked):
    """How the next token is chosen. The defaults sample from the model's own distribution, unchanged.

    The order is logit bias, repetition penalty, presence and frequency penalty, temperature, top-k, top-p, min-p; the last
    three leave the likeliest token standing.

    Attributes:
        temperature: the logits are divided by it. 0 is greedy: the likeliest token, whatever the filters say.
        top_k: only the `top_k` likeliest tokens stay; of equal ones those with the smaller ids. 0 keeps all.
        top_p: only the fewest likeliest tokens stay whose probability reaches `top_p` (Holtzman et al.
            2020). The probabilities are those after temperature and `top_k`. 1 keeps all.
        min_p: only tokens at least `min_p` times as probable as the likeliest stay (Nguyen et al. 2024). 0
            keeps all.
        repetition_penalty: above 1 discourages tokens already seen, those of the prompt included: their positive logits
            are divided by it, their negative ones multiplied (Keskar et al. 2019, section 4.1, in its usual signed
            form). 1 changes nothing.
        presence_penalty: is taken from the logits of tokens generated before, once. 0 changes nothing.
        frequency_penalty: is taken from the logit of a token once for every time it was generated. 0 changes nothing.
        logit_bias: id → number added to its logit; given as a mapping or as pairs.

    Raises:
        UserError: a value outside its range.
    """

    temperature: Annotated[float, At(least=0)] = 1.0
    top_k: Annotated[int, At(least=0)] = 0
    top_p: Annotated[float, At(above=0, most=1)] = 1.0
    min_p: Annotated[float, At(least=0, most=1)] = 0.0
    repetition_penalty: Annotated[float, At(least=1e-6)] = 1.0  # 1 / 5e-324 is infinite
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Bias = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        bias = tuple(sorted(dict(given).items()))
        for token, value in bias:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise UserError(f"logit_bias must name tokens by their ids, 0 or more, got {token!r}")
            if not _is_number(value):
                raise UserError(f"logit_bias of token {token} must be a finite number, got {value!r}")
        object.__setattr__(self, "logit_bias", bias)

    @property
    def penalises(self) -> bool:
        """Whether tokens seen before count."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class SamplingBatch:
    """The parameters of B rows as columns, made once for as long as the rows stay the same.

    On a CPU a compiled kernel samples, where there is one; torch's operators here are its law.

    Args:
        rows: the parameters of each row.
        vocab_size: V.
        device: of the logits.

    Raises:
        UserError: a logit bias for an id outside the vocabulary.
    """

    def __init__(self, rows: Sequence[Sampling], vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._biased = self._bias(rows, vocab_size)
        self.penalised = self._where(row.penalises for row in rows)
        marked = [row for row in rows if row.penalises]
        self._repetition = self._column([row.repetition_penalty for row in marked])
        self._presence = self._column([row.presence_penalty for row in marked])
        self._frequency = self._column([row.frequency_penalty for row in marked])
        self._drawn = self._where(row.temperature > 0 for row in rows)
        self._compiled: SamplingCall | None = None
        if torch.device(device).type == "cpu" and sampler() is not None:
            columns = [(row.temperature, row.top_k, row.top_p, row.min_p) for row in rows]
            self._compiled = SamplingCall(columns, vocab_size)
        # What follows is for the drawn rows alone, and counted among them.
        rows = [row for row in rows if row.temperature > 0]
        self._temperature = self._column([row.temperature for row in rows])
        self._top_k_rows = self._where(0 < row.top_k < vocab_size for row in rows)
        self._top_k = self._column([row.top_k for row in rows if 0 < row.top_k < vocab_size]).long()
        self._top_p_rows = self._where(row.top_p < 1 for row in rows)
        self._top_p = self._column([row.top_p for row in rows if row.top_p < 1])
        self._min_p_rows = self._where(row.min_p > 0 for row in rows)
        self._min_p = self._column([math.log(row.min_p) for row in rows if row.min_p > 0])

    def sample(
        self, logits: Tensor, draws: Tensor, seen: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor:
        """A token a row, by inverting the cumulative distribution, so that a row depends on its own draw alone.

        Args:
            logits: [B,V], any floating type; computed in fp64. −∞ forbids a token.
            draws: [B] fp64, uniform on [0, 1); those of greedy rows are not looked at.
            seen: bool [P,V], for the `penalised` rows: which tokens the repetition penalty is for; None is none.
            counts: [P,V], for the `penalised` rows: how often each token was generated; None is never.

        Returns:
            int64 [B], ids of tokens whose probability is above 0; −1 for a row with NaN, with +∞, or with −∞ alone.
        """
        scores = self._adjusted(logits, seen, counts)
        if self._compiled is not None:
            return self._compiled(scores, draws)
        return self._sample(scores, draws)

    def _sample(self, scores: Tensor, draws: Tensor) -> Tensor:
        """What the compiled kernel does, of logits that have been adjusted."""
        tokens = scores.argmax(-1)
        if self._drawn is not None:
            cumulative = self._filtered(scores[self._drawn]).softmax(-1).cumsum(-1)
            # The last of them instead of 1, which it is but for rounding.
            threshold = draws.to(cumulative)[self._drawn, None] * cumulative[:, -1:]
            tokens[self._drawn] = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        return tokens.masked_fill_(~finite(scores), -1)

    @property
    def draws(self) -> bool:
        """Whether any row is drawn, rather than greedy."""
        return self._drawn is not None

    def probabilities(
        self, logits: Tensor, seen: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor:
        """The distributions that `sample` draws from, [B,V] fp64; arguments as there."""
        scores = self._adjusted(logits, seen, counts).double()
        chances = F.one_hot(scores.argmax(-1), scores.shape[-1]).double()
        if self._drawn is not None:
            chances[self._drawn] = self._filtered(scores[self._drawn]).softmax(-1)
        return chances

    def _adjusted(self, logits: Tensor, seen: Tensor | None, counts: Tensor | None) -> Tensor:
        """Logits with bias and penalties, in fp64 where these change anything."""
        if self._biased is not None:
            row, token, bias = self._biased
            logits = logits.double().index_put((row, token), bias, accumulate=True)
        if self.penalised is None:
            return logits
        part = logits[self.penalised].double()
        if seen is not None:
            penalty = torch.where(part > 0, 1 / self._repetition, self._repetition)
            part = torch.where(seen, part * penalty, part)
        if counts is not None:
            part = part - self._presence * (counts > 0) - self._frequency * counts
        logits = logits.double().clone()
        logits[self.penalised] = part
        return logits

    def _filtered(self, scores: Tensor) -> Tensor:
        """Temperature and filters of drawn rows [R,V]: fp64, −∞ where a token is out."""
        scores = scores.double()
        # ≤ 0, and 0 for the likeliest at any temperature
        scores = (scores - scores.amax(-1, keepdim=True)) / self._temperature
        if self._top_k_rows is not None:
            part = scores[self._top_k_rows]
            scores[self._top_k_rows] = part.masked_fill(~_likeliest(part, self._top_k), -math.inf)
        if self._top_p_rows is not None:
            part = scores[self._top_p_rows]
            scores[self._top_p_rows] = part.masked_fill(~_nucleus(part, self._top_p), -math.inf)
        if self._min_p_rows is not None:
            part = scores[self._min_p_rows]
            scores[self._min_p_rows] = part.masked_fill(part < self._min_p, -math.inf)
        return scores

    def _where(self, flags: Iterable[bool]) -> Tensor | slice | None:
        """An index of the rows that are flagged; None when none is, a slice when all are."""
        flags = list(flags)
        if not any(flags):
            return None
        return _ALL if all(flags) else torch.tensor(flags, device=self._device).nonzero()[:, 0]

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)[:, None]

    def _bias(self, rows: Sequence[Sampling], vocab_size: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Places and values of all biases: rows, tokens, numbers."""
        flat = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.logit_bias]
        if not flat:
            return None
        for _, token, _ in flat:
            if token >= vocab_size:
                raise UserError(
                    f"logit_bias names token {token}, but the vocabulary ends with {vocab_size - 1}"
                )
        places, tokens, values = zip(*flat, strict=True)
        return (
            torch.tensor(places, device=self._device),
            torch.tensor(tokens, device=self._device),
            torch.tensor(values, dtype=torch.float64, device=self._device),
        )


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The distribution the next token is drawn from, the same parameters for all rows.

    Args:
        logits: [B,V], any floating type; computed in fp64. −∞ forbids a token.
        sampling: the steps to apply.
        seen: [B,V] bool, the tokens the repetition penalty is for; None is none.

    Returns:
        [B,V] fp64; each row sums to 1 and at least its likeliest token is above 0.

    Raises:
        UserError: a row of logits with a NaN, with +∞, or with nothing but −∞.
    """
    return _batch(logits, sampling).probabilities(logits, seen)


def sample(logits: Tensor, sampling: Sampling, draws: Tensor, seen: Tensor | None = None) -> Tensor:
    """Chooses a token a row, int64 [B]; see `SamplingBatch.sample`, and for the rest `probabilities`."""
    return _batch(logits, sampling).sample(logits, draws, seen)


def finite(logits: Tensor) -> Tensor:
    """Which rows of logits [B,V] have a likeliest token: no NaN, no +∞, not −∞ alone; bool [B]."""
    return torch.isfinite(logits.amax(-1))  # NaN wins a maximum


def _batch(logits: Tensor, sampling: Sampling) -> SamplingBatch:
    if not bool(finite(logits).all()):
        raise UserError(NOT_FINITE)
    return SamplingBatch([sampling] * len(logits), logits.shape[-1], logits.device)


def _likeliest(scores: Tensor, count: Tensor) -> Tensor:
    """Which tokens are the `count` [B,1] likeliest, of equal ones those with the smaller ids: [B,V] bool."""
    return _down_to(scores, scores.topk(int(count.max())).values.gather(1, count - 1), count)


def _down_to(scores: Tensor, last: Tensor, count: Tensor) -> Tensor:
    """As `_likeliest`, where the score `last` [B,1] of the least likely of them is known."""
    kept = scores >= last
    if bool((kept.sum(-1, keepdim=True) == count).all()):
        return kept  # nearly always: nothing is equal to the last one
    above, equal = scores > last, scores == last
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _nucleus(scores: Tensor, mass: Tensor) -> Tensor:
    """Which tokens are the fewest likeliest whose probability reaches `mass` [B,1]: [B,V] bool.

    A row is sorted whole only where its likeliest `NUCLEUS` do not suffice: sorting costs as much as a small model's step.
    """
    mass = mass * REACHED
    total = scores.logsumexp(-1, keepdim=True)
    size = min(NUCLEUS, scores.shape[-1])
    ranked = scores.topk(size).values
    cumulative = (ranked - total).exp().cumsum(-1)
    if size < scores.shape[-1] and bool((cumulative[:, -1:] < mass).any()):
        short = (cumulative[:, -1:] < mass)[:, 0]
        kept = torch.empty_like(scores, dtype=torch.bool)
        kept[~short] = _down_to(scores[~short], *_cut(ranked[~short], cumulative[~short], mass[~short]))
        whole = scores[short].sort(-1, descending=True).values
        cut = _cut(whole, (whole - total[short]).exp().cumsum(-1), mass[short])
        kept[short] = _down_to(scores[short], *cut)
        return kept
    return _down_to(scores, *_cut(ranked, cumulative, mass))


def _cut(ranked: Tensor, cumulative: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The last score that belongs to `mass`, and how many do; from the best scores and their cumulative probabilities."""
    count = (cumulative[:, :-1] < mass).sum(-1, keepdim=True) + 1
    return ranked.gather(1, count - 1), count
