"""The machine: device and dtype choice, deterministic set-up, compiler check, peak FLOP/s, memory. Probes only when called."""

import itertools
import os
import platform
import re
import shutil
import sysconfig
import time
from typing import NamedTuple

import torch

from nanochat.common import UsageError, base_dir


class Gpu(NamedTuple):
    """A GPU as its data sheet has it. peak_flops: dense, in bf16; in fp16 (sums in fp32) where there is no bf16, before SM80."""

    peak_flops: float
    memory_bytes: float
    capability: tuple  # (major, minor): (7, 5) is SM75


# By name, as a whole word of what CUDA reports. Source: NVIDIA data sheets.
GPUS = {
    "B200": Gpu(2250e12, 180e9, (10, 0)),
    "H200": Gpu(989e12, 141e9, (9, 0)),
    "H100": Gpu(989e12, 80e9, (9, 0)),
    "H100 NVL": Gpu(835e12, 94e9, (9, 0)),
    "H100 PCIe": Gpu(756e12, 80e9, (9, 0)),
    "H800": Gpu(989e12, 80e9, (9, 0)),
    "A100": Gpu(312e12, 80e9, (8, 0)),
    "A800": Gpu(312e12, 80e9, (8, 0)),
    "A40": Gpu(149.7e12, 48e9, (8, 6)),
    "A30": Gpu(165e12, 24e9, (8, 0)),
    "A10": Gpu(125e12, 24e9, (8, 6)),
    "A10G": Gpu(70e12, 24e9, (8, 6)),
    "L40S": Gpu(362e12, 48e9, (8, 9)),
    "L4": Gpu(121e12, 24e9, (8, 9)),
    "RTX 5090": Gpu(209.5e12, 32e9, (12, 0)),
    "RTX 4090": Gpu(165.2e12, 24e9, (8, 9)),
    "RTX 4080": Gpu(97.5e12, 16e9, (8, 9)),
    "RTX 3090": Gpu(71e12, 24e9, (8, 6)),
    "RTX 3080": Gpu(59.5e12, 10e9, (8, 6)),
    "V100": Gpu(125e12, 16e9, (7, 0)),
    "V100-PCIE": Gpu(112e12, 16e9, (7, 0)),
    "T4": Gpu(65e12, 16e9, (7, 5)),
    "RTX 2080 Ti": Gpu(53.8e12, 11e9, (7, 5)),
}
PEAK_SIZES = (2048, 4096)  # rows of the products whose best speed is a device's peak
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FP16_ON_CPU = False  # for tests: CPUs multiply fp16 a thousand times slower than bf16 (runs/LOG.md)


def listed_gpu(name):
    """The Gpu whose longest listed name stands in `name` as whole words, or None."""
    found = [key for key in GPUS if re.search(rf"\b{re.escape(key)}\b", name, re.IGNORECASE)]
    return GPUS[max(found, key=len)] if found else None


def pick_device_type(requested):
    """'cuda', 'mps' or 'cpu': the requested one, or the first that is present. Raises UsageError if it is absent."""
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not requested:
        return next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[requested]:
        have = ", ".join(name for name in present if present[name])
        raise UsageError(
            f"--device-type={requested}: this machine or build of torch {torch.__version__} has none "
            f"(here: {have}); leave the flag out to autodetect"
        )
    return requested


def cpu_multiplies_bf16():
    """True when this CPU has bf16 matrix or dot-product instructions (AMX, AVX512-BF16) and this torch uses them."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    avx512_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return bool((amx or avx512_bf16) and torch.backends.mkldnn.is_available())


def pick_dtype(requested, device_type, training=False, capability=None):
    """(compute dtype, reason): bf16 where the hardware multiplies it fast. Where that is true of fp16 alone (SM70 to SM75), training,
    which can scale its loss, is in fp16; weights that may have been trained in bf16 could exceed its range, so all else is in fp32.

    capability: (major, minor) of the GPU, if not that of this machine's. Raises UsageError for float16 without CUDA."""
    if requested == "float16" and device_type != "cuda" and not FP16_ON_CPU:
        raise UsageError(
            f"--dtype=float16: for CUDA devices (this is {device_type}, which multiplies it slowly or not at all); use "
            f"bfloat16 or float32"
        )
    if device_type == "cuda":
        major, minor = capability or torch.cuda.get_device_capability()
        no_bf16 = f"SM{major}{minor} has no bf16 matrix instructions"
        if requested == "auto" and major >= 8:
            return torch.bfloat16, f"SM{major}{minor} multiplies bf16"
        if requested == "auto":
            return (
                (torch.float16, f"{no_bf16} and multiplies fp16")
                if training and major == 7
                else (torch.float32, no_bf16)
            )
        if requested == "bfloat16" and major < 8:
            return torch.bfloat16, f"as requested, though {no_bf16}"
    if requested != "auto":
        return DTYPES[requested], "as requested"
    if device_type == "cpu" and cpu_multiplies_bf16():
        return torch.bfloat16, "this CPU has bf16 instructions (AMX or AVX512-BF16)"
    return torch.float32, f"no fast bf16 on this {device_type}"


def set_determinism(device_type):
    """Same seed, same bits: deterministic algorithms on, without the cost of filling fresh memory."""
    if device_type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def compiler_missing(device_type):
    """Why torch.compile cannot be used here, or None. Checks the tools, compiles nothing."""
    if device_type == "mps":
        return "torch.compile is not reliable on mps"
    if device_type == "cuda":
        try:
            import triton  # noqa: F401  (inductor's CUDA back end)
        except ImportError:
            return "triton is not installed (pip install triton)"
        major, minor = torch.cuda.get_device_capability()
        if major < 7:
            return f"SM{major}{minor} is older than what triton compiles for (SM70)"
    language, variable, usual, other = (
        ("C++", "CXX", "g++", "clang++") if device_type == "cpu" else ("C", "CC", "gcc", "clang")
    )
    compiler = os.environ.get(variable) or usual
    if not (shutil.which(compiler) or shutil.which(other)):
        return f"no {language} compiler ({compiler}) on PATH"
    header = os.path.join(
        sysconfig.get_paths()["include"], "Python.h"
    )  # triton compiles what launches its kernels with it
    return None if os.path.exists(header) else "Python.h is missing (the python3-dev package)"


def prepare(device_type):
    """Set this process up for training: kernel cache, determinism, memory. To be called before the first tensor is made."""
    # under the base dir, so that a second start is warm; before set_determinism(), which loads inductor, which would choose a place
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base_dir() / "compile"))
    set_determinism(device_type)
    if device_type == "cpu":
        keep_freed_memory()
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # the profiler, which counts memory, would say when it starts and stops
    # blocks of several kinds share one function; the limit of 8 versions would leave some of them uncompiled without a word
    torch._dynamo.config.recompile_limit = 64


def keep_freed_memory():
    """Let the C library keep what is freed instead of giving it back to the system. True where that is possible (glibc).

    By default each tensor of 32 MiB and more is fresh memory, whose pages the kernel must clear and map on first use, every
    step: writing 32 MiB takes 17 ms so and 2 ms otherwise (runs/LOG.md). The process stays as large as it once was."""
    if platform.libc_ver()[0] != "glibc":
        return False
    import ctypes

    mallopt = ctypes.CDLL(None).mallopt
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def synchronize(device_type):
    """Wait for the device, so that a clock read afterwards covers the work before it."""
    if device_type == "cuda":
        torch.cuda.synchronize()
    elif device_type == "mps":
        torch.mps.synchronize()


def matmul_flops(device, dtype, n, repeats):
    """Best measured FLOP/s of an n x n x n product in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first run warms up; taking the minimum discards it
        synchronize(device.type)
        start = time.perf_counter()
        a @ b
        synchronize(device.type)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_label(gpu, name):
    """What the peak of a listed Gpu is called."""
    return f"listed {'bf16' if gpu.capability >= (8, 0) else 'fp16'} peak of {name}"


def measured_peak(device, dtype):
    """FLOP/s of the fastest of square products of PEAK_SIZES; of the small one where products are so slow that it takes a second."""
    slow = device.type == "cpu" and dtype != torch.bfloat16
    return max(
        matmul_flops(device, dtype, n, repeats=2) for n in (PEAK_SIZES[:1] if slow else PEAK_SIZES)
    )


def peak_flops(device):
    """(FLOP/s, label): the listed dense bf16 peak of a known GPU, otherwise a measured one (best of n = 2048 and 4096).

    Where bf16 has no matrix instructions it is that of fp16 or fp32, in which training runs there, and the label says so."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if (known := listed_gpu(name)) is not None:
            return known.peak_flops, peak_label(known, name)
    dtype, _ = pick_dtype("auto", device.type, training=True)
    return measured_peak(device, dtype), f"measured {str(dtype).removeprefix('torch.')} peak"


def free_memory(device):
    """Bytes that could be allocated now on the device (CPU: MemAvailable, or the physical size where that is unknown)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return next(
                int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def allocated_peak(function, device):
    """Bytes of tensors that function() had at most beyond those that were there before; None where that is not known (mps)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        return None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(itertools.accumulate((n for _, n in changes), initial=0))


def compilations():
    """Graphs that torch.compile has made in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def peak_memory_bytes(device):
    """Peak bytes so far: allocator peak on CUDA, resident set of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def is_out_of_memory(error):
    """True for the exceptions with which torch reports that an allocation failed, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error)
        for text in (
            "can't allocate memory",
            "MPS backend out of memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
        )
    )


def describe(device):
    """What runs here, for config.json: names, counts, versions. No host names or paths."""
    facts = {
        "device_type": device.type,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts.update(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
    else:
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return facts
