"""Scheduling, failures, interruption, progress, by quick scripts in place of jobs; and real jobs, by command."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from retnet.lock import sole_owner
from retnet.settings import UserError
from retnet.studies import estimate, runner
from retnet.studies.folder import StudyFolder
from retnet.studies.quality import QualityMeasure, Variant
from retnet.studies.study import Study
from tests.helpers.fast import few_fast

RETNET = [sys.executable, "-c", "from retnet.cli import main; main()"]
# Stands in for the worker: says how far it is, and leaves what a real job would.
WORK = """
import json, os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
with (place.parent.parent / "order").open("a") as order: order.write(place.name + "\\n")
print(0.5, flush=True)
{before}
result = {{"sets": {{"in-domain": {{"nats_per_token": float(place.name.split("lr-")[1].split(".seed")[0]), "perplexity": 2.0,
          "bits_per_byte": 1.0}}}}, "curve": {{"steps": [1], "loss": [1.0]}}, "parameters": 1, "tokens": 1}}
(place / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture(autouse=True)
def unprepared(monkeypatch):
    """No tokens are made, and any machine is good enough."""
    monkeypatch.setattr(QualityMeasure, "prepare", lambda self, out, say: None)
    monkeypatch.setattr(estimate, "require", lambda plans, hours, processes, at_once: hours)


def work(monkeypatch, before="pass"):
    script = WORK.format(before=before)
    # nothing is installed for it, so it begins in a fifth of the time
    bare = [sys.executable, "-I", "-S", "-c", script]
    monkeypatch.setattr(runner, "command", lambda place, processes: [*bare, str(place)])


def study(seeds=2, workers=2, rates=(0.5, 0.25), **fields):
    measure = QualityMeasure(
        "quality", (Variant("A", "smoke"), Variant("B", "smoke")), learning_rates=rates, seeds=seeds
    )
    return Study("A study", "About it.", measure, workers=workers, **fields)


def test_a_study_has_one_owner(tmp_path, monkeypatch):
    work(monkeypatch)
    with (
        sole_owner(tmp_path / "study"),
        pytest.raises(UserError, match=r"study is in use by process \d+ .*, or choose another --out"),
    ):
        run(study(), tmp_path / "study")


def run(what, out):
    said = io.StringIO()
    return runner.run_study(what, out, Console(file=said, width=200)), said.getvalue()


def order(out):
    return (out / "order").read_text().split()


def test_all_jobs_are_done_once_the_best_rate_decides_the_rest(tmp_path, monkeypatch):
    work(monkeypatch)
    ended, said = run(study(), tmp_path)
    assert ended == (6, {}, False)
    assert sorted(order(tmp_path)) == sorted(
        [f"{r}.lr-{x}.seed-0" for r in "ab" for x in ("0.5", "0.25")] + [f"{r}.lr-0.25.seed-1" for r in "ab"]
    )
    assert "6/6 " in said
    assert run(study(), tmp_path)[0] == (6, {}, False)
    assert len(order(tmp_path)) == 6  # nothing was done again
    assert StudyFolder(tmp_path).environment()["seconds"] > 0


def test_more_seeds_go_on_with_what_is_there(tmp_path, monkeypatch):
    work(monkeypatch)
    run(study(seeds=1), tmp_path)
    ended, said = run(study(seeds=2, workers=1), tmp_path)
    assert ended.finished == 6
    assert "6 jobs, 4 of them done before" in said
    assert order(tmp_path)[4:] == ["a.lr-0.25.seed-1", "b.lr-0.25.seed-1"]


def test_another_study_in_the_folder_is_refused(tmp_path, monkeypatch):
    work(monkeypatch)
    run(study(), tmp_path)
    with pytest.raises(UserError, match=r"measure.learning_rates: \(0.5, 0.25\) → \(0.5,\)"):
        run(study(rates=(0.5,)), tmp_path)


FAILURES = {
    "killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "killed by SIGKILL, most likely because memory ran out",
    ),
    "status": ("sys.exit(3)", "exit status 3"),
    "said": ("(place / 'error.txt').write_text('no such thing'); sys.exit(1)", "no such thing"),
    "nothing left": ("raise SystemExit(0)", "exit status 0"),  # though it ended well
}


@pytest.mark.parametrize(
    ("how", "reason"), few_fast((pytest.param(*case, id=name) for name, case in FAILURES.items()), "said")
)
def test_a_failing_job_is_listed_and_tried_again(tmp_path, monkeypatch, how, reason):
    work(monkeypatch, f"if place.name == 'a.lr-0.25.seed-0': {how}")
    ended, said = run(study(), tmp_path)
    assert list(ended.failed) == ["a.lr-0.25.seed-0"]
    assert ended.failed["a.lr-0.25.seed-0"].startswith(reason)
    assert "a.lr-0.25.seed-0: FAILED" in said
    assert "a.lr-0.5.seed-1" in order(tmp_path)  # the rate that is left was taken
    assert StudyFolder(tmp_path).failures() == ended.failed
    work(monkeypatch)
    assert run(study(), tmp_path)[0].failed == {}
    assert StudyFolder(tmp_path).failures() == {}


def test_a_signal_lets_jobs_save_and_the_next_call_goes_on(tmp_path, monkeypatch):
    # a job that is asked to stop leaves with the status that says "later"
    work(
        monkeypatch,
        "signal.signal(signal.SIGTERM, lambda *a: os._exit(75)); print(0.6, flush=True); time.sleep(60)",
    )

    def stop():
        while not (tmp_path / "order").exists() or len(order(tmp_path)) < 2:
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    begin = time.monotonic()
    ended, said = run(study(), tmp_path)
    assert ended == (0, {}, True)
    assert time.monotonic() - begin < 30
    assert "SIGTERM: the jobs save and stop" in said
    work(monkeypatch)
    assert run(study(), tmp_path)[0] == (6, {}, False)


def test_jobs_share_the_cores(tmp_path, monkeypatch):
    work(monkeypatch, "(place / 'threads').write_text(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    run(study(workers=3, seeds=1), tmp_path)
    assert (tmp_path / "jobs" / "a.lr-0.5.seed-0" / "threads").read_text() == "4"


def test_several_processes_are_started_by_torchrun(tmp_path):
    words = runner.command(tmp_path, 4)
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=4" in words


STUDY = """
title = "Two small nets"
about = "A test."
workers = 2
[measure]
name = "quality"
seeds = 1
learning_rates = [1e-3]
sets.plays = "plays.txt"
settings.data = { corpus = "texts", validation_fraction = 0.2, tokenizer = "bpe:300" }
[measure.settings.train]
steps = 4
seq_len = 32
batch_size = 2
warmup_steps = 1
eval_tokens = 100
[[measure.rows]]
label = "RetNet"
config = "smoke"
[[measure.rows]]
label = "Hyena"
config = "smoke"
settings.model.mixer = { name = "hyena", time_scale = 8 }
"""


@pytest.mark.slow
def test_a_study_from_the_command_line(forks, tmp_path):
    """Real jobs: trained, measured, one killed on the way, reported."""
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Chapter {i}. It was a dark and stormy night.\n" * 30)
    (tmp_path / "plays.txt").write_text("To be, or not to be, that is the question.\n" * 20)
    (tmp_path / "two.toml").write_text(STUDY)
    words = [*RETNET, "study", "two.toml", "--out", "found"]
    first = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not list(tmp_path.glob("found/jobs/*/run/config.toml")):
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=120)
    assert first.returncode in (0, 1), err
    done = forks.run(["study", "two.toml", "--out", "found"], tmp_path, seconds=300)
    assert "wrote found/report.html" in done.stdout, done.stderr
    results = StudyFolder(tmp_path / "found").results()
    assert set(results) == {"retnet.lr-0.001.seed-0", "hyena.lr-0.001.seed-0"}
    assert done.returncode == 0
    for result in results.values():
        assert result["tokens"] == 4 * 2 * 32
        assert set(result["sets"]) == {"in-domain", "plays"}
        assert len(result["sets"]["plays"]["sha256"]) == 64
    page = (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    assert "Two small nets" in page
    assert "Hyena" in page
    assert json.loads((tmp_path / "found" / "summary.json").read_text())["tables"]
    again = forks.run(["study", "report", "found"], tmp_path)
    assert again.returncode == 0, again.stderr
