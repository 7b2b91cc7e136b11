"""What every mixer of the table has to hold, and the options of multi-scale retention."""

import itertools

import pytest
import torch

from retnet.mixers import MIXERS, Mixer, MultiScaleRetention, RetentionConfig, RetentionState
from retnet.ops import log_decays
from retnet.settings import UserError
from tests.helpers.parity import (
    assert_causal,
    assert_rows_independent,
    assert_three_ways_agree,
    relative,
)

VARIANTS = {
    "default": {},
    "no gate": {"gate": False},
    "rms head norm": {"head_norm": "rms"},
    "affine": {"head_norm": "group", "head_norm_affine": True},
    "ε bridge": {"head_norm": "rms", "score_norm": "decay"},
    "no head norm": {"head_norm": "none", "score_norm": "none"},
    "rows normalised": {"head_norm": "none", "score_norm": "decay"},
    "paper's scores": {"head_norm": "none", "score_norm": "paper"},
    "paper's scores and head norm": {"score_norm": "paper"},
    "no decay": {"decay": "none"},
    "no decay, bridge": {"decay": "none", "score_norm": "decay"},
    "one γ": {"decay": 127 / 128},
    "list": {"decay": (1.0, 0.5)},
    "experiments": {"decay": "experiments"},
    "no rotation": {"rotary": "none"},
    "halves": {"rotary": "halves", "rotary_spacing": "geometric"},
    "ring": {
        "decay": "alibi",
        "qk_norm": True,
        "rotary": "halves",
        "rotary_dim": 4,
        "gate_activation": "sigmoid",
        "head_norm": "rms",
        "head_norm_affine": True,
        "head_norm_groups": 1,
    },
    "minimax": {"scale": 1.0, "activation": "silu", "head_norm_groups": 1, "head_norm_affine": True},
    "widths": {"key_dim": 6, "value_dim": 5},
    "parallel": {"form": "parallel"},
    "recurrent": {"form": "recurrent"},
    "chunks of 7": {"form": "chunkwise", "chunk_size": 7},
    "reference": {"backend": "reference"},
}


def mixer(dtype=torch.float64, **options) -> MultiScaleRetention:
    torch.manual_seed(0)
    module = MultiScaleRetention(16, RetentionConfig(num_heads=2, **options)).to(dtype)
    for p in module.parameters():  # affine weights that do something
        torch.nn.init.normal_(p, std=0.5)
    return module


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_holds_the_protocol(name):
    module = MIXERS[name](16, MIXERS[name].Config()).double()
    assert isinstance(module, Mixer)
    assert MIXERS[name].Config().name == name
    x = torch.randn(3, 70, 16, dtype=torch.float64)
    assert_three_ways_agree(module, x, 1e-9)
    assert_causal(module, x, leak=0.0 if module.exactly_causal else 1e-13)
    assert_rows_independent(module, x)
    state = module.init_state(3)
    assert all(part.shape[0] == 3 for part in state)
    assert module.mixing_flops(100) > 0


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, 1e-9, id="fp64"),
        pytest.param(torch.float32, 1e-4, id="fp32", marks=pytest.mark.slow),
    ],
)
def test_variants_in_three_ways(options, dtype, tolerance):
    module = mixer(dtype, **options)
    x = torch.randn(2, 75, 16, dtype=dtype)
    assert_three_ways_agree(module, x, tolerance)
    assert_causal(module, x)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_on_packed_documents(options):
    module = mixer(**options)
    lengths = [5, 0, 1, 20, 1, 5]
    bounds = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    x = torch.randn(1, bounds[-1], 16, dtype=torch.float64)
    whole = module(x, cu_seqlens=cu_seqlens)
    first, state = module.prefill(x, module.init_state(len(lengths)), cu_seqlens=cu_seqlens)
    assert relative(first, whole) < 1e-12
    second, state = module.prefill(
        x, state, cu_seqlens=cu_seqlens
    )  # every document goes on with its own state
    assert state.position.tolist() == [2 * n for n in lengths]
    for a, b in itertools.pairwise(bounds):
        if a < b:
            twice = module(torch.cat([x[:, a:b]] * 2, dim=1))
            assert relative(torch.cat([whole[:, a:b], second[:, a:b]], dim=1), twice) < 1e-9


def naive(module: MultiScaleRetention, x: torch.Tensor) -> torch.Tensor:
    """The paper's equations with loops and complex numbers, for the default configuration and the score norms."""
    c, H = module.config, module.num_heads
    T = x.shape[1]
    gamma = log_decays(c.decay, H, torch.float64).exp()
    heads = []
    q, k, v = (p(x).unflatten(-1, (H, -1)) for p in (module.q_proj, module.k_proj, module.v_proj))
    K = q.shape[-1]
    theta = 10000.0 ** -torch.linspace(0, 1, K // 2, dtype=torch.float64)
    turn = torch.exp(1j * torch.arange(T, dtype=torch.float64)[:, None, None] * theta)
    turn = turn.to(torch.complex64).to(torch.complex128) if x.dtype == torch.float32 else turn
    q, k = (torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn for y in (q, k))
    for h in range(H):
        scores = torch.einsum("bnk,bmk->bnm", q[:, :, h], k[:, :, h].conj()).real / K**0.5
        n = torch.arange(T, dtype=torch.float64)
        D = torch.where(n[:, None] >= n, gamma[h] ** (n[:, None] - n).clamp(min=0), 0.0)
        if c.score_norm in ("decay", "paper"):
            D = D / D.sum(1, keepdim=True).sqrt()
        R = scores * D
        if c.score_norm == "paper":
            R = R / R.sum(-1, keepdim=True).abs().clamp(min=1)
        heads.append(R @ v[:, :, h])
    y = torch.stack(heads, dim=2)
    if c.head_norm == "group":
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + c.head_norm_eps).sqrt()
    elif c.head_norm == "rms":
        y = y / (y.square().mean(-1, keepdim=True) + c.head_norm_eps).sqrt()
    g = module.gate_proj(x)
    return module.out_proj(g * torch.sigmoid(g) * y.flatten(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": "none"},
        {"head_norm": "rms"},
        {
            "head_norm": "rms",
            "score_norm": "decay",
            "head_norm_eps": 1e-2,
        },  # the ε bridge, with an ε that is felt
        {"head_norm": "none", "score_norm": "none"},
        {"head_norm": "none", "score_norm": "decay"},
        {"head_norm": "none", "score_norm": "decay", "decay": "none"},
        {"head_norm": "none", "score_norm": "paper"},
    ],
    ids=str,
)
def test_is_what_the_paper_writes(options):
    module = mixer(**options)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    assert relative(module(x), naive(module, x)) < 1e-10


def test_the_score_norms_of_the_paper_act():
    """Factor 3 clips rows whose scores sum to more than 1 in size; inputs large enough that it does."""
    x = 4 * torch.randn(1, 30, 16, dtype=torch.float64)
    options = {"head_norm": "none", "gate": False}
    outs = [mixer(score_norm=s, **options)(x) for s in ("none", "decay", "paper")]
    assert relative(outs[0], outs[1]) > 0.1
    assert relative(outs[1], outs[2]) > 0.1


def test_under_a_head_norm_the_score_norms_cancel_up_to_epsilon():
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    plain, bridged = (mixer(score_norm=s, head_norm_eps=1e-12)(x) for s in ("none", "decay"))
    assert relative(plain, bridged) < 1e-8


@torch.no_grad()
def test_a_step_on_rows_of_a_pool_is_a_step_of_those_rows():
    module, rows = mixer(score_norm="decay"), torch.tensor([4, 0, 3])
    pool, position = (
        torch.randn(6, *module.init_state(1).kv.shape[1:], dtype=torch.float64),
        torch.tensor([9, 0, 2]),
    )
    x, before = torch.randn(3, 16, dtype=torch.float64), pool.clone()
    wanted, after = module.step(x, RetentionState(pool[rows], position.clone()))
    y, moved = module.step(x, RetentionState(pool, position), slots=rows)
    assert relative(y, wanted) < 1e-12
    assert relative(pool[rows], after.kv) < 1e-12
    assert torch.equal(moved.position, after.position)
    assert torch.equal(pool[[1, 2, 5]], before[[1, 2, 5]])


def test_half_weights_keep_gamma_angles_and_states_wide():
    """Rounded to bf16, γ of head 4 and up would be 1; after 8192 tokens nothing would be forgotten."""
    torch.manual_seed(0)
    config = RetentionConfig(num_heads=8)
    exact = MultiScaleRetention(64, config)
    half = MultiScaleRetention(64, config)
    half.load_state_dict(exact.state_dict())
    half = half.to(torch.bfloat16)
    assert half.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(half.log_decay, log_decays("paper", 8))
    assert half.theta.dtype == torch.float64
    exact.load_state_dict({name: w.float() for name, w in half.state_dict().items()})  # the same weights
    x = torch.randn(1, 8192, 64).bfloat16()
    with torch.no_grad():
        state = half.init_state(1)
        got, state = half.prefill(x, state)
        want, exact_state = exact.prefill(x.float(), exact.init_state(1))
    assert state.kv.dtype == torch.float32
    assert got.dtype == torch.bfloat16
    assert relative(got, want) < 1e-2
    assert relative(got[:, -64:], want[:, -64:]) < 1e-2  # the far end is no worse
    assert relative(state.kv, exact_state.kv) < 5e-3


def test_constants_survive_meta_construction():
    with torch.device("meta"):
        module = MultiScaleRetention(16, RetentionConfig(num_heads=2))
    module = module.to_empty(device="cpu")
    assert torch.equal(module.log_decay, log_decays("paper", 2))
    assert float(module.theta[0]) == 1.0
    assert "log_decay" not in module.state_dict()


def test_parameters_are_8_d_squared():
    module = MultiScaleRetention(64, RetentionConfig(num_heads=4))
    assert sum(p.numel() for p in module.parameters()) == 8 * 64**2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"head_norm": "none"}, "score_norm must be chosen: 'none', 'decay'"),
        ({"decay": 1.5}, r"γ = 1.5 is outside \(0, 1\]"),
        ({"decay": (0.5, 0.5, 0.5)}, "lists 3 values for 4 heads"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: 'reference', 'torch', 'numba', 'triton', 'auto'"),
        ({"backend": "cpu"}, "backend 'cpu' is now 'torch'"),
        ({"key_dim": 0}, "key_dim is 0"),
        ({"head_norm_eps": -1.0}, "head_norm_eps is -1.0"),
    ],
)
def test_mistakes_in_the_configuration(options, message):
    with pytest.raises(UserError, match=message):
        RetentionConfig(**options)


def test_widths_that_do_not_fit():
    with pytest.raises(UserError, match="d_model 16 is not a multiple of num_heads 3"):
        MultiScaleRetention(16, RetentionConfig(num_heads=3))
    with pytest.raises(UserError, match="key_dim 5 is odd"):
        MultiScaleRetention(16, RetentionConfig(key_dim=5))
