"""Every format is read, everything wrong is reported with its place, and giant documents come in pieces."""

import bz2
import codecs
import gzip
import itertools
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data import Problem, Tokenizer, content, readers
from retnet.data.readers import Piece, read
from retnet.data.sources import find
from retnet.data.split import found_in
from retnet.settings import UserError

TEXTS = ["one", "two\r\nlines\n", "dréi 🙂", "four"]


def read_all(spec, field="text"):
    """(documents, problems) of a corpus."""
    documents, problems = [], []
    for source in found_in([str(spec)], problems.append):
        for piece in read(source, field):
            if isinstance(piece, Problem):
                problems.append(piece)
            elif piece.first:
                documents.append(piece.text)
            else:
                documents[-1] += piece.text
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
    ("suffix", "compress"),
    [
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.compress),
        (".jsonl.zst", lambda b: zstandard.compress(b[:100]) + zstandard.compress(b[100:])),  # two frames
        (".jsonl.bz2", lambda b: bz2.compress(b[:100]) + bz2.compress(b"") + bz2.compress(b[100:])),
        (".jsonl.xz", lambda b: lzma.compress(b[:100]) + bytes(8) + lzma.compress(b[100:]) + bytes(9000)),
    ],
)
def test_json_lines(tmp_path, suffix, compress):
    (tmp_path / f"a{suffix}").write_bytes(compress(lines(TEXTS)))
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


BOM = codecs.BOM_UTF8


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
@pytest.mark.parametrize("chunk", [1 << 20, 5])
def test_byte_order_marks(tmp_path, monkeypatch, suffix, chunk):
    """One that begins a file is no text; others are what joining files left, and are told."""
    monkeypatch.setattr(content, "CHUNK", chunk)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(BOM + "dréi\n".encode())
    assert read_all(path) == (["dréi\n"], [])
    path.write_bytes(BOM + b"one\n" + BOM + b"two" + BOM + b"\nthree")
    documents, problems = read_all(path)
    assert documents == ["one\ntwo\nthree"]
    assert places(problems) == [(path.name, 2, "byte order mark")]
    path.write_bytes(BOM)
    assert places(read_all(path)[1]) == [(path.name, 0, "empty document")]


def test_byte_order_marks_of_records(tmp_path):
    records = [json.dumps({"text": text}).encode() for text in ("one", "\ufefftwo", "th\ufeffree", "\ufeff")]
    (tmp_path / "a.jsonl").write_bytes(BOM + b"\n".join(records) + b"\n" + BOM + records[0])
    documents, problems = read_all(tmp_path / "a.jsonl")
    assert documents == ["one", "two", "three", "one"]
    assert places(problems) == [("a.jsonl", 3, "byte order mark"), ("a.jsonl", 4, "empty document")]


def test_records_with_nul(tmp_path):
    table = pa.table({"text": ["fine", "b\0d"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b\0d"}) + '\n{"text": "fine"}\n\0\0\0\0\n')
    documents, problems = read_all(tmp_path)
    assert documents == ["fine", "fine"]
    assert places(problems) == [
        ("a.parquet", 2, "not text"),
        ("b.jsonl", 1, "not text"),
        ("b.jsonl", 3, "bad JSON"),
    ]
    assert problems[0].message == "character 1 is NUL"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["text", "text"], "2 columns 'text'; columns: text, text"),
        (["id", "body"], "no column 'text'; columns: id, body"),
        (["Text"], "no column 'text'; columns: Text"),
        ([], "no column 'text'; columns: "),
    ],
)
@pytest.mark.parametrize("rows", [0, 3])
def test_parquet_without_the_one_column(tmp_path, columns, said, rows):
    pq.write_table(
        pa.Table.from_arrays([pa.array(["x"] * rows)] * len(columns), columns), tmp_path / "a.parquet"
    )
    documents, problems = read_all(tmp_path / "a.parquet")
    assert documents == []
    assert [str(problem) for problem in problems] == [f"{tmp_path / 'a.parquet'}: no text: {said}"]


def test_files_without_records_are_told(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").touch()
    (tmp_path / "c.jsonl").write_bytes(BOM + b"\n \n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b""))
    documents, problems = read_all(tmp_path)
    assert documents == []
    assert [(p.kind, p.message) for p in problems] == [("no text", "it holds no records")] * 4


def compressed(kind):
    if kind == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": [f"text number {i}" * 9 for i in range(500)]}), sink)
        return sink.getvalue().to_pybytes()
    compress = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": zstandard.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    return compress[kind.removeprefix(".jsonl").removeprefix(".txt")](
        lines([f"text number {i}" for i in range(500)])
    )


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(
        [".parquet", *(a + b for a in (".jsonl", ".txt") for b in ("", ".gz", ".zst", ".bz2", ".xz"))]
    ),
    place=st.floats(0, 1),
    change=st.binary(min_size=1, max_size=20),
    cut=st.booleans(),
)
def test_damage_is_told_and_never_more_than_that(tmp_path_factory, kind, place, change, cut):
    path = tmp_path_factory.mktemp("damaged") / f"a{kind}"
    whole = compressed(kind)
    at = int(place * (len(whole) - 1))
    damaged = whole[:at] + (b"" if cut else change + whole[at + len(change) :])
    path.write_bytes(damaged)
    documents, problems = read_all(path)
    assert all(isinstance(text, str) and text for text in documents)
    if cut and kind not in (".txt", ".jsonl"):  # what is not compressed does not know its length
        assert [problem.kind for problem in problems][-1] in ("unreadable", "empty document", "no text")


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
    monkeypatch.setattr(content, "CHUNK", 7)
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
    compressed = gzip.compress(lines([str(i) for i in range(5000)]))
    (tmp_path / "a.jsonl.gz").write_bytes(compressed[: len(compressed) // 2])
    compressed = zstandard.compress(lines([str(i) for i in range(50000)]))
    (tmp_path / "b.jsonl.zst").write_bytes(compressed[: len(compressed) - 50])
    (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "e.txt").symlink_to(tmp_path / "gone")
    return tmp_path


def test_files_that_cannot_be_read_are_reported_and_what_stands_before_the_break_is_kept(tmp_path):
    documents, problems = read_all(broken(tmp_path))
    names = [
        "e.txt",
        "a.jsonl.gz",
        "b.jsonl.zst",
        "c.jsonl.gz",
        "d.parquet",
    ]  # the link before anything is read
    assert places(problems) == [(name, 0, "unreadable") for name in names]
    assert len(documents) > 1000
    assert "after line " in problems[1].message


PACK = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", PACK)
def test_almost_all_that_stands_before_garbage_is_kept(tmp_path, kind):
    """Also of a file that is read in one go."""
    path = tmp_path / f"a.jsonl.{kind}"
    packed = PACK[kind](lines([str(i) for i in range(1000)]))
    path.write_bytes(packed + packed + b"no more")
    documents, problems = read_all(path)
    assert [problem.kind for problem in problems] == ["unreadable"]
    assert 1850 < len(documents) <= 2000


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("damage", [0, 12])  # in the magic number, and behind it
def test_a_damaged_stream_behind_a_whole_one_is_told(tmp_path, kind, damage):
    path = tmp_path / f"a.jsonl.{kind}"
    packed = PACK[kind](lines([str(i) for i in range(1000)]))
    path.write_bytes(packed + packed[:damage] + b"\xff\xff" + packed[damage + 2 :])
    documents, problems = read_all(path)
    assert [problem.kind for problem in problems][-1] == "unreadable"
    assert len(documents) >= 850


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
        found = list(readers.pieces(text[a:b] for a, b in itertools.pairwise(bounds)))
        assert found == list(readers.pieces([text]))
        pieces = [piece for _, piece in found]
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
        pieces = [piece for _, piece in readers.pieces(["".join(words)])]
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
        contents = list(read(find(str(tmp_path / name)).sources[0], "text"))
        assert all(isinstance(content, Piece) for content in contents)
        assert [content.first for content in contents].count(True) == 1 + len(rest)
        assert len(contents) > 5
        assert len({content.share for content in contents}) == 1 + len(rest)
        assert np.all(np.diff([content.position for content in contents]) >= 0)
        assert read_all(tmp_path / name) == ([text, *rest], [])
