import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from rich.console import Console

from retnet.measure.summary import Figure, Line, Panel, Summary
from retnet.settings import UserError
from retnet.studies import report
from retnet.studies.folder import StudyFolder
from retnet.tables import Table

HOSTILE = "<script>alert(1)</script> & \"a\" 'b' \\c {{ d }} {% e %} ünï 检索 🦊 [/] $x$ " + "long" * 30
VOID = {"meta", "link", "wbr"}

TABLE = Table(
    "Perplexity of " + HOSTILE,
    ("", "parameters", "said", "in-domain", "paper, in-domain"),
    (
        ("RetNet", "1.20 M", "flat", "13.40 ± 0.10", "13.09"),
        (HOSTILE, "–", "", "nan", "-"),
        ("paper: RetNet 6.7B", "6.7 B", HOSTILE, "–", "9.98"),
    ),
    (HOSTILE,),
)
CURVE = Line("RetNet", (512.0, 1024.0), (3.0, math.nan), (2.9, math.nan), (3.1, math.inf))
PANEL = Panel(HOSTILE, "tokens", "nats", (CURVE, Line(HOSTILE, (512.0,), (3.0,), dashed=True)), log_x=True)
FULL = Summary(
    (TABLE, Table("Words", ("name", "what"), ())),
    (Figure("by-length", (PANEL, PANEL), (HOSTILE,)),),
    (HOSTILE,),
)


class Page(HTMLParser):
    """Checks that elements nest, and gathers what there is."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append(("", attributes))

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open or tag in VOID
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"th", "td"} & set(self.open):
            text, attributes = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data, attributes)

    def named(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]

    def cells(self, number):
        return [[text for text, _ in row] for row in self.tables[number]]

    def said(self):
        return " ".join("".join(self.text).split())


def begun(place, study):
    """The folder of a study with two jobs finished, one failed and one interrupted."""
    folder = StudyFolder(place / "out")
    environment = {
        "cpu": "CPU " + HOSTILE,
        "cores": 2,
        "memory_bytes": 2**34,
        "dirty": True,
        "commit": "abc123",
    }
    folder.create(study, {**environment, "versions": {"torch": "2"}, "gpu": None, "room": "cold"})
    folder.note(started="2026-11-22T14:03:11+00:00", finished="2026-11-23T15:00:00+00:00", seconds=11532.3)
    folder.write_result("a", {"loss": 1.0, "seconds": {"training": 60.0, "measuring": 61.0}})
    folder.write_result("b", {"loss": math.nan})
    folder.write_failure("c", f"no memory: {HOSTILE}\nsecond line")
    folder.job("d").mkdir()
    return folder.path


@pytest.fixture
def out(tmp_path, said, tiny_study):
    said.said = FULL
    return begun(tmp_path, tiny_study)


@pytest.fixture(scope="module")
def reported(tmp_path_factory, tiny_study):
    """The same with its report, which nobody changes: drawing figures takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny_study.measure), "said", FULL)
        path = begun(tmp_path_factory.mktemp("reported"), tiny_study)
        report.write_report(path)
    return path


def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_files(out):
    paths = report.write_report(out)
    assert [path.name for path in paths] == ["report.html", "summary.json", "by-length.png"]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in report.write_report(out)] == before


def test_every_cell_stands_on_the_page_as_it_is(reported):
    found = page(reported)
    rows = [[("–" if cell in ("", "-") else cell) for cell in row] for row in TABLE.rows]
    assert found.cells(0) == [list(TABLE.columns), *rows]
    assert found.cells(1) == [["name", "what"]]
    for words in (HOSTILE, "A <tiny> study", 'Second & "last".'):
        assert words in found.said()
    assert not found.named("script", "img", "iframe", "object", "b")


def test_numbers_stand_right_and_published_ones_apart(reported):
    found = page(reported)
    table = found.tables[0]
    kinds = [[attributes.get("class") for _, attributes in row] for row in table]
    assert kinds == [[None, "number", None, "number", "number published"]] + kinds[2:3] * 3
    assert kinds[1][1:] == kinds[0][1:]
    rows = [a.get("class") for a in found.named("tr")][:4]
    assert rows == [None, None, None, "published"]
    assert "Shaded: published in the paper" in found.said()


def test_the_page_is_sound_and_accessible(reported):
    found = page(reported)
    everything = [attributes for _, attributes in found.elements]
    ids = [a["id"] for a in everything if "id" in a]
    assert len(set(ids)) == len(ids)
    named = {word for a in everything for word in a.get("aria-labelledby", "").split()}
    assert named <= set(ids)
    assert found.named("html") == [{"lang": "en"}]
    assert len(found.named("h1")) == len(found.named("main")) == 1
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(a.get("scope") in ("col", "row") for a in found.named("th"))
    labels = [a.get("aria-label") or a.get("aria-hidden") for a in found.named("svg")]
    assert len(labels) == 4
    assert all(labels)


def test_the_page_asks_nothing_of_any_network(reported):
    text = (reported / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "onload", "onclick"), tag
            if name == "href":
                assert value.startswith(("#", "data:,"))
            if name != "xmlns":
                assert "//" not in (value or "")
    assert not re.search(r"@import|url\((?!#)", text)
    (policy,) = [a["content"] for a in found.named("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")


def test_what_is_missing_is_said_first(out, reported):
    said = page(reported).said()
    at = [
        said.index(words) for words in ("is not complete", "Of 4 jobs, 2 finished, 1 failed, 1 not done yet.")
    ]
    at += [said.index("no memory: <script>"), said.index("second line"), said.index("Findings")]
    assert at == sorted(at)
    assert "2 of 4 jobs finished" in said
    folder = StudyFolder(out)
    folder.write_result("c", {})
    folder.write_result("d", {})
    report.write_report(out)
    said = page(out).said()
    assert "is not complete" not in said
    assert "all 4 jobs finished" in said


def test_what_was_run_and_where(reported):
    found = page(reported)
    rows = [tuple(row) for number in range(2, len(found.tables)) for row in found.cells(number)]
    for row in (
        ("measure", "said"),
        ("hours", "0.5"),
        ("lengths", "none"),
        ("width", "20,000"),
        ("decay", "1e-05"),
        ("on", "yes"),
        ("label", "deep.er", "x"),
        ("A", "1", "–"),
        ("<B> & co", "–", "1, 2"),
        ("processor", "CPU " + HOSTILE),
        ("memory", "16.0 GiB"),
        ("GPU", "none"),
        ("torch", "2"),
        ("commit", "abc123, with changes that were not committed"),
        ("started", "2026-11-22 14:03 UTC"),
        ("wall time", "3 h 12 min"),
        ("room", "cold"),
        ("a", "finished", "2 min"),
        ("b", "finished", "–"),
        ("c", "failed", "–"),
        ("d", "begun", "–"),
    ):
        assert row in rows
    assert rows.count(("name", "said")) == 0


def test_a_study_that_has_only_begun(out, said):
    said.said = Summary()
    for job in (out / "jobs").iterdir():
        for file in job.iterdir():
            file.unlink()
        job.rmdir()
    StudyFolder(out).environment_file.unlink()
    report.write_report(out)
    found = page(out)
    assert "Of 4 jobs, 0 finished, 4 not done yet." in found.said()
    assert not found.named("svg")
    assert not {"Findings", "Tables", "Figures", "Jobs"} & set(found.text)


def test_the_record_is_json_of_everything(reported):

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    record = json.loads((reported / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert record["title"] == "A <tiny> study"
    assert record["settings"]["measure"]["inner"] == {"width": 20000, "decay": 1e-05, "on": True}
    assert record["environment"]["commit"] == "abc123"
    assert (record["jobs"]["total"], record["jobs"]["finished"]) == (4, 2)
    assert record["jobs"]["seconds"] == {"a": 121.0}
    assert list(record["jobs"]["failures"]) == ["c"]
    assert record["findings"] == [HOSTILE]
    assert record["tables"][0]["rows"] == [list(row) for row in TABLE.rows]
    drawn = record["figures"][0]["panels"][0]["lines"][0]
    assert (drawn["y"], drawn["high"]) == ([3.0, None], [3.1, None])


def test_tables_for_programs_and_for_eyes(out, capsys):
    found = report.read(out)
    report.show(found, Console(file=io.StringIO()))
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    start = lines.index(f"# {TABLE.title}") + 1
    assert [tuple(line.split("\t")) for line in lines[start : start + 4]] == [TABLE.columns, *TABLE.rows]
    assert f"* {HOSTILE}" in lines
    assert "1 failed" in printed.err
    assert "c: no memory" in printed.err
    screen = io.StringIO()
    report.show(found, Console(file=screen, force_terminal=True, width=200, color_system=None))
    drawn = screen.getvalue()
    assert "13.40 ± 0.10" in drawn
    assert "[/]" in drawn
    assert "Perplexity of <script>" in drawn


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jobs/a/result.json", r"result\.json is damaged.*remove it, and the job is done again"),
        ("env.json", r"env\.json is damaged.*remove it"),
        ("study.toml", r"study\.toml is not valid TOML"),
    ],
)
def test_damaged_studies(out, name, words):
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=words):
        report.write_report(out)
    assert not (out / "report.html").exists()


def test_no_study_and_no_room(tmp_path, out, monkeypatch):
    with pytest.raises(UserError, match=r"holds no study.*--out"):
        report.read(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        report.write_report(tmp_path / "nowhere")
    (out / "summary.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*summary\.json"):
        report.write_report(out)
