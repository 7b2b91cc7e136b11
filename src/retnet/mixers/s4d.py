"""S4D, diagonal state spaces (Gu et al. 2022, "On the Parameterization and Initialization of Diagonal SSMs")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.mixers.base import MixerConfig, state_place
from retnet.mixers.packing import SequenceMixer
from retnet.nn import Linear, Positions, Precise, exactly, fft_convolution, fft_flops, widened
from retnet.settings import At, UserError

BLOCK = 256  # tokens read at once from a state: their powers of A are the largest thing there is

Spectrum = Literal["lin", "inv"]
Step = Annotated[float, At(above=0)]


def check_state_space(state_size: int, step_min: float, step_max: float) -> None:
    """Refuses state spaces that cannot be.

    Raises:
        UserError: an odd state size, or bounds of the step that are not min ≤ max.
    """
    if state_size % 2:
        raise UserError(f"state_size is {state_size}; it must be even: states are conjugate pairs")
    if step_max < step_min:
        raise UserError(f"step_max is {step_max}; it must be at least step_min = {step_min}")


class S4D(Precise):
    """A linear state space for each channel, x' = A x + u, y = 2 Re(C x) + D u, A diagonal and complex, held by a step Δ.

    With Ā = e^{ΔA}: x_t = Ā x_{t−1} + u_t and y_t = 2 Re(C (Ā − 1)/A · x_t) + D u_t, as recurrence or as convolution with
    K_l = 2 Re Σ_n C_n (Ā_n − 1)/A_n Ā_n^l. Half of each conjugate pair is kept. A = −e^{log_decay} + i·frequency, at
    first −1/2 + iπn (``"lin"``) or −1/2 + i(N/π)(N/(2n+1) − 1) (``"inv"``); Δ log-uniform; C and D standard normal.

    Time comes last. M signals share each of the `channels` D: u is [B,D,M,T], states are [B,D,M,N/2,2], real and imaginary.

    Weights, one-dimensional because optimisers decay matrices: log_step, skip [D], log_decay, frequency [D·N/2],
    output [D·N/2·2].
    """

    def __init__(
        self, channels: int, state_size: int, spectrum: Spectrum, step_min: float, step_max: float
    ) -> None:
        super().__init__()
        half = state_size // 2
        self.shape = (channels, half)
        n = torch.arange(half)
        frequency = math.pi * n
        if spectrum == "inv":
            frequency = (state_size / math.pi) * (state_size / (2 * n + 1) - 1)
        low, high = math.log(step_min), math.log(step_max)
        self.log_step = nn.Parameter(torch.rand(channels) * (high - low) + low)
        self.log_decay = nn.Parameter(torch.full((channels * half,), math.log(0.5)))
        self.frequency = nn.Parameter(frequency.repeat(channels))
        self.output = nn.Parameter(torch.randn(channels * half * 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(channels))

    def forward(self, u: Tensor) -> Tensor:
        """Whole sequences from their beginning: u [B,D,M,T] → [B,D,M,T], in fp32 or better."""
        u = u.to(widened(u))
        return fft_convolution(u, self.kernel(u.shape[-1])[:, None]) + self.skip[:, None, None] * u

    def extend(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Many tokens from a state: u [B,D,M,T] → [B,D,M,T] and the state after them, block by block."""
        log_a, weight = self._discrete()
        u = u.to(widened(u))
        longest = min(BLOCK, u.shape[-1])
        kernel = self.kernel(longest)[:, None]
        powers = _powers(log_a, torch.arange(longest + 1, device=u.device))  # [D,N/2,L+1]
        fading = powers.flip(-1).mT
        x = torch.view_as_complex(state)
        outputs = []
        for block in u.split(BLOCK, dim=-1):
            L = block.shape[-1]
            past = (x * weight[:, None]) @ powers[..., 1 : L + 1]  # [B,D,M,L]
            outputs.append(2 * past.real + fft_convolution(block, kernel))
            added = block.to(x.dtype) @ fading[:, -L:]  # [B,D,M,N/2]
            x = x * powers[:, None, :, L] + added
        return torch.cat(outputs, dim=-1) + self.skip[:, None, None] * u, torch.view_as_real(x)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token from a state: u [B,D,M] → [B,D,M] and the state after it, in place where no gradient is wanted."""
        log_a, weight = self._discrete()
        u = u.to(widened(u))
        x, fading = torch.view_as_complex(state), log_a.exp()[:, None]
        if torch.is_grad_enabled():
            x = x * fading + u[..., None]
            state = torch.view_as_real(x)
        else:
            x.mul_(fading).add_(u[..., None])
        y = 2 * (x * weight[:, None]).sum(-1).real + self.skip[:, None] * u
        return y, state

    def init_state(self, batch: int, signals: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Zeros [B,D,M,N/2,2]."""
        return torch.zeros(batch, self.shape[0], signals, self.shape[1], 2, device=device, dtype=dtype)

    def kernel(self, length: int) -> Tensor:
        """K_l for l < `length`, [D,T].

        With l = i·c + j the sum over n is a product of matrices, [T/c, N] by [N, c] with c = √T, and no tensor of
        D × N × T numbers is needed.
        """
        log_a, weight = self._discrete()
        columns = math.isqrt(length - 1) + 1
        rows = -(-length // columns)
        coarse = weight[..., None] * _powers(log_a, columns * torch.arange(rows, device=log_a.device))
        fine = _powers(log_a, torch.arange(columns, device=log_a.device))
        with exactly(log_a):
            real = torch.cat([coarse.real, -coarse.imag], dim=1).mT @ torch.cat([fine.real, fine.imag], dim=1)
        return 2 * real.flatten(1)[:, :length]

    def flops(self) -> int:
        """Operations per token and channel for making the kernel."""
        return 4 * self.shape[1]

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """ΔA and C (Ā − 1)/A, complex [D,N/2]."""
        a = torch.complex(-self.log_decay.exp(), self.frequency).view(self.shape)
        c = torch.view_as_complex(self.output.view(*self.shape, 2))
        log_a = a * self.log_step.exp()[:, None]
        return log_a, c * torch.expm1(log_a) / a


def _powers(log_a: Tensor, exponents: Tensor) -> Tensor:
    """Ā^l for each of the exponents [L]: [D,N/2,L]."""
    logs = torch.view_as_real(log_a)[..., None, :] * exponents.to(log_a.real.dtype)[:, None]
    return torch.polar(logs[..., 0].exp(), logs[..., 1])


@dataclass(frozen=True)
class S4DConfig(MixerConfig):
    """One state space a channel, and the gated projection that follows it in S4's layer."""

    name: Literal["s4d"] = "s4d"
    state_size: Annotated[int, At(least=2)] = 64  # N
    spectrum: Spectrum = "lin"
    step_min: Step = 1e-3
    step_max: Step = 1e-1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_state_space(self.state_size, self.step_min, self.step_max)


class S4DState(NamedTuple):
    """Constant in the number of tokens."""

    ssm: Tensor  # [B,D,1,N/2,2], fp32 or fp64


class S4DMixer(SequenceMixer):
    """GLU(W gelu(S4D(x))). Weights: ssm (see `S4D`), glu_proj [2D,D]."""

    Config: ClassVar[type[S4DConfig]] = S4DConfig
    paper_row: ClassVar[str | None] = "H3/S4"
    along_time: ClassVar[str] = "Fourier transforms"
    exactly_causal: ClassVar[bool] = False

    def __init__(self, d_model: int, config: S4DConfig) -> None:
        super().__init__(d_model, config)
        self.d_model = d_model
        self.ssm = S4D(d_model, config.state_size, config.spectrum, config.step_min, config.step_max)
        self.glu_proj = Linear(d_model, 2 * d_model)

    def step(
        self, x: Tensor, state: S4DState, *, positions: Positions | None = None
    ) -> tuple[Tensor, S4DState]:
        """x [B,D] from `state` → [B,D] and the state after it."""
        y, ssm = self.ssm.step(x[..., None], state.ssm)
        return self._finish(y[..., 0].to(x.dtype)), S4DState(ssm)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S4DState:
        """Zeros. fp32 unless `dtype` is fp64."""
        return S4DState(self.ssm.init_state(batch, 1, *state_place(self.glu_proj.weight, device, dtype)))

    def mixing_flops(self, length: int) -> int:
        """The kernel and one convolution a channel."""
        return self.d_model * (self.ssm.flops() + fft_flops(length))

    def _whole(self, x: Tensor) -> Tensor:
        y = self.ssm(x.mT[:, :, None])
        return self._finish(y[:, :, 0].mT.to(x.dtype))

    def _extend(self, x: Tensor, state: S4DState) -> tuple[Tensor, S4DState]:
        y, ssm = self.ssm.extend(x.mT[:, :, None], state.ssm)
        return self._finish(y[:, :, 0].mT.to(x.dtype)), S4DState(ssm)

    def _finish(self, y: Tensor) -> Tensor:
        return F.glu(self.glu_proj(F.gelu(y)))
