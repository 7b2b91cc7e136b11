"""Every verb with every fault that files and streams have: one sentence and a status that is not 0, never a traceback."""

import os
import re
import shutil
import socket

import pytest

from retnet.settings import load
from retnet.studies.folder import StudyFolder
from retnet.studies.study import load_study
from retnet.train.config import RunConfig
from retnet.train.trainer import train
from tests.evals.local_tasks import write_tasks
from tests.helpers.places import Places

pytestmark = pytest.mark.slow
TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n"
CONFIG = """
[model]
d_model = 16
num_layers = 1
mixer = {{ name = "retention", num_heads = 2 }}
[data]
corpus = "{corpus}"
cache = "{cache}"
[train]
steps = 3
seq_len = 16
batch_size = 2
warmup_steps = 1
precision = "fp32"
"""
STUDY = """
title = "A study"
about = "About it."
[measure]
name = "quality"
seeds = 1
rows = [{{ label = "A", config = "{config}" }}]
"""
RESULT = {
    "learning_rate": 1e-3,
    "seed": 0,
    "tokens": 96,
    "parameters": 1000,
    "sets": {"in-domain": {"nats_per_token": 5.0, "perplexity": 150.0, "bits_per_byte": 7.0}},
    "curve": {"steps": [1, 2], "loss": [5.0, 4.0]},
}


def supplied(shop, place):
    """The place, with copies of the run and the study that some verbs go on with."""
    shutil.copytree(shop.home / "content", place / "content")
    return place


class Shop:
    """What commands need: a configuration, a run, prepared text, questions, a study."""

    def __init__(self, home):
        self.home, self.corpus, self.cache = home, home / "corpus", home / "cache"
        self.corpus.mkdir()
        for i in range(40):
            (self.corpus / f"{i}.txt").write_text(f"Text {i}. {TEXT * 3}")
        self.config, self.run = home / "tiny.toml", home / "content" / "run"
        self.config.write_text(CONFIG.format(corpus=self.corpus, cache=self.cache))
        train(load(RunConfig, self.config), self.run)
        self.prepared = next(self.cache.iterdir())
        self.tasks = write_tasks(home / "tasks")
        self.plan = home / "study.toml"
        self.plan.write_text(STUDY.format(config=self.config))
        study = StudyFolder(home / "content" / "study")
        study.create(load_study(self.plan), {})
        study.write_result("a.lr-0.001.seed-0", RESULT)

    def words(self, verb, place):
        """A command; what it writes goes to `place`, where `content` is a copy of run and study."""
        quick = ("bench", verb.removeprefix("bench "), "--quick", "--out", place)
        few = ("--train.steps", 5)
        return {
            "bench decode": quick,
            "bench ops": quick,
            "bench train": quick,
            "config list": ("config", "list"),
            "config show": ("config", "show", self.config),
            "convert": ("convert", self.run, place / "folder"),
            "convert --to run": ("convert", self.run, place / "checkpoint", "--to", "run"),
            "data check": ("data", "check", self.prepared),
            "data prepare": ("data", "prepare", "--corpus", self.corpus, "--out", place),
            "data tokenizer": ("data", "tokenizer", self.corpus, "--vocab-size", 280, "--out", place / "bpe.json"),
            "demo": ("demo", self.config, "--run-dir", place / "demo"),
            "eval perplexity": (
                "eval", "perplexity", self.run, "--data", self.corpus, "--lengths", 32, "--out", place / "p.json",
            ),
            "eval tasks": (
                "eval", "tasks", self.run, "--tasks", "copa", "--local", self.tasks, "--num-fewshot", 0, "--limit", 1,
                "--out", place / "t.json",
            ),
            "generate": ("generate", self.run, "--prompt", "a", "--max-tokens", 4),
            "serve": ("serve", self.run, "--port", 0, "--sessions", place / "sessions"),
            "study": ("study", self.plan, "--out", place / "study"),
            "study report": ("study", "report", place / "content" / "study"),
            "train": ("train", self.config, "--run-dir", place / "run"),
            "train --resume": ("train", self.config, "--run-dir", place / "content" / "run", "--resume", *few),
        }[verb]  # fmt: skip


WRITING = (
    "bench decode", "bench ops", "bench train", "convert", "convert --to run", "data prepare", "data tokenizer", "demo",
    "eval perplexity", "eval tasks", "serve", "study", "study report", "train", "train --resume",
)  # fmt: skip
QUICK = ("config list", "config show", "data check", "generate")  # they write nothing but what they print
READING = ("data prepare", "data tokenizer", "eval perplexity", "train")
# each is minutes of work that ends in the same few lines of code as the others
LONG = {"bench decode", "bench train", "study", "eval tasks"}
ENDLESS = {"serve"}  # once it serves


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def places(shop, tmp_path_factory):
    found = Places(tmp_path_factory.mktemp("places"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def full(places, shop):
    """A folder on a full disk, with a run and a study in it."""
    if not places.mounts:
        pytest.skip("nothing can be mounted here; see test_a_limit_on_the_size_of_files")
    return places.make("full", "full", shop.home / "content")


@pytest.fixture(scope="module")
def read_only(places, shop):
    if not places.mounts:
        pytest.skip("nothing can be mounted here; see test_a_file_where_a_folder_should_be")
    return places.make("read-only", "read-only", shop.home / "content")


def one_sentence(done):
    """The sentence that a command ended with."""
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    assert done.returncode not in (0, 120), done.stdout + done.stderr
    said = re.findall(r"^(?:retnet: error|Error): (.*)$", done.stderr, flags=re.M)  # ours, or click's
    assert len(said) == 1, done.stderr
    assert done.stderr.rstrip().endswith(said[0])
    return said[0]


@pytest.mark.parametrize("verb", WRITING)
def test_a_full_disk(verb, shop, places, full):
    said = one_sentence(places.run(shop.words(verb, full), shop.home))
    assert re.match(r"cannot write .*\S+: (\S+: )?No space left on device", said), said
    assert str(full) in said
    if verb == "train --resume":
        assert "step-00000003 is whole" in said or "run directory" in said


@pytest.mark.parametrize("verb", WRITING)
def test_a_read_only_directory(verb, shop, places, read_only):
    said = one_sentence(places.run(shop.words(verb, read_only), shop.home))
    assert re.match(r"cannot write .*Read-only file system", said), said
    assert str(read_only) in said


@pytest.mark.parametrize("verb", QUICK)
@pytest.mark.parametrize("kind", ["full", "read_only"])
def test_what_writes_nothing_works_anywhere(verb, kind, shop, places, request):
    place = request.getfixturevalue(kind)
    done = places.run(shop.words(verb, place), place)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("verb", WRITING)
def test_a_limit_on_the_size_of_files(verb, shop, places, tmp_path):
    """Where nothing can be mounted, this is as near to a full disk as one gets."""
    if verb in LONG:
        pytest.skip("minutes, and no other code than the others")
    words = shop.words(verb, supplied(shop, tmp_path))
    said = one_sentence(places.run(words, shop.home, limit=0))
    assert re.match(r"cannot write .*File too large", said), said
    assert str(tmp_path) in said
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("verb", WRITING)
def test_a_file_where_a_folder_should_be(verb, shop, places, tmp_path):
    (tmp_path / "file").touch()
    said = one_sentence(places.run(shop.words(verb, tmp_path / "file"), shop.home))
    assert "file" in said


@pytest.mark.parametrize("verb", [*QUICK, *WRITING])
def test_an_argument_that_is_not_utf8(verb, shop, places, tmp_path):
    words = [*shop.words(verb, tmp_path), os.fsdecode(b"caf\xe9")]
    said = one_sentence(places.run(words, shop.home))
    assert said.startswith("the argument 'caf\ufffd' is not UTF-8 text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [*QUICK, *WRITING])
def test_a_directory_that_is_gone(verb, shop, places, tmp_path):
    (tmp_path / "gone").mkdir()
    said = one_sentence(places.run(shop.words(verb, tmp_path), tmp_path / "gone", gone=True))
    assert said == "the current directory is gone; change to one that is there"


@pytest.mark.parametrize("verb", [*QUICK, *WRITING])
def test_closed_standard_output(verb, shop, places, tmp_path):
    said = one_sentence(places.run(shop.words(verb, tmp_path), shop.home, close=[1]))
    assert said.startswith("standard output is closed")
    assert not list(tmp_path.iterdir())  # no work was done for nothing


@pytest.mark.parametrize("verb", sorted({*QUICK, *WRITING} - LONG - ENDLESS))
@pytest.mark.parametrize("fault", ["full", "deaf"])
def test_standard_output_that_takes_nothing(verb, fault, shop, places, tmp_path):
    words = shop.words(verb, supplied(shop, tmp_path))
    done = places.run(words, shop.home, **({"deaf": True} if fault == "deaf" else {"stdout": "/dev/full"}))
    if fault == "full":
        assert "standard output: No space left on device" in one_sentence(done)
    else:  # `| head`: nobody reads, and nobody is told
        assert done.returncode not in (0, 120)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("verb", sorted({*QUICK, *WRITING} - LONG - ENDLESS))
def test_closed_standard_input_and_errors(verb, shop, places, tmp_path):
    """What reads no text from there works, and no file of ours gets the number of the one that is closed."""
    words = shop.words(verb, supplied(shop, tmp_path))
    done = places.run(words, shop.home, close=[0, 2])
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout


def test_a_prompt_from_closed_standard_input(shop, places):
    done = places.run(["generate", shop.run], shop.home, close=[0])
    assert one_sentence(done) == "cannot read standard input: it is closed; give --prompt, or --prompt-file"


def test_a_name_with_a_line_break(shop, places, tmp_path):
    said = one_sentence(places.run(["generate", tmp_path / "a\nb\x1b[31m", "--prompt", "a"], shop.home))
    assert r"a\nb\x1b[31m" in said


SERVING = {
    "no model": (["nowhere"], r"no run at nowhere"),
    "a file that is no model": (["keys"], r"keys is a file, and neither of a run nor of a checkpoint"),
    "slots": (["{run}", "--slots", "0"], r"slots"),
    "no such port": (["{run}", "--port", "70000"], r"port"),
    "a port in use": (
        ["{run}", "--port", "{port}"],
        r"cannot listen at 127.0.0.1 port \d+: Address already in use",
    ),
    "no host": (["{run}", "--host", ""], r"--host is empty"),
    "unknown host": (
        ["{run}", "--host", "no.such.host.invalid"],
        r"cannot listen at no.such.host.invalid port",
    ),
    "a host that is no name": (["{run}", "--host", "a" * 80], r"cannot listen at a+ port \d+: .*too long"),
    "no keys file": (
        ["{run}", "--api-key-file", "missing"],
        r"cannot read --api-key-file missing: No such file",
    ),
    "a folder of keys": (["{run}", "--api-key-file", "."], r"cannot read --api-key-file \.: Is a directory"),
    "a file without keys": (["{run}", "--api-key-file", "keys"], r"--api-key-file keys has no keys"),
    "short keys": (["{run}", "--api-key-file", "short"], r"has a key of 3 characters"),
    "keys that no request can carry": (
        ["{run}", "--api-key-file", "control"],
        r"control has a key with a control character",
    ),
    "keys in Latin-1": (
        ["{run}", "--api-key-file", "latin"],
        r"--api-key-file latin is not UTF-8 text: byte 3",
    ),
    "keys in UTF-16": (["{run}", "--api-key-file", "wide"], r"wide is not UTF-8 text: .* UTF-16"),
    "sessions elsewhere": (["{run}", "--sessions", "s3://bucket"], r"cannot open s3://bucket: "),
    "sessions in a file": (
        ["{run}", "--sessions", "keys"],
        r"cannot write the directory keys.*: (File exists|Not a directory)",
    ),
    "no room for sessions": (["nowhere", "--sessions", "new/er"], r"no run at nowhere"),
}


@pytest.mark.parametrize("what", SERVING)
def test_a_server_that_cannot_start(what, shop, places, tmp_path):
    """One sentence, and nothing is left behind."""
    words, want = SERVING[what]
    for name, content in {"keys": b"# none\n\n", "short": b"abc\n", "latin": b"caf\xe9-0123456\n"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "control").write_text("sk-01234\x01567")
    (tmp_path / "wide").write_text("sk-0123456789", encoding="utf-16")
    before = sorted(tmp_path.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        own = [] if "--port" in words else ["--port", "0"]
        said = one_sentence(
            places.run(["serve", *(word.format(run=shop.run, port=port) for word in words), *own], tmp_path)
        )
    assert re.search(want, said), said
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Parquet files: cut, overwritten in the middle, with one column twice, with none of the name, of numbers."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    home = tmp_path_factory.mktemp("tables")
    texts = [f"{TEXT} {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"text": texts}), home / "whole.parquet")
    whole = (home / "whole.parquet").read_bytes()
    (home / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (home / "overwritten.parquet").write_bytes(b"PAR1" + bytes(range(256)) * 20 + whole[5124:])
    arrays = [pyarrow.array(texts)] * 2
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["text", "text"]), home / "twice.parquet")
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["other", "other"]), home / "none.parquet")
    parquet.write_table(pyarrow.table({"text": list(range(9))}), home / "numbers.parquet")
    return home


@pytest.mark.parametrize("verb", READING)
@pytest.mark.parametrize("name", ["cut", "overwritten", "twice", "none", "numbers"])
def test_tables_that_cannot_be_read(verb, name, shop, places, tables, tmp_path):
    file = tables / f"{name}.parquet"
    words = [file if word == shop.corpus else word for word in shop.words(verb, tmp_path)]
    words += ["--data.corpus", file] if verb == "train" else []
    said = one_sentence(places.run(words, shop.home))
    assert file.name in said
    assert re.search(r"unreadable|no text|is empty", said), said


@pytest.mark.parametrize(
    "verb", ["train", "train --resume", "convert", "data prepare", "study report", "bench ops"]
)
def test_a_disk_that_fills_up_on_the_way(verb, shop, places):
    """Whatever is written last when the space runs out, it is said, what was whole stays whole, and it can be gone on."""
    if not places.mounts:
        pytest.skip("nothing can be mounted here")
    free, ended = 0, []
    while not ended or ended[-1]:
        place = places.make(f"{verb.replace(' ', '')}-{free}", "full", shop.home / "content", free)
        words = shop.words(verb, place)
        done = places.run(words, shop.home)
        ended.append(done.returncode)
        if done.returncode:
            said = one_sentence(done)
            assert "No space left on device" in said, said
            places.relieve(place)
            force = {"train": ["--resume-or-start"], "convert": []}.get(verb, [])
            if verb != "bench ops":  # which has nothing to go on with
                again = places.run([*words, *force], shop.home)
                assert again.returncode == 0, (free, said, again.stderr)
        free = 4 * free or 4096
    assert len(ended) > 2
