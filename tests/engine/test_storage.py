"""Where sessions are written: directories and buckets, whole or not at all, and no update lost."""

import os
import subprocess
import sys
import threading
import uuid

import pytest

from retnet.engine import versioned_files
from retnet.engine.storage import open_storage
from retnet.engine.versioned_files import KEPT, ConflictError, Versioned, VersionedFiles
from retnet.settings import UserError


@pytest.fixture(params=["folder", "file", "memory"])
def url(request, tmp_path):
    places = {
        "folder": str(tmp_path / "a" / "b"),
        "file": f"file://{tmp_path}/a/b",
        "memory": f"memory://{uuid.uuid4().hex}/b",
    }
    return places[request.param]


def test_files_are_read_written_listed_and_removed(url):
    storage = open_storage(url)
    assert storage.names() == storage.names("no") == []
    assert storage.read("one.txt") is None
    storage.write("one.txt", b"1")
    storage.write("one.txt", b"2")
    storage.write("two/three", b"3")
    assert open_storage(url).read("one.txt") == b"2"
    assert storage.names() == ["one.txt", "two"]
    assert storage.names("two") == ["three"]
    storage.remove("one.txt")
    storage.remove("one.txt")
    assert storage.read("one.txt") is None
    storage.remove("two/three")
    assert storage.names("two") == []


def test_a_file_is_created_once(url):
    storage = open_storage(url)
    assert storage.create("a", b"first")
    assert not storage.create("a", b"second")
    assert storage.read("a") == b"first"


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "a/../b", "/etc/passwd", ".hidden", "a//b", "a\0", "ä", "a\n"]
)
def test_names_are_never_paths(url, name):
    storage = open_storage(url)
    for verb in (storage.read, storage.remove, lambda name: storage.write(name, b"x")):
        with pytest.raises(ValueError, match="is no name of a file"):
            verb(name)


def test_what_is_left_over_is_swept(url):
    storage = open_storage(url)
    for name in "abc":
        storage.write(name, b"x")
    storage.write("folder/d", b"x")
    if not url.startswith("memory"):
        path = url.removeprefix("file://")
        with open(f"{path}/.c.0.partial", "wb") as file:  # of a writer that was killed
            file.write(b"half")
    assert storage.sweep({"a"}, 60) == 0
    assert storage.sweep({"a"}, 0) == (2 if url.startswith("memory") else 3)
    assert storage.names() == ["a", "folder"]
    if not url.startswith("memory"):
        assert sorted(os.listdir(path)) == ["a", "folder"]


@pytest.mark.slow
def test_a_killed_writer_leaves_no_half_file(tmp_path):
    """One is killed in the midst of writing: whoever reads sees all of a content or none, before and after."""
    code = f"""
from pathlib import Path
from retnet.engine.storage import DirectoryStorage
folder = DirectoryStorage(Path({str(tmp_path)!r}))
number = 0
while True:
    number += 1
    folder.write("file", str(number % 10).encode() * 3_000_000)
    if number == 1:
        print("began", flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"began\n"
    for _ in range(30):
        content = open_storage(tmp_path).read("file")
        assert len(content) == 3_000_000
        assert len({*content}) == 1
    writer.kill()
    writer.wait()
    writer.stdout.close()
    assert len({*open_storage(tmp_path).read("file")}) == 1
    open_storage(tmp_path).sweep({"file"}, 0)
    assert os.listdir(tmp_path) == ["file"]


def test_a_place_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write the directory"):
        open_storage(tmp_path / "file" / "b")
    with pytest.raises(UserError, match=r"cannot open nothing://x: .*nothing"):
        open_storage("nothing://x")


# -- generations ------------------------------------------------------------------------------------------------


def test_a_change_of_what_another_has_changed_is_refused(url, monkeypatch):
    one, two = (VersionedFiles(open_storage(url), "sessions") for _ in range(2))
    assert one.load("s") is None
    assert one.generation("s") == 0
    assert one.save("s", b"made", 0) == 1
    with pytest.raises(ConflictError, match="s was changed by another process"):
        two.save("s", b"also made", 0)
    assert two.load("s") == Versioned(b"made", 1)
    assert two.save("s", b"by two", 1) == 2
    with pytest.raises(ConflictError):
        one.save("s", b"by one", 1)
    with pytest.raises(ConflictError):
        one.remove("s", 1)
    assert one.generation("s") == 2
    assert one.load("s") == Versioned(b"by two", 2)
    for generation in range(2, 8):
        one.save("s", b"more", generation)
    assert len(open_storage(url).names("sessions/s")) == 8  # for whoever stands still a while
    monkeypatch.setattr(versioned_files, "SECONDS", 0)
    for generation in range(8, 24):
        one.save("s", b"more", generation)
    assert len(open_storage(url).names("sessions/s")) == KEPT
    one.remove("s", 24)
    assert one.load("s") is None
    with pytest.raises(ConflictError):
        two.save("s", b"back", 24)
    assert one.names() == ["s"]
    assert one.sweep(60) == 0
    assert one.sweep(0) == 1
    assert one.generation("s") == 0


def test_a_damaged_generation_is_passed_over(url, caplog):
    storage = open_storage(url)
    records = VersionedFiles(storage)
    records.save("s", b"one", 0)
    records.save("s", b"two", 1)
    sealed = storage.read("s/0000000002")
    for damaged in (b"", sealed[:-1], sealed[:50] + bytes([sealed[50] ^ 1]) + sealed[51:]):
        storage.write("s/0000000002", damaged)
        assert records.load("s") == Versioned(b"one", 1)
        assert "generation 2 of" in caplog.text
    assert records.save("s", b"three", 1) == 3
    assert records.load("s") == Versioned(b"three", 3)


def test_nobody_loses_an_update(url):
    """Six writers add one to a number 20 times each, and try again when another was first."""
    VersionedFiles(open_storage(url)).save("n", b"0", 0)
    conflicts = []

    def add():
        records = VersionedFiles(open_storage(url))
        for _ in range(20):
            while True:
                found = records.load("n")
                try:
                    records.save("n", str(int(found.content) + 1).encode(), found.generation)
                    break
                except ConflictError:
                    conflicts.append(1)

    writers = [threading.Thread(target=add) for _ in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert VersionedFiles(open_storage(url)).load("n") == Versioned(b"120", 121)


def test_a_request_whose_answer_was_lost_counts_as_made(monkeypatch):
    storage = open_storage(f"memory://{uuid.uuid4().hex}")
    pipe = storage._fs.pipe_file

    def lost(path, value, mode="overwrite"):
        pipe(path, value, mode=mode)
        raise TimeoutError("no answer")

    monkeypatch.setattr(storage._fs, "pipe_file", lost)
    assert storage.create("a", b"mine")
    monkeypatch.setattr(storage._fs, "pipe_file", pipe)
    assert not storage.create("a", b"another's")
    monkeypatch.setattr(storage._fs, "cat_file", lambda path: 1 / 0)
    with pytest.raises(OSError, match="ZeroDivisionError"):
        storage.read("a")
