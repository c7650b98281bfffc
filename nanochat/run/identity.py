"""Whether two runs are the same, number by number: their records, but for times, and the tensors of
their last checkpoints. Nothing is written."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.common import UsageError, counted
from nanochat.run import checkpoint
from nanochat.run.folder import RunFolder
from nanochat.run.metrics import Line, read_lines
from nanochat.run.tensor_files import StoredTensors

RECORDS = ("metrics.jsonl", "samples.jsonl", "core.jsonl")
# What the clock decides, and no seed.
TIMES = {"total_training_time", "train/dt", "train/tok_per_sec", "train/mfu"}
KINDS_OF_TENSORS = ("model", "optimizer")
# Characters of a value that are shown.
SHOWN = 60


@dataclass(frozen=True)
class Identity:
    """The parts of two runs that are equal, and of each other part the first difference."""

    equal: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def compare_runs(first: Path, second: Path) -> Identity:
    """Compare two run folders part by part.

    UsageError if a folder holds no run, or if there is nothing to compare."""
    for run in (first, second):
        if not RunFolder(run).holds_run():
            raise UsageError(f"{run}: holds no run; name a run folder, for example out/d4")
    found = Identity()
    for name in RECORDS:
        _compare_record(name, first, second, found)
    _compare_checkpoints(first, second, found)
    if not found.equal and not found.different:
        raise UsageError(
            f"{first} and {second}: nothing to compare, since neither has a record or a checkpoint "
            f"yet; train them first"
        )
    return found


def _compare_record(name: str, first: Path, second: Path, found: Identity) -> None:
    """Compare the lines of one record, but for times."""
    lines, others = read_lines(first / name), read_lines(second / name)
    for number, (one, other) in enumerate(zip(lines, others, strict=False), start=1):
        if difference := _line_difference(one, other):
            found.different.append(f"{name}, line {number}, step {one['step']}: {difference}")
            return
    if len(lines) != len(others):
        found.different.append(
            f"{name}: {counted(len(lines), 'line')} and {len(others):,}; equal up to the shorter "
            f"one's end"
        )
    # A record that neither run has is no part of them.
    elif lines:
        found.equal.append(f"{name}: {counted(len(lines), 'line')}")


def _line_difference(one: Line, other: Line) -> str:
    """The first value that differs, by name; "" if none does."""
    for name in sorted((one.keys() | other.keys()) - TIMES):
        if name not in one or name not in other:
            return f"{name} is missing in the {'second' if name in one else 'first'} run"
        if one[name] != other[name]:
            return f"{name} is {_shown(one[name])} and {_shown(other[name])}"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _compare_checkpoints(first: Path, second: Path, found: Identity) -> None:
    """Compare the last checkpoints: their steps, and every tensor with ==."""
    steps = [checkpoint.steps_of(run)[-1:] for run in (first, second)]
    if steps[0] != steps[1]:
        words = [f"step {at[0]}" if at else "none" for at in steps]
        found.different.append(f"last checkpoint: {words[0]} and {words[1]}")
        return
    # --no-save: neither has one.
    if not steps[0]:
        return
    step = steps[0][0]
    damages = [(run, checkpoint.damage(run, step)) for run in (first, second)]
    damaged = [f"checkpoint {step} of {run}: {problem}" for run, problem in damages if problem]
    found.different.extend(damaged)
    if damaged:
        return
    for kind in KINDS_OF_TENSORS:
        folders = (checkpoint.folder_of(run, step) for run in (first, second))
        stored = (StoredTensors(folder, kind) for folder in folders)
        _compare_tensors(f"checkpoint {step}, {kind}.safetensors", *stored, found)


def _compare_tensors(
    what: str, first: StoredTensors, second: StoredTensors, found: Identity
) -> None:
    """Compare all tensors of a kind. Only two are in memory at a time."""
    names = first.pieces.keys()
    if unshared := names ^ second.pieces.keys():
        found.different.append(f"{what}: only one run has {min(unshared)}")
        return
    for name in sorted(names):
        a, b = first.read(name), second.read(name)
        if a.dtype != b.dtype or not torch.equal(a, b):
            found.different.append(f"{what}: {name} differs{_by_how_much(a, b)}")
            return
    found.equal.append(f"{what}: {counted(len(names), 'tensor')}")


def _by_how_much(a: torch.Tensor, b: torch.Tensor) -> str:
    """How two tensors differ, as the end of a sentence."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return f": {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    n = int((a != b).sum())
    largest = (a.double() - b.double()).abs().max().item()
    return f" in {n:,} of {counted(a.numel(), 'number')}, by up to {largest:.3g}"
