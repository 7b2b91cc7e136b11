"""The step ``quality``: the study ``architectures`` at scale ``gpu``, on the text of the packages that are installed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console

from retnet.data.sources import package_folder
from retnet.measure.summary import Summary
from retnet.settings import UserError, build, merge
from retnet.studies.folder import StudyFolder
from retnet.studies.quality import QualityMeasure
from retnet.studies.report import write_report
from retnet.studies.runner import run_study
from retnet.studies.study import Study, load_study
from retnet.studies.study_files import find_study
from tools.gpu_day.notebook import Found
from tools.gpu_day.place import Place, Run, StoppedError

FIRST, SECOND = "architectures", "second-seed"
# Large packages of text in Python; those of a GPU machine first. None of them is a set that is measured on.
CORPUS = (
    "torch", "transformers", "scipy", "pandas", "sklearn", "matplotlib", "jax", "botorch", "gpytorch", "torchvision",
    "torch_geometric", "datasets", "diffusers", "triton", "numba", "statsmodels", "skimage", "lightning", "peft",
    "accelerate", "lm_eval", "nltk", "IPython", "pyarrow", "tensorboard", "huggingface_hub", "pip", "setuptools",
)  # fmt: skip
LAST = 25.0  # seconds before the end in which jobs save and the report is written
TINY: dict[str, Any] = {
    "model": {"d_model": 48, "num_layers": 1},  # a multiple of the heads of the study
    "data": {"corpus": "package:click", "tokenizer": "bytes"},
    "train": {
        "steps": 3,
        "warmup_steps": 1,
        "seq_len": 32,
        "batch_size": 2,
        "eval_tokens": 64,
        "device": "cpu",
    },
}


def corpus() -> tuple[str, ...]:
    """The standard library, and what is installed of `CORPUS`."""
    return ("stdlib", *(f"package:{name}" for name in CORPUS if package_folder(name)))


def study_of(place: Place, seeds: int = 1) -> Study:
    """The study, on the text that is here, with so many seeds."""
    changes = {"measure.settings.data.corpus": corpus(), "measure.seeds": seeds}
    study = load_study(find_study("architectures", "gpu"), changes)
    if not place.rehearsal:
        return study
    measure = study.measure
    assert isinstance(measure, QualityMeasure)
    measure = replace(
        measure,
        rows=tuple(replace(row, settings=_without_width(row.settings)) for row in measure.rows[:2]),
        learning_rates=(1e-3,),
        sets={"rich": "package:rich"},
        set_documents=1,
        settings=merge(measure.settings, TINY),
    )
    return replace(study, measure=measure, workers=2)


def _without_width(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a model so small, the usual width of the FFN."""
    model = {key: value for key, value in settings.get("model", {}).items() if key != "ffn_dim"}
    return {**settings, "model": model}


def architectures(seeds: int, place: Place) -> Found:
    """Runs what fits into the time; the next call goes on."""
    study = study_of(place, seeds)
    out = place.out / ("rehearsal.quality" if place.rehearsal else "quality")
    late = threading.Timer(max(1.0, place.until - LAST - time.time()), os.kill, (os.getpid(), signal.SIGTERM))
    late.daemon = True
    late.start()
    try:
        ended = run_study(study, out, Console(file=sys.stderr, highlight=False))
    finally:
        late.cancel()
    found = _found(study, out)
    if ended.stopped:
        place.note(found)
        raise StoppedError(f"{len(found['results'])} of {found['total']} runs have finished")
    if ended.failed and not found["results"]:
        raise RuntimeError(f"all runs failed, the first with: {next(iter(ended.failed.values()))}")
    found["failed"] = ended.failed
    try:
        write_report(out)
    except UserError as error:  # what it is written with is missing; the results are here
        found["report"] = f"The study's own report was not written: {error}"
    return found


def _found(study: Study, out: Any) -> Found:  # noqa: ANN401
    import tomllib

    from retnet.settings import dump

    return {
        "measure": tomllib.loads(dump(study))["measure"],
        "total": study.measure.count(),
        "results": StudyFolder(out).results(),
    }


PARTS: dict[str, Run] = {FIRST: partial(architectures, 1), SECOND: partial(architectures, 2)}


def summarise(parts: dict[str, Found]) -> Summary:
    """What the study says of the runs that have finished."""
    found = max(parts.values(), key=lambda found: len(found["results"]), default=None)
    if found is None or not found["results"]:
        return Summary(findings=("No architecture has been trained to its end.",) if parts else ())
    shown = build(QualityMeasure, found["measure"]).summarise(found["results"])
    findings = [f"{len(found['results'])} of {found['total']} runs of the architectures have finished."]
    findings += [f"{name} failed: {why}" for name, why in found.get("failed", {}).items()]
    findings += [found["report"]] if "report" in found else []
    return replace(shown, findings=(*findings, *shown.findings))
