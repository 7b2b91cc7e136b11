"""What a measurement leaves behind: a JSON record, a picture beside it, tables on the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retnet import host
from retnet.bench.plots import draw
from retnet.measure import peers
from retnet.settings import UserError

Record = dict[str, Any]


def host_slug(cpu: str, cores: int | None) -> str:
    """A short name of a machine for file names: ``"AMD EPYC"`` with 2 cores → ``"amd-epyc-2c"``."""
    name = re.sub(r"\((?:r|tm)\)|@.*|\bcpu\b|\bprocessor\b|\b\d+-core\b", " ", cpu.lower())
    words = re.findall(r"[a-z0-9]+", name) or ["unknown"]
    return "-".join([*words, f"{cores or 0}c"])


def prepare(out: Path) -> None:
    """Checks, before minutes are spent on measuring, that a record can be written.

    Raises:
        UserError: matplotlib is missing, or the directory cannot be made.
    """
    peers.need("matplotlib.figure")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {out}: {error.strerror}; choose another --out") from None


def complete(name: str, configuration: Mapping[str, Any], measured: Record) -> Record:
    """Adds to what was measured where, when and with what it was measured."""
    return {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host.describe(),
        "peers": host.versions("transformers"),
        "memory": "malloc keeps freed memory (retnet.host.keep_freed_memory), for all contenders alike, unless said",
        "configuration": dict(configuration),
        **measured,
    }


def write(record: Record, out: Path) -> tuple[Path, Path]:
    """Writes ``NAME.HOST.json`` and ``NAME.HOST.png``; returns their paths.

    Raises:
        UserError: they cannot be written.
    """
    stem = f"{record['name']}.{host_slug(record['host']['cpu'], record['host']['cores'])}"
    data, picture = out / f"{stem}.json", out / f"{stem}.png"
    try:
        data.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(record, picture)
    except OSError as error:
        raise UserError(f"cannot write {stem} to {out}: {error.strerror}; choose another --out") from None
    return data, picture


def show(record: Record, console: Console) -> None:
    """Prints the tables of a record."""
    if "steps" in record:
        tables = [*_ops_tables(record), _step_table(record)]
    else:
        tables = [_op_table(record), _training_table(record)] if "op" in record else [_decoding_table(record)]
    if "throughput" in record:
        tables.append(_throughput_table(record["throughput"]))
    if record.get("long"):
        tables.append(_long_table(record["long"]))
    for table in [*tables, _target_table(record)]:
        console.print(table)
    for sentence in record.get("throughput", {}).get("llama_cpp", {}).get("not_measured", ()):
        console.print(sentence)
    console.print("rounds: " + "; ".join(f"{part} {made}" for part, made in record["rounds"].items()))
    rates = (f"{name} {_spread(rate, 1e-9, 1)} G" for name, rate in record["limits"].items())
    console.print("limits, median (least..greatest): " + "; ".join(rates))


def _spread(values: Mapping[str, float], scale: float = 1.0, digits: int = 2) -> str:
    median, low, high = (f"{values[key] * scale:,.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}..{high})"


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _training_table(record: Record) -> Table:
    columns = ("T", "batch", "tokens/s", "model flops ÷ fp32 products", "÷ torch.mm")
    table = _table("Training steps, median (least..greatest) over rounds", ("contender",), columns)
    for row in record["rows"]:
        table.add_row(
            row["name"],
            f"{row['length']:,}",
            str(row["batch"]),
            _spread(row["tokens_per_s"], digits=0),
            _spread(row["of_limit"]),
            _spread(row["of_torch_mm"]),
        )
    return table


def _op_table(record: Record) -> Table:
    shape = " ".join(f"{name} {size}" for name, size in record["op"]["shape"].items())
    columns = ("ms", "÷ ours", "ms, memory kept", "÷ ours")
    table = _table(f"The op alone, forward + backward, {shape}", ("contender",), columns)
    for rows in zip(record["op"]["rows"], record["op"]["rows_with_kept_memory"], strict=True):
        pairs = ((_spread(row["seconds"], 1e3, 1), _spread(row["times_ours"])) for row in rows)
        table.add_row(rows[0]["name"], *(cell for pair in pairs for cell in pair))
    return table


def _ops_tables(record: Record) -> list[Table]:
    """One for each head shape; a line holds the medians of one contender at one length, forward and with backward."""
    tables: dict[tuple[int, ...], Table] = {}
    lines: dict[tuple[Any, ...], dict[str, Record]] = {}
    for row in record["rows"]:
        shape = (row["heads"], row["key_dim"], row["value_dim"])
        lines.setdefault((shape, row["length"], row["batch"], row["name"]), {})[row["mode"]] = row
    columns = ("T", "B", "forward, ms", "÷ ours", "+ backward, ms", "÷ ours", "÷ torch.mm", "÷ fastest")
    for (shape, length, batch, name), modes in lines.items():
        H, K, V = shape
        title = f"The op, H {H}, K {K}, V {V}, medians; flops of forward + backward ÷ matrix products"
        table = tables.setdefault(shape, _table(title, ("contender",), columns))
        cells = [_medians(modes.get(mode)) for mode in ("forward", "forward + backward")]
        table.add_row(name, f"{length:,}", f"{batch}", *cells[0][:2], *cells[1])
    return list(tables.values())


def _medians(row: Record | None) -> tuple[str, ...]:
    """ms of a call, times as long as ours, flops ÷ rate of torch.mm, ÷ that of the fastest library."""
    values = [row and row[key] for key in ("seconds", "times_ours", "of_torch_mm", "of_limit")]
    scales = (1e3, 1.0, 1.0, 1.0)
    return tuple(f"{x['median'] * scale:,.2f}" if x else "–" for x, scale in zip(values, scales, strict=True))


def _step_table(record: Record) -> Table:
    columns = ("B", "H", "K", "V", "µs", "÷ ours", "bytes ÷ update bandwidth")
    table = _table("A step of decoding, median (least..greatest) over rounds", ("contender",), columns)
    for row in record["steps"]:
        sizes = (str(row[key]) for key in ("batch", "heads", "key_dim", "value_dim"))
        moved = _spread(row["of_bandwidth"]) if row["cold"] else "in the caches"
        table.add_row(row["name"], *sizes, _spread(row["seconds"], 1e6, 1), _spread(row["times_ours"]), moved)
    return table


def _decoding_table(record: Record) -> Table:
    columns = ("batch", "context", "ms per step", "floor, ms", "time ÷ floor")
    table = _table("One token a sequence, median (least..greatest) over rounds", ("contender",), columns)
    for row in record["rows"]:
        table.add_row(
            row["name"],
            str(row["batch"]),
            f"{row['context']:,}",
            _spread(row["seconds_per_step"], 1e3),
            _spread(row["floor_seconds"], 1e3),
            _spread(row["over_floor"]),
        )
    return table


def _throughput_table(throughput: Record) -> Table:
    peer = throughput["llama_cpp"]["versions"]["xllamacpp"]
    title = f"Tokens per second, batch 1, about {throughput['parameters'] / 1e6:.1f} M parameters"
    columns = ("weights", "work", "tokens/s", "time ÷ ours")
    table = _table(title + (f"; llama.cpp of xllamacpp {peer}" if peer else ""), ("contender",), columns)
    for row in throughput["rows"]:
        work = f"write after {row['tokens']:,}" if row["work"] == "write" else f"read {row['tokens']:,}"
        speed, ratio = _spread(row["tokens_per_s"], digits=0), _spread(row["times_ours"])
        table.add_row(row["name"], row["weights"], work, speed, ratio)
    return table


def _long_table(long: Record) -> Table:
    title = f"One generation of {long['tokens']:,} tokens, {long['parameters'] / 1e6:.1f} M parameters"
    table = _table(title, (), ("at token", "ms per token", "÷ at token 100", "resident memory, MB"))
    for mark in long["marks"]:
        table.add_row(
            f"{mark['token']:,}",
            f"{mark['seconds_per_token'] * 1e3:.3f}",
            _spread(mark["ratio_to_first"], digits=3),
            f"{mark['rss_bytes'] / 1e6:,.1f}",
        )
    return table


def _target_table(record: Record) -> Table:
    quick = " (meaningless after a quick run)" if record["configuration"]["quick"] else ""
    table = _table(f"Targets{quick}", ("what",), ("wanted", "seen", "met"))
    for target in record["targets"]:
        table.add_row(
            target["what"],
            target["wanted"],
            _spread(target["seen"], digits=3),
            "yes" if target["met"] else "NO",
        )
    return table
