"""Checkpoints read and written: of torchscale, flash-linear-attention, syncdoth/RetNet, Hugging Face folders, runs."""

from retnet.convert.clamp import clamp_effect, random_tokens, with_clamp
from retnet.convert.formats import READERS, WRITERS, convert, folder_of, model_type, read, recognise, write
from retnet.convert.weights import Found

__all__ = [
    "READERS",
    "WRITERS",
    "Found",
    "clamp_effect",
    "convert",
    "folder_of",
    "model_type",
    "random_tokens",
    "read",
    "recognise",
    "with_clamp",
    "write",
]
