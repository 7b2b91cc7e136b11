"""The paper's tasks through lm-evaluation-harness: its tasks, prompts and metrics, its `HFLM` around our model."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from retnet.evals.models import Candidate
from retnet.evals.readers import BATCH_TOKENS, LOGITS
from retnet.io import sha256
from retnet.model import LanguageModel
from retnet.model.hf import RetNetForCausalLM, hf_tokenizer
from retnet.paper import TASKS, check_tasks
from retnet.settings import UserError

_LOCAL = Path(__file__).parent / "tasks"  # one file a task: where its local data lie
_NO_LIMIT = 1 << 20  # tokens; a state holds any number, the harness wants one
_FEWSHOT_SEED = 1234  # the harness's default


class Scores(NamedTuple):
    """The harness's results for so many examples in the prompt: task → metric → value or standard error."""

    num_fewshot: int
    tasks: dict[str, dict[str, float]]
    samples: dict[str, int]


class TaskResults(NamedTuple):
    """Results in the order asked for, the harness's versions of the tasks, and SHA-256 of local files."""

    scores: list[Scores]
    versions: dict[str, Any]
    files: dict[str, str]


def evaluate(
    candidate: Candidate,
    tasks: Sequence[str],
    *,
    num_fewshot: Sequence[int] = (0,),
    batch_size: int | str = "auto",
    limit: int | None = None,
    local: str | Path | None = None,
) -> TaskResults:
    """Runs tasks on a model.

    Args:
        candidate: the model.
        tasks: names out of `retnet.paper.TASKS`.
        num_fewshot: examples in the prompt; all tasks are run with each number.
        batch_size: sequences at once; "auto": as many as fit.
        limit: only the first so many questions of each task.
        local: a folder with ``TASK/SPLIT.jsonl``; nothing is asked of a network then.

    Raises:
        UserError: an unknown task, data that cannot be had or do not fit, or too few examples for the prompts.
    """
    check_tasks(tasks)
    model = language_model(candidate, batch_size)
    with _quiet(), tempfile.TemporaryDirectory() as cache:
        files = {} if local is None else _check_local(tasks, Path(local))
        loaded = load_tasks(tasks, None if local is None else Path(local), cache)
        found = []
        for shots in num_fewshot:
            _set_examples(loaded, shots)
            try:
                found.append(lm_eval.evaluate(model, {"tasks": loaded}, limit=limit, log_samples=False))
            except LookupError as error:
                if local is None:
                    raise
                raise UserError(f"the local files do not fit their tasks: {_words(error)}") from error
    scores = [
        Scores(shots, _metrics(results["results"]), _samples(results["n-samples"]))
        for shots, results in zip(num_fewshot, found, strict=True)
    ]
    return TaskResults(scores, dict(found[0]["versions"]), {str(path): sha256(path) for path in files})


def language_model(candidate: Candidate, batch_size: int | str = "auto") -> HFLM:
    """The harness's own wrapper around a candidate."""
    model, tokenizer, limit = candidate.model, candidate.theirs, None
    if isinstance(model, LanguageModel):
        model = RetNetForCausalLM.from_language_model(model)
        tokenizer, limit = tokenizer or hf_tokenizer(candidate.tokenizer), _NO_LIMIT
    with _quiet():
        return _HarnessModel(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=limit,
            batch_size=batch_size,
            softmax_dtype="float32",
        )


class _HarnessModel(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """`HFLM`, which finds its batch size by running out of a GPU's memory; a CPU's is not to be run out of."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As `HFLM`'s, with a bar of progress on a terminal only."""
        found: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm or not sys.stderr.isatty()
        )
        return found

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if self.device.type != "cpu" or not requests:
            return int(super()._detect_batch_size(requests, pos))
        _, context, continuation = requests[pos]  # the longest of those to come
        tokens = min(BATCH_TOKENS, LOGITS // int(self.config.get_text_config().vocab_size))
        return max(1, min(int(self.max_batch_size), tokens // len(context + continuation)))


def load_tasks(tasks: Sequence[str], local: Path | None, cache: str) -> dict[str, Task]:
    """The harness's tasks; with `local` the same ones with their data from there."""
    home = Path(lm_eval.__file__).parent / "tasks"
    folders = [home / name for name in (*TASKS, "super_glue/boolq", "super_glue/copa", "storycloze")]
    manager = TaskManager(include_path=[f for f in folders if f.is_dir()], include_defaults=False)
    loaded: dict[str, Task] = {}
    for task in tasks:
        changes = {} if local is None else _local_data(task, local, cache)
        # A group's member may change settings of a task by its name.
        group = {"group": f"paper_{task}", "task": [{"task": task, **changes}]}
        try:
            loaded |= manager.load([group])["tasks"]
        except Exception as error:  # a dataset that cannot be had raises one of many kinds
            hint = "" if local else "; without a network, or for data that is not public, give --local DIR"
            raise UserError(f"cannot load the data of {task}: {_words(error)}{hint}") from None
    return loaded


def _local_data(task: str, local: Path, cache: str) -> dict[str, Any]:
    """The settings of a task that say where its data are."""
    plan = _plan(task)
    files = {split: str((local / name).absolute()) for split, name in _files(plan).items()}
    kwargs = {**plan["dataset_kwargs"], "data_files": files, "cache_dir": cache}
    return {key: plan[key] for key in ("dataset_path", "dataset_name")} | {"dataset_kwargs": kwargs}


def _plan(task: str) -> dict[str, Any]:
    plan: dict[str, Any] = yaml.safe_load((_LOCAL / f"{task}.yaml").read_text(encoding="utf-8"))
    return plan


def _files(plan: dict[str, Any]) -> dict[str, str]:
    files: dict[str, str] = plan["dataset_kwargs"]["data_files"]
    return files


def _check_local(tasks: Sequence[str], local: Path) -> list[Path]:
    """All local files of the tasks, each looked through.

    Raises:
        UserError: files that are missing (all are listed), or a line without what the task needs.
    """
    plans = {task: _plan(task) for task in tasks}
    wanted = {local / name: plan["fields"] for plan in plans.values() for name in _files(plan).values()}
    missing = [
        f"{path} (fields {', '.join(fields)})" for path, fields in wanted.items() if not path.is_file()
    ]
    if missing:
        raise UserError(f"files of JSON objects, one a line, are missing: {'; '.join(missing)}")
    for path, fields in wanted.items():
        _check_lines(path, fields)
    return list(wanted)


def _check_lines(path: Path, fields: list[str]) -> None:
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            found = True
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number} is no JSON object with the fields {', '.join(fields)}")
            if absent := [field for field in fields if field not in record]:
                raise UserError(f"{path}:{number} lacks {', '.join(absent)}; needed: {', '.join(fields)}")
    if not found:
        raise UserError(f"{path} is empty; it needs a line for every question, with {', '.join(fields)}")


def _set_examples(tasks: dict[str, Task], shots: int) -> None:
    for name, task in tasks.items():
        have = len(task.sampler.df)
        if shots and have <= shots:
            raise UserError(
                f"{name} has {have} examples to choose from; --num-fewshot {shots} needs {shots + 1}"
            )
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _metrics(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """``"acc,none"`` → ``"acc"``: the tasks have no filters. One question has no standard error."""
    return {
        task: {
            key.removesuffix(",none"): float(value)
            for key, value in found.items()
            if key.endswith(",none") and isinstance(value, (int, float)) and math.isfinite(value)
        }
        for task, found in results.items()
    }


def _samples(counts: dict[str, dict[str, int]]) -> dict[str, int]:
    return {task: count["effective"] for task, count in counts.items()}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the harness prints goes to standard error, and its remarks on being used from Python nowhere."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
