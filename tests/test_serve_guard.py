"""`nanochat serve`: who is heard, and limits that any client meets; with real connections where
HTTP itself matters."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading

import pytest
import small
from serving import FakeEngine, application, running, served

from nanochat.apps.serve import server
from nanochat.apps.serve.guard import LARGEST_BODY_BYTES, Guard
from nanochat.apps.serve.runs import names_of
from nanochat.common import UsageError

from starlette.testclient import TestClient  # isort: skip  (serving skips without it)

COMPLETIONS = "/v1/completions"
BODY = json.dumps({"prompt": "hi", "max_tokens": 3, "seed": 0})
JSON = {"Content-Type": "application/json"}
SECONDS = 30


@pytest.fixture(scope="module")
def client():
    with TestClient(application(), base_url="http://localhost:8000") as client:
        yield client


@pytest.mark.parametrize(
    "host, name, status",
    [
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "LOCALHOST:8000", 200),
        ("127.0.0.1", "127.0.0.1:1", 200),
        ("127.0.0.1", "[::1]:8000", 200),
        ("127.0.0.1", "evil.example", 403),
        ("127.0.0.1", "evil.example:8000", 403),
        ("127.0.0.1", "localhost.evil.example", 403),
        ("127.0.0.1", "localhost@evil.example", 403),
        ("127.0.0.1", "localhost:port", 403),
        ("127.0.0.1", "192.168.0.7", 403),
        ("127.0.0.1", "", 403),
        ("gpu-box", "gpu-box:8000", 200),
        ("gpu-box", "other-box", 403),
        ("0.0.0.0", "192.168.0.7:8000", 200),
        ("0.0.0.0", "evil.example", 403),
        ("0.0.0.0", socket.gethostname(), 200),
        ("::", "[fe80::1]:8000", 200),
    ],
)
def test_the_host_header(host, name, status):
    with TestClient(application(host=host), base_url="http://localhost:8000") as client:
        response = client.get("/health", headers={"Host": name})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "foreign_host"


@pytest.mark.parametrize(
    "origin, status",
    [
        (None, 200),
        ("http://localhost:8000", 200),
        ("http://localhost:9000", 403),
        ("http://127.0.0.1:8000", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_the_origin(client, origin, status):
    headers = {} if origin is None else {"Origin": origin}
    for path in ("/v1/models", "/health", "/metrics"):
        assert client.get(path, headers=headers).status_code == status
    response = client.post(COMPLETIONS, content=BODY, headers=headers | JSON)
    assert response.status_code == status
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "content_type, status",
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/json-seq", 415),
        ("", 415),
        (None, 415),
    ],
)
def test_the_content_type(client, content_type, status):
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = client.post(COMPLETIONS, content=BODY, headers=headers)
    assert response.status_code == status


@pytest.mark.parametrize(
    "given, status",
    [
        ("Bearer s3cret", 200),
        ("bearer s3cret", 200),
        ("Bearer wrong", 401),
        ("Bearer s3cret2", 401),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        ("Bearer \xe9".encode("latin-1"), 401),
        (None, 401),
    ],
)
def test_the_key(given, status):
    app = application(api_key="s3cret")
    headers = {} if given is None else {"Authorization": given}
    with TestClient(app, base_url="http://localhost:8000") as client:
        for path in ("/v1/models", "/metrics", "/nowhere"):
            response = client.get(path, headers=headers)
            assert response.status_code == (404 if status == 200 and path == "/nowhere" else status)
        assert client.get("/health").status_code == 200
    if status == 401:
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "authentication_error"


def test_large_bodies(client):
    body = b'{"prompt": "' + b"x" * LARGEST_BODY_BYTES + b'"}'
    # with its length, and in chunks
    for content in (body, iter([body])):
        response = client.post(COMPLETIONS, content=content, headers=JSON)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


# ---- real connections ----


def head(body_bytes, extra=""):
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {body_bytes}", extra, ""]).encode()


def connect(url):
    port = int(url.rsplit(":", 1)[1])
    return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)


def answer(connection):
    """All that comes until the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_a_slow_body_ends_by_408():
    with running(application(body_seconds=0.05)) as url, connect(url) as connection:
        connection.sendall(head(100) + b"{")
        text = answer(connection)
    assert text.startswith(b"HTTP/1.1 408 ") and b"slow_body" in text


def test_a_head_that_never_comes_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.05)
    with running(application()) as url, connect(url) as silent, connect(url) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost:")
        assert answer(silent) == b"" and answer(slow) == b""


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(stream):
    engine = FakeEngine(held=True)
    body = json.dumps({"prompt": "hi", "n": 3, "stream": stream}).encode()
    with running(application(served(engine=engine))) as url:
        with connect(url) as connection:
            connection.sendall(head(len(body)) + body)
            assert engine.submitted.wait(SECONDS)
            if stream:
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert engine.cancelled.wait(SECONDS)
    assert engine.waiting == {}


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET /" + b"x" * 70_000,
    ],
)
def test_what_is_not_http_is_refused(raw):
    with running(application()) as url, connect(url) as connection:
        connection.sendall(raw)
        assert answer(connection).startswith(b"HTTP/1.1 400 ")
        # and the server still answers others
        with connect(url) as other:
            other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert answer(other).startswith(b"HTTP/1.1 200 OK")


def test_open_connections_do_not_stop_others():
    with running(application()) as url:
        idle = [connect(url) for _ in range(200)]
        with connect(url) as other:
            body = BODY.encode()
            other.sendall(head(len(body), "Connection: close\r\n") + body)
            assert b'"text":"abc"' in answer(other)
        for connection in idle:
            connection.close()


def test_a_port_that_is_taken():
    with server.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}"):
            with server.listen("127.0.0.1", port):
                pass


# of the documentation, and a name that is too long for one
@pytest.mark.parametrize("host", ["192.0.2.1", "x" * 300])
def test_what_is_no_address_of_this_machine(host):
    with pytest.raises(UsageError, match=f"--host {host}: is no address.*use 127.0.0.1"):
        with server.listen(host, 0):
            pass


def test_names_of_models(tmp_path):
    folders = [tmp_path / name for name in ("a/d4", "b/d4", "d6")]
    assert names_of(folders) == ["a/d4", "b/d4", "d6"]
    with pytest.raises(UsageError, match="twice"):
        names_of([tmp_path / "d4", tmp_path / "x" / ".." / "d4"])


def test_the_guard_reads_no_key_where_none_is_set():
    scope = {"path": "/", "method": "GET", "headers": [(b"host", b"localhost")]}
    Guard("127.0.0.1").check(scope)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["busy", "idle"])
def test_the_command_ends_in_order(number):
    """Exit code 0, after a running request is finished; also by a signal in the first instant."""
    command = [sys.executable, "-m", "nanochat", "serve", str(small.finished() / "run"), "--port=0"]
    process = subprocess.Popen(
        command, cwd=small.ROOT, stdout=subprocess.PIPE, text=True, env=small.environment()
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert process.stdout.readline().startswith("serving run, step 12; ")
        url = process.stdout.readline().split()[2].rstrip(",")
        if number == signal.SIGINT:
            process.send_signal(number)
        else:
            body = json.dumps({"prompt": "1", "max_tokens": 20, "stream": True}).encode()
            with connect(url) as connection:
                connection.sendall(head(len(body)) + body)
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
                process.send_signal(number)
                assert b"[DONE]" in answer(connection)
        assert process.wait() == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.stdout.close()


def test_what_has_not_ended_when_the_server_does(monkeypatch, caplog):
    """An answer, a stream and a body that never come: each client hears of the end, and nothing of
    it is an error of the server's."""
    monkeypatch.setattr(server, "ENDING_SECONDS", 0)
    engine = FakeEngine(held=True, queue_size=2)
    app = application(served(engine=engine))
    bodies = [json.dumps({"prompt": "hi", "stream": stream}).encode() for stream in (False, True)]
    with contextlib.ExitStack() as stack:
        with running(app) as url:
            connections = [stack.enter_context(connect(url)) for _ in range(3)]
            connections[2].sendall(head(5))
            for connection, body in zip(connections, bodies):
                engine.submitted.clear()
                connection.sendall(head(len(body)) + body)
                assert engine.submitted.wait(SECONDS)
            assert connections[1].recv(15) == b"HTTP/1.1 200 OK"
        whole, stream, body = [answer(connection) for connection in connections]
    assert whole.startswith(b"HTTP/1.1 503 ") and b"the server is ending" in whole
    assert b"the server is ending" in stream and b"[DONE]" not in stream
    # it may be that the server never came to read it
    assert body == b"" or body.startswith(b"HTTP/1.1 503 ")
    assert engine.waiting == {}
    assert not [record for record in caplog.records if record.exc_info]
