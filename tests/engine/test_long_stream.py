"""A text of any length: memory of a token does not grow, and what is kept of it grows with its logarithm."""

import os
import statistics
import time
import tracemalloc

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.engine import Engine, Request, choose_decoder
from retnet.engine.store import BLOCK, kept_positions
from retnet.engine.streams import Stream
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import build
from tests.helpers.sessions import GREEDY, MB

TOKENS = int(os.environ.get("RETNET_STREAM_TOKENS", "12000"))


@pytest.mark.slow
def test_a_long_stream_takes_no_more_memory_and_time(tokenizer):
    """RETNET_STREAM_TOKENS=1000000 is the long run, of a minute or two."""
    config = {"vocab_size": 257, "d_model": 128, "num_layers": 1, "mixer": {"name": "retention"}}
    torch.manual_seed(0)
    model = LanguageModel(build(ModelConfig, config)).eval()
    engine = Engine(choose_decoder(model, 1), tokenizer, slots=1, cache_bytes=MB)
    blocks = 24
    block = TOKENS // blocks
    engine.submit(Request("a", max_tokens=blocks * block, sampling=GREEDY, stop=["\0\0\0"]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a step is no work for two, least of all beside other processes
    resident, seconds = [], []
    for _ in range(blocks):
        times = []
        for _ in range(block):
            began = time.perf_counter()
            assert len(engine.step()) == 1
            times.append(time.perf_counter() - began)
        seconds.append(statistics.median(times))
        resident.append(psutil.Process().memory_info().rss)
    torch.set_num_threads(threads)
    assert not engine.busy
    early = blocks // 4
    grown = resident[-1] - resident[early]
    slower = statistics.median(seconds[-early:]) / statistics.median(seconds[:early])
    print(f"{blocks * block:,} tokens: {grown / MB:.1f} MB more, {slower:.2f} times the time of a token")
    assert grown < 4 * MB + 12 * blocks * block  # ids and text: 10 bytes a token
    assert slower < 1.5  # of a time that would grow with the text, a multiple


def test_a_stream_keeps_ids_and_text_and_no_more(tokenizer):
    """8 bytes an id, and the text as UTF-8; both grow by an eighth at a time."""
    count, ids = 50_000, [*"äbc ".encode()]
    stream = Stream(0, Request("a", max_tokens=10**9), 0, tokenizer)
    tracemalloc.start()
    for step in range(count):
        stream.push(ids[step % len(ids)])
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 9 / 8 * (8 + 1) * count + 20_000
    assert stream.end("interrupted").completion.text == "äbc " * (count // len(ids))


@settings(max_examples=30)
@given(length=st.integers(0, 300_000), every=st.integers(1, 3000))
def test_marks_thin_out(length, every):
    marks = range(every, length + 1, every)
    kept = kept_positions(length, marks)
    assert len(kept) <= 30 * max(1, length // BLOCK).bit_length() + 30
    for mark in list(marks)[-3:]:  # the last message boundaries are all there
        assert mark // BLOCK * BLOCK in {0, *kept}


@given(
    length=st.integers(0, 50_000),
    more=st.integers(0, 50_000),
    marks=st.lists(st.integers(1, 100_000), max_size=40),
)
def test_marks_kept_for_a_longer_text_were_kept_before(length, more, marks):
    before = kept_positions(length, marks)
    assert {p for p in kept_positions(length + more, marks) if p < length // BLOCK * BLOCK} <= {*before}


def test_greedy_text_is_flat_in_a_session_too(tokenizer):
    """Keys of a long text are computed once: a turn hashes what is new."""
    from retnet.engine import Session
    from retnet.engine import store as module

    config = {"vocab_size": 257, "d_model": 32, "num_layers": 1, "mixer": {"name": "retention"}}
    engine = Engine(LanguageModel(build(ModelConfig, config)).eval(), tokenizer, slots=1, cache_bytes=8 * MB)
    session = Session(engine, [7] * 30_000)
    session.generate(max_tokens=1, sampling=GREEDY)
    calls, real = [], module.next_key
    module.next_key = lambda *given: (calls.append(1), real(*given))[1]
    try:
        session.hold()
    finally:
        module.next_key = real
    assert not calls


def test_a_text_ends_with_any_of_the_tokenizers_ends(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "end_ids", (tokenizer.bos_id, 65))
    stream = Stream(0, Request("a", stop_tokens=(66,)), 0, tokenizer)
    assert stream.ends == {tokenizer.bos_id: "end", 65: "end", 66: "stop"}
