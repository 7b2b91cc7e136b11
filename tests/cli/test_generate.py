import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from click.testing import CliRunner

from retnet.cli import cli
from retnet.data import Tokenizer
from retnet.engine import Sampling, generate, open_run
from retnet.io import write_text
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import model_files, write_checkpoint
from retnet.nn import Int8Linear
from retnet.settings import UserError

RETNET = [sys.executable, "-c", "from retnet.cli import main; main()"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of tiny models with random weights; its best checkpoint is not its last."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("bytes")
    checkpoints = tmp_path_factory.mktemp("runs") / "tiny" / "checkpoints"
    for name, step in (("best", "step-00000010"), ("last", "step-00000020")):
        model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, d_model=32, num_layers=2))
        write_checkpoint(checkpoints / step, {**model_files(model), "tokenizer.json": tokenizer.save})
        write_text(checkpoints / name, step + "\n")
    return checkpoints.parent


def call(*args, stdin=None):
    """Output and messages of `retnet generate`, which must succeed."""
    result = CliRunner().invoke(cli, ["generate", *map(str, args)], input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def fails(*args, stdin=None):
    """The sentence of the `UserError` that `retnet generate` ends with."""
    with pytest.raises(UserError) as error:
        CliRunner().invoke(cli, ["generate", *map(str, args)], input=stdin, catch_exceptions=False)
    return str(error.value)


def texts(run, prompts, **options):
    opened = open_run(run)
    return [
        [row.text for row in rows] for rows in generate(opened.model, opened.tokenizer, prompts, **options)
    ]


def test_one_text_is_what_the_library_gives(run):
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
    expected = texts(run, ["The cat"], max_tokens=30, sampling=sampling, seed=5)[0][0]
    filters = ["--top-k", 40, "--top-p", 0.95, "--min-p", 0.01, "--repetition-penalty", 1.1]
    prompt = ["--prompt", "The cat", "--max-tokens", 30]
    out, err = call(run, *prompt, "--temperature", 0.9, *filters, "--seed", 5)
    assert out == expected + "\n"
    assert err == ""


def test_several_texts_stand_under_headings_in_order(run):
    expected = texts(run, ["a", "b"], max_tokens=8, samples=2)
    out, _ = call(run, "--prompt", "a", "--prompt", "b", "--samples", 2, "--max-tokens", 8)
    assert out == "".join(
        f"=== prompt {p + 1}, sample {s + 1} (8 tokens, token limit) ===\n{expected[p][s]}\n"
        for p in (0, 1)
        for s in (0, 1)
    )
    out, _ = call(run, "--prompt", "b", "--samples", 2, "--max-tokens", 8)
    assert out.startswith("=== sample 1 (8 tokens, token limit) ===\n")


def test_json_has_a_line_for_each_text(run):
    out, _ = call(run, "--prompt", "é", "--samples", 2, "--max-tokens", 8, "--json")
    expected = texts(run, ["é"], max_tokens=8, samples=2)[0]
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": "é", "sample": s, "text": text, "finish": "length", "prompt_tokens": 3, "tokens": 8}
        for s, text in enumerate(expected)
    ]
    assert '"prompt": "é"' in out


def test_prompts_come_from_files_and_standard_input(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("first\r\n\nthird é\n".encode())

    def prompts(*args, stdin=None):
        out, _ = call(run, *args, "--json", "--max-tokens", 1, stdin=stdin)
        return [json.loads(line)["prompt"] for line in out.splitlines()]

    assert prompts("--prompt-file", file) == ["first\n\nthird é"]
    assert prompts("--prompt-file", file, "--prompt-lines") == ["first", "", "third é"]
    assert prompts("--prompt", "x", "--prompt-file", "-", stdin="y\n") == ["x", "y"]
    assert prompts(stdin="from a pipe\n\n") == ["from a pipe\n"]
    assert prompts("--prompt-lines", stdin="one\ntwo") == ["one", "two"]
    assert prompts("--prompt", "", stdin="not read") == [""]


def test_stop_strings_end_a_text(run):
    whole = texts(run, ["a"], max_tokens=40, sampling=Sampling(top_k=90))[0][0]
    stop = whole[20:23]
    out, _ = call(
        run, "--prompt", "a", "--max-tokens", 40, "--top-k", 90, "--stop", stop, "--stop", "unseen stop"
    )
    assert out == whole[: whole.index(stop)] + "\n"


def test_checkpoints_are_chosen_by_name_or_path(run):
    first, second = (run / "checkpoints" / f"step-000000{n}0" for n in (1, 2))
    of = {path: texts(path, ["a"], max_tokens=8)[0][0] + "\n" for path in (first, second)}
    assert of[first] != of[second]
    few = ("--prompt", "a", "--max-tokens", 8)
    assert call(run, *few) == (of[first], "")
    assert call(run, *few, "--checkpoint", "last") == (of[second], "")
    assert call(second, *few) == (of[second], "")
    best = run / "checkpoints" / "best"
    kept = best.read_text()
    best.unlink()
    try:
        assert call(run, *few) == (of[second], "no best checkpoint yet: using last (step-00000020)\n")
    finally:
        best.write_text(kept)


def test_stats_go_to_standard_error(run):
    out, err = call(run, "--prompt", "abc", "--max-tokens", 5, "--temperature", 0, "--stats")
    assert out == texts(run, ["abc"], max_tokens=5, sampling=Sampling(temperature=0))[0][0] + "\n"
    prefill, decode = err.splitlines()
    assert prefill.startswith("prefill: 4 tokens in ")
    assert decode.startswith("decode: 4 tokens in ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(run, dtype):
    assert open_run(run, dtype=dtype).model is not None
    assert call(run, "--prompt", "a", "--max-tokens", 5, "--dtype", dtype)[0]


def test_int8_weights(run):
    opened = open_run(run, weights="int8")
    want = generate(opened.model, opened.tokenizer, ["The cat"], max_tokens=20, seed=3)[0][0].text
    assert (
        call(run, "--prompt", "The cat", "--max-tokens", 20, "--seed", 3, "--weights", "int8")[0]
        == want + "\n"
    )
    assert call(run, "--prompt", "a", "--max-tokens", 5, "--weights", "int8", "--dtype", "float32")[0]
    assert isinstance(opened.model.head, Int8Linear)


def test_mistakes_end_in_one_sentence(run, tmp_path):
    assert "no run at" in fails(tmp_path / "none", "--prompt", "a")
    assert "did you mean 'last'" in fails(run, "--prompt", "a", "--checkpoint", "lst")
    assert "unknown dtype 'int8'" in fails(run, "--prompt", "a", "--dtype", "int8")
    assert "unknown weights 'int4'; " in fails(run, "--prompt", "a", "--weights", "int4")
    both = fails(run, "--prompt", "a", "--weights", "int8", "--dtype", "bfloat16")
    assert both == "int8 weights are computed with in float32, not bfloat16; leave out one of the two"
    assert "device 'tpu' cannot be used here" in fails(run, "--prompt", "a", "--device", "tpu")
    assert "at least one character" in fails(run, "--prompt", "a", "--stop", "")
    assert "cannot read --prompt-file" in fails(run, "--prompt-file", tmp_path / "none.txt")
    assert "--prompt-lines needs" in fails(run, "--prompt", "a", "--prompt-lines")
    assert fails(run, stdin=b"ab\xff").startswith("standard input is not UTF-8 text: byte 2")
    assert "UTF-16" in fails(run, stdin="ab".encode("utf-16"))
    assert fails(run, "--prompt", "a\udcff").startswith("the argument 'a\ufffd' is not UTF-8 text")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--max-tokens", "0", "x>=1"),
        ("--temperature", "-1.0", "x>=0"),
        ("--top-k", "-1", "x>=0"),
        ("--top-p", "1.5", "0<x<=1"),
        ("--min-p", "-0.1", "0<=x<=1"),
        ("--repetition-penalty", "0.0", "x>=1e-06"),
        ("--seed", "-1", "x>=0"),
        ("--samples", "0", "1<=x<=65536"),
    ],
)
def test_values_out_of_range_name_option_value_and_range(option, value, allowed):
    result = CliRunner().invoke(cli, ["generate", "anywhere", option, value])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': {value} is not in the range {allowed}" in result.stderr


def test_a_temperature_that_is_no_number_is_refused():
    result = CliRunner().invoke(cli, ["generate", "anywhere", "--temperature", "nan"])
    assert result.exit_code == 2
    assert "'--temperature': nan is not a finite number; allowed: x>=0" in result.stderr


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (run / "checkpoints" / "step-00000010").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert call(copy, "--prompt", "a", "--max-tokens", 1)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert "model.safetensors" in fails(copy, "--prompt", "a")


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    code = (
        "import sys; from retnet.cli import cli; cli(['generate', '--help'], standalone_mode=False);"
        "sys.exit(' '.join({'torch', 'numpy', 'tokenizers'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--repetition-penalty" in done.stdout


@contextmanager
def endless(run, *args):
    """A `retnet generate` process that does not end by itself."""
    words = ["generate", run, "--prompt", "a", "--temperature", "0", "--max-tokens", "100000000", *args]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*RETNET, *words], **pipes, env=buffered) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_ctrl_c_ends_with_what_was_made(run):
    with endless(run, "--stats") as process:
        assert len(os.read(process.stdout.fileno(), 10_000)) < 1000  # it streams: no buffer is filled first
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert [line.split(b":")[0] for line in err.splitlines()] == [b"prefill", b"decode"]


@pytest.mark.slow
def test_a_closed_pipe_ends_without_a_traceback(run):
    with endless(run) as process:
        process.stdout.read(8)
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == b""
