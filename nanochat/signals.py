"""SIGTERM, SIGINT and SIGHUP: finish the step, save, leave. Imports no torch, so that a signal is
heard from the first second on."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from nanochat import output

# for which a run waits for a screen that takes nothing
SCREEN_PATIENCE_SECONDS = 10.0

# Windows has no SIGHUP.
STOPPING = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]


class Stopped(BaseException):
    """The run was asked to stop. Exit code 75.

    Raised where nothing has to be finished first, and in unison on all ranks by evaluations and
    before a step."""


class StopSignals:
    """SIGTERM, SIGHUP (a closed terminal) and the first SIGINT set `requested`, which the loop
    reads before each step; a second SIGINT interrupts immediately.

    at_once: while there is no step to finish (data, tokenizer, compilation) the first signal raises
    Stopped wherever it arrives."""

    def __init__(self, speaks: bool) -> None:
        """speaks: whether this process (rank 0) confirms on the screen that it will stop."""
        self.requested = False
        # by whom, for summary.json
        self.reason = "asked to stop by a signal"
        self.at_once = True
        self.speaks = speaks
        self.previous = {
            number: signal.signal(number, self._note)
            for number in STOPPING
            # nohup, for example, leaves SIGHUP ignored
            if signal.getsignal(number) != signal.SIG_IGN
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested:
            return
        self.requested = True
        if self.speaks and not self.at_once:
            text = "\nstopping after this step, saving first"
            # SIGINT is ignored in the background of a shell
            if signal.SIGINT in self.previous:
                text += "; Ctrl-C again leaves immediately without saving"
            output.write_from_signal_handler(f"{text}\n")
        self.check()

    def check(self) -> None:
        """Raise Stopped if that was asked for and nothing has to be finished first."""
        if self.requested and self.at_once:
            raise Stopped

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def exit_with(run: Callable[[], int]) -> None:
    """Call run() and end this process with the exit code that it returns, whatever comes after and
    whatever becomes of the screen.

    By then everything is written and printed. Signals are heard by run()'s StopSignals and ignored
    before and after it: torchrun ends all ranks by SIGTERM when the first is done, and a late
    Ctrl-C has nothing left to stop. The interpreter's clean-up is skipped: it would end threads in
    the middle of C++ code, which aborts."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _ignore)
    output.protect(SCREEN_PATIENCE_SECONDS)
    try:
        code = run()
    # argparse raises it before anything has begun
    except SystemExit:
        raise
    # raised while the error was reported: nothing that takes memory can be said
    except MemoryError:
        output.write_from_signal_handler("out of memory\n")
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
