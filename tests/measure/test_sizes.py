import pytest

from retnet.measure.sizes import equal_width, transformer
from retnet.mixers import RetentionConfig
from retnet.model import ModelConfig
from retnet.model.cost import cost
from retnet.settings import UserError


def test_the_width_that_comes_closest():
    assert equal_width(1000, lambda width: 100 + 10 * width, "net") == 88  # 980; 90 is no multiple of 8
    with pytest.raises(UserError, match=r"no net has about 100 .*; the nearest has 180\. Take a wider"):
        equal_width(100, lambda width: 100 + 10 * width, "net")


def test_the_transformer_beside_a_model_is_as_large():
    model = ModelConfig(vocab_size=300, d_model=128, num_layers=3, mixer=RetentionConfig(num_heads=2))
    peer = transformer(model, 64)
    assert peer.mixer.num_heads == 2
    assert cost(peer).total == pytest.approx(cost(model).total, rel=0.02)
    assert (peer.d_model, peer.num_layers, peer.vocab_size) == (128, 3, 300)


@pytest.mark.parametrize(("d_model", "key_dim", "says"), [(130, 65, "head_width 64"), (128, 1, "wider")])
def test_a_transformer_that_cannot_be(d_model, key_dim, says):
    mixer = RetentionConfig(num_heads=1, key_dim=key_dim, value_dim=1, rotary="none")
    model = ModelConfig(vocab_size=8, d_model=d_model, num_layers=1, mixer=mixer, ffn_dim=1)
    with pytest.raises(UserError, match=says):
        transformer(model, 64)
