"""What the system lets this process use: cores and bytes of memory, after its control groups
(cgroup v1 and v2), its affinity mask and its resource limits (`ulimit`). Imports no torch.

root, a parameter throughout: where /proc and /sys are looked for; tests make up such trees."""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import ceil_div, human_bytes, in_a_line

ROOT = Path("/")
# Resource limit, the field of /proc/self/status that counts towards it, and the shell's words.
ULIMITS = (("RLIMIT_AS", "VmSize", "ulimit -v"), ("RLIMIT_DATA", "VmData", "ulimit -d"))
# What those say that have no exception type for a lack of memory: the allocators of torch for CPUs
# and mps; the system, also through the compiler's processes; C++; CUDA, NCCL, cuBLAS and cuDNN;
# oneDNN, which names only what it could not create; threads, whose stacks are memory.
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|memory exhausted|bad_alloc|"
    r"out[ _]of[ _]memory|ALLOC(ATION)?_FAILED|"
    r"could not (create a memory|create a primitive(?! desc)|execute a primitive)|"
    r"can't start new thread|pthread_create failed|thread creation failed",
    re.IGNORECASE,
)
# exceptions of torch, its libraries and the system
_OF_THE_SYSTEM = (RuntimeError, MemoryError, OSError, ImportError)


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can be allocated now. limit: what they are limited by, in words; "" if only the
    machine's own memory counts."""

    free_bytes: int
    limit: str


def available_cpus(root: Path = ROOT) -> int:
    """Cores that this process may use, at least 1: those of its affinity mask, or fewer if the
    quota of a control group is less; a part of a core counts as one."""
    # macOS has no affinity masks.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    for folder in _control_groups("cpu", root):
        # v2 has both numbers in one file, and v1 a file for each; "max" and -1 mean no limit.
        words = _read(folder / "cpu.max").split() or [
            *_read(folder / "cpu.cfs_quota_us").split(),
            *_read(folder / "cpu.cfs_period_us").split(),
        ]
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
            quota, period = map(int, words)
            if quota and period:
                cores = min(cores, ceil_div(quota, period))
    return cores


def free_memory(root: Path = ROOT) -> FreeMemory:
    """The least of what the machine, every control group of this process and its resource limits
    leave free."""
    # Windows has no such module.
    import resource

    free = [FreeMemory(_free_on_machine(root), "")]
    for folder in _control_groups("memory", root):
        free += _free_in_group(folder)
    for kind, field, name in ULIMITS:
        limit = resource.getrlimit(getattr(resource, kind))[0]
        used = _field(root / "proc/self/status", field)
        # Without /proc, as on macOS, the system does not enforce these limits either.
        if limit != resource.RLIM_INFINITY and used is not None:
            text = f"{name} of {human_bytes(limit)}"
            free.append(FreeMemory(max(0, limit - 1024 * used), text))
    return min(free, key=lambda memory: memory.free_bytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation that failed, on any device or of the host, caused this exception."""
    seen: set[int] = set()
    # Only what torch, its libraries and the system raise: this program's own exceptions, and a
    # signal that arrives meanwhile, say something else even when a lack of memory precedes them.
    while isinstance(error, _OF_THE_SYSTEM) and id(error) not in seen:
        seen.add(id(error))
        if _says_out_of_memory(error):
            return True
        context = None if error.__suppress_context__ else error.__context__
        # The compiler keeps what it wraps in an attribute of its own.
        error = getattr(error, "inner_exception", None) or error.__cause__ or context
    return False


def _says_out_of_memory(error: BaseException) -> bool:
    # torch's own type has this name; it is not imported here
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # a library that does not fit; of one on a disk that allows no code the loader says the same
    if isinstance(error, ImportError):
        return "failed to map segment" in str(error) and bool(free_memory().limit)
    return OUT_OF_MEMORY.search(str(error)) is not None


def out_of_memory_in_words(error: BaseException) -> str:
    """ "out of memory", with the words of an error for which is_out_of_memory() holds, and with the
    limit that is in force."""
    limit = free_memory().limit
    return f"out of memory ({in_a_line(error)}{f'; {limit}' if limit else ''})"


def _free_on_machine(root: Path) -> int:
    """MemAvailable, or the physical size where the system does not report it."""
    available = _field(root / "proc/meminfo", "MemAvailable")
    if available is not None:
        return 1024 * available
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_in_group(folder: Path) -> Iterator[FreeMemory]:
    """What each limit of a control group leaves; nothing for files that do not exist or say "max".

    Reclaimable cache of files counts as used in `usage` and `current`, but gives way."""
    for limit_file, used_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        # Beyond it the group is not killed, but slowed down so much that it hardly moves.
        ("memory.high", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _read(folder / limit_file).strip(), _read(folder / used_file).strip()
        if limit.isdecimal() and used.isdecimal():
            reclaimable = _field(folder / "memory.stat", cache) or 0
            free = int(limit) - max(0, int(used) - reclaimable)
            text = f"control group limit of {human_bytes(int(limit))}"
            yield FreeMemory(max(0, free), text)


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups of this process that have this controller, from its own up to
    the root of each hierarchy; limits of all of them apply."""
    own = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        # v2 has one hierarchy for all controllers, and names none.
        if not controllers or controller in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = path
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        subtree, mount_point = map(_unescaped, before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        if kind not in own or (kind == "cgroup" and controller not in options.split(",")):
            continue
        top = root / mount_point.lstrip("/")
        # A container may see only its own subtree, mounted as if it were the whole hierarchy, while
        # its path is still that of the host.
        below = os.path.relpath(own[kind], subtree)
        folder = top if below.startswith("..") else top / below
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _unescaped(path: str) -> str:
    """A path of mountinfo, in which blanks are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _field(path: Path, name: str) -> int | None:
    """The number after a name at the beginning of a line, or None."""
    found = re.search(rf"^{name}:?\s+(\d+)", _read(path), re.MULTILINE)
    return int(found[1]) if found else None


def _read(path: Path) -> str:
    """The text of a file, "" if it does not exist or cannot be read: then it sets no limit."""
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""
