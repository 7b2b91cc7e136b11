"""One place for the comparisons every fast path has to pass."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from retnet.ops import retention


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in fp64 (absolute where `want` vanishes); a shape that differs is an error, NaN is infinite."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).norm() / (want.norm() if want.any() else 1.0)
    return float(error.nan_to_num(nan=float("inf")))


def random_inputs(B, T, H, K, V, *, dtype=torch.float64, rows=None, seed=0, device="cpu"):
    """q, k, v and a state, leaves that want gradients, from a seed."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()

    wide = torch.promote_types(dtype, torch.float32)
    state = leaf(B if rows is None else rows, H, K, V, dtype=wide)
    return leaf(B, T, H, K), leaf(B, T, H, K), leaf(B, T, H, V), state


def token_decays(B, T, H, *, dtype=torch.float64, seed=2, device="cpu"):
    """ln γ of every token and head, wanting a gradient: some γ are 1, some as good as 0, most between."""
    g = torch.Generator().manual_seed(seed)
    x, kind = (torch.rand(B, T, H, generator=g, dtype=torch.float64) for _ in range(2))
    x = torch.where(kind < 0.2, 0.0, torch.where(kind > 0.95, -1000.0 * x, -x.pow(3)))
    return x.to(device, dtype).requires_grad_()


def outputs_and_gradients(inputs, log_decay, *, seed=1, **options) -> dict[str, Tensor]:
    """Output, final state and the gradients of every input under a random linear functional of both.

    That of the decays is among them where they want one.
    """
    leaves = [x.detach().clone().requires_grad_() if x is not None else None for x in inputs]
    q, k, v, state = leaves
    learned = log_decay.requires_grad
    log_decay = log_decay.detach().clone().requires_grad_(learned)
    out, final = retention(q, k, v, log_decay, state, **options)
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in (out, final)]
    named = {"dq": q, "dk": k, "dv": v, "dstate": state, "dlog_decay": log_decay if learned else None}
    wanted = {name: x for name, x in named.items() if x is not None}
    loss = (out * weights[0]).sum() + (final * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)  # of no tokens: zeros
    return {"out": out.detach(), "state": final.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    errors = {name: relative(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance, errors


def assert_confined(backend, dtype, tolerance) -> None:
    """NaN among the decays or keys of one packed document changes nothing in those before and after it.

    It spoils what is later in its own, over chunks too, and the gradients of the decays there.
    """
    lengths, own, at = [9, 1, 30, 0, 12, 33], slice(10, 40), 13
    T, bounds = sum(lengths), torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    tokens = torch.tensor([t for t in range(T) if not own.start <= t < own.stop])
    rows = torch.tensor([0, 1, 3, 4, 5])
    inputs = random_inputs(1, T, 2, 5, 3, rows=len(lengths), dtype=dtype)
    decays = token_decays(1, T, 2, dtype=torch.promote_types(dtype, torch.float32))
    wide = [x.detach().double().requires_grad_() for x in (*inputs, decays)]
    want = outputs_and_gradients(wide[:4], wide[4], cu_seqlens=bounds, form="recurrent", backend="reference")
    for poisoned in (1, 4):  # the keys, the decays
        broken = [x.detach().clone() for x in (*inputs, decays)]
        broken[poisoned][:, at] = torch.nan
        *four, last = (x.requires_grad_() for x in broken)
        got = outputs_and_gradients(four, last, cu_seqlens=bounds, chunk_size=16, backend=backend)
        assert got["out"][:, at : own.stop].isnan().all()
        assert got["dlog_decay"][:, own].isnan().any()
        for name, x in got.items():
            dim, kept = (0, rows) if "state" in name else (1, tokens)
            error = relative(x.index_select(dim, kept), want[name].index_select(dim, kept))
            assert error <= tolerance, (poisoned, name)


@contextmanager
def skips_what_cannot_run():
    """Skips a test, with the reason, whose backend refuses these arguments or this machine; reference and auto never do."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("backend ") or " cannot run " not in str(error):
            raise
        pytest.skip(str(error))


def run_three_ways(module, x, *, pieces=3):
    """[forward, prefill in pieces, step by step] of a mixer or language model over x, [B,T,…], each one tensor [B,T,…]."""
    with torch.no_grad():
        whole = module(x)
        state, parts = module.init_state(x.shape[0]), []
        for piece in x.tensor_split(pieces, dim=1):
            if piece.shape[1]:
                y, state = module.prefill(piece, state)
                parts.append(y)
        stepped, state = [], module.init_state(x.shape[0])
        for t in range(x.shape[1]):
            y, state = module.step(x[:, t], state)
            stepped.append(y)
    return whole, torch.cat(parts, dim=1), torch.stack(stepped, dim=1)


def assert_three_ways_agree(module, x, tolerance: float) -> None:
    """forward == prefill == step by step."""
    whole, *others = run_three_ways(module, x)
    for name, other in zip(("prefill", "step"), others, strict=True):
        assert relative(other, whole) <= tolerance, f"{name}: {relative(other, whole):.2e}"


def assert_causal(module, x, *, leak: float = 0.0) -> None:
    """No output depends on a later input, by gradient; every output depends on its own.

    `leak` is what an FFT, whose rounding knows no order, may leave on later inputs, relative to the largest gradient.
    """
    x = x.detach().clone().requires_grad_()
    y = module(x)
    for t in (0, x.shape[1] // 2, x.shape[1] - 1):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :].abs() <= leak * grad.abs().max()).all()
        assert grad[:, t].any()


def assert_rows_independent(module, x) -> None:
    """A row gives the same whatever rows stand beside it."""
    with torch.no_grad():
        together = module(x)
        for row in range(x.shape[0]):
            assert relative(together[row : row + 1], module(x[row : row + 1])) < 1e-6
