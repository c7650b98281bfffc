"""`nanochat jobs watch`: a view of a run that refreshes itself. It only reads: leaving it does not
touch the run."""

import contextlib
import json
import os
import select
import shutil
import sys
import time
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

from nanochat import output
from nanochat.apps.jobs.curve import Losses, drawn
from nanochat.apps.jobs.listing import number, progress
from nanochat.apps.jobs.naming import named
from nanochat.apps.jobs.state import ALIVE, Run, announced, look, place_of
from nanochat.apps.jobs.verbs import ended_in_words
from nanochat.common import EXIT_COMPLETED, human_time
from nanochat.run.tables import fixed, short

DEFAULT_SECONDS = 2.0
# columns and lines where there is no terminal whose size could be asked, and of a large picture
PLAIN = (79, 20)
MOST_WIDTH = 120
BAR_WIDTH = 40
# a terminal's own words: another screen without cursor and back, its first cell, the rest of a line
# and of the screen
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
HINT = "q leaves, the run continues"


def follow(args: Namespace) -> int:
    """Show a run until it ends, or until q or Ctrl-C."""
    path = named(args.run).path
    losses = Losses(path / "metrics.jsonl")

    def now() -> Run:
        # a file that cannot be read leaves the picture as it is
        with contextlib.suppress(OSError):
            losses.read()
        # it may have been started again
        return look(place_of(path, announced()))

    with contextlib.suppress(KeyboardInterrupt):
        if args.once:
            run = now()
            print(json.dumps(run.as_json()) if args.json else "\n".join(frame(run, losses, *PLAIN)))
        elif args.json or not sys.stdout.isatty():
            _in_lines(now, args.every, args.json)
        else:
            _live(now, losses, args.every)
    return EXIT_COMPLETED


def _in_lines(now: Callable[[], Run], seconds: float, as_json: bool) -> None:
    """A line at each change, for files and pipes."""
    line = ""
    while True:
        run = now()
        before, line = line, "  ".join(_facts(run))
        if as_json:
            line = json.dumps(run.as_json())
        if line != before:
            print(line, flush=True)
        # as after `| head`
        if run.status not in ALIVE or output.reader_is_gone():
            return
        time.sleep(seconds)


# ----- on a terminal


def _live(now: Callable[[], Run], losses: Losses, seconds: float) -> None:
    """The whole terminal, refreshed; what was there comes back afterwards, with a last line."""
    with _own_screen(), _keys() as is_left:
        while True:
            run = now()
            columns, rows = shutil.get_terminal_size()
            # the last column stays free: a full line would wrap, or lose its end
            lines = frame(run, losses, columns - 1, rows - 1)
            lines = [*lines[: rows - 1], cut(HINT, columns - 1)]
            text = f"{CLEAR_LINE}\n".join(lines)
            print(f"{HOME}{text}{CLEAR_LINE}{CLEAR_BELOW}", end="", flush=True)
            if run.status not in ALIVE or is_left(seconds):
                break
    print("  ".join(_facts(run)))


@contextlib.contextmanager
def _own_screen() -> Iterator[None]:
    """Another screen of the terminal, without a cursor, while the body runs."""
    print(ENTER, end="", flush=True)
    try:
        yield
    finally:
        print(LEAVE, end="", flush=True)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Keys are read as they are pressed while the body runs. Yields a function that waits so many
    seconds, or until a key is pressed, and returns whether that was q."""
    if not sys.stdin or not sys.stdin.isatty():
        yield _wait
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    # Ctrl-C still interrupts
    tty.setcbreak(keyboard)
    try:
        yield _wait_for_key
    finally:
        # now, since a terminal that shows nothing at the moment would keep this waiting
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _wait_for_key(seconds: float) -> bool:
    keyboard = sys.stdin.fileno()
    if not select.select([keyboard], [], [], seconds)[0]:
        return False
    pressed = os.read(keyboard, 64)
    # nothing: the terminal is gone
    return not pressed or b"q" in pressed.lower()


# ----- what is shown


def frame(run: Run, losses: Losses, width: int, height: int) -> list[str]:
    """The view as lines of at most so many columns, and about so many lines."""
    lines = wrapped(_facts(run), width)
    if run.step is not None and run.steps:
        share = min(1.0, max(0.0, run.step / run.steps))
        size = max(4, min(BAR_WIDTH, width - 8))
        done = round(share * size)
        lines.append(cut(f"[{'#' * done}{'-' * (size - done)}] {share:.0%}", width))
    room = height - len(lines)
    picture = drawn(losses, min(width, MOST_WIDTH), min(room, PLAIN[1]))
    return [*lines, *(cut(line, width) for line in picture)]


def _facts(run: Run) -> list[str]:
    """What is known of a run, in pieces that are not broken over lines where they fit."""
    facts = [f"{run.tag}: {run.status}"]
    if run.status not in ALIVE:
        facts = [f"{run.tag}: {ended_in_words(run)}"]
    facts.append(f"step {progress(run)}")
    if run.eta_seconds is not None:
        facts.append(f"eta {human_time(run.eta_seconds)}")
    facts.append(f"loss {fixed(run.loss)}")
    facts.append(f"val_bpb {fixed(run.val_bpb)}")
    facts.append(f"{short(run.tok_per_sec)} tok/s")
    facts.append(f"checkpoint {number(run.checkpoint, 'none')}")
    # "step 12" says nothing that is not there already
    if run.doing and not run.doing.startswith("step "):
        facts.append(f"doing: {run.doing}")
    return facts


def wrapped(pieces: Sequence[str], width: int) -> list[str]:
    """Pieces of text as lines of at most so many columns; a longer one is cut."""
    lines: list[str] = []
    for piece in pieces:
        longer = f"{lines[-1]}  {piece}" if lines else piece
        if lines and columns_of(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(cut(piece, width))
    return lines


def columns_of(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """The beginning of a text that takes at most so many columns."""
    taken = 0
    for i, character in enumerate(text):
        taken += _columns(character)
        if taken > width:
            return text[:i]
    return text
