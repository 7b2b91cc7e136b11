"""`retnet demo`: train, judge the result against gzip and xz, read what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from retnet.cli.options import HomePath
from retnet.settings import config_path, load, parse_overrides

if TYPE_CHECKING:
    from retnet.data import Tokenizer, TokenShards
    from retnet.train.progress import TrainingProgress

SAMPLE_BYTES = 300


@click.command("demo", context_settings={"ignore_unknown_options": True})
@click.argument("config", default="demo")
@click.option("--run-dir", type=HomePath(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def command(config: str, run_dir: Path, overrides: tuple[str, ...]) -> None:
    """Train CONFIG on the default corpus, compare with gzip and xz on held-out text, and write a sample.

    An interrupted demo goes on where it stopped; a finished one shows its results again.
    """
    from retnet.host import keep_freed_memory
    from retnet.train.config import RunConfig
    from retnet.train.progress import TrainingProgress
    from retnet.train.trainer import train

    keep_freed_memory()
    progress = TrainingProgress()
    run = load(RunConfig, config_path(config), parse_overrides(overrides))
    outcome = train(run, run_dir, begin="resume-or-start", progress=progress)
    if not outcome.finished:
        return
    held_out = outcome.prepared.validation
    bits = _bits_per_byte(run_dir, held_out, progress)
    _report(bits, _text_of(held_out, outcome.prepared.tokenizer))
    _sample(run_dir)
    click.echo(f"\nGo on with:  retnet generate {run_dir} --prompt 'def main(' --max-tokens 200")
    click.echo(f"Or in a browser:  retnet serve {run_dir}   (make serve), then http://127.0.0.1:8000")


def _bits_per_byte(run_dir: Path, held_out: TokenShards, progress: TrainingProgress) -> float:
    """Of the best checkpoint, over all held-out text."""
    import torch

    from retnet.data import Batches
    from retnet.engine import open_run
    from retnet.train.objective import Objective, evaluate
    from retnet.train.run_dir import RunDirectory

    progress.say("measuring the best checkpoint on all held-out text")
    c = RunDirectory(run_dir).config().train
    device = "auto" if c.device == "auto" else c.device
    model = open_run(run_dir, device=device).model
    on = next(model.parameters()).device
    return evaluate(
        Objective(model),
        Batches(held_out, seq_len=c.seq_len, batch_size=c.batch_size, seed=c.seed),
        bytes_per_token=held_out.num_bytes / held_out.num_tokens,
        device=on,
        autocast=torch.autocast(on.type, torch.bfloat16, enabled=c.precision == "bf16"),
    ).bits_per_byte


def _text_of(held_out: TokenShards, tokenizer: Tokenizer) -> bytes:
    tokens = held_out.tokens(0, held_out.num_tokens)
    return tokenizer.decode_bytes(tokens[tokens != tokenizer.bos_id].tolist())


def _report(bits: float, text: bytes) -> None:
    import gzip
    import lzma

    compressed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    click.echo(f"\nBits per byte of {len(text):,} bytes of held-out text (fewer is better)")
    for name, content in compressed.items():
        click.echo(f"  {name:12} {8 * len(content) / len(text):.3f}")
    click.echo(f"  {'this RetNet':12} {bits:.3f}")


def _sample(run_dir: Path) -> None:
    from retnet.engine import Sampling, generate, open_run

    run = open_run(run_dir, device="auto")
    done = generate(
        run.model, run.tokenizer, [""], max_tokens=SAMPLE_BYTES, sampling=Sampling(temperature=0.8), seed=1
    )
    text = done[0][0].text.encode()[:SAMPLE_BYTES].decode(errors="ignore")
    click.echo(f"\nA sample, {SAMPLE_BYTES} bytes from nothing:\n\n{text}")
