"""`retnet convert`: checkpoints of other libraries into folders of this one, and back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retnet.cli.options import HomeText
from retnet.io import read_text
from retnet.settings import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from retnet.convert import Found
    from retnet.data import Tokenizer

LENGTH = 512  # tokens of a sample, at most
CLAMPED = ("torchscale", "syncdoth")  # kinds whose parallel form clamps sums of scores


@click.command()
@click.argument("source", type=HomeText())
@click.argument("dest", type=HomeText())
@click.option(
    "--from",
    "kind",
    type=click.Choice(["torchscale", "fla", "syncdoth", "llama", "hf", "run"]),
    help="[default: recognised]",
)
@click.option("--to", type=click.Choice(["hf", "fla", "syncdoth", "run"]), default="hf", show_default=True)
@click.option(
    "--config",
    type=HomeText(),
    help="JSON with torchscale's arguments. [default: the checkpoint's own, or config.json]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights. [default: as they are]",
)
@click.option(
    "--tokenizer",
    "spec",
    type=HomeText(),
    help="bytes, a tokenizer.json or a folder. [default: the source's own]",
)
@click.option("--clamp", is_flag=True, help="Keep torchscale's score clamp: exact, but cannot generate.")
@click.option(
    "--sample",
    type=HomeText(),
    help="Text, or JSON token ids, to measure the clamp's effect on. [default: random tokens]",
)
@click.option("--force", is_flag=True, help="Replace the model at DEST.")
def command(
    source: str,
    dest: str,
    kind: str | None,
    to: str,
    config: str | None,
    dtype: str | None,
    spec: str | None,
    clamp: bool,
    sample: str | None,
    force: bool,
) -> None:
    """Convert SOURCE, a checkpoint of another library or a run, into DEST.

    SOURCE is of torchscale, of flash-linear-attention (fla), of syncdoth/RetNet (syncdoth), a Transformer of the kinds of
    Llama, Mistral and Qwen (llama), a Hugging Face folder (hf)
    or a run. DEST becomes a Hugging Face folder, one that flash-linear-attention or syncdoth/RetNet opens, or a
    checkpoint that `retnet generate` opens. It appears complete or not at all, with the SHA-256 of its files and of
    those it was made from. Nothing in SOURCE is ever run: pickles are read as data or refused.
    """
    from retnet.convert import folder_of, read, with_clamp, write
    from retnet.convert.folders import destination
    from retnet.host import choose_dtype

    source = str(folder_of(source))
    destination(dest, Path(source), force=force)  # before reading gigabytes
    found = read(source, kind, config=config)
    _say("found", *_description(found, source), *found.notes)
    tokenizer = _tokenizer(found, source, spec, to)
    if clamp or sample is not None:
        _only_clamped(found)
    if found.kind in CLAMPED:
        _say("clamp", _effect(found, sample, tokenizer))
    if clamp:
        found = with_clamp(found)
    if (kind_of_weights := choose_dtype(dtype)) is not None:
        found = found.to(kind_of_weights)
    if to == "hf":
        _quiet()
    path = write(found, dest, to, source=source, tokenizer=tokenizer, force=force)
    size = sum(file.stat().st_size for file in path.iterdir())
    _say("written", f"{dest}, {size / 1e6:,.1f} MB, {str(found.dtype).removeprefix('torch.')}")
    _say("next", *_next(dest, to, has_tokenizer=bool(tokenizer or found.tokenizer), clamp=clamp))


def _say(title: str, *lines: str) -> None:
    for line in lines:
        click.echo(f"{title:9}{line}")
        title = ""


def _description(found: Found, source: str) -> list[str]:
    """What was found, in a few lines: where, how large, which dialect."""
    from retnet.mixers import RetentionConfig

    config, mixer = found.config, found.config.mixer
    parameters = sum(x.numel() for x in found.tensors.values())
    lines = [
        f"{found.kind}: {source}",
        f"{config.num_layers} layers of width {config.d_model}, {config.vocab_size:,} tokens, {parameters:,} parameters, "
        f"{str(found.dtype).removeprefix('torch.')}",
    ]
    if not config.is_uniform:
        mixers = Counter(kind.name for kind in config.mixers_by_layer)
        lines.append(f"layers of {', '.join(f'{name} ({count})' for name, count in mixers.items())}")
    elif isinstance(mixer, RetentionConfig):
        keys, values = mixer.widths(config.d_model)
        decay = f"decay {mixer.decay}" if isinstance(mixer.decay, str) else "decays of its own"
        lines += [
            f"{mixer.num_heads} heads of {keys} (values {values}), {decay}, rotation {mixer.rotary} "
            f"{mixer.rotary_spacing}, {'gated' if mixer.gate else 'no gate'}",
            f"head norm {mixer.head_norm}, ε {mixer.head_norm_eps:g}, scores {mixer.score_norm or 'none'}; {config.norm}, "
            f"ε {config.norm_eps:g}; {config.ffn} {config.ffn_dim or 2 * config.d_model}; "
            f"embedding{' tied' * config.tie_embeddings}{' scaled' * config.embedding_scale}"
            f"{' normalised' * config.embedding_norm}{' untied' * (not config.tie_embeddings)}",
        ]
    return lines


def _tokenizer(found: Found, source: str, spec: str | None, to: str) -> Tokenizer | None:
    """The tokenizer to write: the one asked for; for a run also that of a Hugging Face folder, in our form."""
    from retnet.data import Tokenizer

    if spec is None and (to != "run" or found.kind == "run" or "tokenizer.json" not in found.tokenizer):
        return None  # none, or its files as they are
    try:
        tokenizer = Tokenizer.load(source if spec is None else spec)
    except UserError as error:
        raise UserError(f"{error}" if spec else f"{error}; or give another with --tokenizer") from None
    vocab_size = found.config.vocab_size or 0
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {spec or source} has {tokenizer.vocab_size} tokens but the model {vocab_size}; "
            "they do not belong together"
        )
    return tokenizer


def _only_clamped(found: Found) -> None:
    if found.kind not in CLAMPED:
        raise UserError(
            f"--clamp and --sample are for checkpoints of kind {' and '.join(CLAMPED)}; this one is of kind "
            f"{found.kind!r}"
        )


def _effect(found: Found, sample: str | None, tokenizer: Tokenizer | None) -> str:
    from retnet.convert import clamp_effect, random_tokens

    vocab_size = found.config.vocab_size or 0
    tokens = random_tokens(vocab_size) if sample is None else _tokens(sample, tokenizer, vocab_size)
    what = f"{tokens.numel()} {'random tokens' if sample is None else f'tokens of {sample}'}"
    return (
        f"leaving out torchscale's clamp of score sums, which cannot generate, changes the logits by "
        f"{clamp_effect(found, tokens):.1e} (relative) on {what}; --clamp keeps it"
    )


def _tokens(sample: str, tokenizer: Tokenizer | None, vocab_size: int) -> Tensor:
    """[1,T] token ids of a file: a JSON list of them, or text."""
    import torch

    text = read_text(sample, f"--sample {sample}")
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        if tokenizer is None:
            raise UserError(
                f"--sample {sample} is text, so --tokenizer must say how it becomes tokens"
            ) from None
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise UserError(
            f"--sample {sample} must be text, or a JSON list of token ids from 0 to {vocab_size - 1}"
        )
    return torch.tensor([ids[:LENGTH]])


def _quiet() -> None:
    """No progress bars of transformers between our lines."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # `write` says so
    logging.disable_progress_bar()


def _next(dest: str, to: str, *, has_tokenizer: bool, clamp: bool) -> list[str]:
    """How to go on."""
    if to == "hf":
        return [
            "from retnet.model.hf import RetNetForCausalLM",
            f"model = RetNetForCausalLM.from_pretrained({dest!r})",
        ]
    if to == "fla":
        return [
            "import fla; from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({dest!r})",
        ]
    if to == "syncdoth":
        return [
            "with modeling_retnet.py of github.com/syncdoth/RetNet:",
            f"model = RetNetForCausalLM.from_pretrained({dest!r})",
        ]
    if has_tokenizer and not clamp:
        return [f"retnet generate {dest} --prompt 'Once upon'"]
    lines = ["from retnet.model.checkpoint import load_model", f"model = load_model({dest!r})"]
    return (
        lines
        if clamp
        else [*lines, "(no tokenizer was found; with --tokenizer, `retnet generate` opens it as well)"]
    )
