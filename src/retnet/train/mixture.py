"""Epochs of a mixture: how often training reads each of its corpora through."""

from __future__ import annotations

from retnet.data import Batches, Prepared
from retnet.train.config import RunConfig

PREFIX = "epochs/"  # of their names in lines of metrics


def epochs(config: RunConfig, prepared: Prepared, batches: Batches, step: int) -> dict[str, float]:
    """Name in metrics → how often a corpus was read through after so many steps; empty where there is no mixture."""
    if not config.data.weights:
        return {}
    names = [corpus.name for corpus in prepared.manifest.corpora]
    read = batches.epochs(config.train.passes_before(step))
    return {PREFIX + name: times for name, times in zip(names, read, strict=False)}


def in_words(found: dict[str, float], config: RunConfig) -> str:
    """The same for people, of a whole run; and which phases it ends before."""
    read = ", ".join(f"{name.removeprefix(PREFIX)} {times:.2f} ×" for name, times in found.items())
    steps = config.train.steps
    late = [str(phase.step) for phase in config.data.phases or () if phase.step >= steps]
    never = f"; the data.phases from step {', '.join(late)} on never begin, since there are {steps} steps"
    return f"all steps together read {read}{never if late else ''}"
