"""Which of several files are for training, for validation or for testing, by their names."""

import collections
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UsageError, counted, human_bytes
from nanochat.data.files import Named, listed, text_bytes
from nanochat.data.text import text_format

TRAIN = "train"
VALIDATION = "validation"
TEST = "test"
# words in the names of files and folders, and the splits that they mean
SPLIT_WORDS = {
    "train": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "eval": VALIDATION,
    "test": TEST,
}
# Words that titles of texts hold as well: these mean a split as the whole name only.
SPLIT_NAMES = {"training": TRAIN, "evaluation": VALIDATION, "testing": TEST}

# The least text to validate on: bits per byte of 4 KiB, some thousand tokens, are known to a few
# percent. A corpus of less than a megabyte may have less: this share of it.
VALIDATION_BYTES = 4 << 10
VALIDATION_SHARE = 1 / 250
# What is held out of much text, where more costs nothing: this share, up to a size that is enough
# for any.
HELD_OUT_SHARE = 1 / 20_000
HELD_OUT_BYTES = 1 << 20
# the largest share of the text that is held out in whole files to reach the above
MOST_HELD_OUT = 1 / 10
# The least share that trains: a README in front of a corpus is not what someone trains on.
LEAST_TRAINED = 1 / 10


@dataclass(frozen=True)
class Group:
    """Files whose names mean VALIDATION or TEST. described: "1 file named as test text (a.txt)"."""

    files: list[Path]
    described: str


@dataclass(frozen=True)
class Splits:
    """Files by what they are for.

    groups: of files that do not train, those for validation first, then those for testing; none of
    them empty. remarks: sentences on files that are for nothing."""

    train: list[Path]
    groups: list[Group]
    remarks: tuple[str, ...] = ()


def files_to_train(named: Named, column: str, what: str) -> Splits:
    """The files of --data by what they are for.

    Names count below the folder that was given, where they tell files apart: if all of them mean
    the same split, or none does, all files train. Where some files are named as training text, no
    others train. Of a folder only one format is taken, the one with most text to train on: nobody
    chose its files one by one, and a requirements.txt is no part of a corpus of .jsonl files.
    column: with the text of tables. Raises UsageError, which begins with `what`, if no file is left
    to train on."""
    by_split = _by_split(named)
    unnamed = by_split[""]
    train = by_split[TRAIN] or unnamed
    if not train:
        raise UsageError(
            f"{what}: the names of all files mean validation or test text "
            f"({listed(named.files, named.root)}), which leaves none to train on; rename those to "
            f"train on, or name them by a path or a pattern"
        )
    remarks = []
    if by_split[TRAIN] and unnamed:
        remarks.append(
            f"left out, since others are named as {TRAIN} text: {counted(len(unnamed), 'file')} "
            f"({listed(unnamed, named.root)})"
        )
    main = _main_format(train, column) if named.is_folder else ""
    kept = {split: _of_format(by_split[split], main) for split in (VALIDATION, TEST)}
    remarks += _other_formats([*train, *by_split[VALIDATION], *by_split[TEST]], main, named.root)
    groups = [
        Group(files, f"{counted(len(files), 'file')} named as {split} text ({names})")
        for split, files in kept.items()
        if files and (names := listed(files, named.root))
    ]
    return Splits(_of_format(train, main), groups, tuple(remarks))


def files_to_validate(named: Named, column: str) -> tuple[list[Path], tuple[str, ...]]:
    """(files, sentences on the others) of --val-data.

    Those named for validation, else those named for testing, else all. Of a folder one format."""
    by_split = _by_split(named)
    files = by_split[VALIDATION] or by_split[TEST] or named.files
    remarks = []
    others = [path for path in named.files if path not in set(files)]
    if others:
        remarks.append(
            f"left out of validation by their names: {counted(len(others), 'file')} "
            f"({listed(others, named.root)})"
        )
    main = _main_format(files, column) if named.is_folder else ""
    remarks += _other_formats(files, main, named.root)
    return _of_format(files, main), tuple(remarks)


def least_validation_bytes(train_bytes: int) -> int:
    """Bytes of text below which a validation set says nothing about a model of so much text."""
    return math.ceil(min(VALIDATION_BYTES, train_bytes * VALIDATION_SHARE))


def least_held_out_bytes(n_bytes: int) -> int:
    """Bytes to hold out of so much text at least, where the program chooses them."""
    of_much = min(HELD_OUT_BYTES, math.ceil(n_bytes * HELD_OUT_SHARE))
    return max(least_validation_bytes(n_bytes), of_much)


def more_last_files(sizes: Sequence[int], least: int) -> int:
    """How many of the last files hold `least` bytes, 0 if that is too large a part of the text."""
    most = sum(sizes) * MOST_HELD_OUT
    n_bytes = 0
    for n, size in enumerate(reversed(sizes), 1):
        n_bytes += size
        if n_bytes > most:
            return 0
        if n_bytes >= least:
            return n
    return 0


def _by_split(named: Named) -> dict[str, list[Path]]:
    """{TRAIN, VALIDATION, TEST or "" for none: files}; all are under "" if there is one group, or
    if the files are in none of our formats and some of them have other names."""
    groups: dict[str, list[Path]] = collections.defaultdict(list)
    for path in named.files:
        groups[split_of(path.relative_to(named.root))].append(path)
    # train.py and tests/ of a program mean nothing, wiki.train.tokens does
    means_nothing = "" in groups and not any(text_format(path.name)[0] for path in named.files)
    if len(groups) == 1 or means_nothing:
        return collections.defaultdict(list, {"": named.files})
    return groups


def split_of(path: Path) -> str:
    """The split that the names in a path mean: TRAIN, VALIDATION or TEST, "" if none.

    The outermost folder that means one decides. Words are whole, and digits end them: `test2.txt`
    means one, `contest.txt` and `training_notes.txt` do not. Neither does a name with words for two
    splits."""
    for name in path.parts:
        stem = name.lower().partition(".")[0]
        if stem in SPLIT_NAMES:
            return SPLIT_NAMES[stem]
        words = re.split(r"[_.\d-]", name.lower())
        meant = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        if len(meant) == 1:
            return meant.pop()
    return ""


def _main_format(files: Sequence[Path], column: str) -> str:
    """The format, such as ".jsonl", that most text of some files is in."""
    formats = {path.suffix.lower() for path in files}
    if len(formats) == 1:
        # sizes need not be asked for
        return formats.pop()
    sizes = collections.Counter()
    for path in files:
        sizes[path.suffix.lower()] += text_bytes(path, column)
    # by name where they are equal
    return max(sorted(sizes), key=sizes.get)


def _of_format(files: Sequence[Path], main: str) -> list[Path]:
    """The files in a format; all of them if it is ""."""
    return [path for path in files if not main or path.suffix.lower() == main]


def _other_formats(files: Sequence[Path], main: str, root: Path) -> list[str]:
    """A sentence, if one is due, on files that _of_format() leaves out."""
    kept = set(_of_format(files, main))
    others = [path for path in files if path not in kept]
    if not others:
        return []
    size = human_bytes(sum(text_bytes(path) for path in others))
    return [
        f"left out, since most text is in {main} files: {counted(len(others), 'file')} of {size} "
        f"({listed(others, root)}); a pattern such as '{root}/**/*' takes every format"
    ]
