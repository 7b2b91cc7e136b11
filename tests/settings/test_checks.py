"""Numbers in range and paths with their homes, in every configuration there is."""

import dataclasses
import math
import re
import typing
from importlib import import_module

import pytest

from retnet.data import DataConfig
from retnet.settings import Checked, Choice, UserError, build
from retnet.studies.study import Study
from retnet.train.config import RunConfig, TrainConfig


def config_classes():
    """Every dataclass of settings there is: those of a run, its mixers, studies, sampling and benchmarks."""
    for module in (
        "bench.decoding",
        "bench.training",
        "bench.implementations",
        "engine",
        "mixers",
        "train.config",
    ):
        import_module(f"retnet.{module}")
    assert issubclass(Study, Checked)  # its module imports every measure
    waiting = [Checked]
    while waiting:
        waiting += (kind := waiting.pop()).__subclasses__()
        if dataclasses.is_dataclass(kind) and kind.__module__.startswith("retnet."):
            yield kind


def test_no_number_of_any_configuration_is_nan_infinite_or_absurd():
    seen = set()
    for kind in config_classes():
        hints = typing.get_type_hints(kind)
        for name in (each.name for each in dataclasses.fields(kind)):
            if float not in (hints[name], *typing.get_args(hints[name])):
                continue
            seen.add(f"{kind.__name__}.{name}")
            several = typing.get_origin(hints[name]) is tuple
            for number in (math.nan, math.inf, -math.inf, 1e36):
                blank = object.__new__(kind)
                for other in dataclasses.fields(kind):
                    object.__setattr__(blank, other.name, None)
                object.__setattr__(blank, name, (number,) if several else number)
                with pytest.raises(UserError, match=rf"^{name} .*is {re.escape(str(number))}; it must be "):
                    Checked.__post_init__(blank)
    assert {
        "TrainConfig.learning_rate", "ModelConfig.norm_eps", "RetentionConfig.decay", "Sampling.top_p",
        "QualityMeasure.learning_rates", "Study.hours", "OpsBench.peer_work", "HyenaConfig.slow_decay",
    } <= seen  # fmt: skip


def test_every_dataclass_that_a_file_can_say_is_checked():
    waiting, seen = [RunConfig, Study], set()
    while waiting:
        kind = waiting.pop()
        if kind in seen or not kind.__module__.startswith("retnet."):  # other tests define some
            continue
        seen.add(kind)
        assert issubclass(kind, Checked), kind
        for hint in typing.get_type_hints(kind).values():
            for each in (hint, *typing.get_args(hint)):
                if isinstance(each, type) and issubclass(each, Choice):
                    waiting += each.options().values()
                elif dataclasses.is_dataclass(each):
                    waiting.append(each)
    assert len(seen) > 18


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(learning_rate=math.nan), "learning_rate is nan; it must be at least 0 and at most 1000"),
        (lambda: TrainConfig(beta1=1.0), "beta1 is 1.0; it must be at least 0 and below 1"),
        (lambda: TrainConfig(clip=1e36), "clip is 1e+36; it must be a finite number, of at most 1e+18"),
        (lambda: TrainConfig(steps=2.5), "steps is 2.5; it must be a whole number"),
        (lambda: TrainConfig(steps=True), "steps is True; it must be a number"),
        (lambda: TrainConfig(seed=1 << 64), f"seed is {1 << 64}; it must fit in 64 bits"),
        (lambda: TrainConfig(threads=0), "threads is 0; it must be at least 1"),
        (lambda: build(TrainConfig, {"clip": math.inf}), "clip is inf; it must be a finite number"),
        (lambda: build(RunConfig, {"model": {"norm_eps": math.nan}}), "model: norm_eps is nan; it must be at least 0"),
        (lambda: build(RunConfig, {"model": {"mixer": {"name": "retention", "decay": [0.5, math.nan]}}}),
         "decay has an item that is nan; it must be a finite number"),
    ],
)  # fmt: skip
def test_numbers_are_numbers_however_they_come(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "settings",
    [{"data.cache": ""}, {"data.corpus": ""}, {"data.corpus": ["a", ""]}, {"train.start_from": ""}],
)
def test_an_empty_path_is_not_the_current_directory(settings):
    (name,) = settings
    section, _, field = name.partition(".")
    with pytest.raises(UserError, match=rf"{field} (is|has an item that is) empty; it must name something"):
        build(RunConfig, {section: {field: settings[name]}})


def test_a_home_is_expanded_where_a_setting_is_a_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = build(
        RunConfig, {"data": {"corpus": ["~/a", "package:x"], "cache": "~/c", "tokenizer": "bytes"}}
    ).data
    assert (data.corpus, data.cache, data.tokenizer) == (
        (f"{tmp_path}/a", "package:x"),
        f"{tmp_path}/c",
        "bytes",
    )
    assert DataConfig(validation="~").validation == str(tmp_path)
    assert DataConfig(text_field="~/x").text_field == "~/x"  # no path
