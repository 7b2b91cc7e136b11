"""H3, "Hungry Hungry Hippos" (Fu et al. 2023): two state spaces with multiplications between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from retnet.mixers.base import MixerConfig, state_place
from retnet.mixers.packing import SequenceMixer
from retnet.mixers.s4d import S4D, Spectrum, Step, check_state_space
from retnet.nn import Linear, Positions, ShortConvolution, fft_flops, widened
from retnet.settings import At, Count, UserError


@dataclass(frozen=True)
class H3Config(MixerConfig):
    """Heads of width `head_width` (8 in the paper's comparison, §6) hold matrices of 8 × 8 signals each."""

    name: Literal["h3"] = "h3"
    head_width: Count = 8
    state_size: Annotated[int, At(least=2)] = 64  # of the diagonal state space
    shift_size: Count = 64  # of the shift state space: how many keys it sees
    spectrum: Spectrum = "lin"
    step_min: Step = 1e-3
    step_max: Step = 1e-1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_state_space(self.state_size, self.step_min, self.step_max)


class H3State(NamedTuple):
    """Constant in the number of tokens; fp32 or fp64."""

    keys: Tensor  # the last shift_size − 1 keys, [B,shift_size−1,D]
    ssm: Tensor  # [B,H,W²,N/2,2] for H heads of width W


class H3(SequenceMixer):
    """O_t = Q_t · SSM_diag(SSM_shift(K)ᵀ V)_t for each head (Algorithm 1).

    A shift state space keeps its last inputs as they are, so it is a filter of as many taps. The diagonal one is `S4D`,
    shared by the W² signals of a head. Weights: q_proj, k_proj, v_proj, out_proj [D,D], shift.weight [D,taps], ssm.
    """

    Config: ClassVar[type[H3Config]] = H3Config
    paper_row: ClassVar[str | None] = "H3/S4"
    along_time: ClassVar[str] = "Fourier transforms"
    exactly_causal: ClassVar[bool] = False

    def __init__(self, d_model: int, config: H3Config) -> None:
        super().__init__(d_model, config)
        if d_model % config.head_width:
            raise UserError(
                f"d_model {d_model} is not a multiple of head_width {config.head_width}; change one"
            )
        self.d_model, self.width = d_model, config.head_width
        self.num_heads = d_model // config.head_width
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model)
        self.v_proj = Linear(d_model, d_model)
        self.out_proj = Linear(d_model, d_model)
        self.shift = ShortConvolution(d_model, config.shift_size, std=config.shift_size**-0.5)
        self.ssm = S4D(self.num_heads, config.state_size, config.spectrum, config.step_min, config.step_max)

    def step(
        self, x: Tensor, state: H3State, *, positions: Positions | None = None
    ) -> tuple[Tensor, H3State]:
        """x [B,D] from `state` → [B,D] and the state after it."""
        k, keys = self.shift(self.k_proj(x)[:, None], state.keys)
        kv, ssm = self.ssm.step(self._outer(k, self.v_proj(x)[:, None])[..., 0], state.ssm)
        return self._finish(x[:, None], kv[..., None])[:, 0], H3State(keys, ssm)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> H3State:
        """Zeros. fp32 unless `dtype` is fp64."""
        device, wide = state_place(self.k_proj.weight, device, dtype)
        keys = torch.zeros(batch, self.shift.taps - 1, self.d_model, device=device, dtype=wide)
        return H3State(keys, self.ssm.init_state(batch, self.width**2, device, wide))

    def mixing_flops(self, length: int) -> int:
        """Shift, products, the kernels of all heads, and a convolution for each of their W² signals."""
        signals = self.d_model * self.width
        return (
            2 * self.d_model * self.shift.taps
            + self.num_heads * self.ssm.flops()
            + signals * (3 + fft_flops(length))
        )

    def _whole(self, x: Tensor) -> Tensor:
        k, _ = self.shift(self.k_proj(x))
        return self._finish(x, self.ssm(self._outer(k, self.v_proj(x))))

    def _extend(self, x: Tensor, state: H3State) -> tuple[Tensor, H3State]:
        k, keys = self.shift(self.k_proj(x), state.keys)
        kv, ssm = self.ssm.extend(self._outer(k, self.v_proj(x)), state.ssm)
        return self._finish(x, kv), H3State(keys, ssm)

    def _outer(self, k: Tensor, v: Tensor) -> Tensor:
        """kᵀ v of each head and token: k, v [B,T,D] → [B,H,W²,T]."""
        heads = (self.num_heads, self.width)
        k, v = k.mT.unflatten(1, heads), v.to(k.dtype).mT.unflatten(1, heads)  # [B,H,W,T]
        return (k[:, :, :, None] * v[:, :, None]).flatten(2, 3)

    def _finish(self, x: Tensor, kv: Tensor) -> Tensor:
        """Queries of x [B,T,D] on kv [B,H,W²,T], projected: [B,T,D]."""
        q = self.q_proj(x).to(widened(x)).mT.unflatten(1, (self.num_heads, self.width))
        o = (q[:, :, :, None] * kv.unflatten(2, (self.width, self.width))).sum(2)  # [B,H,W,T]
        return self.out_proj(o.flatten(1, 2).mT.to(x.dtype))
