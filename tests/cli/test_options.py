"""Options made from dataclasses: read from the source as the classes say it, and homes in paths."""

import ast
import dataclasses
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from retnet.cli.options import HomePath, HomeText, options, read_fields

PLACES = [
    "retnet.engine.sampling:Sampling",
    "retnet.data.config:DataConfig",
    "retnet.studies.study:Study",
    "retnet.studies.quality:QualityMeasure",
    "retnet.bench.training:TrainingBench",
    "retnet.bench.decoding:DecodingBench",
    "retnet.bench.implementations:OpsBench",
    "retnet.train.config:TrainConfig",
]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_read_from_the_source_is_what_the_class_says(place):
    module, _, name = place.partition(":")
    kind = getattr(import_module(module), name)
    hints = typing.get_type_hints(kind, include_extras=True)
    simple = {f.name: f for f in dataclasses.fields(kind) if not dataclasses.is_dataclass(hints[f.name])}
    read = read_fields(place)
    for key, field in read.items():
        assert field.kind == hints[key]
        if simple[key].default is not dataclasses.MISSING and field.default is not None:
            assert field.default == simple[key].default
        assert field.help or key == "name", f"{place}.{key} has no line in its Attributes"
    numbers = {f for f in simple if hints[f] in (int, float, bool, str)}
    assert numbers <= read.keys()


def params(place, *names, **changes):
    @click.command()
    @options(place, *names, **changes)
    def command(**given):
        click.echo(given)

    return command


def test_options_have_the_ranges_and_defaults_of_the_fields():
    command = params("retnet.engine.sampling:Sampling", "top_p", "top_k")
    run = CliRunner().invoke
    assert run(command, []).output == "{'top_p': 1.0, 'top_k': 0}\n"
    for words, says in (
        (["--top-p", "1.5"], "0<x<=1"),
        (["--top-p", "0"], "0<x<=1"),
        (["--top-k", "-1"], "x>=0"),
        (["--top-k", "2.5"], "not a valid integer"),
    ):
        done = run(command, words)
        assert done.exit_code == 2
        assert says in done.output


def test_what_is_not_given_is_none_where_others_know_better():
    command = params("retnet.data.config:DataConfig", "corpus", "validation_fraction", unset=True)
    run = CliRunner().invoke
    assert run(command, []).output == "{'corpus': (), 'validation_fraction': None}\n"
    given = run(command, ["--corpus", "~/a", "--corpus", "package:x"], env={"HOME": "/home/me"}).output
    assert given == "{'corpus': ('/home/me/a', 'package:x'), 'validation_fraction': None}\n"


def test_choices_and_switches():
    command = params("retnet.train.config:TrainConfig", "schedule", "compile", "minutes")
    run = CliRunner().invoke
    given = ast.literal_eval(run(command, ["--compile"]).output)
    assert given == {"schedule": "linear", "compile": True, "minutes": None}
    assert "'linear', 'cosine', 'wsd', 'constant'" in run(command, ["--schedule", "lin"]).output


def test_an_empty_path_is_not_the_current_directory():
    """`--run-dir "$UNSET"` would fill the folder one happens to be in."""
    for kind in (HomePath(path_type=Path), HomePath(), HomeText()):
        with pytest.raises(click.BadParameter, match="it is empty; name a file or folder"):
            kind.convert("", None, None)


def test_a_home_is_expanded_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert HomePath(path_type=Path).convert("~/x", None, None) == Path("/home/me/x")
    assert HomePath().convert("~/x", None, None) in ("/home/me/x", Path("/home/me/x"))
    assert HomeText().convert("~", None, None) == "/home/me"
    assert HomeText().convert("a~/b", None, None) == "a~/b"


@pytest.mark.slow
def test_nothing_heavy_is_imported_to_read_them():
    code = (
        "import sys; from retnet.cli.options import read_fields\n"
        f"for place in {PLACES}: assert read_fields(place)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=True).returncode == 0


@pytest.mark.parametrize("option", ["--peak", "--utilisation", "--hours"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_refused_by_its_option(option, value):
    from retnet.cli.study import command

    done = CliRunner().invoke(command, ["architectures", "--dry-run", option, value])
    assert done.exit_code == 2
    assert option in done.output
    assert value in done.output
