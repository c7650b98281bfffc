"""`nanochat report RUN`: a run's summary in words, its curves as a picture, and all of it as one page. Only reads the run's files.

read_run() is how `nanochat compare` reads a run as well. A file that is damaged or missing becomes a line in `problems`."""

import argparse
import base64
import html
import json
import os
from pathlib import Path

import numpy as np

from nanochat.apps.runs import DAMAGES, describe
from nanochat.common import (
    EXIT_COMPLETED,
    UsageError,
    human_bytes,
    human_time,
    in_a_line,
    printable,
    read_json,
    valid_unicode,
    write_atomic,
)
from nanochat.run import plots
from nanochat.run.log import FORMAT, RunFolder, lines_of, parsed
from nanochat.run.plots import number

SAMPLE_STEPS = (
    40  # steps whose samples are on the page, at most: the first, the last, and some between
)
BLUE, ORANGE = "#3d7fc4", "#D55E00"  # readable on white and on dark


def main(argv):
    """Print the summary, write loss.png and report.html. Returns 0; UsageError if RUN is no run folder or cannot be written."""
    parser = argparse.ArgumentParser(
        prog="nanochat report",
        allow_abbrev=False,
        description="Print a run's summary, plot its curves (loss.png) and put both, its settings, samples and evaluations on one page "
        "without outside parts (report.html).",
    )
    parser.add_argument("run", metavar="RUN", help="run folder: <out-dir>/<model-tag>")
    parser.add_argument(
        "--out", default="", metavar="FOLDER", help="where the two files go; empty: the run folder"
    )
    args = parser.parse_args(argv)
    run = read_run(args.run)
    folder = Path(args.out or args.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot = "none: there is no training step to plot yet"
        if run["steps_logged"]:
            plot = folder / "loss.png"
            write_atomic(plot, plots.png(lambda figure: draw_loss_picture(figure, run), 11, 4.4))
        page = folder / "report.html"
        write_atomic(page, as_page(run))
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror or error}); name another folder with --out"
        ) from None
    for name, value in [*summary_rows(run), ("plot", plot), ("page", page)]:
        print(printable(f"{name:<29} {value}"))
    for problem in run["problems"]:
        print(printable(f"problem: {problem}"))
    return EXIT_COMPLETED


# ---- reading ----


def read_run(path):
    """What a run folder holds, as a dict; what is damaged is left out and told in `problems`. UsageError if nothing can be shown.

    path, name; config, summary: dicts, {} where unreadable; lines: of metrics.jsonl; samples; cores: CORE results, newest of training
    first, then those of RUN/evaluations; evaluations: [(file name, report of `nanochat evaluate`)]; problems: sentences;
    status ("unknown" where not even that can be read), reason, step, steps, depth, parameters, tokens, total_training_flops,
    total_training_time, val_bpb, min_val_bpb, tok_per_sec, mfu, peak_memory_bytes: None where there is none; steps_logged."""
    path, problems = Path(path), []
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; name a run folder, for example out/d4")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UsageError(
            f"{path}: cannot be read (permission denied); ask its owner, or name another run folder"
        )
    if not (path / "config.json").exists() and not RunFolder(path).remains():
        below = sorted(folder.parent.name for folder in path.glob("*/config.json"))
        raise UsageError(
            f"{path}: holds no run"
            + (
                f"; the folders in it do: {', '.join(below[:5])}"
                if below
                else "; name a run folder, for example out/d4"
            )
        )
    config, summary = (
        _object(path / "config.json", problems),
        _object(path / "summary.json", problems),
    )
    if config and (config.get("format") != FORMAT or not isinstance(config.get("args"), dict)):
        why = (
            f"has format {config['format']}, this version reads format {FORMAT}"
            if "format" in config
            else "is not of this program"
        )
        problems.append(f"config.json {why}")
        config = {}
    lines, samples, answers = (
        _lines(path / f"{name}.jsonl", problems) for name in ("metrics", "samples", "core")
    )
    if not config and not lines and "status" not in summary:
        raise UsageError(f"{path}: nothing to show ({'; '.join(problems) or 'no file of a run'})")
    run = {
        "path": str(path),
        "name": printable(path.resolve().name),
        "config": config,
        "summary": summary,
        "lines": lines,
        "problems": problems,
        "samples": [line for line in samples if isinstance(line.get("text"), str)],
    }
    try:
        described = describe(path)
    except (*DAMAGES, RecursionError) as error:
        described = {}
        if not problems:
            problems.append(
                f"config.json or summary.json: {'no ' * isinstance(error, KeyError)}{in_a_line(error)}"
            )
    last = lines[-1] if lines else {}
    run |= {
        "status": str(described.get("status", "unknown")),
        "reason": str(described.get("reason", "")),
        "depth": number(dig(config, "args", "depth")),
        "parameters": number(dig(config, "plan", "parameters", "total")),
        "steps": number(dig(config, "plan", "num_iterations")),
    }
    for name in (
        "step",
        "tokens",
        "total_training_flops",
        "total_training_time",
    ):  # the summary waits for evaluations
        told = number(summary.get(name))
        run[name] = max(
            [value for value in (told, number(last.get(name))) if value is not None], default=None
        )
    run |= {
        name: number(summary.get(name))
        for name in ("min_val_bpb", "tok_per_sec", "mfu", "peak_memory_bytes")
    }
    run["val_bpb"] = number(summary.get("val_bpb"))
    if not summary:  # what the lines know
        _, bpb = plots.points(lines, "val/bpb")
        if len(bpb):
            run |= {"val_bpb": float(bpb[-1]), "min_val_bpb": float(bpb.min())}
    run["steps_logged"] = sum(number(line.get("train/loss")) is not None for line in lines)
    run["evaluations"] = _evaluations(path / "evaluations", problems)
    run["cores"] = _cores(run, answers)
    return run


def dig(value, *names):
    """value[name][name]...; None where that is not there."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _object(path, problems):
    """The JSON object of a file; {} and a problem where there is none."""
    try:
        value = read_json(path, "run folder")
    except (UsageError, RecursionError) as error:
        problems.append(in_a_line(error).removeprefix("run folder: "))
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} holds no JSON object")
    return value if isinstance(value, dict) else {}


def _lines(path, problems):
    """The objects of a .jsonl file; problems say what of it cannot be read. A torn last line is what a killed run leaves: no problem."""
    try:
        rows = lines_of(path) if path.exists() else [""]
        values = [parsed(row) for row in rows]
    except (OSError, RecursionError) as error:
        problems.append(f"{path} cannot be read ({in_a_line(error)})")
        return []
    if damaged := sum(
        value is None and bool(row.strip())
        for row, value in zip(rows[:-1], values[:-1], strict=True)
    ):
        problems.append(f"{path}: {damaged} of its lines cannot be read and are left out")
    return [value for value in values if value is not None]


def _evaluations(folder, problems):
    """[(file name, report)] of `nanochat evaluate`, in the order of their steps."""
    found = []
    for path in sorted(folder.glob("*.json")):
        told = len(problems)
        report = _object(path, problems)
        if any(isinstance(report.get(part), dict) for part in ("core", "bpb")) or isinstance(
            report.get("samples"), list
        ):
            found.append((path.name, report))
        elif len(problems) == told:
            problems.append(f"{path} is no result of `nanochat evaluate`")
    return sorted(found, key=lambda item: (number(item[1].get("step")) or 0, len(item[0]), item[0]))


def _cores(run, answers):
    """CORE results as dicts: the newest of core.jsonl, then those of RUN/evaluations, newest first.

    source; step; tasks: {label: entry}; core_metric, low, high (95% bootstrap), None with a reason; n; baselines; max_per_task."""
    newest, found = answers[-1]["step"] if answers else None, []
    if answers:
        mine = [line for line in answers if line["step"] == newest]
        found.append(
            core_result(
                f"core.jsonl, step {newest}",
                newest,
                {str(line.get("label")): line for line in mine},
                mine[0].get("baselines"),
                dig(run["config"], "args", "core_metric_max_per_task"),
            )
        )
    for name, report in reversed(run["evaluations"]):
        tasks = dig(report, "core", "tasks")
        if isinstance(tasks, dict) and tasks:
            found.append(
                core_result(
                    f"evaluations/{name}",
                    number(report.get("step")),
                    tasks,
                    report["core"].get("baselines"),
                    report["core"].get("max_per_task"),
                )
            )
    return found


def core_result(source, step, tasks, baselines, max_per_task):
    """One CORE result from its tasks' entries, of which those that are damaged are left out."""
    from tasks.core import LABELS, interval, metric

    good = {label: tasks[label] for label in LABELS if label in tasks and _is_task(tasks[label])}
    result = {
        "source": source,
        "step": step,
        "tasks": good,
        "core_metric": None,
        "low": None,
        "high": None,
        "reason": "",
        "n": sum(task["n"] for task in good.values()),
        "baselines": baselines,
        "max_per_task": max_per_task,
    }
    if len(good) < len(LABELS):
        return result | {
            "reason": f"{len(LABELS) - len(good)} of {len(LABELS)} tasks are missing in {source}"
        }
    result["core_metric"] = metric(good.values())
    if all(has_answers(task) for task in good.values()):
        result["low"], result["high"] = interval(good)
    return result


def _is_task(task):
    """Whether an entry of a CORE result has the numbers of one."""
    return (
        isinstance(task, dict)
        and all(number(task.get(name)) is not None for name in ("accuracy", "centered", "chance"))
        and isinstance(task.get("n"), int)
        and 0 <= task["chance"] < 1
    )


def has_answers(task):
    """Whether a task's entry says which examples were answered right, as an interval needs."""
    correct = task.get("correct")
    return (
        isinstance(correct, str)
        and len(correct) == task["n"] > 0
        and not set(correct) - {"0", "1"}
        and isinstance(task.get("fingerprint"), str)
        and isinstance(task.get("file"), str)
    )


# ---- words ----


def summary_rows(run):
    """[(name, value)] of what a run came to."""
    time = "none" if run["total_training_time"] is None else human_time(run["total_training_time"])
    speed = (
        "no steps yet"
        if not run["tok_per_sec"]
        else f"{run['tok_per_sec']:,.0f} tokens/s"
        + (f", {run['mfu']:.1f}% MFU" if run["mfu"] is not None else "")
    )
    memory = (
        f", peak memory {human_bytes(run['peak_memory_bytes'])}" if run["peak_memory_bytes"] else ""
    )
    planned = "?" if run["steps"] is None else f"{run['steps']:,}"
    rows = [
        ("status", run["status"] + (f" ({run['reason']})" if run["reason"] else "")),
        ("steps", f"{run['step'] or 0:,} of {planned}, {run['tokens'] or 0:,} tokens"),
        ("training time", f"{time}, {speed}{memory}"),
        (
            "val_bpb",
            "none"
            if run["val_bpb"] is None
            else f"{run['val_bpb']:.4f}"
            + ("" if run["min_val_bpb"] is None else f" (best {run['min_val_bpb']:.4f})"),
        ),
    ]
    if run["cores"]:
        rows.append(("CORE", core_in_words(run["cores"][0])))
    if compressors := compressors_of(run):
        rows.append(
            (
                "compressors on the same text",
                ", ".join(f"{name} {bits:.3f}" for name, bits in compressors.items()),
            )
        )
    return rows


def core_in_words(core):
    """A CORE result in one line."""
    if core["core_metric"] is None:
        return f"none: {core['reason']}"
    error = "" if core["low"] is None else f", 95% interval {core['low']:.4f} to {core['high']:.4f}"
    return f"{core['core_metric']:.4f}{error}, n = {core['n']:,} ({core['source']})"


def compressors_of(run):
    """{name: bits per byte} of compressors on the held-out text."""
    found = dig(run["config"], "data", "compressed_bpb")
    return (
        {str(name): bits for name, bits in found.items() if number(bits) is not None}
        if isinstance(found, dict)
        else {}
    )


# ---- pictures ----


def draw_loss_picture(figure, run):
    """loss.png: training loss and bits per byte."""
    left, right = figure.subplots(1, 2)
    draw_loss(left, run)
    draw_bpb(right, run)
    right.set_xlim(left.get_xlim())
    left.set_title(f"{run['name']}: training")
    right.set_title(f"{run['name']}: validation")


def draw_loss(axes, run):
    """Training loss of each step and smoothed."""
    draw_steps(axes, run, "train/loss", "training loss, nats a token")


def draw_steps(axes, run, name, title):
    """A metric of every step, and smoothed. The first steps do not set the range, single outliers do not either."""
    x, y = plots.points(run["lines"], name)
    axes.set(xlabel="step", ylabel=title)
    if not len(x):
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center")
        return
    smooth = {"x": x, "y": plots.smoothed(y), "sd": None, "color": BLUE, "dash": "-"}
    axes.plot(x, y, color=BLUE, linewidth=0.7, alpha=0.35)
    plots.draw_curves(axes, [smooth], labels=False)
    low, high = axes.get_ylim()
    late = y[x >= min(plots.EARLY * x[-1], x[-1])]
    usual_low, usual_high = np.quantile(late, [0.01, 0.99])
    room = 0.1 * (usual_high - usual_low)
    axes.set_ylim(min(low, usual_low - room), max(high, usual_high + room))
    last = smooth["y"][-1]  # of the smoothed curve
    axes.set_title(
        f"{last:,.0f}" if abs(last) >= 1000 else f"{last:#.4g}",
        loc="right",
        color=BLUE,
        fontsize=11,
        fontweight="bold",
    )


def draw_bpb(axes, run):
    """Bits per byte of held-out text, beside what compressors reach."""
    x, y = plots.points(run["lines"], "val/bpb")
    axes.set(xlabel="step", ylabel="bits per byte of held-out text")
    if not len(x):
        axes.text(0.5, 0.5, "not evaluated yet", transform=axes.transAxes, ha="center", va="center")
        return
    axes.plot(x, y, color=ORANGE, marker="o", markersize=3.5, linewidth=1.6)
    axes.text(
        1.015,
        y[-1],
        f"{y[-1]:.4f}",
        transform=axes.get_yaxis_transform(),
        va="center",
        color=ORANGE,
        fontweight="bold",
    )
    for (name, bits), dash in zip(compressors_of(run).items(), ("--", ":"), strict=False):
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
    axes.set_xlim(left=min(0, x[0]))


def draw_plain(axes, run, name, title):
    """A metric of every step as it is."""
    x, y = plots.points(run["lines"], name)
    axes.plot(x, y, color=BLUE, linewidth=1.7)
    axes.set(xlabel="step", ylabel=title)
    axes.set_ylim(bottom=0)


CURVES = (  # title, the metric without which there is no such picture, what draws it
    ("Training loss", "train/loss", draw_loss),
    ("Bits per byte", "val/bpb", draw_bpb),
    (
        "Learning rate of the matrices",
        "train/lr",
        lambda axes, run: draw_plain(axes, run, "train/lr", "learning rate"),
    ),
    (
        "Gradient norm",
        "train/grad_norm",
        lambda axes, run: draw_steps(axes, run, "train/grad_norm", "gradient norm"),
    ),
    (
        "Speed",
        "train/tok_per_sec",
        lambda axes, run: draw_steps(axes, run, "train/tok_per_sec", "tokens a second"),
    ),
    (
        "MFU",
        "train/mfu",
        lambda axes, run: draw_steps(axes, run, "train/mfu", "model FLOPs utilisation, percent"),
    ),
)


# ---- the page ----

STYLE = """
:root { color-scheme: light dark; --page: #f4f6f9; --card: #ffffff; --text: #1d2530; --soft: #5b6675; --line: #dde2ea; --mark: #0063a3; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #161b22; --text: #e6e9ee; --soft: #9aa5b4; --line: #2d3540; --mark: #6cb6f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--page); color: var(--text);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 8px 0 0; overflow-wrap: anywhere; } h2 { margin: 32px 0 10px; font-size: 1.25em; }
p { margin: 6px 0; } .soft { color: var(--soft); overflow-wrap: anywhere; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; }
.card, figure, details, .table { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 10px 14px; } .card b { display: block; font-size: 1.35em; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: .85em; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 10px; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-weight: 600; margin: 0 4px 4px; }
.problems { border-left: 4px solid #d08700; padding: 8px 14px; background: var(--card); overflow-wrap: anywhere; }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92em; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } tr:last-child td { border-bottom: 0; }
.right th:not(:first-child), .right td:not(:first-child) { text-align: right; white-space: nowrap; }
.right td:first-child { white-space: nowrap; }
details { margin: 8px 0; padding: 8px 14px; } summary { cursor: pointer; font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88em; margin: 8px 0 14px; padding-left: 12px;
      border-left: 3px solid var(--line); }
pre b { color: var(--mark); }
"""


def as_page(run):
    """The page as HTML: one file, with its pictures in it."""
    name = escaped(run["name"])
    parts = [
        f"<h1>{name}</h1>",
        f"<p class=soft>{escaped(run['path'])}</p>",
        f"<p><b>{escaped(run['status'])}</b> {escaped(run['reason'])}</p>",
        headline(run),
        problem_list(run["problems"]),
    ]
    pictures = [
        figure(title, draw, run)
        for title, metric, draw in CURVES
        if len(plots.points(run["lines"], metric)[0])
    ]
    if pictures:
        parts += ["<h2>Curves</h2>", f"<div class=curves>{''.join(pictures)}</div>"]
    parts += [core_part(run), evaluations_part(run), samples_part(run), settings_part(run)]
    return valid_unicode(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{name}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def escaped(value):
    """Text for HTML. Control characters, which HTML cannot hold, become visible ones."""
    text = html.escape(str(value))
    return "".join(
        chr(0x2400 + ord(c))
        if ord(c) < 32 and c not in "\n\t"
        else "\u2421"
        if "\x7f" <= c < "\xa0"
        else c
        for c in text
    )


def headline(run):
    """The numbers that come first, each in a card; what there is none of is left out."""
    core = run["cores"][0] if run["cores"] else {"core_metric": None}
    cards = []

    def card(name, value, note=""):
        cards.append(
            f"<div class=card><span>{escaped(name)}</span><b>{escaped(value)}</b><span>{escaped(note)}</span></div>"
        )

    if run["val_bpb"] is not None:
        card(
            "bits per byte",
            f"{run['val_bpb']:.4f}",
            "" if run["min_val_bpb"] is None else f"best {run['min_val_bpb']:.4f}",
        )
    if core["core_metric"] is not None:
        error = "" if core["low"] is None else f"95%: {core['low']:.4f} to {core['high']:.4f}; "
        card("CORE", f"{core['core_metric']:.4f}", f"{error}n = {core['n']:,}")
    if run["parameters"] is not None:
        card("parameters", f"{run['parameters']:,}", f"depth {run['depth']}")
    if run["step"] is not None:
        card("steps", f"{run['step']:,}", "" if run["steps"] is None else f"of {run['steps']:,}")
    if run["tokens"] is not None:
        card("tokens", f"{run['tokens']:,}")
    if run["total_training_flops"]:
        card("FLOPs", f"{run['total_training_flops']:.3g}")
    if run["total_training_time"] is not None:
        card("training time", human_time(run["total_training_time"]))
    if run["tok_per_sec"]:
        card(
            "tokens a second",
            f"{run['tok_per_sec']:,.0f}",
            "" if run["mfu"] is None else f"{run['mfu']:.1f}% MFU",
        )
    if run["peak_memory_bytes"]:
        card("peak memory", human_bytes(run["peak_memory_bytes"]))
    if skipped := number(run["summary"].get("skipped_steps")):
        card("skipped steps", f"{skipped:,}", "non-finite numbers")
    return f"<div class=numbers>{''.join(cards)}</div>"


def problem_list(problems):
    """What could not be read."""
    return (
        f"<div class=problems>{''.join(f'<p>{escaped(problem)}</p>' for problem in problems)}</div>"
        if problems
        else ""
    )


def figure(title, draw, run):
    """A curve as a picture for light pages and one for dark ones, of which a browser shows the fitting one."""
    light, dark = (
        base64.b64encode(
            plots.png(lambda figure: draw(figure.subplots(), run), 6.4, 3.5, dark=dark)
        ).decode()
        for dark in (False, True)
    )
    return (
        f'<figure><figcaption>{escaped(title)}</figcaption><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{dark}"><img alt="{escaped(title)} of {escaped(run["name"])} by step" '
        f'src="data:image/png;base64,{light}"></picture></figure>'
    )


def as_table(heading, rows, numbers=True):
    """Rows of text as an HTML table; numbers: all columns but the first are right-aligned."""
    cells = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    head = (
        f"<thead><tr>{''.join(f'<th>{escaped(cell)}</th>' for cell in heading)}</tr></thead>"
        if heading
        else ""
    )
    return f"<div class=table><table{' class=right' if numbers else ''}>{head}<tbody>{cells}</tbody></table></div>"


def core_part(run):
    """Each CORE result, the first open."""
    if not run["cores"]:
        return ""
    parts = [
        "<h2>CORE</h2>",
        "<p class=soft>Accuracy ± standard error; centered is the share of the way from chance to perfection; "
        "CORE is the mean of the centered, its interval a bootstrap over the examples.</p>",
    ]
    for i, core in enumerate(run["cores"]):
        rows = [
            (
                label,
                f"{task['accuracy']:.4f}",
                "" if number(task.get("stderr")) is None else f"± {task['stderr']:.4f}",
                f"{task['chance']:.3f}",
                f"{task['centered']:+.4f}",
                f"{task['n']:,}",
            )
            for label, task in core["tasks"].items()
        ]
        parts.append(
            f"<details{'' if i else ' open'}><summary>{escaped(core_in_words(core))}</summary>"
            + as_table(("task", "accuracy", "", "chance", "centered", "n"), rows)
            + "</details>"
        )
    return "\n".join(parts)


def evaluations_part(run):
    """What `nanochat evaluate` left in RUN/evaluations: a row each, and its samples."""
    if not run["evaluations"]:
        return ""
    rows, drawn = [], ""
    for name, report in run["evaluations"]:
        bpb, core = number(dig(report, "bpb", "bpb")), number(dig(report, "core", "core_metric"))
        low, high = number(dig(report, "core", "low")), number(dig(report, "core", "high"))
        rows.append(
            (
                name,
                report.get("step", ""),
                "" if bpb is None else f"{bpb:.4f}",
                "" if core is None else f"{core:.4f}",
                "" if None in (low, high) else f"{low:.4f} to {high:.4f}",
                dig(report, "core", "n") or "",
            )
        )
        samples = report["samples"] if isinstance(report.get("samples"), list) else []
        if texts := "".join(
            sample_text(sample) for sample in samples if isinstance(dig(sample, "text"), str)
        ):
            drawn += f"<details><summary>samples of {escaped(name)}</summary>{texts}</details>"
    return (
        "<h2>Evaluations</h2>\n"
        + as_table(("file", "step", "bits per byte", "CORE", "95%", "n"), rows)
        + drawn
    )


def samples_part(run):
    """Samples by step, the newest first and open."""
    by_step = {}
    for sample in run["samples"]:
        by_step.setdefault(sample["step"], []).append(sample)
    steps = sorted(by_step)
    if not steps:
        return ""
    kept = [
        steps[i]
        for i in sorted(
            set(np.linspace(0, len(steps) - 1, min(len(steps), SAMPLE_STEPS)).round().astype(int))
        )
    ]
    less = (
        f"<p class=soft>{len(kept)} of {len(steps)} steps that were sampled.</p>"
        if len(kept) < len(steps)
        else ""
    )
    return "\n".join(
        [
            "<h2>Samples</h2>",
            less,
            *(
                f"<details{' open' if step == kept[-1] else ''}><summary>step {step:,}</summary>"
                + "".join(map(sample_text, by_step[step]))
                + "</details>"
                for step in reversed(kept)
            ),
        ]
    )


def sample_text(sample):
    """A sample, its prompt set off."""
    prompt = sample["prompt"] if isinstance(sample.get("prompt"), str) else ""
    return f"<pre><b>{escaped(prompt)}</b>{escaped(sample['text'])}</pre>"


def settings_part(run):
    """config.json as tables."""
    config, parts = run["config"], []
    flags = {
        name: value
        for name, value in (dig(config, "args") or {}).items()
        if value is not False and value not in (-1, "", None)
    }
    other = {
        name: value
        for name, value in config.items()
        if name not in ("args", "format") and not isinstance(value, dict)
    }
    for title, value in (
        ("Flags (those that are off, -1 or empty are left out)", flags),
        ("Plan", config.get("plan")),
        ("Model", config.get("model")),
        ("Data", config.get("data")),
        ("Tokenizer", config.get("tokenizer")),
        ("Runtime", config.get("runtime")),
        ("Hardware", config.get("hardware")),
        ("Versions", config.get("versions")),
        ("Started from", config.get("init_from")),
        ("Other", other),
    ):
        if isinstance(value, dict) and value:
            shown = (
                [(f"--{name.replace('_', '-')}", text) for name, text in flat(value)]
                if value is flags
                else flat(value)
            )
            parts.append(
                f"<details><summary>{escaped(title)}</summary>{as_table((), shown, numbers=False)}</details>"
            )
    return "\n".join(["<h2>Settings</h2>", *parts]) if parts else ""


def flat(values, before=""):
    """[(name, text)] of a dict; names in dicts inside it follow that of the dict."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{before}{name} ")
        else:
            rows.append(
                (
                    f"{before}{name}",
                    f"{value:,}"
                    if isinstance(value, int) and not isinstance(value, bool)
                    else f"{value:.6g}"
                    if isinstance(value, float)
                    else value
                    if isinstance(value, str)
                    else json.dumps(value),
                )
            )
    return rows
