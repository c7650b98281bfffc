"""The run folder <out-dir>/<model-tag>/: its config.json and summary.json, and who may write to
it."""

import contextlib
import errno
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from nanochat import locks
from nanochat.common import (
    PARTIAL,
    UsageError,
    can_create,
    delete_folder,
    path_argument,
    read_json,
    write_json,
)
from nanochat.run.flags import FLAGS, listed_steps
from nanochat.run.metrics import finite_or_null, read_lines

FORMAT = 1
# What --overwrite deletes, config.json first: without it the folder holds no run, so that a
# deletion that is interrupted never leaves half of a run that looks whole.
FILES = (
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "core.jsonl",
    "problems.jsonl",
    "summary.json",
    "loss.png",
    "report.html",
    "stages.html",
)
FOLDERS = ("checkpoints", "tokenizer", "wandb", "tensorboard", "profile")
RECORDED_PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "rustbpe")


def run_argument(text: str) -> str:
    """argparse type of a run folder: path_argument(), but a tag that no file here has names the run
    of train.py's default --out-dir, if there is one."""
    path = path_argument(text)
    is_tag = path == os.path.basename(path) and not os.path.lexists(path)
    by_tag = os.path.join(FLAGS["out_dir"].default, path)
    # path is "" for a variable of a script that was not set
    return by_tag if path and is_tag and os.path.exists(f"{by_tag}/config.json") else path


def weights_alone(config: dict[str, Any]) -> str:
    """What a run holds that cannot be trained on, in words: weights that `nanochat export` imported
    or `nanochat average` computed. "" for a run that was trained in its folder."""
    if "imported_from" in config:
        return "imported weights"
    return "averaged weights" if "averaged_from" in config else ""


class RunFolder:
    """The folder of one run, written by rank 0 only."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.lock = None

    @property
    def config_path(self) -> Path:
        """Where config.json is."""
        return self.path / "config.json"

    def holds_run(self) -> bool:
        """True if a run's config.json exists. UsageError if it is another program's."""
        if not self.config_path.exists():
            return False
        config = read_json(self.config_path, "run folder")
        # Another program's config.json may be anything; its folder is never taken over.
        if not isinstance(config, dict) or not {"format", "args"} <= set(config):
            raise UsageError(
                f"run folder: {self.config_path} was not written by nanochat; give another "
                "--model-tag or --out-dir"
            )
        return True

    def remains(self) -> list[str]:
        """Names of the files of a run that exist, config.json left out: what a damaged run left."""
        names = ("metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints")
        return [name for name in names if (self.path / name).exists()]

    def claim(self) -> None:
        """Create the folder and hold it until the process ends. UsageError if it cannot be written
        or another process holds it."""
        # The folder may be read-only, or its parent may be a file.
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # held until the end
            self.lock = locks.open_lock(self.path / ".lock")
            # another user's lock file can be opened although the folder cannot be written
            if not can_create(self.path / "config.json"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise UsageError(
                f"--out-dir: the run folder {self.path} cannot be written ({error.strerror}); "
                "give another --out-dir"
            ) from None
        state = locks.take(self.lock, self.path)
        if state is locks.Lock.HELD_ELSEWHERE:
            raise UsageError(
                f"--model-tag: {self.path} is in use by a training process that is still running; "
                "wait for it, stop it, or give another --model-tag"
            )
        if state is locks.Lock.TAKEN:
            self._delete_partial_files()

    def _delete_partial_files(self) -> None:
        """Delete what write_atomic() left in a process that was killed."""
        for folder in (self.path, self.path / "checkpoints"):
            for path in folder.glob(f".*{PARTIAL}"):
                # checkpoints that were not finished are folders, with a life of their own
                if path.is_file():
                    with contextlib.suppress(OSError):
                        path.unlink()

    def release(self) -> None:
        """Let another process claim the folder."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def read_config(self) -> dict[str, Any]:
        """config.json of the run. UsageError if a newer version wrote it or it is damaged."""
        config = read_json(self.config_path, "run folder")
        if config.get("format") != FORMAT:
            raise UsageError(
                f"run folder: {self.config_path} has format {config.get('format')}; this version "
                f"reads format {FORMAT}: use the version of nanochat that wrote it"
            )
        return config

    def write_config(self, config: dict[str, Any]) -> None:
        """Replace config.json."""
        write_json(self.config_path, {**config, "format": FORMAT})

    def clear(self) -> None:
        """Delete the run that the folder holds (--overwrite), config.json first; files that no run
        writes stay."""
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        # Of faults that stopped the run that is deleted.
        for path in self.path.glob("fault_step_*.json"):
            path.unlink()
        for name in FOLDERS:
            if (self.path / name).is_dir():
                delete_folder(self.path / name, keep_link=True)


def write_summary(path: Path | str, **values: Any) -> dict[str, Any]:
    """Replace a run folder's summary.json and return its content. Numbers that do not exist (yet)
    are null. Raises OSError if the disk refuses it."""
    summary = {"format": FORMAT, **finite_or_null(values)}
    file = Path(path) / "summary.json"
    try:
        write_json(file, summary)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not file.exists():
            raise
        _overwrite(file, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def _overwrite(path: Path, text: str) -> None:
    """Write a small file within the space that it has already: on a full disk there is no other.

    In one write, padded with blanks, since a shorter file could not be cut in the same step.
    OSError if the space is too small."""
    content = text.encode("utf-8")
    with open(path, "r+b", buffering=0) as file:
        status = os.fstat(file.fileno())
        # st_blocks counts pieces of 512 bytes, whatever the file system's own size
        if len(content) > status.st_blocks * 512:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(content.ljust(status.st_size))
        os.fsync(file.fileno())


def status_of(path: Path | str) -> str | None:
    """`status` in a run folder's summary.json; None if that is missing or damaged: it is rewritten
    when the run continues."""
    try:
        return read_json(Path(path) / "summary.json", "run folder").get("status")
    except (UsageError, AttributeError):
        return None


def steps_of(run_path: Path | str) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    manifests = (Path(run_path) / "checkpoints").glob("step_*/manifest.json")
    names = [path.parent.name for path in manifests]
    # Copies that a user made (step_000500.bak) are not checkpoints.
    return sorted(
        int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d{6,}", name)
    )


def saved_step(path: Path | str) -> int | None:
    """The step of the newest checkpoint that a run's records know of, None if they know of none.

    summary.json has it; where that is lost or of an earlier version, the flags and metrics.jsonl
    tell when a checkpoint was due."""
    path = Path(path)
    summary = None
    with contextlib.suppress(UsageError):
        summary = read_json(path / "summary.json", "run folder")
    if not isinstance(summary, dict):
        summary = {}
    if "checkpoint" in summary:
        return summary["checkpoint"]
    try:
        return _due_checkpoint(path, summary)
    except (UsageError, KeyError, TypeError):
        return None


def _due_checkpoint(path: Path, summary: dict[str, Any]) -> int | None:
    """The step of a checkpoint that must have been saved, if a run's config.json and metrics.jsonl
    tell of one. UsageError, KeyError or TypeError for a damaged config.json."""
    config = read_json(path / "config.json", "run folder")
    args = config["args"]
    lines = read_lines(path / "metrics.jsonl")
    # a fork has the flag only once it has been trained
    if args.get("no_save") or not lines:
        return None
    last = lines[-1]["step"]
    is_at_end = last == config["plan"]["num_iterations"]
    if is_at_end or summary.get("status") in ("completed", "stopped"):
        return summary.get("step", last) or None
    every, minutes = args["save_every"], args["save_every_minutes"]
    saved = [step for step in listed_steps(args.get("save_at", "")) if step <= last]
    if every != -1 and last >= every:
        saved.append(last // every * every)
    if saved:
        return max(saved)
    if minutes == -1:
        return None
    overdue = (line["step"] for line in lines if line["total_training_time"] > 60 * minutes)
    return next(overdue, None)


def provenance() -> dict[str, Any]:
    """Git commit and library versions, for config.json. The commit is null outside a checkout."""
    return {
        "git_commit": _git_commit(),
        "versions": {package: _version(package) for package in RECORDED_PACKAGES},
    }


def _git_commit() -> str | None:
    """The commit of this source tree, null if it has no repository of its own: it may have been
    unpacked or installed inside another one. Null as well if git is missing, or does not trust the
    owner of the repository."""
    root = Path(__file__).resolve().parent.parent.parent
    # of the repository that a git hook or alias runs in
    others = ("GIT_DIR", "GIT_WORK_TREE")
    environment = {name: value for name, value in os.environ.items() if name not in others}
    # A subprocess, because git is no dependency and may be missing.
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, env=environment)
    except OSError:
        return None
    toplevel, _, commit = os.fsdecode(git.stdout).strip().rpartition("\n")
    is_ours = git.returncode == 0 and Path(toplevel).resolve() == root
    return commit if is_ours else None


def _version(package: str) -> str | None:
    # here, since commands that only read runs start faster without it
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
