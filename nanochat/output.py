"""Standard output and standard error that never decide anything: what the screen does not take is
dropped, and the work continues. Imports no torch."""

import contextlib
import errno
import io
import os
import select
import sys
from typing import TextIO

# Bytes for which a terminal that reports any room has room: unlike a pipe, it promises nothing, and
# its buffers grow by 256 bytes.
TERMINAL_PIECE = 64


class _Screen(io.FileIO):
    """A file descriptor whose writes never fail, and never wait longer than patience_seconds, None
    for any time.

    refused: the last error with which the system refused a write, or None."""

    def __init__(self, descriptor: int, patience_seconds: float | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.patience_seconds = patience_seconds
        # A piece of this size does not wait where there is room.
        is_guarded_terminal = patience_seconds is not None and self.isatty()
        self.piece = TERMINAL_PIECE if is_guarded_terminal else select.PIPE_BUF
        self.is_stuck = False
        self.refused: OSError | None = None

    def write(self, data: "bytes | memoryview") -> int:
        try:
            written = None
            # Another program may have made the pipe non-blocking; None means that it is full.
            while written is None:
                if not self._takes_text():
                    self.refused = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
                    return len(data)
                written = super().write(data[: self.piece])
            return written
        except OSError as error:
            self.refused = error
            return len(data)

    def _takes_text(self) -> bool:
        """Whether there is room, after some patience. Who was waited for in vain is given none."""
        patience = 0 if self.is_stuck else self.patience_seconds
        self.is_stuck = not select.select([], [self], [], patience)[1]
        return not self.is_stuck


def protect(patience_seconds: float | None = None) -> None:
    """Replace sys.stdout and sys.stderr by streams that drop what cannot be shown: because the
    reader, the terminal or the space on a disk is gone, the stream is closed, or its encoding lacks
    a character (which becomes "?"). Everything that prints in this process goes through them.

    patience_seconds: how long to wait for a reader that takes nothing, such as a terminal after
    Ctrl-S, before its text is dropped until it reads again. None: as long as it takes, as for
    `| less`."""
    # Otherwise the next file that is opened would take the place of a closed stream, and receive
    # what is printed.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _protected(sys.stdout, _Screen(1, patience_seconds))
    sys.stderr = _protected(sys.stderr, _Screen(2, patience_seconds))


def _protected(stream: TextIO | None, screen: _Screen) -> TextIO:
    # Python has no stream where the descriptor was closed.
    encoding = stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(screen),
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


def lost() -> str:
    """What to report if some of standard output was not taken; "" if all was, or if its reader is
    gone, since that one has seen enough."""
    error = refused()
    if error is None or reader_is_gone():
        return ""
    return f"the output could not be written ({error.strerror})"


def write_from_signal_handler(text: str) -> None:
    """Write to standard error inside a signal handler, where print() is not safe."""
    # Nothing may be raised in the middle of whatever was interrupted, nor wait there.
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode("ascii", "replace"))
