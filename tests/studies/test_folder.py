import json
import math

import pytest

from retnet.settings import UserError
from retnet.studies.folder import StudyFolder


@pytest.fixture
def folder(tmp_path, tiny_study):
    made = StudyFolder(tmp_path / "a" / "study")
    made.create(tiny_study, {"cpu": "γ"})
    return made


def test_a_study_comes_back_as_it_was_begun(folder, tiny_study):
    assert folder.exists
    assert folder.study() == tiny_study
    assert folder.environment() == {"cpu": "γ"}
    folder.note(seconds=1.5)
    folder.note(seconds=2.5, finished="now")
    assert folder.environment() == {"cpu": "γ", "seconds": 2.5, "finished": "now"}


def test_jobs_are_finished_failed_or_begun(folder):
    assert (folder.results(), folder.failures(), folder.begun()) == ({}, {}, [])
    folder.write_result("b", {"loss": math.inf, "text": "γ"})
    folder.write_failure("c", "  no memory\nat all\n\n")
    folder.write_failure("a", "")
    folder.job("d").mkdir()
    assert folder.results() == {"b": {"loss": math.inf, "text": "γ"}}
    assert folder.failures() == {"a": "no reason was left", "c": "no memory\nat all"}
    assert folder.begun() == ["d"]
    folder.clear_failure("c")
    folder.clear_failure("never failed")
    assert (list(folder.failures()), folder.begun()) == (["a"], ["c", "d"])
    folder.write_result("a", {})  # what is done has not failed, whatever happened before
    assert (folder.failures(), sorted(folder.results())) == ({}, ["a", "b"])


def test_reasons_are_text_that_can_be_shown(folder):
    folder.write_failure("a", "\x1b[31mred\x1b[0m\x07 \udcff and\ttabs\x00")
    assert folder.failures() == {"a": "red ? and\ttabs"}
    (folder.job("a") / "error.txt").write_bytes(b"caf\xe9")
    assert folder.failures() == {"a": "caf�"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a/"])
def test_names_of_jobs_are_names_of_files(folder, name):
    with pytest.raises(ValueError, match="no file name"):
        folder.write_result(name, {})


@pytest.mark.parametrize("content", [b"", b'{"loss": 1', b"[1]", b"\xff{}"])
def test_damaged_files_are_named(folder, content):
    folder.write_result("a", {"loss": 1})
    file = folder.job("a") / "result.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a/result.json is damaged.* remove it, and the job is done again"):
        folder.results()
    folder.environment_file.write_bytes(content)
    with pytest.raises(UserError, match=r"env.json is damaged.* remove it"):
        folder.environment()
    folder.environment_file.unlink()
    assert folder.environment() == {}


def test_no_study(tmp_path, folder):
    with pytest.raises(
        UserError, match=r"is no folder; name the folder that `retnet study` was given as --out"
    ):
        StudyFolder(tmp_path / "nowhere").study()
    with pytest.raises(UserError, match=r"holds no study"):
        StudyFolder(tmp_path).study()
    folder.study_file.write_text("title = ", encoding="utf-8")
    with pytest.raises(UserError, match=r"study.toml is not valid TOML"):
        folder.study()


def test_a_folder_that_cannot_be_made(tmp_path, tiny_study):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write the study's folder"):
        StudyFolder(tmp_path / "file" / "study").create(tiny_study, {})


def test_files_are_written_whole_or_not_at_all(folder):
    folder.write_result("a", {"x": 1})
    with pytest.raises(TypeError):
        folder.write_result("a", {"x": object()})
    assert json.loads((folder.job("a") / "result.json").read_text(encoding="utf-8")) == {"x": 1}
    assert [path.name for path in folder.job("a").iterdir()] == ["result.json"]
