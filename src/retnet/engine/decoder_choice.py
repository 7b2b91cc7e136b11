"""Choice of a decoder: the compiled one where it can run a model, else the one composed of the model's parts."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from retnet.engine.cpu_decoder import CpuDecoder, NotCompiledError
from retnet.engine.decoder import ComposedDecoder, Decoder
from retnet.model import LanguageModel, ModelState

_log = logging.getLogger("retnet.engine")


def choose_decoder(model: LanguageModel, slots: int) -> Decoder:
    """The fastest decoder that can run this model here, for any number of rows; the log says which one and why.

    Raises:
        ValueError: a model in training mode, or no slots.
    """
    try:
        decoder = CpuDecoder(model, slots)
    except NotCompiledError as reason:
        _log.info("decoding is composed of the model's parts: %s", reason)
        return ComposedDecoder(model, slots)
    _log.info("decoding is compiled: every token is one call for all layers, in CPU memory")
    return decoder


def decode_from(model: LanguageModel, state: ModelState) -> tuple[Decoder, Tensor]:
    """A decoder with a slot for each row of a state, which holds a copy of it; and those slots, int64 [B]."""
    slots = torch.arange(len(state[0][0]))
    decoder = choose_decoder(model, len(slots))
    decoder.write(slots, state)
    return decoder, slots
