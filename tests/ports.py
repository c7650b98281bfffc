"""Ports for servers that a test starts later. The kernel hands out ports from 32768 on, also to
tests that run beside this one, so a port that is to stay free is taken from below."""

import contextlib
import itertools
import os
import socket

# a hundred for each process, so that tests that run at once are given different ones
CANDIDATES = itertools.count(20000 + os.getpid() % 120 * 100)


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens, and never the same one twice."""
    for port in CANDIDATES:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("itertools.count ended")
