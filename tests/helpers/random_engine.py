"""Random use of one engine with sessions: whatever is done, every text is what it is alone, and nothing is left behind."""

import gc
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from retnet.engine import ComposedDecoder, Engine, Request, Sampling, Session
from retnet.engine.store import state_size
from tests.helpers.sessions import TURN, bits, engine, words

SLOTS, STATES, SESSIONS = 6, 8, 12


class RandomUse:
    """An exact engine, its free slots full of NaN, its cache a few states large; its verbs check what comes of them.

    Args:
        model: of the texts.
        tokenizer: of the model.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.folder = Path(tempfile.mkdtemp(prefix="retnet-random-"))
        self.decoder = ComposedDecoder(model, SLOTS)
        self.budget = state_size(self.decoder.read(torch.tensor([0]))) * STATES
        self.single = Engine(model, tokenizer, slots=1, exact=True)  # what a text is alone
        self.engine = self._engine()
        self.sessions, self.asked, self.parts, self.cancelled, self.done = (
            [Session(self.engine)],
            {},
            {},
            set(),
            0,
        )

    def _engine(self):
        return engine(
            self.decoder,
            self.tokenizer,
            slots=SLOTS,
            cache_bytes=self.budget,
            state_directory=self.folder / "states",
        )

    # -- verbs ----------------------------------------------------------------------------------------------

    def submit(self, text, length, max_tokens, seed, temperature, top_p, samples, cache):
        request = Request(
            words(600, text)[:length],
            max_tokens=max_tokens,
            seed=seed,
            sampling=Sampling(temperature=temperature, top_p=top_p),
            samples=samples,
            logprobs=1,
            cache=cache,
        )
        self.asked[self.engine.submit(request)] = request

    def cancel(self, number):
        """Of the newest requests one, if it runs or waits still."""
        waiting = sorted(self.asked)[-8:]
        if waiting and self.engine.cancel(number := waiting[number % len(waiting)]):
            self.cancelled.add(number)

    def step(self):
        self._take(self.engine.step())

    def append(self, which, text, length):
        self._session(which).append(words(length, text))

    def generate(self, which, seed):
        session, ask = self._session(which), TURN | {"seed": seed, "max_tokens": 6}
        tokens = [*session.tokens]
        got = session.generate(**ask)
        assert bits(got) == bits(self.single.complete(Request(tokens, **ask))[0])

    def fork(self, which):
        if len(self.sessions) < SESSIONS:
            self.sessions.append(self._session(which).fork())

    def rewind(self, which, position):
        session = self._session(which)
        session.rewind(1 + position % len(session.tokens))

    def edit(self, which, position, text):
        session = self._session(which)
        session.edit(1 + position % len(session.tokens), words(20, text))

    def move(self, which, every):
        """Out as bytes and back in, the old one closed."""
        session = self._session(which)
        self._replace(session, lambda: Session.from_bytes(self.engine, session.export(every=every)))

    def save(self, which):
        """Into a file and back."""
        session, path = self._session(which), self.folder / "session"
        session.save(path)
        self._replace(session, lambda: Session.load(self.engine, path))
        path.unlink()

    def close(self, which):
        if len(self.sessions) > 1:
            session = self._session(which)
            session.close()
            self.sessions.remove(session)

    def restart(self, flush):
        """As after the process was killed, or ended in order: texts are known, states as far as they are on disk."""
        self._take(self.engine.events())
        self._judge()
        if flush:
            self.engine.store.flush()
        kept = [(session.name, [*session.tokens], [*session.marks]) for session in self.sessions]
        self.engine, self.sessions = self._engine(), []
        for name, tokens, marks in kept:
            session = Session(self.engine, tokens, name=name)
            session.marks = marks
            session.hold()
            self.sessions.append(session)
        self.engine.store.sweep(0)
        held = {f"{key}.safetensors" for key in self.engine.store._owners}
        assert {file.name for file in (self.folder / "states").iterdir()} <= held

    # -- what must be true ------------------------------------------------------------------------------------

    def check(self):
        """After each verb; free slots have no caches, and are then filled with NaN."""
        for pool in self.decoder.pools:
            for part in pool.state:
                if isinstance(part, list):
                    assert not any(len(part[slot]) for slot in self.engine._free)
                else:
                    part[self.engine._free] = float("nan") if part.is_floating_point() else 12345
        assert self.engine.store.bytes <= self.budget

    def end(self):
        """Everything is let go, and nothing of it is left."""
        self._take(self.engine.events())
        self._judge()
        for session in self.sessions:
            session.close()
        assert [*(self.folder / "states").iterdir()] == []
        assert sorted(self.engine._free) == list(range(SLOTS))
        assert self.engine._bytes == 0
        assert not self.engine.busy
        assert not self.engine.store._owners
        self.sessions = []
        gc.collect()

    def remove(self):
        shutil.rmtree(self.folder)

    def _session(self, which):
        return self.sessions[which % len(self.sessions)]

    def _replace(self, session, make):
        tokens, marks = [*session.tokens], [*session.marks]
        other = make()
        assert (other.tokens, other.marks) == (tokens, marks)
        session.close()
        other.hold()
        self.sessions[self.sessions.index(session)] = other

    def _take(self, events):
        for event in events:
            assert (event.request, event.sample) not in self.parts
            if event.completion is not None:
                self.parts[event.request, event.sample] = event.completion
        ended = [
            number
            for number, request in self.asked.items()
            if all((number, sample) in self.parts for sample in range(request.samples))
        ]
        for number in ended:
            request = self.asked.pop(number)
            for sample, alone in enumerate(self.single.complete(request)):
                got = self.parts.pop((number, sample))
                self.done += 1
                if got.finish == "interrupted":
                    assert number in self.cancelled
                    assert got.tokens == alone.tokens[: len(got.tokens)]
                else:
                    assert bits(got) == bits(alone)

    def _judge(self):
        """All requests have ended, each with its own text."""
        assert not self.asked
        assert not self.parts


def use_at_random(use, seed, operations):
    """So many verbs in a row, chosen and filled by a seed."""
    rng = np.random.default_rng(seed)

    def whole(least, most):
        return int(rng.integers(least, most))

    for _ in range(operations):
        match whole(0, 24):
            case 0 | 1 | 2 | 3 | 4 | 5:
                temperature, top_p = float(rng.uniform(0, 2)), float(rng.uniform(0.1, 1))
                use.submit(
                    whole(0, 4),
                    whole(0, 600),
                    whole(1, 9),
                    whole(0, 99),
                    temperature if whole(0, 4) else 0,
                    top_p,
                    whole(1, 4),
                    bool(whole(0, 4)),
                )
            case 6 | 7:
                use.cancel(whole(0, 99))
            case 8 | 9 | 10 | 11 | 12 | 13:
                use.step()
            case 14 | 15:
                use.append(whole(0, 99), whole(0, 1000), whole(1, 200))
            case 16 | 17:
                use.generate(whole(0, 99), whole(0, 99))
            case 18:
                use.fork(whole(0, 99))
            case 19:
                use.rewind(whole(0, 99), whole(0, 9999))
            case 20:
                use.edit(whole(0, 99), whole(0, 9999), whole(0, 99))
            case 21:
                use.move(whole(0, 99), bool(whole(0, 2)))
            case 22:
                use.save(whole(0, 99))
                use.close(whole(0, 99))
            case 23 if not whole(0, 4):
                use.restart(bool(whole(0, 2)))
        use.check()
