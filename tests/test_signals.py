"""SIGTERM in every phase of a run: exit code 75, nothing lost, and the resumed run is the
uninterrupted one."""

import os
import re
import runpy
import signal
import subprocess
import sys

import pytest
import small
import torch

import train
from nanochat import signals
from nanochat.data.token_cache import TokenCache
from nanochat.eval import bpb, generation
from nanochat.model.gpt import GPT
from nanochat.optim.optimizer import Optimizer
from nanochat.run import checkpoint, lifecycle, training_text
from nanochat.run.folder import RunFolder
from nanochat.run.saver import Saver

# Sends SIGTERM to every rank when rank 0 reaches the n-th call of a function.
SENDER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from nanochat import ranks, signals
from nanochat.eval import bpb, generation
from nanochat.model.gpt import GPT
owner, name, n = {owner}, {name!r}, {n}
original = getattr(owner, name)
count = [0]
def send(*args, **kwargs):
    count[0] += 1
    if count[0] == n:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)
setattr(owner, name, send)
def run():
    code = train.run(sys.argv[1:])
    print(f"rank {{ranks.rank()}} exits with {{code}}", flush=True)
    return code
signals.exit_with(run)
"""


# Runs a command that is interrupted as it imports a module, or in its own code.
INTERRUPTED = """
import os, signal, sys
from nanochat.__main__ import run
sys.path.insert(0, {root!r})
where = sys.argv.pop(1)
def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
class Finder:
    def find_spec(self, name, *_):
        if name == where:
            interrupt()
sys.meta_path.insert(0, Finder())
if where == "itself":
    import nanochat.common
    nanochat.common.check_system = interrupt
run()
"""


@pytest.mark.parametrize(
    "where, line",
    [
        ("nanochat.common", "nanochat: stopped"),
        ("torch", "nanochat: stopped"),
        ("itself", "nanochat sample: stopped"),
    ],
)
def test_an_interrupted_command_ends_quietly(where, line):
    script = INTERRUPTED.format(root=str(small.ROOT))
    command = [sys.executable, "-c", script, where, "sample", "x", "--prompt=y"]
    done = subprocess.run(command, cwd=small.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"\n{line}\n")


@pytest.fixture
def finished():
    """A folder with one uninterrupted run of 12 steps."""
    return small.finished()


def send_at(monkeypatch, owner, name, call=1):
    """Raise SIGTERM in this process when owner.name is called for the n-th time. Returns how often
    it was called."""
    original = getattr(owner, name)
    count = [0]

    def send(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, send)
    return count


@pytest.mark.parametrize(
    "phase, owner, name, call, stands_at",
    [
        ("reading data", training_text, "open_corpus", 1, None),
        ("tokenizing", TokenCache, "_build", 1, None),
        ("planning", train, "derive_plan", 1, None),
        ("creating the run folder", RunFolder, "write_config", 1, 0),
        ("building", lifecycle, "build", 1, 0),
        ("compiling", GPT, "forward", 1, 0),
        ("a step", Optimizer, "reduce", 3, 3),
        ("evaluating", bpb, "pad", 1, 5),
        ("sampling", generation, "sample_next", 9, 6),
        ("saving", checkpoint, "_compare", 1, None),
        ("the last save", checkpoint, "_compare", 7, None),
        ("the last sample", generation, "generate_text", 6, 12),
    ],
)
def test_a_signal_in_every_phase(
    tmp_path, finished, monkeypatch, phase, owner, name, call, stands_at
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with monkeypatch.context() as patch:
        count = send_at(patch, owner, name, call)
        code = small.run(tmp_path)
    assert count[0] >= call, "the phase was reached"
    assert code == 75
    if stands_at is None and not (tmp_path / "run").exists():
        assert phase in ("reading data", "tokenizing", "planning")
    else:
        summary = small.summary(tmp_path)
        assert summary["status"] == "stopped" and summary["reason"] == "asked to stop by a signal"
        assert stands_at in (None, summary["step"])
    assert small.run(tmp_path, "--resume") == 0
    for file in ("metrics.jsonl", "samples.jsonl"):
        expected = small.timeless(small.lines(finished, name=file))
        assert small.timeless(small.lines(tmp_path, name=file)) == expected
    small.assert_same_weights(tmp_path, 12, "run", finished)
    assert small.summary(tmp_path)["status"] == "completed"


def test_a_second_interrupt_leaves_immediately(tmp_path, finished, monkeypatch):
    """Without waiting for anything; what was saved before is whole."""
    count = [0]
    original = GPT.forward

    def forward(self, ids, targets=None, cache=None, **options):
        count[0] += 1
        if count[0] == 9:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, ids, targets, cache, **options)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", forward)
        assert small.run(tmp_path) == 75
    assert checkpoint.newest_intact(tmp_path / "run", print) in (4, 6)
    assert small.run(tmp_path, "--resume") == 0
    assert small.losses(tmp_path) == small.losses(finished)


def interrupts(*_, **__):
    """Ctrl-C twice."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name, at_call", [("finish", 1), ("wait", 4)])
def test_a_second_interrupt_while_the_last_save_is_waited_for(tmp_path, monkeypatch, name, at_call):
    """The summary does not keep the status of a run that is running."""
    original = getattr(Saver, name)
    count = [0]

    def interrupted(self, *args):
        count[0] += 1
        if count[0] == at_call:
            interrupts()
        return original(self, *args)

    monkeypatch.setattr(Saver, name, interrupted)
    assert small.run(tmp_path) == 75
    assert count[0] >= at_call and small.summary(tmp_path)["status"] == "stopped"


def test_a_second_interrupt_while_a_run_ends_that_has_no_step_yet(tmp_path, monkeypatch):
    """The first comes during the warm-up, the second while saves in progress are waited for."""
    send_at(monkeypatch, GPT, "forward", 1)
    monkeypatch.setattr(Saver, "wait", interrupts)
    assert small.run(tmp_path) == 75
    assert small.summary(tmp_path)["status"] == "stopped"


def test_an_error_after_a_signal_is_not_hidden(tmp_path, monkeypatch):
    """Only a lost exchange is taken as a sign that the other ranks were asked to stop as well."""
    original = torch.Tensor.backward
    count = [0]

    def backward(self):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("a bug")
        original(self)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(RuntimeError, match="a bug"):
        # given, so that the warm-up is one pass and the third is in a step
        small.run(tmp_path, "--device-batch-size=8")
    summary = small.summary(tmp_path)
    assert summary["status"] == "failed" and "a bug" in summary["reason"]


def test_a_lost_exchange_after_a_signal_is_a_stop(tmp_path, monkeypatch):
    """During the set-up, when the other ranks were asked as well."""
    original = signals.StopSignals.__init__
    stops = []

    def begin_and_note(self, **options):
        stops.append(self)
        original(self, **options)

    def open_corpus(*args):
        stops[0].at_once = False
        os.kill(os.getpid(), signal.SIGTERM)
        raise torch.distributed.DistError("connection reset")

    monkeypatch.setattr(signals.StopSignals, "__init__", begin_and_note)
    monkeypatch.setattr(training_text, "open_corpus", open_corpus)
    monkeypatch.setattr("nanochat.ranks.world_size", lambda: 2)
    monkeypatch.setattr("nanochat.ranks.setup", lambda device_type: torch.device(device_type))
    monkeypatch.setattr("nanochat.ranks.from_rank0", lambda value: value)
    monkeypatch.setattr("nanochat.ranks.from_all", lambda value: [value])
    assert small.run(tmp_path) == 75


# Imports no torch; a clean-up at its end would abort.
EXIT = """
import atexit, os, signal
from nanochat import signals
atexit.register(os.abort)
def run():
    {body}
signals.exit_with(run)
"""


def ended(*statements):
    """A finished process that called signals.exit_with() of a function with these statements."""
    script = EXIT.format(body="\n    ".join(statements))
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=small.ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_exit_code_stands_whatever_comes_after(name):
    """A signal after all is done, and a clean-up that aborts."""
    done = ended(
        "signals.StopSignals(speaks=False).restore()",
        f"os.kill(os.getpid(), signal.{name})",
        "print('done')",
        "return 75",
    )
    assert (done.returncode, done.stdout) == (75, "done\n"), done.stderr


def test_an_unforeseen_error_is_shown_and_its_exit_code_stands():
    done = ended("1 / 0")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_lack_of_memory_for_any_words_is_named():
    done = ended("raise MemoryError")
    assert (done.returncode, done.stderr) == (1, "out of memory\n")


def test_train_ends_that_way(monkeypatch):
    called = []
    monkeypatch.setattr(signals, "exit_with", called.append)
    runpy.run_path(str(small.ROOT / "train.py"), run_name="__main__")
    assert [run.__name__ for run in called] == ["run"]


@pytest.mark.parametrize("ignored", [True, False])
def test_what_a_second_interrupt_does_is_printed_only_where_it_is_heard(ignored):
    """A shell starts what runs in its background with SIGINT ignored."""
    done = ended(
        "signal.signal(signal.SIGINT, signal.SIG_IGN)" if ignored else "pass",
        "stop = signals.StopSignals(speaks=True)",
        "stop.at_once = False",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "return 0",
    )
    assert "stopping after this step" in done.stderr
    assert ("Ctrl-C again" in done.stderr) == (not ignored)


@pytest.mark.parametrize(
    "owner, name, n, step",
    [
        ("GPT", "forward", 4, 3),
        pytest.param("GPT", "forward", 1, 0, marks=pytest.mark.slow),
        pytest.param("bpb", "pad", 1, 5, marks=pytest.mark.slow),
        pytest.param("generation", "sample_next", 9, 6, marks=pytest.mark.slow),
    ],
    ids=["a step", "compiling", "evaluating", "sampling"],
)
def test_a_signal_on_two_ranks(tmp_path, owner, name, n, step):
    """Each rank that gets there is asked; both exit with 75 at the same step, which is saved."""
    script = tmp_path / "sender.py"
    script.write_text(SENDER.format(root=str(small.ROOT), owner=owner, name=name, n=n))
    # given, so that there is one pass of warm-up
    done = small.run_torchrun(tmp_path, 2, "--device-batch-size=4", script=script)
    assert sorted(re.findall("rank . exits with ..", done.stdout)) == [
        "rank 0 exits with 75",
        "rank 1 exits with 75",
    ], done.stderr
    # torchrun's own signal, when one rank is done, does not hide that
    assert "-15" not in done.stderr
    summary = small.summary(tmp_path)
    assert (summary["status"], summary["step"]) == ("stopped", step)
    if step:
        assert checkpoint.steps_of(tmp_path / "run")[-1] == step
