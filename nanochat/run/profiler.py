"""What the steps of a run cost: compilations after the first, and with --profile a trace of a few steps in the run folder and a
table of where their time and memory go."""

import re

import torch

from nanochat import hardware
from nanochat.common import human_bytes, write_atomic

SKIPPED, TRACED = 3, 3  # steps after the start that are let pass, and that are traced
# what an operator's own time counts as: the first pattern that its name fits
KINDS = (
    ("matrix products", r"^aten::(mm|bmm|addmm|baddbmm|_scaled_mm)$|gemm|cutlass|nvjet|cublas"),
    ("attention kernels", r"attention|flash|fmha"),
    ("compiled pointwise and norms", r"CompiledFxGraph|^triton_|inductor"),
    ("exchanges between ranks", r"^nccl|gloo|c10d"),
    ("copies and casts", r"^aten::(copy_|_to_copy|clone|cat|_foreach_copy_|stack)$|Memcpy|memcpy"),
    ("compiled code's checks", r"Dynamo|AOTDispatcher|^CompiledFunction|Torch-Compiled"),
)
ROWS = 25


class Profiler:
    """step() before every training step; close() at the end, which also ends a trace that a short run left open."""

    def __init__(self, folder, device, tracing, report):
        """folder: made for the files, if tracing. report(text) takes a line."""
        self.folder, self.device, self.tracing, self.report = folder, device, tracing, report
        self.profile, self.steps, self.graphs = None, 0, None

    def step(self, number):
        """number: of the step that is about to begin."""
        graphs = hardware.compilations()
        if (
            self.steps > 1 and graphs > self.graphs
        ):  # the first step may compile what the pass before it did not use
            self.report(
                f"step {number - 1}: torch.compile made {graphs - self.graphs} more graphs, which took its time"
            )
        self.graphs = graphs
        if self.tracing and self.steps == SKIPPED:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history()
            self.profile = torch.profiler.profile(
                activities=activities, profile_memory=True, record_shapes=True
            )
            self.profile.start()
        elif self.steps == SKIPPED + TRACED:
            self._write()
        self.steps += 1

    def close(self):
        if self.tracing and self.steps <= SKIPPED:
            self.report(
                f"--profile: the run ended before step {SKIPPED + 1} of this start, so that there is nothing to show"
            )
        self._write()

    def _write(self):
        """End the trace: trace.json (for Perfetto), table.txt and, on CUDA, memory.pickle. A full disk is only reported."""
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
        except (OSError, RuntimeError) as error:
            self.report(f"--profile: the trace cannot be written ({error})")
            return
        finally:
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
        self.report(
            f"{summary}\nprofile of {min(self.steps - SKIPPED, TRACED)} steps: {self.folder}/table.txt and trace.json, for "
            f"ui.perfetto.dev"
        )


def describe(averages, device_type):
    """(share of each kind of work and the largest allocation, table of the operators), from profile.key_averages()."""
    own = "self_device_time_total" if device_type == "cuda" else "self_cpu_time_total"
    kinds = dict.fromkeys([name for name, _ in KINDS] + ["other"], 0)
    for entry in averages:
        # on CUDA an operator's row has the time of its kernels, which have rows of their own: one of the two counts
        if (
            entry.key.startswith("[memory]")
            or device_type == "cuda"
            and entry.device_type != torch.autograd.DeviceType.CPU
        ):
            continue
        kind = next((name for name, pattern in KINDS if re.search(pattern, entry.key)), "other")
        kinds[kind] += getattr(entry, own)
    total = sum(kinds.values()) or 1
    shares = sorted(kinds.items(), key=lambda pair: -pair[1])
    lines = [
        f"  {name:<30} {time / 1e3:>9.1f} ms  {time / total:>5.1%}" for name, time in shares if time
    ]
    largest = max(
        averages,
        key=lambda entry: (
            entry.self_cpu_memory_usage if device_type != "cuda" else entry.self_device_memory_usage
        ),
    )
    size = (
        largest.self_device_memory_usage if device_type == "cuda" else largest.self_cpu_memory_usage
    )
    memory = f"  most memory is taken by {largest.key}: {human_bytes(max(0, size))} in all"
    return "\n".join(["where the time of the traced steps goes:", *lines, memory]), averages.table(
        sort_by=own, row_limit=ROWS
    )
