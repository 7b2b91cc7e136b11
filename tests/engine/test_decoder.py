"""Decoders: rows in slots that come, go and fork, against the model's own forward pass."""

import itertools

import pytest
import torch

from retnet.engine import ComposedDecoder, choose_decoder
from retnet.measure.memory import most_alive
from retnet.model import LanguageModel
from tests.helpers.fast import few_fast
from tests.helpers.kinds import KINDS, configured
from tests.helpers.parity import relative

VOCABULARY = 61


def model(name, dtype=torch.float64, **options) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2} | options
    return LanguageModel(configured(name, **sizes)).to(dtype).eval()


def poison(decoder, slots) -> None:
    """Fills what nobody uses with NaN."""
    for pool in decoder.pools:
        for part in pool.state:
            if isinstance(part, list):
                for cache in [part[slot] for slot in torch.arange(decoder.slots)[slots].tolist()]:
                    cache.fill_(torch.nan)
            elif part.is_floating_point():
                part[slots] = torch.nan


def rows(*slots) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int64)


def packed(*texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and bounds of texts one after the other."""
    bounds = [0, *itertools.accumulate(map(len, texts))]
    return torch.tensor([token for text in texts for token in text]), torch.tensor(bounds, dtype=torch.int32)


class Texts:
    """What every slot has read, so that its logits can be had from a whole forward pass."""

    def __init__(self, module, tolerance) -> None:
        self.module, self.tolerance = module, tolerance
        self.read: dict[int, list[int]] = {}

    def check(self, logits, slots) -> None:
        for row, slot in zip(logits, slots, strict=True):
            with torch.no_grad():
                want = self.module(torch.tensor([self.read[slot]]))[0, -1]
            assert relative(row, want) < self.tolerance, f"slot {slot}"


def play(decoder, module, tolerance) -> None:
    """Rows of any age come, step, fork, leave and come back; every row of logits is that of a whole forward pass."""
    texts = Texts(module, tolerance)
    draw = torch.Generator().manual_seed(1)

    def words(count):
        return torch.randint(VOCABULARY, (count,), generator=draw).tolist()

    def prefill(**pieces) -> None:
        slots = [int(name[1:]) for name in pieces]
        for slot, piece in zip(slots, pieces.values(), strict=True):
            texts.read[slot] = [*texts.read.get(slot, []), *piece]
        logits = decoder.prefill(*packed(*pieces.values()), rows(*slots))
        full = [i for i, piece in enumerate(pieces.values()) if piece]
        texts.check(logits[full], [slots[i] for i in full])
        assert not logits[[i for i, piece in enumerate(pieces.values()) if not piece]].any()

    def step(*slots) -> None:
        tokens = words(len(slots))
        for token, slot in zip(tokens, slots, strict=True):
            if slot >= 0:
                texts.read[slot] = [*texts.read[slot], token]
        given = [10**9 if slot < 0 else token for token, slot in zip(tokens, slots, strict=True)]
        logits = decoder.step(torch.tensor(given), rows(*slots))
        live = [i for i, slot in enumerate(slots) if slot >= 0]
        texts.check(logits[live], [slots[i] for i in live])
        assert not logits[[i for i, slot in enumerate(slots) if slot < 0]].any()

    poison(decoder, slice(None))
    decoder.reset(rows(3, 1, 4))
    prefill(s3=words(40), s1=words(1), s4=[])
    step(3, 1)
    prefill(s4=words(70), s1=words(5))  # a piece of a text under way beside the beginning of one
    step(1, -1, 4, 3)
    step(3, 4)  # in a row: views of the pool
    decoder.copy(rows(4, 4), rows(0, 2))  # forks
    texts.read |= {0: texts.read[4], 2: texts.read[4]}
    for _ in range(3):
        step(2, 4, 0)
    saved, text = decoder.read(rows(2, 1)), {2: texts.read[2], 1: texts.read[1]}
    step(0, 1, 2, 3, 4)
    poison(decoder, rows(2, 3, 4))  # they have gone
    step(1, 0)
    decoder.write(rows(3, 4), saved)
    texts.read |= {3: text[2], 4: text[1]}
    prefill(s4=words(3), s3=words(9), s0=words(1))
    step(0, 1, 3, 4)
    decoder.reset(rows(2))
    texts.read[2] = []
    prefill(s2=words(200))
    step(4, 3, 2, 1, 0)
    assert not decoder.step(rows(5, 6), rows(-1, -1)).any()
    assert decoder.step(rows(), rows()).shape == (0, VOCABULARY)
    assert decoder.prefill(rows(), torch.zeros(1, dtype=torch.int32), rows()).shape == (0, VOCABULARY)


@pytest.mark.parametrize("name", few_fast(KINDS, "retention", "retention+softmax", "lstm"))
def test_rows_come_and_go_in_every_mixer(name):
    module = model(name)
    play(ComposedDecoder(module, 5), module, 1e-9)


def test_rows_come_and_go_in_the_compiled_decoder():
    pytest.importorskip("numba")
    module = model("retention", torch.float32, d_model=96)
    decoder = choose_decoder(module, 5)
    assert type(decoder).__name__ == "CpuDecoder"
    play(decoder, module, 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_is_the_step_of_the_model(name):
    module = model(name, torch.float32)
    decoder, tokens = ComposedDecoder(module, 3), torch.randint(VOCABULARY, (3, 8))
    decoder.reset(rows(0, 1, 2))
    state = module.init_state(3)
    with torch.no_grad():
        for t in range(8):
            want, state = module.step(tokens[:, t], state)
            assert torch.equal(decoder.step(tokens[:, t], rows(0, 1, 2)), want)


@pytest.mark.parametrize("name", ["retention", "softmax"])
def test_other_rows_are_not_copied(name):
    decoder = ComposedDecoder(model(name), 4)
    decoder.reset(rows(0, 1, 2, 3))
    decoder.prefill(*packed(range(30), range(20)), rows(0, 1))

    def addresses():
        pools = [pool for pool in decoder.pools if not pool.grows]
        caches = [pool.addresses[:, :2].tolist() for pool in decoder.pools]
        return caches, [part.data_ptr() for pool in pools for part in pool.state]

    there, before = addresses(), decoder.read(rows(0, 1))
    decoder.prefill(*packed(range(10)), rows(3))
    decoder.step(rows(1, 2), rows(3, 2))
    decoder.copy(rows(3), rows(2))
    assert addresses() == there
    for old, new in zip(before, decoder.read(rows(0, 1)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("name", ["softmax", "softmax+lstm+retention"])
def test_caches_are_read_where_they_lie(name):
    """A long text beside short ones: nothing of its size is made, and these get room for themselves alone."""
    decoder = ComposedDecoder(model(name), 8)
    decoder.reset(rows(*range(8)))
    decoder.prefill(*packed([5] * 500, [3]), rows(0, 7))
    keys = decoder.pools[0].state.keys
    assert [len(cache) for cache in keys] == [512, *[0] * 6, 64]
    decoder.step(torch.arange(8), rows(*range(8)))
    assert [len(cache) for cache in keys] == [512, *[64] * 7]
    assert most_alive(lambda: decoder.step(torch.arange(8), rows(*range(8)))) < keys[0].nbytes
    assert most_alive(lambda: decoder.prefill(*packed([1, 2], [3]), rows(0, 7))) < keys[0].nbytes


@pytest.mark.parametrize("name", ["retention", "gated_retention", "linear"])
def test_states_move_on_where_they_lie_in_any_order_that_leaves_none_out(name):
    decoder, order = ComposedDecoder(model(name, d_model=128), 10), rows(2, 7, 3, 6, 4, 1, 5, 8)
    decoder.reset(rows(*range(10)))
    size = min(part[1:9].nbytes for part in decoder.pools[0].state if part.dim() == 4)
    assert most_alive(lambda: decoder.step(torch.arange(8), order)) < size


def test_a_state_of_the_model_goes_in_and_comes_out():
    module = model("retention", torch.float32)
    decoder, tokens = ComposedDecoder(module, 2), torch.randint(VOCABULARY, (2, 30))
    with torch.no_grad():
        _, state = module.prefill(tokens, module.init_state(2))
        decoder.write(rows(1, 0), state)
        want, _ = module.step(tokens[:, 0], decoder.read(rows(1, 0)))
    assert torch.equal(decoder.step(tokens[:, 0].flip(0), rows(0, 1)).flip(0), want)


def test_only_last_rows_reach_the_head():
    module, seen = model("retention"), []
    module.head.register_forward_hook(lambda layer, x, y: seen.append(x[0].shape[:-1].numel()))
    decoder = ComposedDecoder(module, 3)
    decoder.reset(rows(0, 1, 2))
    decoder.prefill(*packed(range(50), [], range(7)), rows(0, 1, 2))
    assert seen == [2]


def test_it_works_inside_and_outside_of_inference_mode():
    with torch.inference_mode():
        decoder = ComposedDecoder(model("softmax", torch.float32), 2)
        decoder.reset(rows(0, 1))
        decoder.step(rows(1, 2), rows(0, 1))
    assert not decoder.step(rows(1, 2), rows(1, 0)).requires_grad


WRONG = {
    "token 61 is not in the vocabulary": lambda d: d.step(rows(61), rows(0)),
    "token -1 is not in": lambda d: d.prefill(*packed([3, -1]), rows(0)),
    r"slots are \[0, 5\]; allowed: -1 to 4": lambda d: d.step(rows(1, 2), rows(0, 5)),
    r"slots are \[2, 2\]; a slot is one row's": lambda d: d.step(rows(1, 2), rows(2, 2)),
    r"slots are \[-1\]; allowed: 0 to 4": lambda d: d.reset(rows(-1)),
    "2 tokens for 1 slots": lambda d: d.step(rows(1, 2), rows(0)),
    r"tokens have shape \(1,\), type torch.int32": lambda d: d.step(rows(1).int(), rows(0)),
    r"slots have shape \(1,\), type torch.int32": lambda d: d.step(rows(1), rows(0).int()),
    r"cu_seqlens is \[0, 3, 2\]": lambda d: d.prefill(rows(1, 2), torch.tensor([0, 3, 2]), rows(0, 1)),
    r"cu_seqlens is \[0, 2\] for 2 slots": lambda d: d.prefill(rows(1, 2), torch.tensor([0, 2]), rows(0, 1)),
    "1 slots to copy from and 2 to copy to": lambda d: d.copy(rows(0), rows(1, 2)),
    "a state of 2 layers does not fit 2 layers and 2 slots": lambda d: d.write(rows(0, 1), d.read(rows(0))),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes(message):
    decoder = ComposedDecoder(model("retention"), 5)
    decoder.reset(rows(0, 1, 2, 3, 4))
    before = decoder.read(rows(0, 1, 2, 3, 4))
    with pytest.raises(ValueError, match=message):
        WRONG[message](decoder)
    for old, new in zip(before, decoder.read(rows(0, 1, 2, 3, 4)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("make", [ComposedDecoder, choose_decoder])
def test_it_is_not_made_of_a_model_in_training(make):
    with pytest.raises(ValueError, match=r"call model\.eval"):
        make(model("retention").train(), 2)
    with pytest.raises(ValueError, match="slots is 0"):
        make(model("retention"), 0)
