"""Several machines: what the ranks of one of them share, and how the loss of another is noticed."""

import contextlib
import os
import socket
import stat
from collections.abc import Callable

from nanochat import limits, ranks
from nanochat.common import Unavailable, UsageError

# Seconds of silence after which another machine counts as gone: longer than a switch that restarts
# its ports.
LOST_AFTER = 90
# Seconds between two questions to a machine that says nothing, at most.
ASK_EVERY = 10


def ranks_here() -> int:
    """Number of ranks on this machine, as torchrun says; 1 without it."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not (given.isascii() and given.isdecimal()):
        return 1
    # one that is alone has nothing to share, whatever was left over in its environment
    return max(1, min(int(given), ranks.world_size()))


def threads_of_rank() -> int:
    """Threads for work of this rank beside its training: those of all ranks of a machine are
    together as many as it has cores."""
    return max(1, limits.available_cpus() // ranks_here())


def on_each_machine(action: Callable[[], object]) -> None:
    """action() on the first rank of every machine while all others wait; every rank calls it. A
    UsageError or Unavailable of one machine is raised on every rank."""
    problem = None
    if ranks.local_rank() == 0:
        try:
            action()
        except (UsageError, Unavailable) as error:
            problem = error
    for rank, reported in enumerate(ranks.from_all(problem)):
        if reported is not None:
            where = f"on the machine of rank {rank}: " if rank else ""
            raise type(reported)(f"{where}{reported}")


def notice_lost_machines() -> None:
    """Let the connections of this process fail once the other end has been silent for LOST_AFTER
    seconds; to be called again when there are new ones.

    A machine that lost its power or its cable says nothing, and neither gloo nor torch's store asks
    whether it still exists: a rank that waits for it would do so for hours. The kernel asks, where
    it is told to; only Linux can be told how long."""
    if ranks.world_size() == 1 or not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    for name in os.listdir("/proc/self/fd"):
        # a file may be closed meanwhile
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    _limit_silence(connection)


def _limit_silence(connection: socket.socket) -> None:
    """Of a TCP connection, or of those that a listening socket will accept."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    pause = max(1, min(ASK_EVERY, LOST_AFTER // 3))
    # while nothing is under way
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
    # while something is, and in place of a number of questions
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_AFTER)
