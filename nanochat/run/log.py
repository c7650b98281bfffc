"""Everything that a run writes down while it trains, in one place: metrics, samples, CORE results,
trackers, summary, screen.

Every rank has a RunLog and calls it alike; only rank 0's writes anything."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from nanochat import hardware
from nanochat.common import human_bytes, human_time
from nanochat.optim.loss_scaler import LossScaler
from nanochat.run import checkpoint, faults
from nanochat.run.clock import Clock
from nanochat.run.flags import flag
from nanochat.run.folder import RunFolder, write_summary
from nanochat.run.metrics import Record, finite_or_null, read_lines
from nanochat.run.notify import HURRY_SECONDS, PATIENCE_SECONDS, Notifier
from nanochat.run.plan import Machine, Plan
from nanochat.run.screen import Progress
from nanochat.run.state import Scores, TrainState
from nanochat.run.trackers import Trackers

RETRY_SECONDS = 10  # between attempts to write a summary that a full disk has refused
# of the steps of a time budget: a smaller correction is not worth a line
REMARKABLE_SHARE = 0.01
SMOOTHING = 0.95  # of the loss on the screen: share of the value before


@dataclass(frozen=True)
class StepResult:
    """One training step. loss: mean nats per token over micro-batches and ranks. grad_norm: of the
    averaged gradient, before clipping. finite: both are, so the update was applied. lr_multiplier:
    learning rate / its peak. seconds: of the step. spike: from faults.spike()."""

    loss: float
    grad_norm: float
    finite: bool
    lr_multiplier: float
    seconds: float
    spike: float | None = None


class RunLog:
    """The record of one start of a run. state and scores are followed, not copied."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        writes: bool,
        plan: Plan,
        machine: Machine,
        device: torch.device,
        state: TrainState,
        scores: Scores,
        tokens_per_epoch: float,
        untrained_vocabulary: int | None,
        notify: str = "",
    ) -> None:
        """writes: True on rank 0; elsewhere nothing is written or shown. untrained_vocabulary: its
        size for a model that begins untrained, else None. notify: --notify."""
        self.folder = folder
        self.writes = writes
        self.plan = plan
        self.machine = machine
        self.device = device
        self.state = state
        self.scores = scores
        self.tokens_per_epoch = tokens_per_epoch
        self.untrained_vocabulary = untrained_vocabulary
        self.progress = Progress(state.step, plan.num_iterations, quiet=not writes)
        # Their trouble goes to the screen, not through this object: they would keep it, and with it
        # the lock on the folder, alive.
        self.metrics, self.samples, self.core = (
            Record(folder.path / f"{name}.jsonl", self.progress.message)
            for name in ("metrics", "samples", "core")
        )
        self.notifier: Notifier | None = None
        if writes and notify:
            self.notifier = Notifier(notify, folder.path, self.progress.message)
        self.config: dict[str, Any] = {}
        self.trackers: Trackers | None = None
        self.smooth_loss: float | None = None
        self.latest_loss: float | None = None
        # of a time budget
        self.announced_steps = plan.num_iterations
        # what config.json holds, and the summary (status, reason) that the disk has refused
        self.config_on_disk: dict[str, Any] | None = None
        self.unwritten: tuple[str, str] | None = None
        self.tried_at = -math.inf
        # the newest checkpoint that was seen: a disk that vanishes does not undo it
        self.saved_step: int | None = None

    @property
    def records(self) -> tuple[Record, Record, Record]:
        """The .jsonl files."""
        return self.metrics, self.samples, self.core

    def open_trackers(self, run_name: str, tensorboard: bool) -> None:
        """Start Weights & Biases and TensorBoard, as far as they are asked for (--run,
        --tensorboard). `config` is set before."""
        if not self.writes:
            return
        # Trackers are given the lines that they lack; reading a long file for none would be a
        # waste.
        wanted = tensorboard or run_name != "dummy"
        self.trackers = Trackers(
            self.folder.path,
            run_name,
            tensorboard,
            self.config,
            self.config["wandb_id"],
            self.state.step,
            self.progress.message,
            read_lines(self.metrics.path) if wanted else (),
        )

    def message(self, text: str) -> None:
        """A line on the screen."""
        self.progress.message(text)

    def meanwhile(self, text: str) -> None:
        """What is being done between two steps, on the live line."""
        self.progress.meanwhile(text)

    def position(self) -> dict[str, Any]:
        """What every line of metrics begins with: the state after `step` updates."""
        # Derived, not counted: a resumed run cannot drift from an uninterrupted one.
        tokens = self.state.step * self.plan.total_batch_tokens
        return {
            "step": self.state.step,
            "tokens": tokens,
            "total_training_flops": tokens * self.plan.flops_per_token,
            "total_training_time": self.state.training_seconds,
        }

    def line(self, **values: Any) -> None:
        """A line of metrics at the present step, also for the trackers. Names that are no
        identifiers come as **{"val/bpb": ...}."""
        if self.writes:
            line = {**self.position(), **values}
            self.metrics.write(**line)
            self.trackers.log(line)

    def step(self, result: StepResult, scaler: LossScaler, clock: Clock, **more: Any) -> None:
        """A training step: the line of the state before the update, with the loss of the update
        and what `more` says of it, the live line, and what is remarkable. Called before the state
        counts it."""
        state = self.state
        self.latest_loss = result.loss
        # Of all ranks together: a step takes as long on each.
        speed = self.plan.total_batch_tokens / result.seconds
        mfu = self._mfu(speed)
        values = {
            "train/loss": result.loss,
            "train/lr": self.plan.groups["matrices"]["lr"] * result.lr_multiplier,
            "train/lrm": result.lr_multiplier,
            "train/grad_norm": result.grad_norm,
            "train/dt": result.seconds,
            "train/tok_per_sec": speed,
            "train/mfu": mfu,
            "train/epoch": self._tokens_of_text() / self.tokens_per_epoch,
        }
        values |= more
        if result.spike is not None:
            values["spike"] = result.spike
        if scaler.enabled:
            values["train/loss_scale"] = scaler.scale
        if not result.finite:
            # A bad loss always makes bad gradients; the reverse points at the backward pass.
            culprit = "gradient" if math.isfinite(result.loss) else "loss"
            values["skipped"] = f"non-finite {culprit}"
        self.line(**values)
        for remark in faults.remarks(
            state.step, result.loss, result.spike, self.untrained_vocabulary
        ):
            self.message(remark)
        if result.spike is not None:
            z = f"{result.spike:.1f} standard deviations above the recent ones"
            self.notify("spike", f"the loss jumped to {result.loss:.4f}, {z}")
        self._show(result, speed, mfu, clock)
        if self.unwritten and clock.now() - self.tried_at > RETRY_SECONDS:
            self.tried_at = clock.now()
            self.summarize(*self.unwritten)

    def _tokens_of_text(self) -> int:
        """Tokens so far of the text in its present order, with which a fork may have begun."""
        first_row = self.config.get("data", {}).get("first_row", 0)
        plan = self.plan
        row_tokens = plan.total_batch_tokens // plan.rows_per_step
        return self.state.step * plan.total_batch_tokens - first_row * row_tokens

    def skipped(self, result: StepResult, overflowed: bool, scaler: LossScaler) -> None:
        """The step before was skipped. overflowed: its fp16 loss scale was too large and has been
        lowered."""
        text = (
            f"step {self.state.step - 1}: loss {result.loss}, gradient norm {result.grad_norm}: "
            "not finite, so the weights were left unchanged"
        )
        if overflowed:
            text += f"; fp16 overflowed, the loss is scaled by {scaler.scale:g} from here on"
        self.message(text)

    def _show(self, result: StepResult, speed: float, mfu: float, clock: Clock) -> None:
        """The live line after a step."""
        # After a skipped step the average would stay NaN.
        if self.smooth_loss is None or not math.isfinite(self.smooth_loss):
            self.smooth_loss = result.loss
        else:
            self.smooth_loss = SMOOTHING * self.smooth_loss + (1 - SMOOTHING) * result.loss
        done = self.state.step + 1
        steps = self.plan.num_iterations
        # Before the number of steps is known there is no end to estimate.
        left = None if steps is None else clock.seconds_for(steps - done)
        text = f"loss {self.smooth_loss:.4f} | {speed:,.0f} tok/s | mfu {mfu:.1f}%"
        self.progress.update(done, steps, text, left)

    def _mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilisation, in percent."""
        peak = self.machine.peak_flops * self.machine.devices
        return 100 * tokens_per_second * self.plan.flops_per_token / peak

    def sample(self, prompt: str, text: str | None, problem: str) -> None:
        """A text sample, or why it could not be drawn."""
        if not self.writes:
            return
        # Null with a reason, never an empty text that looks like a sample.
        reason = {"reason": problem} if problem else {}
        self.samples.write(step=self.state.step, prompt=prompt, text=text, **reason)
        if problem:
            self.message(f"step {self.state.step}: sampling failed, training continues ({problem})")
            return
        self.trackers.text(self.state.step, prompt, text)
        self.message(f"--- sample at step {self.state.step}, prompt {prompt!r}\n{prompt}{text}")

    def steps_fixed(self, clock: Clock) -> None:
        """The number of steps of a time budget has just been fixed or corrected in the plan."""
        if not self.writes:
            return
        plan = self.plan
        # a resumed run must not measure again
        self.record_plan()
        steps, announced = plan.num_iterations, self.announced_steps
        step_time = f"{1000 * clock.usual_seconds():.1f} ms"
        if not plan.corrections:
            self.message(
                f"time budget: {steps} steps at {step_time}, {plan.tokens:,} tokens; "
                f"warm-down over the last {plan.warmdown_steps}"
            )
        elif abs(steps - announced) >= REMARKABLE_SHARE * announced:
            self.message(
                f"time budget: {steps} steps instead of {announced}, since a step takes "
                f"{step_time} now"
            )
        else:
            return
        self.announced_steps = steps

    def landed(self, steps: int) -> None:
        """The warm-down begins now, because `nanochat jobs land` asked for it, or does again in a
        resumed run. steps: after which the run ends."""
        self.line(land=steps)
        self.message(
            f"step {self.state.step}: landing, as nanochat jobs asked: the warm-down begins now, "
            f"and the run ends at step {steps}"
        )

    def changed(self, values: dict[str, Any]) -> None:
        """Flags have just been changed by `nanochat jobs set`, or are again in a resumed run."""
        words = ", ".join(f"{flag(name)}={value}" for name, value in values.items())
        self.line(**{f"set/{name}": value for name, value in values.items()})
        self.message(f"step {self.state.step}: {words}, as nanochat jobs asked")

    def record_change(self, values: dict[str, Any]) -> None:
        """Write the change of flags at this step down, for a run that is resumed."""
        if not self.writes:
            return
        changes = self.config.get("changes", [])
        self.config["changes"] = [*changes, [self.state.step, values]]
        self.summarize("running")
        self.trackers.update_config(self.config)

    def record_plan(self) -> None:
        """Write the plan down before the next step, so that a resumed run has it."""
        if not self.writes:
            return
        self.config["plan"] = self.plan.as_dict()
        self.summarize("running")
        self.trackers.update_config(self.config)

    def facts(self, clock: Clock) -> dict[str, Any]:
        """What `nanochat jobs` shows of the run; called from another thread."""
        steps = self.plan.num_iterations
        left = None if steps is None else clock.seconds_for(steps - self.state.step)
        position = self.position()
        # null, since a loss that is not a number has no place in JSON
        loss = self.smooth_loss
        return {
            **position,
            "num_iterations": steps,
            "depth": self.config["args"]["depth"],
            "loss": loss if loss is not None and math.isfinite(loss) else None,
            "tok_per_sec": clock.rate(self.plan.total_batch_tokens),
            "eta_seconds": left,
            "val_bpb": self.scores.val_bpb,
            "core_metric": self.scores.core_metric,
            "skipped_steps": self.state.skipped_steps,
            # an order to save has just added one
            "checkpoint": max(checkpoint.steps_of(self.folder.path), default=self.saved_step),
            "doing": clock.doing,
        }

    def summarize(self, status: str, reason: str = "") -> dict[str, Any]:
        """Write config.json and summary.json; returns the summary. A full disk is only reported;
        step() then tries again."""
        if not self.writes:
            return {}
        state = self.state
        scores = self.scores
        if steps := checkpoint.steps_of(self.folder.path):
            self.saved_step = steps[-1]
        # A run that has not trained has no speed; 0 would be a measurement.
        speed = None
        if state.training_seconds:
            speed = state.step * self.plan.total_batch_tokens / state.training_seconds
        summary = {
            "status": status,
            "reason": reason,
            **self.position(),
            "val_bpb": scores.val_bpb,
            "min_val_bpb": scores.min_val_bpb,
            "core_metric": scores.core_metric,
            "core_metric_n": scores.core_metric_n,
            "tok_per_sec": speed,
            "mfu": None if speed is None else self._mfu(speed),
            "peak_memory_bytes": hardware.peak_memory_bytes(self.device),
            "skipped_steps": state.skipped_steps,
            "checkpoint": self.saved_step,
        }
        was_unwritten, self.unwritten = self.unwritten, None
        try:
            # First, since the summary must never stand next to an older config. What is on disk
            # is left alone: a full disk would refuse it again, and with it the summary.
            if self.config != self.config_on_disk:
                self.folder.write_config(self.config)
                self.config_on_disk = copy.deepcopy(self.config)
            write_summary(self.folder.path, **summary)
            if was_unwritten:
                self.message("config.json and summary.json are written now")
        except OSError as error:
            self.unwritten = status, reason
            if not was_unwritten:
                self.message(f"config.json and summary.json cannot be written ({error})")
        return summary

    def notify(self, event: str, reason: str) -> None:
        """Tell --notify of something that happens while the run trains; from any thread."""
        if self.notifier is not None:
            self.notifier.send(event, reason, **self._figures())

    def _figures(self) -> dict[str, Any]:
        """What --notify is told of the run, null where a number is not known."""
        return finite_or_null(
            {
                "step": self.state.step,
                "loss": self.latest_loss,
                "val_bpb": self.scores.val_bpb,
            }
        )

    def end(self, status: str, reason: str, exit_code: int, hurry: bool = False) -> None:
        """The last word: the summary's final status, the last message of --notify, and the
        trackers' end. hurry: hardly wait for the message."""
        summary = self.summarize(status, reason)
        if self.notifier is not None:
            seconds = HURRY_SECONDS if hurry else PATIENCE_SECONDS
            self.notifier.send_last(status, reason, seconds, **self._figures())
        if self.trackers is not None:
            self.trackers.finish(summary, exit_code)

    def close(self) -> None:
        """Close the files and the live line."""
        for record in self.records:
            record.close()
        self.progress.close()

    def last_words(self, *, completed: bool, failure: str, saved: str, no_save: bool) -> str:
        """What became of the run and what is saved where, for its last line.

        saved: the newest checkpoint in words, "" if there is none. no_save: --no-save."""
        state = self.state
        newest = saved or f"nothing was saved{' (--no-save)' if no_save else ' yet'}"
        if not completed:
            reason = failure.rstrip(".") or "as requested"
            resume = f"; add --resume to continue: {self.folder.path}" if saved else ""
            return f"stopped at step {state.step}: {reason}; {newest}{resume}"
        words = (
            f"completed {state.step} steps in {human_time(state.training_seconds)} of training: "
        )
        if self.scores.val_bpb is not None:
            words += f"val_bpb {self.scores.val_bpb:.4f}, "
        if self.scores.core_metric is not None:
            words += f"CORE {self.scores.core_metric:.4f}, "
        memory = human_bytes(hardware.peak_memory_bytes(self.device))
        return f"{words}peak memory {memory}; {newest}; run folder: {self.folder.path}"
