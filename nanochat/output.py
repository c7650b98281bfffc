"""Standard output and standard error that never decide anything: what the screen does not take is
dropped, and the work continues. Imports no torch."""

import contextlib
import errno
import io
import os
import select
import sys
from typing import TextIO


class _Screen(io.FileIO):
    """A file descriptor whose writes never fail.

    refused: the last error with which the system refused a write, or None."""

    refused: OSError | None = None

    def write(self, data: "bytes | memoryview") -> int:
        try:
            written = super().write(data)
            # Another program may have made the pipe non-blocking: wait as a blocking one would.
            while written is None:
                select.select([], [self], [])
                written = super().write(data)
            return written
        except OSError as error:
            self.refused = error
            return len(data)


def protect() -> None:
    """Replace sys.stdout and sys.stderr by streams that drop what cannot be shown: because the
    reader, the terminal or the space on a disk is gone, the stream is closed, or its encoding lacks
    a character (which becomes "?"). Everything that prints in this process goes through them."""
    # Otherwise the next file that is opened would take the place of a closed stream, and receive
    # what is printed.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _protected(sys.stdout, 1)
    sys.stderr = _protected(sys.stderr, 2)


def _protected(stream: TextIO | None, descriptor: int) -> TextIO:
    # Python has no stream where the descriptor was closed.
    encoding = stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(_Screen(descriptor, "w", closefd=False)),
        encoding=encoding,
        errors="replace",
        line_buffering=stream.line_buffering if stream else False,
        write_through=stream.write_through if stream else False,
    )


def refused() -> OSError | None:
    """The last error with which the system refused a write to standard output; None if all was
    taken, or if protect() was not called."""
    screen = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    sys.stdout.flush()
    return screen.refused if isinstance(screen, _Screen) else None


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`."""
    error = refused()
    return error is not None and error.errno == errno.EPIPE


def write_from_signal_handler(text: str) -> None:
    """Write to standard error inside a signal handler, where print() is not safe."""
    # Nothing may be raised in the middle of whatever was interrupted.
    with contextlib.suppress(OSError):
        os.write(2, text.encode("ascii", "replace"))
