"""What saving a checkpoint costs training, for `nanochat bench --only=saving`."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanochat import hardware
from nanochat.common import human_bytes
from nanochat.run.checkpoint import tensors_of
from nanochat.run.metrics import Record
from nanochat.run.saver import Saver
from nanochat.run.timing import Entry
from nanochat.run.workload import TrainingStep

# Steps that are not counted: caches and clock rates settle.
WARM_UP_STEPS = 20


@dataclass
class Times:
    """Seconds of everything that is timed, in the order of the steps."""

    stalls: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    steps_alone: list[float] = field(default_factory=list)
    steps_during_save: list[float] = field(default_factory=list)
    state_bytes: int = 0


def time_saving(training: TrainingStep, n_steps: int, save_every: int) -> Iterator[Entry]:
    """How long a save holds the loop, against a plain copy of the same memory; and how much longer
    steps take while the checkpoint is being written.

    An entry that nothing was measured for is left out: a fast disk may write a checkpoint between
    two steps."""
    times = measure_saving(training, n_steps, save_every)
    state = f"{human_bytes(times.state_bytes)} of state"
    # The first save allocates the memory that later ones reuse, which happens once in a run.
    first = times.stalls[:1]
    later = times.stalls[1:]
    if first:
        yield Entry("save, first stall", first, note=f"{state}; also allocates the copy's memory")
    if later:
        ratio = statistics.median(later) / statistics.median(times.copies)
        note = f"{state}; {ratio:.2f} times a plain copy"
        yield Entry("save, stall", later, note=note)
        yield Entry("save, plain copy", times.copies, note="of the same memory")
    if times.steps_alone:
        yield Entry("step, no save running", times.steps_alone, training.setup.tokens)
    if times.steps_during_save and times.steps_alone:
        note = f"saving every {save_every} steps costs {cost_of(times, n_steps):.2%} of the time"
        yield Entry("step, save running", times.steps_during_save, training.setup.tokens, note=note)


def cost_of(times: Times, n_steps: int) -> float:
    """The share of training time that saving costs: stalls but the first, and what steps beside a
    save take longer than the median of the others."""
    usual = statistics.median(times.steps_alone)
    extra = sum(times.steps_during_save) - len(times.steps_during_save) * usual
    return (extra + sum(times.stalls[1:])) / (usual * n_steps)


def measure_saving(training: TrainingStep, n_steps: int, save_every: int) -> Times:
    """Train for n_steps, with a checkpoint written to a temporary folder every save_every."""
    times = Times()
    device_type = training.device.type
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as folder:
        records = [Record(Path(folder) / f"{name}.jsonl") for name in ("metrics", "samples")]
        saver = Saver(folder, 1, print, records)
        for step in range(n_steps):
            if step and step % save_every == 0:
                state = training.optimizer.state()
                tensors = [
                    tensor
                    for part in tensors_of(training.model, state).values()
                    for tensor in part.values()
                ]
                times.state_bytes = sum(tensor.nbytes for tensor in tensors)
                # Right before the save, so that both find the machine in the same state.
                times.copies.append(seconds_of_copy(tensors))
                started = time.perf_counter()
                saver.save(step, "permanent", training.model, state, {"tokenizer": "none"})
                times.stalls.append(time.perf_counter() - started)
            # Asked before the step: a save that ends during it has slowed it all the same.
            busy = saver.busy()
            started = time.perf_counter()
            training.step()
            hardware.synchronize(device_type)
            seconds = time.perf_counter() - started
            if step > WARM_UP_STEPS:
                (times.steps_during_save if busy else times.steps_alone).append(seconds)
        # The folder is deleted next; no thread may still write to it.
        saver.wait()
        saver.close()
    return times


def seconds_of_copy(tensors: list[torch.Tensor]) -> float:
    """Seconds of a plain copy of tensors to memory of their device that is already mapped."""
    targets = [torch.empty_like(tensor) for tensor in tensors]
    device_type = tensors[0].device.type
    seconds = 0.0
    # The first round also has the system find the pages, so the second one counts.
    for _ in range(2):
        hardware.synchronize(device_type)
        started = time.perf_counter()
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)
        hardware.synchronize(device_type)
        seconds = time.perf_counter() - started
    return seconds
