"""Timing of repeated calls, for `nanochat bench` and `nanochat doctor --gpu`. Imports torch only
when something is timed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Entry:
    """One timed thing: seconds of every repetition, and what each of them processed.

    tokens, flops: of one repetition, None where the thing has none. memory_bytes: the peak above
    what was allocated before, None where it is not measured. predicted_seconds, predicted_bytes:
    what a plan says, None where there is none."""

    name: str
    seconds: list[float] = field(repr=False)
    tokens: int | None = None
    flops: float | None = None
    memory_bytes: int | None = None
    note: str = ""
    predicted_seconds: float | None = None
    predicted_bytes: int | None = None

    @property
    def median(self) -> float:
        """The median of the seconds."""
        # Not the mean: one interruption by another program would move it.
        return statistics.median(self.seconds)


def timed(
    function: Callable[[], object],
    device: "torch.device",
    repeats: int,
    before: Callable[[], object] | None = None,
) -> list[float]:
    """Seconds of each of `repeats` calls of function(), after one that warms up.

    before(), if given, runs ahead of every call and is not timed."""
    from nanochat import hardware

    seconds = []
    # The first call compiles, fills caches and allocates memory that later ones reuse.
    for _ in range(repeats + 1):
        if before is not None:
            before()
        # Work is queued on a GPU: without waiting on both sides the clock would read the queueing.
        hardware.synchronize(device.type)
        started = time.perf_counter()
        function()
        hardware.synchronize(device.type)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def measured(
    name: str,
    function: Callable[[], object],
    device: "torch.device",
    repeats: int,
    before: Callable[[], object] | None = None,
    *,
    tokens: int | None = None,
    flops: float | None = None,
    note: str = "",
) -> Entry:
    """The Entry of function(): timed(), then one more call for its peak memory."""
    from nanochat import hardware

    seconds = timed(function, device, repeats, before)
    # A call of its own, because on a CPU the profiler counts the memory and slows everything down.
    if before is not None:
        before()
    memory_bytes = hardware.allocated_peak(function, device)
    return Entry(name, seconds, tokens, flops, memory_bytes, note)


def short_time(seconds: float) -> str:
    """0.0123 -> '12.3 ms'; 4.2 -> '4.2 s'."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
