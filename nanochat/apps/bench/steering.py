"""What being reachable for `nanochat jobs` costs training, for `nanochat bench --only=steering`."""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from nanochat import hardware
from nanochat.apps.bench.text import temporary_base_dir
from nanochat.common import Report
from nanochat.run.control import Control
from nanochat.run.registry import Process
from nanochat.run.statistics import CONFIDENCE, spread, two_sided_quantile
from nanochat.run.timing import Entry
from nanochat.run.workload import TrainingStep
from nanochat.signals import StopSignals

# of a timing, after one that is not counted
BLOCK_STEPS = 20
# looks for orders in one timing: a single one is shorter than the clock can tell
LOOKS = 10_000


def time_steering(training: TrainingStep, repeats: int, report: Report) -> Iterator[Entry]:
    """Steps of a process that nobody can reach, and of one that listens on a socket and looks for
    orders before each step, in turns; and a look alone. report(text): takes a line where there can
    be no socket."""
    alone: list[float] = []
    listening: list[float] = []
    for number in range(repeats):
        # each comes first as often, so that a machine that slows down favours neither
        for listens in (False, True) if number % 2 else (True, False):
            if listens:
                with reachable(report) as control:
                    listening.append(_step_seconds(training, control))
            else:
                alone.append(_step_seconds(training, None))
    yield Entry("step, not reachable", alone, training.setup.tokens)
    note = cost_in_words(alone, listening)
    yield Entry("step, listening", listening, training.setup.tokens, note=note)
    with reachable(report) as control:
        looks = [_look_seconds(control) for _ in range(repeats)]
    yield Entry("look for orders", looks, note="once before each step")


@contextlib.contextmanager
def reachable(report: Report) -> Iterator[Control]:
    """What train.py has of a run that `nanochat jobs` can reach. No list of runs will show it."""
    with temporary_base_dir() as folder:
        stop = StopSignals(speaks=False)
        control = Control(Path(folder), 0, stop, report)
        try:
            control.listen([Process.own(0)])
            control.begin(dict)
            yield control
        finally:
            control.close()
            stop.restore()


def _step_seconds(training: TrainingStep, control: Control | None) -> float:
    """Mean seconds of a step. control: looked at before each, None for nobody."""
    started = 0.0
    for number in range(BLOCK_STEPS + 1):
        # the first finds caches that something else has filled
        if number == 1:
            hardware.synchronize(training.device.type)
            started = time.perf_counter()
        if control is not None:
            control.take()
        training.step()
    hardware.synchronize(training.device.type)
    return (time.perf_counter() - started) / BLOCK_STEPS


def _look_seconds(control: Control) -> float:
    started = time.perf_counter()
    for _ in range(LOOKS):
        control.take()
    return (time.perf_counter() - started) / LOOKS


def cost_in_words(alone: list[float], listening: list[float]) -> str:
    """By how much steps are longer while the process listens, with the interval of the pairs; ""
    for fewer than two of them."""
    costs = [after / before - 1 for before, after in zip(alone, listening, strict=True)]
    found = spread(costs)
    if found.sd is None:
        return ""
    reach = two_sided_quantile(found.n - 1) * found.sd / math.sqrt(found.n)
    # of a machine that other programs use too, the median says more than the mean
    return (
        f"costs {found.mean:+.2%} ± {reach:.2%} of a step ({CONFIDENCE:.0%} interval of {found.n} "
        f"pairs), by the median {statistics.median(costs):+.2%}"
    )
