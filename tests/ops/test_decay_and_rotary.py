"""Decay schedules against the paper's formulas, rotation against complex numbers."""

import math

import pytest
import torch

from retnet.ops import apply_rotary, frequencies, log_decays, positions, retention, rotate, rotation
from tests.helpers.parity import random_inputs, relative


class TestDecay:
    def test_paper_default(self):
        gammas = log_decays("paper", 4).double().exp()
        assert torch.allclose(
            gammas, torch.tensor([1 - 2.0**-n for n in (5, 6, 7, 8)], dtype=torch.float64), atol=1e-8
        )

    def test_paper_experiments(self):
        gammas = log_decays("experiments", 5).double().exp()
        assert math.isclose(float(gammas[0]), 1 - 1 / 32, abs_tol=1e-7)
        assert math.isclose(float(gammas[-1]), 1 - 1 / 512, abs_tol=1e-7)
        assert math.isclose(float(gammas[2]), 1 - 1 / 128, abs_tol=1e-7)

    def test_many_heads_never_round_to_one(self):
        assert (log_decays("paper", 32) < 0).all()

    def test_constant_none_and_list(self):
        assert torch.equal(
            log_decays(127 / 128, 3), torch.full((3,), 127 / 128, dtype=torch.float64).log().float()
        )
        assert torch.equal(log_decays("none", 3), torch.zeros(3))
        assert torch.equal(log_decays(1, 2), torch.zeros(2))
        assert torch.allclose(log_decays((0.5, 1.0), 2).exp(), torch.tensor([0.5, 1.0]))

    @pytest.mark.parametrize(
        ("decay", "message"),
        [
            ("papers", "unknown decay 'papers'; allowed: 'paper'"),
            (1.5, r"γ = 1.5 is outside \(0, 1\]"),
            (0.0, r"γ = 0.0 is outside"),
            ((0.5, -0.1), r"γ = -0.1 is outside"),
            ((0.5,), "lists 1 values for 2 heads"),
            (float("nan"), "outside"),
        ],
    )
    def test_mistakes(self, decay, message):
        with pytest.raises(ValueError, match=message):
            log_decays(decay, 2)


class TestRotation:
    def test_spacings(self):
        inclusive, geometric = frequencies(8, "inclusive"), frequencies(8, "geometric")
        assert torch.allclose(inclusive, 10000.0 ** -torch.tensor([0, 1 / 3, 2 / 3, 1], dtype=torch.float64))
        assert torch.allclose(
            geometric, 10000.0 ** -torch.tensor([0, 1 / 4, 2 / 4, 3 / 4], dtype=torch.float64)
        )

    @pytest.mark.parametrize("layout", ["interleaved", "halves"])
    def test_is_a_complex_product(self, layout):
        x = torch.randn(2, 7, 3, 8, dtype=torch.float64, requires_grad=True)
        theta = frequencies(8)
        n = positions(7) + 5
        cos, sin = rotation(n, theta, torch.float64)
        got = rotate(x, cos, sin, layout)
        a, b = (x[..., ::2], x[..., 1::2]) if layout == "interleaved" else (x[..., :4], x[..., 4:])
        turned = torch.complex(a, b) * torch.exp(1j * n[0, :, None, None] * theta)
        parts = (got[..., ::2], got[..., 1::2]) if layout == "interleaved" else (got[..., :4], got[..., 4:])
        assert relative(torch.stack(parts), torch.stack([turned.real, turned.imag])) < 1e-12
        assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin, layout), (x,))

    def test_layouts_are_a_permutation(self):
        x = torch.randn(1, 5, 2, 6)
        cos, sin = rotation(positions(5), frequencies(6))
        order = [0, 2, 4, 1, 3, 5]
        assert torch.allclose(
            rotate(x, cos, sin)[..., order], rotate(x[..., order], cos, sin, "halves"), atol=1e-6
        )

    def test_products_depend_on_the_distance_alone(self):
        q, k, v, _ = (x.detach() for x in random_inputs(1, 12, 2, 8, 4))
        log_decay = log_decays("paper", 2)

        def out(shift):
            cos, sin = rotation(positions(12) + shift, frequencies(8), torch.float64)
            return retention(rotate(q, cos, sin), rotate(k, cos, sin), v, log_decay)[0]

        assert relative(out(10**7), out(0)) < 1e-8

    def test_far_positions_are_exact(self):
        cos, sin = rotation(torch.tensor([10**7]), frequencies(64))
        angle = [math.fmod(10**7 * t, 2 * math.pi) for t in frequencies(64).tolist()]
        assert torch.allclose(cos[0], torch.tensor([math.cos(a) for a in angle]), atol=1e-6)
        assert torch.allclose(sin[0], torch.tensor([math.sin(a) for a in angle]), atol=1e-6)

    def test_narrow_types_are_rotated_in_fp32(self):
        x = torch.randn(1, 4096, 2, 8)
        cos, sin = rotation(positions(4096), frequencies(8))
        for layout in ("interleaved", "halves"):
            got = rotate(x.bfloat16(), cos, sin, layout)
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, rotate(x.bfloat16().float(), cos, sin, layout).bfloat16())

    @pytest.mark.parametrize("backend", ["auto", "reference", "torch", "numba"])
    def test_queries_and_keys_together(self, backend):
        q, k = torch.randn(3, 5, 2, 8), torch.randn(3, 5, 2, 8).bfloat16()
        for position in (positions(5), positions(5, start=torch.tensor([7, 0, 10**7]))):
            cos, sin = rotation(position, frequencies(8))
            got = apply_rotary(q, k.float(), position, frequencies(8), "halves", backend)
            assert torch.equal(got[0], rotate(q, cos, sin, "halves"))
            assert torch.equal(got[1], rotate(k.float(), cos, sin, "halves"))
            assert apply_rotary(k, k, position, frequencies(8))[0].dtype == torch.bfloat16
        one, _ = apply_rotary(q[:, 2], q[:, 2], torch.tensor([2, 2, 2]), frequencies(8))  # a step
        assert torch.allclose(one, apply_rotary(q, q, positions(5), frequencies(8))[0][:, 2], atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"k": (3, 5, 2, 6)}, r"k has shape \(3, 5, 2, 6\); allowed: that of q, \(3, 5, 2, 8\)"),
            ({"q": (3, 5, 2, 7)}, r"q has shape \(3, 5, 2, 7\); allowed: \[...,H,K\], K even"),
            ({"q": (5, 8)}, r"q has shape \(5, 8\)"),
            (
                {"position": (2, 5)},
                r"position has shape \(2, 5\); allowed: \(3, 5\) as in q, or 1 for its first",
            ),
            ({"position": (3, 4)}, r"position has shape \(3, 4\)"),
            ({"position": ()}, r"position has shape \(\)"),
            ({"theta": (8,)}, r"theta has shape \(8,\); allowed: \(4,\), half of K"),
        ],
    )
    def test_shapes_that_do_not_fit(self, change, message):
        shapes = {"q": (3, 5, 2, 8), "k": (3, 5, 2, 8), "position": (1, 5), "theta": (4,)} | change
        with pytest.raises(ValueError, match=message):
            apply_rotary(**{name: torch.zeros(shape) for name, shape in shapes.items()})

    def test_positions(self):
        assert positions(3).tolist() == [[0, 1, 2]]
        assert positions(3, start=torch.tensor([5, 0])).tolist() == [[5, 6, 7], [0, 1, 2]]
        bounds = torch.tensor([0, 2, 2, 5])
        assert positions(5, bounds).tolist() == [[0, 1, 0, 1, 2]]
        assert positions(5, bounds, start=torch.tensor([7, 9, 1])).tolist() == [[7, 8, 1, 2, 3]]

    def test_mistakes(self):
        with pytest.raises(ValueError, match="key_dim must be even and at least 2, got 7"):
            frequencies(7)
        with pytest.raises(
            ValueError, match="unknown rotary spacing 'linear'; allowed: 'inclusive', 'geometric'"
        ):
            frequencies(8, "linear")
        with pytest.raises(ValueError, match="base of the rotation must be positive"):
            frequencies(8, base=0)
        with pytest.raises(
            ValueError, match="unknown rotary layout 'half'; allowed: 'interleaved', 'halves'"
        ):
            rotate(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), "half")
        x = torch.zeros(1, 1, 1, 8)
        with pytest.raises(ValueError, match="unknown rotary layout 'half'"):
            apply_rotary(x, x, positions(1), frequencies(8), "half")
        with pytest.raises(
            ValueError, match="backend is 'cuda'; allowed: 'reference', 'torch', 'numba', 'triton', 'auto'"
        ):
            apply_rotary(x, x, positions(1), frequencies(8), backend="cuda")
