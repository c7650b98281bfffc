"""What a run shows on the screen: progress bars, one live line, and messages."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from nanochat.common import human_time

PLAIN_SECONDS = 10  # between progress lines in a file or pipe
FIRST_STEPS = 3  # which are always shown there


def bar(items: list[Any], text: str, unit: str) -> Iterable[Any]:
    """tqdm over a list on a terminal; in a file or pipe the list itself, after one line if it holds
    anything."""
    if not items:
        return items
    # A bar in a log file would be thousands of lines.
    if not sys.stdout.isatty():
        print(f"{text}: {len(items)} {unit}s", flush=True)
        return items
    from tqdm import tqdm

    return tqdm(items, desc=text, unit=unit, file=sys.stdout)


class Progress:
    """One live line on a terminal (tqdm's), plain lines now and then in a file or pipe."""

    def __init__(
        self,
        first_step: int,
        steps: int | None,
        quiet: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """steps: of the whole run, None if not known yet. quiet: show nothing (ranks above 0)."""
        self.quiet = quiet
        self.now = now
        self.bar = None
        # So that the first update is shown.
        self.shown_at = -math.inf
        # Only one process may own the live line.
        self.live = sys.stdout.isatty() and not quiet
        if self.live:
            from tqdm import tqdm

            self.bar = tqdm(
                initial=first_step,
                total=steps,
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:12}| {desc}",
            )

    def update(self, step: int, steps: int | None, text: str, seconds_left: float | None) -> None:
        """Show the state after update `step` (1 is the first)."""
        if self.quiet:
            return
        eta = "eta ?" if seconds_left is None else f"eta {human_time(seconds_left)}"
        if self.bar is not None:
            # The number of steps may only now be known, or may have changed.
            self.bar.total = steps
            self.bar.set_description_str(f"{text} | {eta}", refresh=False)
            self.bar.update(step - self.bar.n)
        # The first steps show that it works and how fast; later ones only that it still does.
        elif step <= FIRST_STEPS or step == steps or self._is_time():
            self.shown_at = self.now()
            of = f"{step}/{steps}" if steps else f"{step}"
            print(f"step {of} | {text} | {eta}", flush=True)

    def _is_time(self) -> bool:
        return self.now() - self.shown_at >= PLAIN_SECONDS

    def meanwhile(self, text: str) -> None:
        """Show what happens between two updates."""
        if self.bar is not None:
            self.bar.set_description_str(text)
        elif not self.quiet and self._is_time():
            self.shown_at = self.now()
            print(text, flush=True)

    def message(self, text: str) -> None:
        """A line of its own above the live one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        elif not self.quiet:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the live line as it is."""
        if self.bar is not None:
            self.bar.close()
