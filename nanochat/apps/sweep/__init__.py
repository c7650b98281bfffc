"""`nanochat sweep KIND FOLDER [flags] < lines`: train the runs of a sweep, then compare them;
`nanochat sweep try FOLDER [flags] --change=...`: is a change better than the baseline?"""

import argparse
import contextlib
import sys
from pathlib import Path

from nanochat.common import path_argument

# command.py concludes each of them: scaling_laws by its fit, the others by CONCLUSIONS
KINDS = ("miniseries", "scaling_laws", "seeds", "ablation", "landing")
DESCRIPTION = """\
Train the runs of a sweep one after another, then show their results. Standard input has a line
NAME: FLAGS for each run, in the order of training; the flags after FOLDER (such as --depth=4) are
those of train.py, for every run. NAME is the run's folder within FOLDER, such as d4 or 1e18/d4.

kinds:
  miniseries    compares the runs with `nanochat compare`
  scaling_laws  fits the best model for each budget of FLOPs; runs are named BUDGET/dDEPTH
  seeds         prints mean and standard deviation
  ablation      compares variants with `baseline`, paired by seed; runs are named VARIANT/seedSEED
  landing       compares runs that were landed with runs that were planned for that length, named
                TEXT/landed-STEP and TEXT/planned-STEP

nanochat sweep try FOLDER is another command, which reads no lines: a change against a baseline,
paired by seed, with one verdict as early as possible; nanochat sweep try --help explains it.
"""
EPILOG = """\
Started again, it skips the runs that completed, resumes those that were interrupted, and leaves
failed runs alone unless RETRY=1. Several processes may work on one FOLDER: each trains a run that
no other holds. The console output of a run is in train.log in its folder.

from the environment:
  NPROC=N             processes of each run; above 1 it is started by torchrun
  RETRY=1             train failed runs again
  TOY=1               toy size, for a quick try
  CORE_BUNDLE=FOLDER  measure CORE at the end of each run
  PREDICT=D           scaling_laws: predict, then train, a depth (10) or a budget in FLOPs (2e13)

FOLDER/results.json has all results as data, and --json prints it, with all else on standard error.
Exit codes: 0; 75 stopped (start it again to continue); 2 wrong usage; 1 a run failed.
"""


def main(argv: list[str]) -> int:
    """Train and compare the runs that standard input names. Returns the exit code.

    UsageError for wrong flags, lines or settings, before anything is trained."""
    if argv[:1] == ["try"]:
        return _try(argv[1:])
    parser = argparse.ArgumentParser(
        prog="nanochat sweep",
        allow_abbrev=False,
        # argparse would print "..." for the flags, and could not know of standard input
        usage="nanochat sweep [--json] KIND FOLDER [flags of every train.py] < lines",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", metavar="KIND", choices=KINDS, help=" | ".join(KINDS))
    parser.add_argument(
        "folder", type=path_argument, metavar="FOLDER", help="parent of the run folders"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    # left unparsed: these are train.py's flags, which its own parser checks
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of every train.py")
    args = parser.parse_args(argv)
    # train.py's flag checks import torch, which takes seconds and which --help does not need
    import os

    from nanochat.apps.sweep.command import sweep
    from nanochat.apps.sweep.settings import Settings
    from nanochat.apps.sweep.train_runs import Stop

    stop = Stop()
    # from here on Ctrl-C must not end this process before the training that it started
    stop.listen()
    # among the flags of train.py it could only belong to --dry-run, which trains nothing
    given = [word for word in args.flags if word != "--json"]
    as_json = args.json or len(given) < len(args.flags)
    settings = Settings.read(args.kind, args.folder, given, os.environ)
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        code = sweep(settings, sys.stdin.read(), stop)
    if as_json:
        print(Path(settings.folder, "results.json").read_text(encoding="utf-8"), end="", flush=True)
    return code


def _try(argv: list[str]) -> int:
    """`nanochat sweep try`."""
    from nanochat.apps.sweep.trial_flags import build_parser

    args, given = build_parser().parse_known_args(argv)
    # imports torch
    from nanochat.apps.sweep.trial import try_change

    return try_change(args, given)
