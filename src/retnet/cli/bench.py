"""`retnet bench`: how fast, as ratios to peers and physical limits measured beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from retnet.cli.options import HomePath, options

if TYPE_CHECKING:
    from retnet.measure.records import Record
    from retnet.model import ModelConfig
    from retnet.progress import Say

Function = TypeVar("Function", bound=Callable[..., Any])

QUICK = {"model.d_model": 64, "model.num_layers": 2, "model.mixer.num_heads": 2}


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


@command.command("train", context_settings={"ignore_unknown_options": True})
@click.option(
    "--config", default="laptop/25m", show_default=True, help="Whose model: a .toml file or a name."
)
@options("retnet.bench.training:TrainingBench", "rounds", "tokens", "extra", "minutes")
@_common
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def train(
    config: str,
    out: Path,
    quick: bool,
    overrides: tuple[str, ...],
    **given: Any,  # noqa: ANN401
) -> None:
    """Training steps beside a Llama of equal size, and beside the machine's fp32 matrix products.

    Settings of the model are changed as in training: --model.num_layers 4.
    """
    model = _model(config, overrides, quick)
    from retnet.bench.training import TrainingBench, measure_training

    if quick:
        given |= {"lengths": (64, 128), "tokens": 256, "rounds": 2, "op_length": 256, "product_size": 256}
    bench = TrainingBench(model, **given)
    _run("train", bench, quick, out, lambda say: measure_training(bench, say), config=config)


@command.command("decode", context_settings={"ignore_unknown_options": True})
@click.option(
    "--config", default="laptop/17m", show_default=True, help="Whose model: a .toml file or a name."
)
@options("retnet.bench.decoding:DecodingBench", "rounds", "steps", "batch", "long", "minutes")
@_common
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def decode(
    config: str,
    out: Path,
    quick: bool,
    overrides: tuple[str, ...],
    **given: Any,  # noqa: ANN401
) -> None:
    """Time per generated token against context length, memory traffic, and a Llama's KV cache.

    Settings of the model are changed as in training: --model.num_layers 4.
    """
    # the peers of llama.cpp have no size near that of the smallest quick model
    model = _model(config, ("--model.d_model", "128", *overrides) if quick else overrides, quick)
    from retnet.bench.decoding import DecodingBench, measure_decoding
    from retnet.bench.decoding_batches import BatchBench
    from retnet.bench.throughput import ThroughputBench

    if quick:
        given |= {"contexts": (64, 256), "peer_contexts": (64, 128), "batch": 2, "rounds": 2, "steps": 4}
        given |= {
            "batches": BatchBench((model,), rows=(1, 2, 4), rounds=2, buffer_megabytes=1),
            "throughput": ThroughputBench(contexts=(16, 64), prompt=100, rounds=2),
            "buffer_megabytes": 1,
        }
    bench = DecodingBench(model, long_model=_model("laptop/3m", (), quick), **given)
    _run("decode", bench, quick, out, lambda say: measure_decoding(bench, say), config=config)


@command.command("engine", context_settings={"ignore_unknown_options": True})
@click.option(
    "--config", default="laptop/17m", show_default=True, help="Whose model: a .toml file or a name."
)
@options("retnet.bench.engine:EngineBench", "rounds", "prompt")
@_common
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def engine(
    config: str,
    out: Path,
    quick: bool,
    overrides: tuple[str, ...],
    **given: Any,  # noqa: ANN401
) -> None:
    """What the engine costs over its decoder, and what exactness, drafts and edits of a session cost and save.

    Settings of the model are changed as in training: --model.num_layers 4.
    """
    model = _model(config, ("--model.d_model", "128", *overrides) if quick else overrides, quick)
    from retnet.bench.engine import EngineBench, measure_engine

    if quick:
        given |= {"rows": (1, 2), "rounds": 2, "prompt": 400}
    bench = EngineBench(model, **given)
    _run("engine", bench, quick, out, lambda say: measure_engine(bench, say), config=config)


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
    **numbers: float | None,
) -> None:
    """The op and its decoding step beside peers, the machine's matrix products and its memory.

    Forward, and forward + backward, over lengths and head shapes: this library's backends, chunkwise and parallel retention
    under autograd, SDPA of equal width, and on a GPU flash-linear-attention where it is installed.
    """
    from retnet.bench.implementations import HeadShape, for_device, parse_lengths, parse_shapes
    from retnet.bench.ops import measure_ops
    from retnet.host import choose_device

    chosen: dict[str, Any] = {}
    if quick:
        chosen |= {"shapes": (HeadShape(2, 16, 32),), "lengths": (128, 256), "tokens": 256, "rounds": 2}
        chosen |= {"product_size": 256, "buffer_megabytes": 1}
    given = {
        "lengths": None if lengths is None else parse_lengths(lengths),
        "shapes": None if shapes is None else parse_shapes(shapes),
        **numbers,
    }
    chosen |= {name: value for name, value in given.items() if value is not None}
    bench = for_device(choose_device(device), **chosen)
    _run("ops", bench, quick, out, lambda say: measure_ops(bench, say))


@command.command("serve", context_settings={"ignore_unknown_options": True})
@click.option(
    "--config", default="laptop/17m", show_default=True, help="Whose model: a .toml file or a name."
)
@options("retnet.bench.serving:ServeBench", "tokens", "rounds", "turns", "longest", "minutes")
@click.option("--peers/--no-peers", default=True, help="Whether servers of others are measured too.")
@_common
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def serve(
    config: str,
    out: Path,
    quick: bool,
    overrides: tuple[str, ...],
    **given: Any,  # noqa: ANN401
) -> None:
    """The HTTP server under load, beside llama.cpp's, Transformers' and a Transformer of equal size.

    1 to 64 streams after prompts of 128 to 8,192 tokens: time to the first token and between tokens, tokens per second,
    memory; a long chat; and what server and engine cost beside the bare decoder. Needs also pip install 'retnet[serve]'.
    """
    model = _model(config, ("--model.d_model", "128", *overrides) if quick else overrides, quick)
    from retnet.bench.serving import ServeBench, measure_serving

    if quick:
        given |= {"streams": (1, 2), "contexts": (16, 64), "tokens": 8, "rounds": 2, "turns": 4, "said": 20}
    bench = ServeBench(model, **given)
    _run("serve", bench, quick, out, lambda say: measure_serving(bench, say), config=config)


def _model(config: str, overrides: tuple[str, ...], quick: bool) -> ModelConfig:
    from retnet.settings import config_path, load, parse_overrides
    from retnet.train.config import RunConfig

    settings = parse_overrides(overrides)
    return load(RunConfig, config_path(config), {**QUICK, **settings} if quick else settings).model


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
    with shown(Console(stderr=True, highlight=False)) as say:
        measured = measure(say)
    configuration = {**settings, "quick": quick, **dataclasses.asdict(bench)}  # type: ignore[call-overload]
    record = report.complete(f"{name}-quick" if quick else name, configuration, measured)
    summary = report.summarise(record)
    report.show(summary, Console(highlight=False))  # first: it is there when nothing can be written any more
    files = records.write(record, out / f"{records.stem(record)}.json", summary.figures)
    click.echo("wrote " + " and ".join(map(str, files)))
