"""What `nanochat evaluate` reports of a model, on the console and as Markdown, JSON and CSV."""

import csv
import dataclasses
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UsageError, counted, human_time, write_atomic, write_json
from nanochat.eval.core import CoreResult, TaskResult
from tasks.core import interval, metric

COLUMNS = (
    "task",
    "accuracy",
    "±",
    "chance",
    "centered",
    "n",
    "of",
    "shots",
    "empty",
    "cropped",
    "bad lines",
    "time",
)


@dataclass(frozen=True)
class BpbReport:
    """Bits per byte over text."""

    # why there are no numbers, or None
    reason: str | None
    bpb: float | None
    # nats per token
    loss: float | None
    tokens: int
    bytes: int
    perplexity: float | None
    # name of the text
    data: str
    seconds: float


@dataclass(frozen=True)
class CoreReport:
    """A CORE result, with how it was asked for."""

    result: CoreResult
    # tokens of a prompt at most
    limit: int
    # what a longer one loses, in words
    crop_rule: str
    baselines: str
    max_per_task: int
    # whether the model was asked in its chat format
    chat: bool
    # whether a task that was asked for is missing
    failed: bool


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Difference:
    """A difference in CORE to another run."""

    # the other run
    to: str
    # None if one of the two has no CORE
    core_metric: float | None
    # why something is None
    reason: str | None
    # 95% interval, paired by example; None if examples cannot be paired
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Report:
    """All results of one model; None for what was not asked for."""

    # for people
    title: str
    # folder of the run, as it was given
    run: str
    step: int | None
    # from hardware.describe()
    device: dict[str, Any]
    # number of processes
    ranks: int
    dtype: str
    bpb: BpbReport | None
    core: CoreReport | None
    samples: list[Sample] | None
    difference: Difference | None

    def failed(self) -> bool:
        """Whether something that was asked for could not be measured."""
        no_bpb = self.bpb is not None and self.bpb.reason is not None
        no_core = self.core is not None and self.core.failed
        return no_bpb or no_core


def difference(mine: CoreResult, other_run: str, theirs: CoreResult) -> Difference:
    """The difference in CORE of a result to another run's."""
    if mine.core_metric is None or theirs.core_metric is None:
        return Difference(other_run, None, "one of the two has no CORE metric", None, None)
    value = mine.core_metric - theirs.core_metric
    try:
        low, high = interval(mine.tasks, theirs.tasks)
    except ValueError as error:
        return Difference(other_run, value, str(error), None, None)
    return Difference(other_run, value, None, low, high)


# ---- files ----


def results_folder(out: str, run: str) -> Path:
    """Where the results of a run go. out: --out."""
    return Path(out or Path(run) / "evaluations")


def check_writable(folders: list[Path]) -> None:
    """Raises UsageError if a folder, which need not exist yet, cannot be written."""
    for folder in (folder.absolute() for folder in folders):
        # what does not exist yet is created in the innermost folder that does
        existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        problem = ""
        if not existing.is_dir():
            problem = "not a folder"
        elif not os.access(existing, os.W_OK | os.X_OK):
            problem = "read-only"
        if problem:
            raise UsageError(
                f"--out: {folder} cannot be written ({existing} is {problem}); name another folder "
                f"with --out"
            )


def write(report: Report, folder: Path, name_run: bool) -> str:
    """Write a report as .md, .csv and .json; returns their path without the ending.

    The files are named after the step, and with name_run after the run too, for a folder that may
    hold results of other runs. Earlier files stay. Raises UsageError if they cannot be written."""
    name = Path(report.run).resolve().name
    if report.step is not None:
        step = f"step_{report.step:06d}"
        name = f"{name}_{step}" if name_run else step
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = str(folder / name)
        number = 1
        # it is written last, so a .json stands for three files
        while os.path.exists(f"{path}.json"):
            number += 1
            path = f"{folder / name}_{number}"
        write_atomic(f"{path}.md", as_markdown(report))
        write_atomic(f"{path}.csv", as_csv(report))
        write_json(f"{path}.json", as_json(report))
    except OSError as error:
        raise UsageError(
            f"--out: {folder} cannot be written ({error.strerror}); name another folder with --out"
        ) from None
    return path


def as_json(report: Report) -> dict[str, Any]:
    """A report as JSON has it, without the parts that were not asked for."""
    fields = dataclasses.asdict(report)
    del fields["title"]
    for part in ("bpb", "core", "samples", "difference"):
        if fields[part] is None:
            del fields[part]
    if report.core is not None:
        # the result's fields stand next to how it was asked for
        fields["core"] = fields["core"].pop("result") | fields["core"]
    return fields


# ---- words and tables ----


def sentences(report: Report) -> list[str]:
    """What a report says in words, one sentence a line."""
    lines = []
    if report.bpb is not None:
        lines.append(bpb_sentence(report.bpb))
    if report.core is not None:
        lines += core_sentences(report.core)
    if report.difference is not None:
        lines.append(difference_sentence(report.difference))
    return lines


def bpb_sentence(found: BpbReport) -> str:
    """Bits per byte in words."""
    if found.reason:
        return f"bits per byte on {found.data}: none: {found.reason}"
    return (
        f"bits per byte on {found.data}: {found.bpb:.4f}, loss {found.loss:.4f} nats a token, "
        f"perplexity {found.perplexity:.2f} ({found.tokens:,} tokens, {found.bytes:,} bytes, "
        f"{human_time(found.seconds)})"
    )


def core_sentences(core: CoreReport) -> list[str]:
    """CORE, and how it was measured, in words."""
    found = core.result
    if core.chat:
        said = chat_sentence(found)
    elif found.core_metric is None:
        said = f"no CORE metric: {found.reason}"
    else:
        said = (
            f"CORE {found.core_metric:.4f}, 95% interval {found.low:.4f} to {found.high:.4f} "
            f"(bootstrap over the examples), n = {found.n:,}, {human_time(found.seconds)}"
        )
    examples = "all examples"
    if any(task.n < task.examples for task in found.tasks.values()):
        examples = f"a sample of at most {core.max_per_task} examples a task"
    return [
        said,
        f"chance levels {core.baselines}; prompts of at most {core.limit:,} tokens, "
        f"{core.crop_rule}; {examples}",
    ]


def chat_sentence(found: CoreResult) -> str:
    """What a chat model answered to multiple-choice tasks: a number that is not CORE."""
    measured = {label: task for label, task in found.tasks.items() if task.centered is not None}
    if not measured:
        return f"no answers in the chat format: {found.reason}"
    mean = metric(task.centered for task in measured.values())
    low, high = interval(measured)
    return (
        f"multiple choice in the chat format: mean centered accuracy {mean:.4f} of "
        f"{counted(len(measured), 'task')}, 95% interval {low:.4f} to {high:.4f} (bootstrap over "
        f"the examples), n = {found.n:,}, {human_time(found.seconds)}; no CORE metric, whose "
        f"prompts are plain text"
    )


def difference_sentence(found: Difference) -> str:
    """A difference in words."""
    text = f"difference in CORE to {found.to}: "
    if found.core_metric is None:
        return f"{text}none: {found.reason}"
    text += f"{found.core_metric:+.4f}"
    if found.low is None or found.high is None:
        return f"{text} (no interval: {found.reason})"
    text += f", 95% interval {found.low:+.4f} to {found.high:+.4f}, paired by example"
    if found.low <= 0 <= found.high:
        text += ": within the noise"
    return text


def core_rows(result: CoreResult) -> list[tuple[str, ...]]:
    """The table of tasks as rows of text, in the order of COLUMNS."""
    return [_row(label, task) for label, task in result.tasks.items()]


def _row(label: str, task: TaskResult) -> tuple[str, ...]:
    if task.accuracy is None:
        row = (label, "none", "", f"{task.chance:.3f}", str(task.reason))
        return row + ("",) * (len(COLUMNS) - len(row))
    return (
        label,
        f"{task.accuracy:.4f}",
        "" if task.stderr is None else f"{task.stderr:.4f}",
        f"{task.chance:.3f}",
        f"{task.centered:.4f}",
        str(task.n),
        str(task.examples),
        str(task.shots),
        str(task.empty_spans),
        str(task.cropped),
        str(task.malformed),
        human_time(task.seconds),
    )


def as_text(report: Report) -> str:
    """A report for the console."""
    lines = []
    if report.core is not None:
        rows = [COLUMNS, *core_rows(report.core.result)]
        # a reason may be long: it runs over the columns to its right
        widths = [max(len(row[i]) for row in rows if row[1] != "none") for i in range(len(COLUMNS))]
        for row in rows:
            label, *cells = row
            aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([label.ljust(widths[0]), *aligned]))
    lines += sentences(report)
    for sample in report.samples or ():
        lines += [f"--- sample, prompt {sample.prompt!r}", sample.prompt + sample.text]
    return "\n".join(lines)


def as_markdown(report: Report) -> str:
    """A report as a page of Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in report.device.items())
    lines = [f"# {report.title}", "", f"{report.dtype} on {report.ranks} x {machine}", ""]
    lines += [f"- {sentence}" for sentence in sentences(report)]
    lines.append("")
    if report.core is not None:
        rows = [COLUMNS, ("---",) * len(COLUMNS), *core_rows(report.core.result)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    for sample in report.samples or ():
        lines += [f"Prompt {sample.prompt!r}:", ""]
        lines += ["    " + line for line in (sample.prompt + sample.text).split("\n")]
        lines.append("")
    return "\n".join(lines)


def as_csv(report: Report) -> str:
    """A report's numbers, one a line: value, standard error, bounds of the interval, examples."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(("metric", "value", "stderr", "low", "high", "n"))
    if (found := report.bpb) is not None:
        for name in ("bpb", "loss", "perplexity", "seconds"):
            table.writerow((name, getattr(found, name), "", "", "", found.tokens))
    if report.core is not None:
        core = report.core.result
        table.writerow(("core_metric", core.core_metric, "", core.low, core.high, core.n))
        for label, task in core.tasks.items():
            table.writerow((f"core/{label}", task.accuracy, task.stderr, "", "", task.n))
            table.writerow((f"centered_results/{label}", task.centered, "", "", "", task.n))
        if (found := report.difference) is not None:
            values = (found.core_metric, "", found.low, found.high, core.n)
            table.writerow(("core_metric_difference", *values))
    return out.getvalue()
