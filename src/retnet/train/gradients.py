"""Gradients that lie in parts on many processes: their norm, and clipping, without a collective of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor, nn

from retnet.model import LanguageModel
from retnet.ops.torch_private import foreach_multiply
from retnet.train.distributed import Ranks, holders, own_part
from retnet.train.tensor_parallel import global_tensors


def share_of_square(model: LanguageModel, ranks: Ranks) -> Tensor:
    """Squared norm of this rank's share of a model's gradients: summed over all ranks it is that of the whole gradient.

    What several ranks hold counts for each of them by its part.
    """
    alike: dict[int, list[Tensor]] = defaultdict(list)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for gradient in global_tensors(gradients, model, ranks.mesh).values():
        alike[holders(gradient, ranks)].append(own_part(gradient, ranks))
    squares = [nn.utils.get_total_norm(parts).double() ** 2 / number for number, parts in alike.items()]
    return sum(squares[1:], squares[0])


def scale(parameters: Sequence[nn.Parameter], factor: float, ranks: Ranks) -> None:
    """Multiplies the gradients, each rank's part of them."""
    if factor != 1:
        foreach_multiply([own_part(p.grad, ranks) for p in parameters if p.grad is not None], factor)
