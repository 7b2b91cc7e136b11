"""Weight-only int8 for decoding: a quarter of the bytes to read for every token."""

from __future__ import annotations

import copy
from typing import Any

import torch

from retnet.engine.cpu_decoder.model_weights import stored
from retnet.model import LanguageModel
from retnet.nn import Int8Linear, Linear
from retnet.settings import UserError


def quantise(model: LanguageModel) -> LanguageModel:
    """A copy of a model, for inference, whose linear layers are `Int8Linear`: int8 weights, an fp32 scale for each row.

    What is looked up or small stays as it is: the embedding, norms, biases, convolutions, an LSTM's weights. A head that
    is tied to the embedding gets int8 weights of its own, because a step reads all of it but one row of the embedding.
    The copy computes in fp32, cannot be trained, and is no checkpoint: save the model it was made of.

    Raises:
        UserError: weights that are not fp32 or not finite, or layers that were wrapped, quantised or offloaded.
    """
    if model.embedding.weight.dtype is not torch.float32:
        kind = str(model.embedding.weight.dtype).removeprefix("torch.")
        raise UserError(f"int8 weights are made of a float32 model, not of {kind}; use model.float()")
    copies: dict[int, Any] = {}  # what deepcopy is told to put in the place of a module
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear):
            raise UserError("the model has int8 weights already")
        if isinstance(layer, Linear):
            if stored(layer) is None:
                raise UserError(
                    f"{name} was wrapped, quantised or offloaded; only weights in memory can be int8"
                )
            copies[id(layer)] = Int8Linear(layer)
    return copy.deepcopy(model, copies).requires_grad_(False).eval()
