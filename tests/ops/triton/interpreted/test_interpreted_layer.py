"""The whole layer with every kernel in it, against the same layer in fp64 on torch's operators; and torch's contracts."""

import itertools

import pytest
import torch
from torch.library import opcheck

from retnet.mixers import MIXERS, RetentionConfig
from retnet.ops import frequencies, head_norm, positions
from tests.helpers.parity import relative

ops = torch.ops.retnet


def layer(backend="triton", dtype=torch.float32, **options):
    """With an ε that matters, and keeps a head's first outputs, which may be next to nothing, from drowning in rounding."""
    torch.manual_seed(3)
    options = {"num_heads": 2, "form": "chunkwise", "head_norm_eps": 1e-2} | options
    config = RetentionConfig(key_dim=16, value_dim=20, backend=backend, **options)
    mixer = MIXERS["retention"](24, config)
    for name, parameter in mixer.named_parameters():  # nothing at its neutral value
        if "head_norm" in name:
            torch.nn.init.normal_(parameter)
    return mixer.to(dtype)


def results(mixer, x, cu_seqlens=None):
    """Output, prefill of a part and what follows it, and the gradients of x and of all weights."""
    leaf = x.detach().requires_grad_()
    y = mixer(leaf, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(y.square().sum(), [leaf, *mixer.parameters()])
    if cu_seqlens is not None:
        return [y, *grads]
    with torch.no_grad():
        first, state = mixer.prefill(x[:, :7], mixer.init_state(len(x)))
        more, state = mixer.prefill(x[:, 7:10], state)
        last, state = mixer.step(x[:, 10], state)
    return [y, *grads, first, more, last, *state]


CASES = [
    {},
    {"score_norm": "decay", "head_norm": "rms", "head_norm_affine": True, "rotary": "halves"},
    {"score_norm": "decay", "head_norm_affine": True, "rotary_spacing": "geometric"},
    {"score_norm": "paper", "head_norm": "none", "gate": False},
    {"score_norm": "decay", "head_norm": "none", "rotary": "none"},
    {"gate": False, "head_norm": "rms"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_layer_is_the_layer(options, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 11, 24, generator=g)
    exact = results(layer("reference", torch.float64, **options), x.double())
    for got, want in zip(results(layer(**options), x), exact, strict=True):
        assert relative(got, want) < 3e-6


def test_packed_documents(seed):
    x = torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, 17, 17, 40], dtype=torch.int32)
    exact = results(layer("reference", torch.float64, score_norm="decay"), x.double(), bounds)
    for got, want in zip(results(layer(score_norm="decay"), x, bounds), exact, strict=True):
        assert relative(got, want) < 3e-6


def test_gradients_of_weights_under_autocast(seed):
    """Every kernel runs in bf16, its gradients arrive in fp32, and nothing is narrower than autocast makes it."""
    x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(seed))
    mixer, exact = layer(), layer("reference", torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    want = exact(x.double())
    assert relative(y, want) < 2e-2
    grads = torch.autograd.grad(y.float().square().sum(), list(mixer.parameters()))
    wants = torch.autograd.grad(want.square().sum(), list(exact.parameters()))
    for got, wanted in zip(grads, wants, strict=True):
        assert got.dtype == torch.float32
        assert relative(got, wanted) < 4e-2


def test_what_autograd_saves_between_retention_and_projection():
    """The heads' outputs, the gate, and two numbers a head: nothing that could be computed again in registers."""
    o, gate = torch.randn(2, 9, 2, 20, requires_grad=True), torch.randn(2, 9, 40, requires_grad=True)
    weight = torch.randn(40, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        head_norm(o, gate, weight=weight, backend="triton")
    assert sum(saved) == o.numel() + gate.numel() + weight.numel() + 2 * 2 * 9 * 2


class TestContracts:
    @pytest.fixture(autouse=True)
    def _unpoisoned(self, _poisoned):
        """opcheck and the compiler compare and trace more than our memory."""
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("interleaved", [True, False])
    def test_opcheck_rotary(self, interleaved):
        q, k = (torch.randn(2, 5, 2, 16, requires_grad=True) for _ in range(2))
        opcheck(ops.rotary_triton, (q, k, positions(5), frequencies(16), interleaved, False))

    @pytest.mark.parametrize(("kind", "full"), [("group", True), ("rms", False)])
    def test_opcheck_norm(self, kind, full):
        o, gate = torch.randn(2, 5, 2, 20, requires_grad=True), torch.randn(2, 5, 40, requires_grad=True)
        weight, bias, sums = torch.randn(40, requires_grad=True), torch.randn(40), torch.rand(1, 5, 2)
        rest = (gate, weight, bias, sums) if full else (None, None, None, None)
        opcheck(ops.head_norm_triton, (o, *rest, kind, 1e-6))
        o, *rest = (x if x is None else x.detach() for x in (o, *rest))
        y, *statistics = ops.head_norm_triton(o, *rest, kind, 1e-6)
        opcheck(ops.head_norm_triton_backward, (y, o, *rest[:3], *statistics, kind))

    def test_one_graph_for_any_length(self):
        torch._dynamo.reset()
        mixer = layer(num_heads=1, score_norm="decay", head_norm_affine=True)
        compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        for T in (9, 12):
            x = torch.randn(2, T, 24)
            for got, want in zip(*(self.trained(run, mixer, x) for run in (compiled, mixer)), strict=True):
                assert relative(got, want) < 1e-6
        assert graphs["unique_graphs"] == 1

    @staticmethod
    def trained(run, mixer, x):
        y = run(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))]

    def test_one_graph_for_any_packing(self):
        torch._dynamo.reset()
        mixer = layer(num_heads=1).requires_grad_(False)
        compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        for lengths in ((9, 2), (7, 0, 6)):
            bounds = torch.tensor([0, *itertools.accumulate(lengths)])
            x = torch.randn(1, sum(lengths), 24)
            assert relative(compiled(x, cu_seqlens=bounds), mixer(x, cu_seqlens=bounds)) < 1e-6
        assert graphs["unique_graphs"] == 1

    def test_export_with_dynamic_length(self):
        mixer = layer(num_heads=1).eval()
        exported = torch.export.export(
            mixer, (torch.randn(2, 9, 24),), dynamic_shapes=({1: torch.export.Dim("T", min=2)},)
        )
        x = torch.randn(2, 13, 24)
        assert relative(exported.module()(x), mixer(x)) < 1e-6
