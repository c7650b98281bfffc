"""The state of a run: what a checkpoint holds besides tensors, and what evaluations found."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """All that must survive a restart besides tensors; asdict() of it is a checkpoint's state.json.

    step: updates done. training_seconds: without evaluation, compilation and saving.
    recent_losses: the last ones, to recognise a spike. loss_scaler: of LossScaler.state().
    shard_tokens: {shard fingerprint: tokens} of the data read so far. tokenizer: the fingerprint of
    the tokenizer."""

    step: int = 0
    training_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    loss_scaler: list[float] | None = None
    shard_tokens: dict[str, int] = field(default_factory=dict)
    tokenizer: str = ""

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any], step: int, tokenizer: str) -> "TrainState":
        """The state in a checkpoint's state.json, or that of a run that begins, from {}."""
        # Checkpoints of other versions may hold more, or less: what is missing starts at its
        # default.
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in saved.items() if name in names}
        return cls(**{**known, "step": step, "tokenizer": tokenizer})

    def advance(
        self, seconds: float, finite: bool, overflowed: bool, loss_scaler: list[float] | None
    ) -> None:
        """Count a step. finite: its update was applied. overflowed: it was skipped because an fp16
        loss scale was too large, which is not a fault. loss_scaler: its state from here on."""
        self.step += 1
        self.training_seconds += seconds
        self.loss_scaler = loss_scaler
        # One good step shows that the weights are still good.
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        if not overflowed:
            self.skipped_in_a_row += 1


@dataclass
class Scores:
    """What evaluation found so far; a value is None until it is measured, or if that failed.

    Nothing of it is checkpointed: metrics.jsonl has every evaluation, and is cut on resume."""

    val_bpb: float | None = None
    min_val_bpb: float | None = None
    stale_evaluations: int = 0  # in a row without improvement
    core_metric: float | None = None
    core_metric_n: int | None = None

    @classmethod
    def from_lines(cls, lines: Iterable[Mapping[str, Any]]) -> "Scores":
        """The scores that a run had after these lines of its metrics.jsonl."""
        # The lines of one step are in the order in which the loop wrote them, and so is this.
        scores = cls()
        for line in lines:
            if "val/bpb" in line:
                scores.add_bpb(line["val/bpb"])
            if "core_metric" in line:
                scores.add_core(line["core_metric"], line.get("core_metric_n"))
        return scores

    def add_bpb(self, bpb: float | None) -> bool:
        """Note validation bits per byte, None where the evaluation failed. Returns whether they
        are the lowest so far."""
        # The latest value is shown even where it is none: an old one would look like a new result.
        self.val_bpb = bpb
        if bpb is None:
            return False
        better = bpb < (math.inf if self.min_val_bpb is None else self.min_val_bpb)
        if better:
            self.min_val_bpb = bpb
        self.stale_evaluations = 0 if better else self.stale_evaluations + 1
        return better

    def add_core(self, core_metric: float | None, n: int | None) -> None:
        """Note a CORE metric and the number of examples behind it."""
        self.core_metric = core_metric
        self.core_metric_n = n
