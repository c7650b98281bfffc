"""`nanochat APP ...` and `python -m nanochat APP ...`."""

import importlib
import os
import sys

from nanochat.common import EXIT_USAGE, UsageError

APPS = {
    "sample": "generate text from a run",
    "report": "plot a run's curves",
}
LATER = ("evaluate", "compare", "runs", "serve", "client", "export", "dpo", "jobs", "data", "tokenizer", "bench", "doctor")
USAGE = "usage: nanochat APP [options]      nanochat APP --help shows an app's options\n\napps:\n" + "\n".join(
    f"  {name:<10} {text}" for name, text in APPS.items())


def main(argv=None):
    """Run an app. Returns its exit code; 2 for wrong usage or input."""
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
        return importlib.import_module(f"nanochat.{app}").main(rest)
    except UsageError as error:
        print(f"nanochat {app}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; keep the interpreter from flushing into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
