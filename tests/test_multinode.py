"""Training on several machines: runs/multinode.sh, and two hosts that lose each other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest
import small

ROOT = Path(__file__).resolve().parent.parent
# Stands for Python: notes its arguments, writes the summary that the test names, if any, and ends
# with the code that it names.
PYTHON = """#!/bin/bash
echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME: $@" >> calls
if [ -e new_summary.json ]; then mv new_summary.json out/d4/summary.json; fi
if [ -e wait ]; then trap 'kill $!; exit 1' TERM; sleep 1000 & echo waiting; wait; fi
exit "$(cat code)"
"""


def multinode(folder, *flags, status=None, code=1, told=False, **variables):
    """multinode.sh with a stand-in for Python; returns (exit code, output, what Python was given).
    status: in the summary that this start writes. told: it gets a SIGTERM."""
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "out" / "d4").mkdir(parents=True, exist_ok=True)
    for name in ("multinode.sh", "common.sh"):
        shutil.copy(ROOT / "runs" / name, folder / "runs")
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    (folder / "calls").write_text("")
    (folder / "code").write_text(str(code))
    if status:
        (folder / "new_summary.json").write_text(json.dumps({"status": status}, indent=2))
    if told:
        (folder / "wait").write_text("")
    environ = {"PATH": os.environ["PATH"], "PYTHON": f"{folder}/python", "DEPTH": "4"}
    process = subprocess.Popen(
        ["bash", "runs/multinode.sh", *flags],
        cwd=folder,
        env=environ | {"HEAD": "node0", "NODE_RANK": "0", "NPROC": "8"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if told:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    return process.returncode, shown, (folder / "calls").read_text()


def test_multinode_starts_torchrun(tmp_path):
    code, shown, calls = multinode(tmp_path, "--run=x", code=0, IFACE="ib0")
    assert (code, shown) == (0, "RESULT code=0\n")
    assert calls == (
        "ib0,ib0,ib0,ib0 ib0: -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --node-rank=0 "
        "--master-addr=node0 --master-port=29500 -- train.py --depth=4 --out-dir=out "
        "--model-tag=d4 --resume --run=x\n"
    )
    by_name = multinode(tmp_path, NODE_RANK="", NNODES="4", PORT="29600", TAG="big")[2]
    assert " --rdzv-backend=c10d --rdzv-endpoint=node0:29600 --rdzv-id=big -- " in by_name
    assert by_name.startswith(" : -m torch.distributed.run --nnodes=4 ")


def test_multinode_prints_its_command(tmp_path):
    code, shown, calls = multinode(tmp_path, PLAN="1")
    assert code == 0 and calls == ""
    assert shown.startswith("python -m torch.distributed.run --nnodes=2")


@pytest.mark.parametrize(
    "flags, variables, problem",
    [
        ([], {"HEAD": ""}, "HEAD: give the host name"),
        ([], {"NODE_RANK": "2"}, "NODE_RANK=2: give 0 to 1, as NNODES=2"),
        ([], {"NNODES": "two"}, "NNODES=two: give how many"),
        ([], {"NPROC": "0"}, "NPROC=0: give processes"),
        (["--depth=3"], {}, "--depth=3: set DEPTH=N"),
        (["--run=x", "--out-dir", "y"], {}, "--out-dir: set OUT=FOLDER"),
    ],
)
def test_multinode_refuses(tmp_path, flags, variables, problem):
    code, shown, calls = multinode(tmp_path, *flags, **variables)
    assert code == 2 and calls == "" and f"multinode.sh: error: {problem}" in shown


@pytest.mark.parametrize(
    "status, code, ends_with",
    [
        ("completed", 0, 0),
        ("stopped", 1, 75),
        # killed before it could write another one
        ("running", 1, 75),
        ("failed", 1, 1),
        # of an earlier start, or on another machine
        (None, 1, 1),
        (None, 0, 0),
    ],
)
def test_multinode_ends_with_the_code_of_the_run(tmp_path, status, code, ends_with):
    """Which torchrun does not hand on."""
    (tmp_path / "out" / "d4").mkdir(parents=True)
    (tmp_path / "out" / "d4" / "summary.json").write_text('{\n  "status": "stopped"\n}')
    assert multinode(tmp_path, status=status, code=code)[0] == ends_with


def test_multinode_passes_a_signal_on(tmp_path):
    """And waits for the run to end."""
    assert multinode(tmp_path, told=True)[0] == 75


def test_two_hosts_prints_its_commands():
    """One run on one host, four on both of them, with a cable for each."""
    printed = subprocess.run(
        ["bash", ROOT / "runs" / "two_hosts.sh", "--seed=7"],
        env={"PATH": os.environ["PATH"], "PLAN": "1", "MEGABITS": "100"},
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    cables = [line.split()[-2:] for line in printed if "tests/hosts.py" in line]
    assert cables == [["0", "0"], ["100", "20"], ["100", "0"], ["0", "20"], ["0", "0"]]
    runs = [line for line in printed if "multinode.sh" in line]
    assert len(runs) == 9 and all(line.endswith(" --seed=7") for line in runs)
    assert sum("two-hosts1 env NODE_RANK=1 NNODES=2 NPROC=1" in line for line in runs) == 4


# --------------------------------------------------------------------------------------------------
# two hosts

FLAGS = [
    *(flag for flag in small.FLAGS if not flag.startswith(("--depth", "--save", "--num"))),
    *("--num-iterations=30", "--save-every=10", "--eval-every=15", "--sample-every=-1"),
]
# Imported by every Python that finds it: hosts count as lost sooner.
IMPATIENT = "from nanochat import machines\nmachines.LOST_AFTER = 6\n"


@pytest.fixture(scope="module")
def cable():
    """Two hosts with 1 Gbit/s and 5 ms between them."""
    try:
        laid = hosts.Hosts(f"test{os.getpid()}-", megabits=1000, milliseconds=5)
    except hosts.CannotMake as error:
        pytest.skip(str(error))
    yield laid
    laid.close()


class Training:
    """multinode.sh on the given hosts, with one rank each and caches of their own. shares: they
    have the same --out-dir. numbered: by NODE_RANK; otherwise torchrun numbers them."""

    def __init__(self, cable, folder, *on_hosts, port, shares=True, numbered=True):
        self.cable = cable
        self.folder = folder
        self.shares = shares
        self.numbered = numbered
        (folder / "sitecustomize.py").write_text(IMPATIENT)
        self.on_hosts = {host: self._start(host, len(on_hosts), port) for host in on_hosts}

    def _start(self, host, n, port):
        variables = {
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{self.folder}:{ROOT}",
            "NANOCHAT_BASE_DIR": str(self.folder / f"caches{host}"),
            "OMP_NUM_THREADS": "1",
            "HEAD": hosts.ADDRESSES[0],
            "PORT": str(port),
            "IFACE": hosts.INTERFACE,
            "NNODES": str(n),
            "NODE_RANK": str(host) if self.numbered else "",
            "NPROC": "1",
            "DEPTH": "2",
            "OUT": str(self.folder if self.shares else self.folder / f"out{host}"),
            "TAG": "run",
        }
        with open(self.folder / f"shown{host}", "w") as shown:
            return subprocess.Popen(
                self.cable.command(
                    host, ["bash", "runs/multinode.sh", *FLAGS, small.corpus(self.folder)]
                ),
                cwd=ROOT,
                env=small.environment() | variables,
                stdout=shown,
                stderr=shown,
            )

    def wait_for_step(self, step):
        metrics = self.folder / ("run" if self.shares else "out0/run") / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
            assert time.monotonic() < deadline, self.shown(0)
            time.sleep(0.02)

    def ended(self):
        """{host: exit code}, once all have ended."""
        return {host: process.wait(120) for host, process in self.on_hosts.items()}

    def shown(self, host):
        return (self.folder / f"shown{host}").read_text()


def made(folder, source=None):
    """A folder, empty or with the run of another one as it is now."""
    folder.mkdir()
    if source:
        shutil.copytree(source / "run", folder / "run")
    return folder


@pytest.mark.slow
def test_a_host_is_lost_and_comes_back(cable, tmp_path):
    """What both hosts train in the end is what they would have trained undisturbed."""
    whole = made(tmp_path / "whole")
    training = Training(cable, whole, 0, 1, port=29501, numbered=False)
    assert training.ended() == {0: 0, 1: 0}, training.shown(0) + training.shown(1)

    # one whose processes are killed, as by the system: the other hears of it at once
    killed = made(tmp_path / "killed")
    training = Training(cable, killed, 0, 1, port=29502)
    training.wait_for_step(14)
    cable.kill(1)
    assert training.ended()[0] == 1, training.shown(0)
    assert "rank 1 did not answer within 3 s; the other ranks end too" in training.shown(0)
    assert small.summary(killed)["status"] == "failed"

    alone = made(tmp_path / "alone", killed)
    one = Training(cable, alone, 0, port=29503)
    both = Training(cable, killed, 0, 1, port=29504)
    assert both.ended() == {0: 0, 1: 0}, both.shown(0) + both.shown(1)
    assert "from step 10" in both.shown(0)
    assert small.losses(killed) == small.losses(whole)
    assert small.summary(killed)["val_bpb"] == small.summary(whole)["val_bpb"]
    assert one.ended() == {0: 0}, one.shown(0)
    assert "1 ranks (was 2)" in one.shown(0)
    assert small.losses(alone) == pytest.approx(small.losses(whole), abs=1e-4)


@pytest.mark.slow
def test_a_host_that_does_not_answer_any_more(cable, tmp_path):
    """Without power or network it cannot say that it is gone: no connection ends by itself."""
    training = Training(cable, tmp_path, 0, 1, port=29505, shares=False)
    training.wait_for_step(14)
    cable.cut()
    try:
        assert training.ended() == {0: 1, 1: 1}
    finally:
        cable.mend()
    assert "failed: rank 1 did not answer within 3 s; the other ranks" in training.shown(0)
    assert "failed: the connection to other ranks is lost" in training.shown(1)
    assert small.summary(tmp_path / "out0")["status"] == "failed"
    # rank 0 alone writes
    assert not (tmp_path / "out1").exists()
