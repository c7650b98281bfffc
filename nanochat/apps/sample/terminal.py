"""Lines of standard input; of a terminal, with editing, completion, and a history that outlives the
program."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from nanochat.apps.sample.commands import completions
from nanochat.apps.sample.prompts import is_terminal
from nanochat.common import UsageError, in_a_line, note_once, own_cache

SIGN = "> "
# lines of the history that are read, and as many more before the file is shortened
MOST_LINES = 1000


def reader_of_lines() -> Callable[[], str | None]:
    """A function that reads the next line of standard input, without its end; None at the end of
    input. Bytes that are not UTF-8 become U+FFFD. On a terminal it raises KeyboardInterrupt by
    Ctrl-C."""
    if is_terminal(sys.stdin):
        return Terminal().read
    lines = _piped_lines()

    def read() -> str | None:
        return next(lines, None)

    return read


def _piped_lines() -> Iterator[str]:
    # the descriptor, since there is no sys.stdin where it was closed
    with open(0, encoding="utf-8-sig", errors="replace", closefd=False) as file:
        # readline(), since iterating may wait for more than a line
        while line := file.readline():
            yield line.removesuffix("\n")


class Terminal:
    """Reads lines with readline, where Python has it."""

    def __init__(self) -> None:
        # bytes that are not UTF-8 are no reason to end
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        self.history = History()
        try:
            import readline
        except ImportError:
            note_once("lines cannot be edited: this Python has no module readline")
            return
        _set_up(readline)
        for line in self.history.lines():
            # one that this locale cannot write, or with a NUL
            with contextlib.suppress(ValueError):
                readline.add_history(line)

    def read(self) -> str | None:
        """The next line, without its end; None at the end of input. KeyboardInterrupt by Ctrl-C."""
        try:
            if sys.stdout.isatty():
                line = input(SIGN)
            else:
                # the text may be piped on, without signs between
                print(SIGN, end="", file=sys.stderr, flush=True)
                line = input()
        # OSError: the terminal is gone
        except (EOFError, OSError):
            return None
        if line.strip():
            self.history.add(line)
        return line


def _set_up(readline: ModuleType) -> None:
    found: list[str] = []

    def complete(word: str, number: int) -> str | None:
        if number == 0:
            found[:] = completions(readline.get_line_buffer(), word)
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    # macOS has another library by this name
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")


class History:
    """The lines of earlier sessions, in a private file below the base dir; without one, where it
    cannot be written."""

    def __init__(self) -> None:
        self.path: Path | None = None
        try:
            self.path = own_cache("sample") / "history"
            self._shorten()
        except (OSError, UsageError) as error:
            self.path = None
            note_once(f"no history is kept ({in_a_line(error)})")

    def _shorten(self) -> None:
        """Create the file, and drop the oldest lines of a long one."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "r+b") as file:
            # it may have been created by something else
            os.fchmod(descriptor, 0o600)
            lines = file.readlines()
            if len(lines) > 2 * MOST_LINES:
                file.seek(0)
                file.writelines(lines[-MOST_LINES:])
                file.truncate()

    def lines(self) -> list[str]:
        """The newest lines, the oldest first."""
        kept = []
        with contextlib.suppress(OSError):
            for written in self.path.read_bytes().splitlines()[-MOST_LINES:] if self.path else []:
                # a line may be torn, and hold anything
                with contextlib.suppress(ValueError):
                    line = json.loads(written)
                    kept += [line] if isinstance(line, str) else []
        return kept

    def add(self, line: str) -> None:
        """Keep a line: as JSON, since a pasted one may have several."""
        if self.path:
            with contextlib.suppress(OSError):
                descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
                with open(descriptor, "wb") as file:
                    file.write(json.dumps(line).encode() + b"\n")
