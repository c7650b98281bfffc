"""The scripts around train.py: restart.sh restarts it, slurm.sh requeues it, speedrun.sh."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small

ROOT = Path(__file__).resolve().parent.parent
# Notes its arguments, and ends with the exit code that codes.json names for this start; "wait":
# when a signal asks it to stop.
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


def start(folder, codes, **variables):
    (folder / "codes.json").write_text(json.dumps(codes))
    (folder / "command.py").write_text(COMMAND)
    return subprocess.Popen(
        ["bash", ROOT / "runs" / "restart.sh", sys.executable, "command.py", "--depth=4"],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PAUSE": "0", "ATTEMPTS": "3"} | variables,
    )


@pytest.mark.parametrize(
    "codes, code, starts",
    [([0], 0, 1), ([1, 75, 0], 0, 3), ([2], 2, 1), ([1, 1, 1, 0], 1, 3), ([-9, 0], 0, 2)],
)
def test_restart(tmp_path, codes, code, starts):
    if codes[0] == -9:
        codes = [137, 0]  # as the shell sees a SIGKILL
    process = start(tmp_path, codes)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == code, shown
    assert (tmp_path / "starts").read_text().splitlines() == ["--depth=4 --resume"] * starts
    assert ("giving up" in shown) == (starts == 3 and code == 1)


def test_restart_needs_no_reader(tmp_path):
    """As with `2>&1 | tee log` when tee has been killed."""
    process = start(tmp_path, [1, 0])
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert len((tmp_path / "starts").read_text().splitlines()) == 2


def test_restart_passes_a_signal_on(tmp_path):
    """The run's exit code is returned; it is not started again."""
    process = start(tmp_path, ["wait", 0])
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_restart_stops_in_the_pause(tmp_path):
    """It does not start again, nor wait for the pause to end."""
    process = start(tmp_path, [1, 0], PAUSE="1000")
    assert "exit code 1; starting again in 1000 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_restart_forgives_failures_after_a_long_run(tmp_path):
    """Here every run counts as long."""
    process = start(tmp_path, [1, 1, 0], ATTEMPTS="1", SHORT="0")
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 0 and "giving up" not in shown
    assert len((tmp_path / "starts").read_text().splitlines()) == 3


# Stands for srun: writes the summary that the test names, if any, and waits for a signal if there
# is a file named wait.
SRUN = """#!/bin/bash
echo "$HEAD $NNODES $OUT $TAG $NPROC: $@" >> srun_calls
if [ -e new_summary.json ]; then mkdir -p out/d4; mv new_summary.json out/d4/summary.json; fi
if [ -e wait ]; then trap 'kill $!; exit "$(cat code)"' TERM; sleep 1000 & echo waiting; wait; fi
exit "$(cat code)"
"""


def requeue(folder, *flags, step=None, code=75, told=False, restarts=0, stdout=subprocess.PIPE):
    """The job script with stand-ins for Slurm's commands; returns (exit code, whether it requeued,
    standard error). step: in the summary that this start writes. code: of srun."""
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "srun_calls").write_text("")
    (folder / "scontrol_calls").write_text("")
    if step is not None:
        (folder / "new_summary.json").write_text(json.dumps({"step": step}, indent=2))
    (folder / "code").write_text(str(code))
    if told:
        (folder / "wait").write_text("")
    (folder / "runs" / "setup.sh").write_text("")
    shutil.copy(ROOT / "runs" / "slurm.sh", folder / "runs")
    for name, text in (
        ("srun", SRUN),
        ("scontrol", '#!/bin/bash\necho "$@" >> scontrol_calls; echo node1\n'),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "DEPTH": "4",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    job = subprocess.Popen(
        ["bash", "runs/slurm.sh", *flags],
        cwd=folder,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )
    if told:
        assert job.stdout.readline() == "waiting\n"
        job.send_signal(signal.SIGTERM)
    _, shown = job.communicate(timeout=60)
    return job.returncode, "requeue 17" in (folder / "scontrol_calls").read_text(), shown


@pytest.mark.parametrize(
    "code, told, requeued, ends_with",
    [
        # complete
        (0, False, False, 0),
        # stopped or killed, with and without a word from Slurm; 143: srun itself was ended
        (75, False, True, 0),
        (75, True, True, 0),
        (143, True, True, 0),
        # failed, refused, killed by somebody else
        (1, False, False, 1),
        (2, False, False, 1),
        (1, True, False, 1),
        (137, False, False, 1),
    ],
)
def test_slurm_requeues_what_can_be_resumed(tmp_path, code, told, requeued, ends_with):
    found = requeue(tmp_path, "--run=x", step=3, code=code, told=told)
    assert found[:2] == (ends_with, requeued)


def test_slurm_starts_multinode_on_each_machine(tmp_path):
    requeue(tmp_path, "--run=x", "--notify=echo $x", code=0)
    where, _, words = (tmp_path / "srun_calls").read_text().partition(": ")
    assert where == "node1 2 out d4 8"
    assert "exec bash runs/multinode.sh" in words and words.endswith("--run=x --notify=echo $x\n")


def test_slurm_gives_up_where_no_step_is_done(tmp_path):
    """Three times in a row at most; a step, or a new submission, starts the count again."""
    starts = [(0, 0), (5, 1), (5, 2), (5, 3), (5, 4), (6, 5), (6, 0), (6, 1), (6, 2), (6, 3)]
    requeued = [requeue(tmp_path, step=step, restarts=restarts)[1] for step, restarts in starts]
    assert requeued == [True, True, True, True, False, True, True, True, True, False]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_slurm_when_its_log_is_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        _, requeued, _ = requeue(tmp_path, step=3, stdout=full)
    assert requeued


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_sound_shell(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""


def speedrun(tmp_path, **commands):
    """A function that runs speedrun.sh at toy size, in a copy of this repository; returns the
    finished process. commands: shell scripts in place of some commands."""
    root = tmp_path / "tree"
    root.mkdir()
    for name in ("runs", "nanochat", "tasks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "README.md"):
        shutil.copy(ROOT / name, root / name)
    (root / "runs" / "setup.sh").write_text('cd "$(dirname "${BASH_SOURCE[0]}")/.."')
    (root / "bin").mkdir()
    scripts = {
        "python": f'exec {sys.executable} "$@"',
        "nanochat": f'exec {sys.executable} -m nanochat "$@"',
        # whatever this machine has
        "nvidia-smi": "exit 1",
    }
    for name, script in (scripts | commands).items():
        (root / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (root / "bin" / name).chmod(0o755)
    environ = small.environment() | {
        "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
        "TOY": "1",
        "PYTHONPATH": str(root),
        "NANOCHAT_BASE_DIR": str(tmp_path / "caches"),
    }

    def run(*arguments, **variables):
        return subprocess.run(
            ["bash", "runs/speedrun.sh", *arguments],
            cwd=root,
            env=environ | variables,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    "arguments, variables, problem",
    [
        (["2", "0"], {}, "GPUS=0: give 1 or more"),
        (["24", "8"], {"TOY": ""}, "GPUS=8: this machine has 2"),
        (["--depth=3"], {}, "--depth=3: give numbers instead"),
        (["2", "1", "--gpus=4"], {}, "--gpus=4: give numbers instead"),
        (["--run=x", "--model-tag", "x"], {}, "--model-tag: set OUT="),
        (["--core-bundle=x"], {}, "--core-bundle=x: set CORE_BUNDLE="),
        (["--data=x"], {}, "--data=x: fixed"),
        (["--no-save"], {}, "--no-save: leaves nothing to evaluate"),
    ],
)
def test_speedrun_refuses_flags_before_anything_else(tmp_path, arguments, variables, problem):
    gpus = "echo GPU 0: H100; echo GPU 1: H100"
    done = speedrun(tmp_path, python="exit 3", nanochat="exit 3", **{"nvidia-smi": gpus})(
        *arguments, **variables
    )
    assert done.returncode == 2 and f"speedrun.sh: error: {problem}" in done.stderr


def test_speedrun_has_train_check_its_flags_before_there_is_data(tmp_path):
    """--run included, which torchrun would misread: it passes, so that text is tokenized next."""
    run = speedrun(tmp_path, nanochat="echo nanochat $1 $2; exit 3")
    for flag, problem in (("--flux=1", "unrecognized"), ("--overwrite", "contradicts --resume")):
        refused = run("2", "2", "--run=x", flag)
        assert refused.returncode == 2 and problem in refused.stderr
        assert "nanochat" not in refused.stdout
    assert not (tmp_path / "caches").exists()
    taken = run("2", "2", "--run=x")
    assert taken.returncode == 3 and taken.stdout == "nanochat data tokenize\n", taken.stderr


def test_speedrun_at_toy_size(tmp_path):
    """The real commands in their order, on text of this repository; a second start finds the run
    complete."""
    start, root = speedrun(tmp_path), tmp_path / "tree"
    bundle = str(small.core_bundle(tmp_path))

    def run(*arguments):
        return start(*arguments, CORE_BUNDLE=bundle)

    done = run("2", "1", "--num-iterations=20")
    assert done.returncode == 0, done.stdout + done.stderr
    words = dict(
        word.split("=") for word in done.stdout.splitlines()[-1].removeprefix("RESULT ").split()
    )
    low, core, high = (float(words[name]) for name in ("core_low", "core", "core_high"))
    assert -1 < low <= core <= high < 1 and float(words["val_bpb"]) > 1
    assert "plan: 20,480 tokens, " in done.stdout and words["status"] == "completed"
    assert (root / "out" / "speedrun-d2" / "report.html").exists()
    again = run("2", "1", "--num-iterations=20")
    said = again.stdout + again.stderr
    assert again.returncode == 0 and "is complete at step 20" in said, said


def test_the_plan_of_the_speedrun_is_what_its_header_says():
    header = (ROOT / "runs" / "speedrun.sh").read_text().split("set -euo")[0]
    for gpus, hours in ((8, "2.61 hours on eight"), (1, "20.8 on one")):
        flags = [
            "--depth=24",
            "--target-param-data-ratio=8",
            "--dry-run",
            "--json",
            "--gpu=H100",
            f"--gpus={gpus}",
            "--fp8",
        ]
        shown = subprocess.run(
            [sys.executable, ROOT / "train.py", *flags], capture_output=True, text=True, check=True
        ).stdout
        plan = json.loads(shown)
        planned = plan["estimates"]["seconds"] / 3600
        assert f"{planned:.3g}" == hours.split()[0] and hours in header
        assert (
            f"{plan['flops']:.2e}".replace("e+", "e") in header
            and f"{plan['plan']['tokens']:.2e}".replace("e+0", "e") in header
        )
        assert f"{planned * gpus:.3g} GPU-hours: ${planned * gpus * 3:.0f} at $3 each" in header
        assert f"N: {plan['plan']['scaling_parameters'] / 1e6:.0f}M" in header
