"""Trains the runs of a sweep, one process of train.py after another.

A run is held by a lock while it is trained, so that several sweeps can share a folder. The lock
file is inherited by the training process: it holds the run even if the sweep is killed."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from nanochat import locks
from nanochat.apps.sweep.facts import FAILURE, read_facts
from nanochat.apps.sweep.settings import Settings
from nanochat.common import (
    EXIT_STOPPED,
    UsageError,
    human_time,
    python_command,
    read_json,
    write_json,
)
from nanochat.run import flags
from nanochat.run.checks import check_flags
from nanochat.run.folder import status_of

# what the sweep itself gives to every run
NOT_YOURS = {
    "out_dir",
    "model_tag",
    "resume",
    "resume_from_step",
    "overwrite",
    "dry_run",
    "json",
    "gpus",
    "gpu",
    "gpu_network",
    "gpu_price",
}
# a run's last words, in characters, where it left no summary
LAST_WORDS = 300


@dataclass(frozen=True)
class Run:
    """One line: name (such as d4, or 1e18/d4), the flags of this run alone, its run folder, and all
    flags of its train.py."""

    name: str
    flags: list[str]
    path: Path
    argv: list[str]


class Stop:
    """Signals that ask to stop. They are passed on to the training process, which saves and ends.

    It gets SIGTERM whatever came: Ctrl-C reaches it from the terminal too, and a second SIGINT
    would end it without saving."""

    def __init__(self) -> None:
        self.asked = False
        self.child: subprocess.Popen | None = None

    def listen(self) -> None:
        """From now on the signals come here."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup ignores SIGHUP, and so does what it starts
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self.asked = True
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)

    def call(self, command: Sequence[str], log: IO[bytes], keep_open: BinaryIO) -> int:
        """Run a command with its output in `log`; returns its exit code.

        keep_open: a file that the command inherits, with its lock."""
        self.child = subprocess.Popen(
            command,
            # standard input holds the lines of the sweep, which a run must not read
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[keep_open.fileno()],
        )
        # the signal may have come before there was a process to pass it on to
        if self.asked:
            self.child.send_signal(signal.SIGTERM)
        try:
            return self.child.wait()
        finally:
            self.child = None


# ---- lines ----


def parse_lines(text: str, folder: Path, common: Sequence[str]) -> list[Run]:
    """The Runs of lines "NAME: FLAGS". UsageError for other lines, and for a repeated name."""
    runs: list[Run] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"((?:\w[\w.+-]*/)?\w[\w.+-]*)\s*:(.*)", line)
        if not match:
            raise UsageError(
                f"{line!r} is not a run; write NAME: FLAGS, with letters, digits and . _ + - in "
                f"the name"
            )
        try:
            words = shlex.split(match[2])
        except ValueError as error:
            raise UsageError(f"{line!r} is not a run: {error}; close the quotation") from None
        runs.append(make_run(folder, match[1], words, common))
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"two runs of the same name: {', '.join(sorted(twice))}")
    if not runs:
        raise UsageError("no runs to train; give a line NAME: FLAGS for each on standard input")
    return runs


def make_run(folder: Path, name: str, words: list[str], common: Sequence[str]) -> Run:
    """A run of these flags, besides the common ones, in a folder of its name."""
    path = folder / name
    own = [f"--out-dir={path.parent}", f"--model-tag={path.name}", "--resume"]
    return Run(name, words, path, [*common, *words, *own])


def check(kind: str, runs: Iterable[Run], given: Sequence[str]) -> None:
    """UsageError for flags that the sweep sets itself, flags that train.py refuses, and folders
    whose runs were started with other flags. given: the user's flags for every run.

    Ends the process with exit code 2 for a flag that does not exist, as train.py does."""
    yours = flags.parse(given).given
    problems = []
    if wrong := yours & NOT_YOURS:
        problems.append(
            f"{_names(wrong)}: the sweep sets this itself; the folder of its runs is FOLDER, or "
            f"OUT=... of a script"
        )
    if kind == "scaling_laws" and (wrong := yours & set(flags.HORIZONS)):
        problems.append(f"{_names(wrong)}: the horizon of a run is its budget; give BUDGETS=...")
    for run in runs:
        problems += [f"{run.name}: {problem}" for problem in _run_problems(kind, run, yours)]
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))


def _run_problems(kind: str, run: Run, yours: set[str]) -> list[str]:
    """What is wrong with one run."""
    # all flags together, as train.py will see them
    args = flags.parse(run.argv)
    problems = check_flags(args)
    own = flags.parse(run.flags).given
    if own & NOT_YOURS:
        problems.append(f"{_names(own & NOT_YOURS)}: the sweep sets this itself")
    # a variant or a change may change what the others have, except for the seed
    varied = {"seed"} if kind in ("ablation", "try") else own
    if wrong := own & yours & varied:
        problems.append(f"{_names(wrong)}: the sweep varies this; leave it out")
    if (run.path / "config.json").exists() and (differing := differences(run, args)):
        problems.append(
            f"{run.path} was started with other flags ({', '.join(differing)}); give those, "
            f"choose another OUT=..., or delete it"
        )
    return problems


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(flags.flag, sorted(names)))


def differences(run: Run, args: argparse.Namespace) -> list[str]:
    """The flags with another value in a run's config.json than now, among those that decide what
    it becomes."""
    config = read_json(run.path / "config.json", "run folder")
    # what a run takes over from its source or its parent is in config.json without being given
    takes_over = bool(args.init_from) or "forked_from" in config
    return [
        f"{flags.flag(name)}={value}, now {getattr(args, name)}"
        for name, value in config["args"].items()
        if _decides(name)
        and getattr(args, name, None) != value
        and not (takes_over and name not in args.given)
    ]


def _decides(name: str) -> bool:
    """Whether runs of a sweep have to agree in a flag: text may move elsewhere in one run, but not
    between the runs that are compared."""
    if name in ("data", "val_data") or name not in flags.FLAGS:
        return True
    return flags.FLAGS[name].on_resume not in (flags.FREE, flags.START)


# ---- training ----


def command(run: Run, train_py: Path, processes: int) -> list[str]:
    """The command line that trains a run."""
    return python_command(train_py, run.argv, processes)


def train_all(
    runs: Sequence[Run],
    settings: Settings,
    to_retry: Mapping[str, float],
    stop: Stop,
    before: Callable[[], None] | None = None,
) -> None:
    """Train what is left of the runs, in order.

    Returns when all of them ended, in this process or another, or when asked to stop. to_retry:
    {name: failed_at} of failed runs to start again. before: called with a run held, before it is
    trained."""
    waiting = False
    left = list(runs)
    while left and not stop.asked:
        held = []
        for run in left:
            if stop.asked:
                return
            if not attend(run, settings, to_retry, stop, before):
                held.append(run)
        if held and not stop.asked:
            if not waiting:
                names = ", ".join(run.name for run in held)
                print(f"waiting for {names}, held by another process", flush=True)
            time.sleep(settings.pause)
        waiting = bool(held)
        left = held


def attend(
    run: Run,
    settings: Settings,
    to_retry: Mapping[str, float],
    stop: Stop,
    before: Callable[[], None] | None = None,
) -> bool:
    """Train one run to its end if it needs training. Returns False if another process holds it."""
    run.path.mkdir(parents=True, exist_ok=True)
    with locks.open_lock(run.path / ".sweep.lock") as lock:
        if locks.take(lock, run.path) is locks.Lock.HELD_ELSEWHERE:
            return False
        if before:
            before()
        facts = read_facts(run.path)
        # started by hand, or by a sweep that was killed
        if facts.status == "running":
            return False
        # an equal time: nobody has retried it since this sweep began
        if facts.status == "failed" and to_retry.get(run.name) != facts.failed_at:
            print(f"{run.name}: failed earlier ({facts.reason}); RETRY=1 tries again", flush=True)
        elif not facts.completed:
            _train(run, facts.status, settings, stop, lock)
        return True


def _train(run: Run, was: str, settings: Settings, stop: Stop, lock: BinaryIO) -> None:
    """Start train.py and wait. A failure is noted in the run's folder, a stop in `stop`."""
    log_path = run.path / "train.log"
    (run.path / FAILURE).unlink(missing_ok=True)
    before = _version(run.path / "summary.json")
    began = time.monotonic()
    resumed = "" if was == "not started" else f", which was {was}"
    print(f"{run.name}: training{resumed}; {log_path}", flush=True)
    # appended: a resumed run continues its log
    with open(log_path, "ab") as log:
        start = log.tell()
        code = stop.call(command(run, settings.train_py, settings.processes), log, lock)
    written = _version(run.path / "summary.json") != before
    status = status_of(run.path) if written else None
    # torchrun ends with 1 whatever its workers end with, so there the summary decides
    stopped = settings.processes > 1 and code != 0 and status == "stopped"
    stop.asked = stop.asked or code == EXIT_STOPPED or stopped
    # the run's own word comes first, its exit code second
    facts = read_facts(run.path)
    took = human_time(time.monotonic() - began)
    if code == 0 and facts.completed:
        bpb = "" if facts.val_bpb is None else f", val_bpb {facts.val_bpb:.4f}"
        print(f"{run.name}: completed in {took}{bpb}", flush=True)
    elif not stop.asked:
        reason = facts.reason if status == "failed" else _last_words(log_path, start)
        reason = reason or f"exit code {code}"
        # a process that a signal ended has no last words of its own, so its log would mislead
        if code < 0:
            reason = f"ended by signal {-code}"
        write_json(run.path / FAILURE, {"reason": reason, "exit_code": code, "at": time.time()})
        print(f"{run.name}: FAILED after {took}: {reason}", flush=True)


def _version(path: Path) -> tuple[int, int] | None:
    """What tells one version of a file that is replaced as a whole from the next."""
    if not path.exists():
        return None
    stat = os.stat(path)
    return stat.st_ino, stat.st_mtime_ns


def _last_words(path: Path, start: int) -> str:
    """What train.py printed last in its log from byte `start` on, for people to read."""
    with open(path, "rb") as log:
        log.seek(start)
        text = log.read().decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    # an error message begins with the program's name and may continue on the next lines
    messages = [i for i, line in enumerate(lines) if line.startswith("train.py:")]
    at = max(messages, default=len(lines) - 1)
    return " ".join(lines[max(at, 0) :][:3])[:LAST_WORDS]
