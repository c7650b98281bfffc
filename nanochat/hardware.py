"""The machine: choice of device and dtype, deterministic set-up, speed, memory.

Nothing is probed at import. `device_type` is "cuda", "mps" or "cpu" throughout."""

import contextlib
import ctypes
import itertools
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import limits, locks
from nanochat.common import UsageError, note_once, own_cache


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet describes it.

    peak_flops: dense, per second, in bf16; before SM80, which has no bf16, in fp16 with fp32 sums.
    capability: (major, minor); (7, 5) is SM75. memory_bandwidth: bytes per second. link_bandwidth:
    bytes per second to the other GPUs of its node, both directions together, as data sheets print
    it: NVLink where all GPUs of a node are connected by it, else PCIe with 16 lanes."""

    peak_flops: float
    memory_bytes: float
    capability: tuple[int, int]
    memory_bandwidth: float
    link_bandwidth: float


# Generations of the links: both directions together, as data sheets print them.
PCIE = {3: 32e9, 4: 64e9, 5: 128e9}
NVLINK = {2: 300e9, 3: 600e9, 4: 900e9, 5: 1800e9}
# Sold with fewer links than its generation has.
NVLINK_EXPORT = 400e9
# Keys are whole words of the name that CUDA reports. Source: NVIDIA data sheets.
GPUS = {
    "B300": Gpu(2250e12, 270e9, (10, 3), 8000e9, NVLINK[5]),
    "GB300": Gpu(2250e12, 270e9, (10, 3), 8000e9, NVLINK[5]),
    "B200": Gpu(2250e12, 180e9, (10, 0), 8000e9, NVLINK[5]),
    "GB200": Gpu(2250e12, 186e9, (10, 0), 8000e9, NVLINK[5]),
    "GH200": Gpu(989e12, 96e9, (9, 0), 4000e9, NVLINK[4]),
    "H200": Gpu(989e12, 141e9, (9, 0), 4800e9, NVLINK[4]),
    "H100": Gpu(989e12, 80e9, (9, 0), 3350e9, NVLINK[4]),
    "H100 NVL": Gpu(835e12, 94e9, (9, 0), 3900e9, PCIE[5]),
    "H100 PCIe": Gpu(756e12, 80e9, (9, 0), 2000e9, PCIE[5]),
    "H800": Gpu(989e12, 80e9, (9, 0), 3350e9, NVLINK_EXPORT),
    "A100": Gpu(312e12, 80e9, (8, 0), 2039e9, NVLINK[3]),
    "A800": Gpu(312e12, 80e9, (8, 0), 2039e9, NVLINK_EXPORT),
    "A40": Gpu(149.7e12, 48e9, (8, 6), 696e9, PCIE[4]),
    "A30": Gpu(165e12, 24e9, (8, 0), 933e9, PCIE[4]),
    "RTX A6000": Gpu(154.8e12, 48e9, (8, 6), 768e9, PCIE[4]),
    "A10": Gpu(125e12, 24e9, (8, 6), 600e9, PCIE[4]),
    "A10G": Gpu(70e12, 24e9, (8, 6), 600e9, PCIE[4]),
    "L40S": Gpu(362e12, 48e9, (8, 9), 864e9, PCIE[4]),
    "L4": Gpu(121e12, 24e9, (8, 9), 300e9, PCIE[4]),
    "RTX 5090": Gpu(209.5e12, 32e9, (12, 0), 1792e9, PCIE[5]),
    "RTX 4090": Gpu(165.2e12, 24e9, (8, 9), 1008e9, PCIE[4]),
    "RTX 4080": Gpu(97.5e12, 16e9, (8, 9), 717e9, PCIE[4]),
    "RTX 3090": Gpu(71e12, 24e9, (8, 6), 936e9, PCIE[4]),
    "RTX 3080": Gpu(59.5e12, 10e9, (8, 6), 760e9, PCIE[4]),
    "V100": Gpu(125e12, 16e9, (7, 0), 900e9, NVLINK[2]),
    "V100-PCIE": Gpu(112e12, 16e9, (7, 0), 900e9, PCIE[3]),
    "T4": Gpu(65e12, 16e9, (7, 5), 320e9, PCIE[3]),
    "RTX 2080 Ti": Gpu(53.8e12, 11e9, (7, 5), 616e9, PCIE[3]),
}
# Rows of the square products whose best speed counts as a device's peak.
PEAK_SIZES = (2048, 4096)
# Up to here the C library takes memory from what it holds, where memory is scarce.
SMALL_TENSOR_BYTES = 1 << 16
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# For tests: CPUs multiply fp16 a thousand times slower than bf16 (runs/LOG.md).
FP16_ON_CPU = False


# ---- choices ----


def listed_gpu(name: str) -> Gpu | None:
    """The Gpu whose listed name occurs in `name` as whole words, the longest if several do."""
    found = [key for key in GPUS if re.search(rf"\b{re.escape(key)}\b", name, re.IGNORECASE)]
    return GPUS[max(found, key=len)] if found else None


def pick_device_type(requested: str) -> str:
    """The requested device type, or if it is "" the first that exists of cuda, mps and cpu.

    Raises UsageError if the requested one does not exist."""
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    available = [name for name in present if present[name]]
    if not requested:
        return available[0]
    if not present[requested]:
        raise UsageError(
            f"--device-type={requested}: this machine, or this build of torch {torch.__version__}, "
            f"does not have it (available: {', '.join(available)}); leave the flag out"
        )
    return requested


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix or dot-product instructions (AMX, AVX512-BF16) and this
    torch uses them."""
    # Private functions of torch, which a later version may rename: then the answer is no.
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    avx512_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return bool((amx or avx512_bf16) and torch.backends.mkldnn.is_available())


def pick_dtype(
    requested: str,
    device_type: str,
    training: bool = False,
    capability: tuple[int, int] | None = None,
) -> tuple[torch.dtype, str]:
    """(compute dtype, reason) for --dtype; "auto" is bf16 where the hardware multiplies it fast.

    SM70 to SM75 multiply only fp16 fast. There, training, which can scale its loss, runs in fp16;
    everything else runs in fp32, because weights that were trained in bf16 may exceed fp16's range.

    capability: of the GPU that is planned for; None is this machine's. Raises UsageError for
    float16 on anything but CUDA."""
    if requested == "float16" and device_type != "cuda" and not FP16_ON_CPU:
        raise UsageError(
            f"--dtype=float16: needs a CUDA device (this is {device_type}, which multiplies fp16 "
            f"slowly or not at all); use bfloat16 or float32"
        )
    if device_type == "cuda":
        return _pick_cuda_dtype(requested, training, capability or _capability())
    if requested != "auto":
        return DTYPES[requested], "as requested"
    if device_type == "cpu" and cpu_multiplies_bf16():
        return torch.bfloat16, "this CPU has bf16 instructions (AMX or AVX512-BF16)"
    return torch.float32, f"no fast bf16 on this {device_type}"


def _pick_cuda_dtype(
    requested: str, training: bool, capability: tuple[int, int]
) -> tuple[torch.dtype, str]:
    major, minor = capability
    no_bf16 = f"SM{major}{minor} has no bf16 matrix instructions"
    if requested == "bfloat16" and major < 8:
        return torch.bfloat16, f"as requested, though {no_bf16}"
    if requested != "auto":
        return DTYPES[requested], "as requested"
    if major >= 8:
        return torch.bfloat16, f"SM{major}{minor} multiplies bf16"
    if training and major == 7:
        return torch.float16, f"{no_bf16} and multiplies fp16"
    return torch.float32, no_bf16


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


# ---- set-up ----


def set_determinism(device_type: str) -> None:
    """Same seed, same bits: deterministic algorithms, without the cost of filling fresh memory."""
    if device_type == "cuda":
        # cuBLAS is deterministic only with a workspace of fixed size (its documentation).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Partial sums of one product, which cuBLAS would otherwise round to bf16 in between.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def prepare(device_type: str) -> None:
    """Set this process up for training: kernel cache, determinism, threads, memory.

    Call it before the first tensor is created."""
    ignore_unusable_kernel_cache()
    # Under the base dir, so that a second start is warm. Before set_determinism(): that loads
    # inductor, which would choose a place of its own, below the folder of temporary files; it may
    # do so where compiled code could not be written to this one or loaded from it.
    cache = own_cache("compile")
    if _holds_code(cache):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    set_determinism(device_type)
    limit_threads()
    # Processes of the compiler.
    config = torch._inductor.config
    config.compile_threads = min(config.compile_threads, limits.available_cpus())
    if device_type == "cpu":
        set_up_heap(keeps_freed=True)
    # The profiler, which counts memory, would log when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Blocks of several kinds share one function; the limit of 8 versions would silently leave some
    # of them uncompiled.
    torch._dynamo.config.recompile_limit = 64


def ignore_unusable_kernel_cache() -> None:
    """Unset TORCHINDUCTOR_CACHE_DIR, with one line, if that folder cannot be created: torch creates
    it as soon as a part of its compiler is imported, and fails with a traceback."""
    # "" would be the current folder to torch
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or None
    try:
        if given:
            os.makedirs(given, exist_ok=True)
    except OSError as error:
        note_once(
            f"TORCHINDUCTOR_CACHE_DIR={given}: cannot be created ({error.strerror}) and is ignored"
        )
        given = None
    if given is None:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


def _holds_code(folder: Path) -> bool:
    """Whether inductor can write code into a folder, lock it, and load it from there."""
    # It splits command lines at blanks that it did not quote.
    if needs_quotes(folder):
        return False
    # a disk that is full, for example
    with contextlib.suppress(OSError):
        return locks.exist_in(folder) and not os.statvfs(folder).f_flag & os.ST_NOEXEC
    return False


def needs_quotes(path: str | os.PathLike) -> bool:
    """Whether a path holds blanks, quotes or backslashes, which a shell does not take as they
    are."""
    return re.search(r"[\s'\"\\]", os.fspath(path)) is not None


def limit_threads() -> int:
    """Let torch use no more threads than this process has cores; returns their number.

    torch counts the cores of the machine, of which a container may have one: its threads would
    spend their time waiting for each other. OMP_NUM_THREADS, which torchrun sets, is obeyed."""
    cores = limits.available_cpus()
    # Where nothing is limited nothing is changed, since the number of threads changes sums.
    if "OMP_NUM_THREADS" not in os.environ and cores < torch.get_num_threads():
        torch.set_num_threads(cores)
    return torch.get_num_threads()


def set_up_heap(keeps_freed: bool) -> bool:
    """Let the C library keep freed memory, or return that of all but small tensors to the system at
    once. True where that is possible (glibc).

    By default each tensor of 32 MiB and more is fresh memory, whose pages the kernel must clear and
    map on first use, every step: writing 32 MiB then takes 17 ms instead of 2 ms (runs/LOG.md).
    What is kept lies in pieces, though: where weights come and go all the time, as with --shard,
    the process grows to several times what it uses. May be called again."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # malloc.h
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    M_MMAP_MAX = -4
    if keeps_freed:
        return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
    # Given, since the library would raise it to the largest tensor that was freed.
    return bool(mallopt(M_MMAP_MAX, 1 << 16) and mallopt(M_MMAP_THRESHOLD, SMALL_TENSOR_BYTES))


# ---- speed ----


def synchronize(device_type: str) -> None:
    """Wait for the device, so that a clock read afterwards covers the work before it."""
    if device_type == "cuda":
        torch.cuda.synchronize()
    elif device_type == "mps":
        torch.mps.synchronize()


def matmul_flops(device: torch.device, dtype: torch.dtype, n: int, repeats: int) -> float:
    """Best measured FLOP/s of an n x n x n product in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator).to(device, dtype)
    b = torch.randn(n, n, generator=generator).to(device, dtype)
    best = float("inf")
    # One more than asked for: the first warms up, and taking the minimum discards it.
    for _ in range(repeats + 1):
        synchronize(device.type)
        start = time.perf_counter()
        a @ b
        synchronize(device.type)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_label(gpu: Gpu, name: str) -> str:
    """Describes a listed Gpu's peak_flops, for reports."""
    dtype = "bf16" if gpu.capability >= (8, 0) else "fp16"
    return f"listed {dtype} peak of {name}"


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of the square products of PEAK_SIZES."""
    sizes = PEAK_SIZES
    # Only the small one where the large one would take a second.
    if device.type == "cpu" and dtype != torch.bfloat16:
        sizes = PEAK_SIZES[:1]
    return max(matmul_flops(device, dtype, n, repeats=2) for n in sizes)


def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, label): the listed dense bf16 peak of a known GPU, otherwise a measured one.

    On hardware without bf16 matrix instructions it is the peak of the dtype that training uses
    there, fp16 or fp32; the label says which."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = listed_gpu(name)
        if known is not None:
            return known.peak_flops, peak_label(known, name)
    dtype, _ = pick_dtype("auto", device.type, training=True)
    return measured_peak(device, dtype), f"measured {str(dtype).removeprefix('torch.')} peak"


def compilations() -> int:
    """Graphs that torch.compile has compiled in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---- memory ----


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now on the device.

    Of the machine's memory only what control groups and resource limits leave to this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return limits.free_memory().free_bytes


def allocated_peak(function: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes of tensors during function(), beyond those that existed before; None on mps, where
    torch cannot count them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        return None
    # The CPU's allocator keeps no statistics, but the profiler sees every allocation.
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(itertools.accumulate((n_bytes for _, n_bytes in changes), initial=0))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: of the allocator on CUDA, elsewhere the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS reports bytes, Linux KiB.
    return peak if platform.system() == "Darwin" else peak * 1024


def describe(device: torch.device) -> dict[str, object]:
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
