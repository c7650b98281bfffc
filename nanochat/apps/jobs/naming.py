"""Which run a RUN argument names: a tag, or a path."""

import os
from pathlib import Path

from nanochat.apps.jobs.state import Place, announced, holds_run, place_of
from nanochat.common import UsageError
from nanochat.run.folder import run_argument
from nanochat.run.registry import Job

RUN_HELP = "tag of a run of yours, or path of its folder"


def named(text: str) -> Place:
    """The run that an argument names. UsageError if there is none, or more than one.

    A word without a slash is a tag: the name of a run in the registry, or of a run folder here
    or else in train.py's default --out-dir."""
    # a variable of a script that was not set must not mean the run here
    if not text:
        raise UsageError("RUN is empty; give a tag, or the path of a run folder")
    jobs = announced()
    if os.sep in text or text in (os.curdir, os.pardir):
        place = place_of(Path(text), jobs)
        if place.job or holds_run(place.path):
            return place
        raise UsageError(f"{text}: {_why_no_run(place.path)}")
    here = Path(text)
    folders = [path for path in jobs if path.name == text and _is_known(path, jobs)]
    # ./d4 is the same folder as d4 in the registry
    if holds_run(here) and here.resolve() not in folders:
        folders.append(here.resolve())
    by_tag = Path(run_argument(text))
    if not folders and by_tag != here and holds_run(by_tag):
        folders.append(by_tag.resolve())
    if not folders:
        raise UsageError(
            f"{text}: no run of yours has this tag; `nanochat jobs list` shows those that train or "
            f"have trained lately, all others are named by their path, such as out/{text}"
        )
    if len(folders) > 1:
        listed = "\n".join(f"  {folder}" for folder in folders)
        raise UsageError(f"{text}: {len(folders)} runs have this tag; give the path\n{listed}")
    return place_of(folders[0], jobs)


def _is_known(path: Path, jobs: dict[Path, Job]) -> bool:
    """Whether there is anything left of a run in the registry: a process, or a folder."""
    return jobs[path].leader.exists() is not False or holds_run(path)


def _why_no_run(path: Path) -> str:
    """What to do about a path that holds no run."""
    if not path.is_dir():
        return "no such folder; name a run folder, for example out/d4, or a tag"
    # the most common mistake is to name --out-dir instead of a run in it
    try:
        below = sorted(child.name for child in path.iterdir() if holds_run(child))
    except OSError as error:
        return f"cannot be read ({error.strerror}); ask its owner, or name another run folder"
    if below:
        return f"holds no run; the folders in it do: {', '.join(below[:5])}"
    return "holds no run; name a run folder, for example out/d4, or a tag"
