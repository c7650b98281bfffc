"""What a run folder tells, as dataclasses, for `nanochat runs`, `report`, `compare` and `sweep`.

read_summary() is quick and strict: a line for a listing, or an error. read_run() reads everything
and is lenient: what is damaged or missing becomes a line in `problems`, because a report on a run
that was cut short is worth more than a refusal. Nothing here writes. Imports no torch."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import locks
from nanochat.common import UsageError, in_a_line, printable, read_json
from nanochat.run.folder import FORMAT, RunFolder
from nanochat.run.metrics import lines_of, parsed

# metrics.jsonl may be large, and a listing needs its last whole line only
TAIL_BYTES = 1 << 16
# without file locks, a run counts as dead once its files were silent for longer than a compilation
# or an evaluation takes
QUIET_S = 900
# integers beyond the largest float cannot be drawn or averaged
LARGEST = sys.float_info.max
# what reading a file with arbitrary content can raise
DAMAGES = (UsageError, OSError, ValueError, KeyError, TypeError, AttributeError)


# ---- values of unknown type ----


def finite_number(value: Any) -> int | float | None:
    """A finite int or float as it is; None for anything else that a damaged file may hold."""
    # True is an int in Python, and a damaged file may hold it anywhere
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # false for NaN as well
    return value if abs(value) <= LARGEST else None


def dig(value: Any, *names: str) -> Any:
    """value[name][name]...; None as soon as one of them does not exist."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


# ---- a line for a listing ----


@dataclass(frozen=True)
class RunSummary:
    """The facts of one run that a listing shows; None where a run has none, or none yet.

    total_training_time is in seconds; steps is how many are planned; updated is the time of the
    last write, in seconds since 1970."""

    path: str
    status: str
    reason: str
    depth: int
    parameters: int | None
    step: int | None
    tokens: int | None
    total_training_time: float | None
    steps: int | None
    tok_per_sec: float | None
    val_bpb: float | None
    min_val_bpb: float | None
    core_metric: float | None
    updated: float


def read_summary(path: str | Path) -> RunSummary:
    """The facts of a run. Raises one of DAMAGES if config.json or summary.json is unreadable."""
    path = Path(path)
    config = RunFolder(path).read_config()
    # the summary is first written when training begins; until then the lock decides
    summary = {"status": "running"}
    if (path / "summary.json").exists():
        summary = read_json(path / "summary.json", "run folder")
    at = _progress(path, summary)
    status = summary["status"]
    # a process that is killed cannot say so, but it loses its lock
    if status == "running" and not _is_alive(path):
        status = "died"
    parameters = steps = None
    # a run that `nanochat export --format run` wrote was never planned
    if "imported_from" not in config:
        parameters = config["plan"]["parameters"]["total"]
        steps = config["plan"]["num_iterations"]
    depth = config["args"]["depth"]
    scores = {name: summary.get(name) for name in ("val_bpb", "min_val_bpb", "core_metric")}
    numbers = (*at.values(), depth, parameters, steps, *scores.values())
    # what follows formats and sorts these
    if not all(value is None or isinstance(value, int | float) for value in numbers):
        raise ValueError("a number in config.json or summary.json is not a number")
    seconds = at["total_training_time"]
    # over the whole run, since the speed of a single step says little
    rate = at["tokens"] / seconds if at["tokens"] and seconds else None
    return RunSummary(
        path=str(path),
        status=status,
        reason=summary.get("reason") or "",
        depth=depth,
        parameters=parameters,
        **at,
        steps=steps,
        tok_per_sec=rate,
        **scores,
        updated=_last_write(path),
    )


def _progress(path: Path, summary: dict) -> dict[str, Any]:
    """step, tokens and total_training_time, from whichever of two files is further.

    The summary is written at evaluations and saves, metrics.jsonl at every step."""
    at = {name: summary.get(name) for name in ("step", "tokens", "total_training_time")}
    newest = last_line(path / "metrics.jsonl")
    if newest and newest["step"] > (at["step"] or 0):
        at = {name: newest.get(name) for name in at}
    return at


def _last_write(path: Path) -> float:
    """When one of the run's files was last written, in seconds since 1970."""
    files = [path / name for name in ("config.json", "metrics.jsonl", "summary.json")]
    return max(file.stat().st_mtime for file in files if file.exists())


def _is_alive(path: Path) -> bool:
    """Whether a process holds a run folder, as far as its lock file can tell, which is neither
    created nor changed."""
    try:
        # shared, and for an instant only: two readers never disturb each other
        with open(path / ".lock", "rb") as file:
            lock = locks.take(file, path, shared=True)
    # there is no lock file, or none that may be read: nothing is known to hold the run
    except OSError:
        return False
    if lock is locks.Lock.NONE:
        return time.time() - _last_write(path) < QUIET_S
    return lock is locks.Lock.HELD_ELSEWHERE


def last_line(path: Path) -> dict | None:
    """The last whole line of a .jsonl file, or None. Reads only the end of the file."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        # the first line of what is read may be cut: it does not parse, and is passed over
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        for line in reversed(file.read().split(b"\n")):
            try:
                value = json.loads(line)
            except ValueError:
                # empty, or torn by a kill
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                return value
    return None


def find(folder: Path, levels: int, problems: list[str]) -> Iterator[Path]:
    """Yield the run folders in a folder, down to `levels` levels below it.

    What looks like a run and is not one becomes a line in `problems`."""
    try:
        run = RunFolder(folder)
        if run.holds_run():
            yield folder
            return
        # checkpoints without a config.json are a damaged run, not a folder of runs
        if remains := run.remains():
            files = ", ".join(remains)
            problems.append(f"{folder}: not a run (it holds {files}, but no config.json)")
            return
        below = sorted(
            path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()
        )
    except DAMAGES as error:
        problems.append(f"{folder}: not a run ({reason_of(error)})")
        return
    # a run folder is never searched for further runs, a folder of runs only so deep
    if levels:
        for path in below:
            yield from find(path, levels - 1, problems)


def reason_of(error: BaseException) -> str:
    """What an exception of DAMAGES says: a KeyError names only the missing key."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error) or type(error).__name__


# ---- everything ----


@dataclass(frozen=True)
class CoreTask:
    """The result of one CORE task, which tasks.core.interval() takes.

    accuracy and chance are shares of 1, centered is the share of the way from chance to 1, stderr
    that of the accuracy over the n examples. correct has a 0 or 1 for each example, file and
    fingerprint name the examples; these three and stderr are None where they are not known."""

    accuracy: float
    stderr: float | None
    centered: float
    chance: float
    n: int
    fingerprint: str | None
    correct: str | None
    file: str | None

    @property
    def has_answers(self) -> bool:
        """Whether it says which examples were answered right, as an interval needs."""
        return None not in (self.correct, self.fingerprint, self.file)


@dataclass(frozen=True)
class CoreResult:
    """One CORE result of a run.

    source: the file it is from; tasks: by label, those that are damaged left out; core_metric:
    None if tasks are missing, which `reason` then says; low, high: its 95% bootstrap interval, None
    without the answers by example; n: examples in all tasks; baselines and max_per_task: as in the
    file."""

    source: str
    step: int | None
    tasks: dict[str, CoreTask]
    core_metric: float | None
    low: float | None
    high: float | None
    reason: str
    n: int
    baselines: Any
    max_per_task: Any

    @property
    def has_answers(self) -> bool:
        """Whether every task says which of its examples were answered right."""
        return all(task.has_answers for task in self.tasks.values())

    def in_words(self) -> str:
        """The result in one line."""
        if self.core_metric is None:
            return f"none: {self.reason}"
        interval = ""
        if self.low is not None:
            interval = f", 95% interval {self.low:.4f} to {self.high:.4f}"
        return f"{self.core_metric:.4f}{interval}, n = {self.n:,} ({self.source})"


@dataclass(frozen=True)
class Evaluation:
    """One result of `nanochat evaluate` in RUN/evaluations: the file's name and its JSON."""

    file: str
    report: dict


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run folder holds; numbers are None where the run has none.

    config, summary: {} if unreadable; lines: of metrics.jsonl; status: "unknown" if not even that
    can be read; evaluations: by step; cores: CORE results, the newest of training first, then those
    of RUN/evaluations; core: the one that stands for the run; steps_logged: training steps in
    `lines`; problems: sentences on what could not be read."""

    path: str
    name: str
    config: dict
    summary: dict
    lines: list[dict]
    samples: list[dict]
    evaluations: list[Evaluation]
    cores: list[CoreResult]
    core: CoreResult | None
    problems: list[str]
    status: str
    reason: str
    depth: int | float | None
    parameters: int | float | None
    steps: int | float | None
    step: int | float | None
    tokens: int | float | None
    total_training_flops: int | float | None
    total_training_time: int | float | None
    val_bpb: int | float | None
    min_val_bpb: int | float | None
    tok_per_sec: int | float | None
    mfu: int | float | None
    peak_memory_bytes: int | float | None
    steps_logged: int

    @property
    def val_loss(self) -> int | float | None:
        """Validation loss of the newest evaluation, in nats per token."""
        losses = [line["val/loss"] for line in self.lines if "val/loss" in line]
        return finite_number(losses[-1]) if losses else None

    @property
    def core_metric(self) -> float | None:
        """CORE of the result that stands for the run."""
        return None if self.core is None else self.core.core_metric

    @property
    def seed(self) -> int | float | None:
        """--seed of the run."""
        return finite_number(dig(self.config, "args", "seed"))

    @property
    def compressed_bpb(self) -> dict[str, float]:
        """{name of a compressor: bits per byte it needs for the held-out text}."""
        found = dig(self.config, "data", "compressed_bpb")
        if not isinstance(found, dict):
            return {}
        return {str(name): bits for name, bits in found.items() if finite_number(bits) is not None}


def read_run(path: str | Path, evaluations_first: bool = False) -> RunRecord:
    """Everything that a run folder holds. UsageError if there is nothing to show.

    evaluations_first: let a CORE result of RUN/evaluations stand for the run where core.jsonl has
    one as well."""
    path = Path(path)
    _refuse_what_is_no_run(path)
    problems: list[str] = []
    config = _config(path, problems)
    summary = _object(path / "summary.json", problems)
    lines, samples, answers = (
        _lines(path / f"{name}.jsonl", problems) for name in ("metrics", "samples", "core")
    )
    if not config and not lines and "status" not in summary:
        found = "; ".join(problems) or "it holds no file of a run"
        raise UsageError(f"{path}: nothing to show ({found})")
    status, reason = _status(path, problems)
    evaluations = _evaluations(path / "evaluations", problems)
    cores = _cores(config, answers, evaluations)
    return RunRecord(
        path=str(path),
        name=printable(path.resolve().name),
        config=config,
        summary=summary,
        lines=lines,
        samples=[line for line in samples if isinstance(line.get("text"), str)],
        evaluations=evaluations,
        cores=cores,
        core=_preferred(cores, evaluations_first),
        problems=problems,
        status=status,
        reason=reason,
        depth=finite_number(dig(config, "args", "depth")),
        parameters=finite_number(dig(config, "plan", "parameters", "total")),
        steps=finite_number(dig(config, "plan", "num_iterations")),
        **_numbers(summary, lines),
        steps_logged=sum(finite_number(line.get("train/loss")) is not None for line in lines),
    )


def _refuse_what_is_no_run(path: Path) -> None:
    """UsageError for a path that cannot be a run folder, naming the runs that are near it."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; name a run folder, for example out/d4")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UsageError(
            f"{path}: cannot be read (permission denied); ask its owner, or name another run folder"
        )
    # even a single file of a run is worth a report
    if (path / "config.json").exists() or RunFolder(path).remains():
        return
    # the most common mistake is to name --out-dir instead of a run in it
    below = sorted(folder.parent.name for folder in path.glob("*/config.json"))
    remedy = "name a run folder, for example out/d4"
    if below:
        remedy = f"the folders in it do: {', '.join(below[:5])}"
    raise UsageError(f"{path}: holds no run; {remedy}")


def _config(path: Path, problems: list[str]) -> dict:
    """config.json; {} and a problem if it is not that of a run of this version."""
    config = _object(path / "config.json", problems)
    if not config:
        return {}
    # a config that is half understood would be worse than none: groups are formed by it
    if config.get("format") == FORMAT and isinstance(config.get("args"), dict):
        return config
    why = "was not written by nanochat"
    if "format" in config:
        why = f"has format {config['format']}, this version reads format {FORMAT}"
    problems.append(f"config.json {why}")
    return {}


def _status(path: Path, problems: list[str]) -> tuple[str, str]:
    """Status and reason; "unknown" and a problem where read_summary() fails."""
    try:
        found = read_summary(path)
    except (*DAMAGES, RecursionError) as error:
        # what is wrong with the two files has mostly been said when they were read
        if not problems:
            reason = reason_of(error) if isinstance(error, KeyError) else in_a_line(error)
            problems.append(f"config.json or summary.json: {reason}")
        return "unknown", ""
    return str(found.status), str(found.reason)


def _numbers(summary: dict, lines: list[dict]) -> dict[str, int | float | None]:
    """The numbers of summary.json, and of metrics.jsonl where that is further."""
    last = lines[-1] if lines else {}
    numbers = {}
    for name in ("step", "tokens", "total_training_flops", "total_training_time"):
        # the summary waits for evaluations, the lines are written at every step
        both = (finite_number(summary.get(name)), finite_number(last.get(name)))
        numbers[name] = max((value for value in both if value is not None), default=None)
    for name in ("val_bpb", "min_val_bpb", "tok_per_sec", "mfu", "peak_memory_bytes"):
        numbers[name] = finite_number(summary.get(name))
    # without a summary the lines still tell the scores
    if not summary:
        evaluated = {}
        for line in lines:
            bpb = finite_number(line.get("val/bpb"))
            if bpb is not None and finite_number(line.get("step")) is not None:
                evaluated[line["step"]] = float(bpb)
        if evaluated:
            numbers["val_bpb"] = evaluated[max(evaluated)]
            numbers["min_val_bpb"] = min(evaluated.values())
    return numbers


def _object(path: Path, problems: list[str]) -> dict:
    """The JSON object of a file; {} and a problem where there is none."""
    try:
        value = read_json(path, "run folder")
    # deeply nested brackets exhaust the parser
    except (UsageError, RecursionError) as error:
        problems.append(in_a_line(error).removeprefix("run folder: "))
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} holds no JSON object")
        return {}
    return value


def _lines(path: Path, problems: list[str]) -> list[dict]:
    """The objects of a .jsonl file; problems say how many of its lines cannot be read."""
    try:
        # a run without samples or CORE has no such file, which is no damage
        rows = lines_of(path) if path.exists() else [""]
        values = [parsed(row) for row in rows]
    except (OSError, RecursionError) as error:
        problems.append(f"{path} cannot be read ({in_a_line(error)})")
        return []
    # a torn last line is what a killed run leaves and no damage
    damaged = sum(
        value is None and bool(row.strip())
        for row, value in zip(rows[:-1], values[:-1], strict=True)
    )
    if damaged:
        problems.append(f"{path}: {damaged} of its lines cannot be read and are left out")
    return [value for value in values if value is not None]


def _evaluations(folder: Path, problems: list[str]) -> list[Evaluation]:
    """The results of `nanochat evaluate` in the order of their steps."""
    found = []
    for path in sorted(folder.glob("*.json")):
        problems_before = len(problems)
        report = _object(path, problems)
        # the folder may hold other JSON files, such as one of an interrupted copy
        scores = any(isinstance(report.get(part), dict) for part in ("core", "bpb"))
        if scores or isinstance(report.get("samples"), list):
            found.append(Evaluation(path.name, report))
        elif len(problems) == problems_before:
            problems.append(f"{path} is not a result of `nanochat evaluate`")
    # of one step the second is step_000005_2.json: longer names are later
    return sorted(
        found,
        key=lambda evaluation: (
            finite_number(evaluation.report.get("step")) or 0,
            len(evaluation.file),
            evaluation.file,
        ),
    )


def _cores(config: dict, answers: list[dict], evaluations: list[Evaluation]) -> list[CoreResult]:
    """The newest result of core.jsonl, then those of RUN/evaluations, newest first."""
    found = []
    if answers:
        # each evaluation adds a line for each task; those of earlier steps stay in the file
        newest = answers[-1]["step"]
        mine = [line for line in answers if line["step"] == newest]
        found.append(
            core_result(
                source=f"core.jsonl, step {newest}",
                step=newest,
                tasks={str(line.get("label")): line for line in mine},
                baselines=mine[0].get("baselines"),
                max_per_task=dig(config, "args", "core_metric_max_per_task"),
            )
        )
    for evaluation in reversed(evaluations):
        tasks = dig(evaluation.report, "core", "tasks")
        if isinstance(tasks, dict) and tasks:
            found.append(
                core_result(
                    source=f"evaluations/{evaluation.file}",
                    step=finite_number(evaluation.report.get("step")),
                    tasks=tasks,
                    baselines=evaluation.report["core"].get("baselines"),
                    max_per_task=evaluation.report["core"].get("max_per_task"),
                )
            )
    return found


def _preferred(cores: list[CoreResult], evaluations_first: bool) -> CoreResult | None:
    """The first result that has a metric, or else the first."""
    ordered = sorted(
        cores, key=lambda core: evaluations_first and not core.source.startswith("evaluations")
    )
    # a complete result of an earlier step says more than one that was cut short
    with_metric = [core for core in ordered if core.core_metric is not None]
    return next(iter(with_metric or ordered), None)


def core_result(
    *, source: str, step: int | None, tasks: dict[str, Any], baselines: Any, max_per_task: Any
) -> CoreResult:
    """One CORE result from the entries of its tasks, of which those that are damaged are left out.

    Without all tasks there is no metric, and without the answers by example no interval."""
    # here, not above: it imports numpy, which a listing of runs does not need
    from tasks.core import LABELS, interval, metric

    usable = {label: task for label in LABELS if (task := _core_task(tasks.get(label)))}
    value = low = high = None
    reason = ""
    if len(usable) < len(LABELS):
        missing = len(LABELS) - len(usable)
        reason = f"{missing} of {len(LABELS)} tasks are missing in {source}"
    else:
        value = metric(task.centered for task in usable.values())
        if all(task.has_answers for task in usable.values()):
            low, high = interval(usable)
    return CoreResult(
        source=source,
        step=step,
        tasks=usable,
        core_metric=value,
        low=low,
        high=high,
        reason=reason,
        n=sum(task.n for task in usable.values()),
        baselines=baselines,
        max_per_task=max_per_task,
    )


def _core_task(entry: Any) -> CoreTask | None:
    """A task's entry in a file of results; None if it lacks the numbers of one."""
    if not isinstance(entry, dict):
        return None
    accuracy, centered, chance = (
        finite_number(entry.get(name)) for name in ("accuracy", "centered", "chance")
    )
    n = entry.get("n")
    if None in (accuracy, centered, chance) or not isinstance(n, int) or not 0 <= chance < 1:
        return None
    texts = {}
    for name in ("fingerprint", "correct", "file"):
        value = entry.get(name)
        texts[name] = value if isinstance(value, str) else None
    correct = texts["correct"]
    # answers that do not fit their number cannot be paired, but the accuracy still counts
    if correct is not None and (len(correct) != n or n == 0 or set(correct) - {"0", "1"}):
        texts["correct"] = None
    return CoreTask(
        accuracy=accuracy,
        stderr=finite_number(entry.get("stderr")),
        centered=centered,
        chance=chance,
        n=n,
        **texts,
    )
