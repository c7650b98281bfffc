"""Copies of a run's metrics for Weights & Biases and TensorBoard.

The run folder stays the record of the run; a tracker that fails never ends it."""

import contextlib
import html
import importlib.util
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nanochat.common import EXIT_STOPPED, in_a_line, install_hint

# The W&B project, unless WANDB_PROJECT names another.
PROJECT = "nanochat"
# To wait for W&B's server at the start; wandb may take up to 10 s more to give up.
INIT_SECONDS = 20
# To wait at the end for what has not been uploaded yet.
FINISH_SECONDS = 60
# How much of its copy W&B may lose when this process is killed. wandb's own choice is 15.
FLUSH_SECONDS = 1.0
# In the folder of each tracker: the last line that it was given.
POSITION_FILE = "logged.json"


def problems(run_name: str, tensorboard: bool) -> list[str]:
    """Sentences on requested trackers (--run, --tensorboard) that are not installed."""
    wanted = []
    if run_name != "dummy":
        wanted.append(("wandb", f"--run={run_name}"))
    if tensorboard:
        wanted.append(("tensorboard", "--tensorboard"))
    return [
        str(install_hint(package, flag)) for package, flag in wanted if not is_installed(package)
    ]


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a plain folder of its name does not count."""
    # W&B leaves a folder `wandb` in the working directory, which Python could import as a
    # namespace package. Only real packages have an origin.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def new_run_id() -> str:
    """A W&B run id for config.json: all starts with the same id continue the same W&B run."""
    return secrets.token_hex(5)


class Trackers:
    """The trackers of one run, on rank 0.

    No method raises or asks questions; a tracker that fails is switched off, with one line."""

    def __init__(
        self,
        folder: Path | str,
        run_name: str,
        tensorboard: bool,
        config: Mapping[str, Any],
        run_id: str,
        first_step: int,
        report: Callable[[str], None],
        earlier: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Start the requested trackers; without an account or server W&B falls back to offline.

        folder: the run folder. run_name: --run ("dummy": no W&B). config: that of config.json.
        run_id: new_run_id(), kept there; WANDB_RUN_ID or a sweep of W&B wins over it. first_step:
        where this start begins. report(text) prints a line. earlier: the lines of metrics.jsonl
        before first_step, of which each tracker gets those that it lacks (all, if it was not on
        until now)."""
        self.report = report
        self.active = {}
        # Most runs have no trackers; then the lines of metrics.jsonl are not even read.
        if run_name == "dummy" and not tensorboard:
            return
        folder, lines = Path(folder), list(earlier)
        columns = _flags_first(config)
        if run_name != "dummy":
            start = partial(_Wandb, folder, run_name, columns, run_id, report)
            self._start("W&B", start, lines)
        if tensorboard:
            start = partial(_TensorBoard, folder, columns, first_step, report)
            self._start("TensorBoard", start, lines)

    def log(self, values: Mapping[str, Any]) -> None:
        """A line of metrics: `step`, and names with numbers.

        A dict is one metric for each of its keys; null and other values are left out."""
        if self.active:
            self._each("log", _numbers(values))

    def text(self, step: int, prompt: str, text: str) -> None:
        """A sample: a prompt and the text that followed."""
        self._each("text", step, prompt, text)

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Replace the content of config.json, after values were derived during the run."""
        if self.active:
            self._each("update_config", _flags_first(config))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Hand over the content of summary.json and end; a second call does nothing.

        W&B shows exit code 0 as finished, 75 as preempted, others as failed. Waits at most
        FINISH_SECONDS for uploads."""
        try:
            self._each("finish", summary, exit_code)
        # Of a user who does not want to wait: the run itself is over and safe.
        except KeyboardInterrupt:
            remedy = ""
            if "W&B" in self.active:
                remedy = f"; to upload the rest: wandb sync {self.active['W&B'].path}"
            self.report(f"trackers: interrupted before they finished{remedy}")
        self.active = {}

    def _start(
        self, name: str, start: Callable[[], Any], earlier: Iterable[Mapping[str, Any]]
    ) -> None:
        """Start a tracker and give it the lines that it lacks."""
        try:
            tracker = start()
        # Whatever the error is, a tracker is not worth the run.
        except Exception as error:
            self.report(f"{name}: cannot start, training continues without it ({in_a_line(error)})")
            return
        if not tracker.on:
            return
        self.active[name] = tracker
        for line in earlier:
            self._call(name, "log", _numbers(line))

    def _each(self, method: str, *arguments: Any) -> None:
        """Call a method of every active tracker."""
        for name in list(self.active):
            self._call(name, method, *arguments)

    def _call(self, name: str, method: str, *arguments: Any) -> None:
        """Call a method of a tracker if it is active; one that raises is switched off."""
        tracker = self.active.get(name)
        if tracker is None:
            return
        try:
            getattr(tracker, method)(*arguments)
        # As in _start().
        except Exception as error:
            del self.active[name]
            self.report(
                f"{name}: switched off after an error, training continues ({in_a_line(error)}); "
                f"metrics.jsonl has every line"
            )
            with contextlib.suppress(Exception):
                tracker.abandon()


class _Wandb:
    """One W&B run in <run folder>/wandb."""

    def __init__(
        self,
        folder: Path,
        run_name: str,
        config: dict[str, Any],
        run_id: str,
        report: Callable[[str], None],
    ) -> None:
        # W&B's error reports to its makers contain tracebacks, which the user did not ask to send,
        # and without a network the exit waits 20 s for them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb = wandb
        self.report = report
        self.samples = []
        self.run, reason = self._start(folder, run_name, config, run_id)
        self.on = not self.run.disabled
        if not self.on:
            report("W&B: disabled by its own settings (WANDB_MODE=disabled)")
            return
        # run.dir is the folder of the run's files, inside the run's own.
        self.path = os.path.dirname(self.run.dir)
        self.position = _Position(folder / "wandb", self.run.id, lag=2 * FLUSH_SECONDS)
        self._return_to_server()
        if self.position.other_run:
            report(
                f"W&B: earlier steps are in its run {self.position.other_run}, this start writes "
                f"to run {self.run.id}; they are written there as well, from metrics.jsonl"
            )
        self.run.define_metric("*", step_metric="step")
        if self.run.offline:
            runs = f"{os.path.dirname(self.path)}/offline-run-*"
            report(f"W&B: offline ({reason}); to upload later: wandb sync {runs}")
        else:
            report(f"W&B: {self.run.url}")

    def _return_to_server(self) -> None:
        """Go back to the last step on the server: a kill may have lost lines on their way there."""
        if not self.run.offline:
            arrived = self.run.summary.get("step", 0)
            if arrived < self.position.step:
                self.position.go_back(arrived)

    def _start(
        self, folder: Path, run_name: str, config: dict[str, Any], run_id: str
    ) -> tuple[Any, str]:
        """(run, why it is offline if it is): as W&B's settings request, offline if that fails."""
        # Quiet, away from the console and from the user's code.
        wanted = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "disable_job_creation": True,
            "use_dot_wandb": False,
            "allow_val_change": True,
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "x_transaction_log_flush_interval": FLUSH_SECONDS,
        }
        # The installed version of wandb may lack some of these settings.
        known = self.wandb.Settings()
        settings = {name: value for name, value in wanted.items() if hasattr(known, name)}
        arguments = {
            "project": os.environ.get("WANDB_PROJECT") or PROJECT,
            "name": run_name,
            "id": os.environ.get("WANDB_RUN_ID") or run_id,
            "resume": "allow",
            "dir": str(folder),
            "config": config,
        }
        before = set((folder / "wandb").glob("run-*"))
        try:
            return self._init(settings, arguments), "as its settings request"
        # No key, no server, no network: the errors have many classes.
        except Exception as error:
            # The failed attempt still holds the run id, and leaves a folder with nothing in it.
            self._teardown()
            for left in set((folder / "wandb").glob("run-*")) - before:
                shutil.rmtree(left, ignore_errors=True)
            return self._init(settings, {**arguments, "mode": "offline"}), in_a_line(error)

    def _init(self, settings: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """wandb.init() without output; a prompt for a key finds no terminal and gives up."""
        stdin = sys.stdin
        with open(os.devnull, encoding="utf-8") as nothing:
            sys.stdin = nothing
            try:
                self.wandb.setup(settings=self.wandb.Settings(**settings))
                return self.wandb.init(**arguments, settings=self.wandb.Settings(**settings))
            finally:
                sys.stdin = stdin

    def log(self, values: Mapping[str, float]) -> None:
        self._write_samples()
        self._write(values)

    def _write(self, values: Mapping[str, Any]) -> None:
        if self.position.is_new(values):
            # Without step=: W&B drops lines whose step is below its own count.
            self.run.log(values)
            self.position.note(values)

    def text(self, step: int, prompt: str, text: str) -> None:
        if self.samples and self.samples[0][0] != step:
            self._write_samples()
        self.samples.append((step, prompt, text))

    def _write_samples(self) -> None:
        """One page for all samples of a step: a file, which `wandb sync` uploads as well."""
        if not self.samples:
            return
        style = "white-space: pre-wrap"
        page = "<hr>".join(
            f"<pre style='{style}'><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>"
            for _, prompt, text in self.samples
        )
        step = self.samples[0][0]
        self._write({"step": step, "samples": self.wandb.Html(page, inject=False)})
        self.samples = []

    def update_config(self, config: dict[str, Any]) -> None:
        self.run.config.update(config, allow_val_change=True)

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self._write_samples()
        self.run.summary.update(summary)
        if exit_code == EXIT_STOPPED:
            self.run.mark_preempting()
        started = time.monotonic()
        self.run.finish(exit_code=exit_code)
        # wandb's own process has everything on disk once it has ended.
        self._teardown()
        if not self.run.offline and time.monotonic() - started >= FINISH_SECONDS:
            self.report(
                f"W&B: the upload did not finish within {FINISH_SECONDS} s; to upload the rest: "
                f"wandb sync {self.path}"
            )
        self.position.close()

    def abandon(self) -> None:
        self._teardown()

    def _teardown(self) -> None:
        """End wandb's own process.

        Now, because a failure of it at exit would print a traceback, and may be a SystemExit."""
        with contextlib.suppress(Exception, SystemExit):
            self.wandb.teardown()


class _TensorBoard:
    """Event files in <run folder>/tensorboard."""

    on = True

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        first_step: int,
        report: Callable[[str], None],
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = folder / "tensorboard"
        continues = folder.is_dir() and any(folder.glob("events.*"))
        # Readers drop what was logged from purge_step on: those steps are logged again.
        self.writer = SummaryWriter(folder, purge_step=first_step if continues else None)
        self.position = _Position(folder, "" if continues else None, lag=0)
        self.position.go_back(first_step)
        self.samples_at = None
        self.samples = 0
        self._write_config(config, first_step)
        self.writer.flush()
        report(f"TensorBoard: tensorboard --logdir {folder}")

    def log(self, values: Mapping[str, float]) -> None:
        if not self.position.is_new(values):
            return
        step = values["step"]
        # Several lines of a step repeat `tokens` and the like.
        given = self.position.names if step == self.position.step else set()
        for name, value in values.items():
            if name != "step" and name not in given:
                self.writer.add_scalar(name, value, global_step=step)
        # So that a killed process leaves no gap.
        self.writer.flush()
        self.position.note(values)

    def text(self, step: int, prompt: str, text: str) -> None:
        if step != self.samples_at:
            self.samples_at = step
            self.samples = 0
        self.writer.add_text(f"samples/{self.samples}", _as_code(prompt + text), global_step=step)
        self.samples += 1

    def update_config(self, config: dict[str, Any]) -> None:
        self._write_config(config, self.position.step)

    def _write_config(self, config: dict[str, Any], step: int) -> None:
        content = json.dumps(config, indent=2, default=str)
        self.writer.add_text("config", _as_code(content), global_step=step)

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self.writer.close()
        self.position.close()

    def abandon(self) -> None:
        self.finish({}, 1)


class _Position:
    """The last line that a tracker was given, kept in its folder.

    With it a resumed run neither repeats a line nor leaves one out."""

    def __init__(self, folder: Path, run_id: str | None, lag: float) -> None:
        """run_id: if the file names another run, or if it is None, no line was given yet.

        lag: seconds until a line is safe from a kill. Only then it is noted, so that after a kill a
        few lines may be given twice, but none is lost."""
        self.run_id = run_id or ""
        # the run that was given lines before, if it is another one
        self.other_run = ""
        self.lag = lag
        self.step = -1
        # Names of the metrics that were given for self.step.
        self.names = set()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / POSITION_FILE
        # A first start has no file, a crash may have torn it: then lines may be given twice.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["run_id"] == run_id:
                self.step, self.names = kept["step"], set(kept["names"])
            else:
                self.other_run = kept["run_id"]
        # Open as long as the run lasts: every line rewrites it.
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        self.go_back(self.step + 1)

    def is_new(self, values: Mapping[str, Any]) -> bool:
        """Whether a line was not given yet.

        Lines come in the order of steps, several of one step with different names."""
        if values["step"] != self.step:
            return values["step"] > self.step
        return not set(values) <= self.names

    def note(self, values: Mapping[str, Any]) -> None:
        """Remember that a line was given."""
        if values["step"] != self.step:
            self.step, self.names = values["step"], set()
        self.names |= set(values)
        if time.monotonic() - self.looked_at < self.lag:
            return
        # Without a lag the line itself is safe; with one, what had been given at the last look is.
        if self.lag == 0:
            self._look()
        self._write()
        self._look()

    def go_back(self, step: int) -> None:
        """Forget the lines that were given from this step on."""
        if self.step >= step:
            self.step, self.names = step, set()
        self._look()
        self._write()

    def _look(self) -> None:
        """Take what was given so far as what the next _write() notes."""
        self.seen_step = self.step
        self.seen_names = sorted(self.names)
        self.looked_at = time.monotonic()

    def _write(self) -> None:
        content = {"run_id": self.run_id, "step": self.seen_step, "names": self.seen_names}
        self.file.seek(0)
        self.file.write(json.dumps(content))
        self.file.truncate()
        self.file.flush()

    def close(self) -> None:
        """Note every line that was given; to be called once they are all safe."""
        self._look()
        self._write()
        self.file.close()


def _flags_first(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for a tracker: flags as plain columns (`depth`), the rest below its section.

    A section's values become columns such as `plan.tokens` there."""
    sections = {name: section for name, section in config.items() if name != "args"}
    return {**config["args"], **sections}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a metrics line.

    {"centered_results": {"copa": 0.1}} becomes {"centered_results/copa": 0.1}."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items()}
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if _is_finite_number(value)}


def _is_finite_number(value: Any) -> bool:
    # bool is a subclass of int.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _as_code(text: str) -> str:
    """Text as a block of Markdown, shown as it is."""
    return "\n".join("    " + line for line in text.split("\n"))
