"""Documents of one file: formats, compressions, columns, and what cannot be read."""

import bz2
import errno
import functools
import gzip
import json
import lzma
import os
import random
import subprocess
import tempfile
from pathlib import Path

import pytest

from nanochat.common import UsageError, base_dir
from nanochat.data import textfile
from nanochat.data.text import (
    Piece,
    cut_at_blanks,
    cut_pieces,
    documents_between,
    inline_marks,
    iterate_documents,
    iterate_pieces,
    joined,
    read_prompts,
    read_text,
    refuse_what_is_no_text,
    split_column,
    text_format,
    text_suffix,
)
from nanochat.data.textfile import END_OF_DOCUMENT, is_lfs_pointer
from nanochat.data.tokenizer import (
    GPT2_PATTERN,
    LLAMA_PATTERN,
    SPLIT_PATTERN,
    Tokenizer,
    train_tokenizer,
)

pa = pytest.importorskip("pyarrow")


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    # at their fastest
    ".xz": functools.partial(lzma.compress, preset=0),
    ".bz2": functools.partial(bz2.compress, compresslevel=1),
}
PACKED = list(PACKERS)[1:]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path, values, kind=None, column="text", **options):
    import pyarrow.parquet

    table = pa.table({"id": range(len(values)), column: pa.array(values, kind)})
    pyarrow.parquet.write_table(table, path, **options)
    return path


def refusal(path, column="text"):
    """The message with which a file is refused, which names it and is one line."""
    with pytest.raises(UsageError) as caught:
        list(iterate_documents(path, column))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.fixture
def nothing_left(tmp_path, monkeypatch, capfd):
    """Fails if a test writes into a cache or temporary folder, or prints."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = sorted(Path(os.environ["HF_HOME"]).rglob("*"))
    capfd.readouterr()
    yield
    assert capfd.readouterr() == ("", "")
    assert not any(base_dir().iterdir()) and not list((tmp_path / "temporary").iterdir())
    assert sorted(Path(os.environ["HF_HOME"]).rglob("*")) == before


# ---- one reader for every format and compression ----

LINES = '{"text": "one é\\n", "id": 1}\n\n{"text": " "}\n{"id": 3, "text": null}\n{"text": "two"}'
# what an unused field is changes late, and a new one appears
CHANGING = [{"text": "one", "id": None}] * 3000 + [
    {"text": "two", "id": 1},
    {"text": "three", "id": [{"a": 1.5}], "more": {"b": "x"}},
]
TABLE = 'id,text\n1,"a\nb ""c"", d"\n2,\n\n3,plain é\n4\n'

READ = {
    # file: its content, its documents
    "marks.txt": ("first\nsecond\n<|endoftext|>\n\nthird é\n", ["first\nsecond", "third é"]),
    "marks.md": ("first\n<|endoftext|>\nthird\n", ["first", "third"]),
    "blanks.txt": ("x <|endoftext|> y\n  <|endoftext|> \nz", ["x <|endoftext|> y", "z"]),
    "only.txt": ("<|endoftext|>\n<|endoftext|>", []),
    "none.txt": ("\none\n\n", ["\none\n\n"]),
    "bom.txt": ("\ufefffirst\n<|endoftext|>\n\ufeffsecond", ["first", "\ufeffsecond"]),
    "crlf.txt": ("a\r\nb\r\n<|endoftext|>\r\nc\r\n", ["a\nb", "c"]),
    "twice.txt": ("a\r\r\nb\r\n", ["a\nb\n"]),
    "bar.txt": ("10%\r20%\rdone\n", ["10%\r20%\rdone\n"]),
    "table.log": ("id\ttext\n1\ta\n", ["id\ttext\n1\ta\n"]),
    "empty.txt": ("", []),
    "a.jsonl": (LINES, ["one é\n", "two"]),
    "crlf.jsonl": ('\ufeff{"text": "one"}\r\n{"text": "two\\r\\n"}\r\n', ["one", "two\r\n"]),
    "CHANGING.JSONL": (
        "\n".join(map(json.dumps, CHANGING)),
        [line["text"] for line in CHANGING],
    ),
    "surrogate.jsonl": ('{"text": "a\\ud800b"}', ["a?b"]),
    "lines.json": ("\n" + LINES, ["one é\n", "two"]),
    "List.JSON": ('[{"text": "one"}, {"text": null},\n{"text": "two"}]', ["one", "two"]),
    "strings.json": ('["one", "two"]', ["one", "two"]),
    "object.json": ('{\n"text": "one"\n}', ["one"]),
    "a [1]*.csv": (TABLE, ['a\nb "c", d', "plain é"]),
    "bom.CSV": ("\ufefftext,id\r\nNA,1\r\n5,2\r\n", ["NA", "5"]),
    "large.csv": (f"text\n{'x' * 200_000}\n", ["x" * 200_000]),
}


@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize("name", READ)
def test_every_compression_gives_the_documents_of_the_plain_file(
    tmp_path, nothing_left, name, compression
):
    content, documents = READ[name]
    path = write(tmp_path / f"{name}{compression}", PACKERS[compression](content.encode()))
    assert list(iterate_documents(path)) == documents


def test_several_streams_in_a_row_are_one_file(tmp_path):
    for compression, pack in list(PACKERS.items())[1:]:
        content = pack(b"one\n") + pack(b"<|endoftext|>\n") + pack(b"two")
        path = write(tmp_path / f"a.txt{compression}", content)
        assert list(iterate_documents(path)) == ["one", "two"], compression
    padded = lzma.compress(b"one\n") + bytes(8) + lzma.compress(b"two")
    assert read_text(write(tmp_path / "padded.txt.xz", padded)) == "one\ntwo"


def reference(text):
    """The documents of a text by the definition, all of it in memory."""
    text = text.removeprefix("\ufeff")
    while "\r\n" in text:
        text = text.replace("\r\n", "\n")
    if END_OF_DOCUMENT not in text:
        return [text] if text.strip() else []
    documents = [[]]
    for line in text.split("\n"):
        if line.strip() == END_OF_DOCUMENT:
            documents.append([])
        else:
            documents[-1].append(line)
    texts = ["\n".join(lines).strip("\n") for lines in documents]
    return [text for text in texts if text.strip()]


@pytest.mark.parametrize("block, long_line", [(1, 40), (7, 40), (64, 100), (64, 10_000)])
def test_blocks_never_change_the_documents(tmp_path, monkeypatch, block, long_line):
    """Marks, line ends and characters that blocks cut, in random texts."""
    monkeypatch.setattr(textfile, "BLOCK_BYTES", block)
    monkeypatch.setattr(textfile, "LONG_LINE", long_line)
    generator = random.Random(5)
    words = ["\n", "\n", "\n", "\r\n", "\r", " ", "a", "é", "🙂", "<", "|", "\x85", "\ufeff"]
    words.append(END_OF_DOCUMENT)
    long = "word <|endoftext|> and 🙂 " * 9
    for _ in range(150):
        text = "".join(generator.choices([*words, long], k=generator.randrange(60)))
        path = write(tmp_path / "a.txt", text)
        assert list(iterate_documents(path)) == reference(text), repr(text)


def test_a_compressed_file_is_read_as_it_is_needed(tmp_path, monkeypatch, nothing_left):
    """What is broken far behind the first documents does not matter to who wants these."""
    monkeypatch.setattr(textfile, "BLOCK_BYTES", 10_000)
    line = b'{"text": "%s"}\n'
    content = b"".join(line % random.Random(i).randbytes(500).hex().encode() for i in range(900))
    for compression, pack in PACKERS.items():
        packed = pack(content)
        path = write(tmp_path / f"a.jsonl{compression}", packed[: len(packed) * 9 // 10 - 3])
        documents = iterate_documents(path)
        assert len(next(documents)) == 1000
        with pytest.raises(UsageError, match="truncated" if compression else "line 810 "):
            list(documents)


# ---- truncated, damaged, something else ----


@pytest.mark.parametrize("compression", PACKED)
def test_damage_is_noticed_in_every_compression(tmp_path, compression):
    content = random.Random(1).randbytes(3000).hex().encode()
    packed = PACKERS[compression](content)
    path = tmp_path / f"a.txt{compression}"
    for n in (len(packed) // 2, len(packed) - 1, 12, 0):
        assert "is truncated" in refusal(write(path, packed[:n])), n
    second = packed + packed[: len(packed) // 2]
    assert "is truncated" in refusal(write(path, second))
    followed = refusal(write(path, packed + b"rubbish"))
    tool = textfile.TOOLS[compression]
    assert f"not {tool} data" in followed and f"`{tool} -t`" in followed
    if compression != ".zst":
        # which holds a checksum only where it is asked for
        flipped = bytearray(packed)
        flipped[len(packed) // 2] ^= 255
        assert f"`{tool} -t`" in refusal(write(path, bytes(flipped)))
    plain = refusal(write(path, b"plain text"))
    assert f"is not {tool} data" in plain and f"take {compression} off" in plain


def test_a_zstd_checksum_is_compared(tmp_path):
    """The command zstd adds one; the bytes are what it makes of 40 times "some text "."""
    packed = bytearray.fromhex("28b52ffd04588d000050736f6d65207465787420010083550b12fb30466c")
    path = write(tmp_path / "a.txt.zst", bytes(packed))
    assert list(iterate_documents(path)) == ["some text " * 40]
    packed[-1] ^= 255
    assert "`zstd -t`" in refusal(write(path, bytes(packed)))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TAR = b"a.txt".ljust(257, b"\0") + b"ustar\0"
ANY = "any content, with any text in it " * 9

REFUSED = {
    # file: its content, words of the message
    "pointer.txt": (POINTER, ["Git LFS pointer", "git lfs pull"]),
    "pointer.jsonl.gz": (POINTER, ["Git LFS pointer", "git lfs pull"]),
    "pointer.parquet": (POINTER, ["Git LFS pointer", "git lfs pull"]),
    "gzip.txt": (gzip.compress(b"text"), ["is gzip data", "ends in .gz"]),
    "zstd.jsonl": (zstd(b"text"), ["is zstd data", "ends in .zst"]),
    "bzip2.csv": (bz2.compress(b"text"), ["is bzip2 data", "ends in .bz2"]),
    "xz.gz": (lzma.compress(b"text"), ["is xz data", "ends in .xz"]),
    "twice.txt.gz": (gzip.compress(gzip.compress(b"text")), ["gzip data inside", "unpack"]),
    "zip.txt": (b"PK\x03\x04\x14\0", ["is a zip archive", "unzip"]),
    "t.tar": (TAR, ["is a tar archive", "unpack it, with tar"]),
    "t.tar.gz": (gzip.compress(TAR), ["holds a tar archive inside; unpack it"]),
    "a.ndjson": (b'{"text": "x"}', ["is JSON lines", "ends in .jsonl"]),
    "A.TSV.gz": (gzip.compress(b"id\ttext\n1\tx\n"), ["a table with tabs", ".csv or .jsonl"]),
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3", ["is a PDF", "pdftotext"]),
    "table.txt": (b"PAR1\x15\x04\x15", ["is a parquet file", "ends in .parquet"]),
    "no.parquet": (b"PAR0" * 9, ["is not a readable parquet file"]),
    "a.parquet.gz": (gzip.compress(b"PAR1"), ["parquet files are compressed inside", "unpack"]),
    "nul.txt": (b"text\0text", ["is a binary file (byte 4 is NUL)", "UTF-8 text"]),
    "nul.txt.xz": (lzma.compress(b"text\0text"), ["is a binary file (byte 4 is NUL)"]),
    "utf16.txt": (
        ANY.encode("utf-16"),
        ["in UTF-16", "iconv -f UTF-16 -t UTF-8", ".utf8.txt"],
    ),
    "utf16be.txt": (ANY.encode("utf-16-be"), ["iconv -f UTF-16BE -t UTF-8"]),
    "utf16le.jsonl": (ANY.encode("utf-16-le"), ["iconv -f UTF-16LE -t UTF-8"]),
    "utf32.csv": (ANY.encode("utf-32"), ["iconv -f UTF-32 -t UTF-8"]),
    "utf32le.txt": (ANY.encode("utf-32-le"), ["iconv -f UTF-32LE -t UTF-8"]),
    "utf16.txt.gz": (gzip.compress(ANY.encode("utf-16")), ["gzip -dc", "| iconv -f UTF-16 -t"]),
    # numbers of two bytes, such as those of characters
    "tokens.txt": (bytes([1, 0, 39, 0, 46, 0, 4, 0] * 99), ["is a binary file"]),
    "cut.txt": ("é".encode()[:1], ["byte 0 is 0xc3", "unexpected end"]),
    "not.json": (b"{no", ["is not JSON"]),
    "deep.json": (b"[" * 100_000, ["nested too deeply"]),
    "deep.jsonl": (b'{"text": "x"}\n' + b"[" * 100_000, ["line 2", "nested too deeply"]),
    "digits.jsonl": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", ["line 1 is not JSON"]),
    "latin.jsonl": (
        b'{"text": "x"}\n{"text": "\xe9"}\n',
        ["line 2 is not UTF-8 (byte 10 is 0xe9", "iconv -f WINDOWS"],
    ),
    "other.jsonl": (b'{"text": "x"}\n{"id": "1"}', ["line 2 has no column 'text'"]),
    # a column that does not exist is no advice
    "chat.jsonl": (b'{"messages": [{"role": "user"}]}', ["it has: messages), and none that holds"]),
    "latin.json": (b'[{"text": "\xe9"}]', ["is not UTF-8 (byte 11", "iconv -f WINDOWS-1252"]),
    "item.json": (b'[{"text": "x"}, 5]', ["item 2 is 5, not an object"]),
    "number.jsonl.gz": (
        gzip.compress(b'{"text": [1]}\n'),
        ["line 1", "'text' is not a string"],
    ),
    "empty.csv": (b"", ["is empty", "names of its columns"]),
    "other.csv": (b"id,body\n1,word\n", ["has no column 'text' (it has: id, body)"]),
    "wide.csv": (b"id,text\n1,a\n2,b,c\n", ["line 3 has 3 fields for 2 columns"]),
    "open.csv": (b'id,text\n1,"a\n2,b\n', ["line 2 is not CSV", "unexpected end of data"]),
    "nul.csv": (b"id,text\n1,a\0\n", ["line 2 holds NUL"]),
    "latin.csv": (b"text\na\n\xe9\n", ["line 3 is not UTF-8", "iconv -f WINDOWS-1252"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_it_is_and_what_to_do(tmp_path, nothing_left, name):
    content, words = REFUSED[name]
    message = refusal(write(tmp_path / name, content))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("compression", PACKERS)
def test_latin_text_gets_the_command_that_converts_it(tmp_path, compression):
    """Run, the command gives a file with the text."""
    text = "x" * 3_000_000 + " café\n"
    path = tmp_path / f"my text.txt{compression}"
    write(path, PACKERS[compression](text.encode("latin-1")))
    message = refusal(path)
    assert "byte 3,000,004 is 0xe9" in message
    command = message.split("convert it: ")[1].split(" (-f names")[0]
    if compression in (".gz", ""):
        # others need a tool that a machine may lack
        subprocess.run(command, shell=True, check=True)
        assert list(iterate_documents(tmp_path / "my text.utf8.txt")) == [text]


def test_what_is_no_text_is_refused_without_reading_it(tmp_path):
    """For who has a path, and reads the file later."""
    for name in ("pointer.txt", "pointer.parquet", "gzip.txt", "utf16.txt.gz", "a.parquet.gz"):
        content, words = REFUSED[name]
        with pytest.raises(UsageError, match=words[0]):
            refuse_what_is_no_text(write(tmp_path / name, content))
        assert is_lfs_pointer(tmp_path / name) == name.startswith("pointer")
    fine = [write(tmp_path / "fine.txt", "text"), write_parquet(tmp_path / "a.parquet", ["text"])]
    for path in [*fine, write(tmp_path / "empty.txt", ""), tmp_path]:
        refuse_what_is_no_text(path)


def test_saved_datasets_get_the_command_that_writes_parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    one = datasets.Dataset.from_dict({"text": ["one", "two"]})
    one.save_to_disk("one")
    datasets.DatasetDict(train=one, test=one).save_to_disk("both")
    arrow = next(Path("one").glob("*.arrow"))
    for path in (Path("one"), Path("both"), arrow):
        with pytest.raises(UsageError, match="parquet.*: python -c '") as caught:
            refuse_what_is_no_text(path)
        code = str(caught.value).split("python -c '")[1].removesuffix("'")
        exec(code, {})
        written = path.with_name(path.name.removesuffix(".arrow") + ".parquet")
        assert list(iterate_documents(written)) == ["one", "two"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
        pa.ArrowCapacityError("array cannot contain more"),
        KeyError("x"),
    ],
    ids=repr,
)
def test_every_error_on_the_way_is_a_usage_error(tmp_path, monkeypatch, error):
    """Training that reads ahead saves its state before it ends by a UsageError, by no other."""

    def failing(f):
        yield b'{"text": "one"}\n'
        raise error

    monkeypatch.setattr(textfile, "_plain_blocks", failing)
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n')
    documents = iterate_documents(path)
    assert next(documents) == "one"
    with pytest.raises(UsageError, match=r"a\.jsonl"):
        next(documents)


def test_files_that_cannot_be_opened(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.txt")
    assert "No such file" in refusal(tmp_path / "missing.parquet")
    (tmp_path / "folder.txt").mkdir()
    assert "Is a directory" in refusal(tmp_path / "folder.txt")


# ---- parquet ----


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_strings_of_every_type_in_parquet(tmp_path, kind):
    values = ["one", None, "  \n", "two é"]
    assert list(iterate_documents(write_parquet(tmp_path / "A.PARQUET", values, kind))) == [
        "one",
        "two é",
    ]


@pytest.mark.parametrize(
    "values, kind, words",
    [
        ([b"one"], pa.binary(), ["hold strings but binary", "table['text'].cast('string')"]),
        ([b"one"], pa.large_binary(), ["hold strings but large_binary", "set_column(1, 'text'"]),
        ([1], pa.int64(), ["hold strings but int64; write the text as strings"]),
        ([["one"]], pa.list_(pa.string()), ["hold strings but list<"]),
    ],
)
def test_other_types_in_parquet(tmp_path, values, kind, words):
    message = refusal(write_parquet(tmp_path / "a.parquet", values, kind))
    assert [word for word in words if word not in message] == []


def test_a_parquet_value_that_is_not_utf8_is_found_by_its_row(tmp_path):
    values = [b"fine"] * 2500 + [b"caf\xe9"]
    strings = pa.array(values, pa.binary()).view(pa.string())
    path = write_parquet(tmp_path / "a.parquet", strings, row_group_size=2000)
    assert "row 2,500 (the first is 0): the column 'text' is not UTF-8" in refusal(path)


def test_a_damaged_page_of_parquet(tmp_path):
    values = [random.Random(i).randbytes(40).hex() for i in range(4000)]
    path = write_parquet(tmp_path / "a.parquet", values, row_group_size=2000, use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) * 3 // 4
    content[middle : middle + 20_000] = bytes(20_000)
    message = refusal(write(path, bytes(content)))
    assert "is not a readable parquet file after row" in message and "write it again" in message


# ---- names and columns ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_a_column_of_every_format(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, ["one", "two"], column="body")
    elif name == "a.csv":
        write(path, "id,body\n1,one\n2,two\n")
    else:
        lines = b'{"id": "1", "body": "one"}\n{"id": 2, "body": "two"}\n'
        write(path, gzip.compress(lines) if name.endswith(".gz") else lines)
    assert list(iterate_documents(path, "body")) == ["one", "two"]
    message = refusal(path)
    assert "has no column 'text' (it has: id, body)" in message
    assert f"after a colon, behind the file, folder or pattern, such as {path}:body" in message


def test_plain_text_has_no_column(tmp_path):
    assert "no column 'body'" in refusal(write(tmp_path / "a.txt", "text"), "body")


def test_split_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "odd:name.txt", "glob:1.txt"):
        write(Path(name), "text")
    (tmp_path / "x:y").mkdir()
    assert {data: split_column(data) for data in SPLIT} == SPLIT
    with pytest.raises(UsageError, match="--data=a.jsonl:: no column .* leave the colon out"):
        split_column("a.jsonl:")


SPLIT = {
    "a.jsonl": ("a.jsonl", "text"),
    "a.jsonl:body": ("a.jsonl", "body"),
    "*.jsonl:body": ("*.jsonl", "body"),
    "missing.parquet:body": ("missing.parquet", "body"),
    "odd:name.txt": ("odd:name.txt", "text"),
    "odd:name.txt:body": ("odd:name.txt", "body"),
    "glob:*.txt": ("glob:*.txt", "text"),
    "x:y": ("x:y", "text"),
    "x:y:z": ("x:y", "z"),
    "x:y/missing.txt": ("x:y/missing.txt", "text"),
}


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


# ---- marks inside lines, pieces, prompts ----


def test_marks_inside_documents_are_counted(tmp_path):
    text = f"a{END_OF_DOCUMENT}b{END_OF_DOCUMENT}\r\n {END_OF_DOCUMENT} \n{END_OF_DOCUMENT}c\n"
    line = json.dumps({"body": text}) + "\n"
    cases = [
        ("a.txt", text, "text", 3),
        ("a.txt.gz", gzip.compress(text.encode()), "text", 3),
        ("a.jsonl", line * 2, "body", 8),
        ("none.txt", "a\nb\n", "text", 0),
    ]
    for name, content, column, n in cases:
        assert inline_marks(write(tmp_path / name, content), column, 1000) == n, name


def test_inline_marks_reads_no_further_than_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "BLOCK_BYTES", 100)
    path = write(tmp_path / "a.txt", f"x{END_OF_DOCUMENT}\n" * 100)
    assert inline_marks(path, "text", 10_000) == 100 and inline_marks(path, "text", 500) < 50


def test_pieces_of_a_document_join_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "BLOCK_BYTES", 100)
    text = "\n".join(f"line {i}" for i in range(200))
    path = write(tmp_path / "a.txt", text)
    pieces = list(iterate_pieces(path))
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) <= 200
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("first, last", [(0, 5), (3, 4), (2, 7), (4, None), (0, None), (9, 12)])
def test_cut_pieces(first, last):
    text = "abcdefghijkl"
    pieces = [Piece("abc", False), Piece("", False), Piece("defgh", False), Piece("ijkl", True)]
    found = list(cut_pieces([*pieces, Piece("next", True)], first, last))
    assert "".join(piece.text for piece in found) == text[first:last]
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize("first, last", [(0, None), (0, 0), (1, 2), (1, None), (0, 2), (5, 9)])
def test_documents_between(first, last):
    documents = ["abc", "", "de", "f"]
    pieces = [Piece("ab", False), Piece("c", True), Piece("", True), Piece("de", True)]
    found = documents_between([*pieces, Piece("f", False), Piece("", True)], first, last)
    assert list(joined(found)) == documents[first:last]


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, LLAMA_PATTERN, GPT2_PATTERN])
def test_pieces_cut_at_blanks_have_the_tokens_of_the_whole(monkeypatch, pattern):
    """Any text, cut anywhere, encodes as it would in one piece."""
    monkeypatch.setattr("nanochat.data.text.PIECE_CHARACTERS", 13)
    corpus = Path(__file__).read_text(encoding="utf-8")
    tokens = train_tokenizer("bpe", [corpus], 700).tokens
    tokenizer = Tokenizer("bpe", tokens, pattern)
    generator = random.Random(7)
    words = [
        "\n",
        "\n",
        " ",
        " ",
        "\r",
        "\t",
        "\xa0",
        "\x1c",
        "a",
        "the",
        "7",
        "12",
        "é",
        "。",
        "好",
    ]
    for _ in range(300):
        text = "".join(generator.choices([*words, "'s", "'", ".", "!?", "e\u0301"], k=60))
        cuts = sorted(generator.choices(range(61), k=4))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        pieces = [Piece(part, False) for part in parts] + [Piece("", True)]
        found = list(cut_at_blanks(pieces))
        assert "".join(piece.text for piece in found) == text
        assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
        encoded = tokenizer.encode_batch([piece.text for piece in found])
        assert [i for ids in encoded for i in ids] == tokenizer.encode(text), repr(text)
    long = list(cut_at_blanks([Piece("some words " * 99, True)]))
    assert max(len(piece.text) for piece in long) < 26


PROMPTS = "\ufeffone\u2028still one\r\n\n  \ntwo\x0cstill two\x85\n three"


def test_prompts(tmp_path):
    """Lines end at line feeds only, a byte order mark and blank lines are no prompt."""
    from nanochat.apps.sample import prompts_of
    from nanochat.eval.generation import sample_prompts

    expected = ["one\u2028still one", "two\x0cstill two\x85", " three"]
    path = str(write(tmp_path / "prompts", PROMPTS))
    assert read_prompts(path, "--prompts-file") == expected
    assert prompts_of(["zero"], path) == ["zero", *expected]
    assert sample_prompts(path, train_tokenizer("byte", [], -1), None) == expected


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\n \n", "holds no prompt"),
        (b"caf\xe9", "not UTF-8"),
        (gzip.compress(b"one", mtime=0), "is gzip data"),
        (None, "No such file"),
    ],
)
def test_prompts_that_cannot_be_read_name_the_flag(tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        write(path, content)
    with pytest.raises(UsageError, match=words) as caught:
        read_prompts(str(path), "--sample-prompts")
    assert str(caught.value).startswith(f"--sample-prompts={path}: ")
