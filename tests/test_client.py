"""`nanochat client` against a server of this package, and against others that misbehave."""

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from nanochat.__main__ import main

pytest.importorskip("httpx")
from serving import FakeEngine, application, running, served  # noqa: E402


@pytest.fixture(scope="module")
def url():
    with running(application(served(max_tokens=64, positions=512))) as address:
        yield f"{address}/v1"


def client(capsys, *argv):
    """(exit code, standard output, standard error) of the app."""
    code = main(["client", *argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_a_prompt_is_continued(url, capsys, flags):
    argv = ["once", "upon", f"--url={url}", "--max-tokens=4", "--seed=2", *flags]
    assert client(capsys, *argv) == (0, "once uponcdef\n", "")


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_a_message_is_answered(url, capsys, flags):
    argv = ["hello", "--chat", "--system=be brief", f"--url={url}", "--max-tokens=3", "--seed=0"]
    assert client(capsys, *argv, *flags) == (0, "abc\n", "")


def test_lines_are_answered_one_after_the_other(url, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    argv = [f"--url={url}", "--max-tokens=2", "--seed=0", "--stop=never"]
    assert client(capsys, *argv) == (0, "oneab\ntwoab\n", "")


class Terminal(io.StringIO):
    """Standard input where somebody types."""

    def isatty(self):
        return True


# of 512 positions two of these and their answers leave no room for a third
LONG = "x" * 200


def test_a_full_context_ends_a_conversation_of_lines(url, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{LONG}\n" * 3))
    code, out, error = client(capsys, "--chat", f"--url={url}", "--max-tokens=2", "--seed=0")
    assert (code, out) == (2, "ab\nab\n")
    assert "the conversation has filled the model's context" in error
    assert "begin a new one" in error and "max_tokens" not in error


def test_whoever_types_goes_on_when_the_context_is_full(url, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal(f"{LONG}\n" * 3 + f"hi\n/new\n{LONG}\n"))
    argv = ["--chat", "--system=be brief", f"--url={url}", "--max-tokens=2", "--seed=0"]
    code, out, error = client(capsys, *argv)
    # the third message is not answered and not remembered
    assert (code, out) == (0, "ab\n" * 4)
    full, new = error.replace("> ", "").splitlines()
    assert "the conversation has filled" in full and "/new begins a new one" in full
    assert new == "a new conversation begins with the next message"


def test_whoever_types_stops_an_answer(capsys, monkeypatch):
    # asked after each piece, of which the first has no text; behind the second, Ctrl-C is pressed
    presses = iter([False, True])

    def reader_is_gone():
        if next(presses, False):
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr("nanochat.output.reader_is_gone", reader_is_gone)
    monkeypatch.setattr("sys.stdin", Terminal("hi\nso?\n"))
    engine = FakeEngine(positions=512)
    with running(application(served(engine=engine))) as address:
        argv = ["--chat", f"--url={address}/v1", "--max-tokens=2", "--seed=0"]
        code, _, error = client(capsys, *argv)
    assert code == 0 and "stopped; Ctrl-D leaves" in error
    # what was written of the answer belongs to the conversation
    asked = bytes(engine.requests[-1].prompt[1:]).decode()
    assert re.fullmatch("User: hi\nAssistant: ab?\nUser: so\\?\nAssistant:", asked)


@pytest.mark.parametrize(
    "argv, words", [(["--chat"], "the message and an answer of 64"), ([], "the prompt and 64 new")]
)
def test_a_text_longer_than_the_context(url, capsys, argv, words):
    code, _, error = client(capsys, LONG * 3, *argv, f"--url={url}", "--max-tokens=64")
    assert code == 2 and words in error and "--max-tokens" in error


@pytest.mark.parametrize("argv", [["--chat"], ["--no-stream"]])
def test_a_short_context_gets_shorter_answers(capsys, argv):
    engine = FakeEngine(positions=65)
    with running(application(served(engine=engine, max_tokens=300))) as address:
        url = f"--url={address}/v1"
        assert client(capsys, "hello", *argv, url)[0] == 0
        assert engine.requests[-1].max_new_tokens == 32
        code, _, error = client(capsys, LONG, *argv, url)
    assert code == 2 and "16" in error and "--max-tokens" in error


def test_lines_of_a_terminal_are_edited_and_called_back():
    """The second line is the first one, by the arrow keys."""
    pytest.importorskip("readline")
    import pty

    code = "from nanochat.apps import client\nprint(list(client._lines()), flush=True)"
    ours, theirs = pty.openpty()
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    environ = os.environ | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], env=environ, **ends) as process:
        os.close(theirs)
        shown = b""
        for keys in (b"ac\x1b[Db\r", b"\x1b[A\r", b"\x04"):
            shown = b""
            while not shown.endswith(b"> "):
                shown += os.read(ours, 1000)
            os.write(ours, keys)
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 1000):
                shown += piece
        os.close(ours)
    assert process.returncode == 0 and b"['abc', 'abc']" in shown, shown


def test_lines_of_other_encodings(url, capsys, monkeypatch):
    raw = io.BytesIO(b"\xef\xbb\xbfone\r\n\xff\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    argv = [f"--url={url}", "--max-tokens=2", "--seed=0"]
    assert client(capsys, *argv) == (0, "oneab\n\ufffdab\n", "")
    # as after `<&-`
    monkeypatch.setattr("sys.stdin", None)
    assert client(capsys, *argv) == (0, "", "")


@pytest.mark.parametrize(
    "argv, code, words",
    [
        (["x", "--model=no-such"], 2, ["the server refuses (404)", "no-such"]),
        (["x", "--max-tokens=0"], 2, ["the server refuses (400)", "max_tokens"]),
        (["x", "--system=y"], 2, ["--system", "--chat"]),
        (["x", "--url=localhost:8000"], 2, ["--url=localhost:8000", "http://"]),
        (["x", "--url=http://"], 2, ["no http address"]),
        (["x", "--url=http://[::1"], 2, ["no http address"]),
        (["x", "--temperature=nan", "--top-p=inf"], 2, ["--temperature nan", "--top-p inf"]),
        (["x", "--api-key=\u043a"], 2, ["--api-key", "ASCII"]),
        ([""], 2, ["PROMPT: is empty"]),
        (["x", "--url=http://127.0.0.1:9/v1"], 1, ["cannot be reached", "nanochat serve"]),
    ],
)
def test_what_is_refused(url, capsys, argv, code, words):
    own_url = any(word.startswith("--url") for word in argv)
    found, _, error = client(capsys, *argv, *([] if own_url else [f"--url={url}"]))
    assert found == code and "Traceback" not in error
    assert [word for word in words if word not in error] == []


class Misbehaving(BaseHTTPRequestHandler):
    """Answers every request with what the server was given."""

    def do_GET(self):
        status, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *arguments):
        pass


def test_an_address_without_v1(url, capsys):
    base = url.removesuffix("/v1")
    code, _, error = client(capsys, "x", f"--url={base}/")
    assert code == 2 and f"try --url={url}" in error
    # there it is a model that is missing
    _, _, error = client(capsys, "x", f"--url={url}", "--model=no-such")
    assert "try --url" not in error


@contextlib.contextmanager
def misbehaving(status, body):
    """The URL of a server that gives one answer to everything."""
    server = HTTPServer(("127.0.0.1", 0), Misbehaving)
    server.answer = status, body
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    "status, body, code, words",
    [
        (200, b"<html>", 1, "not JSON; try --url="),
        (200, b"{}", 1, "not that of OpenAI's API; try --url="),
        (200, b'{"error": {"message": "it \\u001b[2J broke"}}', 1, "broke"),
        (401, b'{"error": {"message": "no key"}}', 2, "(401): no key; give --api-key"),
        (503, b"busy", 1, "refuses (503): without a reason"),
    ],
)
def test_servers_that_misbehave(capsys, status, body, code, words):
    with misbehaving(status, body) as url:
        found, _, error = client(capsys, "x", "--model=m", f"--url={url}", "--no-stream")
    assert found == code and words in error and "\x1b" not in error


@pytest.mark.parametrize(
    "body, words",
    [
        (b"<html>", "not that of OpenAI's API; try --url="),
        (b'data: {"choices": [{"text": "a"}]}\n\n', "broke off"),
        (b"data: <html>\n\n", "not JSON"),
    ],
)
def test_streams_that_are_none(capsys, body, words):
    with misbehaving(200, body) as url:
        found, _, error = client(capsys, "x", "--model=m", f"--url={url}")
    assert found == 1 and words in error


def test_whoever_types_survives_a_failure(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("one\ntwo\n"))
    with misbehaving(503, b"busy") as url:
        code, _, error = client(capsys, "--model=m", f"--url={url}")
    assert code == 0 and error.count("refuses (503)") == 2
