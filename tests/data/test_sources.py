"""Which files a corpus is, in which order, and which of them are for validation."""

import os
import socket
import sys
import sysconfig
from pathlib import Path

import pytest

from retnet.data import DataConfig, prepare, sources
from retnet.settings import UserError


def find(spec):
    return sources.find(str(spec)).sources


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


def test_looking_for_a_package_asks_no_finder_that_takes_us_for_pip(monkeypatch):
    class Hook:
        def find_spec(self, name, path=None, target=None):
            raise AssertionError(f"asked for {name}")

    monkeypatch.setattr(sys, "meta_path", [Hook(), *sys.meta_path])
    assert sources.package_folder("pip").name == "pip"


@pytest.mark.parametrize("name", ["no_such_package", "click.core", "this", ""])
def test_what_is_no_package_with_a_folder(name):
    with pytest.raises(UserError, match=f"no installed Python package '{name}' that is a folder"):
        find(f"package:{name}")


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


@pytest.mark.parametrize(
    "spec", ["x" * 5000, "a\0b", "a/" * 3000, "\udcff", "~nobody/a.txt", "http://a/b.txt", " ", "stdlib "]
)
def test_names_that_no_file_can_have(spec):
    with pytest.raises(UserError, match="no corpus "):
        find(spec)
    with pytest.raises(UserError, match="no corpus "):
        prepare(DataConfig(corpus=spec))


def test_a_glob_reports_what_it_matched_and_cannot_read(tmp_path):
    (tmp_path / "a.doc").touch()
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.png").touch()
    found = sources.find(str(tmp_path / "*"))
    assert [source.name for source in found.sources] == ["b.txt"]
    assert found.left_out == {".doc": 1, "folder": 1}
    assert sources.find(str(tmp_path / "**")).left_out == {".doc": 1, ".png": 1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ".txt"),
        ("a.TXT", ".txt"),
        ("README.Md", ".md"),
        ("a.tar.txt", ".txt"),
        ("a.txt.gz", ".txt.gz"),
        ("a.Txt.GZ", ".txt.gz"),
        ("a.md.zst", ".md.zst"),
        ("a.py.bz2", ".py.bz2"),
        ("a.jsonl.xz", ".jsonl.xz"),
        ("A.JSONL.ZST", ".jsonl.zst"),
        ("A.PARQUET", ".parquet"),
    ],
)
def test_known_kinds_whatever_their_case(tmp_path, name, kind):
    (tmp_path / name).touch()
    for spec in (tmp_path, tmp_path / name, tmp_path / "*"):
        (source,) = find(spec)
        assert source.kind + source.compression == kind


def test_everything_that_is_not_read_is_counted_by_kind(tmp_path, monkeypatch):
    (tmp_path / "a.txt").touch()
    for name in (
        "b.png",
        "c.PNG",
        "sub/d.png",
        "e.tar.gz",
        "f",
        "g.parquet.gz",
        "h.gz",
        ".i.txt",
        ".git/j.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "k.txt")
    os.mkfifo(tmp_path / "l")
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
        unix.bind("m.jsonl")
    (tmp_path / "n.txt").symlink_to("/dev/null")
    found = sources.find(str(tmp_path))
    assert [source.name for source in found.sources] == ["a.txt"]
    expected = {".png": 3, ".tar.gz": 1, "no ending": 1, ".parquet.gz": 1, ".gz": 1, "hidden": 2}
    assert found.left_out == expected | {"pipe": 2, "socket": 1, "device": 1}
    (said,) = sources.left_out("here", found)
    assert str(said).startswith("here: left out: 3 × .png, 2 × hidden, 2 × pipe, ")


def test_kinds_without_end_are_said_in_one_line(tmp_path):
    for number in range(30):
        (tmp_path / f"a.{number}").touch()
    (tmp_path / "a.txt").touch()
    (said,) = sources.left_out("here", sources.find(str(tmp_path)))
    assert said.message.endswith(", 18 × others")


def test_a_pipe_or_device_given_as_the_corpus_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt: it is a pipe, not a file"):
        find(tmp_path / "a.txt")
    with pytest.raises(UserError, match="it is a device, not a file"):
        find("/dev/null")
    with pytest.raises(UserError, match=r"has no file of the kinds .*; it has 1 × pipe"):
        find(tmp_path)


def test_links_are_followed_and_circles_are_not(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / "b" / "c").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (tmp_path / "beside.txt").touch()  # no part of the corpus
    for file in (corpus / "b" / "x.txt", elsewhere / "y.txt", elsewhere / "deep" / "z.txt"):
        file.write_text(file.name)
    (corpus / "a").symlink_to("b")  # sorts first, but what it leads to is there under its own name
    (corpus / "d.txt").symlink_to(elsewhere / "y.txt")
    (corpus / "e").symlink_to(elsewhere)
    (corpus / "b" / "c" / "itself").symlink_to(".")
    (corpus / "b" / "c" / "up").symlink_to("..")
    (corpus / "b" / "c" / "root").symlink_to(corpus)
    (corpus / "b" / "c" / "out").symlink_to(tmp_path)
    (elsewhere / "deep" / "slash").symlink_to("/")
    found = sources.find(str(corpus))
    assert sorted(s.name for s in found.sources) == ["b/x.txt", "d.txt", "e/deep/z.txt", "e/y.txt"]
    assert found.left_out == {"link to a folder read already": 4, "link to a folder around it": 2}
    assert not found.problems


def test_a_glob_walks_as_a_folder_is_walked(tmp_path):
    """Each folder once, around no circle; of folders that are named in several ways the straight one counts."""
    for name in ("b/c/x.txt", "b/y.txt", "z.txt", "b/.hidden/h.txt", "b/c/w.md", "elsewhere/v.txt"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    d = tmp_path / "d"
    (d / "elsewhere").rename(tmp_path / "elsewhere")
    (d / "a").symlink_to("b")
    (d / "b" / "c" / "up").symlink_to("..")
    (d / "b" / "c" / "root").symlink_to(d)
    (d / "e").symlink_to(tmp_path / "elsewhere")
    found = sources.find(str(d / "**" / "*.txt"))
    assert [s.name for s in found.sources] == ["b/c/x.txt", "b/y.txt", "e/v.txt", "z.txt"]
    folder = [s for s in sources.find(str(d)).sources if s.kind == ".txt"]
    assert {s.path for s in found.sources} == {s.path for s in folder}
    assert found.left_out == {"link to a folder read already": 3}
    assert names(d / "**") == ["b/c/w.md", "b/c/x.txt", "b/y.txt", "e/v.txt", "z.txt"]
    assert names(d / "**" / "c" / "*") == ["b/c/w.md", "b/c/x.txt"]
    assert names(d / "[bc]" / "**" / "*.md") == ["b/c/w.md"]
    assert names(d / "**" / ".hidden" / "*.txt") == ["b/.hidden/h.txt"]


def test_a_glob_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").touch()
    for spec in ("**/*.txt", "./**/*.txt", "a/**/*.txt", "**", "*/*.txt", "a/../**/b.*"):
        assert [os.path.normpath(source.path) for source in find(spec)] == ["a/b.txt"]


def test_links_that_lead_nowhere_are_problems(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    (tmp_path / "c.txt").symlink_to("c.txt")
    found = sources.find(str(tmp_path))
    assert [source.name for source in found.sources] == ["a.txt"]
    assert [problem.kind for problem in found.problems] == ["unreadable"] * 2
    assert found.problems[0].message == "No such file or directory (a link to gone.txt)"
    for name in ("b.txt", "c.txt"):
        with pytest.raises(UserError, match=rf"cannot read .*{name}: .* \(a link to "):
            find(tmp_path / name)


def test_a_folder_that_cannot_be_opened_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").touch()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    (problem,) = sources.find(str(tmp_path)).problems
    assert str(problem) == f"{tmp_path / 'closed'}: unreadable: Permission denied (a folder)"


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    for spec in ("~/texts", "~/texts/a.txt", "~/texts/*.txt", "~"):
        assert [Path(source.path) for source in find(spec)] == [tmp_path / "texts" / "a.txt"]
        assert Path("~").exists() is False
