"""The shell scripts around train.py: restart.sh goes on after failures, requeue.slurm queues a stopped run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Notes its arguments, and ends with the exit code that codes.json names for this start; "wait": when it is told to stop.
COMMAND = """
import json, os, signal, sys, time
from pathlib import Path
starts = Path("starts")
n = len(starts.read_text().splitlines()) if starts.exists() else 0
code = json.loads(Path("codes.json").read_text())[n]
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
with starts.open("a") as f:
    f.write(" ".join(sys.argv[1:]) + "\\n")
if code == "wait":
    print("waiting", flush=True)
    signal.pause()
sys.exit(code)
"""


def start(folder, codes, **options):
    (folder / "codes.json").write_text(json.dumps(codes))
    (folder / "command.py").write_text(COMMAND)
    return subprocess.Popen(["bash", ROOT / "runs" / "restart.sh", sys.executable, "command.py", "--depth=4"], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PAUSE": "0", "ATTEMPTS": "3"}, **options)


@pytest.mark.parametrize("codes, code, starts", [([0], 0, 1), ([1, 75, 0], 0, 3), ([2], 2, 1), ([1, 1, 1, 0], 1, 3), ([-9, 0], 0, 2)])
def test_restart(tmp_path, codes, code, starts):
    if codes[0] == -9:
        codes = [137, 0]  # as the shell sees a SIGKILL
    process = start(tmp_path, codes)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == code, shown
    assert (tmp_path / "starts").read_text().splitlines() == ["--depth=4 --resume"] * starts
    assert ("giving up" in shown) == (starts == 3 and code == 1)


def test_restart_told_to_stop(tmp_path):
    """The signal reaches the run, whose exit code is handed on; it is not started again."""
    process = start(tmp_path, ["wait", 0])
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


@pytest.mark.parametrize("status, requeued, code", [
    ("completed", False, 0), ("stopped", True, 0), ("running", True, 0), ("failed", False, 1)])
def test_requeue(tmp_path, status, requeued, code):
    """With stand-ins for Slurm's commands."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "out" / "d4").mkdir(parents=True)
    (tmp_path / "out" / "d4" / "summary.json").write_text(json.dumps({"status": status}))
    (tmp_path / "runs" / "setup.sh").write_text("")
    shutil.copy(ROOT / "runs" / "requeue.slurm", tmp_path / "runs")
    for name, text in (("srun", 'echo "$@" >> srun_calls; exit 1'), ("scontrol", 'echo "$@" >> scontrol_calls; echo node1')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    done = subprocess.run(["bash", "runs/requeue.slurm", "--fp8"], cwd=tmp_path, capture_output=True, text=True, timeout=60, env={
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DEPTH": "4", "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"})
    assert done.returncode == code, done.stderr
    assert ("requeue 17" in (tmp_path / "scontrol_calls").read_text()) == requeued
    call = (tmp_path / "srun_calls").read_text()
    assert "--nnodes=2" in call and "--rdzv-endpoint=node1:29500" in call
    assert call.endswith("train.py --depth=4 --model-tag=d4 --resume --fp8\n")


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_sound_shell(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""
