"""What the paper reports, to hold ours against."""

from __future__ import annotations

from collections.abc import Iterable

from retnet.settings import UserError, nearest

# lm-evaluation-harness's name → the paper's; the order of the paper's table of downstream tasks.
TASKS = {
    "hellaswag": "HellaSwag",
    "boolq": "BoolQ",
    "copa": "COPA",
    "piqa": "PIQA",
    "wsc273": "Winograd",
    "winogrande": "Winogrande",
    "storycloze_2016": "StoryCloze",
}

# Accuracy in per cent of 6.7B models after 100B tokens: (model, examples in the prompt) → in the order of `TASKS`.
ACCURACY = {
    ("Transformer", 0): (55.9, 62.0, 69.0, 74.6, 69.5, 56.5, 75.0),
    ("RetNet", 0): (60.7, 62.2, 77.0, 75.4, 77.2, 58.1, 76.0),
    ("Transformer", 4): (55.8, 58.7, 71.0, 75.0, 71.9, 57.3, 75.4),
    ("RetNet", 4): (60.5, 60.1, 78.0, 76.0, 77.9, 59.9, 75.9),
}


def accuracies(model: str, num_fewshot: int, tasks: list[str]) -> list[float] | None:
    """The paper's numbers for some tasks, or None where it has none for so many examples."""
    row = ACCURACY.get((model, num_fewshot))
    return None if row is None else [dict(zip(TASKS, row, strict=True))[task] for task in tasks]


def check_tasks(names: Iterable[str]) -> None:
    """Refuses what is no task of the paper.

    Raises:
        UserError: answers with the nearest names.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}; {nearest(name, TASKS)}")
