"""`nanochat jobs list` and `status`: what runs there are, and how they are."""

import json
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat.apps.jobs.naming import named
from nanochat.apps.jobs.state import ALIVE, Place, Run, announced, look, place_of
from nanochat.common import EXIT_COMPLETED, human_time, printable
from nanochat.run.records import find
from nanochat.run.registry import Job
from nanochat.run.tables import aligned, fixed, short

# folders below an --out-dir that are searched, as `nanochat runs` does
LEVELS = 2
# runs that are asked at the same time: one that hangs keeps the others waiting for seconds
MOST_ASKED = 16
# after its last word, in which a run counts as recent
RECENT_SECONDS = 7 * 24 * 3600.0


def list_runs(args: Namespace) -> int:
    """Print the runs of the registry, or of the places that are named."""
    problems: list[str] = []
    named_places = [*args.runs, *args.out_dir]
    jobs = announced()
    if named_places:
        places = _places(named_places, jobs, problems)
    else:
        places = [place_of(path, jobs) for path in jobs]
    with ThreadPoolExecutor(MOST_ASKED) as pool:
        runs = list(pool.map(look, places))
    if not named_places and not args.all:
        runs = [run for run in runs if is_recent(run, time.time())]
    # those that train first, then the latest
    runs.sort(key=lambda run: (run.status not in ALIVE, -(run.updated or 0)))
    if args.json:
        shown = {"runs": [run.as_json() for run in runs], "problems": problems}
        print(json.dumps(shown, indent=2))
        return EXIT_COMPLETED
    if runs:
        print(table(runs))
    for problem in problems:
        print(printable(problem))
    if not runs and not problems:
        older = "" if args.all or named_places else "; --all lists older ones too"
        print(f"no runs{older}; runs of a folder: nanochat jobs list FOLDER")
    return EXIT_COMPLETED


def _places(texts: Sequence[str], jobs: dict[Path, Job], problems: list[str]) -> list[Place]:
    """The runs that arguments name: tags, run folders, or folders of runs; each once."""
    found: dict[Path, Place] = {}
    for text in texts:
        if Path(text).is_dir():
            places = [place_of(path, jobs) for path in find(Path(text), LEVELS, problems)]
        else:
            places = [named(text)]
        found |= {place.path: place for place in places}
    return list(found.values())


def is_recent(run: Run, now: float) -> bool:
    """Whether a run trains, or has done so lately and left a folder."""
    if run.status in ALIVE:
        return True
    # one without a folder left nothing that could be shown
    return run.status != "ended" and run.updated is not None and now - run.updated < RECENT_SECONDS


def table(runs: Sequence[Run]) -> str:
    """Runs as aligned columns under a heading."""
    rows = [["run", "folder", "status", "depth", "step", "loss", "tok/s", "eta"]]
    for run in runs:
        rows.append(
            [
                run.tag,
                folder_in_words(run.path),
                run.status,
                number(run.depth),
                progress(run),
                fixed(run.loss, 3),
                short(run.tok_per_sec),
                "-" if run.eta_seconds is None else human_time(run.eta_seconds),
            ]
        )
    return aligned(rows, left=3)


def folder_in_words(path: str) -> str:
    """The path of a run from here, or from the home folder where that is shorter."""
    here = os.path.relpath(path)
    home = os.path.expanduser("~")
    below_home = path
    if path.startswith(home + os.sep):
        below_home = "~" + path[len(home) :]
    return min((here, below_home), key=len)


def progress(run: Run) -> str:
    """`12/100`, with a question mark for what is not known."""
    return f"{number(run.step, '?')}/{number(run.steps, '?')}"


def number(value: float | None, unknown: str = "-") -> str:
    """A whole number as it is shown."""
    return unknown if value is None else f"{value:,.0f}"


# ----- one run


def show_status(args: Namespace) -> int:
    """Print everything that is known of a run now."""
    place = named(args.run)
    run = look(place)
    if args.json:
        print(json.dumps(run.as_json(), indent=2))
    else:
        print(in_words(run, place, time.time()))
    return EXIT_COMPLETED


def in_words(run: Run, place: Place, now: float) -> str:
    """A run in a few lines."""
    status = f"{run.status}, {run.reason}" if run.reason else run.status
    lines = [f"{run.tag}: {status}", f"  folder      {run.path}"]
    step = progress(run).replace("/", " of ")
    if run.step is not None and run.steps:
        step += f" ({run.step / run.steps:.0%})"
    if run.eta_seconds is not None:
        step += f", eta {human_time(run.eta_seconds)}"
    lines.append(f"  step        {step}, depth {number(run.depth)}")
    if run.doing:
        lines.append(f"  doing       {run.doing}")
    lines.append(f"  loss        {fixed(run.loss)}, val_bpb {fixed(run.val_bpb)}")
    lines.append(f"  tokens/s    {short(run.tok_per_sec)}")
    lines.append(f"  checkpoint  {number(run.checkpoint, 'none')}")
    if place.job and run.status in ALIVE:
        ranks = f", {run.ranks} ranks" if run.ranks != 1 else ""
        since = human_time(max(0.0, now - place.job.began))
        lines.append(f"  process     {run.pid} on {run.host}{ranks}, for {since}")
    if place.job and run.status in ("running", "paused") and not run.answers:
        lines.append("  its process does not answer; this is what its files tell")
    if place.owner:
        lines.append(f"  it belongs to {place.owner}")
    return "\n".join(lines)
