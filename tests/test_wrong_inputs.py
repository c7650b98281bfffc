"""Every kind of wrong input through a whole start: one clear message, exit code 2, no traceback,
and nothing on disk lost. Flags: test_flags.py and test_checks.py have the tables."""

import json
import os

import pytest
import small

import train
from nanochat.__main__ import main as nanochat
from nanochat.common import UsageError, base_dir
from nanochat.data.sources import open_corpus
from nanochat.data.tokenizer import train_tokenizer
from nanochat.run.folder import RunFolder


def write(folder, name, content, flag="--data"):
    """Write a file; returns the flag that names it."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"{flag}={path}"


def corrupt_cache(folder):
    flags = ("--no-save", "--save-every=-1", "--num-iterations=1")
    assert small.run(folder, *flags, tag="before") == 0
    newest = max((base_dir() / "tokens").glob("*/*.safetensors"), key=os.path.getmtime)
    newest.write_bytes(newest.read_bytes()[:-5])
    return "--seed=1"


def char_tokenizer_of_other_text(folder):
    train_tokenizer("char", ["xyz"], -1).save(folder / "tokenizer")
    return f"--tokenizer={folder / 'tokenizer'}"


def unwritable(folder):
    path = folder / "a_file"
    path.write_text("x")
    return f"--out-dir={path}"


# flags (or what makes them from a folder) -> words that the message must hold: the flag, the value
# or reason, the remedy. One case of each kind; the tables are in the tests of the modules.
CASES = {
    # argparse's own refusals
    "unknown flag": ("--dept=4", ["--dept=4"]),
    "not a number": ("--depth=four", ["--depth", "four"]),
    # flags
    "out of range": ("--depth=0", ["--depth=0", "at least 1"]),
    "config with an unknown flag": (
        lambda folder: write(folder, "c.json", '{"dept": 3}', "--config"),
        ["c.json", "--dept"],
    ),
    "warm-up longer than the run": ("--warmup-steps=10", ["--warmup-steps=10", "at most 6"]),
    "a batch beyond all memory": (
        ["--total-batch-size=3200000000", "--device-batch-size=100000000"],
        ["--device-batch-size", "free"],
    ),
    # data files
    "one line": (
        lambda folder: write(folder, "e.txt", "a single line"),
        ["--data", "too few", "row of 32", "--max-seq-len"],
    ),
    "binary file": (lambda folder: write(folder, "e.txt", b"\x7fELF\0\0\1"), ["e.txt", "binary"]),
    "broken jsonl": (
        lambda folder: write(folder, "a.jsonl", '{"text": "x"}\n{"text": \n'),
        ["a.jsonl line 2", "JSON"],
    ),
    "blank validation data": (
        lambda folder: write(folder, "v.txt", "\n \n", "--val-data"),
        ["--val-data", "no text"],
    ),
    "corrupt token cache": (corrupt_cache, ["token cache", "damaged", "delete"]),
    # folders
    "unwritable output": (unwritable, ["--out-dir", "cannot be written"]),
    "weights from a folder": (
        lambda folder: f"--init-from={folder}",
        ["--init-from", "not a run folder"],
    ),
    "a folder without a CORE bundle": (
        lambda folder: ["--core-metric-every=5", f"--core-bundle={folder}"],
        ["--core-bundle", "no core.yaml in this folder"],
    ),
    "a bundle for nothing": (
        lambda folder: f"--core-bundle={folder}",
        ["--core-bundle", "--core-metric-every"],
    ),
    # tokenizers
    "a folder without a tokenizer": (
        lambda folder: f"--tokenizer={folder}",
        ["tokenizer", "vocab.json"],
    ),
    "tokenizer of other characters": (char_tokenizer_of_other_text, ["character", "bpe or byte"]),
    # resume
    "resume from nothing": ("--resume-from-step=7", ["--resume-from-step=7", "no run"]),
    # the device
    "no such device": ("--device-type=mps", ["--device-type=mps", "cpu"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case, tmp_path, capsys, monkeypatch):
    # one case damages a cache
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    flags, words = CASES[case]
    flags = flags(tmp_path) if callable(flags) else flags
    capsys.readouterr()
    try:
        code = small.run(tmp_path, *([flags] if isinstance(flags, str) else flags))
    # argparse's own refusals
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert [word for word in words if word not in error] == []
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_all_problems_are_reported_together(tmp_path, capsys):
    flags = [
        "--depth=0",
        "--window-pattern=Q",
        "--adam-beta2=2",
        "--fp8",
        "--total-batch-size=250",
        "--val-data=/none",
        "--sample-prompts=/none",
        "--out-dir=/dev/null/x",
        "--tokenizer=none",
    ]
    assert small.run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert [flag for flag in flags if flag not in error] == []


# ---- files of text ----


# file: its content, words that the message must hold
UNUSABLE = {
    "empty.txt": ("", ["--data", "empty.txt", "there is no text in it"]),
    "blank.txt": (" \n\n ", ["--data", "blank.txt", "there is no text in it"]),
    "binary.txt": (b"\x7fELF\0\0\1", ["binary.txt is a binary file", "UTF-8 text"]),
    "latin.txt": ("caf\u00e9 ".encode("latin-1") * 99, ["latin.txt is not UTF-8", "iconv"]),
    "broken.jsonl": ('{"text": "x"}\n{"text": \n', ["broken.jsonl line 2", "not JSON"]),
    "other.jsonl": (
        '{"text": "fine"}\n{"body": "words"}\n',
        ["other.jsonl line 2 has no column 'text' (it has: body)", "other.jsonl:body"],
    ),
    "number.jsonl": ('{"text": 5}', ["number.jsonl line 1", "'text' is not a string but int"]),
    "list.jsonl": ('["words"]', ["list.jsonl line 1 is a list, not an object"]),
    "word.jsonl": ('"words"', ['word.jsonl line 1 is "words", not an object']),
    "no.parquet": ("PAR0", ["no.parquet is not a readable parquet file"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_text(tmp_path, name):
    content, words = UNUSABLE[name]
    path = write(tmp_path, name, content).removeprefix("--data=")
    with pytest.raises(UsageError) as caught:
        open_corpus(path, "")
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_parquet_file_without_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"content": ["words"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="a.parquet has no column 'text' .it has: content"):
        open_corpus(str(tmp_path / "a.parquet"), "")


def test_a_folder_without_text(tmp_path):
    with pytest.raises(UsageError, match="holds no .txt, .jsonl, .parquet file"):
        open_corpus(str(tmp_path), "")


# ---- run folders ----


@pytest.fixture
def started():
    """A folder with one finished run of 12 steps."""
    return small.finished()


def unfinished(folder):
    path = folder / "run" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "stopped"}))


def changed_text(folder):
    unfinished(folder)
    (folder / "text.txt").write_text("changed " * 500)


def foreign_tokenizer(folder):
    unfinished(folder)
    train_tokenizer("char", ["abc"], -1).save(folder / "run" / "tokenizer")


def other_text(folder):
    return write(folder, "other.txt", "not the same text at all, " * 200)


def foreign_config(folder):
    (folder / "run" / "config.json").write_text('{"model_type": "llama"}')


def newer_format(folder):
    path = folder / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


# what is done to a folder with a finished run, flags -> words that the message must hold
TAKEN = {
    "in use by a finished run": (
        None,
        (),
        ["already holds a run", "--resume", "--model-tag", "--overwrite"],
    ),
    "resumed with another seed": (
        None,
        ("--resume", "--seed=1"),
        ["--seed=1 (was 42)", "--model-tag"],
    ),
    "resumed with another depth": (None, ("--resume", "--depth=3"), ["--depth=3 (was 2)"]),
    "resumed with other text": (unfinished, ("--resume", other_text), ["--data"]),
    "text changed in place": (changed_text, ("--resume", "--keep-last=3"), ["fingerprint"]),
    "later checkpoints": (None, ("--resume-from-step=4",), ["later checkpoints", "--overwrite"]),
    "no such checkpoint": (
        None,
        ("--resume-from-step=5",),
        ["--resume-from-step=5", "4, 6, 8, 12"],
    ),
    "tokenizer of another run": (foreign_tokenizer, ("--resume",), ["tokenizer", "restore"]),
    "made by a newer version": (newer_format, ("--resume",), ["format 99"]),
    "config.json lost": (
        lambda f: (f / "run" / "config.json").unlink(),
        (),
        ["metrics.jsonl", "no config.json", "--overwrite"],
    ),
    "another program's config.json": (
        foreign_config,
        ("--overwrite",),
        ["config.json", "was not written by nanochat"],
    ),
    "overwrite and resume": (None, ("--resume", "--overwrite"), ["--overwrite", "--resume"]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_run_folder_is_never_lost(case, started, tmp_path, capsys):
    change, flags, words = TAKEN[case]
    small.copy_run(started, tmp_path)
    data = f"--data={started / 'text.txt'}"
    if change:
        change(tmp_path)
    if case == "text changed in place":
        # the run's own path must be the changed one
        data = f"--data={tmp_path / 'text.txt'}"
        path = tmp_path / "run" / "config.json"
        values = json.loads(path.read_text())
        values["args"]["data"] = str(tmp_path / "text.txt")
        path.write_text(json.dumps(values))
    flags = [flag(tmp_path) if callable(flag) else flag for flag in flags]
    before = small.files(tmp_path)
    # what comes later wins
    argv = [*small.FLAGS, data, f"--out-dir={tmp_path}", "--model-tag=run", *flags]
    assert train.run(argv) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert "Traceback" not in error
    assert small.files(tmp_path) == before


# ---- caches ----


@pytest.mark.parametrize(
    "place, reason",
    [
        ("text.txt", "not a folder"),
        ("text.txt/base", "Not a directory"),
        ("/proc/nanochat", "No such"),
    ],
)
def test_a_base_dir_that_cannot_be(place, reason, tmp_path, monkeypatch, capsys):
    small.corpus(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / place))
    assert small.run(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"NANOCHAT_BASE_DIR={tmp_path / place}: " in error
    assert reason in error and "Traceback" not in error


def test_no_home_for_caches(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert base_dir() == tmp_path / "home" / ".cache" / "nanochat" and base_dir().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    expected = "~/.cache/nanochat: cannot be created.*set NANOCHAT_BASE_DIR"
    with pytest.raises(UsageError, match=expected):
        base_dir()


def test_a_folder_that_another_process_trains_in(tmp_path, capsys):
    holder = RunFolder(tmp_path / "run")
    holder.claim()
    assert small.run(tmp_path) == 2
    assert "in use" in capsys.readouterr().err
    holder.release()


# ---- apps ----


@pytest.mark.parametrize(
    "argv, words",
    [
        (["sample", "/no/such/run"], ["/no/such/run", "run folder"]),
        (["sample", "RUN", "--step=5"], ["--step=5", "4, 6, 8, 12"]),
        (["sample", "RUN", "--temperature=-1", "--top-p=3"], ["--temperature", "--top-p"]),
        (["report", "/no/such/run"], ["/no/such/run"]),
        (["certify"], ["'certify' is not available"]),
        (["frobnicate"], ["'frobnicate' is not an app", "sample"]),
    ],
)
def test_apps(started, argv, words, capsys):
    assert nanochat([str(started / "run") if word == "RUN" else word for word in argv]) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
