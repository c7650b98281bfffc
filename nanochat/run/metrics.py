"""The records of a run: metrics.jsonl, samples.jsonl and core.jsonl, one JSON object a line."""

import contextlib
import errno
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def finite_or_null(values: Mapping[str, Any]) -> Line:
    """A copy of a dict with None for NaN and infinite numbers: JSON has no word for them, and 0
    would be a lie."""
    return {name: _finite_or_none(value) for name, value in values.items()}


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Record:
    """A file of JSON objects, one a line, appended and flushed. Every object has a `step`."""

    def __init__(self, path: Path | str, report: Callable[[str], None] = print) -> None:
        """report(text) takes a line about trouble."""
        self.path = Path(path)
        self.report = report
        self.file = None
        # Where the last whole line ends: what is torn behind it can be cut.
        self.size = 0  # bytes written
        self.kept: list[str] = []  # lines that the disk has not taken yet
        self.refused = False  # whether that has been reported
        # the thread that saves checkpoints calls sync()
        self.lock = threading.Lock()

    def keep_before(self, step: int) -> None:
        """Cut the lines of this step and later ones, and a torn last line; the file is replaced
        atomically.

        Called on resume from `step`: what follows is written again, so that each step stands
        once."""
        if not self.path.exists():
            return
        kept = []
        for line in lines_of(self.path):
            value = parsed(line)
            if value is not None and value["step"] < step:
                kept.append(line + "\n")
        # Written anew and renamed, so that a crash in the middle leaves the old file.
        temporary = self.path.with_suffix(".partial")
        with open(temporary, "w", encoding="utf-8") as f:
            f.write("".join(kept))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.path)

    def write(self, **values: Any) -> None:
        """Append a line. If the disk refuses it, it is kept in memory and written with a later one;
        that is reported once."""
        try:
            with self.lock:
                # Kept first, then written: a line that the disk refuses is still in order.
                self.kept.append(json.dumps(finite_or_null(values), allow_nan=False) + "\n")
                self._write_kept()
        except OSError as error:
            if not self.refused:
                self.report(
                    f"{self.path.name} cannot be written ({error}); its lines are kept in memory, "
                    "training continues"
                )
            self.refused = True

    def _write_kept(self) -> None:
        """Write the lines that are not written yet, all or none. Raises OSError."""
        content = "".join(self.kept).encode()
        if not content:
            return
        # Opened late: a run that is refused before its first step leaves no file.
        # Unbuffered, so that a kill loses no line that was written.
        if self.file is None:
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (closed by close())
            self.size = self.file.seek(0, os.SEEK_END)
        try:
            written = self.file.write(content)
            if written < len(content):
                taken = f"only {written} of {len(content)} bytes were taken"
                raise OSError(errno.ENOSPC, taken)
        except OSError:
            # remove what was torn
            with contextlib.suppress(OSError):
                self.file.truncate(self.size)
            raise
        if self.refused:
            self.report(f"{self.path.name}: all lines are written now")
        self.size += len(content)
        self.refused = False
        self.kept = []

    def value_at(self, step: int | None, name: str) -> Any:
        """The value of that name that was written last for a step, or None."""
        # A value may stand several times, for example null for a failed evaluation and then a
        # number.
        found = None
        for line in read_lines(self.path):
            if line["step"] == step and line.get(name) is not None:
                found = line[name]
        return found

    def sync(self) -> None:
        """Bring all lines to the disk. Raises OSError."""
        with self.lock:
            self._write_kept()
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write what is left, if the disk takes it now."""
        with self.lock, contextlib.suppress(OSError):
            self._write_kept()
        if self.file is not None:
            self.file.close()


def lines_of(path: Path | str) -> list[str]:
    """The lines of a file; bytes that are not UTF-8 (a disk's doing) spoil only their own line."""
    return Path(path).read_text(encoding="utf-8", errors="replace").split("\n")


def parsed(line: str) -> Line | None:
    """The object in a line; None for a torn or foreign one."""
    try:
        # A step that is no number comes from another program, or from a torn line that still
        # parses.
        value = json.loads(line)
        return value if isinstance(value["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def read_lines(path: Path | str) -> list[Line]:
    """The objects of a .jsonl file, a torn last line left out; [] if there is no file."""
    if not Path(path).exists():
        return []
    values = [parsed(line) for line in lines_of(path)]
    return [value for value in values if value is not None]
