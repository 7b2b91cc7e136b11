import dataclasses
import json
import math
import sys

import pytest
import torch

from retnet.bench import llama_cpp, throughput
from retnet.bench.throughput import READ, WRITE, ThroughputBench, ThroughputRow
from retnet.measure.clock import Budget, Sample
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import UserError

MODEL = ModelConfig(257, 128, 2, RetentionConfig(num_heads=2))
PARAMETERS = 427_000
BENCH = ThroughputBench(contexts=(8, 40), prompt=30, rounds=2)


def without(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    without(monkeypatch, "gguf")
    monkeypatch.setitem(sys.modules, "xllamacpp", dataclasses)  # any module with a spec
    assert llama_cpp.missing() == "llama.cpp is not measured: gguf missing; pip install 'retnet[llamacpp]'"
    without(monkeypatch, "xllamacpp")
    assert "gguf and xllamacpp missing" in llama_cpp.missing()


@pytest.mark.slow
def test_ours_is_measured_where_llama_cpp_is_missing(monkeypatch):
    without(monkeypatch, "gguf", "xllamacpp")
    said = []
    record = throughput.measure_throughput(
        LanguageModel(MODEL).eval(), PARAMETERS, BENCH, lambda text, part=0.0: said.append(text), Budget(None)
    )
    found = {(row["name"], row["weights"], row["work"], row["tokens"]) for row in record["rows"]}
    tasks = [(WRITE, 8), (WRITE, 40), (READ, 30)]
    assert found == {("retnet", weights, *task) for weights in ("fp32", "8 bits") for task in tasks}
    assert all(
        row["tokens_per_s"]["median"] > 0 and row["times_ours"]["median"] == 1 for row in record["rows"]
    )
    assert record["llama_cpp"]["not_measured"] == [llama_cpp.missing()]
    assert llama_cpp.missing() in said
    assert (record["rounds"], record["targets"], record["llama_cpp"]["models"]) == (2, [], [])


def test_a_family_that_no_size_fits_is_left_out(monkeypatch):
    monkeypatch.setattr(llama_cpp, "missing", lambda: None)
    with llama_cpp.models(MODEL, 1000, (8,), lambda *_: None) as found:
        assert found.models == []
    assert len(found.not_measured) == 3
    assert "Llama of llama.cpp is not measured: no Llama of about" in found.not_measured[0]


def test_targets_are_against_the_fastest_where_it_is_hardest():
    def row(name, weights, work, tokens, *seconds):
        return ThroughputRow(name, weights, work, tokens, float, [Sample(s, {}) for s in seconds])

    rows = [
        row("retnet", "fp32", WRITE, 128, 1.0, 2.0),
        row("retnet", "fp32", WRITE, 4096, 1.0, 2.0),
        row("retnet", "8 bits", READ, 1000, 1.0, 1.0),
        row("llama", "fp32", WRITE, 128, 0.9, 1.8),
        row("llama", "fp32", WRITE, 4096, 5.0, 10.0),
        row("mamba", "fp32", WRITE, 128, 1.0, 4.0),
        row("llama", "8 bits", READ, 1000, 3.0, 3.0),
    ]
    write, read = throughput.targets(rows)
    assert write.what == "tokens/s, fp32, write after 128 ÷ those of the fastest there (llama)"
    assert (write.seen.median, write.met) == (pytest.approx(0.9), False)
    assert read.what == "tokens/s, 8 bits, read of 1,000 ÷ those of the fastest there (llama)"
    assert (read.seen.median, read.met) == (3.0, True)


def test_samples_that_write_are_as_long_as_is_useful():
    asked = []
    for seconds, tokens in ((1.0, 16), (0.01, 50), (1e-6, 64)):
        measure = throughput._adapted(lambda n, s=seconds: asked.append(n) or s)
        assert measure() == measure() == seconds
        assert asked[-2:] == [16, tokens]


class Answers(llama_cpp.LlamaCppModel):
    """One that answers without a process, and remembers what it was asked."""

    def __init__(self, folder, **timings):
        super().__init__(llama_cpp.FAMILIES[0], llama_cpp.PeerSize(1, 64, 64), 257, "fp32", folder)
        self.asked, self.timings = [], timings

    def _ask(self, path, body):
        self.asked.append((path, body))
        return {"timings": self.timings}


def test_seconds_are_those_of_what_was_asked(tmp_path):
    model = Answers(tmp_path, prompt_n=30, predicted_n=1, prompt_ms=60.0)
    assert model.seconds_to_read(30) == pytest.approx(0.002)
    assert model.seconds_to_read(30) == pytest.approx(0.002)
    (_, first), (_, second) = model.asked
    assert first["prompt"] != second["prompt"]  # nothing of an earlier prompt can be used again
    assert not first["cache_prompt"]
    model = Answers(tmp_path, prompt_n=1, predicted_n=11, predicted_ms=50.0)
    assert model.seconds_to_write(8, 10) == pytest.approx(0.005)  # 10 steps: the first token is the prompt's
    (path, restored), (_, asked) = model.asked
    assert (path, restored) == ("/slots/0?action=restore", {"filename": "8"})
    assert (len(asked["prompt"]), asked["n_predict"], asked["cache_prompt"]) == (9, 11, True)


@pytest.mark.parametrize(("read", "wrote"), [(29, 1), (30, 0)])
def test_answers_of_another_length_are_refused(read, wrote, tmp_path):
    model = Answers(tmp_path, prompt_n=read, predicted_n=wrote, prompt_ms=60.0)
    with pytest.raises(
        UserError, match=rf"read {read} and wrote {wrote} tokens, but was to read 30 and write 1"
    ):
        model.seconds_to_read(30)


def test_contexts_that_would_take_too_long_are_left_out(monkeypatch, tmp_path):
    clock = [100.0]
    monkeypatch.setattr(llama_cpp.time, "monotonic", lambda: clock[0])
    model, kept = Answers(tmp_path), []

    def keep(tokens, after=0):
        kept.append((tokens, after))
        clock[0] += (tokens - after) * 0.1

    model.keep_context = keep
    assert llama_cpp._keep_contexts(model, (128, 16, 1024), lambda *_: None, 120.0) == [16, 128]
    assert kept == [(16, 0), (128, 16)]
    assert llama_cpp._keep_contexts(model, (16, 1024), lambda *_: None, math.inf) == [16, 1024]


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    broken = tmp_path / "server.py"
    broken.write_text("import sys; sys.exit('no such CPU')", encoding="utf-8")
    monkeypatch.setattr(llama_cpp, "SERVER", broken)
    monkeypatch.setattr(llama_cpp, "write", lambda *_: None)
    with pytest.raises(UserError, match="Llama does not start: no such CPU"), Answers(tmp_path).running(1, 8):
        pass


@pytest.mark.slow
def test_the_real_llama_cpp(monkeypatch):
    """Three families in two formats read and write what they are asked to, in processes that end."""
    if reason := llama_cpp.missing():
        pytest.skip(reason)
    monkeypatch.setattr(
        torch, "get_num_threads", lambda: 1
    )  # its threads spin: two of them can starve a busy machine
    record = throughput.measure_throughput(
        LanguageModel(MODEL).eval(), PARAMETERS, BENCH, lambda *_: None, Budget(None)
    )
    assert record["llama_cpp"]["not_measured"] == []
    assert "AVX" in record["llama_cpp"]["build"] or "NEON" in record["llama_cpp"]["build"]
    assert len(record["llama_cpp"]["models"]) == 6
    assert all(abs(m["parameters"] / PARAMETERS - 1) < 0.02 for m in record["llama_cpp"]["models"])
    assert len(record["rows"]) == (1 + 3) * 2 * 3
    assert all(row["tokens_per_s"]["low"] > 0 for row in record["rows"])
    assert len(record["targets"]) == 4
    json.dumps(record)


@pytest.mark.slow
def test_contexts_of_the_real_llama_cpp_are_what_it_continues(tmp_path):
    """A restored state continues as the whole text read anew does, and otherwise than another text, in either format."""
    if reason := llama_cpp.missing():
        pytest.skip(reason)
    for family in llama_cpp.FAMILIES:
        size = llama_cpp.equal_size(family, PARAMETERS, 257, 128, 2)
        for weights in llama_cpp.FORMATS:
            model = llama_cpp.LlamaCppModel(family, size, 257, weights, tmp_path)
            with model.running(1, 64):
                if weights == "fp32":
                    model.keep_context(20)
                    model.keep_context(50, after=20)
                model.seconds_to_read(30)  # something else in between
                model._ask("/slots/0?action=restore", {"filename": "50"})
                restored = probabilities(model, [*model.context(50), 0], cached=True)
                anew = probabilities(model, [*model.context(50), 0], cached=False)
                other = probabilities(model, [*model.prompt(50), 0], cached=False)
            assert difference(restored, anew) < (
                1e-4 if weights == "fp32" else 0.2
            )  # the state is that of fp32
            assert difference(restored, other) > 1


def difference(one, other):
    """The greatest of log probabilities that both know."""
    return max(abs(one[token] - other[token]) for token in one.keys() & other.keys())


def probabilities(model, prompt, cached):
    """Token → log probability of the likeliest that can follow."""
    bytes_alone = [
        [token, False] for token in range(128, 257)
    ]  # of tokens that are no text, it tells nothing
    asked = {
        "n_predict": 1,
        "n_probs": 99,
        "logit_bias": bytes_alone,
        "temperature": 0,
        "cache_prompt": cached,
    }
    answer = model._ask("/completion", {"prompt": prompt, **asked})
    assert answer["timings"]["prompt_n"] == (1 if cached else len(prompt))
    return {x["id"]: x["logprob"] for x in answer["completion_probabilities"][0]["top_logprobs"]}
