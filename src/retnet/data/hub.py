"""Hugging Face datasets, streamed: ``hf:NAME[:CONFIG[:SPLIT]]``, where NAME may be a local folder of data files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from retnet.settings import UserError

if TYPE_CHECKING:
    import pyarrow


def identity(spec: str) -> str:
    """What changes when the dataset does: the commit, entity tag or modification time of its data files.

    Raises:
        UserError: there is no such dataset, configuration or split, or it cannot be reached.
    """
    from datasets import load_dataset_builder

    name, config, split = parse(spec)
    try:
        builder = load_dataset_builder(name, config)
    except Exception as error:  # the library raises many kinds, connection errors among them
        raise UserError(_cannot(spec, error)) from None
    files = builder.config.data_files
    if files is None:
        return str(builder.hash)
    if split not in files:
        raise UserError(f"{spec} has no split {split!r}; known: {', '.join(map(str, files))}")
    return repr((builder.config.name, list(files[split]), files[split].origin_metadata))


def tables(spec: str, rows: int) -> Iterator[pyarrow.Table]:
    """The dataset in order, `rows` at a time, never more than that in memory.

    Raises:
        UserError: it cannot be opened, or the connection breaks.
    """
    from datasets import load_dataset

    name, config, split = parse(spec)
    try:
        dataset = load_dataset(name, config, split=split, streaming=True)
        yield from dataset.with_format("arrow").iter(batch_size=rows)
    except (
        Exception
    ) as error:  # half a dataset is never taken for a whole one; preparing resumes where it stopped
        raise UserError(_cannot(spec, error)) from None


def parse(spec: str) -> tuple[str, str | None, str]:
    """``hf:NAME[:CONFIG[:SPLIT]]`` → name, configuration (None: the only or default one), split (default ``train``)."""
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{spec!r} is not of the form hf:NAME[:CONFIG[:SPLIT]]")
    config, split = [*rest, "", ""][:2]
    return os.path.expanduser(name), config or None, split or "train"


def _cannot(spec: str, error: Exception) -> str:
    return f"cannot read {spec}: {type(error).__name__}: {' '.join(str(error).split())}"
