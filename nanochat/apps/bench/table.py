"""Results of `nanochat bench`: derived figures, lines of the table, and an earlier run to compare
with. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UsageError, human_bytes, read_json
from nanochat.run.timing import Entry, short_time

# What was measured by versions that lacked these settings.
NOT_IN_OLD_FILES = {"fp8": False, "fp8_recipe": "tensorwise"}


@dataclass(frozen=True)
class Result:
    """An Entry with its derived figures, as the JSON has them. seconds is the median of n; rates
    and shares are None where the entry counts no tokens or FLOPs."""

    name: str
    n: int
    seconds: float
    fastest: float
    slowest: float
    tokens_per_sec: float | None
    flops_per_sec: float | None
    share_of_peak: float | None
    peak_memory_bytes: int | None
    note: str
    predicted_seconds: float | None
    predicted_bytes: int | None

    @classmethod
    def of(cls, entry: Entry, peak_flops: float) -> "Result":
        """The result of an entry on a device with this peak, in FLOP/s."""
        # None, not 0: a rate that does not exist must not look like a slow one.
        tokens_per_sec = flops_per_sec = share_of_peak = None
        if entry.tokens is not None:
            tokens_per_sec = entry.tokens / entry.median
        if entry.flops is not None:
            flops_per_sec = entry.flops / entry.median
            share_of_peak = flops_per_sec / peak_flops
        return cls(
            name=entry.name,
            n=len(entry.seconds),
            seconds=entry.median,
            fastest=min(entry.seconds),
            slowest=max(entry.seconds),
            tokens_per_sec=tokens_per_sec,
            flops_per_sec=flops_per_sec,
            share_of_peak=share_of_peak,
            peak_memory_bytes=entry.memory_bytes,
            note=entry.note,
            predicted_seconds=entry.predicted_seconds,
            predicted_bytes=entry.predicted_bytes,
        )


@dataclass(frozen=True)
class Earlier:
    """An earlier run's median seconds by name, and its settings."""

    seconds: dict[str, float]
    settings: dict[str, Any]

    def setting(self, name: str) -> Any:
        """One of the settings, also where the file was written before the setting existed."""
        return self.settings.get(name, NOT_IN_OLD_FILES.get(name))


def read_results(path: str) -> Earlier:
    """The JSON of an earlier run. Raises UsageError."""
    content = read_json(Path(path), "results of nanochat bench")
    try:
        # Only these are needed, so files of versions with other figures can be compared with too.
        seconds = {entry["name"]: entry["seconds"] for entry in content["results"]}
        if not all(value > 0 for value in seconds.values()):
            raise ValueError("a time that is not positive")
        return Earlier(seconds, dict(content["settings"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"--compare={path}: not a file that nanochat bench wrote; give one from --out"
        ) from error


def result_line(paths: Sequence[str]) -> str:
    """RESULT name=value ...: of each file, which names the values, the speed of a whole step, or
    how far the plan was off at worst, relative to what was measured.

    Raises UsageError for a file that nanochat bench did not write, or with neither."""
    words = []
    for path in paths:
        content = read_json(Path(path), "results of nanochat bench")
        name = Path(path).stem
        try:
            planned = [entry for entry in content["results"] if entry.get("predicted_seconds")]
            if planned:
                time = max(abs(e["predicted_seconds"] / e["seconds"] - 1) for e in planned)
                memory = max(
                    abs(e["predicted_bytes"] / e["peak_memory_bytes"] - 1) for e in planned
                )
                words += [f"{name}_time_off={time:.3f}", f"{name}_memory_off={memory:.3f}"]
                continue
            step = next(entry for entry in content["results"] if entry["name"] == "step")
            speed, share = step["tokens_per_sec"], step["share_of_peak"]
            words += [f"{name}_tok_per_sec={speed:.0f}", f"{name}_share_of_peak={share:.3f}"]
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise UsageError(
                f"--result {path}: holds no time of a step; give a file from nanochat bench --out, "
                f"timed with the part step or plan"
            ) from error
    return " ".join(["RESULT", *words])


def differences(settings: dict[str, Any], earlier: Earlier) -> str:
    """A sentence about the settings in which an earlier run differs; empty if there are none."""
    # Only settings of this version: ones that it has dropped say nothing about its own run.
    differing = [name for name in settings if settings[name] != earlier.setting(name)]
    if not differing:
        return ""
    listed = (f"{name} {earlier.setting(name)} (now {settings[name]})" for name in differing)
    return f"not comparable: the earlier run had other settings: {', '.join(listed)}"


def line(result: Result, earlier: Earlier | None) -> str:
    """A result as a line of the table, with an earlier run beside it if there is one."""
    spread = f"({short_time(result.fastest)} to {short_time(result.slowest)}, n = {result.n})"
    tokens = flops = memory = ""
    if result.tokens_per_sec is not None:
        tokens = f"{result.tokens_per_sec:,.0f} tokens/s"
    if result.flops_per_sec is not None:
        flops = f"{result.flops_per_sec / 1e12:.3f} TFLOP/s {result.share_of_peak:>4.0%}"
    if result.peak_memory_bytes:
        memory = human_bytes(result.peak_memory_bytes)
    # Fixed widths and empty cells, so that the lines of a long run form columns as they appear.
    cells = [
        f"{result.name:<28}",
        f"{short_time(result.seconds):>8}",
        f"{spread:<32}",
        f"{tokens:>21}",
        f"{flops:>20}",
        f"{memory:>10}",
        result.note,
    ]
    # A part may be new, or may not have been asked for in the earlier run.
    if earlier is not None:
        before = earlier.seconds.get(result.name)
        if before is None:
            cells.append("not measured before")
        else:
            cells.append(f"{before / result.seconds:.2f} times as fast as before")
    return "  ".join(cells).rstrip()
