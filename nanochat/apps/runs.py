"""`nanochat runs [FOLDER ...]`: the runs under a folder, one line each. Only reads, and imports no torch."""

import argparse
import fcntl
import json
import math
import os
import re
import time
from pathlib import Path

from nanochat.common import EXIT_COMPLETED, UsageError, human_time, printable, read_json
from nanochat.run.log import RunFolder

LEVELS = 2  # folders below FOLDER that are looked into: FOLDER/d4 and FOLDER/sweep/d4
TAIL_BYTES = 1 << 16  # of metrics.jsonl, of which the last whole line is wanted
# --sort: key of a run's dict; what has no value comes last
SORTS = {
    "name": lambda run: [
        (1, int(part), "") if part.isdigit() else (0, 0, part)
        for part in re.split(r"(\d+)", run["name"])
    ],
    "val_bpb": lambda run: _or_last(run["val_bpb"]),
    "time": lambda run: _or_last(run["total_training_time"], -1),
    "core": lambda run: _or_last(run["core_metric"], -1),
    "updated": lambda run: -run["updated"],
}
DAMAGES = (
    UsageError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)  # what a file of any content can cause


def main(argv):
    """Print the runs. Returns 0; UsageError if a folder does not exist or there is no run at all."""
    parser = argparse.ArgumentParser(
        prog="nanochat runs",
        allow_abbrev=False,
        description="List runs, one a line. A run whose process is gone without a word is shown as died; --resume goes on with it.",
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        default=["out"],
        help=f"run folders, or folders with runs up to {LEVELS} levels below (default: out)",
    )
    parser.add_argument(
        "--sort",
        default="name",
        choices=list(SORTS),
        help="val_bpb: lowest first; time: longest; core: highest; updated: latest (default %(default)s)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: {runs: [...], problems: [...]}, nothing rounded",
    )
    args = parser.parse_args(argv)
    for folder in args.folders:
        if not Path(folder).is_dir():
            raise UsageError(f"{folder}: no such folder; name the --out-dir of your runs")
    runs, problems = [], []
    for folder in dict.fromkeys(os.path.normpath(folder) for folder in args.folders):
        shown_from = folder if len(args.folders) == 1 else ""
        for path in find(Path(folder), LEVELS, problems):
            try:
                runs.append({"name": _name(path, shown_from), **describe(path)})
            except DAMAGES as error:
                problems.append(f"{path}: damaged run ({_reason(error)})")
    runs = list({run["path"]: run for run in runs}.values())
    runs.sort(key=SORTS["name"])
    runs.sort(key=SORTS[args.sort])
    if args.json:
        print(json.dumps({"runs": runs, "problems": problems}, indent=2))
    else:
        if runs:
            print(printable(table(runs)))
        for problem in problems:
            print(printable(problem))
    if not runs:
        raise UsageError(f"no runs in {', '.join(args.folders)}; name the --out-dir of your runs")
    return EXIT_COMPLETED


def find(folder, levels, problems):
    """Yield run folders in and below a folder; what looks like one and is not becomes a line in `problems`."""
    try:
        run = RunFolder(folder)
        if run.holds_run():
            yield folder
            return
        if left := run.remains():
            problems.append(f"{folder}: no run (it holds {', '.join(left)}, but no config.json)")
            return
        below = sorted(
            path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()
        )
    except DAMAGES as error:
        problems.append(f"{folder}: no run ({_reason(error)})")
        return
    if levels:
        for path in below:
            yield from find(path, levels - 1, problems)


def describe(path):
    """One run's facts as a dict; null where there is none (yet). Raises one of DAMAGES for unreadable files."""
    config = RunFolder(path).read_config()
    summary_path = path / "summary.json"
    summary = (
        read_json(summary_path, "run folder") if summary_path.exists() else {"status": "running"}
    )
    at = {name: summary.get(name) for name in ("step", "tokens", "total_training_time")}
    if (newest := last_line(path / "metrics.jsonl")) and newest["step"] > (
        at["step"] or 0
    ):  # the summary waits for evaluations
        at = {name: newest.get(name) for name in at}
    status = summary["status"]
    if status == "running" and not is_held(path / ".lock"):
        status = "died"
    seconds, tokens = at["total_training_time"], at["tokens"]
    # what `nanochat export --format run` made was never planned
    plan = (
        {"parameters": {"total": None}, "num_iterations": None}
        if "imported_from" in config
        else config["plan"]
    )
    numbers = (
        *at.values(),
        config["args"]["depth"],
        plan["parameters"]["total"],
        plan["num_iterations"],
        *(summary.get(name) for name in ("val_bpb", "min_val_bpb", "core_metric")),
    )
    if not all(value is None or isinstance(value, int | float) for value in numbers):
        raise ValueError("a number in config.json or summary.json is none")
    files = [
        path / name
        for name in ("config.json", "metrics.jsonl", "summary.json")
        if (path / name).exists()
    ]
    return {
        "path": str(path),
        "status": status,
        "reason": summary.get("reason") or "",
        "depth": config["args"]["depth"],
        "parameters": plan["parameters"]["total"],
        **at,
        "steps": plan["num_iterations"],
        "tok_per_sec": tokens / seconds if tokens and seconds else None,
        "val_bpb": summary.get("val_bpb"),
        "min_val_bpb": summary.get("min_val_bpb"),
        "core_metric": summary.get("core_metric"),
        "updated": max(file.stat().st_mtime for file in files),
    }


def is_held(path):
    """Whether a process holds this lock. Asked with a shared lock, for an instant; the file is neither made nor changed."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def last_line(path):
    """The last whole line of a .jsonl file as a dict, or None. Reads the end of the file only."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        for line in reversed(file.read().split(b"\n")):
            try:
                if isinstance(value := json.loads(line), dict) and isinstance(
                    value.get("step"), int
                ):
                    return value
            except ValueError:
                pass  # torn, or empty
    return None


def table(runs):
    """Runs as aligned columns under a heading."""
    heading = (
        "run",
        "status",
        "depth",
        "params",
        "step",
        "tokens",
        "time",
        "tok/s",
        "val_bpb",
        "best",
        "CORE",
        "updated",
    )
    rows = [
        (
            run["name"],
            run["status"],
            str(run["depth"]),
            short(run["parameters"]),
            f"{run['step'] or 0}/{run['steps'] or '?'}",
            short(run["tokens"]),
            "-" if run["total_training_time"] is None else human_time(run["total_training_time"]),
            short(run["tok_per_sec"]),
            fixed(run["val_bpb"]),
            fixed(run["min_val_bpb"]),
            fixed(run["core_metric"]),
            _ago(time.time() - run["updated"]),
        )
        for run in runs
    ]
    return aligned([heading, *rows], left=2)


def _name(path, folder):
    """A run's path below the folder it was found in; a run that was named itself keeps its own name."""
    return (
        path.name or str(path)
        if str(path) == folder
        else os.path.relpath(path, folder)
        if folder
        else str(path)
    )


def _reason(error):
    return f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def _or_last(value, sign=1):
    return math.inf if value is None else sign * value


def short(number):
    """12345678 -> '12.3M'; '-' for None."""
    if number is None:
        return "-"
    for unit in ("", "k", "M", "B"):
        if number < 999.5 or unit == "B":
            return (
                f"{number:.0f}"
                if unit == ""
                else f"{number:.3g}{unit}"
                if number < 999.5
                else f"{number:,.0f}{unit}"
            )
        number /= 1000


def _ago(seconds):
    return human_time(seconds) + " ago" if seconds >= 60 else "just now"


def fixed(number, digits=4, sign=""):
    """1.23456 -> '1.2346'; '-' for None. sign: "+" shows it of positive numbers too."""
    return "-" if number is None else f"{number:{sign}.{digits}f}"


def aligned(rows, left=1):
    """Rows of strings as aligned lines: the first `left` columns to the left, the others to the right, None as '-'."""
    rows = [["-" if cell is None else cell for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
