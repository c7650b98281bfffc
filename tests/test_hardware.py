"""What is chosen for a machine: GPU data, dtype, threads; and what is measured on it."""

import os
import re
from types import SimpleNamespace

import pytest
import torch

from nanochat import common, hardware, limits, locks
from nanochat.common import UsageError
from nanochat.locks import Lock

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ---- the table of GPUs ----


@pytest.mark.parametrize(
    "reported, listed",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        # the longest name that matches, not the first
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        # whole words: an A10G is not an A10, an L40S not an L4, an RTX A4000 not an A40
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("nvidia geforce rtx 2080 ti", "RTX 2080 Ti"),
        ("Tesla V100-PCIE-16GB", "V100-PCIE"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_a_gpu_is_found_by_its_name(reported, listed):
    expected = hardware.GPUS[listed] if listed else None
    assert hardware.listed_gpu(reported) == expected


def test_the_table_is_plausible():
    for name, gpu in hardware.GPUS.items():
        assert 5e13 <= gpu.peak_flops <= 3e15, name
        assert 10e9 <= gpu.memory_bytes <= 300e9, name
        # all of the memory is read 3 to 80 times a second
        assert 3 <= gpu.memory_bandwidth / gpu.memory_bytes <= 80, name
        assert 32e9 <= gpu.link_bandwidth <= 1800e9, name
        assert (7, 0) <= gpu.capability <= (12, 0), name
        assert hardware.listed_gpu(f"NVIDIA {name}") == gpu


def test_a_listed_peak_names_its_dtype():
    assert hardware.peak_label(hardware.GPUS["T4"], "T4") == "listed fp16 peak of T4"
    assert hardware.peak_label(hardware.GPUS["L4"], "L4") == "listed bf16 peak of L4"


def test_the_peak_of_a_known_gpu_is_listed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    expected = (312e12, "listed bf16 peak of NVIDIA A100-SXM4-80GB")
    assert hardware.peak_flops(torch.device("cuda")) == expected


@pytest.mark.parametrize("bf16, dtype, sizes", [(True, BF16, (32, 64)), (False, FP32, (32,))])
def test_the_peak_of_a_cpu_is_measured(monkeypatch, bf16, dtype, sizes):
    """In the dtype that training uses; the large product is left out where it would be slow."""
    measured = []

    def matmul_flops(device, dtype, n, repeats):
        measured.append((dtype, n))
        return float(n)

    monkeypatch.setattr(hardware, "PEAK_SIZES", (32, 64))
    monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: bf16)
    monkeypatch.setattr(hardware, "matmul_flops", matmul_flops)
    label = f"measured {str(dtype).removeprefix('torch.')} peak"
    assert hardware.peak_flops(CPU) == (sizes[-1], label)
    assert measured == [(dtype, n) for n in sizes]


def test_the_speed_of_a_product():
    assert hardware.matmul_flops(CPU, FP32, 64, repeats=1) > 1e6


# ---- device and dtype ----


@pytest.mark.parametrize(
    "requested, cuda, mps, chosen",
    [
        ("", True, True, "cuda"),
        ("", False, True, "mps"),
        ("", False, False, "cpu"),
        ("cpu", True, True, "cpu"),
        ("mps", True, True, "mps"),
        ("cuda", True, False, "cuda"),
    ],
)
def test_device_type(monkeypatch, requested, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert hardware.pick_device_type(requested) == chosen


def test_a_device_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"--device-type=cuda: .*available: mps, cpu\); leave"):
        hardware.pick_device_type("cuda")


@pytest.mark.parametrize(
    "requested, device_type, capability, training, dtype, reason",
    [
        ("auto", "cuda", (9, 0), True, BF16, "SM90 multiplies bf16"),
        ("auto", "cuda", (8, 0), False, BF16, "SM80 multiplies bf16"),
        ("auto", "cuda", (7, 5), True, FP16, "SM75 has no bf16 .* and multiplies fp16"),
        ("auto", "cuda", (7, 0), True, FP16, "SM70 has no bf16 .* and multiplies fp16"),
        # weights that were trained in bf16 may exceed the range of fp16
        ("auto", "cuda", (7, 5), False, FP32, "SM75 has no bf16 matrix instructions"),
        ("auto", "cuda", (6, 1), True, FP32, "SM61 has no bf16 matrix instructions"),
        ("bfloat16", "cuda", (7, 5), True, BF16, "as requested, though SM75 has no bf16"),
        ("bfloat16", "cuda", (8, 6), True, BF16, "as requested"),
        ("float16", "cuda", (9, 0), True, FP16, "as requested"),
        ("float32", "cuda", (9, 0), True, FP32, "as requested"),
        ("auto", "mps", None, True, FP32, "no fast bf16 on this mps"),
        ("bfloat16", "mps", None, True, BF16, "as requested"),
        ("float32", "cpu", None, True, FP32, "as requested"),
        ("bfloat16", "cpu", None, False, BF16, "as requested"),
    ],
)
def test_dtype(requested, device_type, capability, training, dtype, reason):
    chosen, why = hardware.pick_dtype(requested, device_type, training, capability)
    assert chosen == dtype
    assert re.match(reason, why)


@pytest.mark.parametrize(
    "amx, avx512, mkldnn, dtype",
    [
        (True, False, True, BF16),
        (False, True, True, BF16),
        (False, False, True, FP32),
        (True, True, False, FP32),
    ],
)
def test_dtype_of_a_cpu(monkeypatch, amx, avx512, mkldnn, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert hardware.pick_dtype("auto", "cpu")[0] == dtype


def test_a_torch_without_the_private_checks_has_no_fast_bf16(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert hardware.cpu_multiplies_bf16() is False


@pytest.mark.parametrize("device_type", ["cpu", "mps"])
def test_fp16_needs_cuda(monkeypatch, device_type):
    monkeypatch.setattr(hardware, "FP16_ON_CPU", False)
    with pytest.raises(UsageError, match=f"--dtype=float16: .*this is {device_type}"):
        hardware.pick_dtype("float16", device_type)


# ---- set-up ----


def test_prepare(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "KINETO_LOG_LEVEL", "CUBLAS_WORKSPACE_CONFIG"):
        # set first: what was not set is not restored after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        hardware.prepare("cuda")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compile")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch._dynamo.config.recompile_limit == 64


def test_what_the_user_set_is_kept(monkeypatch, tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", elsewhere)
    hardware.prepare("mps")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == elsewhere


@pytest.mark.parametrize(
    "folder, flags, lock, used",
    [
        ("plain", 0, Lock.TAKEN, True),
        ("with blanks", 0, Lock.TAKEN, False),
        ("it's quoted", 0, Lock.TAKEN, False),
        ("mounted", os.ST_NOEXEC, Lock.TAKEN, False),
        ("lockless", 0, Lock.NONE, False),
    ],
)
def test_kernels_are_cached_where_code_can_be(monkeypatch, tmp_path, folder, flags, lock, used):
    """Elsewhere torch chooses a folder, below that of temporary files."""
    monkeypatch.setattr(locks, "take", lambda file, folder: lock)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / folder))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    hardware.prepare("mps")
    kept = str(tmp_path / folder / "compile") if used else None
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == kept


def test_kernels_are_not_cached_on_a_full_disk(monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(locks.tempfile, "TemporaryFile", full)
    hardware.prepare("mps")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_folder_of_kernels_that_cannot_be_created_is_ignored(monkeypatch, tmp_path, capfd):
    """torch would raise while a part of its compiler is imported, whatever the command is."""
    monkeypatch.setattr(common, "_noted", set())
    (tmp_path / "file").write_text("")
    for given, words in (("file", "File exists"), ("file/below", "Not a directory")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / given))
        hardware.ignore_unusable_kernel_cache()
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{given}: cannot be created ({words}) and is ignored" in line
    # torch would take the current folder
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    hardware.ignore_unusable_kernel_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "cores, threads, set_by_user, expected",
    [
        # what torch picks on a machine without limits stays, as the number changes sums
        (16, 8, None, 8),
        (8, 8, None, 8),
        (1, 8, None, 1),
        (1, 8, "8", 8),
    ],
)
def test_threads_follow_the_cores(monkeypatch, cores, threads, set_by_user, expected):
    used = [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    monkeypatch.setattr(limits, "available_cpus", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert hardware.limit_threads() == expected


def test_processes_of_the_compiler_follow_the_cores(monkeypatch):
    monkeypatch.setattr(limits, "available_cpus", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch._inductor.config.patch(compile_threads=12):
        hardware.prepare("mps")
        assert torch._inductor.config.compile_threads == 3


def test_memory_is_kept_only_by_glibc(monkeypatch):
    monkeypatch.setattr(hardware.platform, "libc_ver", lambda: ("", ""))
    assert hardware.set_up_heap(keeps_freed=True) is False


# ---- memory ----


def test_free_memory(monkeypatch):
    monkeypatch.setattr(limits, "free_memory", lambda: limits.FreeMemory(5, "a limit"))
    assert hardware.free_memory(CPU) == 5
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert hardware.free_memory(torch.device("cuda")) == 7


def test_allocated_peak_on_a_cpu():
    """Tensors that exist together count, those that come one after another do not; what was there
    before does not count either."""
    size = 1 << 20
    before = torch.ones(size, dtype=torch.uint8)

    def together():
        first = torch.empty(size, dtype=torch.uint8)
        second = torch.empty(2 * size, dtype=torch.uint8)
        return first, second

    def in_turn():
        for _ in range(3):
            before.clone()

    assert hardware.allocated_peak(together, CPU) == 3 * size
    assert hardware.allocated_peak(in_turn, CPU) == size
    assert hardware.allocated_peak(lambda: None, CPU) == 0
    assert hardware.allocated_peak(lambda: before.sum(), torch.device("mps")) is None


def test_peak_memory_of_this_process(monkeypatch):
    linux = hardware.peak_memory_bytes(CPU)
    # a process with torch takes more than 50 MiB
    assert linux > 50 << 20
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 11)
    assert hardware.peak_memory_bytes(torch.device("cuda")) == 11


def test_description_of_a_machine():
    facts = hardware.describe(CPU)
    assert facts["device_type"] == "cpu" and facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert set(facts) == {
        "device_type",
        "cpu_count",
        "threads",
        "machine",
        "system",
        "python",
        "torch",
        "cpu_capability",
    }
