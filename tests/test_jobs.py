"""nanochat jobs: which run a name means, how runs are shown, what is said of those that take no
orders, and the end of processes that hang. What runs do with orders is in test_control.py."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import made_runs
import pytest

from nanochat.__main__ import main as nanochat
from nanochat.apps.jobs import curve, naming, state, verbs, watch
from nanochat.common import UsageError
from nanochat.run import registry
from nanochat.run.folder import write_summary
from nanochat.run.registry import Job, Process

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 30.0
ESCAPE = "\x1b[2J\x1b]0;title\x07"
OWN = Process.own(0)
# the number of this process, with which another one ran before
GONE = dataclasses.replace(OWN, start="1")
REBOOTED = dataclasses.replace(OWN, boot="before")
ELSEWHERE = dataclasses.replace(OWN, machine="node7 0123", host="node7")
CONTAINED = dataclasses.replace(OWN, container="pid:[1]", host="box")


@pytest.fixture(autouse=True)
def own_registry(tmp_path, monkeypatch):
    """A registry without the runs of other tests; the working directory is tmp_path."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)


def announce(path, *processes, socket_path="", began=None, in_folder=False):
    """Enter a job in the registry, and into the run folder if asked to; returns it."""
    job = Job(str(Path(path).resolve()), str(socket_path), began or time.time(), processes)
    registry.announce(job)
    if in_folder:
        registry.announce(job, Path(path) / registry.JOB_FILE)
    return job


def make(folder, name="d4", *processes, status="running", **options):
    """A made run folder of 200 steps, announced if it gets processes."""
    path = made_runs.make(folder, name, status=status)
    if processes:
        announce(path, *processes, **options)
    return path


def place_of(path):
    return state.place_of(Path(path), state.announced())


def look(path):
    return state.look(place_of(path))


def run(*arguments):
    """The exit code of the command, as from a shell."""
    return nanochat(["jobs", *map(str, arguments)])


# ----- statuses


@pytest.mark.parametrize(
    "process, recorded, expected",
    [
        (OWN, "running", "running"),
        # in the set-up of a start that resumes it
        (OWN, "stopped", "running"),
        (GONE, "running", "killed"),
        (GONE, "completed", "completed"),
        (GONE, "stopped", "stopped"),
        (GONE, "failed", "failed"),
        (GONE, "<script>", "killed"),
        (REBOOTED, "running", "killed"),
        (ELSEWHERE, "running", "elsewhere"),
        (ELSEWHERE, "completed", "completed"),
        (CONTAINED, "running", "elsewhere"),
        (None, "running", "killed"),
        (None, "completed", "completed"),
    ],
)
def test_statuses(tmp_path, process, recorded, expected):
    path = make(tmp_path, "d4", *[process] * bool(process), status=recorded)
    found = look(path)
    assert found.status == expected and found.status in state.STATUSES
    assert (found.tag, found.step, found.steps, found.depth) == ("d4", 200, 200, 4)
    assert found.loss is not None and not found.answers


def test_a_run_that_was_not_announced_is_known_by_its_lock(tmp_path):
    path = make(tmp_path)
    with open(path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert look(path).status == "running"
        with pytest.raises(verbs.Refused, match="did not announce how to reach it"):
            verbs.reach(place_of(path))
    assert look(path).status == "killed"


@pytest.mark.parametrize(
    "process, expected", [(OWN, "running"), (GONE, "ended"), (ELSEWHERE, "elsewhere")]
)
def test_a_run_without_a_folder(tmp_path, process, expected):
    """Its process is in the set-up, or ended there."""
    announce(tmp_path / "d4", process)
    found = look(tmp_path / "d4")
    assert (found.status, found.step) == (expected, None)
    assert found.doing == ("setting up" if expected == "running" else "")


def test_the_latest_start_counts(tmp_path):
    path = make(tmp_path, "d4", OWN, began=200.0)
    announce(path, GONE, began=100.0)
    assert look(path).status == "running"
    announce(path, GONE, began=300.0, in_folder=True)
    (path / "job.json").touch()
    assert look(path).status == "killed"


def test_a_copied_folder_is_not_the_run_that_it_was_copied_from(tmp_path):
    path = make(tmp_path, "d4", OWN, in_folder=True)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", path, copy], check=True)
    assert look(path).status == "running" and look(copy).status == "killed"
    with pytest.raises(verbs.Refused, match="it was killed at step 200; nothing is saved"):
        verbs.reach(place_of(copy))


def test_the_start_of_a_process(tmp_path):
    """It tells two processes of one number apart; a process that is only a remainder is gone."""
    child = subprocess.Popen(["sleep", "60"])
    start = registry.start_of(child.pid)
    process = dataclasses.replace(OWN, pid=child.pid, start=start)
    assert start and process.exists() is True
    assert dataclasses.replace(process, start=start + "1").exists() is False
    child.kill()
    # not waited for: it stays in the table of processes
    deadline = time.monotonic() + DEADLINE
    while process.exists():
        assert time.monotonic() < deadline
    child.wait()
    assert registry.start_of(child.pid) == ""


# ----- names


def test_a_tag_names_the_only_run_that_has_it(tmp_path):
    path = make(tmp_path / "somewhere", "d4", GONE)
    assert naming.named("d4").path == path.resolve()


def test_two_runs_of_one_tag_need_a_path(tmp_path, monkeypatch):
    first = make(tmp_path / "a", "d4", OWN)
    second = make(tmp_path / "b", "d4", GONE, status="completed")
    with pytest.raises(UsageError) as error:
        naming.named("d4")
    assert str(first) in str(error.value) and str(second) in str(error.value)
    assert naming.named("b/d4").path == second
    assert naming.named(f"{first}/").path == first
    monkeypatch.chdir(first)
    assert naming.named(".").path == first
    # one here is as good as one in the registry
    third = make(tmp_path / "c", "d6")
    monkeypatch.chdir(tmp_path / "c")
    assert naming.named("d6").path == third
    make(tmp_path / "d", "d6", GONE)
    with pytest.raises(UsageError, match="2 runs have this tag"):
        naming.named("d6")
    assert naming.named("./d6").path == third


def test_a_tag_names_a_run_in_the_default_folder(tmp_path, monkeypatch):
    """One that nobody announced, and only where no other run has the tag."""
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "out", "d4")
    assert naming.named("d4").path == path
    other = make(tmp_path / "a", "d4", GONE)
    assert naming.named("d4").path == other


def test_a_run_that_was_deleted_has_no_tag(tmp_path):
    announce(tmp_path / "a" / "d4", GONE)
    second = make(tmp_path / "b", "d4", GONE)
    assert naming.named("d4").path == second


@pytest.mark.parametrize(
    "text, message",
    [
        ("d5", "no run of yours has this tag; .* such as out/d5"),
        ("runs/d5", "no such folder"),
        (".", "the folders in it do: d4"),
        ("empty/", "holds no run; name a run folder"),
        ("", "RUN is empty"),
        ("a\0b", "no run of yours"),
    ],
)
def test_what_names_no_run(tmp_path, text, message):
    make(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        naming.named(text)


# ----- list and status


def listed(capsys, *arguments):
    """{tag: run} of --json."""
    assert run("list", "--json", *arguments) == 0
    return {found["tag"]: found for found in json.loads(capsys.readouterr().out)["runs"]}


def test_list_shows_recent_runs_of_the_registry(tmp_path, capsys):
    make(tmp_path / "a", "d4", OWN)
    make(tmp_path / "b", "d12", GONE, status="completed")
    old = make(tmp_path / "b", "old", GONE, status="completed")
    for file in old.iterdir():
        os.utime(file, (1e9, 1e9))
    announce(tmp_path / "b" / "deleted", GONE)
    make(tmp_path / "c", "unannounced")
    assert list(listed(capsys)) == ["d4", "d12"]
    assert set(listed(capsys, "--all")) == {"d4", "d12", "old", "deleted"}
    assert run("list") == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    columns = ["run", "folder", "status", "depth", "step", "loss", "tok/s", "eta"]
    assert heading.split() == columns
    assert first.split()[:5] == ["d4", "a/d4", "running", "4", "200/200"]
    assert second.split()[:3] == ["d12", "b/d12", "completed"]


def test_list_shows_what_is_named(tmp_path, capsys):
    make(tmp_path / "a", "d4", OWN)
    make(tmp_path / "b", "d6", status="completed")
    make(tmp_path / "b", "d8", status="failed")
    assert set(listed(capsys, "b")) == {"d6", "d8"}
    assert set(listed(capsys, "b/d6", "d4")) == {"d6", "d4"}
    assert set(listed(capsys, "--out-dir=a", "--out-dir", "b")) == {"d4", "d6", "d8"}
    assert run("list", "nowhere") == 2


def test_list_of_nothing(capsys):
    assert run("list") == 0
    assert "no runs" in capsys.readouterr().out
    assert listed(capsys) == {}


def test_status_in_words(tmp_path, capsys):
    path = make(tmp_path, "d4", OWN, OWN)
    assert run("status", "d4") == 0
    shown = capsys.readouterr().out
    for text in (f"folder      {path}", "200 of 200 (100%)", "2 ranks", "does not answer"):
        assert text in shown
    write_summary(path, status="failed", reason=f"no\n{ESCAPE}data", step=7)
    assert run("status", "d4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "running"


# contents of entries that no run writes
HOSTILE = {
    "empty": "",
    "torn": '{"format": 1, "path": "/a',
    "deep": "[" * 200_000,
    "a list": "[1]",
    "no processes": {"processes": []},
    "a negative pid": {"pid": -1},
    "all processes": {"pid": 0},
    "init": {"pid": 1},
    "a pid that is true": {"pid": True},
    "a pid that is text": {"pid": "1"},
    "a start that is a number": {"start": 1},
    "a relative path": {"path": "out/d4"},
    "a path with a zero": {"path": "/a\0b"},
    "a socket that is a list": {"socket": ["/"]},
    "a time without end": {"began": float("inf")},
    "a time beyond floats": {"began": 10**400},
    "another version": {"format": 2},
    "another field": {"uid": 0},
}


def entry_with(folder, **changes):
    """The JSON of an entry of this process with other values."""
    values = Job(str(folder), "", time.time(), (OWN,)).as_dict()
    for name, value in changes.items():
        where = values if name in values else values["processes"][0]
        where[name] = value
    return json.dumps(values)


@pytest.mark.parametrize("name", HOSTILE)
def test_entries_that_no_run_wrote_are_left_out(tmp_path, name, capsys):
    path = make(tmp_path, "d4", OWN)
    content = HOSTILE[name]
    text = content if isinstance(content, str) else entry_with(path, **content)
    (registry.folder() / "0.json").write_text(text)
    (path / "job.json").write_text(text)
    assert set(listed(capsys)) == {"d4"}
    assert run("cleanup") == 0


def test_a_pipe_or_a_huge_file_is_no_entry(tmp_path, capsys):
    os.mkfifo(registry.folder(make=True) / "0.json")
    with open(registry.folder() / "1.json", "w") as file:
        file.truncate(1 << 30)
    assert listed(capsys) == {}


def test_texts_of_others_do_not_reach_the_terminal(tmp_path, capsys):
    process = dataclasses.replace(ELSEWHERE, host=ESCAPE)
    path = make(tmp_path, f"d4{ESCAPE[0]}[2J", process)
    assert run("list") == 0 and run("status", path) == 0 and run("save", path) == 1
    shown = "".join(capsys.readouterr())
    assert "d4" in shown and "\x1b" not in shown and "\x07" not in shown


# ----- what is said of runs that take no orders


@pytest.mark.parametrize(
    "process, status, message",
    [
        (ELSEWHERE, "running", "it was started on node7: use `nanochat jobs` there"),
        (GONE, "completed", "it completed at step 200"),
        (GONE, "stopped", "it was stopped at step 200; --resume continues from step 150"),
        (GONE, "failed", "it failed at step 200; --resume continues from step 150"),
        (REBOOTED, "running", "it was killed at step 200; --resume continues from"),
    ],
)
def test_runs_that_take_no_orders(tmp_path, process, status, message, capsys):
    path = make(tmp_path, "d4", process, status=status)
    checkpoint = path / "checkpoints" / "step_000150"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    for verb in ("save", "stop", "save-stop", "abort", "land", "pause", "continue"):
        assert run(verb, "d4") == 1
        assert capsys.readouterr().err.startswith(f"nanochat jobs {verb}: d4: {message}")
    assert run("set", "d4", "--eval-every=5", "--json") == 1
    assert message in json.loads(capsys.readouterr().out)["error"]


def test_a_run_of_another_user(tmp_path, monkeypatch, capsys):
    path = make(tmp_path, "d4", OWN, in_folder=True)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    assert run("abort", path) == 1
    assert "it belongs to another user" in capsys.readouterr().err
    assert run("status", path) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["set", "d4"], "nothing to set; give at least one of --stop-at-bpb, --patience"),
        (["set", "d4", "--depth=3"], "--depth: cannot change while a run is training"),
        (["set", "d4", "--eval-every=0"], "--eval-every=0: must be positive"),
        (["set", "d4", "--core-metric-every=auto"], "'auto': not a number"),
        (["set", "d4", "5"], "not flags: 5"),
        (["land", "d4", "--minutes=1e9"], "longer than a year"),
    ],
)
def test_requests_that_are_refused_here(tmp_path, arguments, message, capsys):
    make(tmp_path, "d4", OWN)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["delete", "d4"],
        ["save"],
        ["save", "d4", "--timeout=0"],
        ["save", "d4", "--timeout=nan"],
        ["land", "d4", "--minutes=-1"],
        ["set", "d4", "--eval-every=often"],
        ["save", "d4", "--eval-every=5"],
    ],
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2


# ----- processes that do not answer, and answers that no run gives


class Server:
    """Listens on a socket, and answers each request with the same bytes, or not at all."""

    def __init__(self, folder, answer=None):
        self.path = Path(folder) / "s"
        self.answer = answer
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(self.path))
        self.socket.listen()
        self.requests = []
        if answer is not None:
            threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                with client:
                    self.requests.append(json.loads(client.recv(1 << 16)))
                    client.sendall(self.answer)


@pytest.fixture
def short_folder():
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix=registry.SOCKET_FOLDER) as folder:
        yield Path(folder)


def test_an_order_and_its_answers(tmp_path, short_folder, capsys):
    lines = [{"doing": "step 5"}, {"done": "step 6 is saved", "step": 6}]
    server = Server(short_folder, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    path = make(tmp_path, "d4", OWN, socket_path=server.path)
    assert run("save", "d4") == 0
    assert capsys.readouterr().out == "d4: busy with step 5\nd4: step 6 is saved\n"
    assert run("set", "d4", "--eval-every=5", "--save-every-minutes", "0.5", "--json") == 0
    done = {"run": str(path), "command": "set", "done": "step 6 is saved", "step": 6}
    assert json.loads(capsys.readouterr().out) == done
    assert run("land", "d4", "--minutes=2") == 0
    assert server.requests == [
        {"verb": "save"},
        {"verb": "set", "values": {"eval_every": 5, "save_every_minutes": 0.5}},
        {"verb": "land", "minutes": 2.0},
    ]


@pytest.mark.parametrize(
    "answer, message",
    [
        (b'{"error": "this run saves nothing (--no-save)"}\n', "this run saves nothing"),
        (b"", "not done: it is running at step 200"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "an answer that is not one of a run"),
        (b"[" * 100_000 + b"\n", "an answer that is not one of a run"),
        (b"[1]\n", "an answer that is not one of a run"),
        (b"x" * (2 << 20), "an answer without end"),
        (b'{"error": "\\u001b[2J"}\n', "\N{REPLACEMENT CHARACTER}[2J"),
    ],
)
def test_answers_that_are_no_success(tmp_path, short_folder, answer, message, capsys, monkeypatch):
    monkeypatch.setattr(verbs, "GONE_SECONDS", 0.1)
    server = Server(short_folder, answer)
    make(tmp_path, "d4", OWN, socket_path=server.path)
    assert run("save", "d4") == 1
    shown = capsys.readouterr().err
    assert message in shown and "\x1b" not in shown
    # its files tell what its process does not
    assert run("status", "d4") == 0


def test_a_process_that_is_silent(tmp_path, short_folder, capsys, monkeypatch):
    monkeypatch.setattr(verbs, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(state, "ANSWER_SECONDS", 0.05)
    server = Server(short_folder)
    make(tmp_path, "d4", OWN, socket_path=server.path)
    assert run("save", "d4", "--timeout=1.5") == 1
    shown = capsys.readouterr()
    assert f"no answer from process {os.getpid()} so far" in shown.out
    assert "not done within 1.5 s; the run does it as soon as it can" in shown.err


def test_a_dead_socket(tmp_path, capsys):
    make(tmp_path, "d4", OWN, socket_path=tmp_path / "nothing")
    assert run("save", "d4") == 1
    shown = capsys.readouterr().err
    assert f"process {os.getpid()} is there, but takes no orders" in shown
    assert "`nanochat jobs stop` asks it by a signal" in shown


STOPS = """
import signal, sys
sys.path.insert(0, {root!r})
from nanochat.run.folder import write_summary
def stop(*_):
    write_summary({path!r}, status="stopped", reason="asked to stop by a signal", step=201)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
signal.pause()
"""


def test_stop_asks_by_a_signal_where_the_socket_is_dead(tmp_path, capsys):
    path = make(tmp_path)
    script = STOPS.format(root=str(ROOT), path=str(path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        announce(path, dataclasses.replace(OWN, pid=child.pid, start=registry.start_of(child.pid)))
        assert run("stop", "d4", "--timeout=20") == 0
        assert child.wait() == 75
    shown = capsys.readouterr().out
    assert f"asking process {child.pid} by SIGTERM" in shown
    assert "d4: it was stopped at step 201 (asked to stop by a signal)" in shown


@pytest.fixture
def suspended():
    """Two processes that are stopped in the middle of what they do, as ranks of a job."""
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)
    yield (
        [
            dataclasses.replace(OWN, rank=i, pid=child.pid, start=registry.start_of(child.pid))
            for i, child in enumerate(children)
        ],
        children,
    )
    for child in children:
        child.kill()
        child.wait()


def test_abort_of_a_run_that_hangs(tmp_path, short_folder, suspended, capsys):
    processes, children = suspended
    server = Server(short_folder)
    other = dataclasses.replace(ELSEWHERE, rank=2)
    path = make(tmp_path, "d4", *processes, other, socket_path=server.path, in_folder=True)
    began = time.monotonic()
    assert run("abort", "d4", "--json") == 0
    assert time.monotonic() - began < DEADLINE
    assert [child.wait() for child in children] == [-signal.SIGKILL] * 2
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 200 and "aborted by nanochat jobs, without saving" in found["done"]
    summary = json.loads((path / "summary.json").read_text())
    assert summary["status"] == "stopped" and summary["total_training_time"] > 0
    assert not server.path.exists() and not (path / "job.json").exists()


def test_a_process_that_only_has_the_number_is_left_alone(tmp_path, suspended):
    processes, children = suspended
    make(tmp_path, "d4", *(dataclasses.replace(each, start="1") for each in processes))
    assert run("abort", "d4") == 1 and run("stop", "d4") == 1
    assert [child.poll() for child in children] == [None, None]


# ----- cleanup


def test_cleanup_removes_what_is_dead_and_nothing_else(tmp_path, short_folder, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    dead, alive = (registry.socket_folder() / f"{name}.sock" for name in ("dead", "alive"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(alive))
    listener.listen()
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(dead))
    orphan = registry.socket_folder() / "orphan.sock"
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(orphan))
    os.utime(orphan, (1e9, 1e9))
    killed = make(tmp_path / "a", "d4", GONE, socket_path=dead, in_folder=True)
    running = make(tmp_path / "b", "d4", OWN, socket_path=alive, in_folder=True)
    make(tmp_path / "c", "d6", ELSEWHERE, in_folder=True)
    # of a folder that the registry has forgotten, and of a copy
    forgotten = make(tmp_path / "e", "d8")
    registry.announce(Job(str(forgotten), "", 1.0, (GONE,)), forgotten / "job.json")
    copy = tmp_path / "e" / "copy"
    subprocess.run(["cp", "-r", running, copy], check=True)
    # a file that an entry only claims to be a socket
    victim = tmp_path / "victim"
    victim.write_text("precious")
    make(tmp_path / "f", "d4", GONE, socket_path=victim)
    before = {path for path in tmp_path.rglob("*") if path.name != "job.json"}
    assert run("cleanup", "--json", tmp_path / "e") == 0
    removed = json.loads(capsys.readouterr().out)
    assert set(removed["sockets"]) == {str(dead), str(orphan)}
    assert set(removed["job_files"]) == {
        str(folder / "job.json") for folder in (killed, forgotten, copy)
    }
    assert len(removed["entries"]) == 2
    after = {path for path in tmp_path.rglob("*") if path.name != "job.json"}
    assert before - after == set(map(Path, removed["entries"]))
    assert alive.exists() and (running / "job.json").exists()
    assert {entry.job.leader for entry in registry.entries()} == {OWN, ELSEWHERE}
    assert naming.named("d4").path == running
    assert run("cleanup") == 0
    assert "removed 0 dead sockets, the records of 0 starts" in capsys.readouterr().out
    listener.close()


def test_cleanup_leaves_the_sockets_of_other_programs(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        agent = Server(folder)
        make(tmp_path, "d4", GONE, socket_path=agent.path)
        assert run("cleanup") == 0
        assert agent.path.exists() and registry.entries() == []


# ----- watch


def test_losses_are_read_as_they_come(tmp_path):
    path = tmp_path / "metrics.jsonl"
    losses = curve.Losses(path)
    losses.read()
    lines = [
        '{"step": 0, "train/loss": 5.5}',
        '{"step": 1, "val/loss": 5.0, "val/bpb": 7.2}',
        '{"step": 1, "train/loss": null}',
        '{"step": 1, "train/loss": NaN}',
        '{"step": "1", "train/loss": 3}',
        '{"step": 1, "train/loss": 1e300}',
        "[" * 100_000,
        "\xff\0",
        '{"step": 2, "train/loss": 4.5}',
    ]
    with open(path, "w") as file:
        for line in lines:
            file.write(line[:5])
            file.flush()
            losses.read()
            file.write(line[5:] + "\n")
            file.flush()
            losses.read()
    assert list(losses.values["train/loss"]) == [5.5, 4.5]
    assert list(losses.steps["train/loss"]) == [0, 2]
    assert list(losses.values["val/loss"]) == [5.0]
    # a resumed run replaces it
    new = tmp_path / "new"
    new.write_text('{"step": 0, "train/loss": 9}\n')
    new.replace(path)
    losses.read()
    assert list(losses.values["train/loss"]) == [9] and not losses.values["val/loss"]


def test_curves_are_thinned_by_means():
    assert curve.thinned([1, 2, 3, 4, 5], [1, 3, 5, 7, 9], 3) == ([1.5, 3.5, 5], [2, 6, 9])
    assert curve.thinned([1, 2], [3, 4], 8) == ([1, 2], [3, 4])
    assert curve.spread([0, 10, 20, 30, 40], 3) == [0, 20, 40]


@pytest.mark.parametrize("width", [1, 9, 23, 24, 40, 79, 200])
@pytest.mark.parametrize("height", [1, 5, 14, 60])
def test_the_view_fits(tmp_path, width, height):
    path = make(tmp_path, "模型d4", OWN)
    losses = curve.Losses(path / "metrics.jsonl")
    losses.read()
    lines = watch.frame(look(path), losses, width, height)
    assert all(watch.columns_of(line) <= width for line in lines)
    is_drawn = any("┤" in line for line in lines)
    assert is_drawn == (width >= curve.LEAST_WIDTH and height >= 14)
    # what is known may need more lines than there are; the picture takes only what is left
    assert not is_drawn or len(lines) <= height


def test_the_picture_shows_the_curve(tmp_path):
    path = make(tmp_path)
    losses = curve.Losses(path / "metrics.jsonl")
    losses.read()
    lines = curve.drawn(losses, 60, 15)
    assert len(lines) == 15 and lines[0] == "loss by step: line training"
    first, last = lines[2], lines[-3]
    # it falls: high on the left, low on the right
    assert first.strip(" ┤│7.") and not first[40:].strip(" │")
    assert last[40:].strip(" │")
    assert lines[-1].split()[0] == "0" and lines[-1].split()[-1] == "199"


def test_without_the_package_the_view_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotext", None)
    make(tmp_path, "d4", OWN)
    assert run("watch", "d4", "--once") == 0
    assert "pip install plotext" in capsys.readouterr().out


def test_watch_once_and_in_lines(tmp_path, capsys):
    make(tmp_path, "d4", GONE, status="completed")
    assert run("watch", "d4", "--once") == 0
    shown = capsys.readouterr().out
    assert "d4: it completed at step 200" in shown and "100%" in shown and "┤" in shown
    # it is over: one line
    assert run("watch", "d4") == 0
    assert capsys.readouterr().out.count("\n") == 1
    for once in ([], ["--once"]):
        assert run("watch", "d4", "--json", *once) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "completed"


def test_watch_follows_a_run_to_its_end(tmp_path, capsys, monkeypatch):
    path = make(tmp_path, "d4", OWN)

    def end_it(seconds):
        write_summary(path, status="failed", reason="no data", step=200)
        announce(path, GONE, began=time.time() + 1)

    monkeypatch.setattr(watch.time, "sleep", end_it)
    assert run("watch", "d4") == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("d4: running  step 200/200")
    assert last.startswith("d4: it failed at step 200 (no data); nothing is saved")


def on_a_terminal(path, *keys):
    """What `watch` shows on a terminal of 60 columns when these are pressed one after the other,
    its exit code, and whether the terminal is as before."""
    command = [sys.executable, "-m", "nanochat", "jobs", "watch", str(path), "--every=60"]
    terminal, other = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 60))
    before = termios.tcgetattr(terminal)
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    child = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=environment, cwd=ROOT
    )
    shown = b""
    for key in keys:
        frames = shown.count(watch.CLEAR_BELOW.encode())
        while shown.count(watch.CLEAR_BELOW.encode()) == frames:
            assert select.select([terminal], [], [], DEADLINE)[0]
            shown += os.read(terminal, 1 << 16)
        if key == "Ctrl-C":
            child.send_signal(signal.SIGINT)
        else:
            os.write(terminal, key.encode())
    until = time.monotonic() + DEADLINE
    while child.poll() is None or select.select([terminal], [], [], 0)[0]:
        assert time.monotonic() < until
        if select.select([terminal], [], [], 0.05)[0]:
            shown += os.read(terminal, 1 << 16)
    is_as_before = termios.tcgetattr(terminal) == before
    os.close(terminal)
    os.close(other)
    return shown.decode(), child.returncode, is_as_before


@pytest.mark.skipif(not hasattr(termios, "tcsetwinsize"), reason="Python 3.11 sets the size")
@pytest.mark.parametrize("keys", [["x", "q"], ["Ctrl-C"]])
def test_watch_on_a_terminal(tmp_path, keys):
    path = make(tmp_path, "d4", OWN)
    before = {file: file.read_bytes() for file in path.iterdir() if file.is_file()}
    shown, code, is_as_before = on_a_terminal(path, *keys)
    assert code == 0 and is_as_before
    # any other key refreshes it; what Ctrl-C interrupts may be shown twice
    assert shown.count(watch.HOME) == len(keys) or keys == ["Ctrl-C"]
    assert shown.startswith(watch.ENTER) and watch.LEAVE in shown
    screen = shown.split(watch.HOME)[1].split(watch.CLEAR_BELOW)[0]
    lines = screen.replace(watch.CLEAR_LINE, "").split("\r\n")
    assert len(lines) <= 24 and all(len(line) < 60 for line in lines)
    assert any("┤" in line for line in lines) and lines[-1] == watch.HINT
    # the last word stays on the screen that was there before
    assert ("d4: running" in shown.split(watch.LEAVE)[1]) == (keys[-1] == "q")
    assert before == {file: file.read_bytes() for file in path.iterdir() if file.is_file()}
