"""What is known of a run now: from its process, if it has one, from its records otherwise."""

import os
import pwd
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.apps.jobs.asking import Message, shown, status_of
from nanochat.common import printable
from nanochat.run.folder import RunFolder, steps_of
from nanochat.run.metrics import parsed
from nanochat.run.records import DAMAGES, TAIL_BYTES, finite_number, read_summary, reason_of
from nanochat.run.registry import JOB_FILE, Job, entries, read_job

# statuses of runs that may still change, those that a run writes down at its end, and all
ALIVE = ("running", "paused", "elsewhere")
OVER = ("completed", "stopped", "failed")
STATUSES = (*ALIVE, *OVER, "killed", "ended")
# for an answer about the status
ANSWER_SECONDS = 2.0
# what reading a folder with arbitrary content can raise; deep brackets exhaust the parser
TROUBLES = (*DAMAGES, RecursionError)


@dataclass(frozen=True)
class Run:
    """A run as it is now; numbers are None where they are not known.

    status: one of STATUSES; killed: its process is gone without a word; elsewhere: on another
    machine or in another container; ended: before it had a run folder. reason: why it ended.
    doing: at the moment. steps: as planned. loss: the latest, of the last step or smoothed over
    the last ones. checkpoint: the newest that is saved. host, pid, ranks: of the latest start.
    answers: whether its process has just told all this itself. updated: when the run last wrote
    something, in seconds since 1970."""

    tag: str
    path: str
    status: str
    reason: str = ""
    doing: str = ""
    depth: float | None = None
    step: float | None = None
    steps: float | None = None
    loss: float | None = None
    val_bpb: float | None = None
    tok_per_sec: float | None = None
    eta_seconds: float | None = None
    checkpoint: float | None = None
    host: str = ""
    pid: int | None = None
    ranks: int | None = None
    answers: bool = False
    updated: float | None = None

    def as_json(self) -> dict[str, Any]:
        """What --json prints of it."""
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """Where a run is: its folder, and the latest start that was announced, None if none is known.

    owner: another user who trains there, "" if there is none."""

    path: Path
    job: Job | None = None
    owner: str = ""

    @property
    def tag(self) -> str:
        """The name of the folder."""
        return self.path.name


# ----- where runs are


def announced() -> dict[Path, Job]:
    """{run folder: its latest start} of this user's registry, the newest start last."""
    found: dict[Path, Job] = {}
    for entry in entries():
        path = Path(entry.job.path)
        # so that the latest start also decides the order
        found.pop(path, None)
        found[path] = entry.job
    return found


def place_of(folder: Path, jobs: dict[Path, Job]) -> Place:
    """Where the run of a folder is. jobs: of announced()."""
    path = folder.resolve()
    candidates = [jobs[path]] if path in jobs else []
    in_folder = read_job(path / JOB_FILE)
    # a copy of a run folder names the folder that it was copied from
    if in_folder and Path(in_folder.path) == path:
        candidates.append(in_folder)
    if not candidates:
        return Place(path, owner=_other_owner(path / JOB_FILE))
    return Place(path, max(candidates, key=lambda job: job.began))


def _other_owner(file: Path) -> str:
    """The name of the user who wrote a file, "" if it is this one, or if there is no file."""
    try:
        user = file.stat().st_uid
    except OSError:
        return ""
    if user == os.geteuid():
        return ""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def holds_run(path: Path) -> bool:
    """Whether a folder is that of a run, or of one that is damaged."""
    try:
        return RunFolder(path).holds_run() or bool(RunFolder(path).remains())
    except TROUBLES:
        return False


# ----- how it is


def look(place: Place, seconds: float = ANSWER_SECONDS) -> Run:
    """The state of a run. seconds: how long to wait for an answer of its process."""
    exists = place.job.leader.exists() if place.job else None
    run = _as_recorded(place, exists)
    if place.job:
        leader = place.job.leader
        run = replace(run, host=shown(leader.host), pid=leader.pid, ranks=len(place.job.processes))
    if exists:
        answer = status_of(place.job.socket, seconds)
        # too many ask at the same time
        if answer and "error" not in answer:
            return _as_told(run, answer)
    return run


def _as_recorded(place: Place, exists: bool | None) -> Run:
    """The state that a run's files tell. exists: whether its process does, None if that is not
    known."""
    run = Run(printable(place.tag), printable(str(place.path)), _status(place, exists, None))
    if not (place.path / "config.json").exists():
        updated = place.job.began if place.job else None
        return replace(run, doing="setting up" if exists else "", updated=updated)
    try:
        summary = read_summary(place.path)
        loss = _latest_loss(place.path / "metrics.jsonl")
    except TROUBLES as error:
        return replace(run, reason=shown(f"damaged run ({reason_of(error)})"))
    status = _status(place, exists, summary.status)
    step, steps, seconds = (
        finite_number(value) for value in (summary.step, summary.steps, summary.total_training_time)
    )
    left = None
    if status in ALIVE and step and None not in (steps, seconds):
        left = finite_number(max(0, steps - step) / step * seconds)
    return replace(
        run,
        status=status,
        # a run that has been resumed has the reason of the start before for a while
        reason="" if status in ALIVE else shown(summary.reason),
        depth=finite_number(summary.depth),
        step=step,
        steps=steps,
        loss=loss,
        val_bpb=finite_number(summary.val_bpb),
        tok_per_sec=finite_number(summary.tok_per_sec),
        eta_seconds=left,
        # newer than the summary's, after an end that nobody wrote down
        checkpoint=max(steps_of(place.path), default=None),
        updated=summary.updated,
    )


def _latest_loss(path: Path) -> float | None:
    """The loss of the latest step in the end of metrics.jsonl: evaluations have lines too."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        tail = file.read().decode("utf-8", errors="replace").split("\n")
    values = (parsed(line) for line in reversed(tail))
    losses = (finite_number(line.get("train/loss")) for line in values if line)
    return next((loss for loss in losses if loss is not None), None)


def _status(place: Place, exists: bool | None, recorded: str | None) -> str:
    """One of STATUSES. recorded: what records.read_summary() says, None without a run folder."""
    if exists:
        return "running"
    if recorded in OVER:
        return recorded
    if place.job and exists is None:
        return "elsewhere"
    if recorded is None:
        return "ended"
    # a process that was not announced may hold the folder's lock
    return "running" if recorded == "running" else "killed"


def _as_told(run: Run, answer: Message) -> Run:
    """The state that a run's process tells, and what its files know besides."""
    numbers = {
        "depth": "depth",
        "step": "step",
        "num_iterations": "steps",
        "loss": "loss",
        "val_bpb": "val_bpb",
        "tok_per_sec": "tok_per_sec",
        "eta_seconds": "eta_seconds",
        "checkpoint": "checkpoint",
    }
    # in the set-up it tells none of these
    told = {ours: finite_number(answer[name]) for name, ours in numbers.items() if name in answer}
    status = "paused" if answer.get("status") == "paused" else "running"
    doing = shown(answer.get("doing", ""))
    return replace(run, status=status, doing=doing, answers=True, updated=time.time(), **told)
