"""The command line of `nanochat sweep try`. Imports no torch, so that --help is instant."""

import argparse
import re
from dataclasses import dataclass

from nanochat.common import UsageError, path_argument

# the first of runs/seeds.sh and runs/ablation.sh too
FIRST_SEED = 42
MOST_SEEDS = 100
# the second run of an A/A pair has a seed that no first one has
OTHER_SEED = 1_000_000
DESCRIPTION = """\
Is a change better than the baseline? Each pair is a run of the baseline and one of the change with
the same seed and the same data in the same order. After each pair from the third on a sequential
test decides whether another one is needed. Verdicts: keep (better than chance explains), reject
(worse, or a gain of --gain is excluded), undecided (after all pairs), failed (a run failed).
"""
EPILOG = """\
All other flags, such as --depth=4 --data=corpus.txt, are those of train.py for both runs of a pair.
Gains are positive where the change is better: a share of the bits per byte (0.01: 1%), or
a difference of CORE metrics.
--patch: the file is code that the runs execute, so give only one that you trust. It is applied to a
copy of train.py, nanochat/ and tasks/ in FOLDER; what it has for other files is left out.

Started again, it uses the runs that completed and resumes those that were interrupted; trials in
the same FOLDER share their baseline. NPROC, RETRY, TOY and CORE_BUNDLE from the environment are
those of `nanochat sweep --help`.

FOLDER/CHANGE/verdict.json has the verdict too. Exit codes: 0 with any of the first three verdicts;
75 stopped (start it again to continue); 2 wrong usage; 1 a run failed.
"""


@dataclass(frozen=True)
class Metric:
    """What is compared. fact: its name among the Facts. flag: "never measured" is -1 in it.
    relative: gains are shares of the baseline's value, of which a lower one is better; otherwise
    differences, and a higher one is better."""

    fact: str
    flag: str
    relative: bool

    def gain(self, baseline: float, changed: float) -> float:
        """By how much the change is better."""
        return (baseline - changed) / baseline if self.relative else changed - baseline

    def in_words(self, gain: float, sign: str = "+") -> str:
        """A gain for people."""
        return f"{100 * gain:{sign}.2f}%" if self.relative else f"{gain:{sign}.4f}"


METRICS = {
    "val/bpb": Metric("val_bpb", "eval_every", relative=True),
    "core": Metric("core_metric", "core_metric_every", relative=False),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser; what it does not know are flags of train.py."""
    parser = argparse.ArgumentParser(
        prog="nanochat sweep try",
        allow_abbrev=False,
        usage="nanochat sweep try FOLDER [flags of every train.py] (--change=FLAGS | --patch=FILE "
        "| --aa | --measure-noise) [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=path_argument, metavar="FOLDER", help="of all runs")
    parser.add_argument(
        "--change", default="", metavar="FLAGS", help='such as --change="--matrix-lr=0.03"'
    )
    parser.add_argument(
        "--patch", type=path_argument, default="", metavar="FILE", help="as `git diff` writes it"
    )
    parser.add_argument(
        "--aa",
        action="store_true",
        help="change nothing but the seed of the second run: a trial of the test itself",
    )
    parser.add_argument(
        "--measure-noise",
        action="store_true",
        help="train the baseline with all seeds, and write FOLDER/noise.json for later trials",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        default="8",
        metavar="N|S,S,...",
        help=f"most pairs, with seeds from {FIRST_SEED} on, or their seeds (default 8)",
    )
    parser.add_argument("--metric", choices=tuple(METRICS), default="val/bpb")
    parser.add_argument(
        "--gain",
        type=float,
        default=0.01,
        metavar="G",
        help="the gain looked for; reject once it is excluded (default 0.01)",
    )
    parser.add_argument(
        "--min-gain",
        type=float,
        default=0.0,
        metavar="G",
        help="keep only what gains more than this (default 0)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        metavar="SD",
        help="standard deviation of the gain of pairs that differ in the seed alone; otherwise "
        "FOLDER/noise.json, or that of the baseline's runs in the trial",
    )
    parser.add_argument("--json", action="store_true", help="print the verdict, and nothing else")
    return parser


def _seeds(text: str) -> list[int]:
    """argparse type of --seeds."""
    if re.fullmatch(r"\d+(,\d+)+", text):
        found = [int(seed) for seed in text.split(",")]
    elif text.isdigit():
        # cut, since a list of 10^9 seeds would fill the memory before it is refused
        found = list(range(FIRST_SEED, FIRST_SEED + min(int(text), MOST_SEEDS + 1)))
    else:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number, or seeds as in 42,43,44")
    # the second run of an A/A pair must not be the first of another
    if max(found) >= OTHER_SEED:
        raise argparse.ArgumentTypeError(f"{text!r}: give seeds below {OTHER_SEED:,}")
    if not 2 <= len(set(found)) == len(found) <= MOST_SEEDS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give 2 to {MOST_SEEDS} different seeds; one pair has no spread"
        )
    return found


def check_numbers(args: argparse.Namespace) -> None:
    """UsageError for gains and a noise that no test can have; NaN is none of them."""
    # written this way round, the comparisons refuse NaN as well
    if not 0 < args.gain < 1:
        raise UsageError(f"--gain={args.gain}: give a number above 0 and below 1, such as 0.01")
    if not 0 <= args.min_gain < args.gain:
        raise UsageError(
            f"--min-gain={args.min_gain}: give 0 or more, and less than --gain={args.gain}"
        )
    if args.noise is not None and not 0 < args.noise < 1:
        raise UsageError(f"--noise={args.noise}: give a number above 0 and below 1, such as 0.005")
