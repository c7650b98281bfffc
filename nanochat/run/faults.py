"""Finding what went wrong: the module that made the first bad number, the batch it came from, a loss that jumps, a loop that hangs."""

import math
import statistics
import sys
import threading
import time
import traceback

import torch

from nanochat import hardware, ranks, signals
from nanochat.common import TrainingFailed, Unavailable, human_time, write_json
from nanochat.run import checkpoint

EXPLODING = 1e4  # activations and gradients of a healthy model stay far below
SPIKE_WINDOW, SPIKE_LEAST, SPIKE_Z = (
    64,
    32,
    6.0,
)  # losses compared with, how many there must be, standard deviations
STALL_FACTOR, STALL_FLOOR_SECONDS, STALL_PATIENCE_SECONDS = (
    20,
    60.0,
    1800.0,
)  # x the usual step; at least; where nothing is usual


class _Trace:
    """Hooks on every module and parameter that note the first non-finite and the first exploding value.

    What a module was given and what it gave are looked at, in both passes. Hooks of inner modules run first, so that the first
    to give something bad made it; a module that is given something bad and is the first to see it was given it by the code
    around it."""

    def __init__(self, model):
        self.first = {}  # "non-finite" or "exploding" -> where it was seen first
        self.handles = []
        for name, module in model.named_modules():
            if name:  # the model itself is what calls all others
                self.handles += [
                    module.register_forward_pre_hook(self._entered(name)),
                    module.register_forward_hook(self._left(name)),
                    module.register_full_backward_pre_hook(self._came_back(name)),
                    module.register_full_backward_hook(self._passed_back(name)),
                ]
        for name, parameter in model.named_parameters():
            self.handles.append(
                parameter.register_post_accumulate_grad_hook(self._gradient_of(name))
            )

    def look(self, values, where):
        """Note `where` for each kind of badness that no tensor before had."""
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if isinstance(value, (tuple, list)):
                self.look(value, where)
            elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                largest = value.detach().abs().max().item()  # NaN if there is one
                if not math.isfinite(largest):
                    self.first.setdefault(
                        "non-finite", f"{where} ({'NaN' if math.isnan(largest) else 'inf'})"
                    )
                elif largest > EXPLODING:
                    self.first.setdefault("exploding", f"{where} ({largest:.3g})")

    def _entered(self, name):
        return lambda module, inputs: self.look(
            inputs, f"{_around(name)}, before {name}, in the forward pass"
        )

    def _left(self, name):
        return lambda module, inputs, outputs: self.look(
            outputs, f"{name} ({type(module).__name__}), in the forward pass"
        )

    def _came_back(self, name):
        return lambda module, of_outputs: self.look(
            of_outputs, f"{_around(name)}, after {name}, in the backward pass"
        )

    def _passed_back(self, name):
        return lambda module, to_inputs, _: self.look(
            to_inputs, f"{name} ({type(module).__name__}), in the backward pass"
        )

    def _gradient_of(self, name):
        return lambda parameter: self.look(
            parameter.grad, f"the gradient of {name}, in the backward pass"
        )

    def close(self):
        for handle in self.handles:
            handle.remove()


def _around(name):
    """The module whose code calls the module of that name."""
    parent = name.rpartition(".")[0]
    return parent if "." in parent else "the model's own code"  # lists of blocks have no code


def locate(model, rerun):
    """A sentence on where the first non-finite value comes from, and on the first exploding one; "" if there is
    none. rerun(): the forward and backward pass of the step, which is made again with hooks on all modules, uncompiled."""
    for name, parameter in model.named_parameters():
        bad = (~parameter.detach().isfinite()).nonzero()
        if len(bad):
            where = ", ".join(map(str, bad[0].tolist()))
            return f"the weights {name} hold {len(bad)} non-finite number{'s' * (len(bad) > 1)}, the first at [{where}]"
    trace = _Trace(model)
    try:
        with torch.compiler.set_stance("force_eager"):
            trace.look(rerun(), "the loss itself")
    except RuntimeError as error:  # out of memory without the compiler's fusions
        return f"the step could not be made again to find out ({error})"
    finally:
        trace.close()
    found = [
        f"the first {kind} value: {where}"
        for kind, where in sorted(trace.first.items(), reverse=True)
    ]
    return "; ".join(found)


def cause(error, device_batch, stop, step_seconds):
    """The exception to end a run with, given the one that was raised: of a lack of memory, a rank that is gone, or a signal
    that also ended what was being waited for. Leaves word of it for the other ranks: of one that dies before training begins, or after
    it has ended, they do not hear, and torchrun alone names it.

    stop: this process's StopSignals. step_seconds: what a step usually takes, 0 if that is not known."""
    lost = ranks.is_lost_exchange(error)
    error = _cause(error, lost, device_batch, stop, step_seconds)
    # what this rank heard of another it does not pass on as its own
    ranks.last_word(
        ranks.LOST
        if lost or not isinstance(error, Exception)
        else f"{type(error).__name__}: {error}"
    )
    return error


def _cause(error, lost, device_batch, stop, step_seconds):
    if hardware.is_out_of_memory(error):
        fits = max((n for n in range(1, device_batch) if device_batch % n == 0), default=None)
        smaller = (
            f"--device-batch-size={fits} would likely fit"
            if fits
            else "lower --max-seq-len or --depth"
        )
        return TrainingFailed(
            f"out of memory with --device-batch-size={device_batch}; {smaller} ({error})"
        )
    if lost and (gone := ranks.who_is_gone(step_seconds)):
        return TrainingFailed(
            f"{gone}; the other ranks end too. --resume goes on from the newest checkpoint"
        )
    if (
        stop.requested and isinstance(error, Exception) and (lost or stop.at_once)
    ):  # Ctrl-C ends the compiler's processes too
        return signals.Stopped()
    return error


def conclude(located, times, folder, rows, step, n_rows, saver):
    """What to say of the fault that ends a run; every rank calls it. located: this rank's locate(); times: skipped steps in a row.

    Rank 0 writes fault_step_000123.json into the run folder: where the fault is, and the rows (data.Rows) of the step with
    their numbers and decoded text. saver: rank 0's Saver, for the last good checkpoint."""
    several = ranks.world_size() > 1
    located = "; ".join(
        f"rank {i}: {where}" if several else where
        for i, where in enumerate(ranks.from_all(located))
        if where
    )
    located = (
        located
        or "made again, the step is finite: the fault is not in its arithmetic (memory? the exchange between ranks?)"
    )
    text = f"{times} step{'s' * (times > 1)} in a row had a non-finite loss or gradient; {located}"
    if saver is None:
        return text
    saver.wait()
    good = checkpoint.newest_finite(folder)
    text += f"; the last good checkpoint is {'none' if good is None else f'step {good}'}"
    path, decode = folder / f"fault_step_{step:06d}.json", rows.cache.tokenizer.decode
    try:
        batch = [
            {"row": row, "text": decode(rows.row(row)[1:].tolist())}
            for row in range(step * n_rows, (step + 1) * n_rows)
        ]
        write_json(path, {"step": step, "located": located, "rows": batch})
    except (OSError, Unavailable) as error:
        return f"{text}; the batch cannot be written ({error})"
    return f"{text}; its text is in {path}"


def spike(loss, recent):
    """Standard deviations by which a loss lies above the recent ones if that is remarkable, else None. `recent` is a list of
    the last SPIKE_WINDOW losses, to which this one is added."""
    z = None
    if len(recent) >= SPIKE_LEAST:
        spread = max(
            statistics.pstdev(recent), 1e-3 * abs(statistics.fmean(recent))
        )  # losses that hardly move are no measure
        z = (loss - statistics.fmean(recent)) / spread
    recent.append(loss)
    del recent[:-SPIKE_WINDOW]
    return z if z is not None and z > SPIKE_Z else None


def remarks(step, loss, z, recent, vocab_size):
    """Yields what is remarkable about the loss of the step before `step`. z, recent: of spike(); vocab_size: of an untrained model."""
    if step == 1 and vocab_size and abs(loss - math.log(vocab_size)) > 0.5:
        yield (
            f"warning: the loss at step 0 is {loss:.3f}, and ln(vocabulary) = {math.log(vocab_size):.3f} is what an untrained model "
            f"should have"
        )
    if z is not None:
        yield f"step {step - 1}: the loss jumped to {loss:.4f}, {z:.1f} standard deviations above the last {len(recent) - 1}"


class Watchdog:
    """Reports a loop that has not moved for STALL_FACTOR times its usual step, with the stacks of all threads; then again
    after twice that time. Only says it: what hangs may be a debugger, a disk that wakes up, or a rank that is gone."""

    def __init__(self, report, clock=time.monotonic):
        self.report, self.clock, self.stopped = report, clock, threading.Event()
        self.recent, self.where = [], "the first step"
        self.moved_at, self.limit = clock(), STALL_PATIENCE_SECONDS
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def step(self, number, seconds):
        """A step was done, in so many seconds."""
        self.recent = [*self.recent[-31:], seconds]
        self.move(f"step {number}", max(STALL_FLOOR_SECONDS, STALL_FACTOR * self.usual()))

    def usual(self):
        """Seconds that a step usually takes, 0 before the first."""
        return statistics.median(self.recent) if self.recent else 0.0

    def move(self, where, limit=STALL_PATIENCE_SECONDS):
        """Something else begins, or went on, that may take `limit` seconds."""
        self.where, self.moved_at, self.limit = where, self.clock(), limit

    def check(self):
        """Report if the loop has not moved for too long."""
        silent = self.clock() - self.moved_at
        if silent <= self.limit:
            return
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = "\n".join(
            f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)).rstrip()
            for ident, frame in sys._current_frames().items()
            if ident != self.thread.ident
        )
        usual = f" (usually {human_time(self.usual())})" if self.recent else ""
        self.limit *= 2
        self.report(
            f"warning: nothing has moved for {human_time(silent)} at {self.where}{usual}; what every thread is doing:\n{stacks}"
        )

    def _run(self):
        while not self.stopped.wait(1.0):
            self.check()

    def close(self):
        self.stopped.set()
