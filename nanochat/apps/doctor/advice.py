"""Conclusions from the facts: what keeps training from working, what will be slow, and remedies."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanochat.apps.doctor.facts import Facts, Remark
from nanochat.apps.doctor.packages import NEEDED
from nanochat.common import counted, human_bytes

if TYPE_CHECKING:
    from nanochat.apps.doctor.machine import Machine

# Free bytes of a disk that are worth a remark: checkpoints and caches of large models take more.
LITTLE_DISK = 10 * 2**30
# Free bytes of a disk that are too few even for a small run.
TOO_LITTLE_DISK = 200 * 2**20
# Free bytes of the training device that are worth a remark.
LITTLE_MEMORY = 6 * 2**30
# Share of a GPU's memory; with less of it free, others are using the GPU.
UNUSED_GPU = 0.8
FEW_CORES = 4
# Words of a reason why nothing is compiled, and what helps; the first that occur.
COMPILER_REMEDIES = {
    # There is nothing to install: torch itself does not support it well.
    "on mps": "--no-compile silences this",
    "triton is not installed": "pip install triton",
    "too old for triton": "use a newer GPU",
    "path is not set": "set PATH",
    "blanks in": "use a folder without blanks: of the virtual environment, TMPDIR or "
    "TORCHINDUCTOR_CACHE_DIR, whichever is named",
    "noexec": "set TORCHINDUCTOR_CACHE_DIR to a folder on another disk",
    "no file locks": "set TORCHINDUCTOR_CACHE_DIR to a folder on another disk",
    "no space left": "free some space where caches are and in TMPDIR",
    "quota exceeded": "free some space where caches are and in TMPDIR",
    "permission denied": "set TORCHINDUCTOR_CACHE_DIR and TMPDIR to folders of your own",
    "no folder for compiled kernels": "set NANOCHAT_BASE_DIR to a folder that can hold caches",
}
DISK_REMEDIES = {
    "caches": "set NANOCHAT_BASE_DIR to another folder",
    "runs": "give another --out-dir",
}


def needed(facts: Facts) -> list[str]:
    """What keeps training from working, as sentences with their remedies."""
    problems = []
    for name in facts.missing:
        if name in NEEDED:
            package = NEEDED[name]
            problems.append(
                f"the package '{name}' is missing ({package.purpose}): "
                f"pip install '{package.requirement}'"
            )
    if facts.torch_error:
        problems.append(
            f"torch does not work here ({facts.torch_error}): reinstall it with "
            f"pip install '{NEEDED['torch'].requirement}'"
        )
    for what, remedy in DISK_REMEDIES.items():
        place = facts.disk[what]
        if place.problem:
            problems.append(f"{what}: {place.problem}; {remedy}")
        elif place.free_bytes < TOO_LITTLE_DISK:
            problems.append(
                f"{what}: only {human_bytes(place.free_bytes)} free at {place.path}; free some "
                f"space, or {remedy}"
            )
    return problems


def slow(facts: Facts) -> list[Remark]:
    """What will be slow or cramped here."""
    remarks = []
    machine = facts.machine
    # Without a working torch little is known, and needed() has the reason.
    if machine is not None:
        if machine.device != "cuda" and facts.has_nvidia_gpu:
            remarks.append(_unused_gpu(machine))
        if machine.device == "cpu":
            remarks += _slow_cpu(machine)
        if machine.device == "cuda" and machine.dtype != "bfloat16":
            remarks.append(_no_bf16(machine))
        if machine.rows_that_fit and 0 in machine.rows_that_fit.values():
            remarks.append(_too_deep(machine))
        if machine.compiler_problem:
            why = f"torch.compile cannot be used: {machine.compiler_problem}"
            remarks.append(Remark("training, about half as fast", why, _compiler_remedy(machine)))
        remarks += _little_memory(machine)
    for what, place in facts.disk.items():
        if place.free_bytes is not None and place.free_bytes < LITTLE_DISK:
            remedy = "put --out-dir on another disk, or keep fewer checkpoints with --keep-last"
            if what == "caches":
                remedy = "put NANOCHAT_BASE_DIR on another disk"
            why = f"{human_bytes(place.free_bytes)} free at {place.path}"
            remarks.append(Remark(what, why, remedy))
    return remarks


def _unused_gpu(machine: "Machine") -> Remark:
    why = "this torch is a build for CPUs"
    if machine.cuda_build:
        why = (
            f"torch, built for CUDA {machine.cuda_build}, finds no usable GPU; the driver may be "
            f"too old"
        )
    remedy = "install a CUDA build of torch, or update the driver"
    return Remark("the NVIDIA GPU is not used", why, remedy)


def _slow_cpu(machine: "Machine") -> Iterator[Remark]:
    if not machine.bf16_cpu:
        yield Remark(
            "matrix products",
            "this CPU has no bf16 instructions (AMX or AVX512-BF16), so they run in fp32",
            "choose a small --depth, or a machine that has them",
        )
    if machine.cores < FEW_CORES:
        why = f"only {counted(machine.cores, 'core')} can be used"
        remedy = "choose a small --depth and a --target-minutes budget"
        if machine.cores < machine.cpu_count:
            why += f" of the machine's {machine.cpu_count}, by a CPU quota or an affinity mask"
            remedy = f"raise that limit, or {remedy}"
        yield Remark("everything on the CPU", why, remedy)
    if machine.threads < machine.cores:
        # Often set by a cluster or a container image without the user's knowledge.
        limited = os.environ.get("OMP_NUM_THREADS")
        yield Remark(
            "everything on the CPU",
            f"torch uses {machine.threads} of {machine.cores} cores",
            "raise or unset OMP_NUM_THREADS" if limited else "set OMP_NUM_THREADS",
        )


def _no_bf16(machine: "Machine") -> Remark:
    # fp16 has a narrow range: only training can scale its loss to stay within it.
    how = "fp32"
    if machine.dtype == "float16":
        how = "fp16 in training, with loss scaling, and in fp32 elsewhere"
    return Remark(
        "matrix products",
        f"{machine.gpus[0].name} has no bf16 matrix instructions, so they run in {how}",
        "choose a small --depth, or a GPU of the Ampere generation or newer",
    )


def _too_deep(machine: "Machine") -> Remark:
    # Deeper models do not fit either, so the shallowest says it all.
    least = min(depth for depth, rows in machine.rows_that_fit.items() if rows == 0)
    return Remark(
        "larger models",
        f"at --depth={least} with the default context not even one row is estimated to fit into "
        f"{human_bytes(machine.free_memory_bytes)}",
        "lower --max-seq-len, or add --activation-checkpointing",
    )


def _compiler_remedy(machine: "Machine") -> str:
    for words, remedy in COMPILER_REMEDIES.items():
        if words in machine.compiler_problem.lower():
            return remedy
    compiler = "gcc" if machine.device == "cuda" else "g++"
    return f"install {compiler} and Python's headers (python3-dev), or repair them"


def _little_memory(machine: "Machine") -> Iterator[Remark]:
    if machine.free_memory_bytes < LITTLE_MEMORY:
        why = f"only {human_bytes(machine.free_memory_bytes)} of memory are free"
        remedy = "close other programs"
        if machine.memory_limit:
            why += f" ({machine.memory_limit})"
            remedy = "raise that limit"
        yield Remark(
            "larger models and batches",
            why,
            f"{remedy}, or choose a small --depth or --max-seq-len",
        )
    for gpu in machine.gpus:
        if gpu.free_memory_bytes < UNUSED_GPU * gpu.memory_bytes:
            held = human_bytes(gpu.memory_bytes - gpu.free_memory_bytes)
            yield Remark(
                gpu.name,
                f"other programs hold {held} of its memory",
                "stop them (nvidia-smi lists them)",
            )
