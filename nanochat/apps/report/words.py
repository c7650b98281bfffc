"""What a run came to: a few rows for people, JSON and one line for programs."""

from typing import Any

from nanochat.common import human_bytes, human_time
from nanochat.run.records import RunRecord


def summary_rows(run: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of what a run came to."""
    reason = f" ({run.reason})" if run.reason else ""
    # the steps of a time budget are not known before its speed has been measured
    planned = "?" if run.steps is None else f"{run.steps:,}"
    rows = [
        ("status", run.status + reason),
        ("steps", f"{run.step or 0:,} of {planned}, {run.tokens or 0:,} tokens"),
        ("training time", _time_and_speed(run)),
        ("val_bpb", _bpb_and_best(run)),
    ]
    # the newest, with its reason if it has no metric: an older number would be misleading
    if run.cores:
        rows.append(("CORE", run.cores[0].in_words()))
    if compressors := run.compressed_bpb:
        sizes = ", ".join(f"{name} {bits:.3f}" for name, bits in compressors.items())
        rows.append(("compressors on the same text", sizes))
    return rows


def as_json(run: RunRecord) -> dict[str, Any]:
    """The summary as data. What is unknown is None."""
    return {
        "name": run.name,
        "status": run.status,
        "reason": run.reason,
        "step": run.step,
        "steps": run.steps,
        **_numbers(run),
        "min_val_bpb": run.min_val_bpb,
        "peak_memory_bytes": run.peak_memory_bytes,
        "compressed_bpb": run.compressed_bpb,
        "problems": run.problems,
    }


# ---- for programs ----


def result_line(run: RunRecord) -> str:
    """RESULT name=value ...: what a run came to, for programs to read. What is unknown is null."""
    words = [f"{name}={_exact(value)}" for name, value in _numbers(run).items()]
    return " ".join(["RESULT", f"status={run.status}", *words])


def _numbers(run: RunRecord) -> dict[str, int | float | None]:
    """What a run came to, by name."""
    values: dict[str, int | float | None] = {
        name: getattr(run, name)
        for name in (
            "val_bpb",
            "val_loss",
            "tokens",
            "total_training_flops",
            "total_training_time",
            "tok_per_sec",
            "mfu",
        )
    }
    # most runs never measure it
    if run.core is not None:
        values["core"] = run.core.core_metric
        values["core_low"] = run.core.low
        values["core_high"] = run.core.high
    return values


def _exact(value: float | None) -> str:
    """A number for programs: whole numbers as they are, others to six digits; null for None."""
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ---- numbers in words ----


def shown(value: float | None, form: str, before: str = "", after: str = "") -> str:
    """A number in a format, between two texts; nothing at all for None."""
    return "" if value is None else f"{before}{value:{form}}{after}"


def _time_and_speed(run: RunRecord) -> str:
    """Training time, tokens a second, MFU and peak memory, those that are known."""
    time = "none"
    if run.total_training_time is not None:
        time = human_time(run.total_training_time)
    speed = "no steps yet"
    if run.tok_per_sec:
        speed = f"{run.tok_per_sec:,.0f} tokens/s{shown(run.mfu, '.1f', ', ', '% MFU')}"
    memory = ""
    if run.peak_memory_bytes:
        memory = f", peak memory {human_bytes(run.peak_memory_bytes)}"
    return f"{time}, {speed}{memory}"


def _bpb_and_best(run: RunRecord) -> str:
    """The last val_bpb and the lowest."""
    if run.val_bpb is None:
        return "none"
    # both, since a last value above the best one tells of overfitting
    return f"{run.val_bpb:.4f}{shown(run.min_val_bpb, '.4f', ' (best ', ')')}"
