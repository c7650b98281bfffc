"""When the state of a run is saved, on which rank, and what happens to saves that failed."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nanochat.model.decoder import Decoder
from nanochat.optim.optimizer import Optimizer
from nanochat.ranks import from_rank0, rank
from nanochat.run.clock import Clock
from nanochat.run.saver import Saver
from nanochat.run.state import TrainState


class Keeper:
    """Saves the parts of a run as checkpoints. Every rank calls it alike; rank 0's Saver writes,
    and of a sharded run every rank's."""

    def __init__(
        self,
        saver: Saver | None,
        *,
        model: Decoder,
        optimizer: Optimizer,
        shard_tokens: Mapping[str, int],
        clock: Clock,
        first_step: int,
        enabled: bool,
    ) -> None:
        """saver: None on ranks that save nothing. shard_tokens: those of the data read so far,
        which grows meanwhile. first_step: where this start of the run begins. enabled: False with
        --no-save."""
        self.saver = saver
        self.model = model
        self.optimizer = optimizer
        self.shard_tokens = shard_tokens
        self.clock = clock
        self.first_step = first_step
        self.enabled = enabled
        # step and kind of the newest save, and whether it waits for a good step
        self.newest: tuple[int, str, bool] = (-1, "", False)
        # the newest that is known to be on disk
        self.safe: int | None = None

    def save(self, kind: str, state: TrainState, hold: bool = False) -> None:
        """Save the state as a checkpoint of a kind; every rank takes part, since that gathers.

        hold: the step before was skipped, so what follows it may be no good either: the state is
        written only after a good step."""
        # What a run resumes from is saved already, and a new run has learned nothing yet; only the
        # final kind may be new.
        if not self.enabled or (state.step == self.first_step and kind != "final"):
            return
        # On the way out the state may have been saved a moment ago, for another reason.
        if kind == "rolling" and self.newest[0] == state.step and not self.newest[2]:
            return
        self.newest = (state.step, kind, hold)
        # Every rank holds a share of it.
        optimizer_state = self.optimizer.state()
        if self.saver:
            # A copy, since the thread that reads ahead keeps adding to it.
            state.shard_tokens = dict(self.shard_tokens)
            self.saver.save(state.step, kind, self.model, optimizer_state, asdict(state), hold)
        # On every rank, though only rank 0's clock is asked: ranks that differ are hard to debug.
        self.clock.note_save()

    def rolling_due(self) -> bool:
        """Whether a rolling checkpoint is due by this rank's clock (rank 0's counts); a save in
        progress, or one that will be retried, comes first."""
        if not self.saver or not self.enabled or self.saver.busy() or self.saver.can_retry():
            return False
        return self.clock.save_due()

    def outcome(self, step: int) -> dict[str, Any] | None:
        """What became of a save of this step or a later one, as an answer to `nanochat jobs`; None
        until that is known. From any thread, on rank 0."""
        safe = self.saver.safe_step
        if safe is not None and safe >= step:
            return {"done": f"step {safe} is saved", "step": safe}
        if self.saver.failure and not self.saver.busy():
            return {"error": self.saver.failure}
        if self.saver.held:
            text = f"step {step} is copied; it is written after the next good step"
            return {"done": text, "step": step}
        return None

    def keep_last(self, n: int) -> None:
        """Keep so many permanent checkpoints from now on, -1 for all."""
        if self.saver:
            self.saver.keep_last = n

    def mark_best(self, step: int, bpb: float) -> None:
        """Let checkpoints/best name the checkpoint of a step if its bpb is the lowest so far."""
        if self.saver and rank() == 0:
            self.saver.mark_best(step, bpb)

    def after_step(self, finite: bool) -> bool:
        """After a good step, write what was held and retry what failed. Returns whether a
        checkpoint has become safe since the last call."""
        if not self.saver:
            return False
        if finite:
            self.saver.release()
            self.saver.retry()
        was_safe, self.safe = self.safe, self.saver.safe_step
        return self.safe != was_safe

    def wait(self) -> None:
        """Return when no save is in progress."""
        if self.saver:
            self.saver.wait()

    def finish(self) -> str:
        """Wait for the last save. Returns why it failed, or "", on every rank."""
        return from_rank0(self.saver.finish() if self.saver else "")
