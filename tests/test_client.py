"""`nanochat client` against a server of this package, and against others that misbehave."""

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from nanochat.__main__ import main

pytest.importorskip("httpx")
from serving import application, running, served  # noqa: E402


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


@pytest.mark.parametrize(
    "argv, code, words",
    [
        (["x", "--model=no-such"], 2, ["the server refuses (404)", "no-such"]),
        (["x", "--max-tokens=0"], 2, ["the server refuses (400)", "max_tokens"]),
        (["x", "--system=y"], 2, ["--system", "--chat"]),
        (["x", "--url=localhost:8000"], 2, ["--url=localhost:8000", "http://"]),
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


@pytest.mark.parametrize(
    "status, body, code, words",
    [
        (200, b"<html>", 1, "not JSON"),
        (200, b"{}", 1, "not that of OpenAI's API"),
        (200, b'{"error": {"message": "it \\u001b[2J broke"}}', 1, "broke"),
        (401, b'{"error": {"message": "no key"}}', 2, "refuses (401): no key"),
        (503, b"busy", 1, "refuses (503): without a reason"),
    ],
)
def test_servers_that_misbehave(capsys, status, body, code, words):
    server = HTTPServer(("127.0.0.1", 0), Misbehaving)
    server.answer = status, body
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        found, _, error = client(capsys, "x", "--model=m", f"--url={url}", "--no-stream")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert found == code and words in error and "\x1b" not in error
