import dataclasses

import pytest
import torch
from torch import nn

from retnet import host
from retnet.bench import decoding, long_generation, training
from retnet.bench.decoding import DecodingBench
from retnet.bench.training import TrainingBench
from retnet.engine import quantise
from retnet.measure.clock import Sample, Spread
from retnet.measure.records import machine_slug
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import cost
from retnet.settings import UserError

MODEL = ModelConfig(257, 64, 2, RetentionConfig(num_heads=2))


def steps(name, length, seconds, **options):
    samples = [Sample(s, {"torch_mm": 50.0, "onednn": 100.0}) for s in seconds]
    return training.TrainingRow(name, length, options.get("batch", 1), options.get("flops", 90.0), samples)


def test_rows_of_training():
    row = steps("retnet", 10, [1.0, 2.0, 4.0], batch=3, flops=50.0)
    assert row.tokens_per_second == Spread(15, 7.5, 30)
    assert row.of_limit == Spread(0.25, 0.125, 0.5)  # of the faster of the two products
    assert row.of_torch_mm == Spread(0.5, 0.25, 1.0)


def test_targets_of_training():
    rows = [
        steps("retnet", 2048, [1.0, 2.0]),
        steps("retnet", 8192, [1.0, 2.0]),
        steps("retnet", 16384, [2.0, 4.0]),
        steps("llama", 2048, [1.0, 3.0]),
        steps("llama", 8192, [1.5, 3.0]),
    ]
    found = {t.what: (t.seen.median, t.met) for t in training.step_targets(rows)}
    assert found == {
        "model flops ÷ rate of torch.mm in fp32, T 2048": (1.35, True),  # made up: oneDNN is twice as fast
        "tokens/s at T 16384 ÷ at T 2048": (0.5, False),
        "tokens/s ÷ those of the Llama, T 2048": (1.25, True),
        "tokens/s ÷ those of the Llama, T 8192": (1.5, False),
    }
    assert training.step_targets([steps("retnet", 64, [1.0])]) == []


def test_the_op_is_judged_by_its_best_peer():
    names = training.OP
    seconds = {
        names["ours"]: 1.0,
        names["indexed 64"]: 4.0,
        names["indexed 128"]: 1.4,
        names["parallel"]: 3.0,
    }
    seconds |= {names["split 64"]: 1.3, names["split 128"]: 1.6}
    target = training.op_target({name: [Sample(s, {})] for name, s in seconds.items()}, 2048)
    assert target.seen.median == 1.3
    assert not target.met


def test_flops_of_a_step_are_three_forward_passes():
    bench = TrainingBench(MODEL, (64, 128), tokens=128, op_length=128)
    rows, contenders = training._steps(bench)
    assert [(r.name, r.length, r.batch) for r in rows] == [
        ("retnet", 64, 2),
        ("llama", 64, 2),
        ("retnet", 128, 1),
        ("llama", 128, 1),
    ]
    assert rows[0].flops == 3 * 128 * cost(MODEL, 64).flops_per_token
    assert all(contender.measure() > 0 for contender in contenders)


def test_a_packed_row_learns_what_separate_rows_learn():
    model = LanguageModel(MODEL)
    tokens = torch.randint(257, (3, 20))
    packed = training._packed_logits(model)(tokens)
    torch.testing.assert_close(packed.view(3, 20, 257), model(tokens))


def test_rows_of_decoding():
    limits = {"read": 100.0, "update": 50.0}
    row = decoding.DecodingRow("retnet", 1, 64, 200, 25, [Sample(6.0, limits), Sample(9.0, limits)])
    assert row.floor == Spread(3.0, 3.0, 3.0)  # 200 / 100 + 2 · 25 / 50
    assert row.over_floor == Spread(2.5, 2.0, 3.0)


def test_targets_of_decoding():
    limits = {"read": 1.0, "update": 1.0}

    def row(name, batch, context, *seconds):
        return decoding.DecodingRow(name, batch, context, 1, 0, [Sample(s, limits) for s in seconds])

    rows = [
        row("retnet", 1, 1024, 1.0, 2.0),
        row("retnet", 1, 4096, 1.1, 2.2),
        row("retnet int8", 1, 1024, 0.5, 1.0),
        row("llama", 1, 1024, 9.0, 9.0),
        row("retnet", 8, 1024, 9.0, 9.0),
    ]
    flat, floor, int8 = decoding.targets(rows)
    assert int8.what == "tokens/s with int8 weights ÷ with fp32, 1,024 tokens of context"
    assert int8.seen.median == pytest.approx(2.0)
    assert int8.met
    assert flat.seen.median == pytest.approx(1.1)
    assert not flat.met
    assert floor.seen.median == pytest.approx(1.65)
    assert not floor.met


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_weights(tied):
    model = LanguageModel(dataclasses.replace(MODEL, tie_embeddings=tied))
    layer = 12 * 64**2 + 4 * 64  # retention 8 d², feed-forward 4 d², two norms
    assert decoding.weight_bytes(model) == 4 * (2 * layer + 2 * 64 + 257 * 64)  # all norms, the head once
    rows = 2 * 10 * 64 + 257  # each of them has a scale in fp32, and so have the norms
    int8 = 2 * 12 * 64**2 + 257 * 64 + 4 * (rows + 2 * 4 * 64 + 2 * 64)
    assert decoding.weight_bytes(quantise(model)) == int8  # of the embedding a row, which is not counted
    assert decoding.weight_bytes(nn.Linear(3, 5)) == 4 * 20


def test_contexts_are_what_the_model_has_seen():
    model = LanguageModel(MODEL).eval()
    rows, contenders = decoding._contenders(
        DecodingBench(MODEL, (5, 12), (6,), batch=2, steps=1), model, lambda _: None
    )
    assert [(r.name, r.batch, r.context) for r in rows] == [
        ("retnet", 1, 5),
        ("retnet", 1, 12),
        ("retnet int8", 1, 5),
        ("llama", 1, 6),
        ("retnet", 2, 5),
        ("retnet", 2, 12),
        ("llama", 2, 6),
    ]
    state = 2 * (2 * 32 * 64 * 4 + 8)  # 2 layers of [2,32,64] fp32 and a position
    assert (rows[0].updated, rows[4].updated) == (state, 2 * state)
    cache = 2 * 2 * 6 * 64 * 4  # 2 layers, keys and values, 6 tokens of 64
    assert rows[6].read - rows[3].read == cache
    assert all(contender.measure() > 0 for contender in contenders)


@pytest.mark.slow
def test_a_long_generation_is_one_generation():
    said = []
    long = long_generation.generate_long(MODEL, 250, said.append)
    assert [mark["token"] for mark in long["marks"]] == [100, 250]
    assert all(mark["rss_bytes"] > 0 and mark["seconds_per_token"] > 0 for mark in long["marks"])
    speed, memory = long_generation.long_targets(long)
    assert speed.seen == Spread(**long["marks"][1]["ratio_to_first"])
    assert memory.seen.median == long["marks"][1]["rss_bytes"] / long["marks"][0]["rss_bytes"]
    assert long_generation.long_targets(None) == []


def test_a_generation_goes_on_through_its_blocks():
    def seen(text):
        return int(text.decoder.read(text.slots)[0].position)

    model = LanguageModel(MODEL).eval()
    with torch.inference_mode():
        text = long_generation._Generation(model, model.init_state(1), torch.zeros(1, dtype=torch.long))
        early = text.copy()
        text.block()
        assert (text.made, seen(text)) == (long_generation.BLOCK, long_generation.BLOCK)
        assert seen(early) == 0


@pytest.mark.parametrize(
    ("cpu", "cores", "slug"),
    [
        ("AMD EPYC", 2, "amd-epyc-2c"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", 16, "intel-xeon-platinum-8488c-16c"),
        ("AMD Ryzen 7 5800X 8-Core Processor", 16, "amd-ryzen-7-5800x-16c"),
        ("Apple M2", 8, "apple-m2-8c"),
        ("AMD EPYC as AVX2", 2, "amd-epyc-as-avx2-2c"),
        ("AMD EPYC with AVX2", 2, "amd-epyc-with-avx2-2c"),
        ("", None, "unknown-0c"),
    ],
)
def test_names_of_machines(cpu, cores, slug):
    assert machine_slug(cpu, cores) == slug


def test_a_machine_without_newer_instructions_says_so(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    cpu = host.describe()["cpu"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert host.describe()["cpu"] == f"{cpu} with AVX2"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert host.describe()["cpu"] == f"{cpu} as AVX2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1000}, "--tokens is 1000; it must be a multiple of .* 512, 2048"),
        ({"tokens": 100}, "--tokens is 100"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
    ],
)
def test_mistakes_in_training(options, message):
    with pytest.raises(UserError, match=message):
        TrainingBench(MODEL, **options)


def test_lengths_above_the_tokens_of_a_step_are_left_out():
    assert TrainingBench(MODEL, tokens=4096).used_lengths == (512, 2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"long": 150}, "--long is 150; it must be at least 200, or 0 for none"),
    ],
)
def test_mistakes_in_decoding(options, message):
    with pytest.raises(UserError, match=message):
        DecodingBench(MODEL, **options)
