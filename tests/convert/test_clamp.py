"""torchscale's score clamp in the mixer: the parallel form alone, and said so wherever another is asked for."""

import pytest
import torch

from retnet.mixers import MIXERS, RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import cost
from retnet.ops import log_decays, retention
from retnet.ops.clamped import clamped_retention
from retnet.settings import UserError
from tests.helpers.parity import assert_causal, random_inputs, relative

CLAMPED = RetentionConfig(num_heads=2, score_norm="torchscale", head_norm="rms")


def model():
    return LanguageModel(ModelConfig(vocab_size=31, d_model=16, num_layers=2, mixer=CLAMPED)).double().eval()


def test_without_the_clamp_it_is_retention_with_its_rows_normalised():
    q, k, v, _ = (x.detach() for x in random_inputs(2, 23, 3, 8, 5))
    log_decay = log_decays("paper", 3).double()
    q = q * 1e-3  # sums of scores stay below 1
    out, _ = retention(q, k, v, log_decay)
    seen = torch.arange(1, 24, dtype=torch.float64)[:, None]
    summed = (1 - torch.exp(log_decay * seen)) / (1 - torch.exp(log_decay))  # [T,H]
    want = out / summed.sqrt()[..., None]
    assert relative(clamped_retention(q, k, v, log_decay), want) < 1e-12
    assert relative(clamped_retention(q * 1e4, k, v, log_decay) / 1e4, want) > 1e-2  # here it acts


def test_half_types_are_computed_in_fp32():
    q, k, v, _ = (x.detach() for x in random_inputs(1, 40, 2, 8, 4, dtype=torch.bfloat16))
    out = clamped_retention(q, k, v, log_decays("paper", 2))
    assert out.dtype == torch.bfloat16
    want = clamped_retention(q.double(), k.double(), v.double(), log_decays("paper", 2))
    assert relative(out, want) < 4e-3


def test_packed_documents_do_not_see_each_other():
    mixer = MIXERS["retention"](16, CLAMPED).double()
    x, bounds = torch.randn(1, 20, 16, dtype=torch.float64), torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    apart = torch.cat([mixer(x[:, :7]), mixer(x[:, 7:])], dim=1)
    assert relative(mixer(x, cu_seqlens=bounds), apart) < 1e-12
    assert mixer(x[:, :0]).shape == (1, 0, 16)


def test_padding_changes_nothing():
    tokens = torch.randint(31, (2, 9))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, :3] = False
    padded = torch.nn.functional.pad(tokens, (3, 0))
    with torch.no_grad():
        one = model()
        assert relative(one(padded, mask=mask)[:, 3:], one(tokens)) < 1e-12


def test_it_is_causal():
    assert_causal(MIXERS["retention"](16, CLAMPED).double(), torch.randn(1, 9, 16, dtype=torch.float64))


def test_states_are_refused_with_the_way_out():
    one, plain = model(), RetentionConfig(num_heads=2, score_norm="decay", head_norm="rms")
    state = LanguageModel(ModelConfig(vocab_size=31, d_model=16, num_layers=2, mixer=plain)).init_state(1)
    with pytest.raises(UserError, match=r"no state can carry.*set score_norm = 'decay' to generate"):
        one.init_state(1)
    with pytest.raises(UserError, match=r"no state can carry"):
        one.prefill(torch.zeros(1, 3, dtype=torch.long), state)


@pytest.mark.parametrize("form", ["chunkwise", "recurrent"])
def test_other_forms_are_refused(form):
    with pytest.raises(UserError, match=rf"runs in the parallel form alone, not '{form}'"):
        RetentionConfig(score_norm="torchscale", form=form)


def test_its_size_can_be_asked():
    assert cost(ModelConfig(vocab_size=31, d_model=16, num_layers=2, mixer=CLAMPED)).total > 0
