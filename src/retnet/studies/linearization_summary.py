"""What the measure ``linearization`` found: stages side by side, and the part of the gap to the teacher that is closed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from retnet.measure.summary import Figure, Line, Panel, Summary
from retnet.studies.protocols import Result, Results
from retnet.studies.tuning import over_seeds, slug
from retnet.tables import MISSING, Table

TEACHER, SCRATCH = "teacher", "scratch"
STAGES = {"0-transfer": "transferred", "1-align": "aligned", "2-distil": "distilled"}
WANTED = 0.8  # of the gap between scratch and teacher


def student_name(label: str, share: float, seed: int) -> str:
    """Of a student's job."""
    return f"{slug(label)}.share-{share:g}.seed-{seed}"


def summarise(labels: Sequence[str], shares: Sequence[float], seeds: int, results: Results) -> Summary:
    """Tables and a figure of all students; those that have no results yet stand there empty."""
    found = {
        (label, share): [
            results[name]["stages"]
            for seed in range(seeds)
            if (name := student_name(label, share, seed)) in results
        ]
        for label in labels
        for share in shares
    }
    return Summary((_table(found),), (_figure(labels, shares, found),), tuple(_findings(found)))


Stages = Mapping[str, Result]
FoundStages = Mapping[tuple[str, float], Sequence[Stages]]


def _table(found: FoundStages) -> Table:
    columns = (
        "student",
        "of the teacher's tokens",
        "seeds",
        TEACHER,
        *STAGES.values(),
        SCRATCH,
        "gap closed",
    )
    rows = []
    for (label, share), seeds in found.items():
        cells = (over_seeds([_bits(each, name) for each in seeds], 3) for name in (TEACHER, *STAGES, SCRATCH))
        gap = over_seeds([100 * part for part in map(closed, seeds) if part is not None], 0)
        rows.append((label, f"{share:.0%}", str(len(seeds)), *cells, gap if gap == MISSING else f"{gap} %"))
    notes = (
        "Bits per byte of held-out text, lower is better: mean over seeds ± their standard deviation. Scratch has the "
        "student's architecture, fresh weights and as many tokens as all stages together.",
        "Gap closed: (scratch − distilled) / (scratch − teacher); none is there where scratch is as good as the teacher.",
    )
    return Table("From teacher to student", columns, tuple(rows), notes)


def closed(stages: Stages) -> float | None:
    """Part of the gap between scratch and teacher that the last stage closes; None where the teacher is not better."""
    last, gap = _bits(stages, list(STAGES)[-1]), _bits(stages, SCRATCH) - _bits(stages, TEACHER)
    return (_bits(stages, SCRATCH) - last) / gap if gap > 0 else None


def _figure(labels: Sequence[str], shares: Sequence[float], found: FoundStages) -> Figure:
    lines = []
    for label in labels:
        for stage in (SCRATCH, *list(STAGES)[1:]):
            known = [(share, [_bits(each, stage) for each in found[label, share]]) for share in shares]
            known = [(100 * share, values) for share, values in known if values]
            if known:
                lines.append(Line.means(f"{label}, {STAGES.get(stage, stage)}", *zip(*known, strict=True)))
    teachers = [_bits(each, TEACHER) for seeds in found.values() for each in seeds]
    if teachers:
        ends_of_x = tuple(100 * share for share in (min(shares), max(shares)))
        lines.append(Line(TEACHER, ends_of_x, (teachers[0],) * 2, dashed=True))
    panel = Panel("Held-out text", "% of the teacher's tokens", "bits per byte", tuple(lines), log_x=True)
    return Figure("linearization", (panel,), ("Mean over seeds, from the least to the greatest.",))


def _findings(found: FoundStages) -> list[str]:
    said = []
    for (label, share), seeds in found.items():
        parts = [part for part in map(closed, seeds) if part is not None]
        if len(parts) < len(seeds):
            said.append(
                f"{label}, with {share:.0%} of the teacher's tokens: scratch is as good as the teacher, so there is no gap."
            )
        elif parts:
            part = statistics.mean(parts)
            reached = f"{'at least' if part >= WANTED else 'less than'} the {WANTED:.0%} that are wanted"
            said.append(
                f"{label}, with {share:.0%} of the teacher's tokens, closes {part:.0%} of the gap between scratch and "
                f"teacher: {reached}."
            )
    return said


def _bits(stages: Stages, name: str) -> float:
    value: float = stages[name]["bits_per_byte"]
    return value
