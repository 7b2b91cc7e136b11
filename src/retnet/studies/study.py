"""A study as its TOML says: title, measure and budget; all measures that there are stand in `MEASURES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from retnet.settings import At, Checked, Count, load
from retnet.studies.complexity import ComplexityMeasure
from retnet.studies.decoding import DecodingMeasure
from retnet.studies.linearization import LinearizationMeasure
from retnet.studies.protocols import Measure
from retnet.studies.quality import QualityMeasure
from retnet.studies.recall import RecallMeasure
from retnet.studies.training import TrainingMeasure

MEASURES = (
    QualityMeasure,
    ComplexityMeasure,
    DecodingMeasure,
    TrainingMeasure,
    RecallMeasure,
    LinearizationMeasure,
)


@dataclass(frozen=True)
class Study(Checked):
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
    hours: Annotated[float, At(above=0)] = 1.0
    workers: Count = 1
    processes: Count = 1


def load_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Reads a study.

    Raises:
        UserError: the file cannot be read or does not say a study.
    """
    return load(Study, path, overrides)
