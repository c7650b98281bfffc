"""Two hosts on one machine: network namespaces, joined by a cable with a rate and a delay.

For root on Linux. Files and processes are those of this machine; packets go from one host to the
other and nowhere else. Not by `tc`, whose delays not every kernel has: the cable is a process that
carries packets between two TUN devices.

`python tests/hosts.py NAME [MEGABITS [MILLISECONDS]]` lays the cable until its standard input ends;
`ip netns exec NAME0 COMMAND` then runs a command on the first host, NAME1 on the second."""

import collections
import contextlib
import ctypes
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from typing import TextIO

# documentation's own network: no real host has these addresses
ADDRESSES = ("192.0.2.1", "192.0.2.2")
INTERFACE = "cable"
# jumbo frames: smaller ones would be more work than the cable can do at 1 Gbit/s
MTU = 9000
# <linux/if_tun.h>, <linux/sched.h>
TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
CLONE_NEWNET = 0x40000000


class CannotMake(Exception):
    """This machine makes no such hosts; says why."""


class Hosts:
    """Two hosts, laid by a process of their own. Raises CannotMake."""

    def __init__(self, name: str, megabits: float = 0, milliseconds: float = 0) -> None:
        """megabits: a second, in each direction; 0: as fast as it goes. milliseconds: there and
        back."""
        self.name = name
        self.cable = subprocess.Popen(
            [sys.executable, __file__, name, str(megabits), str(milliseconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said = self.cable.stdout.readline().strip()
        if said != "ready":
            self.close()
            raise CannotMake(said)

    def command(self, host: int, argv: list[str]) -> list[str]:
        """A command line that runs argv on a host, 0 or 1."""
        return ["ip", "netns", "exec", f"{self.name}{host}", *argv]

    def kill(self, host: int) -> None:
        """Kill all processes of a host."""
        listed = subprocess.run(
            ["ip", "netns", "pids", f"{self.name}{host}"], capture_output=True, text=True
        )
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> None:
        """Let nothing pass any more. Neither host notices that but by silence."""
        self.cable.send_signal(signal.SIGSTOP)

    def mend(self) -> None:
        """Let packets pass again."""
        self.cable.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Remove the hosts."""
        self.mend()
        self.cable.stdin.close()
        self.cable.wait()
        self.cable.stdout.close()


class _Direction:
    """Packets on their way from one end to the other."""

    def __init__(self, source: int, target: int, megabits: float, milliseconds: float) -> None:
        self.source = source
        self.target = target
        self.seconds_per_byte = 8e-6 / megabits if megabits else 0.0
        self.delay = milliseconds / 2000
        # (time of arrival, packet)
        self.under_way: collections.deque[tuple[float, bytes]] = collections.deque()
        self.free_at = 0.0

    def take(self, now: float) -> None:
        """Read what was sent, up to 64 packets."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                packet = os.read(self.source, 1 << 16)
                self.free_at = max(self.free_at, now) + len(packet) * self.seconds_per_byte
                self.under_way.append((self.free_at + self.delay, packet))

    def deliver(self, now: float) -> None:
        """Hand over what has arrived."""
        while self.under_way and self.under_way[0][0] <= now:
            # a full queue drops, as a network does
            with contextlib.suppress(BlockingIOError):
                os.write(self.target, self.under_way.popleft()[1])


def main(name: str, megabits: float = 0, milliseconds: float = 0) -> None:
    """Make the hosts, print "ready" or why not, carry packets until standard input ends, and
    remove the hosts."""
    try:
        ends = [_end(f"{name}{i}", ADDRESSES[i]) for i in (0, 1)]
        print("ready", flush=True)
        _carry(ends, megabits, milliseconds)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        print(f"no network namespaces here: {str(said).strip()}", flush=True)
    finally:
        for i in (0, 1):
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "delete", f"{name}{i}"], capture_output=True)


def _end(host: str, address: str) -> int:
    """Make a host; returns the file of its end of the cable, which reads what the host sends."""
    # one that a killed process left behind
    subprocess.run(["ip", "netns", "delete", host], capture_output=True)
    _ip("netns", "add", host)
    with open("/proc/self/ns/net") as own, open(f"/run/netns/{host}") as there:
        _enter(there)
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = struct.pack("16sH22x", INTERFACE.encode(), IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(end, TUNSETIFF, flags)
        _enter(own)
    _ip("-n", host, "link", "set", "lo", "up")
    _ip("-n", host, "address", "add", f"{address}/24", "dev", INTERFACE)
    # a queue that holds what programs send at once
    _ip("-n", host, "link", "set", INTERFACE, "mtu", str(MTU), "txqueuelen", "10000", "up")
    return end


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _enter(namespace: TextIO) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


def _carry(ends: list[int], megabits: float, milliseconds: float) -> None:
    there, back = (_Direction(ends[i], ends[1 - i], megabits, milliseconds) for i in (0, 1))
    while True:
        due = [way.under_way[0][0] for way in (there, back) if way.under_way]
        pause = max(0.0, min(due) - time.monotonic()) if due else None
        readable, _, _ = select.select([sys.stdin, *ends], [], [], pause)
        if sys.stdin in readable:
            return
        now = time.monotonic()
        for way in (there, back):
            if way.source in readable:
                way.take(now)
            way.deliver(now)


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
