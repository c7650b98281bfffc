"""--profile: a trace of a few training steps in the run folder, and a table of where their time and memory go."""

import re

import torch

from nanochat.common import human_bytes, write_atomic

SKIPPED, TRACED = 3, 3  # steps after the start that are let pass, and that are traced
# what an operator's own time counts as: the first pattern that its name fits
KINDS = (("matrix products", r"^aten::(mm|bmm|addmm|baddbmm|_scaled_mm)$|gemm|cutlass|nvjet|cublas"),
         ("attention kernels", r"attention|flash|fmha"),
         ("compiled pointwise and norms", r"CompiledFxGraph|^triton_|inductor"),
         ("exchanges between ranks", r"^nccl|gloo|c10d"),
         ("copies and casts", r"^aten::(copy_|_to_copy|clone|cat|_foreach_copy_|stack)$|Memcpy|memcpy"),
         ("compiled code's checks", r"Dynamo|AOTDispatcher|^CompiledFunction|Torch-Compiled"))
ROWS = 25


class Profiler:
    """step() before every training step starts and ends the trace; close() ends one that a short run left open."""

    def __init__(self, folder, device, report):
        """folder: made for the files. report(text) takes a line."""
        self.folder, self.device, self.report = folder, device, report
        self.profile, self.steps = None, 0

    def step(self):
        if self.steps == SKIPPED:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history()
            self.profile = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
            self.profile.start()
        elif self.steps == SKIPPED + TRACED:
            self.close()
        self.steps += 1

    def close(self):
        """Write trace.json (for chrome://tracing or Perfetto), table.txt and, on CUDA, memory.pickle. A full disk is only reported."""
        profile, self.profile = self.profile, None
        if profile is None:
            if self.steps <= SKIPPED:
                self.report(f"--profile: the run ended before step {SKIPPED + 1} of this start, so that there is nothing to show")
            return
        profile.stop()
        try:
            self.folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(self.folder / "trace.json"))
            summary, table = describe(profile.key_averages(), self.device.type)
            write_atomic(self.folder / "table.txt", f"{summary}\n\n{table}\n")
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            self.report(f"--profile: the trace cannot be written ({error})")
            return
        self.report(f"{summary}\nprofile of {self.steps - SKIPPED - 1} steps: {self.folder}/table.txt and trace.json, for "
                    f"ui.perfetto.dev")


def describe(averages, device_type):
    """(share of each kind of work and the largest allocation, table of the operators), from profile.key_averages()."""
    own = "self_device_time_total" if device_type == "cuda" else "self_cpu_time_total"
    kinds = dict.fromkeys([name for name, _ in KINDS] + ["other"], 0)
    for entry in averages:
        if entry.key.startswith("[memory]"):
            continue
        kind = next((name for name, pattern in KINDS if re.search(pattern, entry.key)), "other")
        kinds[kind] += getattr(entry, own)
    total = sum(kinds.values()) or 1
    shares = sorted(kinds.items(), key=lambda pair: -pair[1])
    lines = [f"  {name:<30} {time / 1e3:>9.1f} ms  {time / total:>5.1%}" for name, time in shares if time]
    largest = max(averages, key=lambda entry: entry.self_cpu_memory_usage if device_type != "cuda" else entry.self_device_memory_usage)
    size = largest.self_device_memory_usage if device_type == "cuda" else largest.self_cpu_memory_usage
    memory = f"  most memory is taken by {largest.key}: {human_bytes(max(0, size))} in all"
    return "\n".join(["where the time of a step goes:", *lines, memory]), averages.table(sort_by=own, row_limit=ROWS)
