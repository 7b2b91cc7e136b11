"""A study as its TOML says: title, measure and budget; all measures that there are stand in `MEASURES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet.settings import UserError, load
from retnet.studies.complexity import ComplexityMeasure
from retnet.studies.contract import Measure
from retnet.studies.decoding import DecodingMeasure
from retnet.studies.quality import QualityMeasure
from retnet.studies.training import TrainingMeasure

MEASURES = (QualityMeasure, ComplexityMeasure, DecodingMeasure, TrainingMeasure)


@dataclass(frozen=True)
class Study:
    """A study, as its TOML says.

    Attributes:
        title: of the report.
        about: what it reproduces and how it differs from the paper, paragraphs divided by empty lines.
        measure: what is done.
        hours: it may take on the machine it runs on; what is expected to take longer is refused before it starts.
        workers: jobs at the same time, each with its share of the cores; 1 wherever time or memory is measured.
        processes: that share one job, started by torchrun, such as the number of GPUs.
    """

    title: str
    about: str
    measure: Measure
    hours: float = 1.0
    workers: int = 1
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("workers", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hours <= 0:
            raise UserError(f"hours is {self.hours}; it must be more than 0")


def load_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Reads a study.

    Raises:
        UserError: the file cannot be read or does not say a study.
    """
    return load(Study, path, overrides)
