"""The command of a GPU day as a user meets it; and all of it on a CPU, as a rehearsal."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools.gpu_day import __main__ as command
from tools.gpu_day import plan
from tools.gpu_day.notebook import Notebook
from tools.gpu_day.place import Place
from tools.gpu_day.plan import PARTS, STEPS

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


@pytest.mark.slow
def test_a_bare_checkout_is_enough(tmp_path):
    """Nothing of ours is installed: the checkout's own sources are found."""
    code = "import sys; sys.path = [p for p in sys.path if not p.endswith('/src')]; import runpy; "
    code += "runpy.run_module('tools.gpu_day', run_name='__main__')"
    words = [sys.executable, "-c", code, "--dry-run", "--out", str(tmp_path / "day")]
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "650 s  architectures (rank 4): nine" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path)])
    assert "finds no GPU here; --rehearse runs everything" in capsys.readouterr().err


@pytest.mark.slow
def test_what_it_takes_to_begin_is_a_part_of_the_call(tmp_path, monkeypatch):
    """Importing torch, that is, before anything is planned."""
    days = []
    monkeypatch.setattr(command, "_no_gpu", lambda: time.sleep(0.5) or "")
    monkeypatch.setattr(command, "_run", lambda day: days.append(day) or True)
    began = time.time()
    assert command.main(["--minutes", "1", "--only", "machine", "--out", str(tmp_path)]) == 0
    assert days[0].end == pytest.approx(began + 60, abs=0.2)


def test_the_study_of_a_rehearsal_can_be_trained(tmp_path, monkeypatch):
    """Its models are those of the study, made small."""
    from retnet.measure import footprint
    from tools.gpu_day.quality import study_of

    monkeypatch.setattr(footprint, "kept_bytes", lambda *_: (1, 1, 1))
    now = time.time()
    book = Notebook(tmp_path, "quality", True)
    place = Place(tmp_path, True, torch.device("cpu"), book, "architectures", now + 60, 20.0, now + 60)
    plans = study_of(place).measure.plans()
    assert [plan.name for plan in plans] == ["RetNet", "Transformer"]
    assert all(plan.parameters < 1e5 for plan in plans)


@pytest.mark.slow
def test_a_whole_day_rehearsed(tmp_path):
    """Every part of every step, the records and the page; called again, nothing is left to do."""
    out = tmp_path / "day"
    words = [sys.executable, "-m", "tools.gpu_day", "--rehearse", "--out", str(out)]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in STEPS:
        record = json.loads((out / f"rehearsal.{step}.json").read_text(encoding="utf-8"))
        assert record["name"] == f"rehearsal-gpu-{step}"
        assert record["configuration"] == {"rehearsal": True}
        assert {name: p["state"] for name, p in record["parts"].items()} == {
            p.name: "done" for p in PARTS if p.step == step and plan.is_possible(p)
        }
        if step == "verify":
            assert [p["found"]["wrong"] for p in record["parts"].values()] == [[]] * len(record["parts"])
    assert {file.name.split(".")[0] for file in out.iterdir()} == {"rehearsal"}
    page = (out / "rehearsal.report.html").read_text(encoding="utf-8")
    assert "A rehearsal: no number of it is a measurement" in page
    assert "cannot be shown" not in page
    assert page.count("<svg") > 10
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert "hold 0 of" in again.stdout
