"""Rows of the table of `nanochat doctor --gpu`, its goals, and figures that follow from rows.
Imports no torch."""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanochat.common import in_a_line

GOALS = {
    "d12 bf16 MFU": 50.0,
    "d24 bf16 MFU": 60.0,
    "d24 fp8 / bf16 speed": 1.25,
    "d12 optimizer share": 5.0,
    "plain PyTorch / triton, T = 512": 3.1,
    "best library / triton, T = 2048": 0.7,
    "full context / window, triton, T = 2048": 1.0,
    "full context / window, flex, T = 2048": 1.0,
}
# Goals that are upper limits; the others are lower limits.
AT_MOST = {"d12 optimizer share"}
# Depths that are trained, and rows of 2,048 tokens per pass on 75 GB.
ROWS = {12: 32, 20: 16, 24: 16}
# Tokens of a row, whatever length a toy's check is named after.
TOY_LENGTH = 32


def is_toy() -> bool:
    """Whether TOY=1 asks for every check on a CPU, tiny: a test of the checks themselves, whose
    figures mean nothing."""
    return os.environ.get("TOY") == "1"


@dataclass(frozen=True)
class Row:
    """A line of the table. value: None where there is none, and the note says why. wrong: it makes
    the exit code 1. check: which one it belongs to. The first row also describes the machine:
    facts, for JSON, and the listed peak of the GPU in FLOP/s, None if it is not listed."""

    what: str
    value: float | None
    unit: str = ""
    note: str = ""
    wrong: bool = False
    facts: dict[str, Any] | None = None
    peak: float | None = None
    check: str = ""

    def as_json(self) -> dict[str, Any]:
        """The row for the results' file."""
        content = asdict(self)
        if self.facts is None:
            del content["facts"], content["peak"]
        if not self.check:
            del content["check"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Row":
        """The row that a check printed. A value that is not finite is wrong, and JSON has none."""
        row = cls(**content)
        if row.value is None or math.isfinite(row.value):
            return row
        return replace(row, value=None, wrong=True, note=f"{row.value}; {row.note}")

    def as_text(self, toy: bool = False) -> str:
        """The row as a line; with its goal, unless it is a toy's."""
        figure = "" if self.value is None else f"{self.value:>10,.4g} {self.unit}"
        text = f"{self.what:<52} {figure:<20}"
        # A missed goal is news, not a fault: it is shown and leaves the exit code alone.
        goal = GOALS.get(self.what)
        if goal is not None and self.value is not None and not toy:
            met = self.value <= goal if self.what in AT_MOST else self.value >= goal
            text += f" [goal {goal:g}: {'met' if met else 'MISSED'}]"
        wrong = "WRONG: " if self.wrong else ""
        return f"{text} {wrong}{self.note}".rstrip()


@dataclass(frozen=True)
class GpuMachine:
    """What the checks need to know about the machine. described: as in config.json. memory_bytes:
    of one GPU."""

    described: dict[str, str | int]
    triton: bool
    torchao: bool
    pytest: bool
    xdist: bool
    gpus: int
    memory_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The `facts` of the first row."""
        content = asdict(self)
        return content.pop("described") | content

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "GpuMachine":
        """The machine of a first row's `facts`."""
        own = ("triton", "torchao", "pytest", "xdist", "gpus", "memory_bytes")
        described = {name: value for name, value in facts.items() if name not in own}
        return cls(described, **{name: facts[name] for name in own})


def attempt(name: str, rows: Callable[[], Row | Iterator[Row]]) -> Iterator[Row]:
    """The row or rows of a function; what it raises becomes a wrong row."""
    try:
        found = rows()
        yield from [found] if isinstance(found, Row) else found
    except Exception as error:
        # Whatever it is: the rows after this one are still useful.
        yield Row(name, None, note=f"{type(error).__name__}: {in_a_line(error)}", wrong=True)


def conclusions(found: dict[str, float | None], toy: bool = False) -> list[Row]:
    """Rows that follow from others. found: {what: value} of those."""
    rows: list[Row] = []
    for depth in ROWS:
        plain = found.get(f"d{depth} bf16 speed")
        for kind in ("fp8", "rowwise", "triton"):
            name = f"d{depth} {kind} / bf16 speed"
            rows += _ratio(name, found.get(f"d{depth} {kind} speed"), plain)
    for T, by_window in sorted(_attention_times(found).items()):
        rows += _ratios_of_attention(T, by_window, full_window=TOY_LENGTH if toy else T)
    return rows


def _ratio(name: str, of: float | None, to: float | None) -> list[Row]:
    # Nothing to say where one of the two was not measured.
    return [Row(name, of / to, "times")] if of and to else []


def _attention_times(found: dict[str, float | None]) -> dict[int, dict[int, dict[str, float]]]:
    """{T: {window: {way: milliseconds}}} of the rows of attention."""
    times: dict[int, dict[int, dict[str, float]]] = {}
    for what, value in found.items():
        match = re.fullmatch(r"attention,? (.+), window (\d+), T = (\d+)", what)
        if value and match:
            way, window, T = match[1], int(match[2]), int(match[3])
            times.setdefault(T, {}).setdefault(window, {})[way] = value
    return times


def _ratios_of_attention(
    T: int, by_window: dict[int, dict[str, float]], full_window: int
) -> list[Row]:
    """Rows of one length. by_window: {window: {way: milliseconds}}."""
    full, short = by_window.get(full_window, {}), by_window[min(by_window)]
    ours = full.get("triton")
    # blocked is ours too, meant for CPUs.
    libraries = [
        value for way, value in full.items() if way not in ("triton", "plain PyTorch", "blocked")
    ]
    rows = _ratio(f"plain PyTorch / triton, T = {T}", full.get("plain PyTorch"), ours)
    rows += _ratio(f"best library / triton, T = {T}", min(libraries, default=None), ours)
    # A check that was cut off may have only one of the two windows.
    if len(by_window) > 1:
        for way, value in full.items():
            rows += _ratio(f"full context / window, {way}, T = {T}", value, short.get(way))
    return rows
