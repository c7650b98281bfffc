"""`nanochat sweep try FOLDER [flags of every train.py] --change=... | --patch=FILE | --aa`: is a
change better than the baseline? One verdict, as early as a sequential test allows."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nanochat.apps.sweep import sequential
from nanochat.apps.sweep.command import failures
from nanochat.apps.sweep.facts import Facts, read_facts
from nanochat.apps.sweep.patched_source import copy_with_patch, digest_of, read_patch
from nanochat.apps.sweep.results import BASELINE, result_line
from nanochat.apps.sweep.sequential import Design, Look, Noise, look, noise_of_runs
from nanochat.apps.sweep.settings import Settings
from nanochat.apps.sweep.train_runs import Run, Stop, check, make_run, train_all
from nanochat.apps.sweep.trial_flags import METRICS, OTHER_SEED, Metric, check_numbers
from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_STOPPED,
    UsageError,
    can_create,
    read_json,
    write_json,
)
from nanochat.run import flags
from nanochat.run.folder import provenance

# the folder of A/A runs; no flag is called that
AA = "aa"
FAILED = "failed"
# characters of the name of a run folder
LONGEST_NAME = 60
# flags that a change may not have, since the scores of a pair would be of different text
NOT_COMPARABLE = ("tokenizer", "vocab_size", "val_data", "eval_tokens")


@dataclass(frozen=True)
class Pair:
    """Two runs that are compared."""

    seed: int
    baseline: Run
    changed: Run


@dataclass(frozen=True)
class Trial:
    """What is asked for. settings: of the baseline's runs; changed: of the others. name: of the
    change, a folder within the trial's. noise: as given or measured before, None if the trial has
    to measure it. change: its description in the verdict."""

    settings: Settings
    changed: Settings
    name: str
    change: dict[str, Any]
    pairs: list[Pair]
    metric_name: str
    design: Design
    noise: Noise | None

    @property
    def metric(self) -> Metric:
        """What is compared."""
        return METRICS[self.metric_name]

    @property
    def folder(self) -> Path:
        """Where the changed runs and the verdict are."""
        return self.settings.folder / self.name


@dataclass
class Progress:
    """What the pairs so far have shown. pairs: as in the verdict. problem: why the trial ends
    without a test, or ""."""

    gains: list[float] = field(default_factory=list)
    facts: list[tuple[Facts, Facts]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    noise: Noise | None = None
    look: Look | None = None
    problem: str = ""


def try_change(args: argparse.Namespace, given: list[str]) -> int:
    """Do a trial, or measure the noise. Returns the exit code; UsageError before training.

    args: as from trial_flags.build_parser(). given: the flags of every train.py."""
    stop = Stop()
    # from here on Ctrl-C must not end this process before the training that it started
    stop.listen()
    return conduct(args, Settings.read("try", args.folder, given, os.environ), stop)


def conduct(args: argparse.Namespace, settings: Settings, stop: Stop) -> int:
    """What try_change() does, with these settings."""
    check_numbers(args)
    shown = sys.stderr if args.json else sys.stdout
    # with --json standard output is for the verdict alone
    with contextlib.redirect_stdout(shown):
        if args.measure_noise:
            record = _measure_noise(args, settings, stop)
        else:
            record = _try(_read(args, settings), stop)
        if record is None:
            print("stopped; start it again to continue", flush=True)
            return EXIT_STOPPED
    if args.json:
        print(json.dumps(record, indent=2), flush=True)
    return EXIT_FAILED if record["verdict"] == FAILED else EXIT_COMPLETED


# ---- what is asked for ----


def _read(args: argparse.Namespace, settings: Settings) -> Trial:
    """The trial of a command line. UsageError for what cannot be tried."""
    try:
        change = shlex.split(args.change)
    except ValueError as error:
        raise UsageError(f"--change={args.change}: {error}; close the quotation") from None
    if args.aa and (change or args.patch):
        raise UsageError("--aa: changes only the seed; leave out --change and --patch")
    if not (args.aa or change or args.patch):
        raise UsageError(
            'nothing to try: give --change="FLAGS", --patch=FILE, or --aa for a trial without a '
            "change"
        )
    _check_metric(args.metric, settings.common)
    name = AA if args.aa else _name(change)
    changed, root = settings, settings.train_py.parent
    if args.patch:
        # of another patch, or of other sources, the runs are others
        name = f"{name}-patch-{digest_of(root, read_patch(Path(args.patch)))[:12]}".lstrip("-")
        changed = replace(settings, train_py=settings.folder / name / "source" / "train.py")
    pairs = [_pair(settings, name, change, seed, args.aa) for seed in args.seeds]
    if not args.aa:
        _check_change(args, settings.common, change)
    _check_runs([run for pair in pairs for run in (pair.baseline, pair.changed)], settings)
    noise = _known_noise(args, settings)
    _open_folder(settings.folder)
    if args.patch and not changed.train_py.exists():
        copy_with_patch(root, Path(args.patch), changed.train_py.parent)
        print(f"{args.patch}: applied to a copy of the sources, {changed.train_py.parent}")
    return Trial(
        settings=settings,
        changed=changed,
        name=name,
        change={"flags": change, "patch": args.patch or None, "aa": args.aa},
        pairs=pairs,
        metric_name=args.metric,
        design=Design(len(pairs), args.gain, args.min_gain),
        noise=noise,
    )


def _check_runs(runs: Sequence[Run], settings: Settings) -> None:
    """UsageError for flags that train.py or the sweep refuses, and for runs of other flags."""
    # one pair first: what is wrong with its flags is wrong with all of them
    check("try", runs[:2], settings.given)
    check("try", runs, settings.given)


def _open_folder(folder: Path) -> None:
    """Create the folder. UsageError now rather than after hours of training."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir() or not can_create(folder / "new"):
        raise UsageError(f"{folder}: cannot be created or written; name another folder")


def _name(change: Sequence[str]) -> str:
    """A name for a folder, such as matrix-lr-0.03; "" without flags."""
    # two changes of one name are told apart by the flags in the config.json of their runs
    text = re.sub(r"[^\w.+-]+", "-", " ".join(word.lstrip("-") for word in change)).strip("-.+")
    if len(text) > LONGEST_NAME or (change and not text):
        return "change-" + hashlib.sha256(shlex.join(change).encode()).hexdigest()[:12]
    return text


def _pair(settings: Settings, name: str, change: list[str], seed: int, aa: bool) -> Pair:
    """The two runs of a seed."""

    def run(folder: str, words: list[str], seed: int) -> Run:
        words = [*words, f"--seed={seed}"]
        return make_run(settings.folder, f"{folder}/seed{seed}", words, settings.common)

    # runs with the same seed and flags would be equal to the last bit
    other = seed + OTHER_SEED if aa else seed
    return Pair(seed, run(BASELINE, [], seed), run(name, change, other))


def _check_metric(name: str, common: Sequence[str]) -> None:
    """UsageError if the runs would not measure it."""
    switch = METRICS[name].flag
    if getattr(flags.parse(common), switch) == -1:
        raise UsageError(
            f"--metric={name}: {flags.flag(switch)}=-1 never measures it; give another value"
        )


def _check_change(args: argparse.Namespace, common: list[str], change: list[str]) -> None:
    """UsageError for a change that does nothing, or whose scores do not compare."""
    # with the common flags, since a change may name one that they have too
    baseline, changed = flags.parse(common), flags.parse([*common, *change])
    own = flags.parse(change).given
    if "seed" in own:
        raise UsageError("--change: --seed pairs the runs; to try another seed give --aa")
    refused = [name for name in NOT_COMPARABLE if name in own]
    # with validation text of its own the training text is free
    if "data" in own and not baseline.val_data:
        refused.append("data")
    if METRICS[args.metric].flag in own:
        refused.append(METRICS[args.metric].flag)
    if refused:
        words = ", ".join(map(flags.flag, refused))
        raise UsageError(
            f"--change: {words}: both runs of a pair must be measured on the same text in the same "
            f"way; give it for both (to change --data give both --val-data)"
        )
    # two equal runs would be trained to learn that they are equal
    values = [{**vars(found), "given": None} for found in (baseline, changed)]
    if values[0] == values[1] and not args.patch:
        raise UsageError(
            f"--change={args.change}: the baseline has these values too; change something"
        )


def _known_noise(args: argparse.Namespace, settings: Settings) -> Noise | None:
    """The noise as given, or as measured in this folder before."""
    if args.noise is not None:
        return Noise(args.noise, None)
    path = settings.folder / "noise.json"
    if not path.exists():
        return None
    measured = read_json(path, "--measure-noise")
    # nothing is known of this metric's noise yet: the trial measures it
    if measured["metric"] != args.metric:
        return None
    # a longer or larger baseline has another noise
    if measured["flags"] != settings.common:
        raise UsageError(
            f"{path}: was measured with other flags ({shlex.join(measured['flags'])}); give those, "
            f"choose another folder, or delete it"
        )
    return Noise(measured["noise"]["sd"], measured["noise"]["runs"])


# ---- noise ----


def _measure_noise(args: argparse.Namespace, settings: Settings, stop: Stop) -> dict | None:
    """Train the baseline with all seeds; returns what noise.json holds, or None after a stop."""
    if args.change or args.patch or args.aa:
        raise UsageError("--measure-noise: trains the baseline; leave out what changes it")
    _check_metric(args.metric, settings.common)
    runs = [_pair(settings, AA, [], seed, aa=True).baseline for seed in args.seeds]
    _check_runs(runs, settings)
    _open_folder(settings.folder)
    train_all(runs, settings, _to_retry(settings, runs), stop)
    if stop.asked:
        return None
    metric = METRICS[args.metric]
    values = []
    for run in runs:
        value, problem = _result(run, read_facts(run.path), metric)
        if problem:
            print(problem)
            print(result_line(verdict=FAILED), flush=True)
            return {"verdict": FAILED, "reason": problem}
        values.append(value)
    noise = noise_of_runs(values, metric.relative)
    record = {
        "verdict": None,
        "metric": args.metric,
        "flags": settings.common,
        "noise": asdict(noise),
        "floor": {n: noise.floor(n) for n in range(sequential.FIRST_LOOK, len(runs) + 1)},
        "runs": {str(run.path): value for run, value in zip(runs, values, strict=True)},
    }
    path = settings.folder / "noise.json"
    write_json(path, record)
    print(
        f"noise: the gain of a pair of runs that differ in the seed alone has a standard deviation "
        f"of {metric.in_words(noise.sd, '')} ({len(values)} runs); {path}"
    )
    print(result_line(noise=noise.sd, runs=len(values)), flush=True)
    return record


def _to_retry(settings: Settings, runs: Sequence[Run]) -> Mapping[str, float]:
    return failures(runs) if settings.retry else {}


def _result(run: Run, facts: Facts, metric: Metric) -> tuple[float, str]:
    """The metric of a run that ended, and "", or why it has none."""
    if not facts.completed:
        return 0.0, f"{run.name}: {facts.status} ({facts.reason}); RETRY=1 tries again"
    value = getattr(facts, metric.fact)
    if value is None:
        return 0.0, f"{run.name}: completed without {metric.fact}; see {run.path / 'train.log'}"
    return value, ""


# ---- the trial ----


def _try(trial: Trial, stop: Stop) -> dict | None:
    """Train pairs until the test decides. Returns the verdict, or None after a stop."""
    runs = [run for pair in trial.pairs for run in (pair.baseline, pair.changed)]
    to_retry = _to_retry(trial.settings, runs)
    print(f"{trial.name}: at most {len(trial.pairs)} pairs in {trial.settings.folder}", flush=True)
    progress = Progress(noise=trial.noise)
    # seed by seed, so that a trial that ends early has trained nothing in vain
    for pair in trial.pairs:
        train_all([pair.baseline], trial.settings, to_retry, stop)
        train_all([pair.changed], trial.changed, to_retry, stop)
        # a stop is not a result
        if stop.asked:
            return None
        _add(trial, pair, progress)
        if progress.problem or progress.look.verdict:
            break
    record = _record(trial, progress)
    path = trial.folder / "verdict.json"
    # before anything else is printed: a broken pipe must not cost the verdict
    write_json(path, record)
    for warning in record["warnings"]:
        print(f"warning: {warning}")
    print(f"{record['verdict']}: {record['reason']}; {path}")
    # the last line of the output, for scripts and people who keep only that
    line = result_line(
        verdict=record["verdict"],
        gain=record["gain"]["mean"],
        pairs=record["pairs"]["used"],
        cost=record["cost_share"],
    )
    print(line, flush=True)
    return record


def _add(trial: Trial, pair: Pair, progress: Progress) -> None:
    """Take in a pair that was trained, look, and print a line."""
    metric = trial.metric
    facts = read_facts(pair.baseline.path), read_facts(pair.changed.path)
    baseline, problem = _result(pair.baseline, facts[0], metric)
    changed, changed_problem = _result(pair.changed, facts[1], metric)
    progress.problem = problem or changed_problem or _other_text(pair)
    if progress.problem:
        return
    progress.facts.append(facts)
    progress.gains.append(metric.gain(baseline, changed))
    progress.pairs.append(
        {
            "seed": pair.seed,
            "baseline": baseline,
            "changed": changed,
            "gain": progress.gains[-1],
            "runs": [str(pair.baseline.path), str(pair.changed.path)],
        }
    )
    # its own runs of the baseline, so that the outcome depends on nothing else in the folder
    values = [found["baseline"] for found in progress.pairs]
    if trial.noise is None and len(values) > 1:
        progress.noise = noise_of_runs(values, metric.relative)
    progress.look = look(progress.gains, trial.design, progress.noise)
    print(
        f"seed {pair.seed}: {trial.metric_name} {baseline:.4f}, changed {changed:.4f}, gain "
        f"{metric.in_words(progress.gains[-1])} | {_look_in_words(progress.look, metric)}",
        flush=True,
    )


def _look_in_words(found: Look, metric: Metric) -> str:
    words = f"mean of {found.n} {metric.in_words(found.mean)}"
    if found.low is not None:
        words += f" [{metric.in_words(found.low)}, {metric.in_words(found.high)}]"
        words += f", noise floor {metric.in_words(found.floor, '')}"
    return words


def _other_text(pair: Pair) -> str:
    """Why the scores of a pair do not compare, or ""."""
    # a patch, or a flag such as --init-from, may bring another text or tokenizer along
    configs = [read_json(run.path / "config.json", "run") for run in (pair.baseline, pair.changed)]
    what = ["tokenizer"]
    # validation text of its own is not in the fingerprint
    if not configs[0]["args"]["val_data"]:
        what.append("data")
    for name in what:
        if configs[0][name]["fingerprint"] != configs[1][name]["fingerprint"]:
            return f"{pair.changed.name}: has another {name} than the baseline: no comparison"
    return ""


def _record(trial: Trial, progress: Progress) -> dict[str, Any]:
    """The verdict as data; None where a number is not known."""
    found, design = progress.look, trial.design
    verdict, reason = FAILED, progress.problem
    if not progress.problem:
        verdict, reason = found.verdict, _reason(found, trial)
    return {
        "verdict": verdict,
        "reason": reason,
        "change": trial.change,
        "baseline": trial.settings.common,
        "metric": trial.metric_name,
        "gain": {
            "unit": "share of the baseline" if trial.metric.relative else "difference",
            "mean": found and found.mean,
            "low": found and found.low,
            "high": found and found.high,
            "confidence": 1 - 2 * sequential.ERROR,
            "sd": found and found.sd,
        },
        "noise": progress.noise and {**asdict(progress.noise), "floor": found and found.floor},
        "design": {**asdict(design), "error": sequential.ERROR, "error_a_look": design.level},
        "pairs": {"used": len(progress.pairs), "most": design.pairs, "results": progress.pairs},
        "cost_share": len(progress.pairs) / design.pairs,
        # a gain may be bought by more computation
        "compute": {
            "flops": _ratio(progress, "flops"),
            "seconds": _ratio(progress, "seconds"),
        },
        "warnings": _warnings(trial, progress),
    }


def _reason(found: Look, trial: Trial) -> str:
    """The verdict in words."""
    design, metric = trial.design, trial.metric
    mean = metric.in_words(found.mean)
    interval = f"{mean} [{metric.in_words(found.low)}, {metric.in_words(found.high)}]"
    if found.verdict == sequential.KEEP:
        return f"gains {interval} in {found.n} pairs"
    if found.verdict == sequential.REJECT:
        if found.high < 0:
            return f"worse than the baseline: {interval} in {found.n} pairs"
        wanted = metric.in_words(design.gain, "")
        return f"a gain of {wanted} is excluded: {interval} in {found.n} pairs"
    # looking again at these pairs with more of them would add a second error to that of this trial
    remedy = "give more seeds, and other ones, as in --seeds=50,51,52"
    if found.low > design.min_gain:
        floor = metric.in_words(found.floor, "")
        return f"{interval} in {found.n} pairs is within the noise floor of {floor}; {remedy}"
    return f"{interval} in {found.n} pairs excludes neither; {remedy}"


def _ratio(progress: Progress, name: str) -> float | None:
    """The changed runs' mean of a fact over the baseline's."""
    sides = list(zip(*progress.facts, strict=True))
    values = [[getattr(facts, name) for facts in side] for side in sides]
    # no pair yet, or a run that does not tell
    if not values or any(not value for side in values for value in side):
        return None
    return statistics.fmean(values[1]) / statistics.fmean(values[0])


def _warnings(trial: Trial, progress: Progress) -> list[str]:
    """What makes the verdict less than it seems."""
    commits = {facts.git_commit for pair in progress.facts for facts in pair}
    # a copy with a patch belongs to no commit, but it was made of this tree
    if trial.change["patch"]:
        commits.add(provenance()["git_commit"])
    commits.discard(None)
    warnings = []
    if len(commits) > 1:
        shown = ", ".join(sorted(commit[:8] for commit in commits))
        warnings.append(f"the runs were trained by different versions of the code: {shown}")
    flops = _ratio(progress, "flops")
    # a change of the shape by a whole head is hard to avoid; a longer run is another question
    if flops and abs(flops - 1) > 0.01:
        warnings.append(f"the change trains with {flops:.2f} times the FLOPs")
    return warnings
