"""`nanochat APP ...` and `python -m nanochat APP ...`."""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

# All else is imported by functions: run() has to decide first what Ctrl-C does.

APPS = {
    "sample": "generate text from a run",
    "evaluate": "measure CORE and bits per byte of a run",
    "compare": "compare runs: tables, noise, plots",
    "report": "a run's summary, curves and samples on one page",
    "runs": "list the runs under a folder",
    "jobs": "see runs while they train, and steer them",
    "serve": "answer OpenAI's clients with the models of runs",
    "client": "text from a server that speaks OpenAI's API",
    "sft": "teach a run's model to answer, from conversations",
    "dpo": "teach a run's model which of two answers is preferred",
    "average": "average the weights of a run's checkpoints",
    "sweep": "train and compare the runs of a sweep",
    "export": "turn a run into a Hugging Face folder, a gguf file or a page, or back",
    "data": "fetch, inspect, tokenize ahead and mix text",
    "tokenizer": "train, compare and inspect tokenizers",
    "bench": "time the parts of training on this machine",
    "doctor": "check this machine",
}
EXIT_INTERRUPTED = 130
LATER = ("certify", "verify")
USAGE = (
    "usage: nanochat APP [options]      nanochat APP --help shows an app's options, --help-json "
    "as data\n\napps:\n" + "\n".join(f"  {name:<10} {text}" for name, text in APPS.items())
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run an app. Returns its exit code; 2 for wrong usage or input."""
    from nanochat.common import (
        EXIT_FAILED,
        EXIT_USAGE,
        Unavailable,
        UsageError,
        check_system,
        find_own_tasks,
        printable,
    )
    from nanochat.limits import is_out_of_memory, out_of_memory_in_words

    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else EXIT_USAGE
    app, rest = argv[0], argv[1:]
    if app not in APPS:
        why = "is not available in this version" if app in LATER else "is not an app"
        print(f"nanochat: error: '{app}' {why}; there are: {', '.join(APPS)}", file=sys.stderr)
        return EXIT_USAGE
    try:
        check_system()
        # before anything imports a `tasks` that is somebody else's
        find_own_tasks()
        if "--help-json" in rest:
            from nanochat.run.help_json import answer_in_json

            rest = answer_in_json(rest)
        return importlib.import_module(f"nanochat.apps.{app}").main(rest)
    except UsageError as error:
        print(printable(f"nanochat {app}: error: {error}"), file=sys.stderr)
        return EXIT_USAGE
    except Unavailable as error:
        print(printable(f"nanochat {app}: failed: {error}"), file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"\nnanochat {app}: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = printable(out_of_memory_in_words(error))
        print(f"nanochat {app}: failed: {reason}", file=sys.stderr)
        return EXIT_FAILED


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGINT: KeyboardInterrupt, but in the middle of an import the end of this process.

    There it would reach C++ code that aborts, or packages that take it for their own failure."""
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                os.write(2, b"\nnanochat: stopped\n")
            os._exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def run() -> NoReturn:
    """The installed command: main(), and its exit code, whatever becomes of the screen.

    A reader that has seen enough, such as `head`, is no failure; output that is lost for another
    reason, such as a full disk, makes the exit code 1."""
    # a shell's background jobs ignore it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from nanochat import output
    from nanochat.common import EXIT_COMPLETED, EXIT_FAILED

    output.protect()
    try:
        code = main()
    # argparse's, after --help or wrong options
    except SystemExit as ended:
        code = ended.code
    lost = output.lost()
    if code == EXIT_COMPLETED and lost:
        print(
            f"nanochat: {lost}; what the command itself wrote to files is complete",
            file=sys.stderr,
        )
        code = EXIT_FAILED
    sys.exit(code)


if __name__ == "__main__":
    run()
