"""Made-up text, and the numbers a model must give for it, computed one window at a time."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def tiny_llama(vocab_size, places):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=places,
    )
    return transformers.LlamaForCausalLM(config)


def words(count, seed=0):
    chance = random.Random(seed)
    return " ".join(chance.choice(["rain", "naïve", "the", "storm", "Ünder", "x"]) for _ in range(count))


def windows(sequence, length):
    """(inputs, targets) of a document: BOS and its tokens, cut into inputs of `length`."""
    inputs, targets = sequence[:-1], sequence[1:]
    length = length or max(len(inputs), 1)
    return [(inputs[i : i + length], targets[i : i + length]) for i in range(0, len(inputs), length)]


def by_hand(logits_of, tokenizer, documents, length):
    """(nats of each document, {bucket: [nats, tokens]}), reading each window alone."""
    nats, buckets = [], {}
    for text in documents:
        total = 0.0
        for inputs, targets in windows([tokenizer.bos_id, *tokenizer.encode(text)], length):
            with torch.no_grad():
                logits = logits_of(torch.tensor([inputs]))[0]
            losses = F.cross_entropy(logits, torch.tensor(targets), reduction="none").double().tolist()
            total += math.fsum(losses)
            for context, loss in enumerate(losses, 1):
                bucket = buckets.setdefault(math.ceil(math.log2(context)), [0.0, 0])
                bucket[0] += loss
                bucket[1] += 1
        nats.append(total)
    return np.array(nats), buckets
