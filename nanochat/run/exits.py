"""How a training program ends: its errors as messages and exit codes. Imports no torch, so that a
signal is heard from the first second on."""

import os
import sys
from collections.abc import Callable

from nanochat import limits
from nanochat.common import (
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USAGE,
    TrainingFailed,
    Unavailable,
    UsageError,
    check_system,
    printable,
)
from nanochat.signals import Stopped, StopSignals


def exit_code_of(main: Callable[[StopSignals], int], program: str) -> int:
    """main(stop)'s exit code, or that of the error which ends it, after a line that says why.

    stop: the signals of this process, heard until this returns. program: its name, for the
    lines."""

    def ended_with(text: str, code: int) -> int:
        print(printable(f"{program}: {text}"), file=sys.stderr)
        return code

    # Before torch is imported, which takes seconds in which Ctrl-C should be heard.
    stop = StopSignals(speaks=os.environ.get("RANK", "0") == "0")
    # Read by torch when it is imported. Without it, GPU memory that is free but in pieces ends in
    # waits of up to 100 ms, or in an error though everything would fit.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        check_system()
        return main(stop)
    except UsageError as error:
        return ended_with(f"error: {error}", EXIT_USAGE)
    except Stopped:
        return ended_with("stopped, as requested, before a step was done", EXIT_STOPPED)
    except (TrainingFailed, Unavailable) as error:
        return ended_with(f"training failed: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        return ended_with("interrupted", EXIT_STOPPED)
    except Exception as error:
        # of many types, and as early as while torch is imported
        if limits.is_out_of_memory(error):
            reason = limits.out_of_memory_in_words(error)
            return ended_with(f"training failed in the set-up: {reason}", EXIT_FAILED)
        if not stop.requested:
            raise
        from nanochat.ranks import is_lost_exchange

        if not is_lost_exchange(error):
            raise
        text = "stopped, as requested, during the set-up: the other ranks were asked as well"
        return ended_with(text, EXIT_STOPPED)
    finally:
        stop.restore()
