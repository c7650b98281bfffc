"""A screen that takes no more output costs the output, never the run, its exit code or a
checkpoint."""

import contextlib
import errno
import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys

import pytest
import small

from nanochat import output

# Imports no torch.
SCRIPT = """
import sys
from nanochat import output
output.protect()
for stream in (sys.stdout, sys.stderr):
    print("x" * 100_000, file=stream)
    print("naïve \\udce9 \\N{SNOWMAN}", file=stream, flush=True)
with open("proof", "w") as proof:
    refused = output.refused()
    print(refused and refused.strerror, output.reader_is_gone(), file=proof)
sys.exit(7)
"""


def printed(folder, *, stdout, stderr=subprocess.PIPE, close=(), environ=None):
    """Run SCRIPT in a folder; returns (what it found of its output, the finished process)."""

    def close_streams():
        for descriptor in close:
            os.close(descriptor)

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(small.ROOT)} | (environ or {}),
        stdout=stdout,
        stderr=stderr,
        preexec_fn=close_streams,
        timeout=60,
    )
    return (folder / "proof").read_text().strip(), done


@pytest.fixture
def broken_pipe():
    """The end to write to of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def vanished_terminal():
    """A terminal whose window is closed."""
    master, slave = pty.openpty()
    os.close(master)
    yield slave
    os.close(slave)


def test_a_reader_that_is_gone(tmp_path, broken_pipe):
    found, done = printed(tmp_path, stdout=broken_pipe, stderr=broken_pipe)
    assert (found, done.returncode) == ("Broken pipe True", 7)


def test_a_terminal_that_is_gone(tmp_path, vanished_terminal):
    found, done = printed(tmp_path, stdout=vanished_terminal, stderr=vanished_terminal)
    assert (found, done.returncode) == ("Input/output error False", 7)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        found, done = printed(tmp_path, stdout=full, stderr=full)
    assert (found, done.returncode) == ("No space left on device False", 7)


@pytest.mark.parametrize("close", [(1,), (2,), (0, 1, 2)])
def test_closed_streams(tmp_path, close):
    """No file that is opened later receives what is printed."""
    found, done = printed(tmp_path, stdout=subprocess.PIPE, close=close)
    assert (found, done.returncode) == ("None False", 7)


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("ascii", "na?ve ? ?"),
        ("latin-1", "naïve ? ?"),
        ("cp1252", "naïve ? ?"),
        ("utf-8", "naïve ? ☃"),
    ],
)
def test_an_encoding_that_lacks_a_character(tmp_path, encoding, shown):
    found, done = printed(tmp_path, stdout=subprocess.PIPE, environ={"PYTHONIOENCODING": encoding})
    assert (found, done.returncode) == ("None False", 7)
    for content in (done.stdout, done.stderr):
        assert content.decode(encoding).splitlines() == ["x" * 100_000, shown]


def test_a_full_pipe_that_does_not_block_loses_nothing(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(small.ROOT)},
        stdout=writer,
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        assert file.read().splitlines() == ["x" * 100_000, "naïve ? ☃"]
    assert process.wait(60) == 7


@pytest.mark.parametrize("make", [os.pipe, pty.openpty])
def test_what_a_stuck_reader_does_not_take_is_dropped_until_it_reads_again(make):
    """As in a terminal after Ctrl-S."""
    reader, writer = make()
    screen = output._Screen(writer, 0)
    with io.BufferedWriter(screen) as stream:
        stream.write(b"x" * (1 << 20))
        assert screen.refused.errno == errno.ETIMEDOUT
        taken = 0
        while select.select([reader], [], [], 0)[0]:
            taken += len(os.read(reader, 1 << 20))
        assert 0 < taken < 1 << 20
        stream.write(b"again")
        stream.flush()
        assert os.read(reader, 1 << 20) == b"again"
    os.close(reader)
    os.close(writer)


def nanochat(stdout, *arguments):
    """A command of nanochat; returns (exit code, standard error)."""
    command = [sys.executable, "-m", "nanochat", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=small.ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_an_app_whose_reader_has_seen_enough(tmp_path, broken_pipe):
    small.copy_run(small.finished(), tmp_path)
    assert nanochat(broken_pipe, "runs", tmp_path) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("options", [[], ["--help"]])
def test_an_app_whose_output_is_lost(tmp_path, options):
    small.copy_run(small.finished(), tmp_path)
    with open("/dev/full", "w") as full:
        code, said = nanochat(full, "runs", *options, tmp_path)
    assert code == 1
    assert said == (
        "nanochat: the output could not be written (No space left on device); what the command "
        "itself wrote to files is complete\n"
    )


def test_a_plan_that_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "lost", lambda: "the output could not be written (of late)")
    assert small.run(tmp_path, "--dry-run") == 1
    assert capsys.readouterr().err == "train.py: the output could not be written (of late)\n"


# Ends as train.py does, without any patience.
TRAIN = """
import sys
import train
from nanochat import signals
signals.SCREEN_PATIENCE_SECONDS = 0
signals.exit_with(lambda: train.run(sys.argv[1:]))
"""
LONG = (
    "--num-iterations=100000",
    "--eval-every=2",
    "--eval-tokens=300",
    "--sample-every=30",
    "--save-every=-1",
)


def asked_to_stop(folder, tag):
    summary = small.summary(folder, tag)
    checkpoints = sorted(path.name for path in (folder / tag / "checkpoints").glob("step_*"))
    assert checkpoints[-1] == f"step_{summary['step']:06d}"
    return summary["status"], summary["reason"]


@pytest.mark.parametrize(
    "number, is_stuck",
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)],
)
def test_training_continues_without_a_reader_and_saves_when_it_is_asked_to_stop(
    tmp_path, number, is_stuck
):
    """As with `2>&1 | tee log` and Ctrl-C, which ends tee as well; or with a reader that stands
    still."""
    screen = tmp_path / "screen"
    os.mkfifo(screen)
    argv = small.argv_of(tmp_path, "run", LONG)
    process = small.start(argv, small.environment(), screen, TRAIN)
    with contextlib.ExitStack() as held:
        with open(screen) as reader:
            if is_stuck:
                # the pipe has a reader as long as this is open
                held.callback(os.close, os.dup(reader.fileno()))
                # the least that a pipe of Linux holds; elsewhere it takes longer to fill
                with contextlib.suppress(AttributeError):
                    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1)
            while not reader.readline().startswith("step 1/"):
                pass
        # Nobody reads from here on; evaluations and samples print.
        wait_for_evaluations(tmp_path, process)
        os.kill(process.pid, number)
        assert small.ended(process) == 75
    assert asked_to_stop(tmp_path, "run") == ("stopped", "asked to stop by a signal")


def wait_for_evaluations(folder, process):
    """Until a run has far more evaluations than a pipe holds lines."""
    metrics = folder / "run" / "metrics.jsonl"
    while sum('"val/bpb"' in line for line in metrics.read_text().splitlines()) < 60:
        # not asked all the time, which would take a core from the run
        process.join(0.05)
        assert process.exitcode is None


def test_a_terminal_that_is_closed_stops_the_run_which_is_saved(tmp_path):
    master, slave = pty.openpty()
    argv = small.argv_of(tmp_path, "run", LONG)
    process = small.start(argv, small.environment(), os.ttyname(slave), TRAIN)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while b"val/bpb" not in os.read(master, 1 << 16):
        assert process.exitcode is None
    os.close(slave)
    os.close(master)
    lines = len(metrics.read_text().splitlines())
    while len(metrics.read_text().splitlines()) < lines + 30:
        process.join(0.05)
        assert process.exitcode is None
    # what the system sends to the programs of a closed terminal
    os.kill(process.pid, signal.SIGHUP)
    assert small.ended(process) == 75
    assert asked_to_stop(tmp_path, "run") == ("stopped", "asked to stop by a signal")
