"""--notify: tell a command or a server what becomes of a run, without ever waiting for it.

A thread takes the messages, one after the other, and starts a program for each: the command, or one
that POSTs to the URL. It gets the message as JSON on its standard input and is killed, with all
that it started, when it takes too long. Imports no torch."""

import contextlib
import json
import os
import queue
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nanochat.common import Report, in_a_line, printable, valid_unicode

# for one message, and for all that is left at the end of a run
PATIENCE_SECONDS = 10.0
# at the end of a run that was interrupted twice
HURRY_SECONDS = 1.5
# of that, what is left for killing a program that has not ended
KILLING_SECONDS = 0.5
# between two messages on losses that jump
SPIKE_SECONDS = 60.0
# that wait while an earlier one is delivered; more are dropped
MOST_WAITING = 8
# characters of a reason, and bytes of what a program wrote to standard error
LONGEST_REASON = 500
TAIL_BYTES = 400
POLL_SECONDS = 0.05
# A URL comes before the JSON on standard input: it may hold a secret, and command lines are public.
POST = [sys.executable, "-I", str(Path(__file__).with_name("post.py"))]


def is_url(target: str) -> bool:
    """Whether the value of --notify is a URL that can be posted to."""
    return re.match(r"https?://[^\s/]+\S*$", target, re.IGNORECASE) is not None


def looks_like_url(target: str) -> bool:
    """Whether the value of --notify is meant as a URL, of whatever kind."""
    return re.match(r"\w+://", target) is not None


class Notifier:
    """Sends messages about one start of a run. Nothing of it is waited for before the end."""

    def __init__(
        self,
        target: str,
        folder: Path,
        report: Report,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """target: --notify. folder: of the run. report(text): takes a line on a message that was
        not delivered."""
        self.target = target
        self.folder = folder.absolute()
        self.report = report
        self.now = now
        self.spike_at = float("-inf")
        # when everything has to be over, in time.monotonic()
        self.end_by = float("inf")
        self.waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._run, name="notify", daemon=True)
        self.thread.start()

    def send(self, event: str, reason: str, **facts: Any) -> None:
        """Have a message delivered. event: stalled, spike. reason: a sentence. facts: step, loss
        and other numbers, null where there is none.

        Of losses that jump, one a minute is worth a message."""
        if event == "spike":
            if self.now() - self.spike_at < SPIKE_SECONDS:
                return
            self.spike_at = self.now()
        try:
            self.waiting.put_nowait(self._message(event, reason, facts))
        except queue.Full:
            self._report(event, f"dropped, since {MOST_WAITING} others wait")

    def send_last(
        self, event: str, reason: str, seconds: float = PATIENCE_SECONDS, **facts: Any
    ) -> None:
        """Have the message on the end of the run delivered, in place of all that wait, and wait for
        that, at most so many seconds. event: completed, stopped, failed."""
        self.end_by = time.monotonic() + max(0.0, seconds - KILLING_SECONDS)
        with contextlib.suppress(queue.Empty):
            while True:
                self._report(self.waiting.get_nowait()["event"], "dropped, since the run has ended")
        self.waiting.put(self._message(event, reason, facts))
        # the thread ends after it, or this process does
        self.waiting.put(None)
        self.thread.join(seconds)

    def _message(self, event: str, reason: str, facts: dict[str, Any]) -> dict[str, Any]:
        """The JSON of a message; `text` says it in a sentence, for people and chat rooms."""
        run = valid_unicode(self.folder.name)
        reason = valid_unicode(reason[:LONGEST_REASON])
        loss = "" if facts["loss"] is None else f", loss {facts['loss']:.4f}"
        because = f": {reason}" if reason else ""
        return {
            "event": event,
            "run": run,
            "folder": valid_unicode(str(self.folder)),
            **facts,
            "reason": reason,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "text": f"{run}: {event} at step {facts['step']}{loss}{because}",
        }

    def _run(self) -> None:
        """The thread: one message after the other, until None."""
        while (message := self.waiting.get()) is not None:
            try:
                problem = self._deliver(message)
            # whatever it is, the next message may do better
            except Exception as error:
                problem = in_a_line(error)
            if problem:
                self._report(message["event"], problem)

    def _report(self, event: str, problem: str) -> None:
        self.report(f"--notify: the message '{event}' was not delivered: {problem}")

    def _deliver(self, message: dict[str, Any]) -> str:
        """Start the program of a message and wait for it. Returns why that failed, or ""."""
        deadline = min(time.monotonic() + PATIENCE_SECONDS, self.end_by)
        if deadline <= time.monotonic():
            return "no time was left for it"
        # in ASCII, which every program can read
        content = json.dumps(message, allow_nan=False).encode() + b"\n"
        # Names and reasons come from elsewhere: they are never part of what a shell reads.
        command = ["/bin/sh", "-c", self.target]
        if is_url(self.target):
            command = POST
            content = self.target.encode() + b"\n" + content
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={
                **os.environ,
                "NANOCHAT_EVENT": message["event"],
                "NANOCHAT_RUN": message["run"],
            },
            # a group of its own: Ctrl-C does not reach it, and all of it can be killed
            start_new_session=True,
        )
        with process.stdin as to_it, process.stderr as from_it:
            os.set_blocking(to_it.fileno(), False)
            # a program that does not read it
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                to_it.write(content)
            to_it.close()
            tail = _wait(process, from_it.fileno(), deadline)
        if tail is None:
            return f"no end within {PATIENCE_SECONDS:.0f} s, so it was killed"
        if process.returncode == 0:
            return ""
        last = printable(tail.decode("utf-8", "replace").strip()).split("\n")[-1]
        if command is POST and last:
            return last
        return f"the command ended with exit code {process.returncode}{last and f' ({last})'}"


def _wait(process: subprocess.Popen, errors: int, deadline: float) -> bytes | None:
    """Wait until a program has ended, and read meanwhile what it writes to a pipe. Returns the end
    of that; None if the deadline came first and the program was killed."""
    os.set_blocking(errors, False)
    tail = b""
    with selectors.DefaultSelector() as selector:
        selector.register(errors, selectors.EVENT_READ)
        while process.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                _kill(process)
                return None
            if selector.select(min(left, POLL_SECONDS)):
                piece = os.read(errors, 1 << 16)
                tail = (tail + piece)[-TAIL_BYTES:]
                # it has closed the pipe, and may do other things yet
                if not piece:
                    selector.unregister(errors)
    # what it wrote last; others that it started may still hold the pipe
    with contextlib.suppress(BlockingIOError):
        tail = (tail + os.read(errors, 1 << 16))[-TAIL_BYTES:]
    return tail


def _kill(process: subprocess.Popen) -> None:
    """End a program and all that it started in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # one that waits for a broken disk does not end
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLING_SECONDS)
