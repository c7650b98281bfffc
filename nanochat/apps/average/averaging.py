"""The mean of checkpoints as a run folder, and what it predicts."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.common import (
    Unavailable,
    UsageError,
    counted,
    in_a_line,
    new_folder,
    printable,
)
from nanochat.data.tokenizer import read_tokenizer
from nanochat.eval.bpb import bits_per_byte
from nanochat.eval.core_answers import BATCH_TOKENS
from nanochat.eval.unison import EvaluationFailed
from nanochat.run import checkpoint, loading
from nanochat.run.folder import RunFolder, write_summary
from nanochat.run.metrics import Line, Record, read_lines
from nanochat.run.tables import aligned, fixed
from nanochat.run.tensor_files import StoredTensors
from nanochat.run.training_text import held_out_of_run

# what a line of metrics.jsonl says of the training until then
COSTS = ("tokens", "total_training_flops", "total_training_time")


@dataclass(frozen=True)
class Score:
    """What a checkpoint predicts. name: for people. loss: nats per token, None as bpb if the
    evaluation failed."""

    name: str
    step: int
    bpb: float | None
    loss: float | None


@dataclass(frozen=True)
class Average:
    """An average that was written. run, out: run folders. scores: of the average, then of the run's
    newest and best checkpoint; empty without the text, which `note` then explains."""

    run: Path
    out: Path
    steps: list[int]
    dtype: str
    scores: list[Score]
    note: str

    def as_json(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "run": str(self.out),
            "averaged_from": str(self.run),
            "steps": self.steps,
            "dtype": self.dtype,
            "scores": [asdict(score) for score in self.scores],
            "note": self.note,
        }

    def in_words(self) -> str:
        """What was averaged, a table of the scores, and where the new run is."""
        lines = [f"average of steps {_listed(self.steps)} of {self.run}"]
        if self.scores:
            rows = [("", "val bits per byte", "nats a token")]
            rows += [(score.name, fixed(score.bpb), fixed(score.loss)) for score in self.scores]
            lines.append(aligned(rows))
        if self.note:
            lines.append(f"note: {self.note}")
        return printable("\n".join([*lines, f"run folder: {self.out}"]))


def average(
    run: Path,
    out: Path,
    last: int | None,
    steps: Sequence[int] | None,
    device: torch.device,
    dtype: str,
) -> Average:
    """Write the mean of checkpoints of a run as the run folder `out`, and score it.

    last, steps: as the flags, of which one is given. dtype: to compute with. Raises UsageError for
    checkpoints that are missing, damaged or of different shapes and for a folder that exists,
    Unavailable for a disk that refuses it."""
    # before anything else: it says what is wrong with a folder that is no run
    newest = loading.step_of(run, None)
    chosen = _last(run, last) if steps is None else _named(run, steps)
    _refuse_different_shapes(run, chosen)
    # before anything is read: new_folder() does not know the flag
    if out.exists():
        raise UsageError(f"{out} exists; name another run folder with --tag, or delete it first")
    config = RunFolder(run).read_config()
    with new_folder(out) as folder:
        _write_weights(run, folder, chosen)
        # W&B has a curve of the parent alone
        kept = {name: value for name, value in config.items() if name != "wandb_id"}
        RunFolder(folder).write_config({**kept, "averaged_from": _lineage(run, chosen)})
        scores, note = [], ""
        # the weights are the result, and are kept where there is nothing to measure them on
        try:
            pieces = _held_out(run, config)
        except (UsageError, Unavailable) as error:
            note = f"no bits per byte: {in_a_line(error)}"
        else:
            which = {(folder, chosen[-1]): "average", **_rivals(run, newest)}
            scores = [
                _score(name, path, step, pieces, device, dtype)
                for (path, step), name in which.items()
            ]
        _write_records(run, folder, chosen, scores[0] if scores else None)
    return Average(run, out, chosen, dtype, scores, note)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


# ----- which checkpoints


def _last(run: Path, n: int) -> list[int]:
    """The last n permanent checkpoints. UsageError if there are fewer, or for a damaged one."""
    # a process that trains removes a rolling one when it has saved the next
    kept = [s for s in checkpoint.steps_of(run) if checkpoint.kind_of(run, s) != "rolling"]
    if len(kept) < n:
        have = f"{counted(len(kept), 'permanent checkpoint')} (steps {_listed(kept)})"
        raise UsageError(
            f"--last={n}: {run} has only {have}; give a smaller number of at least 2, or train "
            "with --save-every=STEPS to keep more"
        )
    _refuse_damaged(f"--last={n}", run, kept[-n:])
    return kept[-n:]


def _named(run: Path, steps: Sequence[int]) -> list[int]:
    """The checkpoints of these steps. UsageError for those that do not exist or are damaged."""
    named = f"--steps={','.join(map(str, steps))}"
    have = checkpoint.steps_of(run)
    if missing := sorted(set(steps) - set(have)):
        raise UsageError(
            f"{named}: {run} has no checkpoint of {_listed(missing)}; choose from {_listed(have)}"
        )
    _refuse_damaged(named, run, sorted(steps))
    return sorted(steps)


def _refuse_damaged(named: str, run: Path, steps: Sequence[int]) -> None:
    for step in steps:
        if problem := checkpoint.damage(run, step):
            raise UsageError(
                f"{named}: the checkpoint of step {step} in {run} is damaged ({problem}); leave it "
                "out with --steps"
            )


def _refuse_different_shapes(run: Path, steps: Sequence[int]) -> None:
    """UsageError if the models of two checkpoints differ in more than dropout, which a run may
    change and which is in no weight."""
    # of the checkpoints themselves: config.json has only one shape
    models = {step: asdict(checkpoint.model_config(run, step)) for step in steps}
    first = models[steps[0]]
    for step, model in models.items():
        differing = [name for name in first if name != "dropout" and model[name] != first[name]]
        if differing:
            words = ", ".join(f"{name} {first[name]} and {model[name]}" for name in differing)
            raise UsageError(
                f"{run}: the checkpoints of steps {steps[0]} and {step} are models of different "
                f"shapes ({words}); choose checkpoints of one shape with --steps"
            )


def _rivals(run: Path, newest: int) -> dict[tuple[Path, int], str]:
    """{(run, step): its name in the table} of the newest checkpoint, and of the best one if that is
    intact."""
    best = checkpoint.best_step(run)
    # measured once, and named by both
    if best == newest:
        return {(run, newest): f"step {newest}, the newest and best"}
    rivals = {(run, newest): f"step {newest}, the newest"}
    if best in checkpoint.steps_of(run) and checkpoint.damage(run, best) is None:
        rivals[run, best] = f"step {best}, the best"
    return rivals


# ----- the mean


def mean_weights(run: Path, steps: Sequence[int]) -> dict[str, Tensor]:
    """{name: mean over the checkpoints} of tensors of equal shape, each in the dtype that it is
    stored in.

    Summed in fp64 and rounded once: neither the order of the steps nor a narrow dtype shows."""
    stored = [StoredTensors(checkpoint.folder_of(run, step), "model") for step in steps]
    found = {}
    # tensor by tensor, so that memory holds one model, however many are averaged
    for name in stored[0].pieces:
        first = stored[0].read(name)
        total = first.double()
        for weights in stored[1:]:
            total += weights.read(name)
        found[name] = (total / len(stored)).to(first.dtype)
    return found


def _write_weights(run: Path, folder: Path, steps: Sequence[int]) -> None:
    """The tokenizer and the only checkpoint of the new run, at the last of the steps."""
    shutil.copytree(run / "tokenizer", folder / "tokenizer")
    state = checkpoint.read_state(run, steps[-1])
    # without an optimizer's state the run can be started from, but not resumed
    tensors = {"model.safetensors": mean_weights(run, steps), "optimizer.safetensors": {}}
    kept = {name: state[name] for name in ("model", "tokenizer")}
    checkpoint.write(folder, steps[-1], "final", tensors, kept)


# ----- what it predicts


def _held_out(run: Path, config: dict[str, Any]) -> list[np.ndarray]:
    """The pieces that the run was validated on. UsageError or Unavailable without that text."""
    pieces = held_out_of_run(config, read_tokenizer(run / "tokenizer"), _silent)
    if pieces is None:
        raise UsageError("the text has changed since the run was started")
    if not pieces:
        raise UsageError("the run has no held-out text")
    return pieces


def _silent(text: str) -> None:
    """print() of nothing: with --json, JSON is all that is printed."""


def _score(
    name: str, run: Path, step: int, pieces: list[np.ndarray], device: torch.device, dtype: str
) -> Score:
    """What the checkpoint of a run predicts of the pieces."""
    model, tokenizer = loading.load_run(run, step, device.type, dtype)
    batch_tokens = max(BATCH_TOKENS[device.type], model.config.max_seq_len)
    try:
        found = bits_per_byte(model, pieces, tokenizer.byte_counts(), batch_tokens, device)
    except EvaluationFailed:
        return Score(name, step, None, None)
    return Score(name, step, found.bpb, found.loss)


# ----- the other files of the run


def _write_records(run: Path, folder: Path, steps: Sequence[int], score: Score | None) -> None:
    """metrics.jsonl and summary.json of the new run.

    The training until its step is that of its parent, and its only metrics are its own."""
    step = steps[-1]
    costs = _costs_until(run, step)
    bpb = None
    if score is not None:
        bpb = score.bpb
    # so that --step best and the scripts that read losses find it as in any run
    if bpb is not None:
        record = Record(folder / "metrics.jsonl")
        record.write(step=step, **costs, **{"val/bpb": bpb, "val/loss": score.loss})
        record.close()
        checkpoint.mark_best(folder, step)
    write_summary(
        folder,
        status="completed",
        reason=f"average of steps {_listed(steps)} of {run}",
        step=step,
        **costs,
        val_bpb=bpb,
        min_val_bpb=bpb,
        core_metric=None,
        core_metric_n=None,
        tok_per_sec=None,
        mfu=None,
        peak_memory_bytes=None,
        checkpoint=step,
    )


def _costs_until(run: Path, step: int) -> Line:
    """Tokens, FLOPs and seconds of the training until a step; None where nothing tells."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["step"] == step]
    last = lines[-1] if lines else {}
    return {name: last.get(name) for name in COSTS}


def _lineage(run: Path, steps: Sequence[int]) -> dict[str, Any]:
    """What was averaged, and the SHA-256 of each file of weights, which tells it from all others
    wherever the run is moved."""
    hashes = [
        entry.sha256
        for step in steps
        for name, entry in checkpoint.read_manifest(run, step).files.items()
        if name.startswith("model")
    ]
    return {"run": str(run), "steps": list(steps), "sha256": hashes}
