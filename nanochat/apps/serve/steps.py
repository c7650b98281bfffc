"""Earlier checkpoints of the runs that are served. A request names one as d4@500; it is then loaded
and kept, a few at a time: the one that was not asked for the longest gives way to a new one."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from nanochat.apps.serve.errors import UNAVAILABLE, Refused
from nanochat.apps.serve.runs import ServedRun, stamp_of_step
from nanochat.common import Report, UsageError, in_a_line
from nanochat.run import checkpoint

# requests that may wait for a checkpoint to be loaded
MOST_WAITING = 16
# steps that a refusal lists
MOST_LISTED = 12


@dataclass
class _Kept:
    """A checkpoint in memory. stamp: tells it from a later one of the same step. pins: requests
    that are about to use it; those that run are in run.works."""

    run: ServedRun
    stamp: int
    pins: int = 0

    @property
    def is_idle(self) -> bool:
        return not self.pins and not self.run.works


class Steps:
    """The earlier checkpoints in memory, `most` of them. For the event loop only: nothing can be
    evicted between two of its awaits."""

    def __init__(self, most: int, load: Callable[..., tuple], report: Report) -> None:
        """load: as loading.load_run()."""
        self.most = most
        self._load = load
        self._report = report
        # by name, the one that was asked for last at the end
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        # one at a time: memory for a single further model is needed
        self._turn = asyncio.Lock()
        self._n_waiting = 0

    @contextlib.asynccontextmanager
    async def held(self, run: ServedRun, step: int) -> AsyncIterator[ServedRun]:
        """A checkpoint of a run, which stays in memory until the `async with` ends and what was
        submitted to its engine has ended.

        Raises Refused if there is no such checkpoint, or no room for it now."""
        if self._n_waiting >= MOST_WAITING:
            raise busy("too many requests wait for checkpoints to be loaded")
        self._n_waiting += 1
        try:
            async with self._turn:
                kept = await self._find(run, step)
                kept.pins += 1
        finally:
            self._n_waiting -= 1
        try:
            yield kept.run
        finally:
            kept.pins -= 1

    async def close(self) -> None:
        """End all engines."""
        while self._kept:
            await self._drop(next(iter(self._kept)))

    async def _find(self, run: ServedRun, step: int) -> _Kept:
        """A checkpoint, loaded if it is not in memory."""
        name = run.name_of(step)
        stamp = await asyncio.to_thread(stamp_of_step, run.folder, step)
        kept = self._kept.get(name)
        if kept and kept.stamp == stamp and not kept.run.problem:
            self._kept.move_to_end(name)
            return kept
        if stamp is None or not self.most:
            raise await asyncio.to_thread(self._missing, run, step)
        if kept:
            # of a run that was started anew, or an engine that failed
            await self._drop(name)
        await self._make_room()
        older = await asyncio.to_thread(self._open, run, step)
        older.start()
        self._kept[name] = _Kept(older, stamp)
        return self._kept[name]

    def _missing(self, run: ServedRun, step: int) -> Refused:
        steps = [str(each) for each in checkpoint.steps_of(run.folder)]
        if not self.most:
            why = f"this server serves step {run.step} of {run.name} only (--steps-in-memory 0)"
        elif len(steps) > MOST_LISTED:
            why = f"{run.name} has no checkpoint of that step; /v1/models lists its {len(steps)}"
        else:
            why = f"{run.name} has no checkpoint of that step; it has {', '.join(steps) or 'none'}"
        return Refused(f"model: {run.name_of(step)}: {why}", "model", "model_not_found", 404)

    async def _make_room(self) -> None:
        while len(self._kept) >= self.most:
            idle = next((name for name, kept in self._kept.items() if kept.is_idle), None)
            if idle is None:
                raise busy(
                    f"the {self.most} earlier checkpoints that this server keeps in memory "
                    f"(--steps-in-memory) are all in use"
                )
            await self._drop(idle)

    async def _drop(self, name: str) -> None:
        run = self._kept.pop(name).run
        await asyncio.to_thread(run.close)

    def _open(self, run: ServedRun, step: int) -> ServedRun:
        """A checkpoint from the disk."""
        try:
            return run.older(step, *self._load(run.folder, step))
        # of any kind, memory included. What it says names folders, which are nobody's business.
        except Exception as error:
            self._report(f"{run.name_of(step)} cannot be loaded: {in_a_line(error)}")
            gone = isinstance(error, UsageError)
            why = "it is damaged or was removed" if gone else "the server's console says why"
            raise Refused(
                f"model: {run.name_of(step)} cannot be loaded: {why}",
                "model",
                "model_not_found" if gone else "model_failed",
                404 if gone else UNAVAILABLE,
            ) from None


def busy(problem: str) -> Refused:
    """The refusal of what may be possible soon."""
    return Refused(
        f"{problem}; try again soon",
        code="queue_full",
        status=429,
        headers=(("Retry-After", "1"),),
    )
