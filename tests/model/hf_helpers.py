"""Small Hugging Face models, and what `generate` has to equal: plain loops over whole sequences, without any cache."""

import torch

from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from tests.helpers.lazily import hf
from tests.helpers.parity import relative

V = 41
# the dialects: the paper's, torchscale's, flash-linear-attention's, and one without what can be left out
DIALECTS = {
    "paper": ModelConfig(vocab_size=V, d_model=16, num_layers=2, mixer=RetentionConfig(num_heads=2)),
    "torchscale": ModelConfig(
        vocab_size=V,
        d_model=16,
        num_layers=2,
        mixer=RetentionConfig(num_heads=2, head_norm="rms", score_norm="decay", chunk_size=4),
        norm="rmsnorm",
        ffn="geglu",
        embedding_scale=True,
        embedding_norm=True,
        tie_embeddings=False,
    ),
    "fla": ModelConfig(
        vocab_size=V,
        d_model=16,
        num_layers=2,
        mixer=RetentionConfig(
            num_heads=2, head_norm="rms", head_norm_affine=True, rotary="halves", rotary_spacing="geometric"
        ),
        norm="rmsnorm",
        ffn="swiglu",
        tie_embeddings=False,
        init="normal",
    ),
    "plain": ModelConfig(
        vocab_size=V,
        d_model=16,
        num_layers=1,
        mixer=RetentionConfig(
            num_heads=3, key_dim=4, value_dim=5, decay=(0.5, 1.0, 0.9), gate=False, score_norm="paper"
        ),
    ),
}


def language_model(dialect="paper", dtype=torch.float64) -> LanguageModel:
    """In fp64 by default: the forms then agree to 1e-12, and no token is chosen by rounding."""
    torch.manual_seed(0)
    model = LanguageModel(DIALECTS[dialect])
    with torch.no_grad():
        for parameter in model.parameters():  # norms too: weights of 1 and 0 would hide an exchange
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def causal_lm(dialect="paper", dtype=torch.float64, **options):
    return hf.RetNetForCausalLM.from_language_model(language_model(dialect, dtype), **options)


def tokens(*shape, seed=0):
    """Ids, never 0: `generate` takes a pad token in a prompt for padding where it is given no mask."""
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows):
    """ids and mask [B,T] of 1-D rows; the padding is no harmless token."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((width - len(r),), 7), r]) for r in rows])
    mask = torch.stack([torch.arange(width) >= width - len(r) for r in rows]).long()
    return ids, mask


def next_logprobs(model, row):
    """Log-probabilities [V] of what follows a row [T]: one forward pass of a `LanguageModel` over all of it."""
    with torch.no_grad():
        return model(row[None])[0, -1].float().log_softmax(-1)


def greedy(model, row, new):
    for _ in range(new):
        row = torch.cat([row, next_logprobs(model, row).argmax()[None]])
    return row


def beam(model, row, new, beams):
    """The best of `beams` beams of exactly `new` tokens, by summed log-probability (no end token)."""
    kept = [(0.0, row)]
    for _ in range(new):
        options = []
        for score, r in kept:
            values, ids = next_logprobs(model, r).topk(beams)
            options += [(score + float(v), torch.cat([r, i[None]])) for v, i in zip(values, ids, strict=True)]
        kept = sorted(options, key=lambda option: -option[0])[:beams]
    return kept


def open_folder(path, **options):
    return hf.RetNetForCausalLM.from_pretrained(path, **options)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def same(got, want):
    """But for the last bit of fp64: a tensor in a mapped file lies at another alignment."""
    return relative(got, want) < 1e-14


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
