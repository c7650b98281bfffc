"""What a process may use, after made-up control groups and resource limits, and what is raised
when memory ends."""

import errno
import os
import resource

import pytest
import torch

import train
from nanochat import limits
from nanochat.__main__ import main
from nanochat.apps import runs
from nanochat.common import TrainingFailed
from nanochat.limits import FreeMemory
from nanochat.signals import Stopped

MiB = 2**20
# What systems write where there is no limit.
UNLIMITED_V1 = 9223372036854771712
V1_MOUNTS = """\
30 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:32 / /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory
33 30 0:33 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
"""
V1_GROUPS = "5:memory:/user/job\n4:cpu,cpuacct:/user/job\n3:name=systemd:/\n0::/\n"
V2_MOUNTS = "30 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V2_GROUPS = "0::/user/job\n"
# Inside a container without a name space of its own for control groups.
DOCKER_MOUNTS = "30 23 0:28 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
BLANK_MOUNTS = "30 23 0:28 / /sys/fs/c\\040groups rw - cgroup2 cgroup2 rw\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that makes up the files of a system with 8 GiB and 16 cores, without ulimits;
    returns its root. files: {path under /sys/fs: content}."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)

    def build(groups="", mounts="", files=None):
        content = {
            "proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable: {8 * 2**20} kB\n",
            "proc/self/status": "Name:\tpython\nVmSize:\t  1024 kB\nVmData:\t  512 kB\n",
            "proc/self/cgroup": groups,
            "proc/self/mountinfo": mounts,
        }
        content |= {f"sys/fs/{path}": text for path, text in (files or {}).items()}
        for path, text in content.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}")
        return tmp_path

    return build


def v1(group, limit, used, cache=0):
    folder = f"cgroup/memory{group}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {cache}\n",
    }


def v2(group, limit, used, cache=0, high="max", folder="cgroup"):
    folder = f"{folder}{group}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


# An own limit above that of the group around it.
NESTED = v2("/user/job", 900 * MiB, 100 * MiB) | v2("/user", 500 * MiB, 300 * MiB)


@pytest.mark.parametrize(
    "groups, mounts, files, free_mib, limit_mib",
    [
        ("", "", {}, 8192, None),
        (V1_GROUPS, V1_MOUNTS, v1("/user/job", 1536 * MiB, 500 * MiB, 100 * MiB), 1136, 1536),
        (V1_GROUPS, V1_MOUNTS, v1("/user", 1536 * MiB, 500 * MiB), 1036, 1536),
        (V1_GROUPS, V1_MOUNTS, v1("/user/job", UNLIMITED_V1, 500 * MiB), 8192, None),
        # of another group
        (V1_GROUPS, V1_MOUNTS, v1("/other", 1, 0), 8192, None),
        (V2_GROUPS, V2_MOUNTS, v2("/user/job", 1536 * MiB, 500 * MiB, 100 * MiB), 1136, 1536),
        (V2_GROUPS, V2_MOUNTS, v2("/user/job", "max", 500 * MiB), 8192, None),
        (V2_GROUPS, V2_MOUNTS, v2("/user/job", "max", MiB, high=101 * MiB), 100, 101),
        (V2_GROUPS, V2_MOUNTS, NESTED, 200, 500),
        # beyond a limit that was lowered while more was in use
        (V2_GROUPS, V2_MOUNTS, v2("", 100 * MiB, 120 * MiB), 0, 100),
        ("0::/\n", V2_MOUNTS, v2("", 300 * MiB, 100 * MiB), 200, 300),
        ("0::/docker/abc\n", DOCKER_MOUNTS, v2("", 300 * MiB, 100 * MiB), 200, 300),
        ("0::/docker/abc/job\n", DOCKER_MOUNTS, v2("/job", 300 * MiB, 100 * MiB), 200, 300),
        # a process that was moved out of the subtree that it sees
        ("0::/../../other\n", V2_MOUNTS, v2("", 300 * MiB, 100 * MiB), 200, 300),
        ("0::/\n", BLANK_MOUNTS, v2("", 300 * MiB, 0, folder="c groups"), 300, 300),
    ],
)
def test_free_memory(system, groups, mounts, files, free_mib, limit_mib):
    text = f"control group limit of {limit_mib}.0 MiB"
    if limit_mib is None:
        text = ""
    elif limit_mib >= 1024:
        text = f"control group limit of {limit_mib / 1024:.1f} GiB"
    assert limits.free_memory(system(groups, mounts, files)) == FreeMemory(free_mib * MiB, text)


@pytest.mark.parametrize(
    "kind, limit, free, text",
    [
        (resource.RLIMIT_AS, 5 * MiB, 4 * MiB, "ulimit -v of 5.0 MiB"),
        (resource.RLIMIT_DATA, 5 * MiB, 4.5 * MiB, "ulimit -d of 5.0 MiB"),
        (resource.RLIMIT_DATA, 0, 0, "ulimit -d of 0 B"),
        (resource.RLIMIT_AS, 2**40, 2**33, ""),
    ],
)
def test_ulimits(system, monkeypatch, kind, limit, free, text):
    infinite = resource.RLIM_INFINITY
    monkeypatch.setattr(
        resource, "getrlimit", lambda asked: (limit if asked == kind else infinite, 0)
    )
    assert limits.free_memory(system()) == FreeMemory(free, text)


@pytest.mark.parametrize("meminfo", [None, "MemTotal: 5 kB\n"])
def test_a_system_that_does_not_report_its_free_memory(system, meminfo):
    root = system()
    (root / "proc/meminfo").unlink()
    if meminfo:
        (root / "proc/meminfo").write_text(meminfo)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert limits.free_memory(root) == FreeMemory(physical, "")


@pytest.mark.parametrize(
    "groups, mounts, files, cores",
    [
        ("", "", {}, 16),
        (V2_GROUPS, V2_MOUNTS, {"cgroup/user/job/cpu.max": "max 100000\n"}, 16),
        (V2_GROUPS, V2_MOUNTS, {"cgroup/user/job/cpu.max": "100000 100000\n"}, 1),
        (V2_GROUPS, V2_MOUNTS, {"cgroup/user/job/cpu.max": "250000 100000\n"}, 3),
        (V2_GROUPS, V2_MOUNTS, {"cgroup/user/job/cpu.max": "10000 100000\n"}, 1),
        (V2_GROUPS, V2_MOUNTS, {"cgroup/user/job/cpu.max": "9900000 100000\n"}, 16),
        (V2_GROUPS, V2_MOUNTS, {"cgroup/user/cpu.max": "200000 100000\n"}, 2),
        (
            V1_GROUPS,
            V1_MOUNTS,
            {
                "cgroup/cpu,cpuacct/user/job/cpu.cfs_quota_us": "150000\n",
                "cgroup/cpu,cpuacct/user/job/cpu.cfs_period_us": "50000\n",
            },
            3,
        ),
        (
            V1_GROUPS,
            V1_MOUNTS,
            {
                "cgroup/cpu,cpuacct/user/job/cpu.cfs_quota_us": "-1\n",
                "cgroup/cpu,cpuacct/user/job/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
    ],
)
def test_available_cpus(system, groups, mounts, files, cores):
    assert limits.available_cpus(system(groups, mounts, files)) == cores


def test_the_affinity_mask_counts(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert limits.available_cpus(system()) == 2
    # macOS has none
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert limits.available_cpus(system()) == 7


def test_this_machine():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < limits.free_memory().free_bytes <= physical
    assert 1 <= limits.available_cpus() <= os.cpu_count()


# ---- lack of memory ----


def caused_by(error, cause=None, **attributes):
    """An exception with a cause or other attributes, as a wrapper sets them."""
    error.__cause__ = cause
    vars(error).update(attributes)
    return error


NO_MEMORY = MemoryError("std::bad_alloc")


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried 1 byte"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), True),
        # oneDNN
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not execute a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        # threads and processes
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("pthread_create failed: Resource temporarily unavailable"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("unable to mmap 9 bytes from file <f>: Cannot allocate memory (12)"), True),
        # the compiler, by its words or by what it wraps
        (RuntimeError("C++ compile error\ncc1plus: out of memory allocating 65536 bytes"), True),
        (RuntimeError("virtual memory exhausted: Cannot allocate memory"), True),
        (caused_by(RuntimeError("backend raised"), inner_exception=NO_MEMORY), True),
        (caused_by(RuntimeError("a"), caused_by(RuntimeError("b"), NO_MEMORY)), True),
        # a signal, or this program's own conclusion, while an error of memory is handled
        (caused_by(Stopped(), NO_MEMORY), False),
        (caused_by(TrainingFailed("the disk is full"), NO_MEMORY), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (ImportError("No module named 'x'"), False),
    ],
)
def test_out_of_memory(monkeypatch, error, expected):
    monkeypatch.setattr(limits, "free_memory", lambda: FreeMemory(9, "ulimit -v of 9 B"))
    assert limits.is_out_of_memory(error) is expected


def test_out_of_memory_behind_another_exception():
    """As its context; not where whoever raised the second one hid the first."""
    second = RuntimeError("second")
    second.__context__ = MemoryError()
    assert limits.is_out_of_memory(second)
    # as `raise second from None` does
    second.__suppress_context__ = True
    assert not limits.is_out_of_memory(second)
    circle = RuntimeError("first")
    circle.__cause__ = RuntimeError("second")
    circle.__cause__.__cause__ = circle
    assert limits.is_out_of_memory(circle) is False


def test_an_allocation_that_fails_is_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert limits.is_out_of_memory(raised.value)


def test_a_library_that_the_loader_refuses_without_a_limit(monkeypatch):
    """It says the same of one on a disk that allows no code."""
    monkeypatch.setattr(limits, "free_memory", lambda: FreeMemory(9, ""))
    assert not limits.is_out_of_memory(ImportError("x.so: failed to map segment from shared obj"))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("std::bad_alloc"), OSError(errno.ENOMEM, "Cannot")]
)
def test_lack_of_memory_ends_every_command_with_a_line(monkeypatch, capsys, error):
    """Also where it comes before anything was set up, as while torch is imported."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(limits, "free_memory", lambda: FreeMemory(9, "ulimit -v of 9 B"))
    monkeypatch.setattr(train, "main", fail)
    monkeypatch.setattr(runs, "main", fail)
    for command in (lambda: train.run([]), lambda: main(["runs"])):
        assert command() == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "out of memory (" in line and line.endswith("; ulimit -v of 9 B)")


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    """They are faults of the program, and keep their traceback."""

    def fail(*arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(train, "main", fail)
    monkeypatch.setattr(runs, "main", fail)
    for command in (lambda: train.run([]), lambda: main(["runs"])):
        with pytest.raises(RuntimeError, match="shapes differ"):
            command()
