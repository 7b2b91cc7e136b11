"""What the ranks of tests/ops/test_context_parallel.py compute: a sequence in stretches, held against the whole."""

import itertools
import sys

import torch
import torch.distributed as dist

from retnet.ops import retention
from retnet.ops.context_parallel import context_parallel_retention, cut
from tests.helpers.parity import random_inputs, relative

GAMMAS = torch.tensor([1.0, 0.97, 0.5], dtype=torch.float64).log()
PACKINGS = {  # lengths of documents
    "one": [40],
    "crossing all": [3, 33, 4],
    "ending at cuts": [10, 10, 20],
    "small": [1, 2, 3, 4, 5, 6, 7, 12],
    "empty ones": [0, 5, 0, 15, 0, 0, 20, 0],
    "crossing nowhere": [5, 5, 10, 20],
}


def compared(q, k, v, state, log_decay, lengths=None, bounds=None, **options) -> dict[str, float]:
    """Relative errors of this rank's outputs, final states and gradients."""
    group, last = dist.group.WORLD, dist.get_rank() == dist.get_world_size() - 1
    documents = None if lengths is None else [0, *itertools.accumulate(lengths)]
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    stretch = cut(q.shape[1], group, cu_seqlens, bounds)
    own, options = stretch.own, {"backend": "torch", "chunk_size": 8, **options}

    if documents is not None and state is not None:  # those that begin on other ranks begin with zeros
        later = torch.tensor(documents[:-1]) >= stretch.bounds[1]
        state = state.detach().masked_fill(later[:, None, None, None], 0.0)

    g = torch.Generator().manual_seed(9)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (q, k, v, state)]
    out, final = retention(*leaves[:3], log_decay, leaves[3], cu_seqlens, **options)
    w_out, w_final = (
        torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in (out, final)
    )
    wanted = [x for x in leaves if x is not None]
    want = torch.autograd.grad((out * w_out).sum() + (final * w_final).sum(), wanted)

    parts = [x.detach()[:, own].clone().requires_grad_() for x in (q, k, v)]
    begins, ends = [0], [q.shape[1]]
    if documents is not None:
        begins, ends = documents[:-1], documents[1:]
    stop = own.stop + (1 if last else 0)  # the documents that end here, and those that begin here
    held = [i for i, e in enumerate(ends) if begins[i] < stop and (e > own.start or begins[i] >= own.start)]
    if documents is not None:
        held = held if own.start < own.stop or last else []
        held = [i for i in held if begins[i] >= own.start or own.start < own.stop]
        assert len(held) == len(stretch.starts)
    ended = [n for n, i in enumerate(held) if ends[i] <= own.stop]
    entering = None
    if stretch.rank == 0 and state is not None:
        entering = state.detach()[held if documents is not None else slice(None)].clone().requires_grad_()
    y, after = context_parallel_retention(*parts, log_decay, stretch, entering, **options)
    loss = (y * w_out[:, own]).sum()
    if documents is not None:
        whole, mine = [held[n] for n in ended], after[ended]
        errors = {"final": relative(mine, final[whole])}
        loss = loss + (mine * w_final[whole]).sum()
    else:
        errors = {"final": relative(after, final)} if last else {}
        loss = loss + ((after * w_final).sum() if last else 0.0)
    mine = [*parts, *([] if entering is None else [entering])]
    got = torch.autograd.grad(loss, mine)
    errors["out"] = relative(y, out[:, own])
    for name, a, b in zip(("dq", "dk", "dv"), got, want, strict=False):
        errors[name] = relative(a, b[:, own])
    if entering is not None:
        errors["dstate"] = relative(got[3], want[3][held] if documents is not None else want[3])
    return errors


def cases() -> dict[str, dict[str, float]]:
    ranks = dist.get_world_size()
    q, k, v, state = random_inputs(2, 41, 3, 4, 6)  # 41 tokens: no stretches of one length
    found = {
        "batch": compared(q, k, v, None, GAMMAS),
        "from a state": compared(q, k, v, state, GAMMAS),
        "no decay": compared(q, k, v, state, torch.zeros(3, dtype=torch.float64)),
        "a short first stretch": compared(q, k, v, state, GAMMAS, bounds=[0, 1, *[41] * (ranks - 1)]),
        "an empty first stretch": compared(q, k, v, state, GAMMAS, bounds=[0, 0, *[41] * (ranks - 1)]),
    }
    found["reference"] = compared(q, k, v, state, GAMMAS, backend="reference")
    for name, lengths in PACKINGS.items():
        packed = random_inputs(1, 40, 3, 4, 6, rows=len(lengths))
        found[f"packed, {name}"] = compared(*packed[:3], None, GAMMAS, lengths)
        found[f"packed, {name}, from states"] = compared(*packed, GAMMAS, lengths)
        bounds = [0, *[min(40, 7 + 20 * i) for i in range(ranks - 1)], 40]
        found[f"packed, {name}, ragged"] = compared(*packed, GAMMAS, lengths, bounds)
    half = [x.detach().to(torch.bfloat16) for x in (q, k, v)]
    found["bf16"] = compared(*half, state.detach().float(), GAMMAS.float())
    if "long" in sys.argv:
        long = random_inputs(1, 65536, 2, 4, 4, rows=1)
        gammas = torch.tensor([1.0, 0.999], dtype=torch.float64).log()
        found["65536 tokens"] = compared(*long, gammas, chunk_size=64)
    return found
