"""`nanochat report RUN`: a run's summary, its curves as a picture, and all of it as one page.

Only reads the run's files; what is damaged or missing in them becomes a line on the page. With
--stages it loads the checkpoints instead, and draws from them what another page compares."""

import argparse
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from nanochat.apps.report.page import as_page
from nanochat.apps.report.pictures import draw_loss_picture
from nanochat.apps.report.words import as_json, result_line, summary_rows
from nanochat.common import (
    EXIT_COMPLETED,
    UsageError,
    add_model_flags,
    path_argument,
    printable,
    valid_unicode,
    write_atomic,
)
from nanochat.run import plots
from nanochat.run.folder import run_argument
from nanochat.run.records import read_run

# of --stages without steps
ALL = "all"
# flags that mean nothing without --stages
OF_STAGES = ("prompt", "max_tokens", "seed", "device_type", "dtype")


def build_parser() -> argparse.ArgumentParser:
    """All options of the app."""
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
        help="where the files go; empty: the run folder",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--json",
        action="store_true",
        help="print the summary as JSON, nothing rounded; the files are written all the same",
    )
    shown.add_argument(
        "--result",
        action="store_true",
        help="write nothing and print one line, RESULT name=value ..., with CORE and its 95%% "
        "interval if it was measured, from RUN/evaluations where possible",
    )
    _add_stage_flags(parser)
    return parser


def _add_stage_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the stages of a training")
    add = group.add_argument
    add(
        "--stages",
        nargs="?",
        const=ALL,
        type=stages_argument,
        metavar="STEPS",
        help="write another page instead, stages.html, with a column for each checkpoint: its "
        "losses, and what it writes at three temperatures. --stages=100,500,2000 shows these "
        "steps, --stages after RUN all permanent checkpoints",
    )
    # bytes of the command line that are not UTF-8 arrive as lone surrogates
    add(
        "--prompt",
        type=valid_unicode,
        default="",
        metavar="TEXT",
        help="text that each of them continues; empty: a new document",
    )
    add(
        "--max-tokens",
        type=int,
        default=300,
        metavar="N",
        help="new tokens of each text at most (default %(default)s)",
    )
    add("--seed", type=int, default=42, metavar="N", help="of all texts (default %(default)s)")
    add_model_flags(group)


def stages_argument(text: str) -> str | list[int]:
    """argparse type of --stages: steps separated by commas, or all. ValueError for other text."""
    if text == ALL:
        return text
    return [int(word) for word in text.split(",") if word.strip()]


def main(argv: list[str]) -> int:
    """Print the summary, write loss.png and report.html; with --result print one line; with
    --stages print the losses of checkpoints and write stages.html. Returns 0.

    UsageError if RUN is not a run folder or the files cannot be written."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.stages is not None:
        return _stages(args)
    _refuse_flags_of_stages(args, parser)
    if args.result:
        print(printable(result_line(read_run(args.run, evaluations_first=True))))
        return EXIT_COMPLETED
    run = read_run(args.run)
    folder = Path(args.out or args.run)
    plot = "none: there is no training step to plot yet"
    # the page is written in any case: a run that failed at its start is worth reading about
    if run.steps_logged:
        plot = folder / "loss.png"
        _write(plot, plots.png(lambda figure: draw_loss_picture(figure, run), 11, 4.4))
    page = folder / "report.html"
    _write(page, as_page(run))
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


def _write(path: Path, content: str | bytes) -> None:
    """Write a file and the folder that it is in. UsageError where that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # replaced atomically: somebody may look at it while the run is still training
        write_atomic(path, content)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"{path.parent} cannot be written ({reason}); name another folder with --out"
        ) from None


def _refuse_flags_of_stages(args: Namespace, parser: argparse.ArgumentParser) -> None:
    """UsageError for flags that would change nothing."""
    given = [name for name in OF_STAGES if getattr(args, name) != parser.get_default(name)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"{flags}: belongs to --stages; add that, or leave it out")


def _stages(args: Namespace) -> int:
    """main() with --stages."""
    # here, not above: they import torch, which --help and the other page do not need
    from nanochat.apps.report import stages

    if problems := _problems_of_stages(args):
        raise UsageError("\n".join(problems))
    run = read_run(args.run)
    asked: Sequence[int] | None = None
    if args.stages != ALL:
        asked = args.stages
    drawing = stages.Drawing(args.prompt, args.max_tokens, args.seed, args.device_type, args.dtype)
    drawn = stages.stages_of(run, stages.steps_of_stages(run, asked), drawing)
    page = Path(args.out or args.run) / "stages.html"
    _write(page, stages.as_page(run, drawn, drawing))
    if args.json:
        print(json.dumps(stages.as_json(run, drawn, page), indent=2))
    else:
        print(printable(stages.in_words(drawn, page)))
    return EXIT_COMPLETED


def _problems_of_stages(args: Namespace) -> list[str]:
    """A message for every flag that is unusable with --stages, whatever the run is."""
    problems = []
    if args.result:
        problems.append("--result: cannot be combined with --stages; leave out one of the two")
    if not args.stages:
        problems.append("--stages: names no step; give some, or the flag alone for all")
    if args.max_tokens < 1:
        problems.append(f"--max-tokens={args.max_tokens}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        problems.append(f"--seed={args.seed}: must be from 0 to 2^63 - 1")
    return problems
