import asyncio

import pytest

from retnet.bench import load_client
from retnet.bench.gguf_models import FORMATS
from retnet.bench.load import LoadSample, StreamTimes, generator
from retnet.bench.served import HF, OURS, TRANSFORMER
from retnet.bench.serving import ServeBench, ServeRow, targets
from retnet.bench.serving_parts import ChatRow, OverheadRow
from retnet.mixers import RetentionConfig
from retnet.model import ModelConfig
from retnet.settings import UserError
from tests.helpers.echo_server import echo_server


@pytest.fixture(scope="module")
def echo():
    with echo_server() as url:
        yield f"{url}/v1"


def test_the_process_times_streams_and_refuses_what_means_nothing(echo):
    with generator() as load:
        sample = load.together(echo, [{"max_tokens": 5}] * 3, 5, "echo")
        assert sample.tokens == 15
        assert (len(sample.first), len(sample.between)) == (3, 12)
        assert 0 < max(sample.first) <= sample.seconds
        sample = load.streams(echo, [[{"max_tokens": 5}] * 2] * 3, 5, "echo")
        assert (sample.tokens, len(sample.first), sample.together) == (30, 6, None)
        turns = load.conversation(echo, {"max_tokens": 2}, ["a", "b", "c"], 2, "echo")
        assert [len(turn.arrivals) for turn in turns] == [2, 2, 2]
        with pytest.raises(UserError, match="echo wrote 1 tokens in 1 pieces, but was to write 5"):
            load.together(echo, [{"max_tokens": 5, "prompt": "short"}], 5, "echo")
        with pytest.raises(UserError, match="echo failed: status 400"):
            load.together(echo, [{"max_tokens": 5, "prompt": "wrong"}], 5, "echo")
        with pytest.raises(UserError, match="nobody failed: ConnectionRefusedError"):
            load.together("http://127.0.0.1:1/v1", [{}], 5, "nobody")


def test_a_conversation_says_all_that_was_said_before(echo):
    job = {"url": echo, "body": {"max_tokens": 1}, "turns": ["a", "b", "c"], "seconds": 60}
    assert [answer["text"] for answer in asyncio.run(load_client.work(job))] == ["1", "3", "5"]


def test_an_answer_may_arrive_in_any_pieces():
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"6\r\ndata: \r\n4\r\n1\n\n2\r\n0\r\n\r\n"
    pieces = [(float(n), (head + body)[n : n + 1]) for n in range(len(head + body))]
    answer = load_client.Answer(pieces)
    assert (answer.status, answer.whole) == (200, True)
    assert [line for _, line in answer.lines] == [b"data: 1", b"", b"2"]
    assert answer.lines[0][0] < answer.lines[2][0]
    assert not load_client.Answer(pieces[:-1]).whole


def test_errors_in_a_stream_are_told():
    assert load_client.told([(0.0, b'data: {"error": {"message": "no"}}')]) == {"error": "{'message': 'no'}"}


def test_numbers_of_a_sample():
    streams = [
        StreamTimes(0.0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1] * 6, 6),
        StreamTimes(0.5, [2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1] * 6, 6),
    ]
    sample = LoadSample.of(streams)
    assert (sample.seconds, sample.tokens, list(sample.first)) == (7.0, 12, [1.0, 1.5])
    assert sample.together == pytest.approx(1.0)
    assert sample.numbers()["tokens_per_s"] == pytest.approx(12 / 7)
    assert sample.numbers()["between_tokens_p99"] == 1.0
    apart = [StreamTimes(0.0, [1.0, 2.0], [1, 1], 2), StreamTimes(0.0, [5.0, 6.0], [1, 1], 2)]
    assert LoadSample.of(apart).together is None  # they were never written at the same time


def test_tokens_that_come_together_share_the_time_since_those_before():
    stream = StreamTimes(0.0, [1.0, 4.0, 6.0, 8.0, 10.0, 11.0], [1, 3, 2, 2, 2, 1], 11)
    sample = LoadSample.of([stream])
    assert list(sample.between) == [1.0] * 10
    assert sample.together == pytest.approx(1.0)  # 10 tokens after the first one, in 10 seconds
    assert stream.tokens(4.0, 10.0) == 6


def row(name, weights, streams, context, *seconds):
    samples = [LoadSample(s, 100, [0.1], [0.1], None) for s in seconds]
    return ServeRow(name, weights, streams, context, samples)


def test_targets():
    rows = [
        row(OURS, "fp32", 1, 128, 1.0, 2.0),
        row(OURS, "fp32", 16, 128, 0.1, 0.2),
        row("llama", "fp32", 1, 128, 2.0, 4.0),
        row("mamba", "fp32", 16, 128, 0.05, 0.1, 0.1),
        row(OURS, "8 bits", 1, 128, 1.0),
    ]
    chats = [
        ChatRow(OURS, 8, [[9.0, *[0.9] * 3, *[1.0] * 4]], [[9.0, 1.1]]),  # a machine that slows down
        ChatRow(TRANSFORMER, 20, [[float(n) for n in range(20)]], [[0.0, 1.0, 2.0, 3.0]]),
    ]
    overhead = [
        OverheadRow("fp32", 1, [1.05], [1.0]),
        OverheadRow("fp32", 16, [4.2], [4.0]),
        OverheadRow("8 bits", 64, [1.3], [1.0]),
    ]
    ahead, many, writing, ours, grown, one, _, most = targets(rows, chats, overhead)
    assert "of mamba, the worst point (16 streams, context 128)" in ahead.what
    assert (ahead.seen.median, ahead.met) == (pytest.approx(0.5), False)
    assert (many.seen.median, many.met) == (pytest.approx(10), True)
    assert (writing.seen.median, writing.met) == (pytest.approx(4), False)
    assert (ours.seen.median, ours.met) == (pytest.approx(1.0), True)
    assert grown.met
    assert (one.met, most.met) == (True, False)
    assert FORMATS == ("fp32", "8 bits")
    assert HF


def test_a_chat_has_turns_to_compare():
    with pytest.raises(UserError, match="turns is 2"):
        ServeBench(ModelConfig(257, 64, 1, RetentionConfig(num_heads=1)), turns=2)
