"""Text is UTF-8 wherever it is read, and files are whole or not there."""

import codecs
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from retnet.errors import told
from retnet.io import (
    decode,
    expanded,
    foreign_encoding,
    nul_byte,
    read_stream,
    read_text,
    require_writable,
    sha256,
    write_bytes,
    write_json,
    write_text,
)
from retnet.model.runs import find_checkpoint
from retnet.settings import UserError, read_toml

WORDS = "first line\nsecond lïne 🙂\n"


@pytest.mark.parametrize("content", [WORDS.encode(), codecs.BOM_UTF8 + WORDS.encode()])
def test_text_is_read_without_its_byte_order_mark(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt") == WORDS
    assert decode(content, "it") == WORDS


def test_only_the_first_mark_is_one(tmp_path):
    assert decode(codecs.BOM_UTF8 * 2 + b"x", "it") == "\ufeffx"
    assert decode("a\ufeffb".encode(), "it") == "a\ufeffb"
    assert decode(b"", "it") == decode(codecs.BOM_UTF8, "it") == ""


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("text", [WORDS, "x", "日本", ""])
def test_other_encodings_are_refused_by_name(encoding, order, text):
    mark = getattr(codecs, f"BOM_{encoding.upper().replace('-', '')}_{order.upper()}")
    with pytest.raises(UserError, match=f"^notes is not UTF-8 text: .*{encoding.upper()}; save it as UTF-8$"):
        decode(mark + text.encode(f"{encoding}-{order}"), "notes")


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf16_without_a_mark(order):
    with pytest.raises(UserError, match="looks like UTF-16 without a byte order mark"):
        decode(WORDS.encode(f"utf-16-{order}"), "notes")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"text with \0 inside, and enough of it not to be taken for UTF-16", "byte 10 is NUL"),
        (b"\0" * 100, "byte 0 is NUL"),
        (b"one\ntwo \xff", r"byte 8 \(in line 2\) is 0xff"),
        (codecs.BOM_UTF8 + b"one\ntwo \xff", r"byte 11 \(in line 2\) is 0xff"),
        ("naïve".encode("latin-1"), r"byte 2 \(in line 1\) is 0xef"),
        ("cut é".encode()[:-1], r"byte 4 \(in line 1\) is 0xc3"),
    ],
)
def test_what_is_no_text(content, why):
    with pytest.raises(UserError, match=f"^notes is not UTF-8 text: {why}"):
        decode(content, "notes")


def test_where_in_a_stream():
    assert nul_byte(b"abc", 10) == foreign_encoding(b"abc") == foreign_encoding(codecs.BOM_UTF8) == ""
    assert nul_byte(b"abcdefghij\0", 10) == "byte 20 is NUL"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_what_cannot_be_read(tmp_path, make, why):
    make(tmp_path / "a")
    with pytest.raises(UserError, match=f"^cannot read --prompt-file a: .*{why}"):
        read_text(tmp_path / "a", "--prompt-file a")


def test_what_never_ends_is_refused_where_it_begins():
    """`--prompt-file /dev/zero`, or `< /dev/full`, would fill the memory first."""
    for name in ("/dev/zero", "/dev/full"):
        with open(name, "rb", buffering=0) as device:
            read = SimpleNamespace(read=lambda size: device.read(size))  # nobody may ask for all of it
            with pytest.raises(UserError, match=f"^{name} is not UTF-8 text: byte 0 is NUL"):
                read_stream(read, name)


def test_configurations_are_read_alike(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(codecs.BOM_UTF8 + b"x = 1\n")
    assert read_toml(path) == {"x": 1}
    path.write_text("x = 1\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"^the configuration .*a\.toml is not UTF-8 text: .*UTF-16"):
        read_toml(path)


def test_writing_replaces_the_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "öld")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    assert sha256(path) == hashlib.sha256(b"new").hexdigest()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "newer")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_word_for_what_is_not_finite(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": math.nan, "b": [math.inf, 1, ("ü", 2.5)], "c": {3: None}})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": None,
        "b": [None, 1, ["ü", 2.5]],
        "c": {"3": None},
    }
    with pytest.raises(UserError, match=r"cannot write .*record\.json"):
        write_json(tmp_path / "missing" / "record.json", {})


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to("gone.txt")
    with pytest.raises(
        UserError, match=r"cannot read .*link.txt: No such file or directory \(it is a link to gone.txt\)"
    ):
        read_text(link)
    with pytest.raises(UserError, match=r"no run at .*link.txt \(it is a link to gone.txt\)"):
        find_checkpoint(link)


def test_links_and_devices_stay_what_they_are(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    write_text(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    code = "from pathlib import Path; from retnet.io import write_text; write_text(Path('/dev/stdout'), 'out'); print('end')"
    for output in (subprocess.PIPE, (tmp_path / "redirected").open("w")):
        subprocess.run([sys.executable, "-c", code], stdout=output, check=True)
        if output is not subprocess.PIPE:
            output.close()
    assert "end" in (tmp_path / "redirected").read_text()


def test_what_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "file").touch()
    for path, why in (
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "a.json", "there is no folder .*none"),
        (tmp_path / "file" / "a.json", "there is no folder .*file"),
    ):
        with pytest.raises(UserError, match=rf"^cannot write .*: {why}$"):
            require_writable(path)
    require_writable(tmp_path / "a.json")
    require_writable(Path("/dev/stdout"))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_home_that_nobody_knows(tmp_path):
    with pytest.raises(
        UserError, match=r"^~nobody-here/x: no home is known for ~nobody-here; .* \./~nobody-here$"
    ):
        expanded("~nobody-here/x")
    assert expanded("~") == os.path.expanduser("~")
    assert expanded("./~x") == "./~x"


class TestTold:
    def test_errors_of_files_become_one_sentence(self, tmp_path):
        cases = (
            (OSError(28, "No space left on device"), "No space left on device"),
            (OSError(28, "No space left on device", "b/c"), "b/c: No space left on device"),
            (
                FileNotFoundError(2, "No such file or directory", b"caf\xe9"),
                "caf\ufffd: No such file or directory",
            ),
            (EOFError("Compressed file ended"), "it ends too early"),
            (json.JSONDecodeError("Expecting value", "x", 0), "Expecting value: line 1 column 1 (char 0)"),
            (
                UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
                "'utf-8' codec can't decode byte 0xff in position 0: bad",
            ),
            (OSError("one\n  two"), "one two"),
        )
        for error, reason in cases:
            with pytest.raises(UserError) as said, told("write a", "b is whole"):
                raise error
            assert str(said.value) == f"cannot write a: {reason}; b is whole"
            assert said.value.__cause__ is error

    def test_libraries_are_known_once_they_are_loaded(self, tmp_path):
        import safetensors.torch

        (tmp_path / "a").write_bytes(b"x" * 100)
        with pytest.raises(UserError, match=r"^cannot read a: .*header"), told("read a"):
            safetensors.torch.load_file(tmp_path / "a")

    def test_the_rest_is_left_as_it_is(self):
        for error in (
            UserError("a mistake"),
            BrokenPipeError(32, "Broken pipe"),
            KeyError("a"),
            ValueError("b"),
        ):
            with pytest.raises(type(error)) as found, told("write a"):
                raise error
            assert found.value is error
