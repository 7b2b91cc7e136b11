"""Initial weights of a new run: those of a run, a checkpoint, or another library's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from retnet.convert import Found, folder_of, read, recognise
from retnet.convert.native import TOKENIZER
from retnet.data.config import DataConfig
from retnet.io import write_bytes, write_text
from retnet.model import ModelConfig
from retnet.model.runs import find_checkpoint
from retnet.settings import UserError, differences
from retnet.train.config import RunConfig
from retnet.train.run_dir import RunDirectory

ORIGIN = "origin.json"  # in a run directory: where its weights came from, and their hashes
_FREE = ("model.dropout", "model.init")  # do not change the function that weights compute


def adopt(config: RunConfig, run: RunDirectory) -> RunConfig:
    """A configuration with the model and tokenizer of the weights it starts from.

    The tokenizer is copied into the run directory, which must not depend on another one.

    Raises:
        UserError: nothing readable there, a [model] that is another one, or a tokenizer that is; or a run that is there and
            was begun from something else.
    """
    source = config.train.start_from
    if source is None:
        return config
    if run.exists:
        old = run.config()
        if not _same_place(source, old.train.start_from):
            began = f"from {old.train.start_from}" if old.train.start_from else "with fresh weights"
            raise UserError(
                f"{run.path} was begun {began} and goes on with its own, so --init {source} would not be read; leave it "
                "out, or begin another run with it in another --run-dir"
            )
        own = run.path / TOKENIZER
        data = replace(config.data, tokenizer=str(own)) if own.is_file() else config.data
        train = replace(config.train, start_from=old.train.start_from)
        return replace(config, model=old.model, data=data, train=train)
    config, content = of_weights(config)
    if content is None:
        return config
    with run.writing():
        run.path.mkdir(parents=True, exist_ok=True)
        write_bytes(run.path / TOKENIZER, content)
    return replace(config, data=replace(config.data, tokenizer=str(run.path / TOKENIZER)))


def of_weights(config: RunConfig) -> tuple[RunConfig, bytes | None]:
    """A new run's configuration with the model of the weights it starts from, and their `tokenizer.json`; writes nothing.

    Raises:
        UserError: as `adopt`.
    """
    source = config.train.start_from
    if source is None:
        return config, None
    found = read(source, weights=False)
    if config.model != ModelConfig():
        asked = replace(config.model, vocab_size=config.model.vocab_size or found.config.vocab_size)
        places = differences(asked, found.config, "model")
        other = [f"{place} {own!r}, there {there!r}" for place, own, there in places if place not in _FREE]
        if other:
            raise UserError(
                f"--init {source} holds another model than [model] describes: {'; '.join(other)}. "
                "Leave [model] out to take that of the weights, or make it the same"
            )
    config = replace(config, model=replace(found.config, dropout=config.model.dropout))
    tokenizer = found.tokenizer.get(TOKENIZER)
    if tokenizer is not None and config.data.tokenizer != DataConfig().tokenizer:
        given = Path(config.data.tokenizer)
        if not given.is_file() or given.read_bytes() != tokenizer:
            raise UserError(
                f"--init {source} was trained with a tokenizer of its own, and data.tokenizer is "
                f"{config.data.tokenizer!r}; leave data.tokenizer out"
            )
    return config, tokenizer


def own_checkpoint(source: str) -> Path | None:
    """The checkpoint of this library that a run starts from; None where its weights lie in another form.

    Raises:
        UserError: nothing that can be read is there.
    """
    return find_checkpoint(folder_of(source))[0] if recognise(source) == "run" else None


def starting_weights(source: str, run: RunDirectory, *, weights: bool) -> Mapping[str, Tensor]:
    """The weights that a run starts from, none where they are not wanted; `origin.json` says which they were.

    Raises:
        UserError: they are not what they were when the run was begun.
    """
    found = read(source, weights=weights)
    note_source(run, ORIGIN, source, found)
    return found.tensors


def note_source(run: RunDirectory, name: str, source: str, found: Found) -> None:
    """Writes into a file of the run which weights of others it uses, with their hashes.

    Raises:
        UserError: they are not what they were when that was first written.
    """
    record, hashes = run.path / name, dict(found.hashes)
    if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["sha256"] != hashes:
        raise UserError(
            f"{source} has changed since {run.path} was begun with it; restore it, or begin another run"
        )
    about = {"source": source, "kind": found.kind, "sha256": hashes}
    with run.writing():
        write_text(record, json.dumps(about, indent=2) + "\n")


def _same_place(source: str, other: str | None) -> bool:
    return other is not None and Path(source).resolve() == Path(other).resolve()
