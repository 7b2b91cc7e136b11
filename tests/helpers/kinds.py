"""Names of models to try everything with: every mixer in all layers, and layers that differ."""

from retnet.mixers import MIXERS
from retnet.model import ModelConfig

HYBRIDS = ("retention+softmax", "softmax+lstm+retention")
KINDS = (*MIXERS, *HYBRIDS)


def configured(name: str, **sizes) -> ModelConfig:
    """A model of these mixers, one a layer in turns: "retention+softmax"."""
    first, *others = name.split("+")
    layers = (first, *others) if others else None
    if others:
        sizes["num_layers"] = max(len(others) + 1, sizes["num_layers"])
    return ModelConfig(mixer=MIXERS[first].Config(), layers=layers, **sizes)
