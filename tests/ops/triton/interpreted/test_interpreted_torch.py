"""The operators hold torch's contracts: opcheck, autocast, one graph for any length, export; and what they save."""

import pytest
import torch
from torch.library import opcheck

from retnet.ops import log_decays, retention, rotate, rotation
from tests.helpers.parity import outputs_and_gradients, random_inputs, relative

LOG_DECAY = log_decays("paper", 2)
ops = torch.ops.retnet


@pytest.fixture(autouse=True)
def _unpoisoned(_poisoned):
    """opcheck and inductor compare and trace more than our memory."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("state", "cu_seqlens", "keep"),
    [(True, None, True), (False, torch.tensor([0, 9, 9, 20]), False)],
    ids=["kept", "packed"],
)
def test_opcheck_training(state, cu_seqlens, keep):
    q, k, v, s = random_inputs(1, 20, 2, 16, 20, dtype=torch.float32, rows=None if cu_seqlens is None else 3)
    s = s if state else None
    opcheck(ops.retention_chunkwise_triton, (q, k, v, LOG_DECAY, s, cu_seqlens, 0.25, 16, keep))
    q, k, v = (x.detach() for x in (q, k, v))
    s = None if s is None else s.detach()
    out, final, snapshots = ops.retention_chunkwise_triton(q, k, v, LOG_DECAY, s, cu_seqlens, 0.25, 16, keep)
    opcheck(
        ops.retention_chunkwise_triton_backward,
        (
            *(q, k, v, LOG_DECAY, s, cu_seqlens, 0.25, 16),
            *(out, final if state else None, snapshots if keep else None, False),
        ),
    )


@pytest.mark.parametrize("slots", [None, torch.tensor([4, -1], dtype=torch.int32)], ids=["rows", "slots"])
def test_opcheck_step(slots):
    q, k, v = (torch.randn(2, 2, n) for n in (16, 16, 20))
    opcheck(ops.retention_step_triton, (q, k, v, LOG_DECAY, torch.randn(5, 2, 16, 20), slots, 0.25))


def test_autocast_narrows_tokens_and_nothing_else():
    """γ in bf16 would be 1 from the fourth head on, and the state must not be rounded at every call."""
    q, k, v, state = random_inputs(1, 20, 2, 16, 16, dtype=torch.float32)
    state = (state.detach() + 1000.0).requires_grad_()  # bf16 would round it to multiples of 4
    log_decay = log_decays("paper", 12)[-2:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, final = retention(q, k, v, log_decay, state, backend="triton")
    assert out.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    grads = torch.autograd.grad(out.float().sum() + final.sum(), (q, k, v, state))
    assert all(x.dtype == torch.float32 for x in grads)
    _, want = retention(
        *(x.double() for x in (q, k, v)), log_decay.double(), state.double(), backend="reference"
    )
    assert relative(final - 1000, want - 1000) < 5e-3


def test_kept_states_are_used_and_give_the_same_gradients(monkeypatch):
    """Kept, STATE runs once forward and once back; computed again, it runs twice forward."""
    from retnet.ops.triton import launch

    plain, runs = launch.state_pass, []

    def counted(*arguments, **options):
        runs.append(options["reverse"])
        return plain(*arguments, **options)

    monkeypatch.setattr(launch, "state_pass", counted)
    inputs = random_inputs(1, 50, 1, 16, 16, dtype=torch.float32)
    kept = outputs_and_gradients(inputs, LOG_DECAY[:1], backend="triton", chunk_size=16, keep_states=True)
    assert runs == [False, True]
    runs.clear()
    again = outputs_and_gradients(inputs, LOG_DECAY[:1], backend="triton", chunk_size=16)
    assert runs == [False, False, True]
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_what_autograd_saves():
    q, k, v, state = random_inputs(1, 64, 1, 16, 16, dtype=torch.float32)
    sizes = []
    for keep in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=saved: s.append(x.numel()) or x, lambda x: x
        ):
            retention(q, k, v, LOG_DECAY[:1], state, chunk_size=16, backend="triton", keep_states=keep)
        sizes.append(sum(saved))
    inputs = q.numel() + k.numel() + v.numel() + state.numel() + 1
    assert sizes == [inputs, inputs + 4 * 16 * 16]


class Layer(torch.nn.Module):
    """The smallest module with projections, rotation and retention."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(24, 2 * 52)
        self.register_buffer("log_decay", LOG_DECAY)
        self.register_buffer("theta", torch.rand(8, dtype=torch.float64))

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (2, 52)).split([16, 16, 20], dim=-1)
        cos, sin = rotation(torch.arange(x.shape[1])[None], self.theta)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out, state = retention(q, k, v, self.log_decay, chunk_size=16, backend="triton", keep_states=True)
        return out.flatten(2), state


def test_one_graph_for_any_length():
    torch._dynamo.reset()
    module = Layer()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for T in (40, 56, 77):
        x = torch.randn(2, T, 24)
        results = []
        for run in (module, compiled):
            out, state = run(x)
            (out.square().sum() + state.sum()).backward()
            results.append((out, state, module.project.weight.grad.clone()))
            module.zero_grad()
        for want, got in zip(*results, strict=True):
            assert relative(got, want) < 1e-6
    assert graphs["unique_graphs"] == 1


def test_a_compiled_step_updates_its_slots_in_place():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two_steps(q, k, v, state, slots):
        ops.retention_step_triton(q, k, v, LOG_DECAY, state, slots, 0.25)
        return ops.retention_step_triton(q, k, v, LOG_DECAY, state, slots, 0.25)

    q, k, v = (torch.randn(2, 2, n) for n in (16, 16, 20))
    slots = torch.tensor([4, 1], dtype=torch.int32)
    pool = torch.randn(5, 2, 16, 20)
    other = pool.clone()
    got = two_steps(q, k, v, pool, slots)
    for _ in range(2):
        want = ops.retention_step_triton(q, k, v, LOG_DECAY, other, slots, 0.25)
    assert torch.equal(got, want)
    assert torch.equal(pool, other)


def test_export_with_dynamic_length():
    module = Layer().eval()
    exported = torch.export.export(
        module, (torch.randn(2, 40, 24),), dynamic_shapes=({1: torch.export.Dim("T", min=2)},)
    )
    x = torch.randn(2, 59, 24)
    assert relative(exported.module()(x)[0], module(x)[0]) < 1e-6


def test_tuning_measures_keeps_and_reuses(monkeypatch, tmp_path):
    """The search itself; the clock is ours, since nothing here runs on a GPU."""
    import json

    import triton

    from retnet.ops.triton import autotune

    monkeypatch.setenv("RETNET_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("RETNET_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(autotune, "_known", {})
    times = iter([3.0, 2.0, 1.0])
    measured = []

    def bench(run, return_mode):
        measured.append(run.args[0])
        run()
        return next(times, 5.0)

    monkeypatch.setattr(triton.testing, "do_bench", bench)
    inputs = random_inputs(1, 40, 1, 16, 32, dtype=torch.float32)
    want, _ = retention(*inputs[:3], LOG_DECAY[:1], backend="torch")
    out, _ = retention(*inputs[:3], LOG_DECAY[:1], backend="triton")
    assert relative(out, want) < 1e-6  # the last candidate ran before the chosen one, which overwrites it
    stored = json.loads((tmp_path / "new" / "triton.json").read_text())
    state, out_key = sorted(stored, reverse=True)
    assert "state/sm_90/16/32/False/False/torch.float32" in state
    assert "out/sm_90/16/32/False/False/False/torch.float32" in out_key
    assert stored[state] == list(measured[2])
    seen = len(measured)
    monkeypatch.setattr(autotune, "_known", {})  # another process: the file is read
    retention(*inputs[:3], LOG_DECAY[:1], backend="triton")
    assert len(measured) == seen
    wider = random_inputs(1, 40, 1, 32, 32, dtype=torch.float32)
    retention(*wider[:3], LOG_DECAY[:1], backend="triton")  # another head shape is another key
    assert len(measured) > seen


def test_memory_nobody_wrote_is_poison():
    torch.use_deterministic_algorithms(True)
    x = torch.ones(2)
    assert all(y.isnan().all() for y in (torch.empty(3), x.new_empty(3), torch.empty_like(x)))
