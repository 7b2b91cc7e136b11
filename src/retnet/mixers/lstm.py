"""LSTM, torch's recurrent neural network (Hochreiter and Schmidhuber 1997), as a mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.mixers.base import MixerConfig, state_place
from retnet.mixers.packing import SequenceMixer
from retnet.nn import exactly, needs_formula, once_differentiable, widened


@dataclass(frozen=True)
class LstmConfig(MixerConfig):
    """An LSTM of the model's width has nothing to choose."""

    name: Literal["lstm"] = "lstm"


NO_SECOND = "torch's LSTM has second derivatives in fp64 on a CPU alone; use that, or torch.func, where the formula runs"


class LstmState(NamedTuple):
    """Constant in the number of tokens; fp32 or fp64."""

    hidden: Tensor  # [B,D]
    cell: Tensor  # [B,D]


class LSTM(SequenceMixer):
    """Output h_t of c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g), h_t = σ(o) ⊙ tanh(c_t), gates affine in x_t and h_{t−1}.

    Computed in fp32 or better. Weights: torch's, lstm.{weight_ih_l0, weight_hh_l0} [4D,D] and two biases [4D], the forget
    gate's 1 at first (Jozefowicz et al. 2015).
    """

    Config: ClassVar[type[LstmConfig]] = LstmConfig
    paper_row: ClassVar[str | None] = "Recurrent NN"

    def __init__(self, d_model: int, config: LstmConfig) -> None:
        super().__init__(d_model, config)
        self.d_model = d_model
        self.lstm = nn.LSTM(d_model, d_model, batch_first=True)
        with torch.no_grad():
            biases = dict(self.lstm.named_parameters())
            biases["bias_hh_l0"].zero_()
            biases["bias_ih_l0"].zero_()[d_model : 2 * d_model] = 1.0  # torch's order is i, f, g, o

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LstmState:
        """Zeros. fp32 unless `dtype` is fp64."""
        device, wide = state_place(next(self.lstm.parameters()), device, dtype)
        zero = torch.zeros(batch, self.d_model, device=device, dtype=wide)
        return LstmState(zero, zero.clone())

    def mixing_flops(self, length: int) -> int:
        """All of it: the LSTM's weights are not `nn.Linear`, so nobody else counts them."""
        return 16 * self.d_model**2 + 20 * self.d_model

    def _extend(self, x: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        wide = widened(x)
        weights = [w.to(wide) for w in self.lstm.all_weights[0]]
        with exactly(x):  # autocast would round the state from token to token
            if needs_formula():
                y, after = _cells(x.to(wide), state, *weights)
                return y.to(x.dtype), after
            y, hidden, cell = torch.lstm(
                x.to(wide), (state.hidden[None], state.cell[None]), weights,
                has_biases=True, num_layers=1, dropout=0.0, train=torch.is_grad_enabled(),
                bidirectional=False, batch_first=True,
            )  # fmt: skip
        if not (y.is_cpu and wide is torch.float64):  # oneDNN or cuDNN
            y, hidden, cell = (once_differentiable(part, NO_SECOND) for part in (y, hidden, cell))
        return y.to(x.dtype), LstmState(hidden[0], cell[0])


def _cells(
    x: Tensor, state: LstmState, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, LstmState]:
    """The formula of the class above, for derivatives that torch's kernels lack."""
    outputs, (hidden, cell) = [], state
    for gates in F.linear(x, w_ih, b_ih + b_hh).unbind(1):
        i, f, g, o = (gates + F.linear(hidden, w_hh)).chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs, dim=1), LstmState(hidden, cell)
