"""The command as a user meets it: help at once, mistakes in one line, the smoke run from an empty directory."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr

import pytest
import torch
from click.testing import CliRunner

from retnet.cli import VERBS, cli, main

RETNET = [sys.executable, "-c", "from retnet.cli import main; main()"]


def retnet(*words, cwd, **options):
    return subprocess.run(
        [*RETNET, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300, **options
    )


HELP = """
import sys
from retnet.cli import VERBS, cli
for words in [], *([verb] for verb in VERBS):
    cli.main([*words, "--help"], standalone_mode=False)
    print("imported:", *{"torch", "numpy", "tokenizers", "rich.progress"} & set(sys.modules), end="\\0")
"""


@pytest.fixture(scope="module")
def helped(tmp_path_factory):
    """Help of the command and of each verb, and what heavy modules were there after it."""
    home = tmp_path_factory.mktemp("help")
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=home, capture_output=True, text=True, timeout=60, check=True
    )
    return {
        verb: said.split("imported:")
        for verb, said in zip(("", *VERBS), done.stdout.split("\0"), strict=False)
    }


def test_help_lists_every_verb_and_imports_none(helped):
    said, imported = helped[""]
    assert all(f"  {verb} " in said for verb in VERBS)
    assert not imported.split()


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_does_not_import_torch(verb, helped):
    said, imported = helped[verb]
    assert f" {verb} [OPTIONS]" in said
    assert "torch" not in imported.split()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each mistake is told; each ends with the status 2, and leaves nothing."""
    home, said = tmp_path_factory.mktemp("mistakes"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for words, _ in ALL_MISTAKES:
            patch.setattr(sys, "argv", ["retnet", *words])
            with redirect_stderr(io.StringIO()) as found, pytest.raises(SystemExit) as end:
                main()
            assert end.value.code == 2
            said.append(found.getvalue())
    assert not list(home.iterdir())
    return said


ALL_MISTAKES = [
    (["trian"], "no verb 'trian'; did you mean 'train'?"),
    (["train", "smok"], "no configuration 'smok': not a .toml file, and did you mean 'smoke'"),
    (["train", "smoke", "--train.stepz", "3"], "unknown setting 'train.stepz'; did you mean 'steps'"),
    (["train", "smoke", "--train.steps", "x"], "train.steps 'x': Expected `int`"),
    (["train", "smoke", "--train.steps", "0"], "steps is 0; it must be at least 1"),
    (["train", "smoke", "--model.mixer.name", "retntion"], "did you mean 'retention'"),
    (["train", "smoke", "--model.mixer.num_heads", "3"], "d_model 64 is not a multiple of num_heads 3"),
    (["train", "smoke", "--train.device", "tpu"], "device 'tpu' cannot be used here"),
    (["train", "smoke", "--data.corpus", "nowhere"], "nowhere"),
    (
        ["train", "smoke", "--train.device", "meta"],
        "device 'meta' cannot be used here: it has shapes, and no",
    ),
    (["train", "smoke", "--train.batch_size", "1e12"], "did you mean 1000000000000?"),
    (["train", "smoke", "--train.batch_size", "1000000000000"], "rows of train.seq_len 128"),
    (
        ["train", "smoke", "--train.threads", "1000000000"],
        "threads is 1000000000; it must be at least 1 and at",
    ),
    (["train", "smoke", "--train.seed", "1e30"], "train.seed 1e+30: Expected `int`"),
    (["demo", "smoke", "--train.seq_len", "1000000000000"], "training needs"),
    (
        ["study", "scaling", "--dry-run", "--measure.settings.train.steps", "abc"],
        "error: command line: row '",
    ),
    (
        ["study", "scaling", "--dry-run", "--measure.settings.train.stepz", "9"],
        "error: command line: row '",
    ),
    (["generate", "nowhere", "--prompt", "x"], "no run at nowhere"),
    (["generate", "smoke", "--samples", "1000000000000"], "is not in the range 1<=x<=65536"),
    (["config", "show", "paper/9b"], "no configuration 'paper/9b'"),
]


@pytest.mark.parametrize("number", range(len(ALL_MISTAKES)), ids=lambda n: " ".join(ALL_MISTAKES[n][0]))
def test_mistakes_end_in_one_sentence(number, told):
    assert ALL_MISTAKES[number][1] in told[number]
    assert "Traceback" not in told[number]


def test_config_show():
    done = CliRunner().invoke(cli, ["config", "show", "paper/6.7b", "--model.num_layers", "16"])
    assert done.exit_code == 0, done.output
    for part in ("num_layers = 16", "3,427,540,992", "flops per token", "32k", "KV cache"):
        assert part in done.stdout, part


def test_config_list(tmp_path):
    assert "paper/13b\n" in retnet("config", "list", cwd=tmp_path).stdout


@pytest.mark.slow
def test_smoke_run_from_an_empty_directory(forks, tmp_path):
    """Train, be refused, resume, generate: the names other work relies on."""
    done = forks.run(["train", "smoke", "--run-dir", "r", "--train.steps", "10"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bits/byte held out" in done.stdout
    assert {"config.toml", "env.json", "metrics.jsonl", "checkpoints"} <= set(os.listdir(tmp_path / "r"))
    lines = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses[-1] < losses[0]

    again = forks.run(["train", "smoke", "--run-dir", "r", "--train.steps", "10"], tmp_path)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr

    texts = [
        forks.run(["generate", "r", "--prompt", "def ", "--max-tokens", 20, "--seed", seed], tmp_path).stdout
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert set(os.listdir(tmp_path)) == {"r", ".cache"}


@pytest.mark.slow
def test_demo_from_an_empty_directory(forks, tmp_path):
    for _ in range(2):  # a finished demo shows its results again
        done = forks.run(["demo", "smoke", "--run-dir", "d", "--train.steps", 5], tmp_path)
        assert done.returncode == 0, done.stderr
        for part in (
            "gzip -9",
            "xz -9",
            "this RetNet",
            "A sample, 300 bytes",
            "retnet generate d",
            "retnet serve d",
        ):
            assert part in done.stdout
    assert "finished before: 5 steps" in done.stderr
    assert "step 5/5" not in done.stderr


def test_the_environment_of_tests_is_one_thread():
    assert torch.get_num_threads() == 1
