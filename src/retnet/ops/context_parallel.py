"""Context parallelism for retention: a sequence cut over the ranks of a process group, between which only states travel.

Rank r holds the stretch of tokens from b_r to b_{r+1}. What its tokens see of those before is one state. Because γ is known
beforehand, that is a weighted sum of the states which the ranks before it reach from zero:

    S_i = Σ_j γ^(b_{i+1} − 1 − j) k_jᵀ v_j
    P_r = Σ_{i<r} γ^(b_r − b_{i+1}) S_i                 dS_i = Σ_{r>i} γ^(b_r − b_{i+1}) dP_r

and the stretch is retention that starts from P_r. One all-gather of S (H·K·V numbers a rank) forwards and one of dP
backwards, whatever the length. Documents packed in the sequence travel no further than they reach: a weight is 0 where
i's last token and r's first are of two documents; S_i is of the last document of a stretch, and P_r enters its first.

S is computed by itself, before the op (K·V multiplications a token and head, 3 % of a layer of the paper's shape), so that
the op with its kernels and their backward passes runs as it is, from P_r as its initial state. What stands between
`begin_exchange` and its end overlaps with the all-gather, forwards and backwards.
"""

# ruff: noqa: ANN401 (torch's contexts of derivatives take any attribute)

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retnet.ops.retention import retention
from retnet.ops.torch_private import is_differentiated
from retnet.ops.validation import check_inputs, check_state

BLOCK_TOKENS = 4096  # that are weighted at once: what is made for them stays small


@dataclass(frozen=True)
class Stretch:
    """The stretch of a sequence that one rank holds, and what it has to know of the others'; made by `cut`.

    Attributes:
        group: the ranks that hold the sequence together.
        rank: of this one, in the group.
        bounds: of the stretches of all ranks, [R+1], in tokens from the beginning of the whole.
        origins: of each stretch, where the document begins that its first token belongs to, [R].
        starts: of the documents in this stretch, counted from its beginning; None: the sequence is one, or a batch of them.
    """

    group: dist.ProcessGroup
    rank: int
    bounds: tuple[int, ...]
    origins: tuple[int, ...]
    starts: tuple[int, ...] | None

    @property
    def length(self) -> int:
        """Tokens of this stretch."""
        return self.bounds[self.rank + 1] - self.bounds[self.rank]

    @property
    def own(self) -> slice:
        """Where the tokens of this stretch are in the whole."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def seen(self) -> int:
        """Tokens of its first document that lie before this stretch."""
        return self.bounds[self.rank] - self.origins[self.rank]

    @property
    def crossed(self) -> bool:
        """Whether a document goes on from any rank to another, so that states have to travel; the same on all ranks."""
        if self.starts is None:
            return len(self.origins) > 1
        return any(origin < bound for origin, bound in zip(self.origins, self.bounds[:-1], strict=True))

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Bounds of the documents in this stretch, int32 [N+1] on the CPU; None if it is not packed."""
        if self.starts is None:
            return None
        return torch.tensor([*self.starts, self.length], dtype=torch.int32, device="cpu")

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Position of the first token of each document here, int64 [N], or [1] if it is not packed."""
        first = torch.zeros(1 if self.starts is None else len(self.starts), dtype=torch.int64, device=device)
        first[:1] = self.seen
        return first

    def distance(self, source: int, target: int) -> int | None:
        """Tokens between the end of a rank's stretch and the begin of a later one's; None if no document reaches so far."""
        reaches = self.starts is None or self.bounds[source + 1] > self.origins[target]
        if source >= target or not reaches:
            return None
        return self.bounds[target] - self.bounds[source + 1]


def cut(
    length: int,
    group: dist.ProcessGroup,
    cu_seqlens: Tensor | None = None,
    bounds: Sequence[int] | None = None,
) -> Stretch:
    """This rank's stretch of a sequence; no communication, since every rank knows the whole's layout.

    Args:
        length: T of the whole.
        group: the R ranks that hold it, in the order of their stretches.
        cu_seqlens: [N+1], bounds of documents packed in the whole, from 0 to T.
        bounds: of the stretches, [R+1], from 0 to T; default: equal ones, up to a token.

    Raises:
        ValueError: bounds of stretches or documents that do not rise from 0 to T.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    places = [i * length // ranks for i in range(ranks + 1)] if bounds is None else [int(b) for b in bounds]
    if len(places) != ranks + 1 or places[0] != 0 or places[-1] != length or sorted(places) != places:
        raise ValueError(
            f"bounds is {places}; allowed: {ranks + 1} numbers for {ranks} ranks, non-decreasing from 0 to T = {length}"
        )
    if cu_seqlens is None:
        return Stretch(group, rank, tuple(places), (0,) * ranks, None)
    documents = cu_seqlens.tolist()
    if not documents or documents[0] != 0 or documents[-1] != length or sorted(documents) != documents:
        raise ValueError(f"cu_seqlens is {documents}; allowed: non-decreasing from 0 to T = {length}")
    origins = [
        max(d for d in documents[:-1] if d <= begin) if begin < end else begin
        for begin, end in itertools.pairwise(places)
    ]
    begin, end = places[rank], places[rank + 1]
    last = rank == ranks - 1  # holds the empty documents at the very end
    starts = [d - begin for d in documents[:-1] if begin <= d < end or (last and d == end)]
    if origins[rank] < begin:
        starts.insert(0, 0)  # a document goes on here
    return Stretch(group, rank, tuple(places), tuple(origins), tuple(starts))


def context_parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    stretch: Stretch,
    state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Retention of a sequence of which each rank holds a stretch: `retention` of the whole, and its gradients.

    All ranks of the stretch's group must call it, and differentiate it, together.

    Args:
        q: this rank's queries [B,T,H,K], T = stretch.length; B = 1 if the sequence is packed.
        k: its keys [B,T,H,K].
        v: its values [B,T,H,V].
        log_decay: ln γ of each head, [H]; without a gradient.
        stretch: which tokens these are; see `cut`.
        state: what the first rank starts from, [B,H,K,V], or [N,H,K,V] for the documents of its stretch; others give None.
        options: scale, form, chunk_size, backend, keep_states, as in `retention`.

    Returns:
        This rank's output [B,T,H,V], and the state after its last token (of each of its documents): on the last rank that at
        the end of the sequence.

    Raises:
        ValueError: as `retention`; or tokens that are not the stretch's, a state on another rank than the first, or a decay
            that requires a gradient.
    """
    check_inputs(q, k, v, log_decay, time=True)
    if q.shape[1] != stretch.length:
        raise ValueError(
            f"q has {q.shape[1]} tokens; allowed: those of rank {stretch.rank}'s stretch, {stretch.length}"
        )
    entering = entering_state(k, v, log_decay, stretch, state)
    bounds = stretch.cu_seqlens
    return retention(q, k, v, log_decay, entering, None if bounds is None else bounds.to(q.device), **options)


def entering_state(
    k: Tensor, v: Tensor, log_decay: Tensor, stretch: Stretch, state: Tensor | None = None
) -> Tensor | None:
    """The state that retention of a stretch starts from, P_r in the first of its documents; None where all are zeros.

    Arguments and errors are those of `context_parallel_retention`. All ranks must ask, and differentiate, together.

    Returns:
        fp32 (fp64 for fp64 inputs): [B,H,K,V], or [N,H,K,V] for the documents of the stretch.
    """
    return begin_exchange(k, v, log_decay, stretch, state)()


def begin_exchange(
    k: Tensor, v: Tensor, log_decay: Tensor, stretch: Stretch, state: Tensor | None = None
) -> Callable[[], Tensor | None]:
    """Sends this rank's state on its way: the function that waits for those of others, and gives `entering_state`."""
    rows = k.shape[0] if stretch.starts is None else len(stretch.starts)
    if state is not None:
        if stretch.rank:
            raise ValueError(
                f"rank {stretch.rank} has a state of its own; allowed: None, for it goes on from rank 0's"
            )
        check_state(state, k, v, rows)
    if log_decay.dim() != 1:
        raise ValueError(
            f"log_decay has shape {tuple(log_decay.shape)}; allowed across ranks: [H], one a head, since what a stretch "
            "forgets has to be known to the other ranks beforehand"
        )
    if is_differentiated(log_decay):
        raise ValueError("log_decay requires a gradient, which is not computed across ranks; detach it")
    if not stretch.crossed:
        return lambda: state
    begin = stretch.starts[-1] if stretch.starts else 0  # of the document that may go on
    leaving = _LastState.apply(k[:, begin:], v[:, begin:], log_decay)  # type: ignore[no-untyped-call]  # torch has no types here
    if state is not None and rows:
        kept = _powers(log_decay, stretch.length - begin).to(state.dtype)
        leaving = leaving + kept[:, None, None] * (state if stretch.starts is None else state[-1:])
    gathers = _Gathers(stretch.group)
    every = _Leaving.apply(leaving, log_decay, stretch, gathers)  # type: ignore[no-untyped-call]  # torch has no types here

    def entering_state() -> Tensor:
        entering: Tensor = _Entering.apply(every, log_decay, stretch, gathers)  # type: ignore[no-untyped-call]  # torch has no types here
        if stretch.starts is not None:
            fresh = entering.new_zeros(max(rows - 1, 0), *entering.shape[1:])
            entering = torch.cat([entering[:rows], fresh])
        return entering if state is None else state + entering  # which is zero on the first rank

    return entering_state


def _powers(log_decay: Tensor, exponent: int | Tensor) -> Tensor:
    """γ^exponent in fp64, [...,H]."""
    return torch.exp(log_decay.double() * exponent)


class _LastState(torch.autograd.Function):
    """S = Σ_j γ^(T−1−j) k_jᵀ v_j for k [B,T,H,K] and v [B,T,H,V]: [B,H,K,V], fp32 or fp64; block by block, both ways."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        ctx.save_for_backward(k, v, log_decay)
        wide = torch.promote_types(k.dtype, torch.float32)
        state = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[3], dtype=wide)
        with _exact(k):
            for part, zeta in _blocks(k, log_decay):
                state += torch.einsum("bthk,bthv->bhkv", k[:, part].to(wide) * zeta, v[:, part].to(wide))
        return state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_state: Tensor) -> tuple[Tensor, Tensor, None]:
        k, v, log_decay = ctx.saved_tensors
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        with _exact(k):
            for part, zeta in _blocks(k, log_decay):
                weighted_k, weighted_v = (x[:, part].to(d_state.dtype) * zeta for x in (k, v))
                dk[:, part] = torch.einsum("bthv,bhkv->bthk", weighted_v, d_state)
                dv[:, part] = torch.einsum("bthk,bhkv->bthv", weighted_k, d_state)
        return dk, dv, None


def _exact(x: Tensor) -> torch.autocast:
    """Products in the type of their factors, whatever surrounds them."""
    return torch.autocast(x.device.type, enabled=False)


def _blocks(k: Tensor, log_decay: Tensor) -> Any:
    """(tokens, their weights γ^(T−1−j) [n,H,1]), for all tokens of k [B,T,H,K]."""
    T, wide = k.shape[1], torch.promote_types(k.dtype, torch.float32)
    for start, end in itertools.pairwise([*range(0, T, BLOCK_TOKENS), T]):
        after = torch.arange(T - 1 - start, T - 1 - end, -1, device=k.device)
        yield slice(start, end), _powers(log_decay, after[:, None]).to(wide)[..., None]


class _Gathers:
    """All-gathers under way: one forwards and one backwards."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._work = group, None

    def begin(self, x: Tensor) -> Tensor:
        """Room [R·B,…] for x [B,…] of all R ranks, which is filled while others go on."""
        every = x.new_empty(dist.get_world_size(self._group) * x.shape[0], *x.shape[1:])
        self._work = dist.all_gather_single(every, x.contiguous(), group=self._group, async_op=True)
        return every

    def end(self) -> None:
        """Waits until it is filled."""
        assert self._work is not None
        self._work.wait()
        self._work = None


class _Leaving(torch.autograd.Function):
    """From what leaves this rank, [B,H,K,V], to what leaves any, [R·B,H,K,V], which is there once `_Entering` has waited.

    Backwards it is given what `_Entering` began to gather there: the gradients of what enters any rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        leaving: Tensor,
        log_decay: Tensor,
        stretch: Stretch,
        gathers: _Gathers,
    ) -> Tensor:
        ctx.save_for_backward(log_decay)
        ctx.stretch, ctx.gathers = stretch, gathers
        return gathers.begin(leaving)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, every: Tensor) -> tuple[Tensor, None, None, None]:
        (log_decay,), stretch = ctx.saved_tensors, ctx.stretch
        ctx.gathers.end()
        distances = [stretch.distance(stretch.rank, target) for target in range(len(stretch.origins))]
        return _weighted_sum(every, log_decay, distances), None, None, None


class _Entering(torch.autograd.Function):
    """From what leaves any rank to what enters this one, [B,H,K,V]; backwards it begins to gather the gradients of that."""

    @staticmethod
    def forward(
        ctx: Any,
        every: Tensor,
        log_decay: Tensor,
        stretch: Stretch,
        gathers: _Gathers,
    ) -> Tensor:
        ctx.gathers = gathers
        gathers.end()
        distances = [stretch.distance(source, stretch.rank) for source in range(len(stretch.origins))]
        return _weighted_sum(every, log_decay, distances)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_entering: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gathers.begin(d_entering), None, None, None


def _weighted_sum(every: Tensor, log_decay: Tensor, distances: Sequence[int | None]) -> Tensor:
    """Σ γ^distance x over the ranks that have a distance, of x [B,H,K,V] of all of them."""
    of_ranks = every.chunk(len(distances))
    total = torch.zeros_like(of_ranks[0])
    for other, distance in zip(of_ranks, distances, strict=True):
        if distance is not None:
            total += _powers(log_decay, distance).to(every.dtype)[:, None, None] * other
    return total


class ContextParallel:
    """The hook by which mixers learn that they see one stretch of a longer sequence, set from outside.

    All layers of a model share one; whoever runs the model says before each pass what it reads.

    Args:
        group: the ranks that hold every sequence together.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.stretch: Stretch | None = None

    def read(self, length: int, cu_seqlens: Tensor | None) -> Stretch:
        """What comes next is this rank's stretch of a sequence; see `cut`."""
        self.stretch = cut(length, self._group, cu_seqlens)
        return self.stretch

    def positions(self, device: torch.device) -> Tensor:
        """See `Stretch.positions`."""
        assert self.stretch is not None
        return self.stretch.positions(device)

    def begin(self, k: Tensor, v: Tensor, log_decay: Tensor) -> Callable[[], Tensor | None]:
        """See `begin_exchange`."""
        assert self.stretch is not None
        return begin_exchange(k, v, log_decay, self.stretch)
