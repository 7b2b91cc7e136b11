"""Models that are compared: RetNet alone, and the feed-forward width that gives a peer as many parameters as it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from retnet.mixers import RetentionConfig, SoftmaxConfig
from retnet.model import ModelConfig
from retnet.model.cost import cost
from retnet.settings import UserError

TOLERANCE = 0.02  # of the number of parameters
UNIT = 8  # a width is usually a multiple of it


def require_retention(model: ModelConfig, name: str = "model") -> RetentionConfig:
    """The mixer of a model that is retention in all layers.

    Args:
        model: to be compared with others.
        name: that its user knows it by.

    Raises:
        UserError: it is not.
    """
    if not isinstance(model.mixer, RetentionConfig) or not model.is_uniform:
        raise UserError(
            f"{name}: mixer.name is {model.mixer.name!r}, layers {model.layers}; all layers must be 'retention'"
        )
    return model.mixer


def equal_width(parameters: int, count: Callable[[int], int], what: str, unit: int = UNIT) -> int:
    """The width, a multiple of `unit`, whose `count` of parameters comes closest to `parameters`.

    Args:
        parameters: of the model to be compared with.
        count: width → parameters, linear.
        what: is made wider or narrower, for the message.
        unit: what the width is a multiple of.

    Raises:
        UserError: none comes within 2 %.
    """
    first, each = count(unit), count(2 * unit) - count(unit)
    width = unit * max(1, 1 + round((parameters - first) / each))
    if abs(count(width) - parameters) > TOLERANCE * parameters:
        raise UserError(
            f"no {what} has about {parameters:,} parameters; the nearest has {count(width):,}. Take a wider model"
        )
    return width


def transformer(model: ModelConfig, head_width: int) -> ModelConfig:
    """A Transformer of the width and depth of a model, its FFN as wide as makes it equally large, to 2 %.

    Raises:
        UserError: the width does not divide by that of a head, or no FFN makes it so large.
    """
    if model.d_model % head_width:
        raise UserError(f"d_model {model.d_model} is no multiple of head_width {head_width}; change one")
    mixer = SoftmaxConfig(num_heads=model.d_model // head_width)
    peer = replace(model, mixer=mixer, layers=None, mixers=None, ffn_layers=None, ffn_dims=None)
    name = f"Transformer of d_model {model.d_model} and {model.num_layers} layers"
    width = equal_width(cost(model, 1).total, lambda width: cost(replace(peer, ffn_dim=width), 1).total, name)
    return replace(peer, ffn_dim=width)
