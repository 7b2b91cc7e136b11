import pytest
import torch

from retnet.measure.contexts import PIECE, Contexts
from retnet.mixers import MIXERS
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import cost
from retnet.studies.slopes import slope


def contexts(name, lengths, room=8):
    kind = MIXERS[name]
    found = Contexts(kind(32, kind.Config()).eval(), 32, room)
    found.read(lengths)
    return found


@pytest.mark.parametrize("name", MIXERS)
def test_a_context_is_like_one_that_was_read(name):
    """The same tensors, as large and of the same types, as after reading so many tokens; and it can be stepped from."""
    found, B = contexts(name, (5, 19)), 3
    mixer = found.subject
    assert found.grows == bool(MIXERS[name].caches)
    for length in (19, 5):
        with torch.inference_mode():
            _, real = mixer.prefill(torch.randn(B, length, 32), mixer.init_state(B))
            state = found.state(length, B)
            for made, read in zip(state, real, strict=True):
                assert made.dtype == read.dtype
                room = 8 * (made.dim() > 1 and found.grows and made.shape[1] == length + 8)
                assert (
                    made.shape[:1] + (made[:, : made.shape[1] - room] if room else made).shape[1:]
                    == read.shape
                )
            y, after = mixer.step(torch.randn(B, 32), state)
        assert y.isfinite().all()
        if hasattr(after, "length"):
            assert after.length.tolist() == [length + 1] * B
        if hasattr(after, "position"):
            assert after.position.tolist() == [length + 1] * B
        assert found.state_bytes(length, B) == B * mixer.state_bytes(length)


@pytest.mark.parametrize("name", MIXERS)
def test_bytes_of_the_state_grow_as_theory_says(name):
    lengths = (64, 128, 256, 512, 1024)
    found = contexts(name, lengths)
    grown = slope(lengths, [found.state_bytes(n, 1) for n in lengths])
    assert grown.within(0.05, 1.0 if MIXERS[name].caches else 0.0)


def test_steps_leave_the_kept_states_as_they_were():
    found = contexts("retention", (6,))
    first = [part.clone() for part in found.state(6, 2)]
    found.seconds(6, 2, 1e-9)
    assert all(torch.equal(a, b) for a, b in zip(first, found.state(6, 2), strict=True))


def test_reading_goes_on_from_where_it_was():
    found, told = contexts("linear", (3,)), []
    found.read((PIECE + 10, 7), told.append)
    assert told == [7, 7 + PIECE, PIECE + 10]
    assert found.state(7, 1).position.tolist() == [7]


def test_caches_of_all_lengths_share_their_memory():
    found = contexts("softmax", (10, 100))
    large, small = found.state(100, 2), found.state(10, 1)
    assert small.keys.data_ptr() == large.keys.data_ptr() != large.values.data_ptr()


def test_a_model_of_any_mixer_has_contexts():
    for name in ("softmax", "retention"):
        config = ModelConfig(vocab_size=20, d_model=16, num_layers=2, mixer=MIXERS[name].Config(num_heads=2))
        found = Contexts(LanguageModel(config).eval(), 16, room=8)
        found.read((12,))
        assert found.state_bytes(12, 2) == 2 * cost(config, 12).state_bytes
        assert found.seconds(12, 2, 1e-9) > 0
