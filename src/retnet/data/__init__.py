"""Corpora, tokenizers, token shards and the order of batches.

`prepare` turns a `DataConfig` into memory-mapped tokens; `Batches` reads them as a function of seed and position.
"""

from retnet.data.batches import IGNORED, Batch, Batches
from retnet.data.config import DataConfig
from retnet.data.manifest import Manifest
from retnet.data.mixture import Mixture
from retnet.data.prepare import PreparationProgress, prepare
from retnet.data.run_data import RunData
from retnet.data.shards import Prepared, TokenShards, load
from retnet.data.sources import Problem
from retnet.data.tokenizer import TextStream, Tokenizer
from retnet.data.tokenizer_text import read_texts

__all__ = [
    "IGNORED",
    "Batch",
    "Batches",
    "DataConfig",
    "Manifest",
    "Mixture",
    "PreparationProgress",
    "Prepared",
    "Problem",
    "RunData",
    "TextStream",
    "TokenShards",
    "Tokenizer",
    "load",
    "prepare",
    "read_texts",
]
