"""What the steps of a run cost.

Compilations after the first step are always reported. With --profile, a few steps are traced into
the run folder, with a table of where their time and memory go."""

import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from nanochat import hardware
from nanochat.common import human_bytes, write_atomic

# Steps after the start that are not traced: the first ones compile and fill caches.
SKIPPED = 3
# Steps that are traced after those. More only make the trace larger.
TRACED = 3
# What an operator's own time counts as: the first kind whose pattern its name matches.
KINDS = (
    ("matrix products", r"^aten::(mm|bmm|addmm|baddbmm|_scaled_mm)$|gemm|cutlass|nvjet|cublas"),
    ("attention kernels", r"attention|flash|fmha"),
    ("compiled pointwise and norms", r"CompiledFxGraph|^triton_|inductor"),
    ("exchanges between ranks", r"^nccl|gloo|c10d"),
    ("copies and casts", r"^aten::(copy_|_to_copy|clone|cat|_foreach_copy_|stack)$|Memcpy|memcpy"),
    ("compiled code's checks", r"Dynamo|AOTDispatcher|^CompiledFunction|Torch-Compiled"),
)
# Rows of the table of operators.
ROWS = 25


class Profiler:
    """Watches training steps: step() before each, close() at the end.

    close() also ends a trace that a short run left open."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        tracing: bool,
        report: Callable[[str], None],
        compilations: Callable[[], int] = hardware.compilations,
    ) -> None:
        """folder: for the files of a trace, created if tracing. report(text) takes a line.

        compilations(): graphs compiled in this process so far."""
        self.folder = folder
        self.device = device
        self.tracing = tracing
        self.report = report
        self.compilations = compilations
        self.profile = None
        self.steps = 0
        self.graphs = 0

    def step(self, number: int) -> None:
        """number: of the step that is about to begin."""
        graphs = self.compilations()
        # The first step may compile what the pass before it did not use.
        if self.steps > 1 and graphs > self.graphs:
            self.report(
                f"step {number - 1} took longer: torch.compile compiled "
                f"{graphs - self.graphs} more graphs"
            )
        self.graphs = graphs
        if self.tracing and self.steps == SKIPPED:
            self._begin()
        elif self.steps == SKIPPED + TRACED:
            self._write()
        self.steps += 1

    def close(self) -> None:
        """End a trace that is still open, and report one that never began."""
        if self.tracing and self.steps <= SKIPPED:
            self.report(
                f"--profile: the run ended before step {SKIPPED + 1} of this start, so no step was "
                f"traced"
            )
        self._write()

    def _begin(self) -> None:
        """Begin the trace."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self.profile = torch.profiler.profile(
            activities=activities, profile_memory=True, record_shapes=True
        )
        self.profile.start()

    def _write(self) -> None:
        """End the trace: trace.json (for Perfetto), table.txt and, on CUDA, memory.pickle.

        A full disk is reported, not raised."""
        profile, self.profile = self.profile, None
        if profile is None:
            return
        try:
            profile.stop()
            self.folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(self.folder / "trace.json"))
            summary, table = describe(profile.key_averages(), self.device.type)
            write_atomic(self.folder / "table.txt", f"{summary}\n\n{table}\n")
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
        # torch reports a file that it cannot write as a RuntimeError.
        except (OSError, RuntimeError) as error:
            self.report(f"--profile: the trace cannot be written ({error})")
            return
        finally:
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
        steps = min(self.steps - SKIPPED, TRACED)
        self.report(
            f"{summary}\n"
            f"profile of {steps} steps: {self.folder}/table.txt, and trace.json for ui.perfetto.dev"
        )


def describe(averages: Any, device_type: str) -> tuple[str, str]:
    """(summary, table of the operators) of a trace, from profile.key_averages().

    The summary has the share of each kind of work in the time, and the operator that allocates
    most. Times are those of the device, an operator's own, without the operators that it calls."""
    device = "device" if device_type == "cuda" else "cpu"
    own_time = f"self_{device}_time_total"
    own_memory = f"self_{device}_memory_usage"
    times = dict.fromkeys([name for name, _ in KINDS] + ["other"], 0)
    for entry in averages:
        # On CUDA an operator's row has the time of its kernels, which also have rows of their own:
        # only one of the two may count.
        of_kernel = device_type == "cuda" and is_kernel(entry)
        if not of_kernel and not entry.key.startswith("[memory]"):
            times[kind_of(entry.key)] += getattr(entry, own_time)
    total = sum(times.values()) or 1
    lines = ["where the time of the traced steps goes:"]
    # Longest first; equal ones in the order of KINDS.
    for name in sorted(times, key=times.get, reverse=True):
        if times[name]:
            share = times[name] / total
            lines.append(f"  {name:<30} {times[name] / 1e3:>9.1f} ms  {share:>5.1%}")
    largest = max(averages, key=attrgetter(own_memory))
    allocated = human_bytes(max(0, getattr(largest, own_memory)))
    lines.append(f"  most memory is allocated by {largest.key}: {allocated} in total")
    return "\n".join(lines), averages.table(sort_by=own_time, row_limit=ROWS)


def is_kernel(entry: Any) -> bool:
    """Whether an entry of profile.key_averages() is a kernel of a GPU, not an operator that
    launches some."""
    return entry.device_type != torch.autograd.DeviceType.CPU


def longest_kernels(averages: Any, n: int) -> list[tuple[str, int, float]]:
    """(name, calls, milliseconds) of the n kernels of a GPU that took longest in a trace."""
    kernels = [entry for entry in averages if is_kernel(entry)]
    kernels.sort(key=attrgetter("self_device_time_total"), reverse=True)
    return [(entry.key, entry.count, entry.self_device_time_total / 1e3) for entry in kernels[:n]]


def kind_of(name: str) -> str:
    """The name in KINDS of what an operator or a kernel does."""
    for kind, pattern in KINDS:
        if re.search(pattern, name):
            return kind
    return "other"
