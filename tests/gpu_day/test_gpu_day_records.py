"""The records of a GPU day: what is refused, and what stays."""

import re
import subprocess
import sys

import pytest

from retnet.measure.summary import Summary
from tests.helpers.fast import few_fast
from tools.gpu_day import __main__ as command
from tools.gpu_day import identity, page
from tools.gpu_day.notebook import Notebook, attempts
from tools.gpu_day.runner import Day

pytest.importorskip("triton")


def test_a_rehearsal_is_no_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "RECORDS", tmp_path)
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--out", str(tmp_path / "gpu")])
    assert "a rehearsal is none" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[]", "is no record of a step; move it away"),
        (b'{"parts": {"a": {}}, "configuration": {"rehearsal": true}}', "is no record of a step"),
        (b'{"parts": {', "cannot read"),
        (b"\xff\xfe", "cannot read"),
        (b'{"parts": {}, "configuration": {"rehearsal": true}}', "is a rehearsal's; .* are kept apart"),
    ],
)
def test_records_that_are_none(content, why, tmp_path, capsys):
    """One sentence, and they stay where they are: a rehearsal's under the name of another, too."""
    file = tmp_path / "ops.json"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        command.main(["--dry-run", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert re.search(why, capsys.readouterr().err)
    assert file.read_bytes() == content


def test_a_damaged_record_stops_its_own_step_alone(tmp_path, capsys):
    tmp_path.joinpath("tune.json").write_bytes(b'{"parts": {')
    assert command.main(["--dry-run", "--only", "machine", "--out", str(tmp_path)]) == 0
    tmp_path.joinpath("machine.json").write_text('{"parts": {}, "configuration": {"rehearsal": false}}')
    text = page.write_page(tmp_path, False).read_text(encoding="utf-8")  # a record without date and host
    assert "cannot read" in text
    assert "tune.json" in text


def test_a_part_that_was_cut_short_hides_no_other(tmp_path):
    book = Notebook(tmp_path, "machine", True)
    book.begin("ceilings")
    book.note("ceilings", {"size": 1})
    book.fail("ceilings", "CUDA error: an illegal memory access\nand more")
    book.begin("card")
    book.finish(
        "card",
        {
            "gpu": {"name": "a card"},
            "nvidia_smi": {},
            "versions": {},
            "missing": [],
            "cuda": "13",
            "hip": None,
        },
    )
    text = page.write_page(tmp_path, True).read_text(encoding="utf-8")
    assert "The record of ceilings cannot be shown: KeyError" in text
    assert "a card" in text


def test_a_chapter_that_cannot_be_shown_hides_no_other(tmp_path, monkeypatch):
    """Its parts can be shown one by one, and not together."""
    from tools.gpu_day import train

    def summarise(parts):
        return Summary(findings=(f"{len(parts)} is fine",)) if len(parts) < 2 else Summary(parts[None])

    monkeypatch.setattr(train, "summarise", summarise)
    book = Notebook(tmp_path, "train", True)
    for name in ("1.3B", "350M"):
        book.begin(name)
        book.finish(name, {"rows": []})
    [(title, shown)] = page.chapters(tmp_path, True)[1:]
    assert title.startswith("Train")
    assert shown.findings == ("The record of train cannot be shown: KeyError: None.",)


def test_both_attempts_stay(tmp_path):
    """A part that is tried again loses nothing of what it had found; the page says how often it was tried."""
    book = Notebook(tmp_path, "ops", True)
    book.begin("kernels")
    book.note("kernels", {"rows": [1]})
    book.fail("kernels", "it hung")
    book.begin("kernels")
    book.fail("kernels", "it died")
    made = attempts(book.parts()["kernels"])
    assert [(one["state"], one["why"], one.get("found")) for one in made] == [
        ("failed", "it hung", {"rows": [1]}),
        ("failed", "it died", None),
    ]
    assert page._found(book.parts()["kernels"]) == [{"rows": [1]}]
    book.begin("kernels")
    book.finish("kernels", {"rows": [2]})
    assert page._found(book.parts()["kernels"])[-1] == {"rows": [2]}
    assert page._state(book.parts()["kernels"]) == "done, attempt 3"


@pytest.mark.parametrize("step", ["machine", "ops"])
@pytest.mark.parametrize("name", few_fast(["card", "torch", "commit", "sources"], "card"))
def test_another_place_is_refused(name, step, tmp_path, monkeypatch, capsys):
    """Before anything is measured, by any step; where it is the same, the day goes on."""
    book = Notebook(tmp_path, "machine", True)
    book.begin("card")
    Day(tmp_path, True, 60, ["machine"], print).require_same_place()
    here = identity.current(True)
    monkeypatch.setattr(identity, "current", lambda rehearsal: {**here, name: "another"})
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--only", step, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert f"{name} was {here[name]} and is another. Numbers of both may not stand in one record" in said
    assert book.open() == "card"


def test_a_rehearsal_goes_on_beside_a_card(monkeypatch):
    """Its steps do not see the card, but the call that starts them does."""
    here = identity.current(True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda n: type("", (), {"total_memory": 1}))
    assert identity.current(True) == here
    assert identity.current(False)["card"] == "a card"


def test_two_days_in_one_folder(tmp_path, capsys):
    script = "import sys, time; from pathlib import Path; from retnet.lock import sole_owner\n"
    script += "with sole_owner(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", script, tmp_path / "day"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SystemExit):
            command.main(["--rehearse", "--out", str(tmp_path / "day")])
        holder.kill()
    assert f"is in use by process {holder.pid}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--out", str(tmp_path / "file" / "day")])
    assert "cannot write the day's directory" in capsys.readouterr().err
