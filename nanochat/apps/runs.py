"""`nanochat runs [FOLDER ...]`: the runs under a folder, one line each. Reads only; no torch."""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat.common import EXIT_COMPLETED, UsageError, human_time, path_argument, printable
from nanochat.run.records import DAMAGES, RunSummary, find, read_summary, reason_of
from nanochat.run.tables import aligned, fixed, short

# folders below FOLDER that are searched: FOLDER/d4 and FOLDER/sweep/d4
LEVELS = 2


@dataclass(frozen=True)
class ListedRun:
    """A run and the name under which it is listed."""

    name: str
    summary: RunSummary

    def as_json(self) -> dict[str, Any]:
        """What --json prints of it."""
        return {"name": self.name, **asdict(self.summary)}


def _by_name(run: ListedRun) -> Any:
    """Numbers in a name count as numbers: d4 comes before d12."""
    # a tuple for each part, since text and numbers cannot be ordered among each other
    parts = re.split(r"(\d+)", run.name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _lowest_first(value: float | None) -> float:
    """A sort key; runs without the value come last."""
    return math.inf if value is None else value


def _highest_first(value: float | None) -> float:
    """A sort key; runs without the value come last."""
    return math.inf if value is None else -value


def _by_bpb(run: ListedRun) -> float:
    return _lowest_first(run.summary.val_bpb)


def _by_time(run: ListedRun) -> float:
    return _highest_first(run.summary.total_training_time)


def _by_core(run: ListedRun) -> float:
    return _highest_first(run.summary.core_metric)


def _by_update(run: ListedRun) -> float:
    return _highest_first(run.summary.updated)


# keys of --sort; what has no value comes last
SORTS: dict[str, Callable[[ListedRun], Any]] = {
    "name": _by_name,
    "val_bpb": _by_bpb,
    "time": _by_time,
    "core": _by_core,
    "updated": _by_update,
}


def main(argv: list[str]) -> int:
    """Print the runs. Returns 0; UsageError if a folder does not exist or holds no run at all."""
    parser = argparse.ArgumentParser(
        prog="nanochat runs",
        allow_abbrev=False,
        description="List runs, one a line. A run whose process ended without writing why is shown "
        "as died; --resume continues it.",
    )
    parser.add_argument(
        "folders",
        type=path_argument,
        metavar="FOLDER",
        nargs="*",
        default=["out"],
        help=f"run folders, or folders with runs up to {LEVELS} levels below (default: out)",
    )
    parser.add_argument(
        "--sort",
        default="name",
        choices=list(SORTS),
        help="val_bpb: lowest first; time: longest; core: highest; updated: latest "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: {runs: [...], problems: [...]}, nothing rounded",
    )
    args = parser.parse_args(argv)
    for folder in args.folders:
        # a misspelled folder would otherwise pass for one without runs
        if not Path(folder).is_dir():
            raise UsageError(f"{folder}: no such folder; name the --out-dir of your runs")
    problems: list[str] = []
    runs = listed(args.folders, problems)
    # the second sort keeps the order of the first among equals
    runs.sort(key=SORTS["name"])
    runs.sort(key=SORTS[args.sort])
    if args.json:
        print(json.dumps({"runs": [run.as_json() for run in runs], "problems": problems}, indent=2))
    else:
        if runs:
            print(printable(table(runs)))
        for problem in problems:
            print(printable(problem))
    # after the problems, which may say why
    if not runs:
        raise UsageError(f"no runs in {', '.join(args.folders)}; name the --out-dir of your runs")
    return EXIT_COMPLETED


def listed(folders: list[str], problems: list[str]) -> list[ListedRun]:
    """The runs in folders, each once; a sentence in `problems` for each that cannot be read."""
    found = {}
    for folder in dict.fromkeys(os.path.normpath(folder) for folder in folders):
        # with several folders only the whole path tells which run is meant
        shown_from = folder if len(folders) == 1 else ""
        for path in find(Path(folder), LEVELS, problems):
            # one damaged run must not hide the others
            try:
                run = ListedRun(_name(path, shown_from), read_summary(path))
                found[run.summary.path] = run
            except DAMAGES as error:
                problems.append(f"{path}: damaged run ({reason_of(error)})")
    return list(found.values())


def table(runs: list[ListedRun]) -> str:
    """Runs as aligned columns under a heading."""
    columns = "run status depth params step tokens time tok/s val_bpb best CORE updated"
    rows = [columns.split()]
    for run in runs:
        summary = run.summary
        seconds = summary.total_training_time
        rows.append(
            [
                run.name,
                summary.status,
                str(summary.depth),
                short(summary.parameters),
                # the steps of a time budget are not known before its speed has been measured
                f"{summary.step or 0}/{summary.steps or '?'}",
                short(summary.tokens),
                "-" if seconds is None else human_time(seconds),
                short(summary.tok_per_sec),
                fixed(summary.val_bpb),
                fixed(summary.min_val_bpb),
                fixed(summary.core_metric),
                _ago(time.time() - summary.updated),
            ]
        )
    return aligned(rows, left=2)


def _name(path: Path, folder: str) -> str:
    """A run's path below the folder it was found in; a run that was itself named keeps its name."""
    if str(path) == folder:
        return path.name or str(path)
    return os.path.relpath(path, folder) if folder else str(path)


def _ago(seconds: float) -> str:
    # a file written by a machine whose clock is ahead has a negative age: just now as well
    return human_time(seconds) + " ago" if seconds >= 60 else "just now"
