"""SIGTERM, SIGINT and SIGHUP: finish the step, save, leave. Imports no torch, so that a signal is heard from the first second on."""

import contextlib
import os
import signal
import sys
import traceback


class Stopped(BaseException):
    """Asked to stop where there is no step to finish and nothing to save. Exit code 75."""


class StopSignals:
    """SIGTERM, SIGHUP (a closed terminal) and the first SIGINT set `requested`, which the loop reads once a step; a second
    SIGINT interrupts at once.

    at_once: while there is no step to finish (data, tokenizer, compilation) the first one raises Stopped where it comes."""

    def __init__(self, speaks):
        self.requested, self.at_once, self.speaks = False, True, speaks
        self.previous = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN
        }  # as nohup leaves SIGHUP

    def _note(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested:
            return
        self.requested = True
        if (
            number == signal.SIGHUP
        ):  # nobody is there to read, and writing to a closed terminal is an error
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if (
            self.speaks and not self.at_once
        ):  # os.write: print() is not safe inside a signal handler
            again = (
                b"; Ctrl-C again leaves at once without saving"
                if signal.SIGINT in self.previous
                else b""
            )  # ignored in the background
            os.write(2, b"\nstopping after this step, saving first" + again + b"\n")
        self.check()

    def check(self):
        """Raise Stopped if that was asked for and nothing has to be finished first."""
        if self.requested and self.at_once:
            raise Stopped

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def exit_with(run):
    """Call run() and end this process with the exit code that it returns, whatever comes after.

    By then all is written and said. Signals are heard by run()'s StopSignals and count for nothing before and after it:
    torchrun ends all ranks by SIGTERM when the first is done, and a late Ctrl-C is none that could stop anything. The
    interpreter's clean-up is left out: it would end threads in the middle of C++ code, which aborts."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    try:
        code = run()
    except SystemExit:  # of argparse, before anything began
        raise
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
