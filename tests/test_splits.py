"""Which files train, which validate, and what is said: by names, formats and sizes."""

import json
import zlib
from pathlib import Path

import pytest

from nanochat.common import UsageError
from nanochat.data.files import named_files
from nanochat.data.sources import describe_corpus, estimated_bytes, local_corpus, open_corpus
from nanochat.data.splits import (
    files_to_validate,
    least_held_out_bytes,
    least_validation_bytes,
    more_last_files,
    split_of,
)

# name: bytes of text, one document a file for .txt, lines of 40 bytes for .jsonl
LAYOUTS = {
    # layout: files, files that train, files that validate, note, left out
    "no names": (
        {f"{letter}.txt": 500 for letter in "abcde"},
        ["a.txt", "b.txt", "c.txt", "d.txt"],
        ["e.txt"],
        "held out: the last 1 of 5 documents",
        [],
    ),
    "much in the last of few documents": (
        {"a.txt": 9_800, "b.txt": 31_000},
        ["a.txt", "b.txt"],
        ["b.txt"],
        "held out: the last tenth (3,100 of 31,000 characters) of b.txt; 76% of the text is in "
        "the last file",
        [],
    ),
    "much in the last of many documents": (
        {f"{i:03}.txt": 1_000 for i in range(98)} | {"098.txt": 14_000, "099.txt": 12_000},
        [f"{i:03}.txt" for i in range(99)],
        ["099.txt"],
        "held out: the last 1 of 100 files; 21% of the text is in the last 2 files",
        [],
    ),
    "train, test": (
        {"test.jsonl": 900, "train.jsonl": 900},
        ["train.jsonl"],
        ["test.jsonl"],
        "validation: 1 file named as test text (test.jsonl)",
        [],
    ),
    "train, test, validation": (
        {"test.jsonl": 900, "train.jsonl": 900, "validation.jsonl": 900},
        ["train.jsonl"],
        ["validation.jsonl"],
        "validation: 1 file named as validation text (validation.jsonl)",
        ["left out: 1 file named as test text (test.jsonl)"],
    ),
    "folders": (
        {"dev/a.txt": 500, "train/x/b.txt": 500, "train/c.txt": 500, "test/d.txt": 500},
        ["train/c.txt", "train/x/b.txt"],
        ["dev/a.txt"],
        "validation: 1 file named as validation text (dev/a.txt)",
        ["left out: 1 file named as test text (test/d.txt)"],
    ),
    "shards": (
        {f"data/{s}-0000{i}-of-00002.jsonl": 600 for s in ("train", "eval") for i in range(2)},
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ["data/eval-00000-of-00002.jsonl", "data/eval-00001-of-00002.jsonl"],
        "validation: 2 files named as validation text (data/eval-00000-of-00002.jsonl, "
        "data/eval-00001-of-00002.jsonl)",
        [],
    ),
    "some are named for training": (
        {"corpus_train.jsonl": 900, "corpus.v2.valid.jsonl": 500, "extra.jsonl": 900},
        ["corpus_train.jsonl"],
        ["corpus.v2.valid.jsonl"],
        "validation: 1 file named as validation text (corpus.v2.valid.jsonl)",
        ["left out, since others are named as train text: 1 file (extra.jsonl)"],
    ),
    "none is named for training": (
        {"a.txt": 900, "b.txt": 900, "val.txt": 500, "my-test.txt": 500},
        ["a.txt", "b.txt"],
        ["val.txt"],
        "validation: 1 file named as validation text (val.txt)",
        ["left out: 1 file named as test text (my-test.txt)"],
    ),
    "words in words": (
        {"contest.txt": 500, "latest.txt": 500, "training_notes.txt": 500, "valley.txt": 300},
        ["contest.txt", "latest.txt", "training_notes.txt"],
        ["valley.txt"],
        "held out: the last 1 of 4 documents",
        [],
    ),
    "all have one name": (
        {"train-0.jsonl": 900, "train-1.jsonl": 900},
        ["train-0.jsonl"],
        ["train-1.jsonl"],
        "held out: the last file, train-1.jsonl",
        [],
    ),
    "one file to train on": (
        {"train.jsonl": 900, "README.txt": 100},
        ["train.jsonl"],
        ["train.jsonl"],
        "held out: the last tenth (2 of 22 documents)",
        ["left out, since others are named as train text: 1 file (README.txt)"],
    ),
    "requirements beside a corpus": (
        {"a.jsonl": 900, "b.jsonl": 900, "requirements.txt": 12, "test-requirements.txt": 12},
        ["a.jsonl"],
        ["b.jsonl"],
        "held out: the last file, b.jsonl",
        [
            "left out, since most text is in .jsonl files: 2 files of 24 B (requirements.txt, "
            "test-requirements.txt); a pattern such as '{}/**/*' takes every format"
        ],
    ),
    "the format with more text": (
        {"a.jsonl": 400, "b.txt": 900, "c.txt": 100},
        ["b.txt"],
        ["c.txt"],
        "held out: the last 1 of 2 documents",
        [
            "left out, since most text is in .txt files: 1 file of 390 B (a.jsonl); a pattern such "
            "as '{}/**/*' takes every format"
        ],
    ),
    "a small last file": (
        {"a.jsonl": 4000, "b.jsonl": 6000, "c.jsonl": 40},
        ["a.jsonl", "b.jsonl", "c.jsonl"],
        ["b.jsonl"],
        "held out: the last tenth (15 of 150 documents) of b.jsonl; 26 bytes of text in "
        "the last file are too little to validate on",
        [],
    ),
    "many small files": (
        {f"{i:03}.jsonl": 80 for i in range(600)},
        [f"{i:03}.jsonl" for i in range(597)],
        [f"{i:03}.jsonl" for i in range(597, 600)],
        "held out: the last 3 of 600 files; 52 bytes of text in the last file are too little to "
        "validate on",
        [],
    ),
    "a small last document": (
        {"a.txt": 9000, "b.txt": 9000, "c.txt": 12},
        ["a.txt", "b.txt", "c.txt"],
        ["a.txt"],
        "held out: the last tenth (900 of 9,000 characters) of a.txt; 12 bytes of text in "
        "the last file are too little to validate on",
        [],
    ),
    "nearly all in the last document": (
        {"LICENSE.txt": 400, "README.txt": 300, "corpus.txt": 9000},
        ["LICENSE.txt", "README.txt", "corpus.txt"],
        ["corpus.txt"],
        "held out: the last tenth (900 of 9,000 characters) of corpus.txt; nearly all text is in "
        "the last file",
        [],
    ),
    "nearly all in the last file": (
        {"a.jsonl": 400, "b.jsonl": 9000},
        ["a.jsonl", "b.jsonl"],
        ["b.jsonl"],
        "held out: the last tenth (22 of 225 documents) of b.jsonl; nearly all text is in the "
        "last file",
        [],
    ),
    "a small validation set": (
        {"train.jsonl": 9000, "val.jsonl": 40, "test.jsonl": 400},
        ["train.jsonl"],
        ["test.jsonl"],
        "validation: 1 file named as test text (test.jsonl)",
        [
            "left out: 1 file named as validation text (val.jsonl), since 26 bytes of text are too "
            "little to validate on"
        ],
    ),
    "small sets of both names": (
        {"train.jsonl": 9000, "val.jsonl": 40, "test.jsonl": 40},
        ["train.jsonl"],
        ["train.jsonl"],
        "held out: the last tenth (22 of 225 documents)",
        [
            "left out: 1 file named as validation text (val.jsonl), since 26 bytes of text are too "
            "little to validate on",
            "left out: 1 file named as test text (test.jsonl), since 26 bytes of text are too "
            "little to validate on",
        ],
    ),
}


def make(folder, sizes):
    """A folder with files of the given sizes, no two of them alike; returns it."""
    for name, n_bytes in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".txt"):
            path.write_text((name + " " * n_bytes).replace("  ", " x")[:n_bytes])
        else:
            # 26 bytes of text in a line of 40
            key = zlib.crc32(name.encode())
            lines = (f"{key:>12}{i:>6}" + "x" * 8 for i in range(n_bytes // 40))
            path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def texts(shards):
    return {text for shard in shards for text in shard.documents()}


def names(shards, folder):
    return sorted({str(path.relative_to(folder)) for shard in shards for path in shard.files})


@pytest.mark.parametrize(
    "files, train",
    [
        # a program, whose names mean nothing
        (["eval.py", "model.py", "tests/test_model.py", "train.py"], None),
        # a corpus whose suffix is none of ours
        (["wiki.test.tokens", "wiki.train.tokens", "wiki.valid.tokens"], ["wiki.train.tokens"]),
    ],
)
def test_names_of_files_without_a_format(tmp_path, files, train):
    for number, name in enumerate(files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{number} " * 3000)
    for value in (tmp_path, f"{tmp_path}/**/*.{files[0].rsplit('.', 1)[1]}"):
        corpus = local_corpus(str(value))
        if train:
            assert names(corpus.train, tmp_path) == train
        else:
            assert names([*corpus.train, *corpus.val], tmp_path) == files


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    sizes, train, val, note, left_out = LAYOUTS[layout]
    folder = make(tmp_path / "train-test", sizes)
    corpus = local_corpus(str(folder))
    assert (names(corpus.train, folder), names(corpus.val, folder)) == (train, val)
    assert corpus.note == note
    assert list(corpus.left_out) == [line.format(folder) for line in left_out]
    shown = "\n".join(describe_corpus(corpus))
    assert note in shown and all(line in shown for line in corpus.left_out)
    # no document is on both sides
    to_train, to_validate = (texts(side) for side in (corpus.train, corpus.val))
    assert to_train and to_validate and not to_train & to_validate
    # the same files by a pattern, where the folder does not choose among formats
    if not any("most text" in line for line in left_out):
        by_pattern = local_corpus(f"{folder}/**/*")
        assert (by_pattern.note, by_pattern.fingerprint) == (note, corpus.fingerprint)
        assert by_pattern.left_out == corpus.left_out


@pytest.mark.parametrize(
    "path, split",
    [
        ("train", "train"),
        ("TRAIN.txt", "train"),
        ("train/a.txt", "train"),
        ("en/dev/a.txt", "validation"),
        ("train-00000-of-00002.parquet", "train"),
        ("corpus_train.jsonl", "train"),
        ("x.valid.y.jsonl", "validation"),
        ("val_2.txt", "validation"),
        ("eval.txt", "validation"),
        ("validation/train.txt", "validation"),
        ("wikitext.test.tokens", "test"),
        ("contest.txt", ""),
        ("train1.txt", "train"),
        ("part2test3.txt", "test"),
        ("Training/a.txt", "train"),
        ("testing/a.txt", "test"),
        ("evaluation.jsonl.gz", "validation"),
        ("latest/protesting.txt", ""),
        ("training_notes.txt", ""),
        ("trainer/trains.txt", ""),
        ("evaluation_of_texts.txt", ""),
        ("train_test_split.txt", ""),
        ("train-test/val.txt", "validation"),
        ("a b train.txt", ""),
    ],
)
def test_words_that_mean_a_split(path, split):
    assert split_of(Path(path)) == split


def test_files_without_a_split_to_train_on(tmp_path):
    folder = make(tmp_path, {"test.txt": 500, "val.txt": 500})
    message = "--data=.*: the names of all files mean validation or test text .test.txt, val.txt."
    with pytest.raises(UsageError, match=message):
        local_corpus(str(folder))
    # files that a pattern chooses by such a name, or that are named themselves, train
    assert local_corpus(f"{folder}/t*.txt").train_bytes == 450
    assert local_corpus(f"{folder}/val.txt").train_bytes == 450


def test_val_data_validates(tmp_path):
    """What is named for validation or testing is then left out of training, and named."""
    sizes = {"train.jsonl": 9000, "val.jsonl": 400, "test.jsonl": 800}
    folder, other = make(tmp_path / "a", sizes), make(tmp_path / "b", {"c.txt": 500})
    corpus = open_corpus(str(folder), f"{other}/c.txt")
    assert names(corpus.train, folder) == ["train.jsonl"]
    assert names(corpus.val, other) == ["c.txt"]
    assert corpus.note == f"validation: {other}/c.txt"
    assert corpus.left_out == (
        "left out: 1 file named as validation text (val.jsonl)",
        "left out: 1 file named as test text (test.jsonl)",
    )
    # of a folder with splits, what is named for validation
    corpus = open_corpus(f"{other}/c.txt", str(folder))
    assert names(corpus.val, folder) == ["val.jsonl"]
    assert corpus.left_out == (
        "left out of validation by their names: 2 files (test.jsonl, train.jsonl)",
    )


@pytest.mark.parametrize(
    "sizes, kept",
    [
        ({"a.txt": 50, "b.txt": 50}, ["a.txt", "b.txt"]),
        ({"train.txt": 50, "test.txt": 50}, ["test.txt"]),
        ({"train.txt": 50, "test.txt": 50, "dev.txt": 50}, ["dev.txt"]),
        ({"test-1.txt": 50, "test-2.txt": 50}, ["test-1.txt", "test-2.txt"]),
        ({"a.jsonl": 80, "notes.txt": 50}, ["a.jsonl"]),
    ],
)
def test_files_of_val_data(tmp_path, sizes, kept):
    files, remarks = files_to_validate(named_files(str(make(tmp_path, sizes))), "text")
    assert [path.name for path in files] == kept
    assert len(remarks) == (len(kept) < len(sizes))


def test_too_little_val_data_is_refused(tmp_path):
    folder = make(tmp_path, {"a.txt": 100_000, "b.txt": 399, "c.txt": 400})
    with pytest.raises(UsageError, match=r"b.txt: holds 399 bytes of text.*give at least 400 byte"):
        open_corpus(f"{folder}/a.txt", f"{folder}/b.txt")
    assert names(open_corpus(f"{folder}/a.txt", f"{folder}/c.txt").val, folder) == ["c.txt"]
    with pytest.raises(UsageError, match="399 bytes of text, .* give at least 4,096 bytes"):
        open_corpus("python", f"{folder}/b.txt")


def test_how_much_validates():
    sizes = {10: 1, 1000: 4, 10**6: 4000, 10**7: 4096, 10**9: 4096}
    assert {n: least_validation_bytes(n) for n in sizes} == sizes
    sizes = {1000: 4, 10**7: 4096, 10**9: 50_000, 10**12: 1 << 20}
    assert {n: least_held_out_bytes(n) for n in sizes} == sizes


@pytest.mark.parametrize(
    "sizes, least, n",
    [
        ([90, 2, 2, 2], 4, 2),
        ([90, 2, 2, 6], 4, 1),
        ([90, 20, 1], 4, 0),
        ([5, 5], 4, 0),
        ([100], 4, 0),
    ],
)
def test_more_files_from_the_end(sizes, least, n):
    assert more_last_files(sizes, least) == n


def test_the_estimate_for_plans_takes_the_same_files(tmp_path):
    sizes = {"train.jsonl": 4000, "test.jsonl": 400, "notes.txt": 1000}
    folder = make(tmp_path, sizes)
    assert estimated_bytes(str(folder)) == (folder / "train.jsonl").stat().st_size
