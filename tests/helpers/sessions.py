"""Engines with a cache of states, and what their texts have to be."""

import json
import random

import safetensors.torch
import torch

from retnet.engine import Engine, Request, Sampling
from retnet.engine.store import digest_of, parse_tensors
from retnet.model import LanguageModel
from tests.helpers.kinds import configured

MB = 1 << 20
GREEDY = Sampling(temperature=0)
TURN = {"max_tokens": 30, "sampling": Sampling(temperature=0.8), "logprobs": 2}


def make(name="retention", seed=0):
    torch.manual_seed(seed)
    return LanguageModel(configured(name, vocab_size=257, d_model=32, num_layers=2)).eval()


def engine(model, tokenizer, **options):
    return Engine(model, tokenizer, **{"slots": 4, "exact": True, "cache_bytes": 64 * MB} | options)


def words(count, seed=0):
    return "".join(random.Random(seed).choices("abcdefgh .", k=count))


def bits(completion):
    """What must be the same: tokens, and log-probabilities to the last bit."""
    return completion.tokens, [(found.logprob, found.top) for found in completion.logprobs]


def fresh(model, tokenizer, tokens, **options):
    """What a new session says that reads the same tokens from their start, with nothing kept."""
    return bits(engine(model, tokenizer, cache_bytes=0).complete(Request(tokens, **options))[0])


def altered(content, change):
    """An exported session after `change(header, tensors)`, with hashes that fit."""
    tensors, metadata = parse_tensors(content)
    header = json.loads(metadata["retnet_session"])
    change(header, tensors)
    parts = {}
    for name, part in tensors.items():
        parts.setdefault(name.partition(".")[0], {})[name] = part
    header["sha256"] = {place: digest_of(each) for place, each in parts.items()}
    return safetensors.torch.save(tensors, {"retnet_session": json.dumps(header)})
