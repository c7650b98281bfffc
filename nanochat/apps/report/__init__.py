"""`nanochat report RUN`: a run's summary, its curves as a picture, and all of it as one page.

Only reads the run's files. What is damaged or missing in them becomes a line on the page."""

import argparse
import json
from pathlib import Path

from nanochat.apps.report.page import as_page
from nanochat.apps.report.pictures import draw_loss_picture
from nanochat.apps.report.words import as_json, result_line, summary_rows
from nanochat.common import EXIT_COMPLETED, UsageError, path_argument, printable, write_atomic
from nanochat.run import plots
from nanochat.run.folder import run_argument
from nanochat.run.records import read_run


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
