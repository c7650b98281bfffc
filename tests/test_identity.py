"""nanochat compare --identical: equal runs, and each kind of difference between two runs."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import small
import torch
from made_runs import make
from safetensors.torch import load_file, save_file

from nanochat.__main__ import main as nanochat
from nanochat.common import sha256_file, write_json
from nanochat.run import checkpoint

STEP = 12


@pytest.fixture
def runs(tmp_path):
    """A finished run and its copy."""
    first = small.copy_run(small.finished(), tmp_path, "first")
    return first, shutil.copytree(first, tmp_path / "second")


def compared(capsys, *arguments):
    """(exit code, printed lines)."""
    code = nanochat(["compare", "--identical", *map(str, arguments)])
    return code, capsys.readouterr().out.splitlines()


def edit_lines(path, change):
    """Change the objects of a record by change(list)."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_tensors(run, file, change):
    """Change the tensors of the last checkpoint by change(dict); the checkpoint stays intact."""
    path = checkpoint.folder_of(run, STEP) / file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = checkpoint.read_manifest(run, STEP)
    entry = checkpoint.FileEntry(path.stat().st_size, sha256_file(path))
    changed = replace(manifest, files={**manifest.files, file: entry})
    write_json(path.with_name("manifest.json"), changed.as_json())


def one_number(tensors):
    """The smallest possible change of the last tensor by name."""
    tensor = tensors[max(tensors)].view(-1)
    tensor[-1] = torch.nextafter(tensor[-1], torch.tensor(9.0, dtype=tensor.dtype))


def test_runs_that_differ_in_times_only_are_identical(runs, capsys):
    first, second = runs

    def run_slower(lines):
        for line in lines:
            line["total_training_time"] += 1.5
            for name in ("train/dt", "train/tok_per_sec", "train/mfu"):
                line[name] = 2 * line[name] if name in line else 7.0

    edit_lines(second / "metrics.jsonl", run_slower)
    code, lines = compared(capsys, first, second)
    assert code == 0 and all(line.startswith("equal  ") for line in lines)
    n = len((first / "metrics.jsonl").read_text().splitlines())
    assert lines[0] == f"equal  metrics.jsonl: {n} lines"
    for name in ("samples.jsonl", "checkpoint 12, model.safetensors", "optimizer.safetensors"):
        assert any(name in line for line in lines)


def set_loss(run):
    edit_lines(run / "metrics.jsonl", lambda lines: lines[1].update({"train/loss": 1.25}))


def add_value(run):
    edit_lines(run / "metrics.jsonl", lambda lines: lines[0].update(extra=1))


def drop_line(run):
    edit_lines(run / "metrics.jsonl", lambda lines: lines.pop())


def set_sample(run):
    edit_lines(run / "samples.jsonl", lambda lines: lines[-1].update(text="x" * 99))


def drop_samples(run):
    (run / "samples.jsonl").unlink()


def change_weight(run):
    edit_tensors(run, "model.safetensors", one_number)


def change_moment(run):
    edit_tensors(run, "optimizer.safetensors", one_number)


def drop_moment(run):
    edit_tensors(run, "optimizer.safetensors", lambda tensors: tensors.pop(max(tensors)))


def round_weight(run):
    def rounded(tensors):
        tensors[max(tensors)] = tensors[max(tensors)].bfloat16().double()

    edit_tensors(run, "model.safetensors", rounded)


def damage_weight(run):
    with open(checkpoint.folder_of(run, STEP) / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")


def drop_checkpoint(run):
    shutil.rmtree(checkpoint.folder_of(run, STEP))


@pytest.mark.parametrize(
    "change, message",
    [
        (set_loss, r"metrics.jsonl, line 2, step 1: train/loss is \S+ and 1.25"),
        (add_value, "metrics.jsonl, line 1, step 0: extra is missing in the first run"),
        (drop_line, r"metrics.jsonl: \d+ lines and \d+; equal up to"),
        (set_sample, r"samples.jsonl, line \d+, step 12: text is .* and .xxx.*x\.\.\."),
        (drop_samples, r"samples.jsonl: \d+ lines and 0;"),
        (change_weight, r"checkpoint 12, model.safetensors: \S+ differs in 1 of \d+ numbers?, by"),
        (change_moment, r"checkpoint 12, optimizer.safetensors: \S+ differs in 1 of"),
        (drop_moment, "checkpoint 12, optimizer.safetensors: only one run has "),
        (round_weight, r"model.safetensors: \S+ differs: torch.float32 .* and torch.float64"),
        (damage_weight, "checkpoint 12 of .*second: model.safetensors does not match its hash"),
        (drop_checkpoint, r"last checkpoint: step 12 and (none|step \d+)"),
    ],
)
def test_each_difference_is_named(runs, capsys, change, message):
    first, second = runs
    change(second)
    code, lines = compared(capsys, first, second)
    different = [line for line in lines if line.startswith("DIFFERENT  ")]
    assert code == 1 and len(different) == 1
    assert re.search(message, different[0]), different[0]


def test_the_parts_as_data(tmp_path, capsys):
    first, second = (make(tmp_path, name, steps=steps) for name, steps in (("a", 2), ("b", 3)))
    assert nanochat(["compare", "--identical", "--json", str(first), str(first)]) == 0
    assert json.loads(capsys.readouterr().out)["different"] == []
    assert nanochat(["compare", "--identical", "--json", str(first), str(second)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] == [] and found["different"][0].startswith("metrics.jsonl, line 1")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["first"], "compares two runs, not 1"),
        (["first", "second", "first"], "compares two runs, not 3"),
        (["first", "second", "--per-task"], "--per-task: has no effect with --identical"),
        (["first", "nothing"], "nothing: holds no run"),
        (["bare", "bare"], "nothing to compare"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, monkeypatch, arguments, message):
    for name in ("first", "second", "bare"):
        make(tmp_path, name, steps=2)
    (tmp_path / "bare" / "metrics.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    assert nanochat(["compare", "--identical", *arguments]) == 2
    assert message in capsys.readouterr().err
