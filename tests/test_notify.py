"""--notify: a command or a server hears of a run; one that hangs, fails or floods harms nothing."""

import contextlib
import http.server
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import small

from nanochat.run import notify
from nanochat.run.checks import check_flags
from nanochat.run.flags import parse
from nanochat.run.notify import Notifier

FACTS = {"step": 7, "loss": 2.5, "val_bpb": None}
# A name that a shell would run, were it ever part of a command.
HOSTILE = "a $(touch pwned) `touch pwned` ; touch pwned #'\""


class Reports(list):
    """Lines, and a sign that one has come."""

    def __init__(self):
        super().__init__()
        self.came = threading.Event()

    def add(self, line):
        self.append(line)
        self.came.set()


@pytest.fixture
def reports():
    return Reports()


@pytest.fixture
def impatient(monkeypatch):
    """No test waits ten seconds for something that hangs."""
    monkeypatch.setattr(notify, "PATIENCE_SECONDS", 1.0)


@contextlib.contextmanager
def server(status=200, headers=(), hang=None):
    """A server on 127.0.0.1; yields (its URL, the requests that it gets as (headers, JSON)).

    hang: an event; no request is answered before it is set."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((dict(self.headers), json.loads(content)))
            if hang is not None:
                hang.wait(30)
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self):
            requests.append("GET")

        def log_message(self, *args):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{serving.server_address[1]}/hook?key=secret", requests
    finally:
        if hang is not None:
            hang.set()
        serving.shutdown()
        thread.join()
        serving.server_close()


def send_all(target, folder, reports, *events, seconds=20.0):
    """A Notifier that sends these events, the last one as the run ends."""
    notifier = Notifier(target, Path(folder), reports.add)
    for event in events[:-1]:
        notifier.send(event, f"because of {event}", **FACTS)
        # not yet the end: the last message would take its place
        while not notifier.waiting.empty():
            time.sleep(0.01)
    notifier.send_last(events[-1], "all done", seconds, **FACTS)
    return notifier


def saved(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ----- what is sent


def test_a_server_gets_json(tmp_path, reports):
    with server() as (url, requests):
        send_all(url, tmp_path / "d4", reports, "stalled", "completed")
    assert reports == []
    (headers, first), (_, last) = requests
    assert headers["Content-Type"] == "application/json"
    assert first["event"] == "stalled" and first["reason"] == "because of stalled"
    assert last.pop("host") == socket.gethostname()
    assert last.pop("time").endswith("+00:00")
    assert last == {
        "event": "completed",
        "run": "d4",
        "folder": str(tmp_path / "d4"),
        **FACTS,
        "reason": "all done",
        "text": "d4: completed at step 7, loss 2.5000: all done",
    }


def test_a_command_gets_json_and_the_environment(tmp_path, reports):
    out = tmp_path / "got"
    command = f'cat >> {out}; echo "$NANOCHAT_EVENT $NANOCHAT_RUN" >> {out}.names'
    send_all(command, tmp_path / "d4", reports, "spike", "failed")
    assert reports == []
    assert [message["event"] for message in saved(out)] == ["spike", "failed"]
    assert Path(f"{out}.names").read_text() == "spike d4\nfailed d4\n"


def test_names_and_reasons_are_data(tmp_path, reports, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "got"
    notifier = Notifier(f'cat >> {out}; echo "$NANOCHAT_RUN" >> {out}', tmp_path / HOSTILE, print)
    notifier.send_last("failed", HOSTILE + "\udcff\n" * 600, 20.0, **FACTS)
    message, name = out.read_text().splitlines()
    assert json.loads(message)["run"] == name == HOSTILE
    assert json.loads(message)["reason"].startswith(HOSTILE)
    assert len(message) < 4096, "one page: it always fits into a pipe"
    assert not Path("pwned").exists()


def test_spikes_once_a_minute(tmp_path):
    now = [100.0]
    out = tmp_path / "got"
    notifier = Notifier(f"cat >> {out}", tmp_path / "d4", print, now=lambda: now[0])
    for step, seconds in enumerate((0, 59, 61, 62, 122)):
        now[0] = 100.0 + seconds
        notifier.send("spike", "", **{**FACTS, "step": step})
        while not notifier.waiting.empty():
            time.sleep(0.01)
    notifier.send_last("completed", "", 20.0, **FACTS)
    assert [message["step"] for message in saved(out)] == [0, 2, 4, 7]


# ----- what goes wrong


@pytest.mark.parametrize("code, words", [(500, "500 Internal Server Error"), (404, "404 Not Fou")])
def test_a_server_that_answers_an_error(tmp_path, reports, code, words):
    with server(code) as (url, requests):
        send_all(url, tmp_path, reports, "completed")
    assert len(requests) == 1
    assert len(reports) == 1
    assert f"the message 'completed' was not delivered: the server answered {words}" in reports[0]


def test_a_redirect_is_no_delivery(tmp_path, reports):
    """It would be followed by a GET, without the JSON."""
    with server(302, [("Location", "/elsewhere")]) as (url, requests):
        send_all(url, tmp_path, reports, "completed")
    assert len(requests) == 1 and requests[0] != "GET"
    assert "the server answered 302" in reports[0]


def test_a_server_that_refuses(tmp_path, reports):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/secret"
        send_all(url, tmp_path, reports, "completed")
    assert len(reports) == 1
    assert "no connection" in reports[0] and "secret" not in reports[0]


def test_a_server_that_hangs_is_given_up(tmp_path, reports, impatient):
    """The loop never waits, and the end no longer than it may."""
    with server(hang=threading.Event()) as (url, requests):
        notifier = Notifier(url, tmp_path, reports.add)
        began = time.monotonic()
        for _ in range(3 * notify.MOST_WAITING):
            notifier.send("stalled", "", **FACTS)
        assert time.monotonic() - began < 1
        # the first is given up, and the next one tried
        while not any("killed" in line for line in reports):
            assert reports.came.wait(30)
            time.sleep(0.01)
        began = time.monotonic()
        notifier.send_last("completed", "", 1.5, **FACTS)
        assert time.monotonic() - began < 5
        notifier.thread.join(10)
    assert not notifier.thread.is_alive()
    words = "\n".join(reports)
    assert "'stalled' was not delivered: no end within 1 s, so it was killed" in words
    assert f"dropped, since {notify.MOST_WAITING} others wait" in words
    assert "dropped, since the run has ended" in words
    assert "'completed' was not delivered" in words


def test_a_server_that_dribbles_is_given_up(tmp_path, reports, impatient):
    """Every byte comes in time, and the answer never ends: only a deadline for all of it helps."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def dribble():
            with listening.accept()[0] as client, contextlib.suppress(OSError):
                client.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not over.wait(0.05):
                    client.sendall(b".")

        thread = threading.Thread(target=dribble)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        send_all(url, tmp_path, reports, "completed")
        over.set()
        thread.join()
    assert len(reports) == 1 and "killed" in reports[0]


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path, reports, impatient):
    pids = tmp_path / "pids"
    command = f"sleep 600 & echo $! $$ > {pids}; trap '' TERM; sleep 600"
    send_all(command, tmp_path, reports, "stalled", "completed")
    assert [line for line in reports if "killed" in line] == reports != []
    for pid in map(int, pids.read_text().split()):
        deadline = time.monotonic() + 10
        while is_running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def is_running(pid):
    """Whether a process exists and is not just what is left of one."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_what_a_command_leaves_in_the_background_is_not_waited_for(tmp_path, reports):
    """It holds standard error, and the command itself is done."""
    began = time.monotonic()
    send_all("sleep 5 &", tmp_path, reports, "completed")
    assert reports == []
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    "command, words",
    [
        ("echo no such room >&2; exit 3", "ended with exit code 3 (no such room)"),
        ("exec 2>&-; exit 4", "ended with exit code 4"),
        ("kill -9 $$", "ended with exit code -9"),
        ("nosuchcommand", "ended with exit code 127"),
        ("exec <&-; exit 5", "ended with exit code 5"),
        (
            "yes | head -c 3000000; yes | head -c 3000000 >&2; exit 6",
            "exit code 6 (y)",
        ),
    ],
)
def test_a_command_that_fails(tmp_path, reports, command, words):
    send_all(command, tmp_path, reports, "completed")
    assert len(reports) == 1 and words in reports[0]
    assert len(reports[0]) < 1000 and "\n" not in reports[0]


def test_a_system_that_starts_no_program(tmp_path, reports, monkeypatch):
    def refuse(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(notify.subprocess, "Popen", refuse)
    send_all("true", tmp_path, reports, "stalled", "completed")
    assert len(reports) == 2 and all("Resource temporarily" in line for line in reports)


@pytest.mark.parametrize("value", ["http://", "https:///path", "ftp://host/x", "http://a b"])
def test_a_url_that_cannot_be_posted_to(value):
    problems = check_flags(parse([f"--notify={value}", "--tokenizer=byte", "--data=python"]))
    assert len(problems) == 1
    assert f"--notify={value}: neither an http" in problems[0] and "write https" in problems[0]


@pytest.mark.parametrize(
    "value", ["http://h", "HTTPS://h/x?y=z", "mail -s done me", "curl http://"]
)
def test_what_can_be_notified(value):
    assert check_flags(parse([f"--notify={value}", "--tokenizer=byte", "--data=python"])) == []


# ----- from train.py


def test_a_run_tells_of_its_end_and_of_a_spike(tmp_path, monkeypatch):
    """The URL stands in no file of the run: it may hold a secret."""
    from nanochat.run import faults

    def spike(loss, recent, finite=True):
        recent.append(loss)
        return 9.0 if len(recent) == 4 else None

    monkeypatch.setattr(faults, "spike", spike)
    with server() as (url, requests):
        assert small.run(tmp_path, *small.BARE, f"--notify={url}") == 0
        sent = [message for _, message in requests]
        assert small.run(tmp_path, *small.BARE, "--overwrite", "--resume") == 2
        assert len(requests) == len(sent), "a run that is refused did not begin"
    assert sent[-1]["event"] == "completed" and sent[-1]["step"] == 12
    lines = saved(tmp_path / "run" / "metrics.jsonl")
    assert sent[-1]["loss"] == lines[-1]["train/loss"]
    # the run may end before the message has left, and its end goes first
    for message in sent[:-1]:
        assert message["event"] == "spike" and message["step"] == 3
        assert "9.0 standard deviations above" in message["reason"]
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path


def test_other_ranks_start_no_thread(tmp_path):
    from test_log import open_log

    log = open_log(tmp_path, writes=False)
    log.notify("stalled", "nothing")
    log.end("completed", "", 0)
    assert log.notifier is None


def test_a_server_that_hangs_ends_no_training(tmp_path, capfd, impatient):
    with server(hang=threading.Event()) as (url, requests):
        assert small.run(tmp_path, *small.BARE, f"--notify={url}") == 0
    assert len(requests) <= 1
    shown = capfd.readouterr().out
    assert shown.count("--notify: the message 'completed' was not delivered") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
