"""Predicted against measured: the time and memory of a step on 1, 2 and 4 ranks of this machine,
for `nanochat bench --only=plan`.

The model is that of plans (nanochat/run/scaling.py); its speeds come from this machine. On one rank
the passes and the updates of three other depths are timed, which gives the share of the peak that
products reach and the speed of memory. The peak of products and the speed of gloo over loopback are
measured on each number of ranks. Each rank has one thread, as under torchrun. Where ranks share
cores, the peak is that of as many ranks as cores, divided by the ranks of each core."""

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from nanochat import hardware, ranks
from nanochat.common import UsageError, human_bytes
from nanochat.limits import available_cpus
from nanochat.model.build import meta_model
from nanochat.run.memory import StepMemory
from nanochat.run.scaling import (
    WEIGHT_TRAFFIC,
    Speeds,
    Work,
    pieces_of,
    stacked_elements,
    step_time,
)
from nanochat.run.timing import Entry, short_time, timed
from nanochat.run.workload import ADAMW, MATRICES, Setup, Shape, TrainingStep, open_setup

RANKS = (1, 2, 4)
# Depths that give the speeds, on one rank, before the step that is predicted.
KNOWN_DEPTHS = (1, 3, 5)
# Elements of the exchanges that are timed, of each rank: next to nothing, and 1 MiB. As in a step,
# several are begun before the first is waited for.
FEW, MANY = 16, 2**18
IN_FLIGHT = 8
# Steps may be few, but exchanges are short, and one may take much longer than the next.
EXCHANGES = 31
# Large enough for the peak of a core, and small enough to be timed often.
PRODUCT_ROWS = 1024
# Beyond this, a rank hangs.
SECONDS = 900


@dataclass(frozen=True)
class Job:
    """What each of `world_size` ranks measures: steps of a shape, and on one rank the passes and
    updates of the same shape at KNOWN_DEPTHS."""

    shape: Shape
    dtype: str
    attention: str
    compile: bool
    repeats: int
    world_size: int
    port: int


@dataclass(frozen=True)
class Found:
    """What ranks measured. steps: seconds of each, of the slowest rank. step_bytes: peak of
    tensors. peak: FLOP/s of products on each rank while all multiply. delay: seconds of an exchange
    of next to nothing. reduce, gather: bytes per second that a rank sends. known: (Work, seconds of
    the passes, seconds of the update) of KNOWN_DEPTHS, on one rank."""

    steps: list[float]
    step_bytes: int
    peak: float
    delay: float = 0.0
    reduce: float = math.inf
    gather: float = math.inf
    known: tuple[tuple[Work, float, float], ...] = ()


def time_plan(setup: Setup, repeats: int) -> Iterator[Entry]:
    """Steps on 1, 2 and 4 ranks, each with its prediction. UsageError where ranks fail, and for
    other devices than a CPU."""
    if setup.device.type != "cpu":
        raise UsageError(
            f"--only=plan: measures ranks that share a CPU, and this is {setup.device.type}; add "
            f"--device-type=cpu"
        )
    rows = setup.shape.device_batch_size
    work = work_of(setup)
    alone: Found | None = None
    peaks: dict[int, float] = {}
    for n in RANKS:
        found = measured_on(n, setup, repeats)
        alone = alone or found
        peaks[n] = found.peak
        speeds = speeds_of(n, alone, found, peaks, available_cpus())
        memory = memory_of(setup, work, n).tensor_bytes(rows)
        yield entry_of(n, setup, found, step_time(work, speeds).seconds, memory)


def entry_of(n: int, setup: Setup, found: Found, seconds: float, n_bytes: int) -> Entry:
    """The Entry of a step on n ranks. seconds, n_bytes: as predicted."""
    off = seconds / statistics.median(found.steps) - 1
    memory_off = n_bytes / found.step_bytes - 1
    return Entry(
        f"plan, {n} rank" + "s" * (n > 1),
        found.steps,
        setup.tokens * n,
        memory_bytes=found.step_bytes,
        note=f"predicted {short_time(seconds)} ({off:+.0%}), {human_bytes(n_bytes)} "
        f"({memory_off:+.0%})",
        predicted_seconds=seconds,
        predicted_bytes=n_bytes,
    )


# ---- the prediction ----


def work_of(setup: Setup) -> Work:
    """What a rank does in a step of one pass."""
    model = meta_model(setup.config)
    groups = dict.fromkeys(model.parameter_groups(), ADAMW) | {"matrices": MATRICES}
    return Work(
        config=setup.config,
        flops_per_token=setup.flops_per_token,
        parameters=model.count_parameters()["total"],
        pieces=pieces_of(setup.config, groups),
        tokens=setup.tokens,
        passes=1,
    )


def memory_of(setup: Setup, work: Work, n: int) -> StepMemory:
    """The estimated memory of a rank's tensors."""
    return StepMemory(
        config=setup.config,
        parameters=meta_model(setup.config).count_parameters(),
        compute_dtype=setup.dtype,
        backend=setup.attention,
        compiled=setup.compiled,
        activation_checkpointing=setup.shape.activation_checkpointing,
        saves=False,
        world_size=n,
        stacked=stacked_elements(work.pieces, n),
    )


def speeds_of(n: int, alone: Found, found: Found, peaks: dict[int, float], cores: int) -> Speeds:
    """The Speeds of n ranks. alone: what one rank found. peaks: by number of ranks, up to n."""
    # The share of one rank's peak that is left to each of n.
    base = max(ranks for ranks in peaks if ranks <= cores)
    share = peaks[base] / peaks[1] * min(1.0, cores / n) if n > base else peaks[n] / peaks[1]
    update_flops, memory = fitted(
        [
            (
                sum(piece.update_flops(1) for piece in work.pieces),
                sum(piece.update_bytes(1) for piece in work.pieces),
                seconds,
            )
            for work, _, seconds in alone.known
        ]
    )
    pass_flops, activations = fitted(
        [
            (
                work.flops,
                work.activation_bytes,
                seconds - WEIGHT_TRAFFIC * work.parameters / memory,
            )
            for work, seconds, _ in alone.known
        ]
    )
    return Speeds(
        ranks=n,
        pass_flops=share * pass_flops,
        update_flops=share * update_flops,
        memory=share * memory,
        activations=share * activations,
        reduce=found.reduce,
        gather=found.gather,
        delay=found.delay,
        # gloo's threads need cores of their own to work beside the passes
        overlaps=cores > n,
    )


def fitted(known: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(a, b) with seconds = x / a + y / b, by least squares of relative errors over several (x, y,
    seconds); infinite where a term would be negative."""
    x_x = sum((x / t) ** 2 for x, _, t in known)
    y_y = sum((y / t) ** 2 for _, y, t in known)
    x_y = sum(x * y / t**2 for x, y, t in known)
    x_1 = sum(x / t for x, _, t in known)
    y_1 = sum(y / t for _, y, t in known)
    determinant = x_x * y_y - x_y**2
    per_x = (x_1 * y_y - y_1 * x_y) / determinant
    per_y = (y_1 * x_x - x_1 * x_y) / determinant
    # Noise may say that one of the two costs less than nothing: then the other explains it all.
    if per_y <= 0:
        return x_x / x_1, math.inf
    if per_x <= 0:
        return math.inf, y_y / y_1
    return 1 / per_x, 1 / per_y


# ---- the measurement ----


def measured_on(n: int, setup: Setup, repeats: int) -> Found:
    """What n ranks measure, each in a process of its own. UsageError if one fails."""
    # Held here, as by torchrun: no port can be lost between choosing and using it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = Job(
        shape=setup.shape,
        dtype=setup.dtype_name,
        attention=setup.attention,
        compile=setup.compiled,
        repeats=repeats,
        world_size=n,
        port=store.port,
    )
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    processes = [context.Process(target=_rank, args=(job, rank, theirs)) for rank in range(n)]
    try:
        for process in processes:
            process.start()
        # only the ranks hold it open, so that their end is heard
        theirs.close()
        return ours.recv() if ours.poll(SECONDS) else _failed(n)
    except EOFError:
        return _failed(n)
    finally:
        for process in processes:
            # Those that have measured are about to end
            process.join(timeout=10)
            process.kill()
            process.join()


def _failed(n: int) -> Found:
    raise UsageError(
        f"--only=plan: {n} ranks gave no result; read their messages above, or leave plan out with "
        f"--only"
    )


def _rank(job: Job, rank: int, results: Any) -> None:
    """The process of a rank. results: the end of a pipe, to which rank 0 sends what is found."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    ranks.setup("cpu")
    found = _measure(job)
    if rank == 0:
        results.send(found)
    ranks.close()
    # An ordinary exit destroys C++ objects while threads of torch still run, and may abort.
    os._exit(0)


def _measure(job: Job) -> Found:
    setup = _setup(job, job.shape.depth)
    rates: dict[str, float] = {}
    if job.world_size > 1:
        rates = _exchange_rates(job)
    square = torch.randn(PRODUCT_ROWS, PRODUCT_ROWS).to(setup.dtype)
    product_seconds = statistics.median(_timed_together(lambda: square @ square, job.repeats))
    peak = 2 * PRODUCT_ROWS**3 / product_seconds
    known = []
    if job.world_size == 1:
        known = [_passes_and_update(_setup(job, depth), job.repeats) for depth in KNOWN_DEPTHS]
    training = TrainingStep(setup)
    # Gradients are part of the peak of a step, so none may be left from the warm-up.
    training.optimizer.zero_grad()
    kept = [*training.optimizer.own_tensors(), *training.model.parameters()]
    kept_bytes = sum(tensor.nbytes for tensor in kept)
    step_bytes = kept_bytes + hardware.allocated_peak(training.step, setup.device)
    steps = _timed_together(training.step, job.repeats)
    return Found(steps, step_bytes, peak, known=tuple(known), **rates)


def _setup(job: Job, depth: int) -> Setup:
    return open_setup(
        replace(job.shape, depth=depth),
        device_type="cpu",
        dtype=job.dtype,
        compile=job.compile,
        attention=job.attention,
    )


def _timed_together(action: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, of the slowest rank, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        ranks.sum_over_ranks(torch.zeros(1))
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    # A step is over when the slowest rank has ended it.
    return [max(each) for each in zip(*ranks.from_all(seconds[1:]), strict=True)]


def _exchange_rates(job: Job) -> dict[str, float]:
    """The fields of Found on exchanges, on several ranks."""
    n = job.world_size

    def seconds(exchange: Callable[[torch.Tensor, torch.Tensor], Any], elements: int) -> float:
        pairs = [(torch.zeros(elements), torch.zeros(n * elements)) for _ in range(IN_FLIGHT)]
        if exchange is ranks.all_gather:
            pairs = [(whole, share) for share, whole in pairs]

        def several() -> None:
            for work in [exchange(*pair) for pair in pairs]:
                work.wait()

        return statistics.median(_timed_together(several, EXCHANGES)) / IN_FLIGHT

    delays = [seconds(each, FEW) for each in (ranks.reduce_scatter, ranks.all_gather)]
    sent = 4 * MANY * (n - 1)
    return {
        "delay": statistics.mean(delays),
        "reduce": sent / (seconds(ranks.reduce_scatter, MANY) - delays[0]),
        "gather": sent / (seconds(ranks.all_gather, MANY) - delays[1]),
    }


def _passes_and_update(setup: Setup, repeats: int) -> tuple[Work, float, float]:
    """A model's Work, and the median seconds of its passes and of its update."""
    training = TrainingStep(setup)
    zero_grad = training.optimizer.zero_grad
    passes = timed(training.forward_backward, setup.device, repeats, zero_grad)
    update = training.time_update(repeats)
    return work_of(setup), statistics.median(passes), update.median
