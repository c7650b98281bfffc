"""Tokenizers: reversible, special tokens never read from text, byte counts from raw bytes."""

import json

import numpy as np
import pytest

from nanochat import tokenizer as tokenizers
from nanochat.common import UsageError

TEXT = "The café sold 12 crêpes — 日本語 too.\n\n    def f(x):\n        return x  # 🙂\n" * 3


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train("bpe", [TEXT, "plain words and more plain words"], 300)


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_round_trip_and_save(kind, tmp_path):
    tokenizer = tokenizers.train(kind, [TEXT], 300)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < tokenizer.bos == tokenizer.vocab_size - 1
    tokenizer.save(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.encode(TEXT) == ids
    assert loaded.fingerprint == tokenizer.fingerprint


def test_bpe_has_the_size_asked_for_and_merges(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXT)) < 0.7 * len(TEXT.encode())
    assert bpe.encode("any bytes: \x00\u07ff\U0001f9ea") != []


def test_text_that_spells_a_special_token_is_plain_text(bpe):
    ids = bpe.encode(f"a{tokenizers.BOS_TEXT}b")
    assert bpe.bos not in ids
    assert bpe.decode(ids) == f"a{tokenizers.BOS_TEXT}b"


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_byte_counts_sum_to_the_text(kind):
    """Also for text that BPE cuts inside a character, where counting decoded tokens goes wrong."""
    tokenizer = tokenizers.train(kind, [TEXT], 257)
    rare = "日本語🙂é" if kind != "char" else "日é🙂"
    counts = tokenizer.byte_counts()
    assert counts[tokenizer.encode(rare)].sum() == len(rare.encode())
    assert counts[tokenizer.bos] == 0
    if kind == "bpe":  # 257 means no merge: each token is one byte and, alone, no valid UTF-8
        assert all(len(tokenizer.token_bytes(i)) == 1 for i in tokenizer.encode("日"))


def test_characters_are_numbered_by_code_point():
    tokenizer = tokenizers.train("char", ["ba", "d c"], -1)
    assert tokenizer.encode(" abcd") == [0, 1, 2, 3, 4]
    assert tokenizer.vocab_size == 6


def test_unknown_character_is_named():
    with pytest.raises(UsageError, match=r"'ß' \(U\+00DF\)"):
        tokenizers.train("char", ["abc"], -1).encode("aß")


def test_lone_surrogates_do_not_crash():
    assert tokenizers.train("byte", [], -1).encode("a\udcff") == [ord("a"), ord("?")]


def test_batches_equal_single_texts(bpe):
    texts = [TEXT, "", "x", "  \n y"]
    for ids, text in zip(bpe.encode_batch(texts, threads=2), texts, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == bpe.encode(text)


@pytest.mark.parametrize("text, pieces", [
    ("    return x", ["   ", " return", " x"]),
    ("a\n        b", ["a", "\n        ", "b"]),
    ("f(x) == 1234", ["f", "(x", ")", " ==", " ", "12", "34"]),
    ("don't  stop", ["don", "'t", " ", " stop"]),
])
def test_split_pattern(text, pieces):
    import regex
    assert regex.findall(tokenizers.SPLIT_PATTERN, text) == pieces


def test_vocabulary_size_from_the_data_size():
    # 55 MiB / 12,800 = 4,521, nearest power of two 4,096; 1.1 MB -> 87 -> the floor; 100 GB -> the ceiling
    sizes = {1: 512, 1_115_394: 512, 57_875_898: 4096, 100 * 10**9: 32768}
    assert {n: tokenizers.derived_vocab_size(n) for n in sizes} == sizes


@pytest.mark.parametrize("change", [{"format": 99}, {"kind": "unigram"}, {"tokens": []}, {"tokens": ["%%%"]}, {"pattern": "x"}])
def test_damaged_or_foreign_files_are_refused(bpe, tmp_path, change):
    bpe.save(tmp_path)
    path = tmp_path / tokenizers.FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match="tokenizer"):
        tokenizers.load(tmp_path)
