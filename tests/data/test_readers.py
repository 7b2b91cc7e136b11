"""Every format is read, everything wrong is reported with its place, and giant documents come in pieces."""

import gzip
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data import Problem, Tokenizer, readers
from retnet.data.readers import Piece, read
from retnet.data.sources import find
from retnet.settings import UserError

TEXTS = ["one", "two\r\nlines\n", "dréi 🙂", "four"]


def read_all(spec, field="text"):
    """(documents, problems) of a corpus."""
    documents, problems = [], []
    for source in find(str(spec)):
        for content in read(source, field):
            if isinstance(content, Problem):
                problems.append(content)
            elif content.first:
                documents.append(content.text)
            else:
                documents[-1] += content.text
    return documents, problems


def places(problems):
    return [(problem.file.rsplit("/", 1)[-1], problem.line, problem.kind) for problem in problems]


def lines(texts):
    return "".join(json.dumps({"id": 1, "text": text, "more": [text]}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes("".join(TEXTS).encode())
    assert read_all(tmp_path / f"a{suffix}") == (["".join(TEXTS)], [])


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.compress),
        (".jsonl.zst", lambda b: zstandard.compress(b[:100]) + zstandard.compress(b[100:])),  # two frames
    ],
)
def test_json_lines(tmp_path, suffix, pack):
    (tmp_path / f"a{suffix}").write_bytes(pack(lines(TEXTS)))
    assert read_all(tmp_path / f"a{suffix}") == (TEXTS, [])


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path, kind):
    values = [text.encode() for text in TEXTS] if kind == pa.binary() else TEXTS
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "text": pa.array(values, kind)}), tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet") == (TEXTS, [])


def test_a_hugging_face_folder_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.jsonl").write_bytes(lines(TEXTS * 100))
    (tmp_path / "test.jsonl").write_bytes(lines(["held out", ""]))
    assert read_all(f"hf:{tmp_path}") == (TEXTS * 100, [])
    documents, problems = read_all(f"hf:{tmp_path}::test")
    assert documents == ["held out"]
    assert [(p.file, p.line, p.kind) for p in problems] == [(f"hf:{tmp_path}::test", 2, "empty document")]
    with pytest.raises(UserError, match="no split 'nope'; known: train, test"):
        find(f"hf:{tmp_path}:default:nope")
    with pytest.raises(UserError, match="cannot read hf:"):
        find(f"hf:{tmp_path / 'nothing'}")
    with pytest.raises(UserError, match="hf:NAME"):
        find("hf:")


def test_bad_lines_are_reported_with_their_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "bom"}\n'
        b'{"text": "cut\n'
        b"\n"
        b'["no object"]\n'
        b'{"words": "other field"}\n'
        b'{"text": 5}\n'
        b'{"text": null}\n'
        b'{"text": ""}\n'
        b'{"text": "b\xffd"}\n'
        b'{"text": "half \\ud83d pair"}\n'
        b'{"text": "fine", "score": NaN}\r\n'
        b'{"text": "last, no newline"}'
    )
    documents, problems = read_all(tmp_path / "a.jsonl")
    assert documents == ["bom", "b\ufffdd", "half \ufffd pair", "fine", "last, no newline"]
    assert places(problems) == [
        ("a.jsonl", 2, "bad JSON"),
        ("a.jsonl", 4, "bad JSON"),
        ("a.jsonl", 5, "no text"),
        ("a.jsonl", 6, "no text"),
        ("a.jsonl", 7, "no text"),
        ("a.jsonl", 8, "empty document"),
        ("a.jsonl", 9, "invalid UTF-8"),
        ("a.jsonl", 10, "invalid UTF-8"),
    ]
    assert "'text' is missing" in problems[2].message
    assert "holds int" in problems[3].message
    assert str(problems[0]).startswith(f"{tmp_path / 'a.jsonl'}:2: bad JSON: ")


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"the body": "x", "text": "y"}\n')
    assert read_all(tmp_path / "a.jsonl", "the body") == (["x"], [])


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xc3(e\xff")
    assert read_all(tmp_path / "a.txt")[0] == ["one\ntwo\nthr\ufffd(e\ufffd"]
    assert places(read_all(tmp_path / "a.txt")[1]) == [("a.txt", 3, "invalid UTF-8")]
    (tmp_path / "b.txt").write_bytes("cut é".encode()[:-1])
    assert read_all(tmp_path / "b.txt")[0] == ["cut \ufffd"]


def test_characters_across_chunks_and_invalid_bytes_far_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 7)
    text = "aé日🙂\n" * 50
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_all(tmp_path / "a.txt") == ([text], [])
    (tmp_path / "b.txt").write_bytes(text.encode() + b"\xff" + text.encode())
    documents, problems = read_all(tmp_path / "b.txt")
    assert documents == [text + "\ufffd" + text]
    assert places(problems) == [("b.txt", 51, "invalid UTF-8")]


def test_parquet_rows_that_are_no_text(tmp_path):
    column = pa.array([b"a", None, b"", b"\xff"], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    documents, problems = read_all(tmp_path / "a.parquet")
    assert documents == ["a", "\ufffd"]
    assert [(p.line, p.kind) for p in problems] == [
        (2, "no text"),
        (3, "empty document"),
        (4, "invalid UTF-8"),
    ]
    documents, problems = read_all(tmp_path / "a.parquet", "body")
    assert documents == []
    assert "no column 'body'; columns: text" in str(problems[0])


def broken(tmp_path):
    packed = gzip.compress(lines([str(i) for i in range(5000)]))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    packed = zstandard.compress(lines([str(i) for i in range(50000)]))
    (tmp_path / "b.jsonl.zst").write_bytes(packed[: len(packed) - 50])
    (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "e.txt").symlink_to(tmp_path / "gone")
    return tmp_path


def test_files_that_cannot_be_read_are_reported_and_what_stands_before_the_break_is_kept(tmp_path):
    documents, problems = read_all(broken(tmp_path))
    assert places(problems) == [
        (name, 0, "unreadable") for name in ["a.jsonl.gz", "b.jsonl.zst", "c.jsonl.gz", "d.parquet", "e.txt"]
    ]
    assert len(documents) > 1000
    assert "after line " in problems[0].message


def test_empty_files_are_reported(tmp_path):
    (tmp_path / "a.txt").touch()
    assert places(read_all(tmp_path / "a.txt")[1]) == [("a.txt", 0, "empty document")]


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.sampled_from("ab1 \n\t.,;'é日"), min_size=1, max_size=300),
    cuts=st.lists(st.integers(0, 300)),
)
def test_pieces_depend_on_the_text_alone_and_keep_its_tokens(bpe, text, cuts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE", 32)
        bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
        pieces = list(readers._pieces(text[a:b] for a, b in itertools.pairwise(bounds)))
        assert pieces == list(readers._pieces([text]))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 32 for piece in pieces)
    safe = all(before[-1].isalnum() and after[0].isspace() for before, after in itertools.pairwise(pieces))
    if safe:
        assert [i for piece in pieces for i in bpe.encode(piece)] == bpe.encode(text)


@settings(deadline=None)
@given(
    words=st.lists(
        st.text(st.sampled_from("ab1.,'é日"), max_size=8).map(lambda word: word + "a "), min_size=20
    )
)
def test_where_there_are_words_pieces_have_the_tokens_of_the_whole(bpe, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE", 32)
        pieces = list(readers._pieces(["".join(words)]))
    assert len(pieces) > 1
    assert [i for piece in pieces for i in bpe.encode(piece)] == bpe.encode("".join(words))


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(["ab 1 a.b, ab; é日 \n\n ab\tab a'b 11 ab  ab"] * 20, 300)


def test_a_giant_document_comes_in_pieces_of_one_document(tmp_path):
    text = "some words 12 and\n" * 50_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_bytes(lines([text, "next"]))
    for name, rest in (("a.txt", []), ("b.jsonl", ["next"])):
        contents = list(read(find(str(tmp_path / name))[0], "text"))
        assert all(isinstance(content, Piece) for content in contents)
        assert [content.first for content in contents].count(True) == 1 + len(rest)
        assert len(contents) > 5
        assert len({content.share for content in contents}) == 1 + len(rest)
        assert np.all(np.diff([content.position for content in contents]) >= 0)
        assert read_all(tmp_path / name) == ([text, *rest], [])
