"""Which runs of this user are training, and where each listens: what `nanochat jobs` reads.

A run announces itself in its run folder (job.json) and in a folder of this user, so that it is
found whatever its --out-dir. An entry is a claim; whether its process still exists is looked up.
Imports no torch."""

import contextlib
import json
import math
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nanochat.common import UsageError, own_cache, write_json

FORMAT = 1
JOB_FILE = "job.json"
# entries that are kept: those of processes that have ended are a record of recent runs
MOST_ENTRIES = 200
# how the names of folders with sockets begin
SOCKET_FOLDER = "nanochat-"
# bytes of a socket's path, its final zero included: 108 on Linux, 104 on macOS
LONGEST_SOCKET_PATH = 104
# bytes of an entry, enough for thousands of ranks
LARGEST_ENTRY = 8 << 20
# a socket that is younger is never taken for one that was left behind
YOUNG_SECONDS = 60


@dataclass(frozen=True)
class Process:
    """A process of a run. start: when it began, in the system's own words, since the number may be
    used again. machine, boot, container: where that number means this process."""

    rank: int
    pid: int
    start: str
    machine: str
    boot: str
    container: str
    host: str

    @classmethod
    def own(cls, rank: int) -> "Process":
        """This process."""
        return cls(rank, os.getpid(), start_of(os.getpid()), *place(), socket.gethostname())

    @property
    def is_here(self) -> bool:
        """Whether it can be looked up and signalled from this process."""
        return (self.machine, self.boot, self.container) == place()

    def exists(self) -> bool | None:
        """Whether it is running; None where that cannot be told from here."""
        machine, boot, container = place()
        if self.machine != machine:
            return None
        # the machine was started again since
        if self.boot != boot:
            return False
        if self.container != container:
            return None
        return bool(self.start) and start_of(self.pid) == self.start


@dataclass(frozen=True)
class Job:
    """A start of a run. path: its run folder. socket: where it listens, "" if it does not.
    processes: of all ranks, rank 0's first. began: seconds since the epoch."""

    path: str
    socket: str
    began: float
    processes: tuple[Process, ...]

    @property
    def leader(self) -> Process:
        """The process of rank 0."""
        return self.processes[0]

    def as_dict(self) -> dict[str, Any]:
        """JSON values, for job.json."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> "Job":
        """The job that as_dict() wrote. KeyError, TypeError, ValueError or OverflowError for
        anything else, since a file may hold anything."""
        if values["format"] != FORMAT or not values["processes"]:
            raise ValueError("not an entry of this version")
        processes = tuple(Process(**process) for process in values["processes"])
        path, listens_at, began = values["path"], values["socket"], float(values["began"])
        texts = [path, listens_at]
        for process in processes:
            names = [field.name for field in fields(process) if field.name not in ("rank", "pid")]
            texts += [getattr(process, name) for name in names]
            if type(process.pid) is not int or process.pid <= 1 or type(process.rank) is not int:
                raise ValueError("not a process number")
        # a file system takes no zero in a path
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ValueError("not a text")
        if not os.path.isabs(path) or not math.isfinite(began):
            raise ValueError("not a path and a time")
        return cls(path, listens_at, began, processes)


@dataclass(frozen=True)
class Entry:
    """A job, and the file that announces it."""

    file: Path
    job: Job


def start_of(pid: int) -> str:
    """When a process began, "" if there is none of that number, or only its remains."""
    if not sys.platform.startswith("linux"):
        shown = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True
        )
        return shown.stdout.strip()
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    # behind the name, which may hold blanks and brackets; fields are numbered from 1 in proc(5)
    fields = text.rpartition(")")[2].split()
    state, start_time = fields[0], fields[19]
    return "" if state in ("Z", "X") else start_time


def place() -> tuple[str, str, str]:
    """This machine, its boot and its container: where a process number means the same process."""
    boot = container = ""
    machine = socket.gethostname()
    # two machines may have the same name, and containers that are copies the same number
    with contextlib.suppress(OSError):
        machine += " " + Path("/etc/machine-id").read_text().strip()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.readlink("/proc/self/ns/pid")
    return machine, boot, container


# ----- where sockets are


def socket_folder() -> Path:
    """The folder of this user's sockets, created if it is missing: short, and closed to others.
    Raises OSError if there can be none."""
    path = Path(tempfile.gettempdir()) / f"{SOCKET_FOLDER}{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    is_private = stat.S_ISDIR(found.st_mode) and found.st_mode & 0o077 == 0
    # of somebody else, or a link to elsewhere: folders of temporary files are everybody's
    if found.st_uid != os.geteuid() or not is_private:
        path = Path(tempfile.mkdtemp(prefix=SOCKET_FOLDER))
    return path


def sweep_sockets(where: Path) -> list[Path]:
    """Delete the sockets in a folder on which nobody listens any more: of processes that were
    killed. Returns those that it deleted."""
    swept = []
    for path in where.glob("*.sock"):
        with contextlib.suppress(OSError):
            # one that is younger may be about to be listened on
            if time.time() - path.lstat().st_mtime > YOUNG_SECONDS and not is_listened_on(path):
                path.unlink()
                swept.append(path)
    return swept


def is_listened_on(path: Path) -> bool:
    """Whether a process listens on a socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return False
        # busy, for example
        except OSError:
            pass
    return True


def is_own(connection: socket.socket) -> bool:
    """Whether the process at the other end of a connected socket is this user's, or root's."""
    # elsewhere the folder's permissions have to do
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = struct.unpack("3i", credentials)
    return user in (os.geteuid(), 0)


# ----- entries


def folder(make: bool = False) -> Path:
    """Where this user's entries are. UsageError if they can be nowhere."""
    return own_cache("jobs", make)


def announce(job: Job, file: Path | None = None) -> Path:
    """Write the entry of a job, over `file` if it has one; returns its file.

    OSError or UsageError where no entry can be written."""
    if file is None:
        file = folder(make=True) / f"{job.leader.pid}-{os.urandom(4).hex()}.json"
        _forget_oldest(file.parent)
    write_json(file, job.as_dict())
    return file


def _forget_oldest(where: Path) -> None:
    """Delete entries beyond MOST_ENTRIES, the oldest first, except those of running processes."""
    ended = [e for e in _entries_in(where) if e.job.leader.exists() is False]
    for entry in sorted(ended, key=lambda e: e.job.began)[: max(0, len(ended) - MOST_ENTRIES)]:
        entry.file.unlink(missing_ok=True)


def entries() -> list[Entry]:
    """All entries of this user, the newest last; what cannot be read is left out."""
    try:
        where = folder()
    except UsageError:
        return []
    return sorted(_entries_in(where), key=lambda entry: entry.job.began)


def _entries_in(where: Path) -> Iterator[Entry]:
    for file in sorted(where.glob("*.json")):
        if job := read_job(file):
            yield Entry(file, job)


def read_job(file: Path) -> Job | None:
    """The job that a file announces; None if it is missing, damaged, or another user's."""
    try:
        found = file.stat()
        # opening a pipe would wait for whoever writes into it
        is_ordinary = stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST_ENTRY
        if not is_ordinary or found.st_uid != os.geteuid():
            return None
        return Job.from_dict(json.loads(file.read_text(encoding="utf-8")))
    # RecursionError: of brackets, thousands deep
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    except RecursionError:
        return None


def forget(job: Job) -> list[Path]:
    """Remove the socket of a job that has ended, and job.json; its entry stays, as a record.
    Returns what was removed."""
    removed = []
    listened_at, in_folder = Path(job.socket), Path(job.path) / JOB_FILE
    with contextlib.suppress(OSError):
        # a file that somebody else wrote may name any socket, such as that of another program
        is_of_runs = listened_at.parent.name.startswith(SOCKET_FOLDER)
        if is_of_runs and stat.S_ISSOCK(listened_at.lstat().st_mode):
            listened_at.unlink()
            removed.append(listened_at)
    with contextlib.suppress(OSError):
        # another start of the run may have replaced it
        if read_job(in_folder) == job:
            in_folder.unlink()
            removed.append(in_folder)
    return removed
