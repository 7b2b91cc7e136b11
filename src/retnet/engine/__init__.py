"""Inference: opening a run, continuous batching, sampling, streaming text. A token costs the same at any length."""

from retnet.engine.decoder import ComposedDecoder, Decoder
from retnet.engine.decoder_choice import choose_decoder, decode_from
from retnet.engine.engine import SLOTS, Engine
from retnet.engine.generation import generate
from retnet.engine.grammar import Grammar
from retnet.engine.load import Run, open_run
from retnet.engine.quantise import quantise
from retnet.engine.requests import Completion, Event, Request, Stats, TokenLogprobs
from retnet.engine.sampling import Sampling, probabilities, sample
from retnet.engine.sessions import Session
from retnet.model.runs import find_checkpoint

__all__ = [
    "SLOTS",
    "Completion",
    "ComposedDecoder",
    "Decoder",
    "Engine",
    "Event",
    "Grammar",
    "Request",
    "Run",
    "Sampling",
    "Session",
    "Stats",
    "TokenLogprobs",
    "choose_decoder",
    "decode_from",
    "find_checkpoint",
    "generate",
    "open_run",
    "probabilities",
    "quantise",
    "sample",
]
