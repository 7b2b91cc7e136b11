"""Small models whose behaviour is known, and a decoder of them."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from retnet.data import Tokenizer
from retnet.engine import Decoder
from retnet.mixers.states import join_rows, select_rows


class ToyState(NamedTuple):
    memory: torch.Tensor  # [B, D]
    position: torch.Tensor  # [B]


class Toy(torch.nn.Module):
    """Random, recurrent, sensitive to the order and position of every token; fp64, so rounding changes no choice."""

    def __init__(self, vocab_size=257, width=16):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(vocab_size, width, generator=generator).double())
        self.head = torch.nn.Parameter(torch.randn(width, vocab_size, generator=generator).double())
        self.eval()

    def init_state(self, batch, *, device=None, dtype=None):
        memory = torch.zeros(batch, self.embedding.shape[1], device=device, dtype=torch.float64)
        return (ToyState(memory, torch.zeros(batch, dtype=torch.long, device=device)),)

    def prefill(self, tokens, state, *, mask=None):
        assert mask is None
        logits = []
        for token in tokens.unbind(1):
            last, state = self._advance(token, state)
            logits.append(last)
        return torch.stack(logits, 1), state

    def step(self, tokens, state):
        logits, (new,) = self._advance(tokens, state)
        for old, value in zip(state[0], new, strict=True):  # in place, as a model may
            old.copy_(value)
        return logits, state

    def _advance(self, token, state):
        (old,) = state
        memory = 0.9 * old.memory + self.embedding[token] * torch.cos(old.position)[:, None]
        return 2 * torch.tanh(memory) @ self.head, (ToyState(memory, old.position + 1),)


class Script(torch.nn.Module):
    """Says after a prompt of one byte what `scripts` has for that byte, then ends the text."""

    def __init__(self, scripts, vocab_size=257):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.scripts = {ord(prompt): list(script) for prompt, script in scripts.items()}
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.eval()

    def init_state(self, batch, *, device=None, dtype=None):
        return (torch.zeros(batch, 2, dtype=torch.long, device=device),)  # which script, how far

    def prefill(self, tokens, state, *, mask=None):
        assert tokens.shape[1] == 2, "BOS and one byte"
        state = (torch.stack([tokens[:, 1], torch.zeros_like(tokens[:, 1])], 1),)
        return torch.stack([self._logits(state), self._logits(state)], 1), state

    def step(self, tokens, state):
        for token, (script, place) in zip(tokens.tolist(), state[0].tolist(), strict=True):
            assert token == self.scripts[script][place], "a row was given another row's token"
        state[0][:, 1] += 1
        return self._logits(state), state

    def _logits(self, state):
        logits = torch.full((len(state[0]), self.config.vocab_size), -30.0)
        for row, (script, place) in enumerate(state[0].tolist()):
            logits[row, [*self.scripts[script], 256][place]] = 30.0
        return logits


class ToyDecoder(Decoder):
    """A slot is an entry of a list; one that nobody has filled holds nothing, and using it is an error."""

    def __init__(self, model, slots=64):
        self.model, self.slots, self.vocab_size = model, slots, model.config.vocab_size
        self.device = torch.device("cpu")
        self.states = [None] * slots
        self.prefills: list[list[int]] = []  # lengths of the pieces of each call
        self.steps: list[int] = []  # rows of each call

    def prefill(self, tokens, cu_seqlens, slots):
        lengths = cu_seqlens.diff().tolist()
        self.prefills.append(lengths)
        logits = []
        for piece, slot in zip(tokens.split(lengths), slots.tolist(), strict=True):
            last, self.states[slot] = self.model.prefill(piece[None], self.states[slot])
            logits.append(last[:, -1])
        return torch.cat(logits)

    def step(self, tokens, slots):
        self.steps.append(len(tokens))
        logits, state = self.model.step(tokens, join_rows([self.states[slot] for slot in slots.tolist()]))
        self.write(slots, state)
        return logits

    def reset(self, slots):
        for slot in slots.tolist():
            self.states[slot] = self.model.init_state(1)

    def copy(self, source, target):
        self.write(target, self.read(source))

    def read(self, slots):
        return join_rows([select_rows(self.states[slot], [0]) for slot in slots.tolist()])

    def write(self, slots, state):
        for row, slot in enumerate(slots.tolist()):
            self.states[slot] = select_rows(state, [row])

    def fingerprint(self):
        return "toy"

    def state_bytes(self, tokens):
        return 1000


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load("bytes")


@pytest.fixture
def toy():
    """A decoder of `Toy`."""
    return ToyDecoder(Toy())


@pytest.fixture
def scripted():
    """Makes a decoder of a `Script`."""
    return lambda scripts, **options: ToyDecoder(Script(scripts, **options))


@pytest.fixture(scope="session")
def toy_model():
    return Toy()


@pytest.fixture(scope="session")
def script():
    return Script


@pytest.fixture(scope="session")
def decoder_of():
    return ToyDecoder
