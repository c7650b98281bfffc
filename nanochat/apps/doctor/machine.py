"""The machine as torch sees it: devices, memory, cores, measured speed, compiler."""

import os
import platform
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import hardware, limits
from nanochat.common import UsageError
from nanochat.model.build import meta_model
from nanochat.run import compiler
from nanochat.run.flags import FLAGS
from nanochat.run.memory import MEMORY_SHARE, StepMemory
from nanochat.run.plan import model_config

# Models for which the rows per pass are estimated, all with train.py's default shape.
DEPTHS = (4, 8, 12, 16, 20, 24, 32)
# The largest vocabulary that train.py derives, and so the largest memory.
VOCAB_SIZE = 32768
# Where the estimate stops: enough to show that memory is not the limit.
MOST_ROWS = 512


@dataclass(frozen=True)
class GpuFacts:
    """One CUDA device. capability: such as "9.0"."""

    name: str
    memory_bytes: int
    free_memory_bytes: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """What training would run on. device: the device type that train.py picks. rows_that_fit:
    {depth: rows per pass}, 0 where not even one fits, None off CUDA. matmul_flops: measured FLOP/s
    by dtype, None for one that the device cannot multiply. compiler_problem: why torch.compile
    cannot be used, or None. cores: of the machine's cpu_count those that may be used. memory_limit:
    what keeps memory of the machine from being used, "" if nothing does."""

    device: str
    gpus: list[GpuFacts]
    dtype: str
    dtype_reason: str
    cpu: str
    cpu_count: int
    cores: int
    threads: int
    bf16_cpu: bool
    free_memory_bytes: int
    memory_limit: str
    cuda_build: str | None
    rows_that_fit: dict[int, int] | None
    matmul_flops: dict[str, float | None]
    compiler_problem: str | None


def examine_machine(quick: bool) -> Machine:
    """The facts about this machine. quick: no trial compilation, and smaller matrix products; only
    the trial changes anything: it fills the cache of compiled kernels.

    A broken installation of torch can raise anything."""
    device_type = hardware.pick_device_type("")
    device = torch.device(device_type)
    dtype, reason = hardware.pick_dtype("auto", device_type, training=True)
    bf16_cpu = hardware.cpu_multiplies_bf16()
    free_memory_bytes = hardware.free_memory(device)
    gpus = []
    # Estimated for GPUs only: on a CPU the compiler and the data take memory that is not counted.
    rows = None
    if device_type == "cuda":
        gpus = [gpu_facts(index) for index in range(torch.cuda.device_count())]
        rows = rows_that_fit(free_memory_bytes, dtype)
    threads = hardware.limit_threads()
    flops = measured_flops(device, quick, bf16_cpu)
    return Machine(
        device=device_type,
        gpus=gpus,
        dtype=str(dtype).removeprefix("torch."),
        dtype_reason=reason,
        cpu=cpu_name(),
        cpu_count=os.cpu_count() or 1,
        cores=limits.available_cpus(),
        threads=threads,
        bf16_cpu=bf16_cpu,
        free_memory_bytes=free_memory_bytes,
        memory_limit="" if device_type == "cuda" else limits.free_memory().limit,
        cuda_build=torch.version.cuda,
        rows_that_fit=rows,
        matmul_flops=flops,
        compiler_problem=compiler_problem(device_type, quick),
    )


def gpu_facts(index: int) -> GpuFacts:
    """The facts about one CUDA device."""
    free, total = torch.cuda.mem_get_info(index)
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return GpuFacts(torch.cuda.get_device_name(index), total, free, capability)


def rows_that_fit(free_bytes: int, dtype: torch.dtype) -> dict[int, int]:
    """{depth: the largest power of two of rows per pass} that a GPU with so much free memory is
    estimated to take, with train.py's default shape; 0: not even one row."""
    defaults = {name: row.default for name, row in FLAGS.items()}
    fitting = {}
    for depth in DEPTHS:
        config = model_config(Namespace(**(defaults | {"depth": depth})), VOCAB_SIZE)
        parameters = meta_model(config).count_parameters()
        memory = StepMemory(config, parameters, dtype, "sdpa", device_type="cuda")
        rows = MOST_ROWS
        while rows and memory.tensor_bytes(rows) > MEMORY_SHARE["cuda"] * free_bytes:
            rows //= 2
        fitting[depth] = rows
    return fitting


def measured_flops(device: torch.device, quick: bool, bf16_cpu: bool) -> dict[str, float | None]:
    """FLOP/s of a square matrix product by dtype; None for a dtype that the device refuses."""
    on_cpu = device.type == "cpu"
    names = ["float32", "bfloat16"]
    if device.type == "cuda":
        names.append("float16")
    flops: dict[str, float | None] = {}
    for name in names:
        # Without bf16 instructions a CPU takes seconds for a large product.
        small = quick or (on_cpu and name == "bfloat16" and not bf16_cpu)
        n = 1024 if small else 4096
        if on_cpu:
            n //= 2
        # Not every device multiplies every dtype, and what torch raises then differs.
        try:
            flops[name] = hardware.matmul_flops(device, hardware.DTYPES[name], n, repeats=2)
        except Exception:
            flops[name] = None
    return flops


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found.group(1).strip() if found else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def compiler_problem(device_type: str, quick: bool) -> str | None:
    """Why torch.compile cannot be used, or None, for the reason that training would name. quick:
    only looks for the tools."""
    if quick:
        return compiler.missing(device_type)
    try:
        hardware.prepare(device_type)
    except UsageError as error:
        return f"there is no folder for compiled kernels ({error})"
    return compiler.problem(device_type)
