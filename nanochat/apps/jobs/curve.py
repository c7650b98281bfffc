"""The loss of a run as a picture of characters, from metrics.jsonl, of which only what is new is
read."""

import os
import stat
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nanochat.common import ceil_div
from nanochat.run.metrics import parsed
from nanochat.run.records import finite_number

# a look at a long file takes pieces of it
PIECE_BYTES = 8 << 20
# what is larger is neither a step nor a loss, and a range of such numbers has no size
LARGEST = 1e30
# columns and lines of the smallest picture that shows anything
LEAST_WIDTH = 24
LEAST_HEIGHT = 6
# columns for a step below the picture
TICK_WIDTH = 12
NAMES = ("train/loss", "val/loss")


class Losses:
    """The losses in a run's metrics.jsonl, by name: steps, and nats per token."""

    def __init__(self, path: Path) -> None:
        """path: of the file, which need not exist yet."""
        self.path = path
        self.inode = self.offset = 0
        self.clear()

    def clear(self) -> None:
        """Forget what was read."""
        self.steps = {name: array("d") for name in NAMES}
        self.values = {name: array("d") for name in NAMES}

    def read(self) -> None:
        """Take what was added to the file since the last time. Raises OSError."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return
        # opening a pipe would wait for whoever writes into it
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{self.path.name} is no ordinary file")
        # a resumed run replaces the file
        if found.st_ino != self.inode or found.st_size < self.offset:
            self.clear()
            self.inode, self.offset = found.st_ino, 0
        with open(self.path, "rb") as file:
            while whole := self._next_lines(file):
                self.offset += len(whole)
                for line in whole.decode("utf-8", errors="replace").split("\n"):
                    self._take(line)

    def _next_lines(self, file: BinaryIO) -> bytes:
        """Whole lines from where the last ones ended; a torn one is read when it is whole."""
        file.seek(self.offset)
        piece = file.read(PIECE_BYTES)
        if not piece.endswith(b"\n"):
            piece += file.readline()
        return piece[: piece.rfind(b"\n") + 1]

    def _take(self, line: str) -> None:
        try:
            values = parsed(line)
        # of brackets, thousands deep
        except RecursionError:
            values = None
        step = _drawable(values["step"]) if values else None
        for name in NAMES if step is not None else ():
            if (value := _drawable(values.get(name))) is not None:
                self.steps[name].append(step)
                self.values[name].append(value)


def _drawable(value: Any) -> float | None:
    number = finite_number(value)
    return None if number is None or abs(number) > LARGEST else number


def thinned(steps: Sequence[float], values: Sequence[float], n: int) -> tuple[list, list]:
    """At most n points of a curve: means of as many neighbours."""
    size = max(1, ceil_div(len(values), n))
    starts = range(0, len(values), size)

    def means(numbers: Sequence[float]) -> list[float]:
        parts = [numbers[start : start + size] for start in starts]
        # divided first: the sum of large numbers would be infinite
        return [sum(number / len(part) for number in part) for part in parts]

    return means(steps), means(values)


def spread(steps: Sequence[float], n: int) -> list[float]:
    """n of these steps, the first and the last among them, evenly spread."""
    last = len(steps) - 1
    return sorted({steps[round(i * last / (n - 1))] for i in range(n)})


def drawn(losses: Losses, width: int, height: int) -> list[str]:
    """The picture as lines of at most `width` characters; [] where it has no place or there is
    nothing to draw yet, one line on how to get it where the package is missing."""
    trained = losses.values["train/loss"]
    if width < LEAST_WIDTH or height < LEAST_HEIGHT or len(trained) < 2:
        return []
    try:
        import plotext
    # OSError: a part in C that does not fit this system
    except (ImportError, OSError):
        return ["the picture of the loss needs plotext: pip install plotext"]
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    # one line is the legend
    figure.plot_size(width, height - 1)
    # braille has two dots in a column
    steps, values = thinned(losses.steps["train/loss"], trained, 2 * width)
    figure.draw(figure.signal(steps, values, marker="braille").lines())
    legend = "loss by step: line training"
    if losses.values["val/loss"]:
        steps, values = thinned(losses.steps["val/loss"], losses.values["val/loss"], width)
        figure.draw(figure.signal(steps, values, marker="o"))
        legend += ", o validation"
    # its own labels of large steps are powers of ten
    ticks = spread(losses.steps["train/loss"], min(5, width // TICK_WIDTH))
    figure.ruler("x").ticks(ticks, [f"{step:,.0f}" for step in ticks])
    picture = figure.build().string(colorless=True)
    return [legend[:width], *(line.rstrip() for line in picture.rstrip("\n").split("\n"))]
