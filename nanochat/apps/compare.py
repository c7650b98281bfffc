"""`nanochat compare RUN ...`: runs side by side, and which of their differences exceed the noise.

Runs whose settings differ in nothing but the seed are a group: its numbers are a mean ± a standard
deviation over its seeds. There are two kinds of noise: which examples CORE was measured on (a
bootstrap paired by example, one run each side), and which seed was trained (Welch's t-test, several
runs each side). Only reads the runs; writes pictures. With --identical: whether two runs are equal
in every number."""

import argparse
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    UsageError,
    ceil_div,
    counted,
    human_time,
    in_a_line,
    path_argument,
    printable,
    write_atomic,
)
from nanochat.run import plots
from nanochat.run.flags import flag
from nanochat.run.folder import RunFolder, run_argument
from nanochat.run.groups import Group, examples_of, group_runs, names, shared_steps
from nanochat.run.records import CoreResult, CoreTask, RunRecord, dig, finite_number, read_run
from nanochat.run.statistics import (
    CONFIDENCE,
    Spread,
    joint_confidence,
    spread,
    two_sided_quantile,
    welch,
)
from nanochat.run.tables import aligned, fixed, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# every name that draw() writes: what is left of an earlier comparison is found by these
PICTURES = ("curves.png", "core.png", "core_tasks.png")
# up to so many runs or groups every pair is printed; of more each is compared with the best
ALL_PAIRS = 8


def main(argv: list[str]) -> int:
    """Compare, print, draw. Returns 0, or 1 if a folder could not be read; with --identical 1 if
    the runs differ.

    UsageError if none of them could, or if the pictures cannot be written."""
    args = _parser().parse_args(argv)
    if args.identical:
        return _identical(args)
    if not args.no_plots:
        _refuse_run_folder(args.out)
    runs, problems = read_runs(args.runs, args.evaluations)
    # a folder that is named twice, or by a link, counts once
    all_read = len(runs) == len({os.path.realpath(path) for path in args.runs})
    if not runs:
        raise UsageError("no run to compare: " + "; ".join(problems))
    # pictures come before words, so that a folder that cannot be written is refused with nothing
    # printed
    comparison = compare(runs)
    pictures: list[Path] = []
    if not args.no_plots:
        pictures = draw(comparison.groups, Path(args.out))
        # a picture of other runs in the same folder would be taken for one of these
        comparison.warnings.extend(_stale_pictures(Path(args.out), pictures))
    if args.json:
        shown = comparison.as_json() | {
            "problems": problems,
            "pictures": [str(path) for path in pictures],
        }
        print(json.dumps(shown, indent=2))
    else:
        for lines in (
            *comparison.paragraphs(args.per_task),
            [f"warning: {line}" for line in comparison.warnings],
            [f"problem: {line}" for line in problems],
            [f"picture: {path}" for path in pictures],
        ):
            if lines:
                print(printable("\n".join(lines) + "\n"))
    return EXIT_COMPLETED if all_read else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanochat compare",
        allow_abbrev=False,
        description="Compare runs: a table, which differences exceed the noise, what makes the "
        "runs incomparable, and pictures of their curves and CORE results. Runs that differ only "
        "in their seed become a mean with its spread.",
    )
    parser.add_argument(
        "runs",
        type=run_argument,
        metavar="RUN",
        nargs="+",
        help="run folders, such as out/d4, or their tags: d4",
    )
    parser.add_argument(
        "--per-task",
        action="store_true",
        help="also print CORE accuracy ± standard error by task",
    )
    parser.add_argument(
        "--evaluations",
        action="store_true",
        help="take CORE from RUN/evaluations where core.jsonl has it as well",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default="compare",
        metavar="FOLDER",
        help="where the pictures go (default: %(default)s)",
    )
    parser.add_argument("--no-plots", action="store_true", help="draw no pictures")
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables, nothing rounded"
    )
    parser.add_argument(
        "--identical",
        action="store_true",
        help="of two runs: whether their records, but for times, and the weights and the optimizer "
        "state of their last checkpoints are equal; exit code 1 and the first differences if not",
    )
    return parser


def _identical(args: argparse.Namespace) -> int:
    """Print what of two runs is equal, and what differs. Returns 0 if nothing does, else 1.

    UsageError for other flags, more or fewer runs, or folders without a run."""
    # the others choose what is compared or how it is shown, which is fixed here
    others = {
        "--per-task": args.per_task,
        "--evaluations": args.evaluations,
    }
    problems = [
        f"{name}: has no effect with --identical; leave it out" for name in others if others[name]
    ]
    if len(args.runs) != 2:
        problems.append(f"--identical: compares two runs, not {len(args.runs)}; name two")
    if problems:
        raise UsageError("\n".join(problems))
    # it imports torch
    from nanochat.run.identity import compare_runs

    found = compare_runs(*map(Path, args.runs))
    if args.json:
        print(json.dumps(asdict(found), indent=2))
        return EXIT_FAILED if found.different else EXIT_COMPLETED
    for words, parts in (("equal", found.equal), ("DIFFERENT", found.different)):
        for part in parts:
            print(printable(f"{words}  {part}"))
    return EXIT_FAILED if found.different else EXIT_COMPLETED


def _refuse_run_folder(out: str) -> None:
    """UsageError if the pictures would be written into a run."""
    if (Path(out) / "config.json").exists() or RunFolder(out).remains():
        raise UsageError(f"--out={out}: holds a run, and runs are only read; name another folder")


def _stale_pictures(out: Path, written: list[Path]) -> list[str]:
    """A sentence for each picture of an earlier comparison that was not replaced."""
    paths = [out / name for name in PICTURES]
    return [
        f"{path} is of an earlier comparison; these runs have nothing to draw in it"
        for path in paths
        if path.exists() and path not in written
    ]


def read_runs(
    paths: Sequence[str | Path], evaluations_first: bool = False
) -> tuple[list[RunRecord], list[str]]:
    """(runs with distinct names, problems) of folders, each read once."""
    runs: list[RunRecord] = []
    problems: list[str] = []
    for path in dict.fromkeys(os.path.realpath(path) for path in paths):
        try:
            run = read_run(path, evaluations_first)
        except UsageError as error:
            problems.append(str(error))
            continue
        # problems name files within the folder, and here there are several folders
        problems += [f"{path}: {line.removeprefix(path + os.sep)}" for line in run.problems]
        if run.core and run.core.reason:
            problems.append(f"{path}: no CORE metric: {run.core.reason}")
        runs.append(run)
    # names are the keys of everything that follows
    distinct = distinct_names([run.path for run in runs])
    return [replace(run, name=name) for run, name in zip(runs, distinct, strict=True)], problems


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path; of paths that end alike, as many as tell them apart."""
    all_parts = [Path(path).parts for path in paths]
    found = []
    for own in all_parts:
        depth = 1
        # the whole path tells them apart at the latest, since each folder is read once
        while depth < len(own) and sum(p[-depth:] == own[-depth:] for p in all_parts) > 1:
            depth += 1
        found.append(printable(os.path.join(*own[-depth:])))
    return found


# ---- differences and their noise ----


@dataclass(frozen=True)
class Difference:
    """`second` minus `first` (names of runs or groups) in val_bpb or CORE.

    difference is None if the two cannot be compared; low and high are None if its noise is not
    known; `reason` then says why. confidence: of this interval alone."""

    first: str
    second: str
    difference: float | None
    low: float | None
    high: float | None
    confidence: float
    reason: str

    def line(self, noise: str, basis: str = "") -> str:
        """The difference in words. basis: what the interval rests on."""
        text = f"  {self.second} - {self.first}:"
        if self.difference is None:
            return f"{text} cannot be compared: {self.reason}"
        text += f" {self.difference:+.4f}"
        if self.low is None:
            return f"{text}, no interval: {self.reason}"
        # an interval that holds 0 is compatible with no difference at all
        exceeds = self.low > 0 or self.high < 0
        verdict = f"{'more than' if exceeds else 'within'} {noise}"
        return f"{text}, {self.low:+.4f} to {self.high:+.4f}{basis}: {verdict}"


@dataclass(frozen=True)
class ExampleDifference(Difference):
    """A difference in CORE of two runs, whose noise is that of the n examples."""

    n: int

    def in_words(self) -> str:
        """The difference, and whether it exceeds the noise."""
        return self.line("the noise of the examples")

    def as_json(self) -> dict[str, Any]:
        """What --json prints of it."""
        return {
            # `from` is a keyword of Python, so the fields have other names than the keys
            "from": self.first,
            "to": self.second,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "n": self.n,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class SeedDifference(Difference):
    """A difference of two groups, whose noise is that of the seeds.

    n: seeds of the first and of the second group; df: degrees of freedom of the interval, None
    without an interval or without any spread."""

    n: tuple[int, int]
    df: float | None

    def in_words(self) -> str:
        """The difference, and whether it exceeds the noise."""
        freedom = f"{self.df:.1f} degrees of freedom" if self.df is not None else "no spread at all"
        # in the order of the subtraction
        basis = f" (n = {self.n[1]} and {self.n[0]} seeds, {freedom})"
        return self.line("the noise of the seeds", basis)

    def as_json(self) -> dict[str, Any]:
        """What --json prints of it."""
        return {
            "from": self.first,
            "to": self.second,
            "n": list(self.n),
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "df": self.df,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Score:
    """A number by which groups are compared.

    values: those of a group's members; incomparable(a, b): why two runs cannot be compared by it,
    "" if nothing is known against it; sign: 1 if more is better, else -1."""

    title: str
    values: Callable[[Group], list[float]]
    incomparable: Callable[[RunRecord, RunRecord], str]
    sign: int

    def spread(self, group: Group) -> Spread:
        """Mean and standard deviation over a group's seeds."""
        return spread(self.values(group))


def _why_not_bpb(a: RunRecord, b: RunRecord) -> str:
    """Why val_bpb of two runs cannot be compared."""
    same_data = dig(a.config, "data", "fingerprint") == dig(b.config, "data", "fingerprint")
    # other training text with the same held-out text is a fair comparison
    if not same_data and held_out(a) != held_out(b):
        return "the held-out texts differ"
    # fewer tokens are the beginning of the held-out text, not a random part of it
    if dig(a.config, "args", "eval_tokens") != dig(b.config, "args", "eval_tokens"):
        return "--eval-tokens differs"
    return ""


def _why_not_core(a: RunRecord, b: RunRecord) -> str:
    """Why CORE of two runs cannot be compared."""
    if examples_of(a.core) == examples_of(b.core):
        return ""
    return "measured on different examples or from different chance levels"


BPB = Score("val_bpb", Group.bpb_values, _why_not_bpb, sign=-1)
CORE = Score("CORE", Group.core_values, _why_not_core, sign=1)


def seed_differences(groups: Sequence[Group], score: Score) -> list[SeedDifference]:
    """The differences between all pairs of groups; with an interval where both have two seeds."""
    # only groups with two seeds have an interval, and only intervals can claim too much
    several = sum(len(score.values(group)) > 1 for group in groups)
    confidence = joint_confidence(math.comb(several, 2))
    with_values = [group for group in groups if score.values(group)]
    return [
        _seed_difference(a, b, score, confidence) for a, b in itertools.combinations(with_values, 2)
    ]


def _seed_difference(a: Group, b: Group, score: Score, confidence: float) -> SeedDifference:
    of_a = score.values(a)
    of_b = score.values(b)
    without = SeedDifference(
        first=a.name,
        second=b.name,
        difference=None,
        low=None,
        high=None,
        confidence=confidence,
        reason=score.incomparable(a.runs[0], b.runs[0]),
        n=(len(of_a), len(of_b)),
        df=None,
    )
    if without.reason:
        return without
    # one number has no spread, so a group of one seed gives no interval
    if min(without.n) >= 2:
        found = welch(of_a, of_b, confidence)
        return replace(
            without, difference=found.difference, low=found.low, high=found.high, df=found.df
        )
    # the mean difference of single runs is shown, for the reader to judge by the hint below
    if without.n == (1, 1):
        reason = "one seed each: no noise known"
    else:
        single = a.name if len(of_a) == 1 else b.name
        reason = f"one seed of {single}: its noise is not known"
    difference = statistics.fmean(of_b) - statistics.fmean(of_a)
    return replace(without, difference=difference, reason=reason)


def core_differences(groups: Sequence[Group]) -> list[ExampleDifference]:
    """Differences in CORE between runs of different groups, by a bootstrap paired by example."""
    members = [[run for run in group.members if run.core_metric is not None] for group in groups]
    # runs of one group differ in nothing but the seed, so pairs within it would answer no question
    pairs = [
        pair
        for first, second in itertools.combinations(members, 2)
        for pair in itertools.product(first, second)
    ]
    # with many pairs the largest of the differences is large by chance
    confidence = joint_confidence(len(pairs))
    return [_core_difference(a, b, confidence) for a, b in pairs]


def _core_difference(a: RunRecord, b: RunRecord, confidence: float) -> ExampleDifference:
    from tasks.core import interval

    low = high = None
    reason = ""
    # runs of earlier versions have accuracies only, and pairing needs the answers themselves
    if not (a.core.has_answers and b.core.has_answers):
        reason = "not every task has its answers by example"
    else:
        try:
            low, high = interval(b.core.tasks, a.core.tasks, confidence)
        # other examples or another chance level: interval() says which
        except ValueError as error:
            reason = str(error)
    return ExampleDifference(
        first=a.name,
        second=b.name,
        difference=b.core_metric - a.core_metric,
        low=low,
        high=high,
        confidence=confidence,
        reason=reason,
        n=b.core.n,
    )


def chance_differences(groups: Sequence[Group], score: Score) -> dict[str, float]:
    """{group: how much two single runs differ by chance alone (95%), by that group's spread}."""
    found = {}
    for group in groups:
        values = score.values(group)
        if len(values) >= 2:
            quantile = two_sided_quantile(len(values) - 1)
            # the difference of two runs varies sqrt(2) times as much as one run
            found[group.name] = math.sqrt(2) * statistics.stdev(values) * quantile
    return found


# ---- the comparison ----


@dataclass(frozen=True)
class Comparison:
    """What is found out about runs: their groups, the differences between these, which of them
    share their beginning, and warnings."""

    runs: list[RunRecord]
    groups: list[Group]
    core: list[ExampleDifference]
    val_bpb: list[SeedDifference]
    core_seeds: list[SeedDifference]
    lineage: list[str]
    warnings: list[str]

    def paragraphs(self, per_task: bool) -> Iterator[list[str]]:
        """The comparison in words: lists of lines, empty where there is nothing to say."""
        yield [table(self.groups)]
        yield self.lineage
        if per_task:
            yield [task_table(self.runs)]
        yield noise_of_examples(self.core)
        of_seeds = noise_of_seeds(self.val_bpb, self.groups, BPB)
        # one seed each says nothing on CORE that the bootstrap has not said
        if chance_differences(self.groups, CORE):
            of_seeds += noise_of_seeds(self.core_seeds, self.groups, CORE)
        yield of_seeds

    def as_json(self) -> dict[str, Any]:
        """What --json prints of it."""
        return {
            "runs": [run_as_json(run) for run in self.runs],
            "groups": [group_as_json(group) for group in self.groups],
            "differences": {
                "core": [entry.as_json() for entry in self.core],
                "val_bpb": [entry.as_json() for entry in self.val_bpb],
                "core_seeds": [entry.as_json() for entry in self.core_seeds],
            },
            "lineage": self.lineage,
            "warnings": self.warnings,
        }


def compare(runs: list[RunRecord]) -> Comparison:
    """Group runs with distinct names, and compare the groups."""
    groups, notes = group_runs(runs)
    return Comparison(
        runs=runs,
        groups=groups,
        core=core_differences(groups),
        val_bpb=seed_differences(groups, BPB),
        core_seeds=seed_differences(groups, CORE),
        lineage=lineage(runs),
        # what makes numbers incomparable first, then what makes them preliminary
        warnings=differences_in_kind(runs) + unfinished(runs) + notes,
    )


def lineage(runs: Sequence[RunRecord]) -> list[str]:
    """A line for each run that was forked from another: where, with which flags, and with which of
    the runs it shares its first steps, which are no two results."""
    lines = []
    for run in runs:
        fork = dig(run.config, "forked_from")
        if not fork:
            continue
        changed = [
            f"{flag(name)}={values[1]} (was {values[0]})"
            for name, values in (dig(fork, "changed") or {}).items()
        ]
        text = f"{run.name}: forked from {dig(fork, 'run')} at step {dig(fork, 'step')}"
        text += f", with {', '.join(changed) or 'the same flags'}"
        shared = [
            f"{steps:,} steps with {other.name}"
            for other in runs
            if other is not run and (steps := shared_steps(run, other))
        ]
        if shared:
            text += f"; its beginning is shared: {', '.join(shared)}"
        lines.append(text)
    return lines


def run_as_json(run: RunRecord) -> dict[str, Any]:
    """What --json prints of a run."""
    fields = "name path status reason seed depth parameters step steps tokens total_training_flops"
    fields += " total_training_time val_bpb min_val_bpb"
    found = {name: getattr(run, name) for name in fields.split()}
    core = None if run.core is None else core_as_json(run.core)
    return found | {"core": core, "forked_from": dig(run.config, "forked_from")}


def core_as_json(core: CoreResult) -> dict[str, Any]:
    """What --json prints of a CORE result: without the answers by example."""
    fields = ("accuracy", "stderr", "centered", "chance", "n", "fingerprint")
    # answers by example are 100 times as long as everything else, and in the runs' own files
    tasks = {
        label: {name: getattr(task, name) for name in fields} for label, task in core.tasks.items()
    }
    # asdict() of the whole would copy the answers
    return asdict(replace(core, tasks={})) | {"tasks": tasks}


def group_as_json(group: Group) -> dict[str, Any]:
    """What --json prints of a group: of a single run as well."""
    return {
        "name": group.name,
        "runs": [run.name for run in group.runs],
        "n": len(group.members),
        "val_bpb": asdict(BPB.spread(group)),
        "core_metric": asdict(CORE.spread(group)),
    }


# ---- warnings ----


def held_out(run: RunRecord) -> str | None:
    """What is known of a run's held-out text: the sizes that compressors make of it."""
    found = dig(run.config, "data", "compressed_bpb")
    if not isinstance(found, dict):
        return None
    # a text that several compressors bring to the same sizes is the same text, from whatever file
    # it was read
    return ", ".join(f"{name} {bits}" for name, bits in sorted(found.items()))


@dataclass(frozen=True)
class Kind:
    """Something in which runs may differ so that their numbers mean different things.

    value: of a run, as shown, None where it is not known; meaning: what follows if it differs."""

    what: str
    value: Callable[[RunRecord], Any]
    meaning: str = ""


def _data_of(run: RunRecord) -> str | None:
    fingerprint = dig(run.config, "data", "fingerprint")
    return fingerprint and f"{dig(run.config, 'data', 'name')} {str(fingerprint)[:12]}"


def _tokenizer_of(run: RunRecord) -> str | None:
    fingerprint = dig(run.config, "tokenizer", "fingerprint")
    kind, size = (dig(run.config, "tokenizer", name) for name in ("kind", "vocab_size"))
    return fingerprint and f"{kind} {size} {str(fingerprint)[:12]}"


def _of_core(value: Callable[[CoreResult], Any]) -> Callable[[RunRecord], Any]:
    """A value of the run's CORE result, None without one or if it is empty."""

    def of_run(run: RunRecord) -> Any:
        if run.core is None or not run.core.tasks:
            return None
        return value(run.core) or None

    return of_run


# in the order in which they are reported
KINDS = (
    Kind("text", _data_of, "trained or validated on different text"),
    Kind("held-out text (as compressed)", held_out, "bits per byte cannot be compared"),
    Kind(
        "tokenizer",
        _tokenizer_of,
        "losses in nats a token cannot be compared, bits per byte can",
    ),
    Kind(
        "--eval-tokens",
        lambda run: dig(run.config, "args", "eval_tokens"),
        "bits per byte are of different amounts of text",
    ),
)
CORE_KINDS = (
    Kind("--max-per-task of CORE", _of_core(lambda core: core.max_per_task)),
    Kind(
        "chance levels of CORE",
        _of_core(lambda core: core.baselines),
        "CORE is on different scales",
    ),
)


def differences_in_kind(runs: Sequence[RunRecord]) -> list[str]:
    """A sentence for each thing that differs and makes numbers of runs mean different things."""
    lines = [_kind_line(runs, kind) for kind in KINDS]
    lines.append(_examples_line(runs))
    lines += [_kind_line(runs, kind) for kind in CORE_KINDS]
    return [line for line in lines if line]


def _by_value(runs: Sequence[RunRecord], kind: Kind) -> dict[str, list[RunRecord]]:
    """The runs that have a value, by that value."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        value = kind.value(run)
        if value is not None:
            found.setdefault(str(value), []).append(run)
    return found


def _kind_line(runs: Sequence[RunRecord], kind: Kind) -> str:
    """How runs differ in something; "" if they do not."""
    by_value = _by_value(runs, kind)
    if len(by_value) < 2:
        return ""
    return _differs(kind.what, by_value, kind.meaning)


def _differs(what: str, by_value: dict[str, list[RunRecord]], meaning: str) -> str:
    values = "; ".join(f"{value} ({names(of)})" for value, of in by_value.items())
    return f"{what} differs: {values}" + (f": {meaning}" if meaning else "")


def _examples_line(runs: Sequence[RunRecord]) -> str:
    """Whether CORE was measured on different examples, which their number need not show."""
    # a run without CORE is not one with other examples
    kinds = {examples_of(run.core) for run in runs if run.core} - {None}
    if len(kinds) < 2:
        return ""
    shown = Kind(
        "examples of CORE",
        _of_core(lambda core: f"{core.n:,} in {len(core.tasks)} tasks ({core.source})"),
    )
    by_value = _by_value(runs, shown)
    meaning = "CORE cannot be paired"
    # what is shown of the examples is too short to tell these apart
    if len(by_value) == 1:
        meaning += "; their number is the same, their fingerprints or chance levels differ"
    return _differs(shown.what, by_value, meaning)


def unfinished(runs: Sequence[RunRecord]) -> list[str]:
    """A sentence for each run that did not complete."""
    lines = []
    for run in runs:
        if run.status != "completed":
            reason = f" ({in_a_line(run.reason)})" if run.reason else ""
            steps = "?" if run.steps is None else f"{run.steps:,}"
            lines.append(
                f"{run.name} did not complete: {run.status}{reason} at step {run.step or 0:,} of "
                f"{steps}; its numbers are not final"
            )
    return lines


# ---- words ----


def table(groups: Sequence[Group]) -> str:
    """Runs as aligned columns; below the runs of a group its mean ± standard deviation."""
    heading = ("run", "depth", "params", "tokens", "FLOPs", "time", "val_bpb", "CORE")
    rows = [(*heading, "95% interval", "n", "status")]
    for group in groups:
        rows += [_row(run) for run in group.runs]
        # a group's row counts only its completed runs; unfinished ones have their own rows above
        if len(group.runs) > 1:
            n = len(group.members)
            bpb = with_spread(group.bpb_values(), n)
            core = with_spread(group.core_values(), n)
            means = ("", "", "", "", "", bpb, core, "", counted(n, "seed"), "mean ± sd")
            rows.append((f"= {group.name}", *means))
    return aligned(rows)


def _row(run: RunRecord) -> tuple[str | None, ...]:
    """A run's row of the table; None where it has no value."""
    interval = n = flops = time = None
    if run.core_metric is not None:
        n = f"{run.core.n:,}"
        if run.core.low is not None:
            interval = f"{run.core.low:.4f} to {run.core.high:.4f}"
    if run.total_training_flops:
        flops = f"{run.total_training_flops:.3g}"
    if run.total_training_time is not None:
        time = human_time(run.total_training_time)
    return (
        run.name,
        None if run.depth is None else str(run.depth),
        short(run.parameters),
        short(run.tokens),
        flops,
        time,
        fixed(run.val_bpb),
        fixed(run.core_metric),
        interval,
        n,
        run.status,
    )


def with_spread(values: Sequence[float], n: int) -> str:
    """1.2345 ± 0.0012: mean and standard deviation, with their number where that is not n."""
    if not values:
        return "-"
    found = spread(values)
    sd = "" if found.sd is None else f" ± {found.sd:.4f}"
    number = "" if found.n == n else f" (n = {found.n})"
    return f"{found.mean:.4f}{sd}{number}"


def labels_of(runs: Sequence[RunRecord]) -> list[str]:
    """The CORE tasks that any run has, in the published order."""
    from tasks.core import LABELS

    # the tasks of a run that was cut short are a part of all tasks
    found = {label for run in runs if run.core for label in run.core.tasks}
    return [label for label in LABELS if label in found]


def task_table(runs: Sequence[RunRecord]) -> str:
    """CORE accuracy ± standard error by task and run, and the source of the numbers."""
    with_core = [run for run in runs if run.core and run.core.tasks]
    if not with_core:
        return "no run has CORE results"
    rows = [("task", "chance", *(run.name for run in with_core))]
    for label in labels_of(with_core):
        tasks = [run.core.tasks.get(label) for run in with_core]
        chances = {f"{task.chance:.3f}" for task in tasks if task}
        rows.append((label, "/".join(sorted(chances)), *map(_accuracy, tasks)))
    sources = [f"{run.name}: CORE {run.core.in_words()}" for run in with_core]
    return "\n".join([aligned(rows), *sources])


def _accuracy(task: CoreTask | None) -> str:
    """Accuracy ± standard error of a task."""
    if task is None:
        return "-"
    error = "" if task.stderr is None else f" ± {task.stderr:.4f}"
    return f"{task.accuracy:.4f}{error}"


def pairs_to_print(
    found: Sequence[Difference], sign: int
) -> tuple[Sequence[Difference], list[str]]:
    """(the differences that are printed, a line that says so if these are not all).

    sign: 1 if more is better, else -1."""
    if len({name for entry in found for name in (entry.first, entry.second)}) <= ALL_PAIRS:
        return found, []
    # the best is what is better than all others by most, summed over the pairs
    totals: dict[str, float] = {}
    for entry in found:
        # a pair that cannot be compared speaks for neither side
        gain = sign * (entry.difference or 0)
        totals[entry.first] = totals.get(entry.first, 0) - gain
        totals[entry.second] = totals.get(entry.second, 0) + gain
    best = max(totals, key=totals.get)
    shown = [entry for entry in found if best in (entry.first, entry.second)]
    return shown, [f"  (only pairs with {best}; --json prints all {len(found)})"]


def intervals_in_words(found: Sequence[Difference]) -> str:
    """What the intervals of these differences are."""
    confidence = found[0].confidence
    if confidence == CONFIDENCE:
        return "95% intervals"
    return f"intervals of {confidence:.2%}, which hold together in 95%"


def noise_of_examples(found: Sequence[ExampleDifference]) -> list[str]:
    """Lines on CORE by the paired bootstrap."""
    if not found:
        return []
    shown, note = pairs_to_print(found, CORE.sign)
    return [
        f"CORE, differences with {intervals_in_words(found)} (bootstrap over the examples, paired; "
        f"without the noise of the seed):",
        *(entry.in_words() for entry in shown),
        *note,
    ]


def noise_of_seeds(
    found: Sequence[SeedDifference], groups: Sequence[Group], score: Score
) -> list[str]:
    """Lines on val_bpb or CORE by Welch's t-test."""
    if not found:
        return []
    method = ""
    if any(entry.low is not None for entry in found):
        method = f" with {intervals_in_words(found)} (Welch's t-test over seeds)"
    shown, note = pairs_to_print(found, score.sign)
    lines = [
        f"{score.title}, differences{method}:",
        *(entry.in_words() for entry in shown),
        *note,
    ]
    # without an interval of its own, the spread of another group is the best guess there is
    if any(entry.low is None and entry.difference is not None for entry in shown):
        lines += [
            f"  hint: by the spread of {group}, two single runs differ by up to {reach:.4f} by "
            f"chance alone (95%); other settings may have another spread"
            for group, reach in chance_differences(groups, score).items()
        ]
    return lines


# ---- pictures ----


@dataclass(frozen=True)
class DrawnGroup:
    """A group and how it is drawn."""

    group: Group
    look: plots.Look


@dataclass(frozen=True)
class Axis:
    """What a curve is drawn against: a name in metrics.jsonl, and its title."""

    name: str
    title: str


STEP = Axis("step", "step")
TIME = Axis("total_training_time", "training time")
FLOPS = Axis("total_training_flops", "training FLOPs")
# the three may rank runs differently: a larger model gains by step and may lose by time
AXES = (STEP, TIME, FLOPS)
# a run with fewer steps does not decide where axes begin
FEW_STEPS = 20
# a curve of at most so many points shows each of them
FEW_POINTS = 40


def draw(groups: Sequence[Group], out: Path) -> list[Path]:
    """Write the pictures that there is something for; returns their paths.

    UsageError if they cannot be written."""
    # a group has one look in all pictures
    looks, scale = plots.looks_of([group.runs[0].depth for group in groups])
    drawn = [DrawnGroup(group, look) for group, look in zip(groups, looks, strict=True)]
    runs = [run for group in groups for run in group.runs]
    pictures = {}
    # imported runs have neither steps nor, perhaps, CORE: then there is nothing to draw
    if any(run.steps_logged for run in runs):
        pictures["curves.png"] = plots.png(
            lambda figure: draw_training(figure, drawn, scale), 17, 9.5
        )
    if any(run.core_metric is not None for run in runs):
        pictures["core.png"] = plots.png(lambda figure: draw_core(figure, drawn, scale), 14, 6)
    if labels := labels_of(runs):
        # half of the tasks on each side, a bar for each group
        height = min(60, 2 + ceil_div(len(labels), 2) * (0.35 + 0.17 * len(groups)))
        pictures["core_tasks.png"] = plots.png(
            lambda figure: draw_tasks(figure, drawn, labels, scale), 15, height
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            write_atomic(out / name, content)
    except OSError as error:
        raise UsageError(
            f"--out={out}: cannot be written ({error.strerror}); name another folder, or add "
            f"--no-plots"
        ) from None
    return [out / name for name in pictures]


def curve_of(drawn: DrawnGroup, name: str, axis: str, unit: float = 1.0) -> plots.Curve:
    """A group's curve of a metric against an axis; training loss is smoothed.

    Over several runs it is the mean at each step, with its spread, at the mean of where the runs
    were on the axis by then: the time that a step takes differs from run to run."""
    members = []
    places = []
    # of a group without a completed run, all of its runs are shown
    for run in drawn.group.members or drawn.group.runs:
        lines = [line for line in run.lines if finite_number(line.get(axis)) is not None]
        steps, y = plots.points(lines, name)
        if len(steps):
            members.append((steps, plots.smoothed(y) if name == "train/loss" else y))
            places.append(plots.points(lines, axis))
    steps, y, sd = plots.mean_of(members)
    # each run's place on the axis at these steps, whether or not it was evaluated there
    x = steps
    if places:
        x = np.mean([np.interp(steps, *place) for place in places], axis=0) / unit
    return plots.Curve(x, y, sd, drawn.look)


def draw_training(
    figure: "Figure", drawn: Sequence[DrawnGroup], scale: plots.ColorScale | None
) -> None:
    """Training loss (above) and bits per byte (below) against step, training time and FLOPs."""
    axes = figure.subplots(2, len(AXES))
    runs = [run for entry in drawn for run in entry.group.runs]
    # unless all runs are that short
    runs = [run for run in runs if run.steps_logged >= FEW_STEPS] or runs
    for column, axis in enumerate(AXES):
        ends = _ends(runs, axis)
        unit = 1
        title = axis.title
        if axis is TIME:
            word, unit = plots.unit_of_time(max(ends, default=0))
            title = f"{title}, {word}"
        for row, (name, label) in enumerate(
            (
                ("train/loss", "training loss (smoothed), nats a token"),
                ("val/bpb", "bits per byte of held-out text"),
            )
        ):
            here = axes[row][column]
            curves = [curve_of(entry, name, axis.name, unit) for entry in drawn]
            if any(curve.sd is not None for curve in curves):
                label += "\nbands: ± standard deviation over seeds"
            if axis is FLOPS:
                # a logarithmic axis has no place for 0
                curves = [curve.where(curve.x > 0) for curve in curves]
            few = max(len(curve.x) for curve in curves) <= FEW_POINTS
            plots.draw_curves(here, curves, marker="o" if few and name == "val/bpb" else "")
            here.set_xlabel(title)
            # the y axes of a row are the same
            if column == 0:
                here.set_ylabel(label)
            if ends:
                _set_range(here, axis, min(ends) / unit, max(ends) / unit)
    plots.add_key(
        figure, list(axes.flat), [(entry.group.name, entry.look) for entry in drawn], scale
    )


def _ends(runs: Sequence[RunRecord], axis: Axis) -> list[float]:
    """Where on an axis the runs end, those that got beyond its beginning."""
    ends = [
        max((finite_number(line.get(axis.name)) or 0 for line in run.lines), default=0)
        for run in runs
    ]
    # 0 has no place on a logarithmic axis
    return [end for end in ends if end]


def _set_range(axes: "Axes", axis: Axis, low: float, high: float) -> None:
    """The range of an x axis on which runs end between low and high.

    Logarithmic where ends differ so much that the shortest run would not be seen."""
    if axis is FLOPS or high > 30 * low:
        # below that, the first few steps of the shortest run would take up most of the axis
        plots.log_scale(axes, "x", low / 50, high * 1.15)
    else:
        axes.set_xlim(0, high * 1.01)


@dataclass(frozen=True)
class Point:
    """A run's CORE in the picture: where on the x axis, which run, and its group."""

    x: float
    run: RunRecord
    drawn: DrawnGroup


def draw_core(
    figure: "Figure", drawn: Sequence[DrawnGroup], scale: plots.ColorScale | None
) -> None:
    """CORE against depth and against FLOPs: a point for each run, with its 95% interval."""
    left, right = figure.subplots(1, 2, sharey=True)
    shown = [
        (run, entry) for entry in drawn for run in entry.group.runs if run.core_metric is not None
    ]
    depths = sorted({run.depth for run, _ in shown if run.depth is not None})
    # the smallest distance between depths is the room for runs of the same depth
    step = min([b - a for a, b in itertools.pairwise(depths)], default=1)
    by_depth = [Point(run.depth, run, entry) for run, entry in shown if run.depth]
    for point in side_by_side(by_depth, step):
        _draw_core_point(left, point)
    by_flops = [
        Point(run.total_training_flops, run, entry)
        for run, entry in shown
        if run.total_training_flops
    ]
    # beyond the colours of the palette there would be more values than room for them
    few = len(drawn) <= len(plots.PALETTE)
    for point in side_by_side(by_flops, 0):
        _draw_core_point(right, point)
        if few:
            _draw_core_value(right, point)
    for axes in (left, right):
        _draw_chance(axes)
    if by_flops:
        flops = [run.total_training_flops for run, _ in shown if run.total_training_flops]
        plots.log_scale(right, "x", min(flops) / 1.6, max(flops) * 2.2)
    left.set(xlabel="depth", ylabel="CORE (95% interval over the examples)", xticks=depths)
    # room for the runs that are moved to the side of the outermost depths
    left.set_xlim(min(depths, default=0) - 0.7 * step, max(depths, default=1) + 0.7 * step)
    note = "\nvalues: of a run, or the mean of its seeds" if few else ""
    right.set_xlabel(f"training FLOPs; runs of about equal FLOPs stand next to each other{note}")
    in_key = [
        (entry.group.name, entry.look)
        for entry in drawn
        if any(run.core_metric is not None for run in entry.group.runs)
    ]
    plots.add_key(figure, [left, right], in_key, scale, "point")


def _draw_core_point(axes: "Axes", point: Point) -> None:
    """A run's CORE with its interval."""
    value = point.run.core_metric
    core = point.run.core
    reach = None
    if core.low is not None:
        # a bootstrap's percentiles need not lie on both sides of the value
        reach = [[max(0, value - core.low)], [max(0, core.high - value)]]
    axes.errorbar(
        point.x,
        value,
        yerr=reach,
        color=point.drawn.look.color,
        fmt=plots.MARKERS[point.drawn.look.dash],
        markersize=7,
        capsize=4,
        elinewidth=1.6,
    )


def _draw_core_value(axes: "Axes", point: Point) -> None:
    """The mean of a group, at the last of its runs."""
    group = point.drawn.group
    values = group.core_values()
    if not values or point.run is not group.members[-1]:
        return
    axes.annotate(
        f"{statistics.fmean(values):.3f}",
        (point.x, point.run.core_metric),
        xytext=(8, 5),
        textcoords="offset points",
        fontsize=10,
        color=point.drawn.look.color,
        fontweight="bold",
    )


def _draw_chance(axes: "Axes") -> None:
    """The level of guessing, 0 by definition."""
    axes.axhline(0, color=plots.GREY, linewidth=1.2, linestyle=":")
    axes.annotate(
        "chance",
        (0.99, 0),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9.5,
        color=plots.GREY,
    )


def side_by_side(points: Sequence[Point], step: float) -> list[Point]:
    """Points whose x agree to 2% moved apart, so that none hides another.

    By parts of `step`; if that is 0 by factors, for a logarithmic axis, of which the outermost two
    are at most 1.2 apart."""
    moved = []
    for point in points:
        alike = [other for other in points if abs(other.x - point.x) <= 0.02 * point.x]
        index = next(i for i, other in enumerate(alike) if other.run is point.run)
        # from -1/2 to 1/2 if there are many; few points stand closer together
        place = (index - (len(alike) - 1) / 2) / max(4, len(alike))
        x = point.x + 0.4 * step * place if step else point.x * 1.2**place
        moved.append(replace(point, x=x))
    return moved


@dataclass(frozen=True)
class TaskBars:
    """The bars of a group: for each of its members with CORE, the results by label."""

    drawn: DrawnGroup
    results: list[dict[str, CoreTask]]

    def of(self, label: str) -> list[CoreTask]:
        """The results of one task."""
        return [tasks[label] for tasks in self.results if label in tasks]


def draw_tasks(
    figure: "Figure",
    drawn: Sequence[DrawnGroup],
    labels: Sequence[str],
    scale: plots.ColorScale | None,
) -> None:
    """Accuracy by task with its standard error, a bar for each group, and the level of chance."""
    bars = []
    for entry in drawn:
        results = [run.core.tasks for run in entry.group.members if run.core and run.core.tasks]
        if results:
            bars.append(TaskBars(entry, results))
    # 22 tasks below each other would be too high a picture
    half = ceil_div(len(labels), 2)
    columns = figure.subplots(1, 2, sharex=True)
    for axes, part in zip(columns, (labels[:half], labels[half:]), strict=True):
        _draw_task_column(axes, bars, part)
    title = "CORE tasks: accuracy ± standard error over the examples; dashed: chance"
    if any(len(entry.results) > 1 for entry in bars):
        title += "; small ticks: single seeds"
    figure.suptitle(title, fontsize=12)
    columns[0].set_xlim(left=0)
    in_key = [(entry.drawn.group.name, entry.drawn.look) for entry in bars]
    plots.add_key(figure, list(columns), in_key, scale, "bar")


def _draw_task_column(axes: "Axes", bars: Sequence[TaskBars], labels: Sequence[str]) -> None:
    """Some of the tasks, one below the other."""
    # the bars of a task fill 0.84 of its row, so that tasks stay apart
    thick = 0.84 / max(1, len(bars))
    for i, entry in enumerate(bars):
        for row, label in enumerate(labels):
            if tasks := entry.of(label):
                _draw_bar(axes, row - 0.42 + (i + 0.5) * thick, thick, tasks, entry.drawn.look)
    for row, label in enumerate(labels):
        # runs may have been centered on different chance levels
        for chance in {task.chance for entry in bars for task in entry.of(label)}:
            axes.plot(
                [chance, chance],
                [row - 0.47, row + 0.47],
                color="black",
                linewidth=2.2,
                linestyle=(0, (2, 1)),
            )
    axes.set_yticks(range(len(labels)), labels)
    # downwards, in the published order
    axes.set_ylim(max(1, len(labels)) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("accuracy")


def _draw_bar(
    axes: "Axes", place: float, thick: float, tasks: Sequence[CoreTask], look: plots.Look
) -> None:
    """The mean accuracy of a group's seeds in a task, and a tick for each seed."""
    accuracies = [task.accuracy for task in tasks]
    axes.barh(
        place,
        statistics.fmean(accuracies),
        height=thick * 0.92,
        color=look.color,
        edgecolor="white",
        hatch=plots.HATCHES[look.dash],
        linewidth=0,
        # the mean of the seeds' errors, not the error of their mean: it shows the noise of the
        # examples
        xerr=statistics.fmean(task.stderr or 0 for task in tasks),
        error_kw={"elinewidth": 1.1, "capsize": min(3, 10 * thick), "ecolor": "#30363d"},
    )
    if len(tasks) > 1:
        axes.plot(
            accuracies,
            [place] * len(tasks),
            linestyle="",
            marker="|",
            markersize=5,
            color="black",
        )
