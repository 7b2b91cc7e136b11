import subprocess
import sys

import pytest
import torch

from retnet.measure import peers
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.ops import log_decays, retention
from retnet.settings import UserError
from tests.helpers.parity import random_inputs, relative

STRAIGHTFORWARD = {
    "chunks of 8": lambda *x: peers.chunk_loop(*x, chunk=8),
    "chunks of 8, indexed": lambda *x: peers.indexed_states(*x, chunk=8),
    "chunks of 32": lambda *x: peers.chunk_loop(*x, chunk=32),
    "parallel": peers.parallel_form,
}


@pytest.mark.parametrize("name", STRAIGHTFORWARD)
@pytest.mark.parametrize("decay", ["paper", "none"])
def test_straightforward_retention_is_retention(name, decay):
    inputs = random_inputs(2, 32, 3, 4, 6)[:3]
    log_decay = log_decays(decay, 3)
    want, _ = retention(*inputs, log_decay.double(), backend="reference")
    got = STRAIGHTFORWARD[name](*inputs, log_decay, 4**-0.5)
    weights = torch.randn(want.shape, dtype=want.dtype)
    assert relative(got, want) < 1e-12
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, weights), torch.autograd.grad(want, inputs, weights), strict=True
    ):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize(("d_model", "num_layers", "heads"), [(64, 2, 2), (448, 7, 4), (512, 8, 4)])
def test_the_llama_is_of_our_size(d_model, num_layers, heads):
    config = ModelConfig(257, d_model, num_layers, RetentionConfig(num_heads=heads))
    with torch.device("meta"):
        size = sum(p.numel() for p in LanguageModel(config).parameters())
        llama = peers.llama(257, d_model, num_layers, size)
    found = llama.config
    assert abs(sum(p.numel() for p in llama.parameters()) - size) <= 0.02 * size
    assert (found.hidden_size, found.num_hidden_layers, found.vocab_size) == (d_model, num_layers, 257)
    assert found.hidden_size // found.num_attention_heads == found.head_dim == 64
    assert found._attn_implementation == "sdpa"
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


@pytest.mark.slow
def test_torchao_does_not_speak_of_itself():
    """transformers imports it where it is installed, whatever torch it fits."""
    pytest.importorskip("torchao")
    code = "from retnet.measure import peers; peers.llama(300, 128, 3, 700_000)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_flops_of_the_llama():
    llama = peers.llama(300, 128, 3, 700_000)
    width = llama.config.intermediate_size
    products = 3 * (4 * 128 * 128 + 3 * 128 * width) + 300 * 128
    attention = 3 * 2 * (2 * 128 * 50 // 2)  # 3 layers, scores and sum, half of 50 keys a query on average
    assert peers.llama_flops_per_token(llama, 50) == 2 * products + attention


def test_the_llamas_cache_holds_what_it_is_given():
    llama = peers.llama(300, 128, 3, 700_000).eval()
    layers = peers.random_cache(llama, 2, 10)
    copies = [(k.clone(), v.clone()) for k, v in layers]
    assert len(layers) == 3
    assert layers[0][0].shape == (2, 2, 10, 64)
    cache = peers.dynamic_cache(layers)
    with torch.inference_mode():
        llama(input_ids=torch.zeros(2, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 11
    for (k, v), (k_copy, v_copy) in zip(layers, copies, strict=True):
        assert k.equal(k_copy)
        assert v.equal(v_copy)


def test_mistakes_end_in_one_sentence(monkeypatch):
    with pytest.raises(UserError, match=r"d_model is 100, .* multiple of 64"):
        peers.llama(257, 100, 2, 10**6)
    with pytest.raises(UserError, match="about 1,000 parameters"):
        peers.llama(257, 64, 2, 1000)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers, .* pip install 'retnet\[bench\]'"):
        peers.llama(257, 64, 2, 100_000)
