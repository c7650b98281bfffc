"""A run as one self-contained page of HTML: its numbers, curves, samples and settings."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat.apps.report.pictures import PICTURES, Picture
from nanochat.apps.report.words import shown
from nanochat.common import human_bytes, human_time, valid_unicode
from nanochat.run import plots
from nanochat.run.records import RunRecord, dig, finite_number

# steps whose samples are on the page, at most: the first, the last, and some between
SAMPLE_STEPS = 40

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
    parts = [
        f"<h1>{escaped(run.name)}</h1>",
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
    return document(run.name, parts)


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole file of HTML. parts: elements, or "" for those that have nothing to show. style: CSS
    that only this page needs."""
    # samples may hold lone surrogates, which cannot be written as UTF-8
    return valid_unicode(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n"
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n"
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


# ---- results first ----


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


# ---- tables, and parts that open ----


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


# ---- parts of a run's page ----


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
