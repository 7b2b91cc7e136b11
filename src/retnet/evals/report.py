"""Results of evaluations as records (JSON) and as tables."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from retnet import host, paper
from retnet.evals.models import Candidate
from retnet.evals.perplexity import Measured, Result
from retnet.evals.statistics import CONFIDENCE, Estimate
from retnet.tables import Table, print_table

if TYPE_CHECKING:
    from retnet.evals.harness import TaskResults

_PACKAGES = ("retnet", "torch", "numpy", "scipy", "tokenizers", "transformers", "datasets", "lm_eval")
_METHOD = (
    f"{CONFIDENCE:.0%} confidence intervals: ratio estimator clustered by document, Student's t "
    "with one degree of freedom less than documents"
)


def perplexity_record(
    settings: dict[str, Any], measured: Sequence[tuple[str, dict[str, Any], Measured]]
) -> dict[str, Any]:
    """Everything about models (name, `Candidate.about`, numbers) measured on the same text."""
    first = measured[0][2]
    return {
        "evaluation": "perplexity",
        "settings": settings,
        "data": {
            "documents": first.documents,
            "bytes": first.bytes,
            "sha256": first.sha256,
            "problems": first.problems,
        },
        "method": _METHOD,
        "versions": versions(),
        "models": [
            {
                "name": name,
                **about,
                "tokens": found.tokens,
                "results": [_result(result) for result in found.results],
            }
            for name, about, found in measured
        ],
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version(), **host.versions(*_PACKAGES)}


def show_perplexity(record: dict[str, Any], console: Console) -> None:
    """Prints what models are worth, and how their loss falls with the context."""
    data = record["data"]
    results = [(model, result) for model in record["models"] for result in model["results"]]
    table = Table(
        f"{data['documents']:,} documents, {data['bytes']:,} bytes of text; 95 % intervals over documents",
        ("model", "mode", "length", "perplexity per token", "nats per token", "bits per byte", "tokens"),
        tuple(
            (
                model["name"],
                result["mode"],
                _length(result),
                *(_interval(result[key]) for key in ("perplexity", "nats_per_token", "bits_per_byte")),
                f"{model['tokens']:,}",
            )
            for model, result in results
        ),
    )
    print_table(table, console)
    for model, result in results:
        if result["refused"]:
            where = f"{model['name']}, {result['mode']}, {_length(result)}"
            click.echo(f"{where}: refused: {result['refused']}", err=True)
    longest = [(model, result) for model in record["models"] for result in _longest(model["results"])]
    columns = [f"{model['name']}, {result['mode']}, {_length(result)}" for model, result in longest]
    losses = [{row["to"]: row["nats_per_token"] for row in result["by_context"]} for _, result in longest]
    if longest:
        click.echo()
        rows = tuple(
            (_span(to), *(f"{loss[to]:.4f}" if to in loss else "-" for loss in losses))
            for to in sorted({to for loss in losses for to in loss})
        )
        print_table(Table("Nats per token by tokens of context", ("context", *columns), rows), console)


def tasks_record(settings: dict[str, Any], candidate: Candidate, outcome: TaskResults) -> dict[str, Any]:
    """Everything about a model on tasks; accuracies are 0 to 1, the paper's in per cent."""
    return {
        "evaluation": "tasks",
        "settings": settings,
        "versions": versions(),
        "task_versions": outcome.versions,
        "local_files": outcome.files,
        "model": {"name": candidate.name, **candidate.about},
        "results": [
            {
                "num_fewshot": scores.num_fewshot,
                "tasks": {
                    task: {**metrics, "questions": scores.samples[task]}
                    for task, metrics in scores.tasks.items()
                },
                "average_acc": _mean([m["acc"] for m in scores.tasks.values()]),
                "average_acc_norm": _mean([m.get("acc_norm", m["acc"]) for m in scores.tasks.values()]),
                "paper": {
                    model: numbers and dict(zip(scores.tasks, numbers, strict=True))
                    for model in ("RetNet", "Transformer")
                    for numbers in [paper.accuracies(model, scores.num_fewshot, list(scores.tasks))]
                },
            }
            for scores in outcome.scores
        ],
    }


def show_tasks(record: dict[str, Any], console: Console) -> None:
    """Prints the paper's table with a model's numbers above the paper's."""
    tasks = list(record["settings"]["tasks"])
    rows: list[tuple[str, ...]] = []
    for result in record["results"]:
        shots, found = result["num_fewshot"], [result["tasks"][task] for task in tasks]
        name = f"{record['model']['name']}, {shots}-shot"
        rows.append(_accuracies(f"{name}, acc", found, lambda m: "acc"))
        rows.append(
            _accuracies(
                f"{name}, acc_norm where given", found, lambda m: "acc_norm" if "acc_norm" in m else "acc"
            )
        )
        for model, numbers in result["paper"].items():
            if numbers:
                values = [numbers[task] for task in tasks]
                cells = (*(f"{value:.1f}" for value in values), f"{_mean(values):.2f}")
                rows.append((f"paper: {model} 6.7B, {shots}-shot", *cells))
    columns = ("accuracy, %", *(paper.TASKS[task] for task in tasks), "average")
    print_table(Table("Accuracy ± standard error, in per cent", columns, tuple(rows)), console)


def _accuracies(
    name: str, found: list[dict[str, float]], metric: Callable[[dict[str, float]], str]
) -> tuple[str, ...]:
    pairs = [(m[metric(m)], m.get(f"{metric(m)}_stderr")) for m in found]
    cells = [f"{100 * v:.1f}" + ("" if e is None else f" ± {100 * e:.1f}") for v, e in pairs]
    return (name, *cells, f"{100 * _mean([v for v, _ in pairs]):.2f}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _result(result: Result) -> dict[str, Any]:
    return {
        "mode": result.mode,
        "length": result.length,
        "refused": result.refused,
        "perplexity": _estimate(result.perplexity),
        "nats_per_token": _estimate(result.nats_per_token),
        "bits_per_byte": _estimate(result.bits_per_byte),
        "by_context": [
            {"from": b.least, "to": b.greatest, "tokens": b.tokens, "nats_per_token": b.nats_per_token}
            for b in result.by_context
        ],
    }


def _estimate(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    return {key: x if x is None or math.isfinite(x) else None for key, x in estimate._asdict().items()}


def _longest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each mode the result with the most context: the others are their beginnings."""
    best = {result["mode"]: result for result in results if not result["refused"]}
    return list(best.values())


def _length(result: dict[str, Any]) -> str:
    return "whole" if result["length"] is None else f"{result['length']:,}"


def _span(to: int) -> str:
    """The context of a bucket that ends at `to`."""
    return f"{to:,}" if to <= 2 else f"{to // 2 + 1:,}–{to:,}"


def _interval(estimate: dict[str, float | None] | None) -> str:
    if estimate is None:
        return "-"
    if estimate["value"] is None:  # JSON has no word for it
        return "inf"
    if estimate["low"] is None or estimate["high"] is None:
        return f"{estimate['value']:.4f}"
    return f"{estimate['value']:.4f} ({estimate['low']:.4f}..{estimate['high']:.4f})"
