"""Corpora at URLs: the same text gives the same shards, wherever it lies; what a network loses is said."""

import gzip
import http.server
import threading
from dataclasses import replace
from functools import partial

import fsspec
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from retnet.data import prepare, sources
from retnet.settings import UserError

RECORDS = "".join(f'{{"text": "record {i} {"word " * (i % 9)}"}}\n' for i in range(300)).encode()


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def fill(folder):
    """One file of each kind, some compressed, and what is not read."""
    folder.joinpath("sub").mkdir()
    (folder / "a.txt").write_bytes(
        "ein Text, Zeile für Zeile\n".encode() * 99 + b"\xff broken\n" + b"\xef\xbb\xbfend"
    )
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(RECORDS))
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"another text\n" * 50))
    parquet.write_table(
        pyarrow.table({"text": [f"row {i}" for i in range(400)]}), folder / "sub" / "d.parquet"
    )
    (folder / "e.png").write_bytes(b"no text")


def files_of(prepared):
    return {
        p.name: p.read_bytes()
        for p in prepared.directory.iterdir()
        if p.suffix in (".tokens", ".offsets", ".json")
    }


def test_a_folder_in_memory_is_the_corpus_that_it_is_on_disk(config, corpus, memory, tmp_path):
    fill(corpus)
    memory.put(str(corpus), "/bucket/corpus", recursive=True)
    config = replace(config, validation_fraction=0.1)
    seen = []
    local = prepare(replace(config, cache=str(tmp_path / "local")), shard_tokens=2000)
    remote = prepare(
        replace(config, corpus="memory://bucket/corpus"), on_problem=seen.append, shard_tokens=2000
    )
    assert remote.manifest.fingerprint == local.manifest.fingerprint
    ours, theirs = files_of(remote), files_of(local)
    assert {n: c for n, c in ours.items() if n != "manifest.json"} == {
        n: c for n, c in theirs.items() if n != "manifest.json"
    }
    assert len(ours) > 8
    assert [problem.kind for problem in seen] == ["left out", "invalid UTF-8", "byte order mark"]
    assert seen[1].file == "memory:///bucket/corpus/a.txt"
    assert prepare(replace(config, corpus="memory://bucket/corpus/*.zst")).manifest.corpora[0].files == 1
    (one,) = sources.find("memory://bucket/corpus/sub/d.parquet").sources
    assert (one.name, one.kind) == ("d.parquet", ".parquet")
    memory.pipe("/bucket/corpus/a.txt", b"other text\n" * 200)
    other = prepare(replace(config, corpus="memory://bucket/corpus"))
    assert other.manifest.fingerprint != remote.manifest.fingerprint


def test_what_is_lost_on_the_way_is_no_end_of_a_corpus(config, memory, monkeypatch):
    memory.pipe("/a.jsonl", RECORDS)
    config = replace(config, corpus="memory://a.jsonl", validation_fraction=0.1)
    reads, read = [], type(memory.open("/a.jsonl")).read

    def lost(self, size=-1):
        reads.append(size)
        if len(reads) > 2:
            raise TimeoutError("the network is gone")
        return read(self, size)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory.open("/a.jsonl")), "read", lost)
        with pytest.raises(
            UserError, match=r"cannot read memory://.*a\.jsonl: TimeoutError: the network is gone"
        ):
            prepare(config)
    assert prepare(config).manifest.train.documents > 200


def test_what_is_lost_in_any_read_is_said_and_not_remembered(config, memory, monkeypatch, tmp_path):
    """Also while files are read to be known: what a network loses is no damage of theirs."""
    table = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"text": ["row"]}), table)
    contents = {
        "a.txt": b"a text\n" * 20,
        "b.txt.gz": gzip.compress(b"b"),
        "c.jsonl.zst": zstandard.compress(RECORDS),
        "d.parquet": table.read_bytes(),
    }
    for name, content in contents.items():
        memory.pipe(f"/all/{name}", content)
    file, reads = type(memory.open("/all/a.txt")), 0
    read = file.read

    def lost(self, size=-1):
        nonlocal reads
        reads += 1
        if reads == lost_at:
            raise TimeoutError("the network is gone")
        return read(self, size)

    config, said = replace(config, corpus="memory://all", validation_fraction=0.1), []
    with monkeypatch.context() as patch:
        patch.setattr(file, "read", lost)
        for lost_at in range(1, 100):
            reads = 0
            try:
                found = prepare(replace(config, cache=str(tmp_path / str(lost_at))), verify=True)
                break
            except UserError as error:
                said.append(str(error))
    assert [words for words in said if "TimeoutError: the network is gone" not in words] == []
    assert reads < lost_at
    assert lost_at > 2 * len(contents)
    again = prepare(replace(config, cache=str(tmp_path / "again")))
    assert again.manifest.fingerprint == found.manifest.fingerprint


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("memory://nothing/here", "no corpus 'memory://nothing/here': FileNotFoundError"),
        ("memory://*.txt", r"no corpus 'memory://\*\.txt': nothing is there"),
        ("zip://a.txt::memory://b.zip", "URLs within URLs"),
        ("nonsense://a", "Protocol not known: nonsense"),
        ("s3://bucket/a.txt", "cannot read s3://bucket/a.txt: .*s3fs"),
        ("nonsense://me:word@a/b?key=word", "^no corpus 'nonsense://…@a/b[?]…': Protocol not known"),
    ],
)
def test_urls_that_lead_nowhere(memory, spec, said):
    with pytest.raises(UserError, match=said):
        sources.find(spec)


def test_hf_urls_are_urls(monkeypatch):
    asked = []
    monkeypatch.setattr(sources.remote, "files", lambda spec: asked.append(spec) or [])
    with pytest.raises(UserError, match="has no file of the kinds"):
        sources.find("hf://datasets/name/data")
    assert asked == ["hf://datasets/name/data"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_files_behind_http(config, tmp_path):
    """One, and those of a page of links, which says nothing of their sizes or times; keys in a URL are not told."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(RECORDS))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        config = replace(config, validation_fraction=0.1)
        found = [
            prepare(replace(config, corpus=f"{url}/{name}"), verify=True)
            for name in ("a.jsonl.gz", "a.jsonl.gz?signature=word", "*.gz")
        ]
        with pytest.raises(
            UserError, match=r"no corpus 'http://127[^']*/none\.txt\?…': FileNotFoundError"
        ) as error:
            prepare(replace(config, corpus=f"{url}/none.txt?signature=word"))
        server.shutdown()
    assert "word" not in str(error.value)
    assert "word" not in str(found[1].manifest)
    local = prepare(replace(config, corpus=str(tmp_path / "a.jsonl.gz")))
    assert {one.train.fingerprint for one in found} == {local.train.fingerprint}
