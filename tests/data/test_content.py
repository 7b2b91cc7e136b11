"""What files hold is known without reading them again, as long as nobody can have changed them."""

import os
import sqlite3
import time

import pytest

from retnet.data import DataConfig, content, prepare
from retnet.data.content import Contents
from retnet.data.sources import find
from retnet.io import cache_folder
from retnet.settings import UserError


@pytest.fixture(autouse=True)
def memory(tmp_path_factory, monkeypatch):
    """A cache of the test's own, in which files count as settled at once."""
    monkeypatch.setenv("RETNET_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(content, "_SETTLED", -1.0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    return path


def bytes_read(path, **options):
    """How many bytes it took to know a file."""
    read = []
    with Contents(on_bytes=read.append, **options) as contents:
        (source,) = find(str(path)).sources
        held = contents.of(source)
        assert contents.of(source) == held
    return sum(read), held


def test_a_file_is_read_once(file):
    first = bytes_read(file)
    assert first[0] == first[1].size == 9
    assert bytes_read(file) == (0, first[1])
    assert bytes_read(file, verify=True) == first


def test_also_under_another_name(file):
    held = bytes_read(file)[1]
    (file.parent / "b.txt").symlink_to(file)
    file.rename(file.parent / "c.txt")
    (file.parent / "b.txt").unlink()
    (file.parent / "b.txt").symlink_to("c.txt")
    assert bytes_read(file.parent / "b.txt")[1] == held
    assert bytes_read(file.parent / "c.txt")[0] == 0


def test_a_change_that_keeps_size_and_time_is_noticed(file):
    before, held = file.stat(), bytes_read(file)[1]
    time.sleep(0.02)
    file.write_text("Some text")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    read, new = bytes_read(file)
    assert read == 9
    assert new.digest != held.digest


def test_prepared_data_follows_the_content_alone(tmp_path):
    """Unread and untouched: the same folder. Changed behind a time put back: another. Changed back: the first again."""
    file = tmp_path / "a.txt"
    file.write_text("line of text\n" * 500)
    config = DataConfig(corpus=str(file), cache=str(tmp_path / "cache"))
    first, before = prepare(config).directory, file.stat()
    for text, same in (("Line of text\n", False), ("line of text\n", True)):
        time.sleep(0.02)
        file.write_text(text * 500)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (prepare(config).directory == first) is same
        assert (prepare(config, verify=True).directory == first) is same


def test_verifying_reads_what_is_trusted(tmp_path, monkeypatch):
    """A file system that lies about times is found out."""
    file = tmp_path / "a.txt"
    file.write_text("line of text\n" * 500)
    config = DataConfig(corpus=str(file), cache=str(tmp_path / "cache"))
    monkeypatch.setattr(
        "retnet.data.sources.stamp_of", lambda status: f"always the same {status.st_size} 0 0"
    )
    first = prepare(config).directory
    file.write_text("Line of text\n" * 500)
    assert prepare(config).directory == first
    assert prepare(config, verify=True).directory != first


def test_another_file_in_its_place_is_noticed(file):
    before, held = file.stat(), bytes_read(file)[1]
    other = file.with_name("b.txt")
    other.write_text("Some text")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert bytes_read(file)[1].digest != held.digest


def test_what_was_written_a_moment_ago_is_not_trusted(file, monkeypatch):
    monkeypatch.setattr(content, "_SETTLED", 2.0)
    assert bytes_read(file)[0] == bytes_read(file)[0] == 9


def test_a_file_that_changes_while_it_is_read(file):
    def write(_):
        with file.open("a") as more:
            more.write("more")

    with (
        Contents(on_bytes=write) as contents,
        pytest.raises(UserError, match=r"a\.txt changed while it was read"),
    ):
        contents.of(find(str(file)).sources[0])


@pytest.mark.skipif(
    not os.path.exists("/proc/self/mem"), reason="a file that cannot be read after it was opened"
)
@pytest.mark.parametrize("name", ["b.txt", "b.jsonl.gz", "b.txt.zst", "b.parquet"])
def test_a_disk_that_fails_is_no_property_of_a_file(file, name):
    """What it lost is neither remembered nor left out."""
    (file.parent / name).symlink_to("/proc/self/mem")
    for _ in range(2):
        with pytest.raises(UserError, match=f"cannot read .*{name}: Input/output error; try again"):
            prepare(DataConfig(corpus=str(file.parent), cache=str(file.parent / "cache")))


@pytest.mark.parametrize("harm", ["damaged", "read-only", "no home"])
def test_without_a_memory_files_are_read_again(file, harm, monkeypatch):
    first = bytes_read(file)
    database = cache_folder() / "files.sqlite"
    if harm == "damaged":
        database.write_bytes(b"no database" * 1000)
    elif harm == "read-only":
        monkeypatch.setenv("RETNET_CACHE", "/dev/null/nowhere")
    else:
        monkeypatch.setattr(content, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert bytes_read(file) == first


def test_another_process_may_hold_the_memory(file):
    first = bytes_read(file)
    with sqlite3.connect(cache_folder() / "files.sqlite") as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM contents_4")
        assert bytes_read(file) == (0, first[1])
        other.rollback()
    other.close()


def test_line_numbers_and_positions(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "CHUNK", 4)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbfone\n\ntwo and three\nfour")
    (source,) = find(str(tmp_path)).sources
    expected = [(b"one", 4), (b"", 5), (b"two and three", 19), (b"four", 23)]
    assert list(content.lines(source)) == expected
    part = source._replace(start=4, stop=8)
    assert b"".join(content.chunks(part)) == b"\ntwo"
