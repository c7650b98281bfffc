"""Sources: what becomes a document, what is held out, what identifies a corpus."""

import bz2
import gzip
import json
import lzma
import os
import socket
import sys
import tempfile
import weakref
from pathlib import Path

import pytest

from nanochat.common import UsageError, base_dir
from nanochat.data import sources
from nanochat.data.sources import (
    compressed_bits_per_byte,
    describe_corpus,
    file_shard,
    find_files,
    local_corpus,
    open_corpus,
    python_corpus,
    remarks,
    split_file,
)
from nanochat.data.text import iterate_documents


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def text_of(shards):
    return [document for shard in shards for document in shard.documents()]


def test_one_document_holds_out_its_last_tenth(tmp_path):
    path = write(tmp_path / "a.txt", "".join(chr(97 + i % 26) for i in range(1003)))
    corpus = local_corpus(str(path))
    train, val = text_of(corpus.train), text_of(corpus.val)
    assert (len(train), len(val)) == (1, 1)
    assert len(val[0]) == 100
    assert train[0] + val[0] == path.read_text()


def test_one_file_of_documents_holds_out_the_last_tenth_of_them(tmp_path):
    path = write(
        tmp_path / "a.txt",
        "\n<|endoftext|>\n".join(f"story {i}" for i in range(20)) + "\n<|endoftext|>\n",
    )
    corpus = local_corpus(str(path))
    assert text_of(corpus.train) == [f"story {i}" for i in range(18)]
    assert text_of(corpus.val) == ["story 18", "story 19"]


def test_the_split_of_one_file_is_what_stored_runs_have(tmp_path):
    """Recorded from the version of commit 5fb8df4; a change here would make runs of such data impossible to resume."""
    lines = [json.dumps({"text": f"é{i} " * (i + 1)}, ensure_ascii=False) for i in range(25)] + [
        '{"text": " "}'
    ]
    many, one = (
        write(tmp_path / "a.jsonl", "\n".join(lines) + "\n"),
        write(tmp_path / "b.txt", "né " * 101),
    )
    recorded = {
        many: (
            [(0, 23, False, 1325, "1c323b6e"), (23, None, False, 245, "d31f79e5")],
            "2 of 25 documents",
        ),
        one: (
            [(0, 273, True, 364, "ddace735"), (273, None, True, 40, "ed94b58c")],
            "30 of 303 characters",
        ),
    }
    for path, (shards, note) in recorded.items():
        corpus = local_corpus(str(path))
        found = [
            (s.first, s.last, s.cut_characters, s.n_bytes, s.fingerprint[:8])
            for s in corpus.train + corpus.val
        ]
        assert (found, corpus.note) == (shards, f"held out: the last tenth ({note})")


def test_splitting_one_file_holds_no_documents(tmp_path, monkeypatch):
    """The file may be larger than memory."""

    class Text(str):
        __slots__ = ("__weakref__",)

    alive, most = weakref.WeakSet(), 0

    def documents(path, column):
        nonlocal most
        for i in range(1000):
            text = Text(f"document {i}")
            alive.add(text)
            most = max(most, len(alive))
            yield text

    monkeypatch.setattr(sources, "iterate_documents", documents)
    train, val, note = split_file(tmp_path / "a.jsonl")
    assert (train.last, val.first) == (900, 900)
    assert note == "held out: the last tenth (100 of 1,000 documents)"
    assert train.n_bytes + val.n_bytes == sum(len(f"document {i}") for i in range(1000))
    assert most < 5


def test_one_remote_file_without_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="a.jsonl holds no text"):
        split_file(write(tmp_path / "a.jsonl", '{"text": " "}\n'))


def test_a_document_mark_inside_a_line_is_text(tmp_path):
    assert list(
        iterate_documents(write(tmp_path / "a.txt", "x <|endoftext|> y\n  <|endoftext|> \nz"))
    ) == [
        "x <|endoftext|> y",
        "z",
    ]


def test_several_files_hold_out_the_last(tmp_path):
    for i in range(3):
        write(
            tmp_path / f"{i}.jsonl",
            "".join(json.dumps({"text": f"{i}.{j}"}) + "\n" for j in range(4)),
        )
    corpus = local_corpus(str(tmp_path))
    assert text_of(corpus.val) == [f"2.{j}" for j in range(4)]
    assert len(text_of(corpus.train)) == 8


def test_a_folder_of_single_documents_holds_out_two_percent(tmp_path):
    for i in range(100):
        write(tmp_path / f"{i:03}.txt", f"document {i}")
    corpus = local_corpus(str(tmp_path / "*.txt"))
    assert text_of(corpus.val) == ["document 98", "document 99"]
    assert len(corpus.train) == 1  # small files share a shard


def test_val_data_is_used_whole(tmp_path):
    a, b = write(tmp_path / "a.txt", "train " * 50), write(tmp_path / "b.txt", "validate")
    corpus = open_corpus(str(a), str(b))
    assert text_of(corpus.train) == ["train " * 50]
    assert text_of(corpus.val) == ["validate"]


def test_parquet_and_blank_documents(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pa.table({"id": [1, 2, 3], "text": ["one", None, "  \n"]}), tmp_path / "a.parquet"
    )
    assert list(iterate_documents(tmp_path / "a.parquet")) == ["one"]


# ----- formats that another library reads

LINES = (
    b'{"text": "one \xc3\xa9\\n", "id": 1}\n{"text": " "}\n{"id": 3}\n{"text": "two", "id": 2}\n'
)
TABLE = b'id,text\n1,"a\nb"\n2,\n3,plain\n'
TEXT = "first\r\nsecond\n<|endoftext|>\nthird é\n".encode()
READ = {
    # file: its content, its documents
    "a.jsonl.gz": (gzip.compress(LINES), ["one é\n", "two"]),
    "A.JSONL.GZ": (gzip.compress(LINES), ["one é\n", "two"]),
    "a.jsonl.bz2": (bz2.compress(LINES), ["one é\n", "two"]),
    "a.jsonl.xz": (lzma.compress(LINES), ["one é\n", "two"]),
    "a.txt.gz": (gzip.compress(TEXT), ["first\nsecond\n<|endoftext|>\nthird é\n"]),
    "a.md.gz": (gzip.compress(TEXT), ["first\nsecond\n<|endoftext|>\nthird é\n"]),
    "a.csv": (TABLE, ["a\nb", "plain"]),
    "a [1]*.csv": (TABLE, ["a\nb", "plain"]),
    "A.CSV.GZ": (gzip.compress(TABLE), ["a\nb", "plain"]),
    "lines.json": (LINES, ["one é\n", "two"]),
    "List.JSON": (b'[{"text": "one"}, {"text": null}, {"text": "two"}]', ["one", "two"]),
    "object.json": (b'{\n"text": "one"\n}', ["one"]),
    "many.jsonl.gz": (
        gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(3000))),
        [str(i) for i in range(3000)],
    ),
}
CORRUPT = bytearray(gzip.compress(LINES * 99))
CORRUPT[-6] ^= 255
UNREADABLE = {
    # file: its content, part of the message
    "not.jsonl.gz": (LINES, "cannot be read as json (Not a gzipped file"),
    "short.jsonl.gz": (
        gzip.compress(LINES)[:-20],
        "cannot be read as json (Compressed file ended before",
    ),
    "flipped.jsonl.gz": (bytes(CORRUPT), "cannot be read as json (CRC check failed"),
    "not.jsonl.xz": (LINES, "cannot be read as json ("),
    "short.txt.bz2": (
        bz2.compress(TEXT)[:-20],
        "cannot be read as text (Compressed file ended before",
    ),
    "latin.txt.gz": (gzip.compress("é".encode("latin-1")), "cannot be read as text ('utf-8' codec"),
    "not.json": (b"{no", "cannot be read as json (JSON parse error"),
    "empty.csv": (b"", "cannot be read as csv (No columns"),
    "other.csv": (b"id,body\n1,a\n", "has no column 'text' (it has: id, body); name one: hf:"),
    "other.jsonl.gz": (
        gzip.compress(b'{"body": "a"}\n'),
        "has no column 'text' (it has: body); name one: hf:",
    ),
    "numbers.csv": (b"text\n1\n", "the column 'text' does not hold strings"),
    "numbers.jsonl.gz": (
        gzip.compress(b'{"text": [1]}\n'),
        "the column 'text' does not hold strings",
    ),
}


@pytest.fixture
def nothing_left(tmp_path, monkeypatch, capfd):
    """Fails if a test writes into a cache or temporary folder, looks for another host, or prints."""
    asked = []

    def look_up(host, *_, **__):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = sorted(Path(os.environ["HF_HOME"]).rglob("*"))
    capfd.readouterr()
    yield
    assert not asked and capfd.readouterr() == ("", "")
    assert not any(base_dir().iterdir()) and not list((tmp_path / "temporary").iterdir())
    assert sorted(Path(os.environ["HF_HOME"]).rglob("*")) == before


@pytest.mark.parametrize("name", READ)
def test_formats_that_datasets_reads(tmp_path, nothing_left, name):
    content, documents = READ[name]
    (tmp_path / name).write_bytes(content)
    assert list(iterate_documents(tmp_path / name)) == documents


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_datasets_cannot_read(tmp_path, nothing_left, name):
    content, part = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list(iterate_documents(tmp_path / name))
    assert (
        str(tmp_path / name) in str(caught.value)
        and part in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_compressed_file_is_read_as_it_is_needed(tmp_path, nothing_left):
    """What is broken far behind the first documents does not matter to who wants these."""
    content = gzip.compress(
        b"".join(b'{"text": "%s"}\n' % os.urandom(500).hex().encode() for _ in range(30_000)), 1
    )
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) * 9 // 10])
    documents = iterate_documents(tmp_path / "a.jsonl.gz")
    assert len(next(documents)) == 1000
    with pytest.raises(UsageError, match="ended before"):
        list(documents)


def test_missing_packages_are_named(tmp_path, nothing_left, monkeypatch):
    (tmp_path / "a.TXT.ZST").write_bytes(b"\x28\xb5\x2f\xfd")
    import fsspec

    monkeypatch.setattr(fsspec, "available_compressions", lambda: [None, "gzip"])
    with pytest.raises(
        UsageError, match="a.TXT.ZST needs the package 'zstandard', .* pip install zstandard"
    ):
        list(iterate_documents(tmp_path / "a.TXT.ZST"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match="a.csv needs the package 'datasets', .* pip install datasets"
    ):
        list(iterate_documents(write(tmp_path / "a.csv", "text\na\n")))


def test_endings_in_upper_case_and_unknown_ones(tmp_path):
    """A .tsv is read as it stands, as any file of no known format is."""
    a, b = (
        write(tmp_path / "A.TXT", "text " * 9),
        write(tmp_path / "B.JSONL", '{"text": "line"}\n{"text": "line 2"}\n'),
    )
    write(tmp_path / "c.json", '{"text": "no document"}')
    assert find_files(str(tmp_path)) == [a, b]
    assert list(iterate_documents(b)) == ["line", "line 2"]
    assert list(iterate_documents(write(tmp_path / "a.tsv", "id\ttext\n1\ta\n"))) == [
        "id\ttext\n1\ta\n"
    ]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["one " * 1000, "two"]}), tmp_path / "A.PARQUET")
    assert list(iterate_documents(tmp_path / "A.PARQUET")) == ["one " * 1000, "two"]
    assert file_shard([tmp_path / "A.PARQUET"]).n_bytes > 4000, "of the text, not of the file"


def test_a_folder_of_other_formats_says_how_to_name_them(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    with pytest.raises(
        UsageError,
        match=r"holds no .txt, .jsonl, .parquet file; .* pattern, such as '.*/\*.jsonl.gz'",
    ):
        open_corpus(str(tmp_path))
    assert text_of(open_corpus(str(tmp_path / "*.jsonl.gz")).val) == ["two"]


def test_text_that_moved_is_named_by_its_new_place(tmp_path):
    for flag in ("--data", "--val-data"):
        with pytest.raises(
            UsageError,
            match=f"^{flag}=.*gone.txt: no such file.*a resumed run takes {flag}=NEWPATH",
        ):
            find_files(str(tmp_path / "gone.txt"), flag)


def test_a_null_is_no_document(tmp_path):
    assert list(
        iterate_documents(write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "one"}\n'))
    ) == ["one"]


def test_readable_files_that_a_folder_leaves_out_are_said(tmp_path):
    for name in (
        "a.txt",
        "b.txt",
        "c.txt",
        "t.csv",
        "s.CSV",
        "x.json",
        "sources.json",
        "notes.md",
        "deep/u.jsonl.gz",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, f"text of {name} " * (9 if name != "c.txt" else 1))
    corpus = open_corpus(str(tmp_path))
    assert remarks(corpus) == [
        f"left out in the folder {tmp_path}: 2 .csv, 1 .json, 1 .jsonl.gz; name them by a pattern, such as "
        f"'{tmp_path}/**/*.csv'"
    ]
    assert "  " + remarks(corpus)[0] in describe_corpus(corpus)
    assert remarks(open_corpus("python", str(tmp_path))) == remarks(corpus), "of --val-data too"
    assert remarks(open_corpus(str(tmp_path / "*.txt"))) == []


def test_much_held_out_text_is_said(tmp_path):
    a, b = write(tmp_path / "a.txt", "ab" * 100), write(tmp_path / "b.txt", "cd" * 50)
    assert remarks(open_corpus(str(tmp_path))) == [
        "note: 33% of the text is held out; --val-data names another text"
    ]
    assert remarks(open_corpus(str(a), str(b))) == [], "the user said so"
    write(a, "ab" * 200)
    assert remarks(open_corpus(str(tmp_path))) == [], "a fifth is not much"


def test_the_same_text_on_both_sides_is_said(tmp_path):
    a = write(tmp_path / "a.txt", "ab" * 100)
    said = "is on both sides: validation then measures memory; give --val-data other text"
    assert remarks(open_corpus(str(a), str(a))) == [f"warning: the text of a.txt {said}"]
    assert remarks(open_corpus(str(a))) == [], "a split file is not the same text"
    for name in ("b.txt", "c.txt", "d.txt"):
        write(tmp_path / name, name * 20)
    assert remarks(open_corpus(str(tmp_path), str(tmp_path / "[ac].txt"))) == [
        f"warning: the text of a.txt and 1 more {said}"
    ], "also where files share shards"


def test_the_fingerprint_shown_is_the_one_compared(tmp_path):
    corpus = open_corpus(str(write(tmp_path / "a.txt", "ab" * 100)))
    shown = "\n".join(describe_corpus(corpus))
    assert (
        f"fingerprint {corpus.fingerprint[:16]}" in shown.splitlines()[0]
        and shown.count("; fingerprint ") == 1
    )


def test_fingerprint_follows_content_not_place(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.txt", "same words " * 30)
    x, y = (local_corpus(str(tmp_path / name / "a.txt")) for name in "xy")
    assert x.fingerprint == y.fingerprint
    write(tmp_path / "y" / "a.txt", "same words " * 29 + "other word ")
    assert local_corpus(str(tmp_path / "y" / "a.txt")).fingerprint != x.fingerprint


def test_python_corpus_is_split_by_name():
    corpus = python_corpus()
    train = {path for shard in corpus.train for path in shard.files}
    val = {path for shard in corpus.val for path in shard.files}
    assert val and not train & val
    assert 0.01 < len(val) / len(train | val) < 0.03
    assert any(path.name == "argparse.py" for path in train | val)
    assert not any("test" in path.parts and "torch" not in path.parts for path in train | val)


def test_compressors():
    class Fixed:
        def documents(self):
            return iter(["abcd" * 1000])

    figures = compressed_bits_per_byte([Fixed()])
    assert set(figures) == {"gzip -9", "xz -9"} and all(0 < bpb < 0.3 for bpb in figures.values())
