"""Preparing: what the shards hold, what is reused, what a kill leaves, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from retnet.data import DataConfig, Tokenizer, load, prepare
from retnet.data.split import text_share
from retnet.settings import UserError, build, dump

DOCUMENTS = [f"document {i} " + "text <|bos|> " * (i % 7) for i in range(200)]


def texts_of(prepared, shards):
    spans = [shards.document_span(i) for i in range(shards.num_documents)]
    streams = [shards.tokens(*span).tolist() for span in spans]
    assert all(stream[0] == shards.bos_id and shards.bos_id not in stream[1:] for stream in streams)
    assert [start for start, _ in spans][1:] == [stop for _, stop in spans][:-1]
    return [prepared.tokenizer.decode(stream) for stream in streams]


def files_of(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


@pytest.mark.parametrize("shard_tokens", [1 << 20, 500, 40])
def test_every_document_lies_on_one_side_in_order(config, corpus, jsonl, shard_tokens):
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    prepared = prepare(replace(config, validation_fraction=0.2), shard_tokens=shard_tokens)
    assert texts_of(prepared, prepared.train) == [text for text in DOCUMENTS if text_share(text) >= 0.2]
    assert texts_of(prepared, prepared.validation) == [text for text in DOCUMENTS if text_share(text) < 0.2]
    for shards in (prepared.train, prepared.validation):
        texts = texts_of(prepared, shards)
        assert shards.num_bytes == sum(len(text.encode()) for text in texts)
        assert shards.num_tokens == shards.num_bytes + len(texts)
        assert shards.dtype == np.uint16
        for document in range(shards.num_documents):
            start, stop = shards.document_span(document)
            assert {shards.document_at(token) for token in range(start, stop)} == {document}
        for outside in (-1, shards.num_tokens):
            with pytest.raises(IndexError):
                shards.document_at(outside)
    counts = prepared.manifest.train
    assert (counts.documents, counts.tokens) == (prepared.train.num_documents, prepared.train.num_tokens)
    assert prepared.manifest.corpora[0].files == 1


@pytest.mark.slow
def test_a_vocabulary_beyond_16_bits_takes_32(config, corpus, jsonl, tmp_path):
    plan = json.loads(Tokenizer.load("bytes")._json)
    plan["added_tokens"].append({**plan["added_tokens"][0], "id": 70_000, "content": "<far>"})
    plan["model"]["vocab"] |= {f"filler{i}": i for i in range(257, 70_000)}
    (tmp_path / "large.json").write_text(json.dumps(plan))
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    prepared = prepare(replace(config, tokenizer=str(tmp_path / "large.json"), validation_fraction=0.2))
    assert prepared.train.dtype == np.uint32
    assert prepared.manifest.dtype == "uint32"
    assert texts_of(prepared, prepared.train) == [text for text in DOCUMENTS if text_share(text) >= 0.2]


def test_a_validation_corpus_of_its_own(config, corpus, jsonl, tmp_path):
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    (tmp_path / "v.txt").write_text("validate")
    (tmp_path / "w.txt").write_text("this")
    both = (str(tmp_path / "v.txt"), str(tmp_path / "w.txt"))
    prepared = prepare(replace(config, validation=both))
    assert texts_of(prepared, prepared.train) == DOCUMENTS
    assert texts_of(prepared, prepared.validation) == ["validate", "this"]


def test_one_file_of_text_has_its_end_held_out(config, corpus):
    text = "".join(f"line {i}\n" for i in range(5000))
    (corpus / "a.txt").write_text(text)
    prepared = prepare(config)
    (train,), (validation,) = texts_of(prepared, prepared.train), texts_of(prepared, prepared.validation)
    assert train + validation == text
    assert validation.startswith("line ")
    assert 0.01 < len(validation) / len(text) < 0.03


def test_problems_are_handed_on_and_counted(config, corpus):
    bad = [f'{{"text": "fine {i}"}}' for i in range(100)] + ["{", '{"text": ""}', "[]"]
    (corpus / "a.jsonl").write_text("\n".join(bad))
    (corpus / "b.jsonl.gz").write_bytes(b"nonsense")
    seen = []
    prepared = prepare(replace(config, validation_fraction=0.2), on_problem=seen.append, shard_tokens=300)
    assert prepared.manifest.problems == {"bad JSON": 2, "empty document": 1, "unreadable": 1}
    assert prepared.manifest.examples == [str(problem) for problem in seen]
    assert [problem.line for problem in seen] == [101, 102, 103, 0]
    prepare(replace(config, validation_fraction=0.2), on_problem=seen.append, shard_tokens=300)
    assert len(seen) == 4  # nothing is read again


def test_file_names_need_not_be_utf8(config, corpus):
    (corpus / "a.txt").write_text("line\n" * 100)
    Path(os.fsdecode(os.fsencode(corpus) + b"/\xff.txt")).touch()
    prepared = prepare(config)
    assert prepared.manifest.examples == [f"{corpus}/\ufffd.txt: empty document"]


def test_progress_ends_at_everything(config, corpus, jsonl):
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    seen = []
    prepared = prepare(replace(config, validation_fraction=0.2), on_progress=seen.append)
    assert seen[-1].bytes_read == seen[-1].bytes_total == (corpus / "a.jsonl").stat().st_size
    assert seen[-1].documents == 200
    assert seen[-1].tokens == prepared.train.num_tokens + prepared.validation.num_tokens


def test_what_is_prepared_is_reused_and_what_changed_is_prepared_anew(config, corpus, jsonl, tmp_path):
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    config = replace(config, validation_fraction=0.2)
    first = prepare(config)
    stamp = (first.directory / "manifest.json").stat().st_mtime_ns
    assert prepare(config).directory == first.directory
    assert (first.directory / "manifest.json").stat().st_mtime_ns == stamp

    Tokenizer.train(DOCUMENTS, 300).save(tmp_path / "bpe.json")
    changes = [{"validation_fraction": 0.3}, {"tokenizer": str(tmp_path / "bpe.json")}, {"text_field": "txt"}]
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    os.utime(corpus / "a.jsonl", ns=(1, 1))
    others = [prepare(replace(config, **change)) for change in changes[:2]] + [prepare(config)]
    assert len({p.directory for p in [first, *others]}) == 3
    assert others[2].directory == first.directory  # touched, but the same content
    assert len({first.train.fingerprint, others[0].train.fingerprint, others[1].train.fingerprint}) == 3
    assert first.train.fingerprint != first.validation.fingerprint
    with pytest.raises(UserError, match="empty"):
        prepare(replace(config, **changes[2]))


def test_a_prepared_folder_stands_for_itself(config, corpus, jsonl, tmp_path):
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    first = prepare(replace(config, validation_fraction=0.2))
    (corpus / "a.jsonl").unlink()
    again = prepare(DataConfig(corpus=str(first.directory), cache=str(tmp_path / "unused")))
    assert again.train.fingerprint == first.train.fingerprint
    assert not (tmp_path / "unused").exists()
    Tokenizer.train(DOCUMENTS, 300).save(tmp_path / "bpe.json")
    with pytest.raises(UserError, match=r"another tokenizer; set data\.tokenizer to '.*tokenizer\.json'"):
        prepare(DataConfig(corpus=str(first.directory), tokenizer=str(tmp_path / "bpe.json")))
    with pytest.raises(UserError, match=r"leave data\.validation out"):
        prepare(DataConfig(corpus=str(first.directory), validation="stdlib"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda d: (d / "train-00000.tokens").write_bytes(b"12"),
            r"train-00000\.tokens should have \d+ bytes, found 2",
        ),
        (lambda d: (d / "validation-00000.offsets").unlink(), r"validation-00000\.offsets .* found None"),
        (lambda d: flip(d / "train-00000.tokens"), r"train-00000\.tokens is not what was written"),
        (lambda d: flip(d / "train-00000.offsets"), r"train-00000\.offsets is not what was written"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json cannot be read"),
        (
            lambda d: Tokenizer.train(["abc"], 260).save(d / "tokenizer.json"),
            r"its tokenizer\.json is not the one",
        ),
    ],
)
def test_a_damaged_folder_is_refused(config, corpus, jsonl, harm, said):
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    config = replace(config, validation_fraction=0.2)
    directory = prepare(config).directory
    harm(directory)
    for use in (lambda: load(directory), lambda: prepare(config)):
        with pytest.raises(UserError, match=f"is damaged: {said}.*delete the folder"):
            use()


def test_unfinished_and_future_folders_are_refused(config, corpus, jsonl, tmp_path):
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    directory = prepare(replace(config, validation_fraction=0.2)).directory
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="version 99; this library reads retnet-tokens version 2"):
        load(directory)
    old = [{k: v for k, v in corpus.items() if k != "left_out"} for corpus in manifest["corpora"]]
    (directory / "manifest.json").write_text(json.dumps({**manifest, "version": 1, "corpora": old}))
    for use in (load, lambda d: prepare(DataConfig(corpus=str(d)))):
        with pytest.raises(UserError, match=r"version 1; this library .* prepare it again from the text"):
            use(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished folder"):
        load(directory)


def test_empty_corpora_and_empty_sides_are_said(config, corpus, jsonl):
    (corpus / "a.jsonl").write_text('{"text": ""}\n{')
    with pytest.raises(
        UserError, match=r"corpus is empty.*1 × empty document, 1 × bad JSON; the first: .*a\.jsonl:1"
    ):
        prepare(config)
    jsonl(corpus / "a.jsonl", ["one document"])
    with pytest.raises(
        UserError, match=r"none of the 1 documents falls into the validation split.*data\.validation"
    ):
        prepare(config)
    assert not list(Path(config.cache).iterdir())


def test_a_disk_that_fills_up_is_said_and_the_next_call_goes_on(config, corpus, jsonl, monkeypatch):
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    config = replace(config, validation_fraction=0.2)
    whole = prepare(replace(config, cache=f"{config.cache}2"), shard_tokens=500)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match=r"cannot write to .*: No space left on device; what is finished stays"
        ):
            prepare(config, shard_tokens=500)
    (directory,) = Path(config.cache).iterdir()
    assert list(directory.glob("segment-*.json"))
    assert files_of(prepare(config, shard_tokens=500).directory) == files_of(whole.directory)


def test_configurations(tmp_path):
    config = DataConfig(corpus=("a", "b"), validation="c")
    import tomllib

    assert build(DataConfig, tomllib.loads(dump(config))) == config
    for wrong in ({"validation_fraction": 0.0}, {"validation_fraction": 1.0}, {"corpus": ""}, {"corpus": ()}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            DataConfig(**wrong)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*data\.cache"):
        prepare(DataConfig(cache=str(tmp_path / "file" / "below")))
    with pytest.raises(UserError, match=r"cannot write to .*: File name too long"):
        prepare(DataConfig(cache="x" * 5000))


# A process of its own, so that it can be killed and can have any number of threads.
PREPARE = """
import sys, msgspec, time
from retnet.data import DataConfig, prepare
slow = len(sys.argv) > 2
prepare(msgspec.json.decode(sys.argv[1], type=DataConfig), shard_tokens=20_000,
        on_problem=lambda p: print(p, flush=True), on_progress=lambda p: slow and time.sleep(0.05))
"""


def start(config, *arguments, **environment):
    words = [sys.executable, "-c", PREPARE, msgspec.json.encode(config).decode(), *arguments]
    return subprocess.Popen(words, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)


@pytest.fixture
def mixed(config, corpus, jsonl, tmp_path, monkeypatch):
    """Several kinds of files with problems, and a BPE tokenizer; small batches, so that there is time to kill."""
    jsonl(corpus / "a.jsonl", [f"{i} " + "word 🙂 <|bos|> " * (i % 50) for i in range(3000)])
    (corpus / "b.txt").write_text("a long text, 12 lines\n" * 30_000)
    (corpus / "c.jsonl").write_text('{"text": "x"}\n{\n{"text": ""}\n' * 1000)
    Tokenizer.train(["word 🙂 <|bos|> a long text, 12 lines 345"] * 10, 300).save(tmp_path / "bpe.json")
    return replace(config, tokenizer=str(tmp_path / "bpe.json"), validation_fraction=0.1)


@pytest.mark.slow
def test_killed_and_called_again_it_writes_the_same_bytes(mixed, tmp_path):
    whole = replace(mixed, cache=str(tmp_path / "whole"))
    assert start(whole).wait() == 0
    (expected,) = Path(whole.cache).iterdir()
    records, kills = 0, 0
    while kills < 3:
        process = start(mixed, "slow")
        while process.poll() is None:
            now = len(list(Path(mixed.cache).glob("*/segment-*.json")))
            if now > records:
                records = now
                time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    assert start(mixed).wait() == 0
    (resumed,) = Path(mixed.cache).iterdir()
    assert len(files_of(expected)) > 20
    assert files_of(resumed) == files_of(expected)


@pytest.mark.slow
def test_the_number_of_threads_does_not_show_and_callers_at_once_share_the_work(mixed, tmp_path):
    folders = []
    for threads, callers in (("1", 1), ("2", 2)):
        here = replace(mixed, cache=str(tmp_path / threads))
        running = [start(here, RAYON_NUM_THREADS=threads) for _ in range(callers)]
        assert [process.wait() for process in running] == [0] * callers
        folders.append(files_of(next(Path(here.cache).iterdir())))
    assert folders[0] == folders[1]


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """Nine times the corpus must not take noticeably more memory: a giant .txt and a giant .jsonl, 180 MB together."""
    peak = """
import resource, sys
from retnet.data import DataConfig, prepare
prepare(DataConfig(corpus=sys.argv[1], validation=sys.argv[2], cache=sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""
    (tmp_path / "v.txt").write_text("v")
    peaks = []
    for size in (10, 90):
        folder = tmp_path / str(size)
        folder.mkdir()
        with open(folder / "a.txt", "w") as text, open(folder / "b.jsonl", "w") as records:
            for number in range(size):
                text.write((f"line {number} of a giant text\n" * 50_000)[: 1 << 20])
                record = json.dumps({"text": f"words {number} " * 100}) + "\n"
                records.write(record * ((1 << 20) // len(record)))
        words = [sys.executable, "-c", peak, folder, tmp_path / "v.txt", tmp_path / "cache"]
        peaks.append(int(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 60, f"MiB at 20 MB and 180 MB of text: {peaks}"
