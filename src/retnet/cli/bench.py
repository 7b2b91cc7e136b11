"""`retnet bench`: how fast, as ratios to peers and physical limits measured beside."""

# ruff: noqa: ANN401 (options of a benchmark, as click hands them on)

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from retnet.cli.options import HomePath, numbers, options

if TYPE_CHECKING:
    from retnet.measure.records import Record
    from retnet.model import ModelConfig
    from retnet.progress import Say

Function = TypeVar("Function", bound=Callable[..., Any])

LAYERS, HEADS = 2, 2  # of the quick model, unless its pattern of layers is longer
WIDTH = 128  # of the quick model: llama.cpp's peers have no size near that of a smaller one


@click.group("bench")
def command() -> None:
    """Measure speed against peers and physical limits.

    Contenders run interleaved in one process, limits are measured right beside each of them, and what is reported are
    medians of ratios. Needs pip install 'retnet[bench]' and a machine that does nothing else.
    """


def _common(function: Function) -> Function:
    """The options of all verbs."""
    for option in (
        click.option("--quick", is_flag=True, help="A smoke run in seconds; its numbers mean nothing."),
        click.option(
            "--out",
            type=HomePath(path_type=Path, file_okay=False),
            default=Path("benchmarks/results"),
            show_default=True,
            help="Directory of the record (.json) and the plot (.png).",
        ),
    ):
        function = option(function)
    return function


def _of_a_model(
    name: str, config: str, place: str, *names: str, width: int = WIDTH
) -> Callable[[Function], click.Command]:
    """A decorator that makes a verb which measures a model, by default that of `config`, of width `width` with ``--quick``.

    Its options are fields of the dataclass at `place` (see `retnet.cli.options.options`). What is decorated is called with
    model, quick and these options; it gives that dataclass, filled, and the function that measures.
    """

    def decorate(choose: Function) -> click.Command:
        @command.command(name, context_settings={"ignore_unknown_options": True})
        @click.option(
            "--config", default=config, show_default=True, help="Whose model: a .toml file or a name."
        )
        @options(place, *names)
        @_common
        @click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
        @functools.wraps(choose)
        def verb(
            config: str,
            out: Path,
            quick: bool,
            overrides: tuple[str, ...],
            **given: Any,
        ) -> None:
            bench, measure = choose(_model(config, overrides, width if quick else None), quick, **given)
            _run(name, bench, quick, out, functools.partial(measure, bench), config=config)

        return verb

    return decorate


@_of_a_model(
    "train",
    "laptop/25m",
    "retnet.bench.training:TrainingBench",
    *("rounds", "tokens", "extra", "minutes"),
    width=64,
)
def train(model: ModelConfig, quick: bool, **given: Any) -> Any:
    """Training steps beside a Llama of equal size, and beside the machine's fp32 matrix products.

    Settings of the model are changed as in training: --model.num_layers 4.
    """
    from retnet.bench.training import TrainingBench, measure_training

    if quick:
        given |= {"lengths": (64, 128), "tokens": 256, "rounds": 2, "op_length": 256, "product_size": 256}
    return TrainingBench(model, **given), measure_training


@_of_a_model(
    "decode",
    "laptop/17m",
    "retnet.bench.decoding:DecodingBench",
    *("rounds", "steps", "batch", "long", "minutes"),
)
def decode(model: ModelConfig, quick: bool, **given: Any) -> Any:
    """Time per generated token against context length, memory traffic, and a Llama's KV cache.

    Settings of the model are changed as in training: --model.num_layers 4.
    """
    from retnet.bench.decoding import DecodingBench, measure_decoding
    from retnet.bench.decoding_batches import BatchBench
    from retnet.bench.throughput import ThroughputBench

    if quick:
        given |= {"contexts": (64, 256), "peer_contexts": (64, 128), "batch": 2, "rounds": 2, "steps": 4}
        given |= {
            "batches": BatchBench((model,), rows=(1, 2, 4), rounds=2, short_rounds=2, buffer_megabytes=1),
            "throughput": ThroughputBench(contexts=(16, 64), prompt=100, rounds=2),
            "buffer_megabytes": 1,
        }
    long_model = _model("laptop/3m", (), WIDTH if quick else None)
    return DecodingBench(model, long_model=long_model, **given), measure_decoding


@_of_a_model("engine", "laptop/17m", "retnet.bench.engine:EngineBench", "rounds", "prompt", "minutes")
def engine(model: ModelConfig, quick: bool, **given: Any) -> Any:
    """What the engine costs over its decoder, and what exactness, drafts and edits of a session cost and save.

    Settings of the model are changed as in training: --model.num_layers 4.
    """
    from retnet.bench.engine import EngineBench, measure_engine

    if quick:
        given |= {"rows": (1, 2), "rounds": 2, "prompt": 400}
    return EngineBench(model, **given), measure_engine


@_of_a_model(
    "serve",
    "laptop/17m",
    "retnet.bench.serving:ServeBench",
    *("tokens", "rounds", "turns", "longest", "minutes"),
)
@click.option("--peers/--no-peers", default=True, help="Whether servers of others are measured too.")
def serve(model: ModelConfig, quick: bool, **given: Any) -> Any:
    """The HTTP server under load, beside llama.cpp's, Transformers' and a Transformer of equal size.

    1 to 64 streams after prompts of 128 to 8,192 tokens: time to the first token and between tokens, tokens per second,
    memory; a long chat; and what server and engine cost beside the bare decoder. Needs also pip install 'retnet[serve]'.
    """
    from retnet.bench.serving import ServeBench, measure_serving

    if quick:
        given |= {"streams": (1, 2), "contexts": (16, 64), "tokens": 8, "rounds": 2, "turns": 4, "said": 20}
    return ServeBench(model, **given), measure_serving


@command.command("ops")
@click.option(
    "--lengths",
    help="Tokens of a sequence, such as 512,2048,131072.  [default: 512 to 65536, on a GPU 131072]",
)
@click.option(
    "--shapes", help="Heads x K x V, such as 8x256x512,16x64x128.  [default: 16x64x128,8x128x256,8x256x512]"
)
@options(
    "retnet.bench.implementations:OpsBench",
    "tokens",
    "peer_work",
    "rounds",
    "minutes",
    unset=True,
    tokens="Of a call, at least.  [default: 2048, on a GPU 16384]",
    peer_work="Gflop of a call above which all but ours is left out.  [default: 160, on a GPU 200000]",
    rounds="Rounds of measurements.  [default: 3, on a GPU 7]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@_common
def ops(
    lengths: str | None,
    shapes: str | None,
    device: str,
    out: Path,
    quick: bool,
    **others: float | None,
) -> None:
    """The op and its decoding step beside peers, the machine's matrix products and its memory.

    Forward, and forward + backward, over lengths and head shapes: this library's backends, chunkwise and parallel retention
    under autograd, SDPA of equal width, and on a GPU flash-linear-attention where it is installed.
    """
    from retnet.bench.implementations import HeadShape, for_device, parse_shapes
    from retnet.bench.ops import measure_ops
    from retnet.host import choose_device

    chosen: dict[str, Any] = {}
    if quick:
        chosen |= {"shapes": (HeadShape(2, 16, 32),), "lengths": (128, 256), "tokens": 256, "rounds": 2}
        chosen |= {"product_size": 256, "buffer_megabytes": 1}
    given = {
        "lengths": None if lengths is None else tuple(numbers(lengths, "--lengths", least=1)),
        "shapes": None if shapes is None else parse_shapes(shapes),
        **others,
    }
    chosen |= {name: value for name, value in given.items() if value is not None}
    bench = for_device(choose_device(device), **chosen)
    _run("ops", bench, quick, out, functools.partial(measure_ops, bench))


def _model(config: str, overrides: tuple[str, ...], quick_width: int | None) -> ModelConfig:
    """The model of a configuration with settings changed; a small one where a width for a quick run is given."""
    from retnet.settings import config_path, load, parse_overrides
    from retnet.train.config import RunConfig

    path, settings = config_path(config), parse_overrides(overrides)
    model = load(RunConfig, path, settings).model
    if quick_width is None:
        return model
    patterns = [pattern for pattern in (model.layers, model.ffn_layers, model.ffn_dims) if pattern]
    small = {"model.d_model": quick_width, "model.num_layers": max(LAYERS, *map(len, patterns), 0)}
    mixers = {"mixer": model.mixer} | {
        f"mixers.{name}": mixer for name, mixer in (model.mixers or {}).items()
    }
    small |= {
        f"model.{place}.num_heads": HEADS for place, mixer in mixers.items() if hasattr(mixer, "num_heads")
    }
    return load(RunConfig, path, small | settings).model


def _run(
    name: str, bench: object, quick: bool, out: Path, measure: Callable[[Say], Record], **settings: str
) -> None:
    """Measures, saying where it is on stderr, writes the record, prints its tables."""
    import dataclasses

    from rich.console import Console

    from retnet.bench import report
    from retnet.measure import records
    from retnet.progress import shown

    records.prepare(out)
    with shown() as say:
        measured = measure(say)
    configuration = {**settings, "quick": quick, **dataclasses.asdict(bench)}  # type: ignore[call-overload]  # a dataclass
    record = report.complete(f"{name}-quick" if quick else name, configuration, measured)
    summary = report.summarise(record)
    report.show(summary, Console(highlight=False))  # first: it is there when nothing can be written any more
    files = records.write(record, out / f"{records.stem(record)}.json", summary.figures)
    click.echo("wrote " + " and ".join(map(str, files)))
