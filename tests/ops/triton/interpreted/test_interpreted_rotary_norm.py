"""Rotation, and head norm with gate: forward and all gradients against torch's formula in fp64, at the tiles that ship."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retnet.ops import apply_rotary, frequencies, head_norm, positions
from retnet.ops.triton import rotary_norm_launch, tile_table
from tests.helpers.parity import relative
from tests.ops.triton.interpreted.test_interpreted_training import strange

UNIT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def normal(seed, *shape, dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def gradients(outputs, leaves, seed=0x9E3779B9):
    """Of every leaf that is there, under a random linear functional of all outputs, which has no seed of a leaf."""
    loss = sum((y.double() * normal(seed, *y.shape, dtype=torch.float64).detach()).sum() for y in outputs)
    return torch.autograd.grad(loss, [x for x in leaves if x is not None])


def exactly(x):
    return None if x is None else x.detach().double().requires_grad_()


class TestRotary:
    def check(self, q, k, position, key_dim, layout, tolerance, spacing="inclusive"):
        theta = frequencies(key_dim, spacing)
        results = []
        for backend, leaves in (("triton", (q, k)), ("reference", (exactly(q), exactly(k)))):
            turned = apply_rotary(*leaves, position, theta, layout, backend)
            results.append([*turned, *gradients(turned, leaves)])
        for got, want, like in zip(*results, (q, k, q, k), strict=True):
            assert got.dtype == like.dtype
            assert relative(got, want) < tolerance

    @pytest.mark.parametrize("layout", ["interleaved", "halves"])
    @pytest.mark.parametrize(
        ("B", "T", "H", "K", "dtype", "spacing"),
        [
            (2, 9, 3, 256, torch.bfloat16, "inclusive"),
            (1, 37, 2, 60, torch.float16, "geometric"),
            (2, 5, 1, 2, torch.float32, "geometric"),
            (1, 70, 2, 64, torch.float32, "inclusive"),
            (1, 3, 1, 1000, torch.float32, "inclusive"),
        ],
        ids=str,
    )
    def test_every_layout_spacing_and_type(self, B, T, H, K, dtype, spacing, layout, seed):
        """Rows of a batch at positions of their own, as far as 10⁷ and before 0."""
        q, k = normal(seed, B, T, H, K, dtype=dtype), normal(seed + 1, B, T, H, K, dtype=dtype)
        position = torch.randint(-9, 10**7, (B, T), generator=torch.Generator().manual_seed(seed))
        self.check(q, k, position, K, layout, UNIT[dtype], spacing)

    @pytest.mark.parametrize("programs", [1, 35, 10**6], ids=["all heads", "two heads", "one head"])
    def test_heads_of_a_program(self, programs, seed, monkeypatch):
        monkeypatch.setattr(tile_table, "PROGRAMS", programs)
        monkeypatch.setattr(tile_table, "ROTARY_SIZE", 16)
        q, k = normal(seed, 1, 25, 3, 20), normal(seed + 1, 1, 25, 3, 20)
        self.check(q, k, positions(25) + 7, 20, "interleaved", 1e-6)

    def test_positions_as_the_mixer_makes_them(self, seed):
        """One row's for all rows; documents, empty ones too, each carried on from where it was; a single step."""
        q, k = normal(seed, 3, 14, 2, 20), normal(seed + 1, 3, 14, 2, 20)
        self.check(q, k, positions(14), 20, "halves", 1e-6)
        self.check(q, k, positions(14, start=torch.tensor([5, 0, 10**6])), 20, "interleaved", 1e-6)
        bounds = torch.tensor([0, 3, 3, 14], dtype=torch.int32)
        packed = positions(14, bounds, start=torch.tensor([100, 5, 0]))
        self.check(q[:1], k[:1], packed, 20, "interleaved", 1e-6)
        for one in (torch.tensor([7, 0, 123]), torch.tensor([9], dtype=torch.int32)):
            self.check(q[:, 0], k[:, 0], one, 20, "interleaved", 1e-6)

    def test_cos_and_sin_to_the_last_place(self, seed):
        """The pair (1, 0) turns into (cos, sin): every eighth of a turn, where quarters meet, and anything between."""
        eighths = torch.arange(-17, 18)
        q = torch.zeros(1, len(eighths), 1, 2)
        q[..., 0] = 1
        got, _ = apply_rotary(q, q, eighths[None], frequencies(2) * math.pi / 4, backend="triton")
        angle = eighths.double() * (math.pi / 4)
        assert (got[0, :, 0].double() - torch.stack([angle.cos(), angle.sin()], -1)).abs().max() < 2**-23
        theta = frequencies(256)
        q = torch.zeros(1, 40, 1, 256)
        q[..., :128] = 1
        position = torch.randint(10**7, (1, 40), generator=torch.Generator().manual_seed(seed))
        got, _ = apply_rotary(q, q, position, theta, "halves", "triton")
        angle = position[0, :, None].double() * theta
        assert (got[0, :, 0].double() - torch.cat([angle.cos(), angle.sin()], -1)).abs().max() < 2**-23

    @pytest.mark.parametrize("how", ["heads first", "a slice of a wider projection", "every second number"])
    def test_inputs_and_gradients_that_are_not_contiguous(self, how, seed):
        q, k = (strange(normal(seed + i, 2, 12, 2, 20), how).requires_grad_() for i in range(2))
        assert not q.is_contiguous()
        self.check(q, k, positions(12), 20, "interleaved", 1e-6)
        out, _ = apply_rotary(q, k, positions(12), frequencies(20), backend="triton")
        (grad,) = torch.autograd.grad(out.sum(), q)  # an expanded gradient, and none for k's
        exact = exactly(q)
        out, _ = apply_rotary(exact, exact, positions(12), frequencies(20))
        assert relative(grad, torch.autograd.grad(out.sum(), exact)[0]) < 1e-6

    @pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
    def test_nothing_to_do(self, shape):
        x = torch.zeros(shape)
        q, k = apply_rotary(x, x, positions(shape[1]), frequencies(16), backend="triton")
        assert q.shape == k.shape == shape


def norm_case(seed, B, T, H, V, *, norm, gated, affine, sums, dtypes, scale):
    """Leaves (o, gate, weight, bias) and the options of `head_norm`."""
    o = normal(seed, B, T, H, V, dtype=dtypes[0], scale=scale)
    gate = normal(seed + 1, B, T, H * V, dtype=dtypes[1], scale=3.0) if gated else None
    weight = normal(seed + 2, H * V, dtype=dtypes[2]) if affine else None
    bias = normal(seed + 3, H * V, dtype=dtypes[2]) if affine and norm == "group" else None
    spread = None
    if sums:
        spread = 1 + 30 * torch.rand(1, T, H, generator=torch.Generator().manual_seed(seed)).double()
    return (o, gate, weight, bias), {"norm": norm, "eps": 1e-4, "sums": spread}


def check_norm(leaves, options, tolerances):
    """Output and gradients, to the precision of the narrowest type, which the output's gradient may have."""
    results = []
    for backend, (o, gate, weight, bias) in (("triton", leaves), ("reference", list(map(exactly, leaves)))):
        y = head_norm(o, gate, weight=weight, bias=bias, backend=backend, **options)
        results.append([y, *gradients([y], (o, gate, weight, bias))])
    o, gate, *_ = leaves
    tolerance = max(tolerances[x.dtype] for x in leaves if x is not None)
    like = [o if gate is None else gate, *(x for x in leaves if x is not None)]
    for got, want, x in zip(*results, like, strict=True):
        assert got.dtype == x.dtype
        assert relative(got, want) < tolerance


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class TestNorm:
    @pytest.mark.parametrize(
        ("V", "norm", "gated", "affine", "sums", "dtypes"),
        [
            (512, "group", True, False, False, (BF16, BF16, F32)),
            (512, "rms", True, False, True, (F32, F32, F32)),
            (100, "group", True, True, True, (F32, F32, F32)),
            (60, "group", False, True, True, (F16, F16, F16)),
            (60, "rms", True, True, False, (BF16, BF16, BF16)),
            (16, "rms", False, False, True, (F32, F32, F32)),
            (16, "none", True, False, True, (F16, F16, F32)),
            (100, "none", True, False, False, (BF16, BF16, F32)),
            (128, "group", True, False, False, (F32, BF16, F32)),  # a state kept wide, a gate under autocast
            (1, "rms", True, False, False, (F32, F32, F32)),
            (1024, "group", True, True, False, (F32, F16, F32)),
        ],
        ids=str,
    )
    def test_every_norm_gate_and_type(self, V, norm, gated, affine, sums, dtypes, seed):
        tokens = (2, 9) if V < 500 else (1, 7)
        leaves, options = norm_case(
            seed, *tokens, 2, V, norm=norm, gated=gated, affine=affine, sums=sums, dtypes=dtypes, scale=0.02
        )
        check_norm(leaves, options, UNIT)

    def test_it_is_the_mixers_score_normalisation(self, seed):
        """ε·s² in place of ε is dividing by s first: the exact bridge to torchscale."""
        o, sums = normal(seed, 1, 6, 2, 20, scale=0.01), torch.rand(1, 6, 2).double() * 99 + 1
        divided = o.double() * sums.rsqrt()[..., None]
        want = torch.nn.functional.layer_norm(divided, (20,), eps=1e-4).flatten(-2)
        assert relative(head_norm(o, eps=1e-4, sums=sums, backend="triton"), want) < 1e-6
        assert relative(head_norm(o, eps=1e-4, backend="triton"), want) > 0.1

    @pytest.mark.parametrize("affine", [True, False])
    def test_parts_add_up_and_in_one_order(self, affine, seed, monkeypatch):
        """More blocks than parts, so that a program has several; the same bits every time."""
        monkeypatch.setattr(tile_table, "PARTS", 3)
        monkeypatch.setattr(tile_table, "NORM_SIZE", 64)
        leaves, options = norm_case(
            seed,
            1,
            43,
            2,
            20,
            norm="group",
            gated=True,
            affine=affine,
            sums=True,
            dtypes=(F32,) * 3,
            scale=1.0,
        )
        check_norm(leaves, options, UNIT)
        o, gate, weight, bias = leaves
        runs = [head_norm(o, gate, weight=weight, bias=bias, backend="triton", **options) for _ in range(2)]
        for one, other in zip(*(gradients([y], leaves) for y in runs), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("how", ["heads first", "a slice of a wider projection", "every second number"])
    def test_inputs_and_gradients_that_are_not_contiguous(self, how, seed):
        (o, gate, *_), options = norm_case(
            seed,
            2,
            6,
            2,
            20,
            norm="group",
            gated=True,
            affine=False,
            sums=False,
            dtypes=(F32,) * 3,
            scale=1.0,
        )
        o = strange(o, how).requires_grad_()
        gate = strange(gate[..., None, :], how)[..., 0, :].requires_grad_()
        check_norm((o, gate, None, None), options, UNIT)
        y = head_norm(o, gate, backend="triton")
        exact = exactly(o), exactly(gate)
        want = torch.autograd.grad(head_norm(*exact).sum(), exact)
        for got, exact_grad in zip(torch.autograd.grad(y.sum(), (o, gate)), want, strict=True):  # expanded
            assert relative(got, exact_grad) < 1e-5

    @pytest.mark.filterwarnings(
        "ignore:overflow encountered in exp:RuntimeWarning"
    )  # numpy's word for swish(−∞) = 0
    def test_extreme_gates_and_outputs(self):
        """swish of ±100 and heads that are zero or huge: as the formula has it, never NaN."""
        o = torch.tensor([0.0, 1e4, -1e4, 1e-20])[:, None].expand(4, 16).clone()[None]  # [1,4,16]
        o[0, 1, 0] = -1e4
        gate = torch.tensor([-100.0, 100.0, 0.0, -1e4]).repeat(16)[None]
        for norm in ("group", "rms"):
            leaves = o.bfloat16().requires_grad_(), gate.bfloat16().requires_grad_(), None, None
            check_norm(leaves, {"norm": norm}, UNIT)

    @pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
    def test_nothing_to_do(self, shape):
        o, gate = torch.zeros(shape, requires_grad=True), torch.zeros(*shape[:2], 32)
        weight = torch.ones(32, requires_grad=True)
        y = head_norm(o, gate, weight=weight, backend="triton")
        assert y.shape == gate.shape
        d_o, d_weight = torch.autograd.grad(y.sum(), (o, weight))
        assert d_o.shape == shape
        assert not d_weight.any()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 3),
    V=st.sampled_from([1, 15, 16, 17, 33]),
    norm=st.sampled_from(["group", "rms", "none"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    data_seed=st.integers(0, 2**16),
)
def test_any_shape_with_tiles_so_small_that_there_are_many(tokens, heads, V, norm, flags, data_seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_table, "NORM_SIZE", 64)
        patch.setattr(tile_table, "PARTS", 2)
        gated, affine, sums = flags
        # A head of one number is its mean, and its own root mean square: nothing but rounding would be left.
        V = max(V, 15) if norm != "none" else V
        leaves, options = norm_case(
            data_seed,
            1,
            tokens,
            heads,
            V,
            norm=norm,
            gated=gated,
            affine=affine,
            sums=sums,
            dtypes=(F32,) * 3,
            scale=1.0,
        )
        check_norm(leaves, options, {F32: 3e-6})


class TestFarAddresses:
    """Offsets past 2³¹, by strides so large that few pages of the memory between are ever touched."""

    FAR = 5 << 29

    @pytest.fixture(autouse=True)
    def _no_copies(self, monkeypatch):
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
        torch.use_deterministic_algorithms(False)

    def spread(self, x, dim):
        stride = -(-self.FAR // (x.shape[dim] - 1)) // 16 * 16 + 16
        strides = list(x.stride())
        strides[dim] = stride
        far = torch.empty(stride * (x.shape[dim] - 1) + x.numel(), dtype=x.dtype).as_strided(x.shape, strides)
        return far.copy_(x)

    @pytest.mark.parametrize("dim", [1, 2], ids=["token", "head"])
    def test_inputs(self, dim, seed, monkeypatch):
        monkeypatch.setattr(tile_table, "PROGRAMS", 1)
        x = normal(seed, 1, 40, 3, 16, dtype=BF16).detach()
        far, theta = self.spread(x, dim), frequencies(16)
        got = rotary_norm_launch.rotary_pass(far, far, positions(40), theta, True, False)
        want = rotary_norm_launch.rotary_pass(x, x, positions(40), theta, True, False)
        assert all(map(torch.equal, got, want))
        if dim == 1:
            gate = normal(seed + 1, 1, 40, 48, dtype=BF16).detach()
            far_gate, options = self.spread(gate, 1), (None, None, None, "group", 1e-6)
            got, mean, rstd = rotary_norm_launch.norm_pass(far, far_gate, *options)
            want, *statistics = rotary_norm_launch.norm_pass(x, gate, *options)
            assert torch.equal(got, want)
            back = rotary_norm_launch.norm_backward_pass(
                far_gate, far, far_gate, None, None, mean, rstd, "group"
            )
            exact = rotary_norm_launch.norm_backward_pass(gate, x, gate, None, None, *statistics, "group")
            assert all(map(torch.equal, back, exact))


def test_every_head_width_has_tiles():
    for width in itertools.chain(range(1, 70), (100, 255, 256, 512, 513, 1024)):
        for tiles, size in (
            (tile_table.rotary_tiles(width), tile_table.ROTARY_SIZE),
            (tile_table.norm_tiles(width), tile_table.NORM_SIZE),
        ):
            assert width <= tiles.columns < max(32, 2 * width)
            assert tiles.rows * tiles.columns <= size
            assert tiles.rows & (tiles.rows - 1) == 0
