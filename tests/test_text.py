"""Documents of one file: formats, compressions, and what cannot be read."""

import bz2
import gzip
import lzma
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from nanochat.common import UsageError, base_dir
from nanochat.data.sources import (
    file_shard,
    find_files,
)
from nanochat.data.text import iterate_documents, text_format, text_suffix


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_document_mark_inside_a_line_is_text(tmp_path):
    assert list(
        iterate_documents(write(tmp_path / "a.txt", "x <|endoftext|> y\n  <|endoftext|> \nz"))
    ) == [
        "x <|endoftext|> y",
        "z",
    ]


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
# in its checksum
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
    """Fails if a test writes into a cache or temporary folder, looks for another host, or
    prints."""
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


def test_parquet_and_blank_documents(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pa.table({"id": [1, 2, 3], "text": ["one", None, "  \n"]}), tmp_path / "a.parquet"
    )
    assert list(iterate_documents(tmp_path / "a.parquet")) == ["one"]


def test_a_null_is_no_document(tmp_path):
    assert list(
        iterate_documents(write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "one"}\n'))
    ) == ["one"]


@pytest.mark.parametrize(
    "name, found, suffix",
    [
        ("a.jsonl.gz", (".jsonl", ".gz"), ".jsonl.gz"),
        ("DATA.JSONL.GZ", (".jsonl", ".gz"), ".JSONL.GZ"),
        ("b.Parquet", (".parquet", ""), ".Parquet"),
        ("a.gz.txt", (".txt", ""), ".txt"),
        ("notes.md.xz", ("", ".xz"), ""),
        ("a.tsv", ("", ""), ""),
        ("plain", ("", ""), ""),
        ("x.v2.csv.zst", (".csv", ".zst"), ".csv.zst"),
    ],
)
def test_formats_of_names(name, found, suffix):
    assert (text_format(name), text_suffix(name)) == (found, suffix)
