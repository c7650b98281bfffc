"""`nanochat report RUN`: a run's summary, its curves as a picture, and all of it as one page.

Only reads the run's files. What is damaged or missing in them becomes a line on the page."""

import argparse
import base64
import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat.common import (
    EXIT_COMPLETED,
    UsageError,
    human_bytes,
    human_time,
    path_argument,
    printable,
    valid_unicode,
    write_atomic,
)
from nanochat.run import plots
from nanochat.run.folder import run_argument
from nanochat.run.records import RunRecord, dig, finite_number, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# steps whose samples are on the page, at most: the first, the last, and some between
SAMPLE_STEPS = 40
# readable on white and on dark
BLUE = "#3d7fc4"
ORANGE = "#D55E00"


def main(argv: list[str]) -> int:
    """Print the summary, write loss.png and report.html; with --result print one line. Returns 0.

    UsageError if RUN is not a run folder or the two files cannot be written."""
    parser = argparse.ArgumentParser(
        prog="nanochat report",
        allow_abbrev=False,
        description="Print a run's summary, plot its curves (loss.png), and write both, with its "
        "settings, samples and evaluations, as one self-contained page (report.html).",
    )
    parser.add_argument(
        "run",
        type=run_argument,
        metavar="RUN",
        help="run folder: <out-dir>/<model-tag>, or the tag of one in out",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default="",
        metavar="FOLDER",
        help="where the two files go; empty: the run folder",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--json",
        action="store_true",
        help="print the summary as JSON, nothing rounded; the two files are written all the same",
    )
    shown.add_argument(
        "--result",
        action="store_true",
        help="write nothing and print one line, RESULT name=value ..., with CORE and its 95%% "
        "interval if it was measured, from RUN/evaluations where possible",
    )
    args = parser.parse_args(argv)
    if args.result:
        print(printable(result_line(read_run(args.run, evaluations_first=True))))
        return EXIT_COMPLETED
    run = read_run(args.run)
    folder = Path(args.out or args.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot = "none: there is no training step to plot yet"
        # the page is written in any case: a run that failed at its start is worth reading about
        if run.steps_logged:
            # replaced atomically: somebody may look at the picture of a run that is still training
            plot = folder / "loss.png"
            write_atomic(plot, plots.png(lambda figure: draw_loss_picture(figure, run), 11, 4.4))
        page = folder / "report.html"
        write_atomic(page, as_page(run))
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"{folder} cannot be written ({reason}); name another folder with --out"
        ) from None
    if args.json:
        files = {"plot": str(plot) if run.steps_logged else None, "page": str(page)}
        print(json.dumps(as_json(run) | files, indent=2))
        return EXIT_COMPLETED
    # names of folders and reasons are other people's text, and may hold control characters
    for name, value in [*summary_rows(run), ("plot", plot), ("page", page)]:
        print(printable(f"{name:<29} {value}"))
    for problem in run.problems:
        print(printable(f"problem: {problem}"))
    return EXIT_COMPLETED


# ---- words ----


def summary_rows(run: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of what a run came to."""
    reason = f" ({run.reason})" if run.reason else ""
    # the steps of a time budget are not known before its speed has been measured
    planned = "?" if run.steps is None else f"{run.steps:,}"
    rows = [
        ("status", run.status + reason),
        ("steps", f"{run.step or 0:,} of {planned}, {run.tokens or 0:,} tokens"),
        ("training time", _time_and_speed(run)),
        ("val_bpb", _bpb_and_best(run)),
    ]
    # the newest, with its reason if it has no metric: an older number would be misleading
    if run.cores:
        rows.append(("CORE", run.cores[0].in_words()))
    if compressors := run.compressed_bpb:
        sizes = ", ".join(f"{name} {bits:.3f}" for name, bits in compressors.items())
        rows.append(("compressors on the same text", sizes))
    return rows


def as_json(run: RunRecord) -> dict[str, Any]:
    """The summary as data. What is unknown is None."""
    return {
        "name": run.name,
        "status": run.status,
        "reason": run.reason,
        "step": run.step,
        "steps": run.steps,
        **_numbers(run),
        "min_val_bpb": run.min_val_bpb,
        "peak_memory_bytes": run.peak_memory_bytes,
        "compressed_bpb": run.compressed_bpb,
        "problems": run.problems,
    }


def result_line(run: RunRecord) -> str:
    """RESULT name=value ...: what a run came to, for programs to read. What is unknown is null."""
    words = [f"{name}={_exact(value)}" for name, value in _numbers(run).items()]
    return " ".join(["RESULT", f"status={run.status}", *words])


def _numbers(run: RunRecord) -> dict[str, int | float | None]:
    """What a run came to, by name."""
    values: dict[str, int | float | None] = {
        name: getattr(run, name)
        for name in (
            "val_bpb",
            "val_loss",
            "tokens",
            "total_training_flops",
            "total_training_time",
            "tok_per_sec",
            "mfu",
        )
    }
    # most runs never measure it
    if run.core is not None:
        values["core"] = run.core.core_metric
        values["core_low"] = run.core.low
        values["core_high"] = run.core.high
    return values


def _exact(value: float | None) -> str:
    """A number for programs: whole numbers as they are, others to six digits; null for None."""
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shown(value: float | None, form: str, before: str = "", after: str = "") -> str:
    """A number in a format, between two texts; nothing at all for None."""
    return "" if value is None else f"{before}{value:{form}}{after}"


def _time_and_speed(run: RunRecord) -> str:
    """Training time, tokens a second, MFU and peak memory, those that are known."""
    time = "none"
    if run.total_training_time is not None:
        time = human_time(run.total_training_time)
    speed = "no steps yet"
    if run.tok_per_sec:
        speed = f"{run.tok_per_sec:,.0f} tokens/s{shown(run.mfu, '.1f', ', ', '% MFU')}"
    memory = ""
    if run.peak_memory_bytes:
        memory = f", peak memory {human_bytes(run.peak_memory_bytes)}"
    return f"{time}, {speed}{memory}"


def _bpb_and_best(run: RunRecord) -> str:
    """The last val_bpb and the lowest."""
    if run.val_bpb is None:
        return "none"
    # both, since a last value above the best one tells of overfitting
    return f"{run.val_bpb:.4f}{shown(run.min_val_bpb, '.4f', ' (best ', ')')}"


# ---- pictures ----


def draw_loss_picture(figure: "Figure", run: RunRecord) -> None:
    """loss.png: training loss and bits per byte."""
    left, right = figure.subplots(1, 2)
    draw_loss(left, run)
    draw_bpb(right, run)
    # the two are read together, step by step
    right.set_xlim(left.get_xlim())
    left.set_title(f"{run.name}: training")
    right.set_title(f"{run.name}: validation")


def draw_steps(axes: "Axes", run: RunRecord, name: str, title: str) -> None:
    """A metric of every step, and smoothed, with its last smoothed value in the corner."""
    x, y = plots.points(run.lines, name)
    axes.set(xlabel="step", ylabel=title)
    if not len(x):
        plots.say(axes, "none")
        return
    # the raw values stay visible behind it, since smoothing alone would hide spikes
    smooth = plots.Curve(x, plots.smoothed(y), None, plots.Look(BLUE, "-"))
    axes.plot(x, y, color=BLUE, linewidth=0.7, alpha=0.35)
    plots.draw_curves(axes, [smooth], labels=False)
    # neither the first steps nor single outliers set the range
    low, high = axes.get_ylim()
    late = y[x >= min(plots.EARLY * x[-1], x[-1])]
    usual_low, usual_high = np.quantile(late, [0.01, 0.99])
    room = 0.1 * (usual_high - usual_low)
    axes.set_ylim(min(low, usual_low - room), max(high, usual_high + room))
    # the smoothed value, since the last step on its own may be an outlier
    last = smooth.y[-1]
    axes.set_title(
        f"{last:,.0f}" if abs(last) >= 1000 else f"{last:#.4g}",
        loc="right",
        color=BLUE,
        fontsize=11,
        fontweight="bold",
    )


def draw_loss(axes: "Axes", run: RunRecord) -> None:
    """Training loss of each step and smoothed."""
    draw_steps(axes, run, "train/loss", "training loss, nats a token")


def draw_bpb(axes: "Axes", run: RunRecord) -> None:
    """Bits per byte of held-out text, next to what compressors reach on the same text."""
    x, y = plots.points(run.lines, "val/bpb")
    axes.set(xlabel="step", ylabel="bits per byte of held-out text")
    if not len(x):
        plots.say(axes, "not evaluated yet")
        return
    axes.plot(x, y, color=ORANGE, marker="o", markersize=3.5, linewidth=1.6)
    # beside the axes, where no curve can cover it
    axes.text(
        1.015,
        y[-1],
        f"{y[-1]:.4f}",
        transform=axes.get_yaxis_transform(),
        va="center",
        color=ORANGE,
        fontweight="bold",
    )
    # two dashes: more compressors than two have never been recorded
    for (name, bits), dash in zip(run.compressed_bpb.items(), ("--", ":"), strict=False):
        axes.axhline(bits, color=plots.GREY, linestyle=dash, linewidth=1.2)
        axes.annotate(
            f"{name} {bits:.2f}",
            (0.005, bits),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(0, 3),
            color=plots.GREY,
            fontsize=9.5,
        )
    axes.margins(y=0.12)
    # evaluations begin after some steps; the axis begins with training
    axes.set_xlim(left=min(0, x[0]))


def draw_rate(axes: "Axes", run: RunRecord) -> None:
    """The learning rate as it is, from zero."""
    x, y = plots.points(run.lines, "train/lr")
    axes.plot(x, y, color=BLUE, linewidth=1.7)
    axes.set(xlabel="step", ylabel="learning rate")
    # a rate is read against 0, to see how far it has decayed
    axes.set_ylim(bottom=0)


def draw_grad_norm(axes: "Axes", run: RunRecord) -> None:
    """The norm of the gradient before clipping."""
    draw_steps(axes, run, "train/grad_norm", "gradient norm")


def draw_speed(axes: "Axes", run: RunRecord) -> None:
    """Tokens a second of all devices."""
    draw_steps(axes, run, "train/tok_per_sec", "tokens a second")


def draw_mfu(axes: "Axes", run: RunRecord) -> None:
    """The share of the hardware's peak that the model's FLOPs are."""
    draw_steps(axes, run, "train/mfu", "model FLOPs utilisation, percent")


@dataclass(frozen=True)
class Picture:
    """A picture of the page. metric: without which there is nothing to draw."""

    title: str
    metric: str
    draw: Callable[["Axes", RunRecord], None]


PICTURES = (
    Picture("Training loss", "train/loss", draw_loss),
    Picture("Bits per byte", "val/bpb", draw_bpb),
    Picture("Learning rate of the matrices", "train/lr", draw_rate),
    Picture("Gradient norm", "train/grad_norm", draw_grad_norm),
    Picture("Speed", "train/tok_per_sec", draw_speed),
    Picture("MFU", "train/mfu", draw_mfu),
)


# ---- the page ----

# no scripts, no fonts, no addresses: the page has to work offline, years later, as an attachment
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f6f9; --card: #ffffff; --text: #1d2530; --soft: #5b6675; --line: #dde2ea;
  --mark: #0063a3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --card: #161b22; --text: #e6e9ee; --soft: #9aa5b4; --line: #2d3540;
    --mark: #6cb6f0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 16px;
  background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 8px 0 0; overflow-wrap: anywhere; }
h2 { margin: 32px 0 10px; font-size: 1.25em; }
p { margin: 6px 0; }
.soft { color: var(--soft); overflow-wrap: anywhere; }
.numbers {
  display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
}
.card, figure, details, .table {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
}
.card { padding: 10px 14px; }
.card b { display: block; font-size: 1.35em; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: .85em; }
.curves {
  display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr));
}
figure { margin: 0; padding: 10px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-weight: 600; margin: 0 4px 4px; }
.problems {
  border-left: 4px solid #d08700; padding: 8px 14px;
  background: var(--card); overflow-wrap: anywhere;
}
.table { overflow-x: auto; }
table {
  border-collapse: collapse; width: 100%;
  font-size: .92em; font-variant-numeric: tabular-nums;
}
th, td {
  text-align: left; vertical-align: top;
  padding: 5px 12px; border-bottom: 1px solid var(--line);
}
td { overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.right th:not(:first-child), .right td:not(:first-child) { text-align: right; white-space: nowrap; }
.right td:first-child { white-space: nowrap; }
details { margin: 8px 0; padding: 8px 14px; }
summary { cursor: pointer; font-weight: 600; }
pre {
  margin: 8px 0 14px; padding-left: 12px; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88em;
}
pre b { color: var(--mark); }
"""


def as_page(run: RunRecord) -> str:
    """The page as HTML: one file, with its pictures in it."""
    name = escaped(run.name)
    parts = [
        f"<h1>{name}</h1>",
        f"<p class=soft>{escaped(run.path)}</p>",
        f"<p><b>{escaped(run.status)}</b> {escaped(run.reason)}</p>",
        headline(run),
        problem_list(run.problems),
    ]
    # empty axes would look like a fault of the page, so a picture without data is left out
    pictures = [
        figure(picture, run)
        for picture in PICTURES
        if len(plots.points(run.lines, picture.metric)[0])
    ]
    if pictures:
        parts += ["<h2>Curves</h2>", f"<div class=curves>{''.join(pictures)}</div>"]
    # from results to details; a part that has nothing to show is an empty string
    parts += [core_part(run), evaluations_part(run), samples_part(run), settings_part(run)]
    # samples may hold lone surrogates, which cannot be written as UTF-8
    return valid_unicode(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def escaped(value: Any) -> str:
    """Text for HTML. Control characters, which HTML cannot hold, become visible ones."""
    return "".join(map(_visible, html.escape(str(value))))


def _visible(char: str) -> str:
    """The character, or Unicode's picture of a control character."""
    # U+2400 and the characters after it picture the control characters in their own order
    if ord(char) < 32 and char not in "\n\t":
        return chr(0x2400 + ord(char))
    if "\x7f" <= char < "\xa0":
        # DEL, and the control characters from U+0080 on, of which Unicode has no pictures
        return "\u2421"
    return char


@dataclass(frozen=True)
class Card:
    """A number that comes first on the page: its name, its value, and a note below it."""

    name: str
    value: str
    note: str = ""

    def as_html(self) -> str:
        """The card as an element."""
        return (
            f"<div class=card><span>{escaped(self.name)}</span><b>{escaped(self.value)}</b>"
            f"<span>{escaped(self.note)}</span></div>"
        )


def headline(run: RunRecord) -> str:
    """The numbers that come first, each in a card."""
    cards = [*_score_cards(run), *_size_cards(run), *_cost_cards(run)]
    return f"<div class=numbers>{''.join(card.as_html() for card in cards)}</div>"


def _score_cards(run: RunRecord) -> Iterable[Card]:
    """What the run reached, as far as it is known."""
    if run.val_bpb is not None:
        best = shown(run.min_val_bpb, ".4f", "best ")
        yield Card("bits per byte", f"{run.val_bpb:.4f}", best)
    if run.cores and run.cores[0].core_metric is not None:
        core = run.cores[0]
        error = "" if core.low is None else f"95%: {core.low:.4f} to {core.high:.4f}; "
        yield Card("CORE", f"{core.core_metric:.4f}", f"{error}n = {core.n:,}")


def _size_cards(run: RunRecord) -> Iterable[Card]:
    """How large the run is, as far as it is known."""
    if run.parameters is not None:
        yield Card("parameters", f"{run.parameters:,}", f"depth {run.depth}")
    if run.step is not None:
        yield Card("steps", f"{run.step:,}", shown(run.steps, ",", "of "))
    if run.tokens is not None:
        yield Card("tokens", f"{run.tokens:,}")
    if run.total_training_flops:
        yield Card("FLOPs", f"{run.total_training_flops:.3g}")


def _cost_cards(run: RunRecord) -> Iterable[Card]:
    """What the run took, as far as it is known."""
    if run.total_training_time is not None:
        yield Card("training time", human_time(run.total_training_time))
    if run.tok_per_sec:
        mfu = shown(run.mfu, ".1f", after="% MFU")
        yield Card("tokens a second", f"{run.tok_per_sec:,.0f}", mfu)
    if run.peak_memory_bytes:
        yield Card("peak memory", human_bytes(run.peak_memory_bytes))
    if skipped := finite_number(run.summary.get("skipped_steps")):
        yield Card("skipped steps", f"{skipped:,}", "non-finite numbers")


def problem_list(problems: list[str]) -> str:
    """What could not be read."""
    if not problems:
        return ""
    lines = "".join(f"<p>{escaped(problem)}</p>" for problem in problems)
    return f"<div class=problems>{lines}</div>"


def figure(picture: Picture, run: RunRecord) -> str:
    """A curve for light pages and one for dark ones, of which a browser shows the fitting one."""

    def data(dark: bool) -> str:
        # one image for each kind of page, since a PNG cannot follow the reader's colour scheme
        image = plots.png(lambda figure: picture.draw(figure.subplots(), run), 6.4, 3.5, dark=dark)
        return f"data:image/png;base64,{base64.b64encode(image).decode()}"

    # inside the page rather than next to it, so that the page can be sent as one file
    title = escaped(picture.title)
    return (
        f"<figure><figcaption>{title}</figcaption><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{data(dark=True)}">'
        f'<img alt="{title} of {escaped(run.name)} by step" src="{data(dark=False)}">'
        f"</picture></figure>"
    )


def as_table(heading: Sequence[Any], rows: Iterable[Sequence[Any]], numbers: bool = True) -> str:
    """Rows of values as an HTML table; numbers: align all columns but the first to the right."""
    # escaped here rather than by the callers, so that none of them can forget it
    cells = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    head = ""
    if heading:
        names = "".join(f"<th>{escaped(cell)}</th>" for cell in heading)
        head = f"<thead><tr>{names}</tr></thead>"
    right = " class=right" if numbers else ""
    return f"<div class=table><table{right}>{head}<tbody>{cells}</tbody></table></div>"


def details(summary: str, content: str, is_open: bool = False) -> str:
    """A part that a click opens and closes. content: HTML."""
    tag = "<details open>" if is_open else "<details>"
    return f"{tag}<summary>{escaped(summary)}</summary>{content}</details>"


def core_part(run: RunRecord) -> str:
    """Each CORE result, the first open."""
    if not run.cores:
        return ""
    parts = [
        "<h2>CORE</h2>",
        "<p class=soft>Accuracy ± standard error. Centered is the share of the way from chance to "
        "perfection, CORE the mean of the centered accuracies, its interval a bootstrap over the "
        "examples.</p>",
    ]
    for i, core in enumerate(run.cores):
        rows = [
            (
                label,
                f"{task.accuracy:.4f}",
                shown(task.stderr, ".4f", "± "),
                f"{task.chance:.3f}",
                f"{task.centered:+.4f}",
                f"{task.n:,}",
            )
            for label, task in core.tasks.items()
        ]
        table = as_table(("task", "accuracy", "", "chance", "centered", "n"), rows)
        parts.append(details(core.in_words(), table, is_open=i == 0))
    return "\n".join(parts)


def evaluations_part(run: RunRecord) -> str:
    """What `nanochat evaluate` left in RUN/evaluations: a row for each, and its samples."""
    if not run.evaluations:
        return ""
    rows = []
    texts = ""
    for evaluation in run.evaluations:
        report = evaluation.report
        bpb = finite_number(dig(report, "bpb", "bpb"))
        core, low, high = (
            finite_number(dig(report, "core", name)) for name in ("core_metric", "low", "high")
        )
        rows.append(
            (
                evaluation.file,
                report.get("step", ""),
                shown(bpb, ".4f"),
                shown(core, ".4f"),
                # an evaluation without CORE, or without the answers by example, has no interval
                "" if None in (low, high) else f"{low:.4f} to {high:.4f}",
                dig(report, "core", "n") or "",
            )
        )
        samples = report["samples"] if isinstance(report.get("samples"), list) else []
        drawn = [sample_text(sample) for sample in samples if isinstance(dig(sample, "text"), str)]
        if drawn:
            texts += details(f"samples of {evaluation.file}", "".join(drawn))
    table = as_table(("file", "step", "bits per byte", "CORE", "95%", "n"), rows)
    return f"<h2>Evaluations</h2>\n{table}{texts}"


def samples_part(run: RunRecord) -> str:
    """Samples by step, the newest first and open."""
    by_step: dict[int, list[dict]] = {}
    for sample in run.samples:
        by_step.setdefault(sample["step"], []).append(sample)
    if not by_step:
        return ""
    # thousands of samples would make the page too slow to open
    steps = sorted(by_step)
    # evenly spaced, with both ends; fewer steps than that may round to the same one
    places = np.linspace(0, len(steps) - 1, min(len(steps), SAMPLE_STEPS)).round().astype(int)
    kept = [steps[i] for i in sorted(set(places))]
    note = ""
    if len(kept) < len(steps):
        note = f"<p class=soft>{len(kept)} of {len(steps)} steps that were sampled.</p>"
    parts = ["<h2>Samples</h2>", note]
    for step in reversed(kept):
        texts = "".join(map(sample_text, by_step[step]))
        parts.append(details(f"step {step:,}", texts, is_open=step == kept[-1]))
    return "\n".join(parts)


def sample_text(sample: dict) -> str:
    """A sample, its prompt set off."""
    # samples of earlier versions have no prompt
    prompt = sample["prompt"] if isinstance(sample.get("prompt"), str) else ""
    return f"<pre><b>{escaped(prompt)}</b>{escaped(sample['text'])}</pre>"


def settings_part(run: RunRecord) -> str:
    """config.json as tables."""
    config = run.config
    flags = {
        f"--{name.replace('_', '-')}": value
        for name, value in (dig(config, "args") or {}).items()
        # about a hundred flags, most of which are off
        if value is not False and value not in (-1, "", None)
    }
    # what has no table of its own; a new dict in config.json needs a line below to be shown
    other = {
        name: value
        for name, value in config.items()
        if name not in ("args", "format") and not isinstance(value, dict)
    }
    tables = (
        ("Flags (those that are off, -1 or empty are left out)", flags),
        ("Plan", config.get("plan")),
        ("Model", config.get("model")),
        ("Data", config.get("data")),
        ("Tokenizer", config.get("tokenizer")),
        ("Runtime", config.get("runtime")),
        ("Hardware", config.get("hardware")),
        ("Versions", config.get("versions")),
        ("Started from", config.get("init_from")),
        ("Forked from", config.get("forked_from")),
        ("Averaged from", config.get("averaged_from")),
        ("Other", other),
    )
    parts = [
        details(title, as_table((), flat(values), numbers=False))
        for title, values in tables
        if isinstance(values, dict) and values
    ]
    return "\n".join(["<h2>Settings</h2>", *parts]) if parts else ""


def flat(values: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """(name, text) of a dict's values; names in dicts inside it follow that of the dict."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{before}{name} ")
        else:
            rows.append((f"{before}{name}", _value_text(value)))
    return rows


def _value_text(value: Any) -> str:
    """A setting as text: numbers for reading, the rest as in JSON."""
    if isinstance(value, str):
        return value
    # True is an int in Python
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value)
