"""`retnet data`: what it prints, what it writes, how it fails."""

import json
import sys

import pytest
from click.testing import CliRunner

from retnet.cli.data import command
from retnet.data import Tokenizer, load
from retnet.settings import UserError


def run(*words):
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300)) + "{\n")
    return path


@pytest.mark.slow
def test_help_needs_no_heavy_import():
    import subprocess

    code = "import sys, retnet.cli.data; print(*{'torch', 'numpy', 'tokenizers', 'pyarrow', 'rich'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == ""


def test_a_tokenizer_is_written_to_what_the_path_stands_for(tmp_path, corpus):
    """A link, like a device, stays what it is; one that leads nowhere is a mistake, not a traceback."""
    link, nowhere = tmp_path / "link.json", tmp_path / "nowhere.json"
    link.symlink_to(tmp_path / "bpe.json")
    nowhere.symlink_to(tmp_path / "none" / "bpe.json")
    assert run("tokenizer", corpus, "--vocab-size", 280, "--out", link).exit_code == 0
    assert link.is_symlink()
    assert Tokenizer.load(tmp_path / "bpe.json").vocab_size == 280
    with pytest.raises(UserError, match=r"cannot write .*nowhere\.json: there is no folder .*none"):
        run("tokenizer", corpus, "--vocab-size", 280, "--out", nowhere)


def test_tokenizer_then_prepare_then_check(tmp_path, corpus):
    bpe = tmp_path / "bpe.json"
    said = run("tokenizer", corpus, "--vocab-size", 280, "--out", bpe)
    assert said.exit_code == 0
    assert f"{bpe}: 280 tokens" in said.output
    assert "1 × bad JSON" in said.output
    assert Tokenizer.load(bpe).vocab_size == 280

    said = run(
        "prepare",
        "--corpus",
        corpus,
        "--tokenizer",
        bpe,
        "--validation-fraction",
        0.1,
        "--out",
        tmp_path / "out",
    )
    assert said.exit_code == 0
    (folder,) = (tmp_path / "out").iterdir()
    prepared = load(folder)
    assert f"{prepared.train.num_documents} documents" in said.stdout
    assert f"{prepared.validation.num_tokens:,} tokens" in said.stdout
    assert f"in {folder}" in said.stdout
    assert f"{corpus}:301: bad JSON" in said.stderr
    assert "1 bad JSON" in said.stdout

    said = run("check", folder)
    assert "every hash is right" in said.output


def test_a_configuration_and_options_that_take_precedence(tmp_path, corpus):
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'[data]\ncorpus = "nowhere"\nvalidation_fraction = 0.1\ncache = "{tmp_path / "cache"}"\n[model]\nd_model = 8\n'
    )
    with pytest.raises(UserError, match="no corpus 'nowhere'"):
        run("prepare", toml)
    assert run("prepare", toml, "--corpus", corpus).exit_code == 0
    assert list((tmp_path / "cache").glob("*/manifest.json"))


def test_mistakes_are_said(tmp_path, corpus):
    toml = tmp_path / "run.toml"
    toml.write_text('[data]\ncorpsu = "x"\n')
    with pytest.raises(UserError, match=r"unknown setting 'data\.corpsu'; did you mean 'corpus'"):
        run("prepare", toml)
    toml.write_text("[data\n")
    with pytest.raises(UserError, match=r"run\.toml is not valid TOML"):
        run("prepare", toml)
    with pytest.raises(UserError, match="no configuration 'nothing'"):
        run("prepare", "nothing")
    with pytest.raises(UserError, match="there is no folder"):
        run("tokenizer", corpus, "--out", tmp_path / "no" / "t.json")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"no text in .*1 × empty document"):
        run("tokenizer", tmp_path / "empty.txt", "--out", tmp_path / "t.json")


def test_many_problems_are_counted_not_listed(tmp_path, corpus):
    corpus.write_text(corpus.read_text() + "{\n" * 100)
    said = run("prepare", "--corpus", corpus, "--validation-fraction", 0.1, "--out", tmp_path / "out")
    assert said.stderr.count("bad JSON") == 20
    assert "further problems are only counted" in said.stderr
    assert "101 bad JSON" in said.stdout


def test_reading_stops_at_max_bytes(tmp_path, corpus):
    said = run("tokenizer", corpus, "--vocab-size", 260, "--max-bytes", 100, "--out", tmp_path / "t.json")
    assert "stopped reading at --max-bytes 100" in said.output
