"""Locks between processes, on file systems that may have none. Imports no torch.

A lock lasts until its file is closed or the process ends, however it ends: none is ever stale."""

import enum
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from nanochat.common import Report, check_system, note_once


class Lock(enum.Enum):
    """What became of an attempt to take a lock. NONE: the file system has no locks, so nothing is
    known of other processes."""

    TAKEN = enum.auto()
    HELD_ELSEWHERE = enum.auto()
    NONE = enum.auto()


def open_lock(path: str | os.PathLike) -> BinaryIO:
    """The lock file at `path`, open and created if it is missing. Raises OSError.

    Another user's may be locked although it cannot be written."""
    try:
        # some network file systems lock only what is open for writing
        return open(path, "ab")
    except PermissionError:
        return open(path, "rb")


def exist_in(folder: str | os.PathLike) -> bool:
    """Whether the file system of a folder that can be written has locks; gives take()'s warning if
    it has none."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return take(file, folder) is not Lock.NONE


def take(
    file: int | BinaryIO,
    folder: str | os.PathLike,
    *,
    wait: bool = False,
    shared: bool = False,
    report: Report | None = None,
) -> Lock:
    """Lock an open file or folder, alone or, if shared, together with others that share it.

    wait: until it is free, instead of returning HELD_ELSEWHERE. folder: is named in the warning
    that a process gives once where there are no locks. report: gets that line; by default it goes
    to standard error. Raises UsageError on native Windows."""
    check_system()
    # here, so that whatever needs no lock can be imported on Windows
    import fcntl

    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)
    # EAGAIN, or EACCES where locks are emulated
    except (BlockingIOError, PermissionError):
        return Lock.HELD_ELSEWHERE
    # ENOLCK, ENOTSUP, ENOSYS, EINVAL, ...: whatever it is, a lock is not worth the work
    except OSError as error:
        note_once(
            f"{Path(folder)}: no file locks there ({error.strerror}); let only one process at a "
            f"time write the same files",
            report,
            key="no file locks",
        )
        return Lock.NONE
    return Lock.TAKEN
