"""Ask a run something on its socket: a line of JSON there, lines of JSON back. The protocol is that
of nanochat/run/listener.py."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

from nanochat.common import in_a_line, printable
from nanochat.run.registry import is_own

CONNECT_SECONDS = 2.0
# bytes of a message, and characters of a text that is shown
LONGEST_MESSAGE = 1 << 20
LONGEST_TEXT = 1000
Message = dict[str, Any]


class NoAnswer(Exception):
    """Nobody answers on a socket, or something else than a run does."""


class Conversation:
    """A request to a run, and the messages that it sends. Closed by `with`."""

    def __init__(self, path: str, request: Message, seconds: float = CONNECT_SECONDS) -> None:
        """path: of the socket. seconds: to wait for somebody who takes the request. Raises NoAnswer
        if nobody does."""
        if not path:
            raise NoAnswer("it listens nowhere")
        self.rest = b""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(seconds)
        try:
            self.socket.connect(path)
            # the path is from a file, and anybody may listen at it
            if not is_own(self.socket):
                raise OSError("another user listens there")
            self.socket.sendall(json.dumps(request).encode() + b"\n")
        # also for a path that no socket can have
        except OSError as error:
            self.socket.close()
            raise NoAnswer(in_a_line(error)) from None

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def read(self, seconds: float) -> Message | None:
        """The next message; None if none comes within so many seconds.

        Raises EOFError when there will be no more, NoAnswer for what is no message."""
        until = time.monotonic() + seconds
        while b"\n" not in self.rest:
            left = until - time.monotonic()
            if left <= 0:
                return None
            self.socket.settimeout(left)
            try:
                piece = self.socket.recv(1 << 16)
            except TimeoutError:
                return None
            # the run has ended
            except ConnectionError:
                piece = b""
            if not piece:
                raise EOFError
            self.rest += piece
            if len(self.rest) > LONGEST_MESSAGE:
                raise NoAnswer("an answer without end")
        line, _, self.rest = self.rest.partition(b"\n")
        return _message(line)


def _message(line: bytes) -> Message:
    try:
        message = json.loads(line)
    # RecursionError: of brackets, thousands deep
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise NoAnswer("an answer that is not one of a run")
    return message


def shown(text: Any) -> str:
    """A text that somebody else may have written, on one line, as it may be shown."""
    return printable(" ".join(str(text).split()))[:LONGEST_TEXT]


def status_of(path: str, seconds: float) -> Message | None:
    """What a run tells of itself; None if it does not within so many seconds."""
    try:
        with Conversation(path, {"verb": "status"}) as conversation:
            return conversation.read(seconds)
    except (NoAnswer, EOFError):
        return None


def slices(deadline: float | None, seconds: float) -> Iterator[float]:
    """Yield how long to wait next, `seconds` at most, until a deadline on time.monotonic(); None:
    for ever."""
    while deadline is None:
        yield seconds
    while (left := deadline - time.monotonic()) > 0:
        yield min(seconds, left)
