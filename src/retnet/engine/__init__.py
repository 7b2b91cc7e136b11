"""Inference: opening a run, sampling, streaming text. Every token costs the same, however long the text."""

from retnet.engine.cpu_decoder import Stepper
from retnet.engine.decoder import ComposedDecoder, Decoder, choose_decoder
from retnet.engine.decoding import Completion, Decoding, Piece, Stats, generate
from retnet.engine.load import Run, open_run
from retnet.engine.quantise import quantise
from retnet.engine.sampling import Sampling, probabilities, sample
from retnet.model.runs import find_checkpoint

__all__ = [
    "Completion",
    "ComposedDecoder",
    "Decoder",
    "Decoding",
    "Piece",
    "Run",
    "Sampling",
    "Stats",
    "Stepper",
    "choose_decoder",
    "find_checkpoint",
    "generate",
    "open_run",
    "probabilities",
    "quantise",
    "sample",
]
