"""The run folder's records: config.json, metrics.jsonl, summary.json, samples.jsonl; and the lines on the screen."""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from nanochat.common import UsageError, human_time, read_json, write_json

FORMAT = 1


class RunFolder:
    """<out-dir>/<model-tag>/ of one run, written by rank 0 only."""

    def __init__(self, path):
        self.path = Path(path)
        self.lock = None

    @property
    def config_path(self):
        return self.path / "config.json"

    def holds_run(self):
        """True if there is a run's config.json. UsageError if there is another program's."""
        if not self.config_path.exists():
            return False
        config = read_json(self.config_path, "run folder")
        if not isinstance(config, dict) or not {"format", "args"} <= set(config):
            raise UsageError(
                f"run folder: {self.config_path} is not of this program; give another --model-tag or --out-dir"
            )
        return True

    def remains(self):
        """Names of a run's files that are there, config.json left out: what is left of a damaged run."""
        names = ("metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints")
        return [name for name in names if (self.path / name).exists()]

    def claim(self):
        """Make the folder and hold it until the process ends. UsageError if it is not writable or another run has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UsageError(
                f"--out-dir: the run folder {self.path} cannot be written ({error.strerror}); "
                f"give another --out-dir"
            ) from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"--model-tag: {self.path} is in use by a training process that is still running; wait for it, "
                f"stop it, or give another --model-tag"
            ) from None

    def read_config(self):
        """config.json of the run that is there. UsageError if it was written by a newer version or is damaged."""
        config = read_json(self.config_path, "run folder")
        if config.get("format") != FORMAT:
            raise UsageError(
                f"run folder: {self.config_path} has format {config.get('format')}; this version reads "
                f"format {FORMAT}: use the version of nanochat that wrote it"
            )
        return config

    def write_config(self, config):
        write_json(self.config_path, {**config, "format": FORMAT})

    def clear(self):
        """Delete the run that the folder holds (--overwrite), config.json first; files that no run writes stay."""
        for name in (
            "config.json",
            "metrics.jsonl",
            "samples.jsonl",
            "core.jsonl",
            "summary.json",
            "loss.png",
            "report.html",
        ):
            (self.path / name).unlink(missing_ok=True)
        for path in self.path.glob("fault_step_*.json"):
            path.unlink()
        for name in ("checkpoints", "tokenizer", "wandb", "tensorboard", "profile"):
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)


def write_summary(path, **values):
    """Replace summary.json and return its content. Numbers that do not exist (yet) are null."""
    summary = {"format": FORMAT, **finite_or_null(values)}
    write_json(Path(path) / "summary.json", summary)
    return summary


def status_of(path):
    """`status` of a run folder's summary.json, or None if there is none or it is damaged: it is written anew when the run goes on."""
    try:
        return read_json(Path(path) / "summary.json", "run folder").get("status")
    except (UsageError, AttributeError):
        return None


def provenance():
    """Git commit and library versions, for config.json. The commit is null outside a checkout."""
    import importlib.metadata

    root = Path(__file__).resolve().parent.parent
    git = (
        subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
        if shutil.which("git")
        else None
    )
    versions = {}
    for package in ("torch", "numpy", "tiktoken", "safetensors", "rustbpe"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "git_commit": git.stdout.strip() if git and git.returncode == 0 else None,
        "versions": versions,
    }


def finite_or_null(values):
    """A copy of a dict whose NaN and infinite numbers are None: JSON has no word for them, and 0 would be a lie."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


class Metrics:
    """metrics.jsonl and its like: JSON objects, one a line, appended and flushed."""

    def __init__(self, path, report=print):
        self.path, self.report, self.file = Path(path), report, None
        self.size, self.kept, self.refused = (
            0,
            [],
            False,
        )  # bytes written, lines not written yet, whether that was said
        self.lock = threading.Lock()  # the thread that saves checkpoints calls sync()

    def keep_before(self, step):
        """Cut the lines of this step and later ones, and a torn last line; the file is replaced atomically.

        Run on resume from `step`: what follows is written again, so that each step stands once."""
        if not self.path.exists():
            return
        kept = [
            line for line in lines_of(self.path) if (value := parsed(line)) and value["step"] < step
        ]
        temporary = self.path.with_suffix(".partial")
        with open(temporary, "w", encoding="utf-8") as f:
            f.write("".join(line + "\n" for line in kept))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.path)

    def write(self, **values):
        """Append a line. If the disk refuses it is kept, and written with a later one; report() is told once."""
        try:
            with self.lock:
                self.kept.append(json.dumps(finite_or_null(values), allow_nan=False) + "\n")
                self._write_kept()
        except OSError as error:
            if not self.refused:
                self.report(
                    f"{self.path.name} cannot be written ({error}); its lines are kept in memory, training goes on"
                )
            self.refused = True

    def _write_kept(self):
        """Write the lines that are not written yet, all or none. Raises OSError."""
        content = "".join(self.kept).encode()
        if not content:
            return
        if self.file is None:
            self.file = open(self.path, "ab", buffering=0)
            self.size = self.file.seek(0, os.SEEK_END)
        try:
            if (written := self.file.write(content)) < len(content):
                raise OSError(errno.ENOSPC, f"only {written} of {len(content)} bytes were taken")
        except OSError:
            with contextlib.suppress(OSError):  # what was torn
                self.file.truncate(self.size)
            raise
        if self.refused:
            self.report(f"{self.path.name}: all lines are written now")
        self.size, self.refused, self.kept = self.size + len(content), False, []

    def value_at(self, step, name):
        """The value of that name that was written last for a step, or None."""
        found = [
            line[name]
            for line in read_lines(self.path)
            if line["step"] == step and line.get(name) is not None
        ]
        return found[-1] if found else None

    def sync(self):
        """Bring all lines to the disk. Raises OSError."""
        with self.lock:
            self._write_kept()
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self):
        """Write what is left, if the disk takes it now."""
        with self.lock, contextlib.suppress(OSError):
            self._write_kept()
        if self.file is not None:
            self.file.close()


def records(folder, report):
    """The Metrics of a run folder's metrics.jsonl, samples.jsonl and core.jsonl."""
    return [
        Metrics(Path(folder) / f"{name}.jsonl", report) for name in ("metrics", "samples", "core")
    ]


def lines_of(path):
    """Its lines; what is no UTF-8 (a disk's doing) spoils its own line only."""
    return Path(path).read_text(encoding="utf-8", errors="replace").split("\n")


def parsed(line):
    """The object in a metrics line; None for a torn or foreign one."""
    try:
        value = json.loads(line)
        return value if isinstance(value["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def read_lines(path):
    """The objects of a .jsonl file as a list, a torn last line left out; [] if there is no file."""
    if not Path(path).exists():
        return []
    return [value for line in lines_of(path) if (value := parsed(line)) is not None]


def bar(items, text, unit):
    """tqdm over a list on a terminal; the list itself in a file or pipe, after one line if there is anything to do."""
    if not items:
        return items
    if not sys.stdout.isatty():
        print(f"{text}: {len(items)} {unit}s", flush=True)
        return items
    from tqdm import tqdm

    return tqdm(items, desc=text, unit=unit, file=sys.stdout)


class Progress:
    """One live line on a terminal (tqdm's), plain lines now and then in a file or pipe."""

    PLAIN_SECONDS = 10

    def __init__(self, first_step, steps, quiet):
        self.quiet, self.bar, self.last = quiet, None, -math.inf
        self.live = sys.stdout.isatty() and not quiet
        if self.live:
            from tqdm import tqdm

            self.bar = tqdm(
                initial=first_step,
                total=steps,
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:12}| {desc}",
            )

    def update(self, step, steps, text, seconds_left):
        """Show the state after update `step` (1 is the first). seconds_left may be None."""
        if self.quiet:
            return
        eta = f"eta {human_time(seconds_left)}" if seconds_left is not None else "eta ?"
        if self.live:
            self.bar.total = steps
            self.bar.set_description_str(f"{text} | {eta}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif step <= 3 or step == steps or time.monotonic() - self.last >= self.PLAIN_SECONDS:
            self.last = time.monotonic()
            of = f"{step}/{steps}" if steps else f"{step}"
            print(f"step {of} | {text} | {eta}", flush=True)

    def meanwhile(self, text):
        """Show what goes on between two updates."""
        if self.live:
            self.bar.set_description_str(text)
        elif not self.quiet and time.monotonic() - self.last >= self.PLAIN_SECONDS:
            self.last = time.monotonic()
            print(text, flush=True)

    def message(self, text):
        """A line of its own above the live one."""
        if self.quiet:
            return
        if self.live:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()
