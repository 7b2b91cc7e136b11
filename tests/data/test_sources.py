"""Which files a corpus is, in which order, and which of them are for validation."""

import sys
import sysconfig
from pathlib import Path

import pytest

from retnet.data.sources import find, hold_out, share
from retnet.settings import UserError


def names(spec):
    return [source.name for source in find(str(spec))]


def test_the_standard_library_without_tests_and_other_peoples_packages():
    found = find("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    assert {"argparse.py", "asyncio/events.py", "pydoc_data/topics.py"} <= {s.name for s in found}
    parts = {part for source in found for part in Path(source.name).parts}
    assert not parts & {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    assert all((root / source.name).suffix in (".py", ".txt", ".md") for source in found)
    assert sum(source.size for source in found) > 5_000_000
    assert found == find("stdlib")


def test_an_installed_package_is_read_but_not_imported():
    imported = "lm_eval" in sys.modules  # by another test; it is slow
    found = find("package:lm_eval")
    assert {"api/task.py", "tasks/piqa/README.md"} & {source.name for source in found}
    assert ("lm_eval" in sys.modules) == imported


@pytest.mark.parametrize("name", ["no_such_package", "click.core", "this", ""])
def test_what_is_no_package_with_a_folder(name):
    with pytest.raises(UserError, match=f"no installed Python package '{name}' that is a folder"):
        find(f"package:{name}")


def test_about_two_or_three_percent_of_the_standard_library_is_held_out():
    found = hold_out(find("stdlib"), 0.02)
    held_out = sum(source.size for source in found if source.validation)
    assert 0.015 < held_out / sum(source.size for source in found) < 0.04


def test_folders_are_sorted_and_hidden_or_foreign_files_left_out(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.jsonl.gz", "a/x.png", ".hidden/a.txt", "a/.secret.txt", "c.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == ["b.txt", "a/z.md", "a/b/c.jsonl.gz"]
    assert names(tmp_path / "**" / "*.txt") == ["b.txt"]
    assert names(tmp_path / "a" / "z.md") == ["z.md"]


def test_what_is_no_corpus_is_said(tmp_path):
    with pytest.raises(UserError, match="no corpus 'nowhere'"):
        find("nowhere")
    with pytest.raises(UserError, match=r"has no file of the kinds \.txt"):
        find(str(tmp_path))
    with pytest.raises(UserError, match=r"has no file of the kinds"):
        find(str(tmp_path / "*.txt"))
    (tmp_path / "a.doc").touch()
    with pytest.raises(UserError, match=r"a\.doc: not one of \.txt"):
        find(str(tmp_path / "a.doc"))
    with pytest.raises(UserError, match="no file of the kinds"):
        find(str(tmp_path / "*.doc"))


def test_a_glob_reports_what_it_matched_and_cannot_read(tmp_path):
    (tmp_path / "a.doc").touch()
    (tmp_path / "b.txt").write_text("x")
    assert [source.kind for source in find(str(tmp_path / "*"))] == ["?", ".txt"]


def test_a_file_stays_on_its_side_whatever_else_there_is(tmp_path):
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    before = {source.name: source.validation for source in hold_out(find(str(tmp_path)), 0.1)}
    for number in range(0, 300, 3):
        (tmp_path / f"{number}.txt").unlink()
    after = {source.name: source.validation for source in hold_out(find(str(tmp_path)), 0.1)}
    assert after == {name: before[name] for name in after}
    assert 10 < sum(map(bool, before.values())) < 60
    assert [name for name, side in before.items() if side] == [name for name in before if share(name) < 0.1]


@pytest.mark.parametrize("line", ["a line of text\n", "é"])  # the second: one long line, cut at a character
def test_the_end_of_the_largest_file_is_held_out_when_hashes_hold_out_none(tmp_path, line):
    text = line * 1000
    (tmp_path / "large.txt").write_text(text)
    (tmp_path / "small.txt").write_text("small")
    assert min(share("large.txt"), share("small.txt")) > 0.01
    head, tail, small = hold_out(find(str(tmp_path)), 0.01)
    content = text.encode()
    assert (head.start, head.stop, head.validation) == (0, tail.start, False)
    assert (tail.stop, tail.validation, small.validation) == (None, True, False)
    assert abs(len(content) - tail.start - len(content) * 0.01) <= 20
    content[tail.start :].decode()
    assert len(line) == 1 or content[: tail.start].endswith(b"\n")


def test_too_little_text_to_split_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"too little text to split.*data\.validation"):
        hold_out(find(str(tmp_path)), 0.02)
