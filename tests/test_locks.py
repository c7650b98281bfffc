"""Locks between processes, on file systems without them and on Windows."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import make

from nanochat import common, locks
from nanochat.common import UsageError, new_folder
from nanochat.locks import Lock
from nanochat.run.folder import RunFolder
from nanochat.run.records import read_summary

# what file systems without locks answer
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# what a lock that another process holds gives
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def refuse(monkeypatch, number):
    """Let every lock fail with an error number; nothing was warned of before."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(common, "_noted", set())


def test_a_lock_has_one_holder_until_it_is_closed(tmp_path):
    with locks.open_lock(tmp_path / "lock") as first, locks.open_lock(tmp_path / "lock") as second:
        assert locks.take(first, tmp_path) is Lock.TAKEN
        assert locks.take(second, tmp_path) is Lock.HELD_ELSEWHERE
        assert locks.take(second, tmp_path, shared=True) is Lock.HELD_ELSEWHERE
        first.close()
        assert locks.take(second, tmp_path, shared=True) is Lock.TAKEN


@pytest.mark.parametrize("number", TAKEN, ids=errno.errorcode.get)
def test_what_means_taken(tmp_path, monkeypatch, number):
    refuse(monkeypatch, number)
    with locks.open_lock(tmp_path / "lock") as lock:
        assert locks.take(lock, tmp_path) is Lock.HELD_ELSEWHERE
    with pytest.raises(UsageError, match="is in use by a training process"):
        RunFolder(tmp_path / "run").claim()
    with pytest.raises(UsageError, match="being written by another process"):
        with new_folder(tmp_path / "out"):
            pytest.fail("not reached")


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_without_locks_everything_works_with_one_line(tmp_path, monkeypatch, capfd, number):
    refuse(monkeypatch, number)
    run = RunFolder(tmp_path / "run")
    run.claim()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert os.listdir(tmp_path / "out") == ["file"]
    with locks.open_lock(tmp_path / "lock") as lock:
        assert locks.take(lock, tmp_path, wait=True) is Lock.NONE
    (line,) = capfd.readouterr().err.splitlines()
    assert os.strerror(number) in line and str(run.path) in line


def test_the_warning_goes_where_it_is_wanted(tmp_path, monkeypatch, capfd):
    refuse(monkeypatch, errno.ENOLCK)
    lines = []
    with locks.open_lock(tmp_path / "lock") as lock:
        locks.take(lock, tmp_path, report=lines.append)
    assert len(lines) == 1 and capfd.readouterr().err == ""


def test_a_lock_file_of_another_user_can_be_locked(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.write_text("")
    really_open = open

    def refuse_to_write(name, mode="r", **options):
        if "r" not in mode:
            raise PermissionError(errno.EACCES, "Permission denied")
        return really_open(name, mode, **options)

    monkeypatch.setattr("builtins.open", refuse_to_write)
    with locks.open_lock(path) as lock:
        assert locks.take(lock, tmp_path) is Lock.TAKEN


def test_a_run_without_locks_is_alive_while_it_writes(tmp_path, monkeypatch):
    run = make(tmp_path, "run", status="running")
    (run / ".lock").touch()
    refuse(monkeypatch, errno.ENOLCK)
    assert read_summary(run).status == "running"
    for path in run.iterdir():
        os.utime(path, (1, 1))
    assert read_summary(run).status == "died"


@pytest.mark.parametrize(
    "command", ["train.py --depth=1", "nanochat doctor", "nanochat sample out/d1"]
)
def test_native_windows_is_refused_in_one_line(tmp_path, command):
    """Python has neither these modules nor these functions there."""
    name, *arguments = command.split()
    module = name.removesuffix(".py")
    program = f"""
import os, runpy, signal, sys
del signal.SIGHUP, os.geteuid, os.statvfs
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None
sys.argv[1:] = {arguments}
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "WSL" in line and line.startswith(name)
