import math

import numpy as np
import pytest
import torch

from retnet.bench import gguf_models
from retnet.bench.decoding import weight_bytes
from retnet.bench.gguf_models import FAMILIES, PeerSize
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import UserError

LLAMA, RWKV7, MAMBA2 = FAMILIES


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("d_model", "num_layers", "heads", "vocab_size"),
    [
        (448, 7, 4, 257),
        (832, 12, 4, 257),
        (448, 7, 4, 8192),
        pytest.param(2048, 24, 8, 50304, marks=pytest.mark.slow),
        (192, 6, 2, 300),
    ],
)
def test_peers_have_as_many_parameters(family, d_model, num_layers, heads, vocab_size):
    with torch.device("meta"):
        ours = weight_bytes(
            LanguageModel(ModelConfig(vocab_size, d_model, num_layers, RetentionConfig(num_heads=heads)))
        )
    size = gguf_models.equal_size(family, ours // 4, vocab_size, d_model, num_layers)
    tensors = list(gguf_models.weights(family, size, vocab_size))
    read = sum(math.prod(t.shape) for t in tensors if family.tied or t.name != "token_embd.weight")
    assert read == gguf_models.parameters(family, size, vocab_size)
    assert abs(read / (ours // 4) - 1) <= 0.02
    assert all(t.shape[-1] % 32 == 0 for t in tensors if t.quantised)
    assert len({t.name for t in tensors}) == len(tensors)


def test_the_shapes_at_17m_are_the_usual_ones():
    sizes = [gguf_models.equal_size(family, 16_987_712, 257, 448, 7) for family in FAMILIES]
    assert sizes == [PeerSize(7, 448, 1184), PeerSize(7, 448, 1632), PeerSize(12, 448, 960)]


def test_a_size_that_no_peer_has_is_refused():
    with pytest.raises(
        UserError, match=r"no Mamba-2 of about 4 layers of width 64 comes within 2% of 9,999 parameters"
    ):
        gguf_models.equal_size(MAMBA2, 9_999, 257, 64, 2)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("vocab_size", [200, 300])
def test_files_read_back(family, vocab_size, tmp_path):
    gguf = pytest.importorskip("gguf")
    size, read = PeerSize(2, 64, 128), {}
    for number, kind in enumerate(gguf_models.FORMATS):
        path = tmp_path / f"{number}.gguf"
        gguf_models.write(family, size, vocab_size, kind, path)
        reader = gguf.GGUFReader(path)
        assert reader.fields["general.architecture"].contents() == family.name
        assert reader.fields[f"{family.name}.block_count"].contents() == 2
        assert len(set(reader.fields["tokenizer.ggml.tokens"].contents())) == vocab_size
        read[kind] = {t.name: t for t in reader.tensors}
    wanted = {t.name: t for t in gguf_models.weights(family, size, vocab_size)}
    assert read["fp32"].keys() == read["8 bits"].keys() == wanted.keys()
    for name, spec in wanted.items():
        full, eight = read["fp32"][name], read["8 bits"][name]
        assert tuple(reversed(full.shape)) == tuple(reversed(eight.shape)) == spec.shape
        assert (full.tensor_type.name, eight.tensor_type.name) == ("F32", "Q8_0" if spec.quantised else "F32")
        values = gguf.quants.dequantize(eight.data, eight.tensor_type).reshape(spec.shape)
        exact = np.array(full.data).reshape(spec.shape)
        assert np.isfinite(exact).all()
        assert (
            np.abs(values - exact).max() <= np.abs(exact).max() / 127
        )  # half a step of the scale, stored in fp16
    counted = sum(int(t.n_elements) for t in read["fp32"].values())
    unread = 0 if family.tied else vocab_size * 64
    assert counted - unread == gguf_models.parameters(family, size, vocab_size)


def test_a_full_disk_ends_in_one_sentence(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=r"cannot write .*nowhere.*; set TMPDIR"):
        gguf_models.write(LLAMA, PeerSize(1, 64, 64), 257, "fp32", tmp_path / "nowhere" / "m.gguf")
