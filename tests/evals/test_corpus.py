import gzip
import json
import random
import shutil
from importlib import import_module

import pytest
import torch

from retnet.data import Batches, DataConfig, RunData, prepare
from retnet.data.readers import PIECE
from retnet.evals.corpus import Corpus, TextHash
from retnet.evals.perplexity import measure
from retnet.evals.readers import RecurrentReader
from retnet.settings import UserError, dump
from retnet.train import objective
from retnet.train.config import RunConfig

SENTENCES = "It was a dark and stormy night; the rain fell in torrents. Ünder the röof."


def texts(*specs, **options):
    """The documents of a corpus, and its problems."""
    problems, documents = [], []
    for piece in Corpus([str(spec) for spec in specs], **options).texts(problems.append):
        if piece.first:
            documents.append("")
        documents[-1] += piece.text
        assert 0 <= piece.done <= 1
    return documents, problems


def test_files_of_all_kinds_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"body": "three"}\n{"body": ""}\n{"other": 1}\n{"body": "four"}\n')
    documents, problems = texts(tmp_path, text_field="body")
    assert documents == ["one", "two", "three", "four"]
    assert [problem.kind for problem in problems] == ["empty document", "no text"]
    assert texts(tmp_path / "b.txt", str(tmp_path / "*.md"))[0] == ["two", "one"]


def test_the_hash_is_of_the_text_not_of_its_pieces(tmp_path):
    long = "abc " * PIECE
    (tmp_path / "long.txt").write_text(long)
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": long}) + "\n")
    (tmp_path / "two.jsonl").write_text(
        json.dumps({"text": long[:4]}) + "\n" + json.dumps({"text": long[4:]})
    )
    digests = []
    for name in ("long.txt", "same.jsonl", "two.jsonl"):
        text_hash = TextHash()
        for piece in Corpus([str(tmp_path / name)]).texts(print):
            text_hash.add(piece)
        digests.append(text_hash.hexdigest())
    assert digests[0] == digests[1] != digests[2]


@pytest.fixture
def records(tmp_path):
    """Records, which the hash of their text splits, and text files, which that of their names does."""
    chance = random.Random(0)
    lines = [
        {"text": f"{i} " + SENTENCES * chance.randrange(1, 4), "note": "x" * chance.randrange(5)}
        for i in range(60)
    ]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(20):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"file {i} {SENTENCES}")
    return tmp_path / "corpus"


def run_with(tmp_path, **data):
    """A run directory of this [data], and what training validates on."""
    config = RunConfig(data=DataConfig(cache=str(tmp_path / "cache"), **data))
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "config.toml").write_text(dump(config))
    prepared = prepare(config.data)
    RunData.of(prepared).write(run)
    shards = prepared.validation
    spans = [shards.document_span(i) for i in range(shards.num_documents)]
    return run, prepared, [prepared.tokenizer.decode(shards.tokens(a + 1, b).tolist()) for a, b in spans]


def test_a_run_stands_for_what_its_training_held_out(tmp_path, records):
    run, prepared, held_out = run_with(tmp_path, corpus=str(records), validation_fraction=0.3)
    assert texts(run) == (held_out, [])
    assert 5 < len(held_out) < 60
    assert texts(prepared.directory)[0] == held_out  # the shards themselves, decoded
    run, _, same = run_with(tmp_path, corpus=str(prepared.directory))
    assert texts(run)[0] == same == held_out  # a run on a prepared folder


@pytest.mark.parametrize("validation", [None, "other.txt"])
def test_runs_that_hold_out_the_same_text_count_once(validation, tmp_path, records):
    (tmp_path / "other.txt").write_text("something else")
    apart = {"validation": str(tmp_path / validation)} if validation else {}
    run, _, held_out = run_with(tmp_path, corpus=str(records), validation_fraction=0.3, **apart)
    shutil.copytree(run, tmp_path / "twin")
    found, problems = texts(run, tmp_path / "twin")
    assert found == held_out
    assert {problem.kind for problem in problems} == {"duplicate"}
    if validation:
        assert texts(run, tmp_path / "other.txt")[0] == held_out


def test_a_run_on_files_and_one_on_the_folder_made_of_them_count_once(tmp_path, records):
    run, prepared, held_out = run_with(tmp_path, corpus=str(records), validation_fraction=0.3)
    (tmp_path / "other").mkdir()
    other, _, _ = run_with(tmp_path / "other", corpus=str(prepared.directory))
    for first, second in ((run, other), (other, run), (run, prepared.directory)):
        found, (problem,) = texts(first, second)
        assert found == held_out
        assert (problem.kind, problem.file) == (
            "duplicate",
            str(second if second == run else prepared.directory),
        )


def test_prepared_folders_count_once(tmp_path, records):
    _, prepared, held_out = run_with(tmp_path, corpus=str(records), validation_fraction=0.3)
    folder = prepared.directory
    run, _, _ = run_with(tmp_path, corpus=str(folder))
    shutil.copytree(run, tmp_path / "twin")
    shutil.copytree(folder, tmp_path / "copy")
    for specs in ((run, tmp_path / "twin"), (folder, folder), (folder, run), (run, tmp_path / "copy")):
        found, (problem,) = texts(*specs)
        assert found == held_out
        assert (problem.kind, problem.message) == ("duplicate", f"the same text as {folder}")
    _, other, also = run_with(tmp_path, corpus=str(records), validation_fraction=0.5)
    assert texts(folder, other.directory) == (held_out + also, [])


@pytest.mark.parametrize("apart", [False, True])
def test_records_that_another_rule_divided_are_refused(apart, tmp_path, records, monkeypatch):
    """Their files are the same, and nobody can tell the sides."""
    for file in records.glob("*.txt"):
        file.unlink()
    (tmp_path / "other.txt").write_text("something else")
    more = {"validation": str(tmp_path / "other.txt")} if apart else {}
    run, prepared, held_out = run_with(tmp_path, corpus=str(records), validation_fraction=0.3, **more)
    noted = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(noted | {"division": noted["division"] + 1}))
    if apart:
        assert texts(run) == (held_out, [])
    else:
        with pytest.raises(
            UserError, match="its text, or the rule by which this version divides it, has changed"
        ):
            Corpus([str(run)])
    monkeypatch.setattr(
        import_module("retnet.data.prepare"), "DIVISION", 2
    )  # the package names a function so
    data = DataConfig(corpus=str(records), validation_fraction=0.3, cache=str(tmp_path / "cache"), **more)
    assert (prepare(data).directory == prepared.directory) is apart


def test_a_run_whose_only_file_was_cut(tmp_path):
    (tmp_path / "one.txt").write_text("\n".join(f"line {i} of äll" for i in range(500)))
    run, _, held_out = run_with(tmp_path, corpus=str(tmp_path / "one.txt"), validation_fraction=0.1)
    assert texts(run)[0] == held_out
    assert len(held_out) == 1


def test_a_run_with_other_validation_text(tmp_path, records):
    (tmp_path / "other.txt").write_text("something else")
    run, _, held_out = run_with(tmp_path, corpus=str(records), validation=str(tmp_path / "other.txt"))
    assert texts(run)[0] == held_out == ["something else"]


@pytest.mark.parametrize("kind", ["split", "validation", "prepared"])
def test_text_that_is_no_longer_what_was_held_out_is_refused(kind, tmp_path, records):
    """It may have been trained on."""
    data = {"corpus": str(records), "validation_fraction": 0.3}
    if kind == "validation":
        (tmp_path / "other").mkdir()
        data = {"corpus": str(records), "validation": str(tmp_path / "other")}
        (tmp_path / "other" / "v.txt").write_text("something else")
    if kind == "prepared":
        data = {"corpus": str(run_with(tmp_path, **data)[1].directory)}
    run, _, held_out = run_with(tmp_path, **data)
    assert texts(run) == (held_out, [])
    if kind == "prepared":
        other = DataConfig(corpus=str(records), validation_fraction=0.2, cache=str(tmp_path / "cache"))
        shutil.rmtree(data["corpus"])
        prepare(other).directory.rename(data["corpus"])
    else:
        file = tmp_path / "other" / "v.txt" if kind == "validation" else records / "a.jsonl"
        file.write_text(file.read_text().replace("0", "9").replace("else", "more"))
    with pytest.raises(UserError, match=r"run cannot be found again: its text has changed since .* restore"):
        Corpus([str(run)])


def test_text_beside_the_validation_text_may_change(tmp_path, records):
    (tmp_path / "other.txt").write_text("something else")
    run, _, held_out = run_with(tmp_path, corpus=str(records), validation=str(tmp_path / "other.txt"))
    (records / "0.txt").unlink()
    assert texts(run) == (held_out, [])


def test_a_run_that_does_not_say_what_it_was_trained_on(tmp_path, records):
    run, _, held_out = run_with(tmp_path, corpus=str(records), validation_fraction=0.3)
    (run / "data.json").unlink()
    documents, (problem,) = texts(run)
    assert documents == held_out
    assert str(problem).startswith(f"{run}: not known: an older version began this run")


def test_what_is_not_there(tmp_path, records):
    with pytest.raises(UserError, match="no corpus"):
        Corpus([str(tmp_path / "nowhere")])
    run, _, _ = run_with(tmp_path, corpus=str(records), validation_fraction=0.3)
    for file in records.iterdir():
        file.unlink()
    records.rmdir()
    with pytest.raises(UserError, match=r"the validation split of .*run cannot be found again: no corpus"):
        Corpus([str(run)])
    with pytest.raises(UserError, match="no data"):
        Corpus([])


def test_windows_are_the_rows_that_training_validates_on(tmp_path, records, model):
    """Of one document: training's own evaluation and ours cut it alike, and give the same loss."""
    (tmp_path / "other.txt").write_text(SENTENCES * 20)
    run, prepared, _ = run_with(tmp_path, corpus=str(records), validation=str(tmp_path / "other.txt"))
    batches = Batches(prepared.validation, seq_len=64, batch_size=3, seed=0)
    quality = objective.evaluate(
        objective.Objective(model),
        batches,
        bytes_per_token=1.0,
        device=torch.device("cpu"),
        autocast=torch.autocast("cpu", enabled=False),
    )
    measured = measure(RecurrentReader(model), prepared.tokenizer, Corpus([str(run)]), lengths=(64,))
    assert measured.tokens == quality.tokens
    assert measured.results[0].nats_per_token.value == pytest.approx(quality.loss, rel=1e-6)
    assert measured.results[1].nats_per_token.value != pytest.approx(quality.loss, rel=1e-6)
