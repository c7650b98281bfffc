"""Orders from other processes of this user to a run that is training: `nanochat jobs`.

A thread of rank 0 (listener.py) answers status, stop and abort itself; what changes the run waits
for the loop, which takes it between two steps or leaves an evaluation for it, on all ranks
together."""

from __future__ import annotations

import collections
import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanochat.common import EXIT_STOPPED, Report, UsageError, in_a_line, read_json
from nanochat.run.flags import live_problems
from nanochat.run.folder import write_summary
from nanochat.run.registry import JOB_FILE, Process, announce, forget
from nanochat.signals import StopSignals

if TYPE_CHECKING:
    from nanochat.run.listener import Listener

# The system ignores it unless it is asked for, so that one that comes too early does no harm.
NUDGE = signal.SIGURG
# of a landing: a year
MOST_MINUTES = 366 * 24 * 60
# verbs that the loop carries out
ORDERS = ("save", "land", "set", "pause", "continue")
# of them, those that make sense only while there is a loop
NEED_THE_LOOP = ("save", "land")
ENDED = "the run is ending"


@dataclass
class Order:
    """What was asked for. request: as it was sent. finished(): what became of it, None until that
    is known; there is no such function until the order is carried out."""

    request: dict[str, Any]
    finished: Callable[[], dict[str, Any] | None] | None = None

    @property
    def verb(self) -> str:
        """What is to be done."""
        return self.request["verb"]

    def done(self, text: str, step: int) -> None:
        """It is done, after so many steps."""
        self.finished = functools.partial(dict, done=text, step=step)

    def refuse(self, text: str) -> None:
        """It cannot be done."""
        self.finished = functools.partial(dict, error=text)

    def outcome(self) -> dict[str, Any] | None:
        """What became of it, None until that is known."""
        return None if self.finished is None else self.finished()


class Control:
    """The orders to a run. Every rank has one; rank 0's listens, the others' are nudged when orders
    wait there."""

    def __init__(self, path: Path, rank: int, stop: StopSignals, report: Report) -> None:
        """path: of the run folder. stop: of this process. report(text): takes a line."""
        self.path = path
        self.rank = rank
        self.stop = stop
        self.report = report
        # what is being done while there is no loop
        self.doing = "starting"
        self.describe: Callable[[], dict[str, Any]] | None = None
        self.ended = False
        self.paused = False
        # a deque: one thread appends, another takes
        self.waiting: collections.deque[Order] = collections.deque()
        self.taken: list[Order] = []
        self.nudged = False
        self.looks_again = False
        self.listener: Listener | None = None
        self.others: tuple[Process, ...] = ()
        self.handler_before = signal.signal(NUDGE, self._nudge)

    def _nudge(self, number: int, frame: FrameType | None) -> None:
        self.nudged = True

    # ----- the loop's side

    @property
    def pending(self) -> bool:
        """Whether orders wait for the loop."""
        return bool(self.waiting) or self.nudged or self.looks_again

    def take(self) -> list[Order]:
        """The orders that wait, which are then the caller's; on rank 0, and [] elsewhere."""
        # twice for a nudge: rank 0 may have taken its orders before this one came
        self.looks_again = self.nudged
        self.nudged = False
        # no more than there are now: whoever sends orders all the time is not waited for
        self.taken = [self.waiting.popleft() for _ in range(len(self.waiting))]
        return self.taken

    def listen(self, processes: Sequence[Process]) -> None:
        """Announce the run, and take orders from now on; on rank 0. processes: of all ranks.

        Where that is impossible one line says so, and training continues."""
        # here: `nanochat jobs`, which needs no listener, would wait for the import of asyncio
        from nanochat.run.listener import Listener

        self.others = tuple(p for p in processes if p.rank != self.rank and p.is_here)
        try:
            self.listener = Listener(self, processes)
        except (OSError, UsageError) as error:
            self.report(f"nanochat jobs cannot reach this run ({in_a_line(error)})")

    def announce_in_folder(self) -> None:
        """Write job.json, once the run folder is this run's."""
        if self.listener is None:
            return
        try:
            announce(self.listener.job, self.path / JOB_FILE)
        except OSError as error:
            self.report(f"{JOB_FILE} cannot be written ({error.strerror})")

    def begin(self, describe: Callable[[], dict[str, Any]]) -> None:
        """The loop begins. describe(): facts about the run, asked from another thread."""
        self.describe = describe

    def end(self) -> None:
        """The loop has ended: whatever still waits is refused. A save that is being written is
        not."""
        self.ended = True
        for order in (*self.taken, *self.take()):
            if order.finished is None:
                order.refuse(ENDED)

    def close(self) -> None:
        """Listen no longer."""
        self.end()
        signal.signal(NUDGE, self.handler_before)
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    # ----- the thread's side

    def status(self) -> dict[str, Any]:
        """What is known of the run now."""
        facts = {"doing": "ending" if self.ended else self.doing}
        if self.describe is not None and not self.ended:
            facts = self.describe()
        status = "paused" if self.paused else "running"
        return {"run": str(self.path), "status": status, "pid": os.getpid(), **facts}

    def begin_order(self, request: dict[str, Any]) -> Order:
        """Let the loop know what is asked for."""
        order = Order(request)
        if problem := _problem(request):
            order.refuse(problem)
        elif self.ended:
            order.refuse(ENDED)
        elif self.describe is None and order.verb in NEED_THE_LOOP:
            order.refuse(f"training has not begun ({self.doing}): nothing has been learned yet")
        else:
            self.waiting.append(order)
            self._signal_others(NUDGE)
        return order

    def stop_run(self) -> None:
        """As a signal does: the step is finished and saved."""
        self.stop.reason = "asked to stop by nanochat jobs"
        self._signal_others(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    def abort_run(self) -> None:
        """End all processes of this machine now. Those of others are ended by their launcher when
        this one is gone."""
        note_abort(self.path)
        self._signal_others(signal.SIGKILL)
        for worker in multiprocessing.active_children():
            worker.kill()
        if self.listener is not None:
            forget(self.listener.job)
        os._exit(EXIT_STOPPED)

    def _signal_others(self, number: int) -> None:
        for process in self.others:
            # one that has ended meanwhile, whose number may be another process's by now
            with contextlib.suppress(ProcessLookupError):
                if process.exists():
                    os.kill(process.pid, number)


def note_abort(path: Path) -> None:
    """Let the summary of a run that is, or has been, ended in the middle say why."""
    # nothing to say it in, or a file that somebody else wrote
    with contextlib.suppress(OSError, UsageError, RecursionError, AttributeError, TypeError):
        summary = read_json(path / "summary.json", "run folder")
        if summary.get("status") == "running":
            reason = "aborted by nanochat jobs, without saving"
            write_summary(path, **{**summary, "status": "stopped", "reason": reason})


def _problem(request: dict[str, Any]) -> str:
    """Why a request with a known verb cannot be an order, or ""."""
    if request["verb"] == "set":
        values = request.get("values")
        if not isinstance(values, dict) or not values:
            return "set: values must be an object of flags and numbers"
        return "; ".join(live_problems(values))
    minutes = request.get("minutes")
    if request["verb"] == "land" and minutes is not None:
        is_number = isinstance(minutes, (int, float)) and not isinstance(minutes, bool)
        if not is_number or not 0 < minutes <= MOST_MINUTES:
            return f"--minutes {minutes}: must be a number above 0, at most {MOST_MINUTES:,}"
    return ""
