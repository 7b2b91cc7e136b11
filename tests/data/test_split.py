"""Every text once, on one side: what is the same text, and which of it is for validation."""

import bz2
import codecs
import gzip
import hashlib
import lzma
import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from retnet.data import DataConfig, Tokenizer, content, prepare, read_texts, sources
from retnet.data.split import content_share, gather, hold_out, share, text_share
from retnet.settings import UserError


def find(spec):
    return sources.find(str(spec)).sources


def test_about_two_or_three_percent_of_the_standard_library_is_held_out():
    found = gather(DataConfig()).sources
    held_out = sum(source.size for source in found if source.validation)
    assert 0.015 < held_out / sum(source.size for source in found) < 0.04


def test_a_file_stays_on_its_side_whatever_else_there_is(tmp_path):
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    before = {source.name: source.validation for source in hold_out(find(str(tmp_path)), 0.1)}
    for number in range(0, 300, 3):
        (tmp_path / f"{number}.txt").unlink()
    after = {source.name: source.validation for source in hold_out(find(str(tmp_path)), 0.1)}
    assert after == {name: before[name] for name in after}
    assert 10 < sum(map(bool, before.values())) < 60
    assert [name for name, side in before.items() if side] == [name for name in before if share(name) < 0.1]


@pytest.mark.parametrize("line", ["a line of text\n", "é"])  # the second: one long line, cut at a character
def test_the_end_of_the_largest_file_is_held_out_when_hashes_hold_out_none(tmp_path, line):
    text = line * 1000
    (tmp_path / "large.txt").write_text(text)
    (tmp_path / "small.txt").write_text("small")
    assert min(share("large.txt"), share("small.txt")) > 0.01
    head, tail, small = hold_out(find(str(tmp_path)), 0.01)
    content = text.encode()
    assert (head.start, head.stop, head.validation) == (0, tail.start, False)
    assert (tail.stop, tail.validation, small.validation) == (None, True, False)
    assert abs(len(content) - tail.start - len(content) * 0.01) <= 20
    content[tail.start :].decode()
    assert len(line) == 1 or content[: tail.start].endswith(b"\n")


def test_too_little_text_to_split_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"too little text to split.*data\.validation"):
        hold_out(find(str(tmp_path)), 0.02)


@pytest.mark.parametrize("name", ["a.txt.zst", "a.txt.gz", "a.jsonl.xz", "a.md.bz2"])
def test_one_file_that_is_not_compressed_as_it_says_is_not_called_short(name, tmp_path):
    (tmp_path / name).write_bytes(b"not compressed")
    with pytest.raises(UserError) as error:
        prepare(DataConfig(corpus=str(tmp_path / name), cache=str(tmp_path / "cache")))
    assert "too little" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


TEXT = "".join(f"line {i} of a text that is long enough to be split\n" for i in range(100))
OTHER = TEXT.replace("line", "row")


def gathered(*corpus, **settings):
    return gather(DataConfig(corpus=tuple(map(str, corpus)), **settings))


def kinds(found):
    return [(os.path.basename(problem.file), problem.kind) for problem in found.problems]


WAYS = {
    "another name": lambda a, b: b.write_text(TEXT),
    "a hard link": lambda a, b: b.hardlink_to(a),
    "a link": lambda a, b: b.symlink_to(a),
    "a relative link": lambda a, b: b.symlink_to(a.name),
    "another kind of text": lambda a, b: b.with_suffix(".md").write_text(TEXT),
    "a byte order mark": lambda a, b: b.write_bytes(codecs.BOM_UTF8 + TEXT.encode()),
    "byte order marks inside": lambda a, b: b.write_text(TEXT.replace("text", "t\ufeffext"), "utf-8"),
    "line endings": lambda a, b: b.write_bytes(TEXT.replace("\n", "\r\n").encode()),
    "some line endings": lambda a, b: b.write_bytes(TEXT.replace("split\n", "split\r\n", 9).encode()),
    "upper case": lambda a, b: b.with_name("B.TXT").write_text(TEXT),
    "gzip": lambda a, b: b.with_name("b.txt.gz").write_bytes(gzip.compress(TEXT.encode())),
    "zstd": lambda a, b: b.with_name("b.txt.zst").write_bytes(zstandard.compress(TEXT.encode())),
    "bzip2": lambda a, b: b.with_name("b.md.bz2").write_bytes(bz2.compress(TEXT.encode())),
    "xz": lambda a, b: b.with_name("b.txt.XZ").write_bytes(lzma.compress(TEXT.encode())),
    "a linked folder": lambda a, b: b.with_name("folder").symlink_to(twin(a)),
}


def twin(file):
    folder = file.parent.parent / "twin"
    folder.mkdir()
    (folder / "c.txt").write_text(file.read_text())
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_the_same_text_is_read_once_and_the_other_is_told(config, corpus, way):
    (corpus / "A.txt").write_text(TEXT)
    WAYS[way](corpus / "A.txt", corpus / "b.txt")
    (corpus / "z.txt").write_text(OTHER)
    seen = []
    prepared = prepare(config, on_problem=seen.append)
    (duplicate,) = seen
    assert duplicate.kind == "duplicate"
    assert duplicate.message.startswith("the same text as /")
    both = prepared.train.num_bytes + prepared.validation.num_bytes
    assert both == len(TEXT) + len(OTHER)
    (named,) = prepared.manifest.corpora
    assert (named.files, named.bytes, named.left_out) == (2, both, {"duplicate": 1})
    assert prepared.manifest.examples == [str(duplicate)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_what_the_reader_mends_tells_no_twins_apart(tmp_path, chunk, monkeypatch):
    """Wherever a chunk ends. What is left of bytes that are no UTF-8 is the same whichever they were."""
    monkeypatch.setattr(content, "CHUNK", chunk)
    twins = (
        "Grün\r\nund ".encode() + b"\xe9\xff\r\n\xf0\x9f",
        "Grün\nund ".encode() + b"\xe8\xfe\n\xef\xbb\xbf\xf0\x9f\x98",
        "Grün\r".encode() + b"\xef\xbb\xbf\nund \xf8\x80\n\xf0",
        "Grün\rund ".encode() + b"\xe9\xff\r\xf0\x9f",
    )
    for number, twin in enumerate(twins):
        (tmp_path / f"{number}.txt").write_bytes(TEXT.encode() + twin)
    found = gathered(tmp_path)
    assert {source.name for source in found.sources} == {"0.txt", "3.txt"}
    assert kinds(found) == [("1.txt", "duplicate"), ("2.txt", "duplicate")]
    same = f"{TEXT}Grün\r\nund \ufffd\ufffd\r\n\ufffd"
    assert found.sources[0].digest == hashlib.sha256(same.encode()).hexdigest()
    assert content_share(found.sources[0].identity) == text_share(same) == text_share(same.replace("\r", ""))


def test_twins_are_not_trained_and_validated_on_whatever_holds_them(config, corpus, jsonl, tmp_path):
    texts = [f"first line {i}\r\nand a second" for i in range(6)]
    jsonl(corpus / "a.jsonl", [*texts[:3], "one more"])
    for i in (3, 4, 5):
        (corpus / f"{i}.txt").write_bytes(texts[i].encode())
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "0.txt").write_bytes(texts[0].replace("\r", "").encode())
    (tmp_path / "v" / "1.txt").write_text(texts[1].replace("\r", "\ufeff"), "utf-8")
    jsonl(tmp_path / "v" / "v.jsonl", [texts[2].replace("\r", ""), texts[3].replace("\r", "")])
    (tmp_path / "v" / "4.txt").write_bytes(texts[4].replace("\r", "").encode())
    prepared = prepare(replace(config, validation=str(tmp_path / "v")))
    assert prepared.train.num_documents == 2
    text = prepared.tokenizer.decode(prepared.train.tokens(0, prepared.train.num_tokens).tolist())
    assert text == texts[5] + "one more"
    split = prepare(replace(config, validation_fraction=0.5))
    other = corpus / "twins"
    other.mkdir()
    for i, twin in enumerate(texts):
        (other / f"{i}.txt").write_bytes(twin.replace("\r", "").encode())
    both = prepare(replace(config, validation_fraction=0.5))
    assert both.validation.num_documents - split.validation.num_documents == sum(
        text_share(twin) < 0.5 for twin in texts[:3]
    )


@pytest.mark.parametrize(
    "spell", [str, os.path.relpath, lambda p: f"{p}/", lambda p: f"{p}/../corpus", lambda p: f"{p}/*"]
)
def test_two_spellings_of_a_corpus(config, corpus, spell):
    (corpus / "a.txt").write_text(TEXT)
    (corpus / "b.txt").write_text(OTHER)
    once = prepare(config)
    twice = prepare(replace(config, corpus=(str(corpus), spell(corpus))))
    assert twice.train.num_bytes + twice.validation.num_bytes == len(TEXT) + len(OTHER)
    assert [named.left_out for named in twice.manifest.corpora] == [{}, {"duplicate": 2}]
    assert twice.directory == once.directory  # the same data: nothing was prepared again


def test_records_are_known_by_their_content_too(tmp_path, jsonl):
    jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "c.txt").write_bytes((tmp_path / "a.jsonl").read_bytes())  # the same bytes, but another text
    found = gathered(tmp_path)
    assert [source.name for source in found.sources] == ["a.jsonl", "c.txt"]
    assert kinds(found) == [("b.jsonl.gz", "duplicate")]


def test_a_streamed_dataset_named_twice(tmp_path, jsonl):
    jsonl(tmp_path / "train.jsonl", ["one", "two"])
    jsonl(tmp_path / "test.jsonl", ["three"])
    found = gathered(f"hf:{tmp_path}", f"hf:{tmp_path}::train", f"hf:{tmp_path}::test")
    assert [source.path for source in found.sources] == [f"hf:{tmp_path}", f"hf:{tmp_path}::test"]
    with pytest.raises(UserError, match="are the same text"):
        gathered(f"hf:{tmp_path}", validation=f"hf:{tmp_path}")


def test_empty_files_are_not_each_others_duplicates(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").touch()
    (tmp_path / "d.txt").write_text(TEXT)
    assert kinds(gathered(tmp_path)) == []


def test_files_that_cannot_be_read_are_not_either(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    found = gathered(tmp_path)
    assert len(found.sources) == 2
    assert found.problems == []


@pytest.mark.parametrize(
    "spell",
    [
        str,
        os.path.relpath,
        lambda p: f"{p}/",
        lambda p: f"{p}/*.txt",
        lambda p: (str(p), str(p)),
        lambda p: copied(p),
    ],
)
def test_training_and_validation_of_the_same_text_is_refused(config, corpus, spell):
    (corpus / "a.txt").write_text(TEXT)
    (corpus / "b.txt").write_text(OTHER)
    with pytest.raises(UserError, match=r"are the same text; .* leave data\.validation out"):
        prepare(replace(config, validation=spell(corpus)))


def copied(folder):
    twin = folder.with_name("copy")
    twin.mkdir()
    for file in folder.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    return str(twin)


def test_what_is_validated_on_is_not_trained_on(config, corpus):
    (corpus / "a.txt").write_text(TEXT)
    (corpus / "b.txt").write_text(OTHER)
    seen = []
    prepared = prepare(replace(config, validation=str(corpus / "b.txt")), on_problem=seen.append)
    assert (prepared.train.num_bytes, prepared.validation.num_bytes) == (len(TEXT), len(OTHER))
    assert [str(problem) for problem in seen] == [
        f"{corpus / 'b.txt'}: duplicate: the same text as {corpus / 'b.txt'}, which is validated on"
    ]
    (corpus / "c.txt").write_text(TEXT + OTHER)
    with pytest.raises(UserError, match=r"no text is left in data\.corpus .*b\.txt, which is validated on"):
        prepare(replace(config, corpus=str(corpus / "b.txt"), validation=str(corpus)))


def test_records_that_are_validated_on_are_not_trained_on(config, corpus, jsonl, tmp_path):
    """Whatever they are kept in; a tokenizer that is learned does not see them either."""
    texts = [f"record {i} of many" for i in range(100)]
    jsonl(corpus / "a.jsonl", texts)
    pq.write_table(pa.table({"text": [*texts[40:60], "zebra " * 50]}), tmp_path / "v.parquet")
    pq.write_table(pa.table({"text": ["zebra " * 50, "and one more"]}), corpus / "b.parquet")
    seen = []
    config = replace(config, validation=str(tmp_path / "v.parquet"), tokenizer="bpe:290")
    prepared = prepare(config, on_problem=seen.append, shard_tokens=100)
    kept = [*texts[:40], *texts[60:], "and one more"]
    assert prepared.tokenizer.fingerprint == Tokenizer.train(kept, 290).fingerprint
    assert prepared.train.num_documents == len(kept)
    assert prepared.train.num_bytes == sum(map(len, kept))
    assert prepared.validation.num_documents == 21
    assert prepared.manifest.problems == {"duplicate": 21}
    assert str(seen[0]) == f"{corpus / 'a.jsonl'}:41: duplicate: the same text is validated on"
    assert [problem.line for problem in seen] == [*range(41, 61), 1]


def test_a_text_is_one_whether_a_file_or_a_record_holds_it(config, corpus, jsonl, tmp_path):
    texts = [f"text {i} of many" for i in range(30)]
    jsonl(corpus / "a.jsonl", texts[:20])
    for i in range(20, 30):
        (corpus / f"{i}.txt").write_text(texts[i])
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "v.txt").write_text("\ufeff" + texts[3], encoding="utf-8")
    (tmp_path / "v" / "empty.txt").touch()
    jsonl(tmp_path / "v" / "v.jsonl", [texts[25], "another"])
    seen = []
    prepared = prepare(replace(config, validation=str(tmp_path / "v")), on_problem=seen.append)
    assert prepared.train.num_documents == 28
    assert [str(problem) for problem in seen if problem.kind == "duplicate"] == [
        f"{corpus / '25.txt'}: duplicate: the same text is validated on",
        f"{corpus / 'a.jsonl'}:4: duplicate: the same text is validated on",
    ]


def test_without_a_validation_corpus_it_falls_on_one_side_either_way(config, corpus, jsonl):
    texts = [f"text {i} of many" for i in range(60)]
    jsonl(corpus / "a.jsonl", texts)
    for i, text in enumerate(texts):
        (corpus / f"{i}.txt").write_text(text)
    prepared = prepare(replace(config, validation_fraction=0.5))
    sides = []
    for shards in (prepared.train, prepared.validation):
        spans = [shards.document_span(i) for i in range(shards.num_documents)]
        sides.append({bytes(shards.tokens(start + 1, stop).tolist()) for start, stop in spans})
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 60
    assert min(map(len, sides)) > 15


def test_what_is_left_out_is_said_again_of_the_files_that_are_there_now(config, corpus):
    """Prepared already, from a corpus with other files beside the same text."""
    (corpus / "a.txt").write_text(TEXT)
    (corpus / "b.txt").write_text(OTHER)
    (corpus / "c.png").touch()
    config = replace(config, validation_fraction=0.4)
    first = prepare(config)
    (corpus / "c.png").rename(corpus / "c.csv")
    (corpus / "d.txt").write_text(TEXT)
    seen = []
    second = prepare(config, on_problem=seen.append)
    assert second.directory == first.directory
    want = [
        f"{corpus}: left out: 1 × .csv",
        f"{corpus / 'd.txt'}: duplicate: the same text as {corpus / 'a.txt'}",
    ]
    assert [str(problem) for problem in seen] == second.manifest.examples == want
    assert first.manifest.examples == [f"{corpus}: left out: 1 × .png"]


def test_records_that_come_again_in_training_stay(config, corpus, jsonl):
    jsonl(corpus / "a.jsonl", ["twice", "twice", "once"] * 20 + [f"other {i}" for i in range(20)])
    prepared = prepare(replace(config, validation_fraction=0.3))
    assert prepared.train.num_documents + prepared.validation.num_documents == 80


NO_TEXT = {
    "UTF-16 with a mark": TEXT.encode("utf-16"),
    "UTF-16 LE": TEXT.encode("utf-16-le"),
    "UTF-16 BE": TEXT.encode("utf-16-be"),
    "UTF-32": TEXT.encode("utf-32"),
    "a NUL far inside": TEXT.encode() * 1000 + b"\0" + TEXT.encode(),
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "Cyrillic": ("Это текст. " * 100).encode("koi8-r"),
    "Shift JIS": ("これは日本語の文章です。" * 100).encode("shift-jis"),
    "Chinese, UTF-16 without a mark": ("这是一个没有空格的中文文本" * 100).encode("utf-16-le"),
}


@pytest.mark.parametrize("what", NO_TEXT)
def test_what_is_no_text_in_utf8_is_refused_with_file_and_reason(config, corpus, what):
    (corpus / "a.txt").write_text(TEXT)
    (corpus / "b.txt").write_bytes(NO_TEXT[what])
    (corpus / "c.txt.gz").write_bytes(gzip.compress(NO_TEXT[what] + b"\0" * (b"\0" in NO_TEXT[what])))
    seen = []
    prepared = prepare(config, on_problem=seen.append)
    assert [(os.path.basename(problem.file), problem.kind) for problem in seen] == [
        ("b.txt", "not text"),
        ("c.txt.gz", "not text"),
    ]
    assert all(problem.message for problem in seen)
    assert prepared.train.num_bytes + prepared.validation.num_bytes == len(TEXT)
    assert prepared.manifest.corpora[0].left_out == {"not text": 2}
    with pytest.raises(UserError, match=r"no text is left in data\.corpus .*b\.txt: not text: "):
        prepare(replace(config, corpus=str(corpus / "b.txt")))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_records_in_other_encodings_are_refused_at_once(tmp_path, jsonl, encoding):
    content = jsonl(tmp_path / "a.jsonl", ["one", "two"] * 50).read_text()
    (tmp_path / "b.jsonl").write_text(content, encoding=encoding)
    found = gathered(tmp_path)
    assert kinds(found) == [("b.jsonl", "not text")]


def test_latin1_is_kept_and_told(config, corpus):
    (corpus / "a.txt").write_text(TEXT)
    (corpus / "b.txt").write_bytes(("Über die Größe und Höhe der Bäume. " * 20).encode("latin-1"))
    seen = []
    prepare(config, on_problem=seen.append)
    assert [problem.kind for problem in seen] == ["invalid UTF-8"]


def test_one_compressed_file_is_split_like_a_plain_one(config, corpus):
    (corpus / "a.txt").write_text(TEXT)
    plain = prepare(config)
    (corpus / "a.txt").unlink()
    (corpus / "a.txt.zst").write_bytes(zstandard.compress(TEXT.encode()))
    assert prepare(config).directory == plain.directory
    (corpus / "a.txt.zst").unlink()
    (corpus / "a.txt").write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    assert prepare(config).directory == plain.directory


def test_tokenizers_learn_from_every_text_once(corpus):
    (corpus / "a.txt").write_text(TEXT)
    (corpus / "b.txt").write_text(TEXT)
    (corpus / "c.png").touch()
    seen = []
    assert list(read_texts((str(corpus), str(corpus / "a.txt")), "text", seen.append)) == [TEXT]
    assert [problem.kind for problem in seen] == ["left out", "duplicate", "duplicate"]
