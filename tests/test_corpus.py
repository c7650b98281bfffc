"""Sources: what becomes a document, what is held out, what identifies a corpus."""

import json

import pytest

from nanochat import corpus as corpora
from nanochat.common import UsageError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def text_of(shards):
    return [document for shard in shards for document in shard.load()]


def test_one_document_holds_out_its_last_tenth(tmp_path):
    path = write(tmp_path / "a.txt", "".join(chr(97 + i % 26) for i in range(1003)))
    corpus = corpora.local_corpus(str(path))
    train, val = text_of(corpus.train), text_of(corpus.val)
    assert (len(train), len(val)) == (1, 1)
    assert len(val[0]) == 100
    assert train[0] + val[0] == path.read_text()


def test_one_file_of_documents_holds_out_the_last_tenth_of_them(tmp_path):
    path = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(f"story {i}" for i in range(20)) + "\n<|endoftext|>\n")
    corpus = corpora.local_corpus(str(path))
    assert text_of(corpus.train) == [f"story {i}" for i in range(18)]
    assert text_of(corpus.val) == ["story 18", "story 19"]


def test_a_document_mark_inside_a_line_is_text(tmp_path):
    assert corpora.read_documents(write(tmp_path / "a.txt", "x <|endoftext|> y\n  <|endoftext|> \nz")) == ["x <|endoftext|> y", "z"]


def test_several_files_hold_out_the_last(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", "".join(json.dumps({"text": f"{i}.{j}"}) + "\n" for j in range(4)))
    corpus = corpora.local_corpus(str(tmp_path))
    assert text_of(corpus.val) == [f"2.{j}" for j in range(4)]
    assert len(text_of(corpus.train)) == 8


def test_a_folder_of_single_documents_holds_out_two_percent(tmp_path):
    for i in range(100):
        write(tmp_path / f"{i:03}.txt", f"document {i}")
    corpus = corpora.local_corpus(str(tmp_path / "*.txt"))
    assert text_of(corpus.val) == ["document 98", "document 99"]
    assert len(corpus.train) == 1  # small files share a shard


def test_val_data_is_used_whole(tmp_path):
    a, b = write(tmp_path / "a.txt", "train " * 50), write(tmp_path / "b.txt", "validate")
    corpus = corpora.open_corpus(str(a), str(b))
    assert text_of(corpus.train) == ["train " * 50]
    assert text_of(corpus.val) == ["validate"]


def test_parquet_and_blank_documents(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pa.table({"id": [1, 2, 3], "text": ["one", None, "  \n"]}), tmp_path / "a.parquet")
    assert corpora.read_documents(tmp_path / "a.parquet") == ["one"]


def test_fingerprint_follows_content_not_place(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.txt", "same words " * 30)
    x, y = (corpora.local_corpus(str(tmp_path / name / "a.txt")) for name in "xy")
    assert x.fingerprint == y.fingerprint
    write(tmp_path / "y" / "a.txt", "same words " * 29 + "other word ")
    assert corpora.local_corpus(str(tmp_path / "y" / "a.txt")).fingerprint != x.fingerprint


def test_python_corpus_is_split_by_name():
    corpus = corpora.python_corpus()
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
    figures = corpora.compressed_bits_per_byte([Fixed()])
    assert set(figures) == {"gzip -9", "xz -9"} and all(0 < bpb < 0.3 for bpb in figures.values())
