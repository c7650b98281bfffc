"""The report of `nanochat doctor` as text."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanochat.apps.doctor.facts import Facts
from nanochat.apps.doctor.packages import NEEDED, OPTIONAL
from nanochat.common import counted, human_bytes
from nanochat.run.flags import FLAGS

if TYPE_CHECKING:
    from nanochat.apps.doctor.machine import Machine


def as_text(facts: Facts) -> str:
    """The facts as aligned lines, then what is needed and what will be slow."""
    lines = [f"{name:<18} {value}" for name, value in _pairs(facts)]
    # Last, where a terminal ends up: what to do something about.
    if facts.needed:
        lines += ["", "training needs these, and they are missing here:"]
        lines += [f"  {problem}" for problem in facts.needed]
    else:
        lines += ["", "everything that training needs is here"]
    if facts.slow:
        lines += ["", "what will be slow here and why:"]
        lines += [f"  {remark.what}: {remark.why}; {remark.remedy}" for remark in facts.slow]
    else:
        lines += ["", "what will be slow here and why: nothing"]
    return "\n".join(lines)


def _pairs(facts: Facts) -> Iterator[tuple[str, str]]:
    """(name, value) of each line of facts."""
    yield "python", f"{facts.python}, {facts.system}"
    versions = [f"{name} {version}" for name, version in facts.packages.items() if version]
    yield "packages", ", ".join(versions)
    # The commands can be pasted into a shell, which would take >= for a redirection unquoted.
    for name in facts.missing:
        package = (NEEDED | OPTIONAL)[name]
        text = f"{name} ({package.purpose}): pip install '{package.requirement}'"
        yield ("missing" if name in NEEDED else "not installed"), text
    if facts.machine is not None:
        yield from _pairs_of_machine(facts.machine)
    for what, place in facts.disk.items():
        if place.problem:
            yield what, f"{place.path}: {place.problem}"
        else:
            yield what, f"{place.path}: {human_bytes(place.free_bytes)} free, writable"
    # Not a problem on its own: many machines that train are offline.
    hub = facts.dataset_hub
    if hub.problem:
        yield (
            "dataset hub",
            f"{hub.address}: not reachable ({hub.problem}); --data=python and files on this "
            f"machine work without it",
        )
    else:
        yield "dataset hub", f"{hub.address}: reachable"
    if facts.wandb:
        yield "Weights & Biases", f"key from {facts.wandb}"
    else:
        yield "Weights & Biases", "no key: --run=NAME logs offline; `wandb login` adds a key"


def _pairs_of_machine(machine: "Machine") -> Iterator[tuple[str, str]]:
    for gpu in machine.gpus:
        free, total = human_bytes(gpu.free_memory_bytes), human_bytes(gpu.memory_bytes)
        yield "gpu", f"{gpu.name} (SM {gpu.capability}), {free} free of {total}"
    cores = counted(machine.cores, "core")
    if machine.cores < machine.cpu_count:
        cores = f"{machine.cores} of {machine.cpu_count} cores (CPU quota or affinity mask)"
    yield "cpu", f"{machine.cpu}, {cores}, {counted(machine.threads, 'thread')} in torch"
    free = f"{human_bytes(machine.free_memory_bytes)} of memory free"
    if machine.memory_limit:
        free += f" ({machine.memory_limit})"
    yield "trains on", f"{machine.device} in {machine.dtype} ({machine.dtype_reason}), {free}"
    # Depths that do not fit are listed among what will be slow.
    if machine.rows_that_fit:
        fitting = [
            f"{rows} at depth {depth}" for depth, rows in machine.rows_that_fit.items() if rows
        ]
        yield (
            f"rows of {FLAGS['max_seq_len'].default:,}",
            f"estimated to fit per pass: {', '.join(fitting)}",
        )
    speeds = []
    for name, flops in machine.matmul_flops.items():
        speeds.append(f"{name} {flops / 1e12:.3g} TFLOP/s" if flops else f"{name}: not supported")
    yield "matrix products", ", ".join(speeds)
    yield "torch.compile", machine.compiler_problem or "works"
