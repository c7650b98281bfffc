"""What went wrong: the module that made the first bad number, the batch it came from, a loss that
jumps, a loop that stalls."""

import math
import statistics
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nanochat import limits, ranks
from nanochat.common import TrainingFailed, Unavailable, human_time, in_a_line, write_json
from nanochat.data.rows import Rows
from nanochat.optim.sharding import PassFailed, is_split, own_part, own_rows
from nanochat.run import checkpoint, compiler
from nanochat.run.clock import Clock
from nanochat.run.state import TrainState
from nanochat.signals import Stopped, StopSignals

EXPLODING = 1e4  # activations and gradients of a healthy model stay far below
# A loss is compared with the last SPIKE_WINDOW ones, once there are SPIKE_LEAST; it is remarkable
# SPIKE_Z standard deviations above them.
SPIKE_WINDOW = 64
SPIKE_LEAST = 32
SPIKE_Z = 6.0
FIRST_LOSS_TOLERANCE = 0.5  # nats from ln(vocabulary) at step 0


class _Trace:
    """Hooks on every module and parameter that note the first non-finite and the first exploding
    value.

    What a module receives and what it returns are looked at, in both passes. Hooks of inner modules
    run first, so the first module that returns a bad value caused it; a bad value that a module
    receives before any module returned one comes from the code around that module."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.first: dict[str, str] = {}  # "non-finite" or "exploding" -> where it was seen first
        self.handles = []
        for name, module in model.named_modules():
            # the model itself, whose name is empty, is what calls all others
            if name:
                self._watch(name, module)
        for name, parameter in model.named_parameters():
            self._watch_gradient(name, parameter)

    def _watch(self, name: str, module: torch.nn.Module) -> None:
        """Look at what a module receives and returns, in both passes."""
        caller = _caller_of(name)
        itself = f"{name} ({type(module).__name__})"

        def entered(module: torch.nn.Module, inputs: Any) -> None:
            self.look(inputs, f"{caller}, before {name}, in the forward pass")

        def left(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
            self.look(outputs, f"{itself}, in the forward pass")

        def came_back(module: torch.nn.Module, of_outputs: Any) -> None:
            self.look(of_outputs, f"{caller}, after {name}, in the backward pass")

        def passed_back(module: torch.nn.Module, to_inputs: Any, of_outputs: Any) -> None:
            self.look(to_inputs, f"{itself}, in the backward pass")

        self.handles += [
            module.register_forward_pre_hook(entered),
            module.register_forward_hook(left),
            module.register_full_backward_pre_hook(came_back),
            module.register_full_backward_hook(passed_back),
        ]

    def _watch_gradient(self, name: str, parameter: torch.nn.Parameter) -> None:
        def made(parameter: torch.nn.Parameter) -> None:
            self.look(parameter.grad, f"the gradient of {name}, in the backward pass")

        self.handles.append(parameter.register_post_accumulate_grad_hook(made))

    def look(self, values: Any, where: str) -> None:
        """Note `where` for each kind of bad value that no earlier tensor had."""
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if isinstance(value, (tuple, list)):
                self.look(value, where)
            elif isinstance(value, torch.Tensor):
                self._look_at(value, where)

    def _look_at(self, tensor: torch.Tensor, where: str) -> None:
        tensor = own_part(tensor.detach())
        if not tensor.is_floating_point() or not tensor.numel():
            return
        # One number for both questions, and one wait for the device.
        largest = tensor.detach().abs().max().item()  # NaN if there is one
        if not math.isfinite(largest):
            kind = "NaN" if math.isnan(largest) else "inf"
            self.first.setdefault("non-finite", f"{where} ({kind})")
        elif largest > EXPLODING:
            self.first.setdefault("exploding", f"{where} ({largest:.3g})")

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def _caller_of(name: str) -> str:
    """The module whose code calls the module of that name."""
    parent = name.rpartition(".")[0]
    # lists of blocks have no code of their own
    return parent if "." in parent else "the model's own code"


def locate(model: torch.nn.Module, rerun: Callable[[], Any]) -> str:
    """A sentence on where the first non-finite value comes from, and the first exploding one; "" if
    there is none. Every rank calls it.

    rerun(): the forward and backward pass of the step, which is repeated with hooks on all modules,
    uncompiled."""
    # The ranks of a sharded model have other rows each, and the pass below is of all of them.
    in_weights = ranks.from_all(_bad_weights(model))
    if any(in_weights):
        return next(filter(None, in_weights))
    # Compiled code would run past the hooks.
    trace = _Trace(model)
    try:
        with torch.compiler.set_stance("force_eager"):
            trace.look(rerun(), "the loss itself")
    # out of memory without the compiler's fusions
    except RuntimeError as error:
        return f"the step could not be repeated to locate the fault ({error})"
    finally:
        trace.close()
    # Non-finite before exploding: the first is the fault, the second may be how it came about.
    kinds = sorted(trace.first.items(), reverse=True)
    return "; ".join(f"the first {kind} value: {where}" for kind, where in kinds)


def _bad_weights(model: torch.nn.Module) -> str:
    """A sentence on the first weights that hold a non-finite number; "" if none do."""
    for name, parameter in model.named_parameters():
        bad = (~own_part(parameter.detach()).isfinite()).nonzero()
        if len(bad):
            first = bad[0].tolist()
            if is_split(parameter):
                first[0] += own_rows(len(parameter)).start
            where = ", ".join(map(str, first))
            numbers = "number" if len(bad) == 1 else "numbers"
            return (
                f"the weights {name} hold {len(bad)} non-finite {numbers}, the first at [{where}]"
            )
    return ""


def cause(
    error: BaseException, device_batch: int, stop: StopSignals, step_seconds: float
) -> BaseException:
    """The exception to end a run with, given the one that was raised: lack of memory, a rank that
    is gone, a compiler that fails, or a signal that also ended what this rank waited for.

    Notifies the other ranks: they do not hear of a rank that dies before training begins or after
    it has ended, and torchrun alone names it. stop: this process's. step_seconds: what a step
    usually takes, 0 if that is not known."""
    if isinstance(error, PassFailed):
        error = error.cause
    lost = ranks.is_lost_exchange(error)
    error = _cause(error, lost, device_batch, stop, step_seconds)
    # what this rank learned about another it does not pass on as its own
    is_own = isinstance(error, Exception) and not lost
    ranks.last_word(f"{type(error).__name__}: {error}" if is_own else ranks.LOST)
    return error


def _cause(
    error: BaseException, lost: bool, device_batch: int, stop: StopSignals, step_seconds: float
) -> BaseException:
    if limits.is_out_of_memory(error):
        divisors = [n for n in range(1, device_batch) if device_batch % n == 0]
        remedy = "lower --max-seq-len or --depth"
        if divisors:
            remedy = f"--device-batch-size={divisors[-1]} would likely fit"
        return TrainingFailed(
            f"out of memory with --device-batch-size={device_batch}; {remedy} ({in_a_line(error)})"
        )
    if lost and (gone := ranks.who_is_gone(step_seconds)):
        return TrainingFailed(
            f"{gone}; the other ranks end too. --resume continues from the newest checkpoint"
        )
    # Ctrl-C ends the compiler's processes too
    if stop.requested and isinstance(error, Exception) and (lost or stop.at_once):
        return Stopped()
    # with the store of torchrun gone as well, or all others waiting for each other
    if lost:
        return TrainingFailed(
            f"the connection to other ranks is lost, and none of them can be asked why "
            f"({in_a_line(error)}). --resume continues from the newest checkpoint"
        )
    # after a trial that succeeded: a disk that filled up, a kernel that the compiler refuses
    if compiler.is_failure(error):
        return TrainingFailed(
            f"torch.compile failed ({compiler.cause(error)}); --resume --no-compile continues "
            f"without it"
        )
    return error


def gives_up(state: TrainState, overflowed: bool, max_skipped: int, debug_nans: bool) -> bool:
    """Whether the run ends after a step that was skipped. overflowed: lowering the fp16 loss scale
    may mend it. max_skipped, debug_nans: the flags."""
    return not overflowed and (debug_nans or state.skipped_in_a_row >= max_skipped)


def conclude(located: str, state: TrainState, folder: Path, rows: Rows, rows_per_step: int) -> str:
    """The message about the fault that ends a run after a skipped step; every rank calls it.

    located: what locate() found on this rank. Rank 0 writes fault_step_000123.json into the run
    folder: where the fault is, and the rows of the step with their numbers and decoded text."""
    found = [
        f"rank {rank}: {where}" if ranks.world_size() > 1 else where
        for rank, where in enumerate(ranks.from_all(located))
        if where
    ]
    located = "; ".join(found) or (
        "recomputing the step gives finite numbers, so its arithmetic is not at fault; suspect "
        "memory errors or communication between ranks"
    )
    step = state.step - 1
    times = state.skipped_in_a_row
    steps = f"step {step}" if times == 1 else f"{times} steps in a row"
    text = f"{steps} had a non-finite loss or gradient; {located}"
    if ranks.rank() != 0:
        return text
    # Hashes say that a file is what was written, not that its numbers are good.
    good = checkpoint.newest_finite(folder)
    if good is None:
        text += "; no good checkpoint exists"
    else:
        text += f"; the last good checkpoint is step {good}"
    path = folder / f"fault_step_{step:06d}.json"
    decode = rows.cache.tokenizer.decode
    try:
        # Decoded, because the culprit may be a strange document rather than arithmetic.
        batch = [
            {"row": number, "text": decode(rows.row(number)[1:].tolist())}
            for number in range(step * rows_per_step, (step + 1) * rows_per_step)
        ]
        write_json(path, {"step": step, "located": located, "rows": batch})
    except (OSError, Unavailable) as error:
        return f"{text}; the batch cannot be written ({error})"
    return f"{text}; the text of that step's batch is in {path}"


def spike(loss: float, recent: list[float], finite: bool = True) -> float | None:
    """Standard deviations by which a loss lies above the recent ones, if that is remarkable, else
    None. recent: the last SPIKE_WINDOW losses of good steps, to which this one is added.

    finite: False for a step that was skipped, whose loss says nothing."""
    z = None
    if not finite:
        return z
    if len(recent) >= SPIKE_LEAST:
        mean = statistics.fmean(recent)
        # losses that hardly move are no measure
        spread = max(statistics.pstdev(recent), 1e-3 * abs(mean))
        z = (loss - mean) / spread
    # In place: the list is part of the state that checkpoints hold.
    recent.append(loss)
    del recent[:-SPIKE_WINDOW]
    return z if z is not None and z > SPIKE_Z else None


def remarks(step: int, loss: float, z: float | None, vocab_size: int | None) -> Iterator[str]:
    """Sentences on what is remarkable about the loss of a step. z: from spike(). vocab_size: of a
    model that begins untrained, else None."""
    if step == 0 and vocab_size and abs(loss - math.log(vocab_size)) > FIRST_LOSS_TOLERANCE:
        expected = math.log(vocab_size)
        yield (
            f"warning: the loss at step 0 is {loss:.3f}, and an untrained model should have "
            f"ln(vocabulary) = {expected:.3f}"
        )
    if z is not None:
        yield (
            f"step {step}: the loss jumped to {loss:.4f}, {z:.1f} standard deviations above the "
            "recent ones"
        )


class Watchdog:
    """A thread that reports a loop that has stalled, with the stacks of all threads. It only
    reports: what hangs may be a debugger, a disk that wakes up, or a rank that is gone."""

    def __init__(self, report: Callable[[str], None], clock: Clock) -> None:
        """clock: the loop's, which knows what is being done and how long that may take."""
        self.report = report
        self.clock = clock
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Report if nothing has moved for too long."""
        silent = self.clock.stalled_seconds()
        if silent is None:
            return
        usual = self.clock.usual_seconds()
        compared = f" (usually {human_time(usual)})" if usual else ""
        self.report(
            f"warning: nothing has moved for {human_time(silent)} at {self.clock.doing}{compared}\n"
            f"what every thread is doing:\n{self._stacks()}"
        )

    def _stacks(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = []
        # Its own stack would only show that it is looking.
        for ident, frame in sys._current_frames().items():
            if ident != self.thread.ident:
                stack = "".join(traceback.format_stack(frame)).rstrip()
                stacks.append(f"thread {names.get(ident, ident)}:\n{stack}")
        return "\n".join(stacks)

    def _run(self) -> None:
        while not self.stopped.wait(1.0):
            self.check()

    def close(self) -> None:
        """End the thread."""
        self.stopped.set()
