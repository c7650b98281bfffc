"""Sources: what becomes a document, what is held out, what identifies a corpus."""

import dataclasses
import gzip
import json
import lzma
import pickle
import subprocess
import tracemalloc
import weakref
from types import SimpleNamespace

import pytest

from nanochat.common import UsageError, sha256_hex
from nanochat.data import sources
from nanochat.data.files import named_files
from nanochat.data.sources import (
    Part,
    compressed_bits_per_byte,
    describe_corpus,
    estimated_bytes,
    file_shard,
    hash_files,
    local_corpus,
    open_corpus,
    python_corpus,
    remarks,
    split_file,
)
from nanochat.data.text import Piece
from nanochat.data.textfile import FileRefused


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
    """Recorded from the version of commit 5fb8df4; a change here would make runs of such data
    impossible to resume."""
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


def test_the_files_of_a_folder_are_what_stored_runs_have(tmp_path):
    """Recorded from the version of commit a23eaf5, as above."""
    (tmp_path / "lines" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    for i, name in enumerate(["b.jsonl", "a.jsonl", "sub/c.jsonl", "B.jsonl"]):
        lines = [json.dumps({"text": f"{name} {j} " * (i + 3)}) + "\n" for j in range(30)]
        write(tmp_path / "lines" / name, "".join(lines))
    for i in range(120):
        name = f"sub/{i}.txt" if i % 3 else f"{i}.txt"
        write(tmp_path / "texts" / name, f"text {i} " * 9)
    recorded = {
        "lines": ("5f2e7afd5ef09e80", "the last file, c.jsonl"),
        "lines/*.jsonl": ("e51fa08b3a8e701d", "the last file, b.jsonl"),
        "texts": ("685be0f2467a567a", "the last 2 of 120 documents"),
    }
    for value, (fingerprint, note) in recorded.items():
        corpus = local_corpus(f"{tmp_path}/{value}")
        assert (corpus.fingerprint[:16], corpus.note) == (fingerprint, f"held out: {note}")
        assert corpus.left_out == ()


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
            yield Piece(text, True)

    monkeypatch.setattr(sources, "iterate_pieces", documents)
    train, val, note = split_file(tmp_path / "a.jsonl")
    assert (train.last, val.first) == (900, 900)
    assert note == "held out: the last tenth (100 of 1,000 documents)"
    assert train.n_bytes + val.n_bytes == sum(len(f"document {i}") for i in range(1000))
    assert most < 5


def test_one_remote_file_without_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="a.jsonl holds no text"):
        split_file(write(tmp_path / "a.jsonl", '{"text": " "}\n'))


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


def test_a_folder_of_other_formats_says_how_to_name_them(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
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
            named_files(str(tmp_path / "gone.txt"), flag)


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
        write(tmp_path / name, f"text of {name} " * (300 if name != "c.txt" else 30))
    corpus = open_corpus(str(tmp_path))
    assert remarks(corpus) == [
        f"left out in the folder {tmp_path}: 2 .csv, 1 .json, 1 .jsonl.gz, 1 .md; name them by a "
        f"pattern, such as '{tmp_path}/**/*.csv'"
    ]
    assert "  " + remarks(corpus)[0] in describe_corpus(corpus)
    assert remarks(open_corpus("python", str(tmp_path))) == remarks(corpus), "of --val-data too"
    assert remarks(open_corpus(str(tmp_path / "*.txt"))) == []


def test_empty_files_are_said(tmp_path):
    write(tmp_path / "a.txt", "ab" * 100)
    assert remarks(open_corpus(str(tmp_path))) == []
    write(tmp_path / "b.txt", "")
    assert remarks(open_corpus(str(tmp_path))) == ["left out: 1 empty file (b.txt)"]
    write(tmp_path / "c.txt", "\n")
    for value in (tmp_path, tmp_path / "*.txt"):
        assert remarks(open_corpus(str(value))) == ["left out: 2 empty files (b.txt, c.txt)"]


def test_much_held_out_text_is_said(tmp_path):
    a, b = (
        write(tmp_path / name, "".join(f'{{"text": "{name} {i:02}"}}\n' for i in range(n)))
        for name, n in (("a.jsonl", 40), ("b.jsonl", 20))
    )
    assert remarks(open_corpus(str(tmp_path))) == [
        "note: 33% of the text is held out; --val-data names another text"
    ]
    assert remarks(open_corpus(str(a), str(b))) == [], "the user said so"
    write(a, "".join(f'{{"text": "a.jsonl {i:02}"}}\n' for i in range(80)))
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


@pytest.mark.parametrize("n_bytes", [10, 5000, 300_000])
def test_xz_packs_as_well_as_with_its_own_dictionary(n_bytes):
    """The one that fits the text takes a hundredth of the memory."""
    text = "".join(f"{i * i} {i % 7}\n" for i in range(n_bytes))[:n_bytes]
    held_out = [SimpleNamespace(documents=lambda: iter([text]))]
    packed = 8 * len(lzma.compress(text.encode(), preset=9)) / n_bytes
    assert compressed_bits_per_byte(held_out, n_bytes)["xz -9"] == round(packed, 4)


def test_a_column_of_a_file_a_folder_or_a_pattern(tmp_path):
    """It is part of what identifies a shard, since the same file has other text in others."""
    rows = [{"text": f"text {i}", "body": f"body {i} é"} for i in range(20)]
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows))
    plain = open_corpus(f"{tmp_path}/a.jsonl")
    named = open_corpus(f"{tmp_path}/a.jsonl:body")
    assert text_of(named.train + named.val) == [row["body"] for row in rows]
    assert (named.note, plain.note) == ("held out: the last tenth (2 of 20 documents)",) * 2
    assert named.train_bytes == sum(len(row["body"].encode()) for row in rows[:18])
    assert plain.fingerprint == open_corpus(f"{tmp_path}/a.jsonl:text").fingerprint
    assert plain.fingerprint != named.fingerprint
    for value in (f"{tmp_path}:body", f"{tmp_path}/*.jsonl:body"):
        corpus = open_corpus(value, f"{tmp_path}/b.jsonl:text")
        assert set(text_of(corpus.train)) == {row["body"] for row in rows}
        assert text_of(corpus.val) == [row["text"] for row in rows]
        assert estimated_bytes(value) == estimated_bytes(str(tmp_path))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"text": ["x"] * 20, "body": [f"body {i} " * 99 for i in range(20)]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    assert len(text_of(open_corpus(f"{tmp_path}/c.parquet:body").val)) == 2
    assert estimated_bytes(f"{tmp_path}/c.parquet:body") > 10_000
    assert estimated_bytes(f"{tmp_path}/c.parquet") < 1_000


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("n_before, described", [(9, False), (3_000_000, False), (3_000_000, True)])
def test_a_latin_text_among_others_is_replaced(tmp_path, compression, n_before, described):
    """Run, the command of the message leaves a folder or pattern that can be read."""
    folder = tmp_path / "my texts"
    folder.mkdir()
    text = "x" * n_before + " café\n"
    content = text.encode("latin-1")
    path = folder / f"b.txt{compression}"
    path.write_bytes(gzip.compress(content) if compression else content)
    # of several documents, so that not all of the next file is read to split the folder
    for name, other in (("a.txt", "1\n<|endoftext|>\n2\n"), ("c.txt", "3 " * 5000)):
        packed = gzip.compress(other.encode()) if compression else other.encode()
        (folder / f"{name}{compression}").write_bytes(packed)
    value = f"{folder}/*.gz" if compression else str(folder)

    def read(described=False):
        corpus = open_corpus(value)
        if described:
            describe_corpus(corpus)
        return sorted(text_of([*corpus.train, *corpus.val]), key=len)

    with pytest.raises(UsageError, match=r"b.txt.* is not UTF-8 .* -c drops") as caught:
        read(described)
    command = str(caught.value).split("convert it: ")[1].split(" (-f names")[0]
    subprocess.run(command, shell=True, check=True)
    assert text in read()
    assert len(list(folder.iterdir())) == 3
    # a file that is named itself is kept
    path.write_bytes(gzip.compress(content) if compression else content)
    with pytest.raises(UsageError, match="is not UTF-8") as caught:
        text_of(open_corpus(str(path)).train)
    assert "&&" not in str(caught.value)
    with pytest.raises(UsageError, match="is not UTF-8") as caught:
        text_of(open_corpus(str(folder / "c.txt*"), str(path)).val)
    assert "&&" not in str(caught.value)


def test_a_binary_file_among_others_says_what_to_do(tmp_path):
    write(tmp_path / "a.txt", "ab" * 100)
    write(tmp_path / "b.txt", "ab\0" * 100)
    remedy = "; move it out of the folder, or name the others by a pattern"
    for data, val_data in ((tmp_path, ""), (tmp_path / "a.txt", tmp_path)):
        with pytest.raises(UsageError, match=f"b.txt is a binary file .*{remedy}$"):
            text_of(open_corpus(str(data), str(val_data)).val)
    with pytest.raises(UsageError, match="b.txt is a binary file .* or .parquet$"):
        open_corpus(str(tmp_path / "b.txt"))


def test_a_file_that_is_refused_is_refused_alike_on_every_rank():
    error = pickle.loads(pickle.dumps(FileRefused("message", "with a remedy")))
    assert (type(error), str(error), error.if_found) == (FileRefused, "message", "with a remedy")


def test_pointers_instead_of_text_are_counted(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for name, text in {"a.jsonl": pointer, "b.jsonl": pointer, "c.txt": "text " * 99}.items():
        write(tmp_path / name, text)
    message = r"2 of 3 files are Git LFS pointers, .*\(a.jsonl, b.jsonl\); .*`git lfs pull`"
    for value in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(UsageError, match=f"--data=.*: {message}"):
            open_corpus(str(value))
        with pytest.raises(UsageError, match=f"--val-data=.*: {message}"):
            open_corpus(f"{tmp_path}/c.txt", str(value))
        with pytest.raises(UsageError, match=message):
            estimated_bytes(str(value))
    with pytest.raises(UsageError, match="a.jsonl is a Git LFS pointer.*`git lfs pull`"):
        open_corpus(f"{tmp_path}/a.jsonl")


@pytest.mark.parametrize(
    "files, value, words",
    [
        (["state.json", "data-0.arrow"], "", "save_to_disk.*to_parquet"),
        (["dataset_dict.json", "train/state.json", "train/data-0.arrow"], "", "several splits"),
        (["sub/state.json", "sub/data-0.arrow"], "", "sub is a folder that save_to_disk"),
        (["a.arrow"], "", "a.arrow is an Arrow file.*to_parquet"),
        (["a.arrow"], "a.arrow", "a.arrow is an Arrow file.*to_parquet"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, files, value, words):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "{}")
    with pytest.raises(UsageError, match=words):
        open_corpus(str(tmp_path / value))


def test_marks_inside_documents_are_counted(tmp_path):
    text = "one <|endoftext|> two\n<|endoftext|>\nthree\n" * 5
    lines = (json.dumps({"text": f"{i} <|endoftext|>"}) + "\n" for i in range(5))
    files = {"a.txt": text, "a.md": text, "a.jsonl": "".join(lines)}
    for name, content in files.items():
        corpus = open_corpus(str(write(tmp_path / name, content)))
        assert remarks(corpus) == [
            "note: <|endoftext|> stands inside documents, 5 times in the beginnings of up to 8 "
            "files; it is text there: it ends a document only in a text file, alone on its line"
        ]


def test_one_large_document_is_split_in_pieces(tmp_path):
    """Neither splitting it nor reading its held-out part holds the whole of it."""
    path = tmp_path / "a.txt"
    with path.open("w") as f:
        for i in range(800):
            f.write(f"{i:05} {'x' * 20_000}\n" * 2)
    tracemalloc.start()
    try:
        corpus = open_corpus(str(path))
        (held_out,) = text_of(corpus.val)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    n_bytes = path.stat().st_size
    assert len(held_out) == n_bytes // 10
    assert corpus.train_bytes + len(held_out) == n_bytes
    assert most < n_bytes / 2


@pytest.mark.parametrize("n_shards, words", [(1, "1 shard"), (2, "2 shards")])
def test_plurals(tmp_path, n_shards, words):
    corpus = open_corpus(str(write(tmp_path / "a.txt", "ab" * 100)))
    corpus = dataclasses.replace(corpus, train=corpus.train * n_shards)
    assert describe_corpus(corpus)[1].endswith(f" bytes in {words}")


def test_text_that_changes_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "ab" * 100)
    shard = file_shard([path])
    assert len(list(shard.documents())) == 1
    write(path, "ab" * 101)
    with pytest.raises(UsageError, match="a.txt changed while it was in use, from 200 to 202 byte"):
        shard.documents()

    def hash_and_append(path):
        with path.open("a") as f:
            f.write("more")
        return "0" * 64

    monkeypatch.setattr(sources, "sha256_file", hash_and_append)
    with pytest.raises(UsageError, match="a.txt changed while it was in use, from 202 to 206 byte"):
        hash_files([path])


@pytest.mark.parametrize(
    "name, content, is_anew",
    [
        ("a.txt", b"one\ntwo\n", False),
        ("a.txt", b"one\r\ntwo\r\n", True),
        ("a.jsonl", b'{"text": "x"}\r\n', False),
        ("a.txt.gz", b"", True),
    ],
)
def test_token_files_of_what_was_read_otherwise_are_not_used(tmp_path, name, content, is_anew):
    (tmp_path / name).write_bytes(content)
    identity = json.dumps([[sha256_hex(content)], 0, None, False])
    shard = file_shard([tmp_path / name], Part(n_bytes=3))
    assert (shard.fingerprint != sha256_hex(identity)) == is_anew
