"""Inference: opening a run, sampling, streaming text. Every token costs the same, however long the text."""

from retnet.infer.decoding import Completion, Decoding, Piece, Stats, generate
from retnet.infer.run import Run, open_run
from retnet.infer.sampling import Sampling, probabilities, sample
from retnet.model.runs import find_checkpoint

__all__ = [
    "Completion",
    "Decoding",
    "Piece",
    "Run",
    "Sampling",
    "Stats",
    "find_checkpoint",
    "generate",
    "open_run",
    "probabilities",
    "sample",
]
