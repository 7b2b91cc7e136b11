"""Inference: opening a run, sampling, streaming text. Every token costs the same, however long the text."""

from retnet.infer.decoding import Completion, Decoding, Piece, Stats, generate
from retnet.infer.run import Run, find_checkpoint, open_run
from retnet.infer.sampling import Sampling, probabilities, sample

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
