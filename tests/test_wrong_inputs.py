"""Every kind of wrong input: one clear message, exit code 2, no traceback, and nothing on disk lost."""

import json
import os

import pytest
import small

import train
from nanochat.__main__ import main as nanochat
from nanochat.common import UsageError


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"--data={path}"


def jsonl_without_text(folder):
    return write(folder, "a.jsonl", '{"text": "fine"}\n{"body": "words"}\n')


def parquet_without_text(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"content": ["words"]}), folder / "a.parquet")
    return f"--data={folder / 'a.parquet'}"


def corrupt_cache(folder):
    assert (
        small.run(folder, "--no-save", "--save-every=-1", "--num-iterations=1", tag="before") == 0
    )
    from nanochat.common import base_dir

    newest = max((base_dir() / "tokens").glob("*/*.safetensors"), key=os.path.getmtime)
    newest.write_bytes(newest.read_bytes()[:-5])
    return "--seed=1"


def char_tokenizer_of_other_text(folder):
    from nanochat.data.tokenizer import train_tokenizer

    train_tokenizer("char", ["xyz"], -1).save(folder / "tokenizer")
    return f"--tokenizer={folder / 'tokenizer'}"


def empty_folder(folder):
    (folder / "empty").mkdir()
    return f"--data={folder / 'empty'}"


def unwritable(folder):
    write(folder, "a_file", "x")
    return f"--out-dir={folder / 'a_file'}"


# flags (or what makes them from a folder) -> words that the message must hold: the flag, the value or reason, the remedy
CASES = {
    "unknown flag": ("--dept=4", ["--dept=4"]),
    "not a number": ("--depth=four", ["--depth", "four"]),
    "unknown choice": ("--optimizer=sgd", ["--optimizer", "sgd", "muon"]),
    "unknown attention": ("--attention=flash9", ["--attention=flash9", "auto"]),
    "zero depth": ("--depth=0", ["--depth=0", "at least 1"]),
    "no horizon": (
        ["--num-iterations=-1", "--target-param-data-ratio=-1"],
        ["--target-param-data-ratio", "--num-iterations"],
    ),
    "negative steps": ("--num-iterations=-5", ["--num-iterations=-5", "-1"]),
    "indivisible batch": ("--total-batch-size=250", ["--total-batch-size=250", "224 or 256"]),
    "batch and device batch": (
        ["--total-batch-size=256", "--device-batch-size=3"],
        ["--total-batch-size=256", "192 or 288"],
    ),
    "window letters": ("--window-pattern=SXL", ["--window-pattern=SXL", "SSSL"]),
    "window too long": ("--short-window=64", ["--short-window=64", "--max-seq-len=32"]),
    "head dim too large": ("--head-dim=64", ["--head-dim=64", "2 x 16 = 32", "16 or 32"]),
    "odd head dim": ("--head-dim=15", ["--head-dim=15", "even"]),
    "key/value heads": ("--n-kv-head=3", ["--n-kv-head=3", "1, 2"]),
    "vocabulary too small": (["--tokenizer=bpe", "--vocab-size=100"], ["--vocab-size=100", "257"]),
    "vocabulary of a byte tokenizer": (
        "--vocab-size=512",
        ["--vocab-size=512", "--tokenizer=byte"],
    ),
    "ratios over the whole": (
        ["--warmup-ratio=0.6", "--warmdown-ratio=0.6"],
        ["--warmup-ratio=0.6", "--warmdown-ratio=0.6"],
    ),
    "momentum of one": ("--adam-beta1=1", ["--adam-beta1=1"]),
    "not finite": (
        ["--grad-clip=nan", "--matrix-lr=inf"],
        ["--grad-clip=nan", "--matrix-lr=inf", "finite"],
    ),
    "warm-up longer than the run": ("--warmup-steps=20", ["--warmup-steps=20", "at most 6"]),
    "a path as tag": ("--model-tag=../elsewhere", ["--model-tag=../elsewhere", "--out-dir"]),
    "contradiction": (["--no-save", "--save-every=3"], ["--no-save", "--save-every"]),
    "missing data": ("--data=/no/such/thing*.txt", ["--data=/no/such/thing*.txt", "no such file"]),
    "empty file": (lambda folder: write(folder, "e.txt", ""), ["--data", "no text"]),
    "blank file": (lambda folder: write(folder, "e.txt", " \n\n "), ["--data", "no text"]),
    "one line": (
        lambda folder: write(folder, "e.txt", "a single line"),
        ["--data", "too few", "row of 32", "--max-seq-len"],
    ),
    "binary file": (lambda folder: write(folder, "e.txt", b"\x7fELF\0\0\1"), ["e.txt", "binary"]),
    "latin-1 file": (
        lambda folder: write(folder, "e.txt", "caf\u00e9 ".encode("latin-1") * 99),
        ["e.txt", "UTF-8", "iconv"],
    ),
    "empty folder": (empty_folder, ["--data", ".jsonl"]),
    "broken jsonl": (
        lambda folder: write(folder, "a.jsonl", '{"text": "x"}\n{"text": \n'),
        ["a.jsonl line 2", "JSON"],
    ),
    "jsonl without text": (
        jsonl_without_text,
        ["a.jsonl line 2 has no string field 'text' (it has: body)"],
    ),
    "jsonl with a number": (
        lambda folder: write(folder, "a.jsonl", '{"text": 5}'),
        ["a.jsonl line 1", "'text' is not a string but int"],
    ),
    "jsonl with a list": (
        lambda folder: write(folder, "a.jsonl", '["words"]'),
        ["a.jsonl line 1 is a list, not an object"],
    ),
    "jsonl with a bare word": (
        lambda folder: write(folder, "a.jsonl", '"words"'),
        ['a.jsonl line 1 is "words", not an object'],
    ),
    "parquet without text": (parquet_without_text, ["a.parquet", "'text'", "content"]),
    "not a parquet file": (
        lambda folder: write(folder, "a.parquet", "PAR0"),
        ["a.parquet", "not a readable parquet file"],
    ),
    "missing validation data": ("--val-data=/no/such/file", ["--val-data=/no/such/file"]),
    "no tokenizer there": ("--tokenizer=bpee", ["--tokenizer=bpee", "bpe, char, byte"]),
    "a folder without a tokenizer": (
        lambda folder: f"--tokenizer={folder}",
        ["tokenizer", "vocab.json"],
    ),
    "blank validation data": (
        lambda folder: write(folder, "v.txt", "\n \n").replace("--data", "--val-data"),
        ["--val-data", "no text"],
    ),
    "no output folder": ("--out-dir=", ["--out-dir=", "empty"]),
    "deeper than anything": ("--depth=100000", ["--depth=100000", "at most 1000"]),
    "a batch beyond all memory": (
        ["--total-batch-size=3200000000", "--device-batch-size=100000000"],
        ["--device-batch-size", "free"],
    ),
    "keeping no checkpoint": ("--keep-last=0", ["--keep-last=0", "-1"]),
    "a zero that means nothing": ("--patience=0", ["--patience=0", "-1"]),
    "tokenizer of other characters": (char_tokenizer_of_other_text, ["character", "--tokenizer"]),
    "corrupt token cache": (corrupt_cache, ["token cache", "damaged", "delete"]),
    "unwritable output": (unwritable, ["--out-dir", "cannot be written"]),
    "prompts missing": ("--sample-prompts=/no/such/file", ["--sample-prompts=/no/such/file"]),
    "no such device": ("--device-type=mps", ["--device-type=mps", "cpu"]),
    "resume from nothing": ("--resume-from-step=7", ["--resume-from-step=7", "no run"]),
    "dry-run flag alone": ("--gpus=8", ["--gpus=8", "--dry-run"]),
    "fp8 on a CPU": (
        "--fp8",
        ["--fp8: slower than bfloat16", "--dtype=float32: what --fp8 leaves alone"],
    ),
    "tied speedrun": ("--tie-embeddings", ["--tie-embeddings: belongs", "--arch=llama"]),
    "windows for llama": (
        ["--arch=llama", "--window-pattern=SL", "--short-window=8"],
        ["--window-pattern=SL", "--short-window=8", "full context"],
    ),
    "early end without evaluation": (
        ["--eval-every=-1", "--stop-at-bpb=1.5", "--patience=2"],
        ["--stop-at-bpb", "--patience", "--eval-every"],
    ),
    "weights from nowhere": (
        "--init-from=/no/such/run",
        ["--init-from=/no/such/run", "no such file"],
    ),
    "weights from a folder": (
        lambda folder: f"--init-from={folder}",
        ["--init-from", "not a run folder"],
    ),
    "config with an unknown flag": (
        lambda f: write(f, "c.json", '{"dept": 3}').replace("--data", "--config"),
        ["c.json", "--dept"],
    ),
    "config that is no JSON": (
        lambda f: write(f, "c.json", "depth: 3").replace("--data", "--config"),
        ["c.json", "JSON"],
    ),
    "config with a wrong type": (
        lambda f: write(f, "c.json", '{"depth": [3]}').replace("--data", "--config"),
        ["--depth", "[3]"],
    ),
    "config with a wrong value": (
        lambda f: write(f, "c.json", '{"depth": "three"}').replace("--data", "--config"),
        ["--depth", "three"],
    ),
    "no config": ("--config=/no/such.json", ["--config", "/no/such.json", "does not exist"]),
    "CORE never and now": ("--core-metric-every=0", ["--core-metric-every=0", "-1"]),
    "CORE of no examples": (
        "--core-metric-max-per-task=-5",
        ["--core-metric-max-per-task=-5", "-1"],
    ),
    "no CORE bundle": (
        ["--core-metric-every=5", "--core-bundle=/no/such/folder"],
        ["--core-bundle=/no/such/folder", "no such file"],
    ),
    "a folder without a CORE bundle": (
        lambda folder: ["--core-metric-every=5", f"--core-bundle={folder}"],
        ["no core.yaml is there"],
    ),
    "a bundle for nothing": (
        lambda folder: f"--core-bundle={folder}",
        ["--core-bundle", "--core-metric-every"],
    ),
    "no such dataset": ("--data=climbmixx", ["--data=climbmixx", "climbmix", "hf:"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))  # one case damages a cache
    flags, words = CASES[case]
    flags = flags(tmp_path) if callable(flags) else flags
    capsys.readouterr()
    try:
        code = small.run(tmp_path, *([flags] if isinstance(flags, str) else flags))
    except SystemExit as end:  # argparse's own refusals
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert [word for word in words if word not in error] == []
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_all_problems_are_reported_at_once(tmp_path, capsys):
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


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    assert small.run(folder) == 0
    return folder


def unfinished(folder):
    path = folder / "run" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "stopped"}))


def changed_text(folder):
    unfinished(folder)
    (folder / "text.txt").write_text("changed " * 500)


def foreign_tokenizer(folder):
    unfinished(folder)
    from nanochat.data.tokenizer import train_tokenizer

    train_tokenizer("char", ["abc"], -1).save(folder / "run" / "tokenizer")


def other_text(folder):
    return write(folder, "other.txt", "not the same text at all, " * 200)


def foreign_config(folder):
    (folder / "run" / "config.json").write_text('{"model_type": "llama"}')


def newer_format(folder):
    path = folder / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


# what is done to a folder with a finished run, flags -> words
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
        ["config.json", "not of this program"],
    ),
    "overwrite and resume": (None, ("--resume", "--overwrite"), ["--overwrite", "--resume"]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_run_folder_is_never_lost(case, started, tmp_path, capsys):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(started, folder)
    change, flags, words = TAKEN[case]
    flags = [flag(folder) if callable(flag) else flag for flag in flags]
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    data = (
        []
        if any(flag.startswith("--data") for flag in flags)
        else [f"--data={started / 'text.txt'}"]
    )
    if change:
        change(folder)
        data = [f"--data={folder / 'text.txt'}"] if case == "text changed in place" else data
        before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    if case == "text changed in place":  # the run's own path must be the changed one
        config = folder / "run" / "config.json"
        values = json.loads(config.read_text())
        values["args"]["data"] = str(folder / "text.txt")
        config.write_text(json.dumps(values))
        before[config] = config.read_bytes()
    code = train.run([*small.FLAGS, *data, f"--out-dir={folder}", "--model-tag=run", *flags])
    error = capsys.readouterr().err
    assert code == 2
    assert [word for word in words if word not in error] == []
    assert {
        path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()
    } == before


@pytest.mark.parametrize(
    "flags",
    [["--grad-clip=nan"], ["--matrix-lr=nan"], ["--warmdown-ratio=nan"], ["--target-flops=-inf"]],
)
def test_what_is_no_number_is_one_problem(flags, tmp_path, capsys):
    assert small.run(tmp_path, *flags) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


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
    assert (
        f"NANOCHAT_BASE_DIR={tmp_path / place}: " in error
        and reason in error
        and "Traceback" not in error
    )


def test_no_home_for_caches(tmp_path, monkeypatch):
    from nanochat.common import base_dir

    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert base_dir() == tmp_path / "home" / ".cache" / "nanochat" and base_dir().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(
        UsageError, match="~/.cache/nanochat: cannot be created.*set NANOCHAT_BASE_DIR"
    ):
        base_dir()


def test_a_folder_that_another_process_trains_in(started, tmp_path, capsys):
    from nanochat.run.folder import RunFolder

    holder = RunFolder(tmp_path / "run")
    holder.claim()
    assert small.run(tmp_path) == 2
    assert "in use" in capsys.readouterr().err
    holder.lock.close()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["sample", "/no/such/run"], ["/no/such/run", "run folder"]),
        (["sample", "RUN", "--step=5"], ["--step=5", "4, 6, 8, 12"]),
        (["sample", "RUN", "--temperature=-1", "--top-p=3"], ["--temperature", "--top-p"]),
        (["report", "/no/such/run"], ["/no/such/run"]),
        (["serve"], ["'serve' is not available"]),
        (["frobnicate"], ["'frobnicate' is not an app", "sample"]),
    ],
)
def test_apps(started, argv, words, capsys):
    assert nanochat([str(started / "run") if word == "RUN" else word for word in argv]) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
