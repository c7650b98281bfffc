"""Copies of a run's metrics for Weights & Biases and TensorBoard. The run folder stays the record; a tracker never ends a run."""

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
from pathlib import Path

from nanochat.common import EXIT_STOPPED, in_a_line, install_hint

PROJECT = "nanochat"  # W&B project, unless WANDB_PROJECT names another
INIT_SECONDS = (
    20  # to wait for W&B's server at the start; wandb may take up to 10 s more to give up
)
FINISH_SECONDS = 60  # to wait at the end for what is not uploaded yet
FLUSH_SECONDS = (
    1.0  # how much of its copy W&B may lose when this process is killed (wandb's own choice: 15)
)
POSITION_FILE = "logged.json"  # in the folder of each tracker: what it was given last


def problems(run_name, tensorboard):
    """Sentences on trackers that were asked for (--run, --tensorboard) and are not installed; empty if all is well."""
    wanted = {
        "wandb": run_name != "dummy" and f"--run={run_name}",
        "tensorboard": tensorboard and "--tensorboard",
    }
    return [
        str(install_hint(package, flag))
        for package, flag in wanted.items()
        if flag and not is_installed(package)
    ]


def is_installed(package):
    """True for a package, not for a mere folder of that name (W&B likes to leave a folder `wandb` where it was used)."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def new_run_id():
    """A W&B run id, to be kept in config.json: all starts with the same one continue the same W&B run."""
    return secrets.token_hex(5)


class Trackers:
    """The trackers of one run, on rank 0. No method raises or asks questions; what fails is switched off, with one line."""

    def __init__(
        self, folder, run_name, tensorboard, config, run_id, first_step, report, earlier=()
    ):
        """Start what was asked for; W&B falls back to offline where there is no account or server.

        folder: the run folder; run_name: --run ("dummy": no W&B); tensorboard: bool; config: that of config.json;
        run_id: new_run_id(), kept there; first_step: where this start begins; report(text) prints a line; earlier: the lines
        of metrics.jsonl before first_step, of which each tracker is given what it lacks (all, if it was not on until now)."""
        self.report, self.active = report, {}
        config = _flags_first(config)
        if run_name != "dummy":
            self._try(
                "W&B", lambda: _Wandb(Path(folder), run_name, config, run_id, report), earlier
            )
        if tensorboard:
            self._try(
                "TensorBoard",
                lambda: _TensorBoard(Path(folder), config, first_step, report),
                earlier,
            )

    def log(self, values):
        """A line of metrics: `step` and names with numbers; a dict is one metric for each of its keys; null is left out."""
        values = _numbers(values)
        self._each(lambda tracker: tracker.log(values))

    def text(self, step, prompt, text):
        """A sample: a prompt and the text that followed."""
        self._each(lambda tracker: tracker.text(step, prompt, text))

    def update_config(self, config):
        """Give the dict of config.json again, after values were derived during the run."""
        self._each(lambda tracker: tracker.update_config(_flags_first(config)))

    def finish(self, summary, exit_code):
        """Hand over the dict of summary.json and end. W&B shows exit code 0 as finished, 75 as preempted, others as failed.

        Waits FINISH_SECONDS for uploads at most. Nothing happens the second time."""
        try:
            self._each(lambda tracker: tracker.finish(summary, exit_code))
        except KeyboardInterrupt:  # of someone who would not wait: the run itself is over and safe
            path = getattr(self.active.get("W&B"), "path", None)
            self.report(
                "trackers: not waited for, as asked"
                + (f"; to upload what is missing: wandb sync {path}" if path else "")
            )
        self.active = {}

    def _try(self, name, start, earlier):
        """Start a tracker and give it what it lacks."""
        try:
            tracker = start()
        except Exception as error:  # whatever it is, a tracker is not worth the run
            self.report(
                f"{name}: could not be started, training goes on without it ({in_a_line(error)})"
            )
            return
        if not tracker.on:
            return
        self.active[name] = tracker
        for line in earlier:
            self._do(name, lambda tracker, values=_numbers(line): tracker.log(values))

    def _each(self, action):
        """action(tracker) for each one that is on."""
        for name in list(self.active):
            self._do(name, action)

    def _do(self, name, action):
        """action(tracker) if it is on; one that raises is switched off."""
        if (tracker := self.active.get(name)) is None:
            return
        try:
            action(tracker)
        except Exception as error:  # as above
            del self.active[name]
            self.report(
                f"{name}: switched off, training goes on ({in_a_line(error)}); metrics.jsonl has everything"
            )
            with contextlib.suppress(Exception):
                tracker.abandon()


class _Wandb:
    """One W&B run in <run folder>/wandb."""

    def __init__(self, folder, run_name, config, run_id, report):
        # W&B's reports to its makers, with tracebacks: not the user's wish, and without a network the exit waits 20 s for them
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb, self.report, self.samples = wandb, report, []
        self.run, reason = self._start(folder, run_name, config, run_id)
        self.on = not self.run.disabled
        if not self.on:
            report("W&B: off, as its settings say (WANDB_MODE=disabled)")
            return
        self.path = os.path.dirname(self.run.dir)  # run.dir is its folder of files
        self.position = _Position(folder / "wandb", run_id, lag=2 * FLUSH_SECONDS)
        if (
            not self.run.offline
            and (arrived := self.run.summary.get("step", 0)) < self.position.step
        ):
            self.position.go_back(
                arrived
            )  # more was handed over than reached the server before a kill
        self.run.define_metric("*", step_metric="step")
        report(
            f"W&B: offline ({reason}); to upload later: wandb sync {os.path.dirname(self.path)}/offline-run-*"
            if self.run.offline
            else f"W&B: {self.run.url}"
        )

    def _start(self, folder, run_name, config, run_id):
        """(run, why it is offline if it is): as W&B's own settings say, or offline where that fails."""
        # quiet, away from the console and from the user's code; settings that this version of wandb lacks are left out
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
        known = self.wandb.Settings()
        settings = {name: value for name, value in wanted.items() if hasattr(known, name)}
        arguments = {
            "project": os.environ.get("WANDB_PROJECT") or PROJECT,
            "name": run_name,
            "id": run_id,
            "resume": "allow",
            "dir": str(folder),
            "config": config,
        }
        before = set((folder / "wandb").glob("run-*"))
        try:
            return self._init(settings, arguments), "as its settings say"
        except Exception as error:  # no key, no server, no network: errors of many classes
            # the failed attempt goes on holding the run id, and leaves a folder with nothing in it
            self._teardown()
            for left in set((folder / "wandb").glob("run-*")) - before:
                shutil.rmtree(left, ignore_errors=True)
            return self._init(settings, {**arguments, "mode": "offline"}), in_a_line(error)

    def _init(self, settings, arguments):
        """wandb.init() without a word on the console; whoever is asked for a key there has no terminal to ask at."""
        stdin = sys.stdin
        with open(os.devnull, encoding="utf-8") as nothing:
            sys.stdin = nothing
            try:
                self.wandb.setup(settings=self.wandb.Settings(**settings))
                return self.wandb.init(**arguments, settings=self.wandb.Settings(**settings))
            finally:
                sys.stdin = stdin

    def log(self, values):
        self._write_samples()
        self._write(values)

    def _write(self, values):
        if self.position.is_new(values):
            self.run.log(values)  # no step=: W&B drops what comes with a step below its own count
            self.position.note(values)

    def text(self, step, prompt, text):
        if self.samples and self.samples[0][0] != step:
            self._write_samples()
        self.samples.append((step, prompt, text))

    def _write_samples(self):
        """One page for all samples of a step: a file of W&B's that is uploaded by `wandb sync` as well."""
        if self.samples:
            page = "<hr>".join(
                f"<pre style='white-space: pre-wrap'><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>"
                for _, prompt, text in self.samples
            )
            self._write(
                {"step": self.samples[0][0], "samples": self.wandb.Html(page, inject=False)}
            )
            self.samples = []

    def update_config(self, config):
        self.run.config.update(config, allow_val_change=True)

    def finish(self, summary, exit_code):
        self._write_samples()
        self.run.summary.update(summary)
        if exit_code == EXIT_STOPPED:
            self.run.mark_preempting()
        started = time.monotonic()
        self.run.finish(exit_code=exit_code)
        self._teardown()  # now all is on the disk
        if not self.run.offline and time.monotonic() - started >= FINISH_SECONDS:
            self.report(
                f"W&B: {FINISH_SECONDS} s were not enough to upload the rest; later: wandb sync {self.path}"
            )
        self.position.close()

    def abandon(self):
        self._teardown()

    def _teardown(self):
        """End wandb's own process: here, because at exit a failure would print a traceback, and may even be a SystemExit."""
        with contextlib.suppress(Exception, SystemExit):
            self.wandb.teardown()


class _TensorBoard:
    """Event files in <run folder>/tensorboard."""

    on = True

    def __init__(self, folder, config, first_step, report):
        from torch.utils.tensorboard import SummaryWriter

        folder = folder / "tensorboard"
        again = folder.is_dir() and any(folder.glob("events.*"))
        # readers drop what was logged from first_step on, which comes again
        self.writer = SummaryWriter(folder, purge_step=first_step if again else None)
        self.position = _Position(folder, "" if again else None, lag=0)
        self.position.go_back(first_step)
        self.samples_at, self.samples = None, 0
        self.writer.add_text(
            "config", _as_code(json.dumps(config, indent=2, default=str)), global_step=first_step
        )
        self.writer.flush()
        report(f"TensorBoard: tensorboard --logdir {folder}")

    def log(self, values):
        if not self.position.is_new(values):
            return
        given = self.position.names if values["step"] == self.position.step else ()
        for name, value in values.items():
            if (
                name != "step" and name not in given
            ):  # `tokens` and its like stand in every line of a step
                self.writer.add_scalar(name, value, global_step=values["step"])
        self.writer.flush()  # so that a killed process leaves no gap
        self.position.note(values)

    def text(self, step, prompt, text):
        self.samples = self.samples + 1 if step == self.samples_at else 0
        self.samples_at = step
        self.writer.add_text(f"samples/{self.samples}", _as_code(prompt + text), global_step=step)

    def update_config(self, config):
        self.writer.add_text(
            "config",
            _as_code(json.dumps(config, indent=2, default=str)),
            global_step=self.position.step,
        )

    def finish(self, summary, exit_code):
        self.writer.close()
        self.position.close()

    def abandon(self):
        self.finish({}, 1)


class _Position:
    """What a tracker was given last, kept in its folder: a resumed run neither repeats a line nor leaves one out."""

    def __init__(self, folder, run_id, lag):
        """run_id: of another run than the one noted, it begins at the beginning; so does None. lag: seconds until what was
        given is safe from a kill; only then it is noted, so that a few lines may come twice after one, but none is lost."""
        self.run_id, self.lag, self.step, self.names = run_id or "", lag, -1, set()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / POSITION_FILE
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["run_id"] == run_id:
                self.step, self.names = kept["step"], set(kept["names"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a first start, or a note torn by a crash: at worst lines stand twice
        self.file = open(path, "w", encoding="utf-8")
        self.go_back(self.step + 1)

    def is_new(self, values):
        """Whether a line was not given yet. Lines come in the order of steps, several of one step with different names."""
        return (
            values["step"] > self.step
            or values["step"] == self.step
            and not set(values) <= self.names
        )

    def note(self, values):
        """Remember that a line was given."""
        if values["step"] != self.step:
            self.step, self.names = values["step"], set()
        self.names |= set(values)
        if time.monotonic() - self.taken_at >= self.lag:
            if self.lag == 0:
                self.taken = self.step, sorted(self.names)
            self._write()
            self.taken, self.taken_at = (self.step, sorted(self.names)), time.monotonic()

    def go_back(self, step):
        """Take back what was given from this step on."""
        if self.step >= step:
            self.step, self.names = step, set()
        self.taken, self.taken_at = (self.step, sorted(self.names)), time.monotonic()
        self._write()

    def _write(self):
        self.file.seek(0)
        self.file.write(
            json.dumps({"run_id": self.run_id, "step": self.taken[0], "names": self.taken[1]})
        )
        self.file.truncate()
        self.file.flush()

    def close(self):
        """Note all that was given; to be called once that is safe."""
        self.taken = self.step, sorted(self.names)
        self._write()
        self.file.close()


def _flags_first(config):
    """config.json for a tracker: flags as plain columns (`depth`), derived values below their section (`plan.tokens`)."""
    return {**config["args"], **{k: v for k, v in config.items() if k != "args"}}


def _numbers(values):
    """The finite numbers of a metrics line, {"centered_results": {"copa": 0.1}} as {"centered_results/copa": 0.1}."""
    flat = {}
    for name, value in values.items():
        flat |= (
            {f"{name}/{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return {
        k: v
        for k, v in flat.items()
        if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    }


def _as_code(text):
    """Text as a block of Markdown, shown as it is."""
    return "\n".join("    " + line for line in text.split("\n"))
