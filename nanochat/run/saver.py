"""Saving checkpoints while training continues: a copy of the state, and a thread that writes it."""

import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanochat.ranks import rank, world_size
from nanochat.run import checkpoint
from nanochat.run.shares import Shares

if TYPE_CHECKING:
    from nanochat.model.decoder import Decoder
    from nanochat.run.metrics import Record

# Until a failed save is retried during training.
RETRY_SECONDS = 60.0
# Seconds to wait before each further attempt at the last save of a run.
LAST_ATTEMPTS = (1.0, 5.0, 15.0)


@dataclass(frozen=True)
class _Snapshot:
    """What belongs to the copied tensors: whose state they are and why they are saved."""

    step: int
    kind: str
    state: dict[str, Any]


class Saver:
    """Saves the checkpoints of a run while training continues: on rank 0, and of a sharded run on
    every rank its part.

    save() copies the state, a thread writes the copy. There is memory for one copy, so a save()
    that comes while the copy is being written waits for that. Older checkpoints are removed once
    the new one has been read back. A failed write is reported, leaves `failure` set until a write
    succeeds, and is retried from the copy with its kind: the state before the warm-down comes only
    once."""

    def __init__(
        self,
        run_path: Path | str,
        keep_last: int,
        report: Callable[[str], None],
        records: Sequence["Record"],
        best_bpb: float | None = None,
        shares: Shares | None = None,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] = checkpoint.free_bytes,
    ) -> None:
        """keep_last: as --keep-last. report(text) takes a line.

        records: the run's metrics, samples and the like, which are flushed to disk before a later
        checkpoint appears. best_bpb: of the best checkpoint, if it is known. shares: of a sharded
        run. clock: in seconds, for retry()."""
        self.run_path = run_path
        self.keep_last = keep_last
        self.report = report
        self.records = records
        self.best_bpb = best_bpb
        self.shares = shares
        self.clock = clock
        self.free_bytes = free_bytes
        # {file: {tensor name: CPU tensor}} of the last save, reused for the next one.
        self.copy: dict[str, dict[str, torch.Tensor]] = {}
        self.last: _Snapshot | None = None
        # Whether the last save waits for release().
        self.held = False
        self.failure = ""
        self.failed_at = 0.0
        # of this process's last save that is on disk
        self.safe_step: int | None = None
        # Whether retrying the failed save would fail in the same way.
        self.hopeless = False
        best = Path(run_path) / "checkpoints" / "best"
        if checkpoint.best_step(run_path) is None and best.exists():
            report("checkpoints/best does not name a checkpoint; the next evaluation rewrites it")
        # One thread, so that saving, pruning and marking the best never overlap. A daemon, so that
        # an interrupted process does not wait for it.
        self.jobs = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def save(
        self,
        step: int,
        kind: str,
        model: "Decoder",
        optimizer_state: checkpoint.OptimizerState,
        loop_state: Mapping[str, Any],
        hold: bool = False,
    ) -> None:
        """Copy the state and have it written; with hold, only once release() is called.

        kind: one of checkpoint.KINDS. optimizer_state: what Optimizer.state() returned.
        loop_state: JSON values that the loop needs besides tensors. Waits for a save that is in
        progress."""
        self.wait()
        # The held state has the same weights, since no step has changed them, and as good a reason.
        if self.held and hold and not checkpoint.is_stronger(kind, than=self.last.kind):
            return
        # The last chance of a failed save: its copy is about to be overwritten.
        if self.can_retry() and self.last.kind != "rolling":
            self._save_last()
        self._copy(checkpoint.tensors_of(model, optimizer_state))
        self.last = _Snapshot(step, kind, checkpoint.state_of(model, loop_state))
        self.held = hold
        if not hold:
            self.jobs.put(self._save_last)

    def _copy(self, tensors: checkpoint.TensorFiles) -> None:
        """Copy tensors from the device into self.copy, and wait until that is done."""
        on_cuda = any(tensor.is_cuda for part in tensors.values() for tensor in part.values())
        if not self.copy:
            # Pinned memory: the device copies into it directly and at full speed.
            self.copy = {
                file: {
                    name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_cuda)
                    for name, tensor in part.items()
                }
                for file, part in tensors.items()
            }
        targets, sources = [], []
        for file, part in tensors.items():
            for name, tensor in part.items():
                targets.append(self.copy[file][name])
                sources.append(tensor.detach())
        torch._foreach_copy_(targets, sources, non_blocking=True)
        if on_cuda:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Write the state that is held: a later step has shown that its weights are good."""
        if self.held:
            self.held = False
            self.jobs.put(self._save_last)

    def mark_best(self, step: int, bpb: float) -> None:
        """Let checkpoints/best name the checkpoint of a step if its bpb is the lowest so far.

        Nothing happens if that checkpoint was never saved."""

        def mark() -> None:
            is_lower = self.best_bpb is None or bpb < self.best_bpb
            if is_lower and step in checkpoint.steps_of(self.run_path):
                checkpoint.mark_best(self.run_path, step)
                self.best_bpb = bpb

        # In the thread, behind the save of that step.
        self.jobs.put(mark)

    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self.jobs.unfinished_tasks > 0

    def retry(self) -> None:
        """Retry the last save if it failed more than RETRY_SECONDS ago; of a sharded run only the
        next save() or finish() does, since all ranks have to at once."""
        if self.busy() or not self.can_retry() or self.shares:
            return
        if self.clock() - self.failed_at > RETRY_SECONDS:
            self.jobs.put(self._save_last)

    def can_retry(self) -> bool:
        """Whether the last save failed and retrying it may help."""
        return bool(self.failure) and not self.hopeless and not self.held

    def wait(self) -> None:
        """Return when no save is in progress."""
        self.jobs.join()

    def finish(self, sleep: Callable[[float], None] = time.sleep) -> str:
        """Wait for the last save and retry it if it failed, after pauses of LAST_ATTEMPTS.

        Returns why it failed in the end, or "". sleep(seconds) makes the pauses."""
        self.wait()
        for seconds in LAST_ATTEMPTS:
            if not self.can_retry():
                break
            sleep(seconds)
            self._save_last()
        return self.failure

    def close(self) -> None:
        """End the thread after the jobs that it has; does not wait for it."""
        self.jobs.put(None)

    def _save_last(self) -> None:
        """Write the copy; a failure is noted and reported, never raised."""
        last = self.last
        try:
            self._write(last)
        # Whatever the error is, the run is worth more than this checkpoint.
        except Exception as error:
            self._note_failure(last.step, error)
            return
        if self.failure:
            self.report(f"checkpoint saved at step {last.step}, after an earlier failure")
        self.failure = ""
        self.safe_step = last.step
        # Only now: until the new checkpoint is safe, the older ones are all there is.
        if rank() == 0:
            checkpoint.prune(self.run_path, self.keep_last)

    def _write(self, last: _Snapshot) -> None:
        """Write the copy as a checkpoint, or as this rank's part of one. Raises as
        checkpoint.write()."""
        if self.shares and rank() > 0:
            self.shares.write(self.run_path, last.step, self.copy, self.free_bytes)
            return
        write = functools.partial(
            checkpoint.write,
            self.run_path,
            last.step,
            last.kind,
            self.copy,
            last.state,
            self.records,
            self.free_bytes,
        )
        if self.shares:
            write = functools.partial(write, parts=world_size())
            self.shares.join(self.run_path, last.step, write)
        else:
            write()

    def _note_failure(self, step: int, error: Exception) -> None:
        self.failure = f"the checkpoint of step {step} cannot be saved ({error})"
        self.failed_at = self.clock()
        self.hopeless = isinstance(error, checkpoint.NotFinite)
        consequence = "it is not retried" if self.hopeless else "the save will be retried"
        steps = checkpoint.steps_of(self.run_path)
        newest = f"the newest checkpoint is step {steps[-1]}" if steps else "no checkpoint exists"
        self.report(f"{self.failure}; {consequence}; {newest}")

    def _run(self) -> None:
        """The thread: one job after the other until close()."""
        job = True
        while job is not None:
            job = self.jobs.get()
            try:
                if job is not None:
                    job()
            # Of pruning or marking: the checkpoint itself is safe.
            except Exception as error:
                self.report(f"checkpoints: {type(error).__name__}: {error}; training continues")
            finally:
                self.jobs.task_done()
