"""The operators behind `retention` hold torch's own contracts: opcheck, one graph under compile, dynamic lengths, export."""

import pytest
import torch
from torch.library import opcheck

from retnet.ops import log_decays, retention, retention_step, rotate, rotation
from tests.helpers.fast import few_fast
from tests.helpers.parity import random_inputs, relative

LOG_DECAY = log_decays("paper", 3)
PACKED = torch.tensor([0, 9, 9, 20])


def arguments(state, cu_seqlens):
    q, k, v, s = random_inputs(1, 20, 3, 8, 12, dtype=torch.float32, rows=None if cu_seqlens is None else 3)
    return (q, k, v, LOG_DECAY, s if state else None, cu_seqlens, 0.25, 8, False)


@pytest.mark.parametrize(
    ("backend", "state", "cu_seqlens"),  # every pair of them
    [
        pytest.param("torch", True, None, id="torch-state", marks=pytest.mark.slow),
        pytest.param("torch", False, PACKED, id="torch-packed", marks=pytest.mark.slow),
        pytest.param("numba", True, PACKED, id="numba-state-packed", marks=pytest.mark.slow),
        pytest.param("numba", False, None, id="numba", marks=pytest.mark.slow),
    ],
)
def test_opcheck_chunkwise(backend, state, cu_seqlens):
    args = arguments(state, cu_seqlens)
    forward = getattr(torch.ops.retnet, f"retention_chunkwise_{backend}")
    backward = getattr(torch.ops.retnet, f"retention_chunkwise_{backend}_backward")
    opcheck(forward, args)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, final, _ = forward(*plain)
    d_out, d_final = torch.ones_like(out), torch.ones_like(final) if state else None
    opcheck(backward, (*args[:8], d_out, d_final, None, False))


@pytest.mark.parametrize("slots", [None, torch.tensor([4, -1], dtype=torch.int32)], ids=["rows", "slots"])
@pytest.mark.parametrize("backend", few_fast(["torch", "numba"], "numba"))
def test_opcheck_step(slots, backend):
    q, k, v = (torch.randn(2, 3, n) for n in (8, 8, 12))
    step = getattr(torch.ops.retnet, f"retention_step_{backend}")
    opcheck(step, (q, k, v, LOG_DECAY, torch.randn(5, 3, 8, 12), slots, 0.25))


@pytest.mark.parametrize("interleaved", [True, False])
def test_opcheck_rotate(interleaved):
    cos, sin = rotation(torch.arange(6)[None], torch.rand(4, dtype=torch.float64))
    opcheck(
        torch.ops.retnet.rotary_torch, (torch.randn(2, 6, 3, 8, requires_grad=True), cos, sin, interleaved)
    )


class Layer(torch.nn.Module):
    """The smallest module with projections, rotation and retention."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(24, 3 * 28)
        self.register_buffer("log_decay", LOG_DECAY)
        self.register_buffer("theta", torch.rand(4, dtype=torch.float64))

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 28)).split([8, 8, 12], dim=-1)
        cos, sin = rotation(torch.arange(x.shape[1])[None], self.theta)
        out, state = retention(
            rotate(q, cos, sin), rotate(k, cos, sin, "halves"), v, self.log_decay, chunk_size=16
        )
        return out.flatten(2), state


@pytest.mark.slow
def test_one_graph_under_compile_with_dynamic_lengths():
    torch._dynamo.reset()
    module = Layer()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()  # of other tests
    graphs = torch._dynamo.utils.counters["stats"]
    for T in (40, 56, 77):
        x = torch.randn(2, T, 24)
        want, want_state = module(x)
        want.square().sum().backward()
        expected = module.project.weight.grad.clone()
        module.zero_grad()
        got, state = compiled(x)
        got.square().sum().backward()
        assert relative(got, want) < 1e-6
        assert relative(state, want_state) < 1e-6
        assert relative(module.project.weight.grad, expected) < 1e-5
        module.zero_grad()
    assert graphs["unique_graphs"] == 1


@pytest.mark.slow
def test_a_compiled_step_updates_its_slots_in_place():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def two_steps(q, k, v, state, slots):
        retention_step(q, k, v, LOG_DECAY, state, slots)
        return retention_step(q, k, v, LOG_DECAY, state, slots)

    q, k, v = (torch.randn(2, 3, n) for n in (8, 8, 12))
    slots = torch.tensor([4, 1], dtype=torch.int32)
    pool = torch.randn(5, 3, 8, 12)
    other = pool.clone()
    with torch.no_grad():
        got = two_steps(q, k, v, pool, slots)
        for _ in range(2):
            want = retention_step(q, k, v, LOG_DECAY, other, slots)
    assert relative(got, want) < 1e-6
    assert relative(pool, other) < 1e-6


def test_export_with_dynamic_length():
    module = Layer().eval()
    exported = torch.export.export(
        module, (torch.randn(2, 40, 24),), dynamic_shapes=({1: torch.export.Dim("T", min=2)},)
    )
    x = torch.randn(2, 99, 24)
    assert relative(exported.module()(x)[0], module(x)[0]) < 1e-6
