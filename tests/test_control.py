"""Runs in other processes, steered from here in each phase: orders are carried out where they
should be, hostile clients change nothing, and what continues equals a run that was left alone."""

import contextlib
import json
import os
import shutil
import socket
import stat
import struct
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import small

from nanochat.apps.jobs import state, verbs
from nanochat.apps.jobs.asking import Conversation
from nanochat.run import listener, registry
from nanochat.run.control import NUDGE, Control
from nanochat.run.registry import Process

# How long anything here may take before a test fails.
DEADLINE = 60.0
# Samples take half of a run's time.
QUIET = "--sample-every=-1"
# train.py, held in the places for which there is a file "hold NAME", until there is a file "go
# NAME". An evaluation that is held scores empty batches meanwhile, and data that is held is waited
# for as usual. A landing takes 4 steps, whatever the clock says. While a run is paused its tensors
# hold nothing, as on a GPU.
HELD = """
import contextlib, os, sys, time
from pathlib import Path
import torch
sys.path.insert(0, {root!r})
gates = Path({gates!r})
rank = os.environ.get("RANK", "0")

def is_held(name):
    if not (gates / f"hold {{name}}").exists() or (gates / f"go {{name}}").exists():
        return False
    (gates / f"at {{name}} {{rank}}").touch()
    time.sleep(0.02)
    return True

def wait_at(name):
    while is_held(name):
        pass

from nanochat.data.prefetch import Prefetcher
from nanochat.eval import bpb
from nanochat.run import memory, orders, training_text
from nanochat.run.metrics import Record

write, begin, settle, open_corpus, batches, score = (
    Record.write, Prefetcher.__init__, memory.settle, training_text.open_corpus,
    bpb.batches_by_length, bpb._score,
)

def held_write(self, **values):
    if "train/loss" in values:
        wait_at(f"step {{values['step']}}")
    write(self, **values)

def held_items(iterator):
    for n, item in enumerate(iterator):
        wait_at(f"data {{n}} of {{rank}}")
        yield item

def held_begin(self, iterator, *args, **options):
    begin(self, held_items(iterator), *args, **options)

def held_settle(*args):
    wait_at("compiling")
    return settle(*args)

def held_open(*args):
    wait_at("set-up")
    return open_corpus(*args)

def held_batches(*args):
    while is_held("evaluation"):
        yield []
    yield from batches(*args)

def held_score(model, batch, *args):
    return score(model, batch, *args) if batch else torch.zeros(3, dtype=torch.float64)

@contextlib.contextmanager
def parked(tensors, device_type):
    kept = [(tensor, tensor.clone()) for tensor in tensors]
    with torch.no_grad():
        for tensor, _ in kept:
            tensor.fill_(0)
        try:
            yield
        finally:
            for tensor, content in kept:
                tensor.copy_(content)

orders.in_host_memory = parked
Record.write, Prefetcher.__init__, memory.settle = held_write, held_begin, held_settle
training_text.open_corpus, bpb.batches_by_length, bpb._score = held_open, held_batches, held_score
orders.steps_to_land = lambda *args: 4
import train
os._exit(train.run(sys.argv[1:]))
"""


def until(condition):
    """Wait until condition() is true, and return it."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


class Steered:
    """A run on n ranks in other processes, which can be held at places of HELD."""

    def __init__(self, folder, n, tag):
        self.folder, self.n, self.tag = Path(folder), n, tag
        self.path = self.folder / tag
        self.gates = self.folder / "gates"
        self.processes = []
        self.pool = ThreadPoolExecutor(8)

    def start(self, *flags, hold=()):
        """Start it, or resume it. hold: names of places."""
        shutil.rmtree(self.gates, ignore_errors=True)
        self.gates.mkdir()
        for name in hold:
            (self.gates / f"hold {name}").touch()
        script = HELD.format(root=str(small.ROOT), gates=str(self.gates))
        argv = small.argv_of(self.folder, self.tag, [QUIET, *flags])
        # a run that is resumed has its flags, also those that were changed
        if "--resume" in flags or "--overwrite" in flags:
            argv = [f"--out-dir={self.folder}", f"--model-tag={self.tag}", QUIET, *flags]
        output = self.folder / "shown"
        if self.n == 1:
            self.processes = [small.start(argv, small.environment(), output, script)]
        else:
            self.processes = small.start_ranks(self.n, argv, output, script)

    def arrive(self, name, rank=0):
        """Wait until a rank is at a place."""
        until((self.gates / f"at {name} {rank}").exists)

    def release(self, name):
        """Let it go on from a place."""
        (self.gates / f"go {name}").touch()

    def place(self):
        """Where `nanochat jobs` finds it."""
        return state.place_of(self.path, state.announced())

    def look(self):
        """Its state, as `nanochat jobs` shows it."""
        return state.look(self.place())

    def order(self, verb, **more):
        """Give an order; returns what will be its Outcome, once the run has it."""
        heard = []
        request = {"verb": verb, **more}
        future = self.pool.submit(verbs.order, self.place(), request, DEADLINE, heard.append)
        until(lambda: heard or future.done())
        return future

    def stop(self):
        """Ask it to stop; returns what will be the Outcome, once the run knows."""
        heard = []
        future = self.pool.submit(verbs.stop, self.place(), DEADLINE, heard.append)
        until(lambda: heard or future.done())
        return future

    def abort(self):
        """Abort it; returns the Outcome."""
        return verbs.abort(self.place(), DEADLINE, lambda text: None)

    def exit_codes(self):
        """Of its processes, once all have ended."""
        return [small.ended(process, DEADLINE) for process in self.processes]

    def kill(self):
        """End what is left of it."""
        for process in self.processes:
            process.kill()
        self.pool.shutdown(wait=False)


@pytest.fixture
def steered(tmp_path):
    """A function that prepares a run on n ranks in tmp_path."""
    runs = []

    def prepare(n, tag="run"):
        runs.append(Steered(tmp_path, n, tag))
        return runs[-1]

    yield prepare
    for run in runs:
        run.kill()


@pytest.fixture(scope="module", params=[1, 2])
def left_alone(request, tmp_path_factory):
    """(number of ranks, folder of an uninterrupted run on them)."""
    if request.param == 1:
        return 1, small.finished()
    folder = tmp_path_factory.mktemp("left_alone")
    assert small.run_ranks(folder, 2, QUIET).returncode == 0
    return 2, folder


def assert_as_left_alone(run, folder):
    """The metrics and the last weights are those of the run that was left alone."""
    expected = small.timeless(small.lines(folder))
    assert small.timeless(small.lines(run.folder, run.tag)) == expected
    small.assert_same_weights(run.folder, 12, run.tag, folder)


# ----- in each phase


def test_in_the_loop(steered, left_alone):
    n, folder = left_alone
    run = steered(n)
    run.start(hold=["step 2", "step 4", "step 6"])
    run.arrive("step 2")
    seen = run.look()
    assert (seen.status, seen.answers, seen.ranks) == ("running", True, n)
    assert (seen.step, seen.steps, seen.depth) == (2, 12, 2)
    save, pause = run.order("save"), run.order("pause")
    run.release("step 2")
    assert save.result() == verbs.Outcome("step 3 is saved", 3)
    assert pause.result() == verbs.Outcome("paused at step 3", 3)
    seen = run.look()
    assert (seen.status, seen.step, seen.checkpoint) == ("paused", 3, 3)
    assert run.order("pause").result().done == "paused at step 3"
    assert run.order("continue").result() == verbs.Outcome("training continues at step 3", 3)
    run.arrive("step 4")
    pause, onward = run.order("pause"), run.order("continue")
    run.release("step 4")
    assert (pause.result().step, onward.result().step) == (5, 5)
    run.arrive("step 6")
    assert run.look().status == "running"
    stop = run.stop()
    run.release("step 6")
    assert stop.result().step == 7
    assert run.exit_codes() == [75] * n
    assert small.summary(run.folder)["reason"] == "asked to stop by nanochat jobs"
    assert not (run.path / "job.json").exists()
    run.start("--resume", hold=["step 9"])
    run.arrive("step 9")
    # its save has been written, though the summary does not say so yet
    until(lambda: run.look().checkpoint == 8)
    # of its last record, which a checkpoint that has become safe may bring up to date
    assert run.abort().step in (8, 9)
    assert 75 in run.exit_codes()
    seen = run.look()
    assert (seen.status, seen.checkpoint) == ("stopped", 8)
    assert seen.reason == "aborted by nanochat jobs, without saving"
    run.start("--resume")
    assert run.exit_codes() == [0] * n
    assert_as_left_alone(run, folder)


def test_in_an_evaluation_and_while_waiting_for_data(steered, left_alone):
    """Orders are carried out where they find the run, which is not released before."""
    n, folder = left_alone
    run = steered(n)
    # of two ranks, the other one has its data, and waits for this one
    late = f"data 8 of {n - 1}"
    run.start(hold=["evaluation", late])
    run.arrive("evaluation")
    until(lambda: run.look().doing == "the evaluation of step 5")
    assert run.order("pause").result().done == "paused at step 5"
    assert run.order("save").result() == verbs.Outcome("step 5 is saved", 5)
    assert run.look().status == "paused"
    assert run.order("continue").result().step == 5
    run.release("evaluation")
    # its batches are read ahead
    run.arrive(late, n - 1)
    until(lambda: run.look().step == 8)
    assert run.order("pause").result().done == "paused at step 8"
    # one of two at the same time waits for the other
    assert {run.order("save").result().step, run.order("save").result().step} == {8}
    assert run.order("continue").result().step == 8
    assert run.stop().result().step == 8
    assert run.exit_codes() == [75] * n
    run.start("--resume", hold=["evaluation"])
    run.arrive("evaluation")
    until(lambda: run.look().doing == "the evaluation of step 10")
    assert run.stop().result().step == 10
    assert run.exit_codes() == [75] * n
    run.start("--resume", hold=["evaluation"])
    run.arrive("evaluation")
    assert run.abort().step == 10
    run.exit_codes()
    run.start("--resume")
    assert run.exit_codes() == [0] * n
    assert_as_left_alone(run, folder)


@pytest.mark.parametrize("n", [1, 2])
def test_in_the_set_up(steered, n):
    run = steered(n)
    run.start(hold=["set-up"])
    run.arrive("set-up")
    seen = run.look()
    assert (seen.status, seen.doing, seen.step) == ("running", "reading the data", None)
    for verb in ("save", "land"):
        with pytest.raises(verbs.Refused, match="training has not begun .reading the data."):
            run.order(verb).result()
    waiting = run.order("pause")
    assert run.stop().result() == verbs.Outcome(
        "stopped during the set-up, before a step was done", None
    )
    assert run.exit_codes() == [75] * n
    with pytest.raises(verbs.Refused, match="not done: it ended before it trained"):
        waiting.result()
    assert run.look().status == "ended"
    run.start(hold=["compiling"])
    run.arrive("compiling")
    assert run.look().doing == "building the model and compiling"
    assert (run.path / "job.json").exists()
    # what is set now is in force from the first step
    change = run.order("set", values={"eval_every": 4})
    pause = run.order("pause")
    run.release("compiling")
    assert change.result().done == "in force from step 0"
    assert pause.result().step == 0
    assert run.abort().step == 0
    run.exit_codes()
    assert not (run.path / "job.json").exists() and registry.entries()


@pytest.mark.parametrize("n", [1, 2])
def test_landings_and_changed_flags_are_repeated(steered, n):
    """A run that is killed, and one that goes back to before them, equal the one that went on."""
    run = steered(n)
    run.start(hold=["step 3", "evaluation", "step 8"])
    run.arrive("step 3")
    change = run.order("set", values={"eval_every": 3, "save_every_minutes": -1})
    run.release("step 3")
    assert change.result() == verbs.Outcome("in force from step 4", 4)
    # a run that is resumed would be refused with these
    with pytest.raises(verbs.Refused, match="--patience=2: needs evaluations, and --eval-every"):
        run.order("set", values={"eval_every": -1, "patience": 2}).result()
    run.arrive("evaluation")
    # not before the next step: this evaluation would end the run, but not that of another start
    assert run.order("set", values={"stop_at_bpb": 100}).result().step == 6
    landed = run.order("land").result()
    assert landed == verbs.Outcome("landing since step 6: the run ends at step 10", 6)
    with pytest.raises(verbs.Refused, match="the run ends at step 10 anyway"):
        run.order("land", minutes=1).result()
    run.release("evaluation")
    run.arrive("step 8")
    until(lambda: run.look().checkpoint == 8)
    shutil.copytree(run.path, run.folder / "killed")
    run.release("step 8")
    assert run.exit_codes() == [0] * n
    written = small.timeless(small.lines(run.folder))
    changes = [(line["step"], line.get("set/eval_every"), line.get("land")) for line in written]
    assert (4, 3, None) in changes and (6, None, 10) in changes
    assert [line["step"] for line in written if "val/bpb" in line] == [6, 9]
    rates = {line["step"]: line["train/lrm"] for line in written if "train/lrm" in line}
    assert (rates[6], rates[8], max(rates)) == (1, 0.5, 8)
    shutil.copytree(run.path, run.folder / "again")
    for tag, flags in (
        ("killed", ["--resume"]),
        ("again", ["--resume-from-step=4", "--overwrite"]),
    ):
        other = steered(n, tag)
        other.start(*flags)
        assert other.exit_codes() == [0] * n
        assert small.timeless(small.lines(run.folder, tag)) == written
        small.assert_same_weights(run.folder, 9, tag, run.folder)


# ----- clients that mean no good


def talk(path, *pieces, ends=True):
    """Send bytes to a socket, and return all that comes back until it ends."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(path)
        answer = b""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                client.sendall(piece)
            if ends:
                client.shutdown(socket.SHUT_WR)
            while piece := client.recv(1 << 16):
                answer += piece
        return answer


def deep(n):
    return b'{"verb": ' + b"[" * n + b"\n"


NO_REQUESTS = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 16,
    "a line of garbage": os.urandom(64).replace(b"\n", b"") + b"\n",
    "half a line": b'{"verb": "st',
    "a megabyte": b"x" * (1 << 20),
    "a megabyte of JSON": b'{"verb": "' + b"x" * (1 << 20) + b'"}\n',
    "deep JSON": deep(50_000),
    "no object": b"[1, 2]\n",
    "no verb": b"{}\n",
    "an unknown verb": b'{"verb": "delete"}\n',
    "a verb that is no text": b'{"verb": {"save": 1}}\n',
}


def test_hostile_clients_do_not_disturb_training(steered):
    run = steered(1)
    run.start(hold=["step 3"])
    run.arrive("step 3")
    path = run.place().job.socket
    for request in NO_REQUESTS.values():
        answer = talk(path, request)
        assert not answer or "error" in json.loads(answer)
    with contextlib.ExitStack() as many:
        for _ in range(200):
            client = many.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(DEADLINE)
            client.connect(path)
        # of those that have not said what they want, a few are waited for, and not for long
        assert "more than 16 clients" in json.loads(client.recv(1 << 16))["error"]
    # one that is gone before its order is carried out
    with Conversation(path, {"verb": "save"}) as conversation:
        assert conversation.read(DEADLINE)
    assert run.look().answers
    run.release("step 3")
    # while it trains, and perhaps when it is gone
    with contextlib.suppress(OSError):
        for request in NO_REQUESTS.values():
            talk(path, request)
    assert run.exit_codes() == [0]
    assert_as_left_alone(run, small.finished())


# ----- a control in this process, as if a run were training


NO_ORDERS = {
    "no minutes": {"verb": "land", "minutes": "soon"},
    "minutes that overflow": {"verb": "land", "minutes": 1e308},
    "minutes without end": {"verb": "land", "minutes": float("inf")},
    "no values": {"verb": "set", "values": {}},
    "a list of values": {"verb": "set", "values": [["eval_every", 1]]},
    "a flag that is fixed": {"verb": "set", "values": {"depth": 3}},
    "a flag of another type": {"verb": "set", "values": {"eval_every": 1.5}},
    "a value out of range": {"verb": "set", "values": {"eval_every": 0}},
    "no number": {"verb": "set", "values": {"patience": float("nan")}},
}


@pytest.fixture
def listening(tmp_path):
    """A Control of a run at step 5, which takes no orders from it."""
    stop = types.SimpleNamespace(reason="", requested=False)
    run = Control(tmp_path, 0, stop, pytest.fail)
    run.listen([Process.own(0)])
    run.begin(lambda: {"step": 5, "doing": "step 5"})
    yield run
    run.close()


def asked(run, request):
    """The messages with which a Control answers a request."""
    line = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
    return [json.loads(line) for line in talk(run.listener.job.socket, line).splitlines()]


@pytest.mark.parametrize("name", NO_ORDERS)
def test_what_is_no_order_never_reaches_the_loop(listening, name):
    (answer,) = asked(listening, NO_ORDERS[name])
    assert set(answer) == {"error"} and not listening.pending


def test_another_user_gets_no_answer(listening, monkeypatch):
    monkeypatch.setattr(listener, "is_own", lambda connection: False)
    assert asked(listening, {"verb": "status"}) == []
    monkeypatch.undo()
    assert asked(listening, {"verb": "status"})[0]["step"] == 5


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="Linux tells who the other end is")
def test_who_is_at_the_other_end():
    for user, expected in ((os.geteuid(), True), (0, True), (os.geteuid() + 1, False)):
        credentials = struct.pack("3i", 4711, user, 1)
        peer = types.SimpleNamespace(getsockopt=lambda *_, told=credentials: told)
        assert registry.is_own(peer) is expected
    mine, other = socket.socketpair(socket.AF_UNIX)
    with mine, other:
        assert registry.is_own(mine)


def test_orders_that_a_run_leaves_behind_are_refused(listening):
    with Conversation(listening.listener.job.socket, {"verb": "save"}) as conversation:
        assert conversation.read(DEADLINE) == {"doing": "step 5"}
        until(lambda: listening.pending)
        listening.end()
        assert conversation.read(DEADLINE) == {"error": "the run is ending"}
    assert asked(listening, {"verb": "pause"}) == [{"error": "the run is ending"}]
    assert asked(listening, {"verb": "status"})[0]["doing"] == "ending"


def test_a_save_that_is_being_written_is_waited_for_at_the_end(listening):
    with Conversation(listening.listener.job.socket, {"verb": "save"}) as conversation:
        assert conversation.read(DEADLINE) == {"doing": "step 5"}
        (order,) = until(listening.take)
        outcomes = [{"done": "step 5 is saved", "step": 5}, None]
        order.finished = lambda: outcomes[-1]
        listening.end()
        outcomes.pop()
        assert conversation.read(DEADLINE)["done"] == "step 5 is saved"


def test_a_process_with_the_number_of_a_rank_gets_no_signal(tmp_path):
    with contextlib.closing(Control(tmp_path, 0, types.SimpleNamespace(), pytest.fail)) as run:
        run.begin(dict)
        own = Process.own(1)
        for others, nudged in ([replace(own, start="before")], False), ([own], True):
            run.others = others
            run.begin_order({"verb": "save"})
            assert run.nudged is nudged


def test_a_nudge_is_looked_at_twice(tmp_path):
    """Rank 0 may have taken its orders a moment before the nudge came."""
    with contextlib.closing(Control(tmp_path, 1, types.SimpleNamespace(), pytest.fail)) as run:
        assert not run.pending
        os.kill(os.getpid(), NUDGE)
        assert run.pending and run.take() == []
        assert run.pending and run.take() == []
        assert not run.pending


def test_only_this_user_can_reach_the_socket(listening):
    path = Path(listening.listener.job.socket)
    assert len(os.fsencode(path)) < registry.LONGEST_SOCKET_PATH
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(registry.folder().stat().st_mode) & 0o077 == 0
    listening.announce_in_folder()
    assert registry.read_job(listening.path / "job.json") == listening.listener.job
    listening.close()
    assert not path.exists() and not (listening.path / "job.json").exists()
    # a record of a recent run
    assert registry.entries()[-1].job.path == str(listening.path)


@pytest.mark.parametrize("kind", ["open to all", "a link"])
def test_a_socket_folder_that_others_could_change_is_not_used(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    usual = tmp_path / f"nanochat-{os.geteuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "a link":
        usual.symlink_to(elsewhere)
    else:
        usual.mkdir()
        usual.chmod(0o777)
    found = registry.socket_folder()
    assert found not in (usual, elsewhere) and stat.S_IMODE(found.stat().st_mode) == 0o700


def test_a_run_without_a_socket_says_so_and_trains(tmp_path, monkeypatch, capsys):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert small.run(tmp_path, "--num-iterations=2", *small.BARE) == 0
    shown = capsys.readouterr().out
    said = [line for line in shown.splitlines() if line.startswith("nanochat jobs cannot reach")]
    assert len(said) == 1 and "set TMPDIR to a shorter path" in said[0]
    assert small.summary(tmp_path)["status"] == "completed"
