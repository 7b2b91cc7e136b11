"""Published numbers of the paper (perplexities, accuracies, memory and speed), beside which ours are shown."""

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

# Perplexity (§6, §7) of 200M models: in-domain, then the out-of-domain sets, in the order of `PERPLEXITY_SETS`.
PERPLEXITY_SETS = ("in-domain", "PG22", "QMSum", "GovReport", "SummScreen")
ARCHITECTURES = {
    "RWKV": (30.92, 51.41, 28.17, 19.80, 25.78),
    "H3": (29.97, 49.17, 24.29, 19.19, 25.11),
    "Hyena": (32.08, 52.75, 28.18, 20.55, 26.51),
    "Linear Transformer": (40.24, 63.86, 28.45, 25.33, 32.02),
    "RetNet": (26.05, 45.27, 21.33, 16.52, 22.48),
}
ABLATIONS = {
    "RetNet": (26.05, 45.27, 21.33, 16.52, 22.48),
    "− swish gate": (27.84, 49.44, 22.52, 17.45, 23.72),
    "− GroupNorm": (27.54, 46.95, 22.61, 17.59, 23.73),
    "− γ decay": (27.86, 47.85, 21.99, 17.49, 23.70),
    "− multi-scale decay": (27.02, 47.18, 22.08, 17.17, 23.38),
    "reduced head width": (27.68, 47.72, 23.09, 17.46, 23.41),
}

# How cost grows with the length N (§1): (trained in parallel, inference per token, memory of a long sequence, quality).
COMPLEXITY = {
    "Transformer": ("yes", "N", "N²", "++"),
    "Linear Transformer": ("yes", "1", "N", "−"),
    "Recurrent NN": ("no", "1", "N", "−"),
    "RWKV": ("no", "1", "N", "+"),
    "H3/S4": ("yes", "1", "N log N", "+"),
    "Hyena": ("yes", "N", "N log N", "+"),
    "RetNet": ("yes", "1", "N", "++"),
}

# Training on A100-80GB at length 8192 (§5): size → memory in GB, and words per second, each in the order of `TRAINED`.
TRAINED = ("Transformer", "Transformer + FlashAttention", "RetNet")
TRAINING_COST = {
    "1.3B": ((74.8, 38.8, 34.5), (10832.4, 63965.2, 73344.8)),
    "2.7B": ((69.6, 42.1, 42.0), (5186.0, 34990.2, 38921.2)),
    "6.7B": ((69.0, 51.4, 48.0), (2754.4, 16230.1, 17458.6)),
    "13B": ((61.4, 46.3, 45.9), (1208.9, 7945.1, 8642.2)),
}

# Decoding with 6.7B at a length of 8k (§5): how many times better RetNet is than a Transformer with a KV cache.
INFERENCE = {"memory": 3.4, "throughput": 8.4, "latency": 15.6}


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
