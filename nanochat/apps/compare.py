"""`nanochat compare RUN ...`: runs side by side, which of their differences exceed the noise, and pictures. Only reads the runs.

Runs whose settings differ in nothing but the seed are a group: its numbers are a mean ± a standard deviation over its seeds. Two
kinds of noise are told apart: which examples CORE was measured on (a bootstrap paired by example, one run each side), and which
seed was trained (Welch's t-test, several runs each side)."""

import argparse
import itertools
import json
import math
import os
import re
import statistics
from pathlib import Path

import numpy as np

from nanochat.apps import runs as listing
from nanochat.apps.report import core_in_words, dig, has_answers, read_run
from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    UsageError,
    human_time,
    in_a_line,
    printable,
    write_atomic,
)
from nanochat.run import plots
from nanochat.run.log import RunFolder
from nanochat.run.plots import number

# Flags that do not decide what a run becomes, as nanochat/run/resume.py has them (which imports torch), and the seed. Text and tokenizer
# are compared by fingerprint, the kind of numbers by what was used.
BOOKKEEPING = {
    "seed",
    "resume",
    "resume_from_step",
    "overwrite",
    "out_dir",
    "model_tag",
    "config",
    "dry_run",
    "json",
    "gpus",
    "gpu",
    "data",
    "val_data",
    "run",
    "tensorboard",
    "device_type",
    "dtype",
    "compile",
    "attention",
    "activation_checkpointing",
    "shard",
    "device_batch_size",
    "eval_every",
    "core_metric_every",
    "core_metric_max_per_task",
    "core_bundle",
    "sample_every",
    "sample_prompts",
    "save_every",
    "save_every_minutes",
    "keep_last",
    "no_save",
    "max_skipped",
    "debug_nans",
    "profile",
    "tokenizer",
    "init_from",
}
PICTURES = ("curves.png", "core.png", "core_tasks.png")
ALL_PAIRS = 8  # up to so many runs or groups every pair is printed; of more each is compared with the best, and --json has all
CONFIDENCE = 0.95
FEW_STEPS = 20  # a run with fewer does not decide where axes begin
AXES = (
    ("step", "step"),
    ("total_training_time", "training time"),
    ("total_training_flops", "training FLOPs"),
)


def main(argv):
    """Compare, print, draw. Returns 0, or 1 if a folder could not be read; UsageError if none could, or pictures cannot be written."""
    parser = argparse.ArgumentParser(
        prog="nanochat compare",
        allow_abbrev=False,
        description="Compare runs: a table, which differences exceed the noise, what makes the runs incomparable, and pictures of their "
        "curves and CORE results. Runs that differ only in their seed become a mean with its spread.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument(
        "--per-task",
        action="store_true",
        help="also a table of CORE accuracy ± standard error by task",
    )
    parser.add_argument(
        "--evaluations",
        action="store_true",
        help="take CORE from RUN/evaluations where both that and core.jsonl have it",
    )
    parser.add_argument(
        "--out",
        default="compare",
        metavar="FOLDER",
        help="where the pictures go (default: %(default)s)",
    )
    parser.add_argument("--no-plots", action="store_true", help="make no pictures")
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables, nothing rounded"
    )
    args = parser.parse_args(argv)
    if not args.no_plots and (
        (Path(args.out) / "config.json").exists() or RunFolder(args.out).remains()
    ):
        raise UsageError(f"--out={args.out}: holds a run, which is only read; name another folder")
    runs, problems = read_runs(args.runs, args.evaluations)
    code = (
        EXIT_COMPLETED
        if len(runs) == len({os.path.realpath(path) for path in args.runs})
        else EXIT_FAILED
    )
    if not runs:
        raise UsageError("no run to compare: " + "; ".join(problems))
    groups, notes = grouped(runs)
    found = {
        "core": core_differences(groups),
        "val_bpb": seed_differences(groups, "val_bpb"),
        "core_seeds": seed_differences(groups, "core_metric"),
    }
    warnings = differences_in_kind(runs) + unfinished(runs) + notes
    pictures = [] if args.no_plots else draw(groups, Path(args.out))
    if pictures:
        old = [
            path
            for name in PICTURES
            if (path := Path(args.out) / name) not in pictures and path.exists()
        ]
        warnings += [
            f"{path} is of an earlier comparison; of these runs there is nothing to draw in it"
            for path in old
        ]
    if args.json:
        print(
            json.dumps(
                {
                    "runs": [as_json(run) for run in runs],
                    "groups": [group_as_json(group) for group in groups],
                    "differences": found,
                    "warnings": warnings,
                    "problems": problems,
                    "pictures": [str(path) for path in pictures],
                },
                indent=2,
            )
        )
        return code
    for lines in (
        [table(groups)],
        [task_table(runs)] if args.per_task else [],
        noise_of_examples(found["core"]),
        noise_of_seeds(found, groups),
        [f"warning: {line}" for line in warnings],
        [f"problem: {line}" for line in problems],
        [f"picture: {path}" for path in pictures],
    ):
        if lines:
            print(printable("\n".join(lines) + "\n"))
    return code


# ---- reading and grouping ----


def read_runs(paths, evaluations_first=False):
    """(runs as read_run() has them, each with `core`, `core_metric` and `seed`; problems) of folders, each once, named distinctly."""
    runs, problems = [], []
    for path in dict.fromkeys(os.path.realpath(path) for path in paths):
        try:
            run = read_run(path)
        except UsageError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{path}: {problem.removeprefix(path + os.sep)}" for problem in run["problems"]
        ]
        cores = sorted(
            run["cores"],
            key=lambda core: evaluations_first and not core["source"].startswith("evaluations"),
        )
        run["core"] = next(
            (core for core in cores if core["core_metric"] is not None), cores[0] if cores else None
        )
        if run["core"] and run["core"]["reason"]:
            problems.append(f"{path}: no CORE metric: {run['core']['reason']}")
        run["core_metric"] = run["core"] and run["core"]["core_metric"]
        run["seed"] = number(dig(run["config"], "args", "seed"))
        runs.append(run)
    for run, name in zip(runs, distinct_names([run["path"] for run in runs]), strict=True):
        run["name"] = name
    return runs, problems


def distinct_names(paths):
    """The last part of each path; of paths that end alike as many as tell them apart."""
    parts, names = [Path(path).parts for path in paths], []
    for own in parts:
        depth = next(
            (
                n
                for n in range(1, len(own) + 1)
                if sum(other[-n:] == own[-n:] for other in parts) == 1
            ),
            len(own),
        )
        names.append(printable(os.path.join(*own[-depth:])))
    return names


def settings_of(run):
    """All that decides what a run becomes except its seed, as a text to compare; "" where config.json does not tell."""
    config = run["config"]
    args = config.get("args")
    if not args or "imported_from" in config or run["seed"] is None:
        return ""
    plan = (
        None if number(args.get("target_minutes")) not in (-1, None) else config.get("plan")
    )  # what fits into a time is measured
    return json.dumps(
        [
            {name: value for name, value in args.items() if name not in BOOKKEEPING},
            plan,
            config.get("model"),
            config.get("init_from"),
            config.get("extended"),
            config.get("git_commit"),
            dig(config, "data", "fingerprint"),
            dig(config, "tokenizer", "fingerprint"),
            dig(config, "runtime", "dtype"),
        ],
        sort_keys=True,
    )


def grouped(runs):
    """([group], notes). A group is a dict: name; runs (in the order given); members: those that completed, whose numbers it is.

    Of runs with the same settings and the same seed only the first is in a group: what they differ in, if in anything, is not in
    config.json."""
    by_settings, notes = {}, []
    for i, run in enumerate(runs):
        by_settings.setdefault(settings_of(run) or i, []).append(run)
    groups = []
    for alike in by_settings.values():
        first_of_seed = {}
        for run in alike:
            first_of_seed.setdefault(run["seed"], run)
        of_seeds = list(first_of_seed.values())
        repeats = [run for run in alike if first_of_seed[run["seed"]] is not run]
        for run in repeats:
            notes.append(
                f"{run['name']}: the settings and the seed of {first_of_seed[run['seed']]['name']}; what they differ in, if in "
                f"anything, is not in config.json (uncommitted code, the machine), so it stands alone"
            )
        groups += [
            {"name": name_of(members), "runs": members}
            for members in (of_seeds, *([run] for run in repeats))
        ]
    for group in groups:
        done = [run for run in group["runs"] if run["status"] == "completed"]
        group["members"] = done if len(group["runs"]) > 1 else group["runs"]
        if len(group["runs"]) > 1 and (left := [run for run in group["runs"] if run not in done]):
            notes.append(f"{group['name']}: its mean leaves out {names(left)}, not completed")
    by_args = {}
    for group in groups:
        if settings := settings_of(group["runs"][0]):
            parts = json.loads(settings)
            by_args.setdefault(json.dumps(parts[:5] + parts[6:]), []).append(group)
    for alike in by_args.values():
        commits = {str(group["runs"][0]["config"].get("git_commit"))[:8] for group in alike}
        if len(commits) > 1:
            notes.append(
                f"{' and '.join(group['name'] for group in alike)}: the same settings, with code of different commits "
                f"({', '.join(sorted(commits))})"
            )
    return groups, notes


def names(runs):
    return ", ".join(run["name"] for run in runs)


def name_of(members):
    """The name of a group: what the names of its runs begin with, and its seeds."""
    if len(members) == 1:
        return members[0]["name"]
    common = os.path.commonprefix(
        [run["name"] for run in members]
    )  # such as d4-seed4 of d4-seed42 and d4-seed43
    common = (
        re.sub(r"(^|[\W_]+)(seeds?\d*|s\d*)?$", "", common)
        or Path(members[0]["path"]).parent.name
        or members[0]["name"]
    )
    seeds = sorted(run["seed"] for run in members)
    return (
        f"{common} (seeds {', '.join(map(str, seeds))})"
        if len(seeds) <= 5
        else f"{common} ({len(seeds)} seeds)"
    )


def values_of(group, name):
    """A group's numbers of one kind, one a seed: val_bpb or core_metric; CORE only as far as measured on the same examples."""
    with_one = [run for run in group["members"] if run[name] is not None]
    if name == "core_metric" and len({examples_of(run["core"]) for run in with_one}) > 1:
        return []
    return [run[name] for run in with_one]


def examples_of(core):
    """What two CORE results share when they were measured on the same examples from the same chance levels; None without a result."""
    if core is None or not core["tasks"]:
        return None
    return tuple(
        (label, str(task.get("fingerprint")), task["n"], task["chance"])
        for label, task in core["tasks"].items()
    )


# ---- noise ----


def student_quantile(p, df):
    """The p-quantile (0.5 <= p < 1) of Student's t with df >= 1 degrees of freedom, not necessarily whole.

    With t = sqrt(df) tan(a) the probability of 0..t is an integral of cos^(df-1) over 0..a, which Simpson's rule takes to 1e-9."""
    factor = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    weights = np.ones(2001)
    weights[1:-1:2], weights[2:-1:2] = 4, 2

    def probability(angle):
        at = np.linspace(0, angle, 2001)
        return factor * float(weights @ np.cos(at) ** (df - 1)) * angle / 2000 / 3

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < p - 0.5 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def welch(a, b, confidence=CONFIDENCE):
    """{"difference", "low", "high", "df"} of mean(b) - mean(a) by Welch's t-test (Biometrika 34, 1947); two numbers a side at least."""
    spread_a, spread_b = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    difference, squared = statistics.fmean(b) - statistics.fmean(a), spread_a + spread_b
    if squared == 0:
        return {"difference": difference, "low": difference, "high": difference, "df": None}
    df = squared**2 / (spread_a**2 / (len(a) - 1) + spread_b**2 / (len(b) - 1))
    reach = student_quantile((1 + confidence) / 2, df) * math.sqrt(squared)
    return {
        "difference": difference,
        "low": difference - reach,
        "high": difference + reach,
        "df": df,
    }


def spread(values):
    """{mean, sd, n} of numbers; sd (of n - 1) is None below two values, mean below one."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def joint_confidence(n):
    """Confidence of each of n intervals so that all of them hold together with CONFIDENCE (Bonferroni): the best of many runs is
    picked by the same numbers, and by itself would often seem better than the noise."""
    return 1 - (1 - CONFIDENCE) / max(1, n)


def seed_differences(groups, name):
    """Differences in val_bpb or core_metric between all pairs of groups, with an interval where both have several seeds."""
    found, values = [], {group["name"]: values_of(group, name) for group in groups}
    confidence = joint_confidence(
        math.comb(sum(len(of_group) > 1 for of_group in values.values()), 2)
    )
    for a, b in itertools.combinations([group for group in groups if values[group["name"]]], 2):
        of_a, of_b = values[a["name"]], values[b["name"]]
        entry = {
            "from": a["name"],
            "to": b["name"],
            "n": [len(of_a), len(of_b)],
            "difference": None,
            "low": None,
            "high": None,
            "confidence": confidence,
            "df": None,
            "reason": incomparable(a["runs"][0], b["runs"][0], name),
        }
        if entry["reason"]:
            found.append(entry)
            continue
        entry["difference"] = statistics.fmean(of_b) - statistics.fmean(of_a)
        if min(len(of_a), len(of_b)) >= 2:
            entry |= welch(of_a, of_b, confidence)
        else:
            one = [
                group["name"] for group, of_group in ((a, of_a), (b, of_b)) if len(of_group) == 1
            ]
            entry["reason"] = (
                "one seed each: no noise known"
                if len(one) == 2
                else f"one seed of {one[0]}: its noise is not known"
            )
        found.append(entry)
    return found


def incomparable(a, b, name):
    """Why a number of two runs cannot be compared; "" if nothing is known against it."""
    if name == "core_metric":
        return (
            ""
            if examples_of(a["core"]) == examples_of(b["core"])
            else "measured on other examples or from other chance levels"
        )
    if dig(a["config"], "data", "fingerprint") != dig(
        b["config"], "data", "fingerprint"
    ) and held_out(a) != held_out(b):
        return "the held-out texts differ"
    if dig(a["config"], "args", "eval_tokens") != dig(b["config"], "args", "eval_tokens"):
        return "--eval-tokens differs"
    return ""


def core_differences(groups):
    """Differences in CORE between runs of different groups, with the interval of the bootstrap paired by example."""
    from tasks.core import interval

    members = [
        [run for run in group["members"] if run["core_metric"] is not None] for group in groups
    ]
    pairs = [
        pair
        for first, second in itertools.combinations(members, 2)
        for pair in itertools.product(first, second)
    ]
    confidence, found = joint_confidence(len(pairs)), []
    for a, b in pairs:
        entry = {
            "from": a["name"],
            "to": b["name"],
            "difference": b["core_metric"] - a["core_metric"],
            "low": None,
            "high": None,
            "confidence": confidence,
            "n": b["core"]["n"],
            "reason": "",
        }
        if not all(
            has_answers(task) for core in (a["core"], b["core"]) for task in core["tasks"].values()
        ):
            entry["reason"] = "not every task has its answers by example"
        else:
            try:
                entry["low"], entry["high"] = interval(
                    b["core"]["tasks"], a["core"]["tasks"], confidence
                )
            except ValueError as error:
                entry["reason"] = str(error)
        found.append(entry)
    return found


def hints(groups, name):
    """{group name: by how much two single runs differ by chance alone (95%), were theirs the spread of that group's seeds}."""
    found = {}
    for group in groups:
        if len(values := values_of(group, name)) >= 2:
            found[group["name"]] = (
                math.sqrt(2)
                * statistics.stdev(values)
                * student_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
            )
    return found


# ---- warnings ----


def held_out(run):
    """What is known of a run's held-out text: the sizes that compressors make of it."""
    found = dig(run["config"], "data", "compressed_bpb")
    return (
        ", ".join(f"{name} {bits}" for name, bits in sorted(found.items()))
        if isinstance(found, dict)
        else None
    )


def differences_in_kind(runs):
    """A sentence for each thing that differs between runs and makes their numbers mean different things."""

    def data_of(run):
        fingerprint = dig(run["config"], "data", "fingerprint")
        return fingerprint and f"{dig(run['config'], 'data', 'name')} {str(fingerprint)[:12]}"

    def tokenizer_of(run):
        fingerprint = dig(run["config"], "tokenizer", "fingerprint")
        kind, size = (dig(run["config"], "tokenizer", name) for name in ("kind", "vocab_size"))
        return fingerprint and f"{kind} {size} {str(fingerprint)[:12]}"

    def of_core(what):
        return lambda run: run["core"] and run["core"]["tasks"] and what(run["core"]) or None

    things = (
        ("text", data_of, "trained or validated on different text"),
        ("held-out text (as compressed)", held_out, "bits per byte cannot be compared"),
        ("tokenizer", tokenizer_of, "losses in nats a token cannot be compared, bits per byte can"),
        (
            "--eval-tokens",
            lambda run: dig(run["config"], "args", "eval_tokens"),
            "bits per byte are of different amounts of text",
        ),
        (
            "examples of CORE",
            of_core(lambda core: f"{core['n']:,} in {len(core['tasks'])} tasks ({core['source']})"),
            None,
        ),
        ("--max-per-task of CORE", of_core(lambda core: core["max_per_task"]), None),
        (
            "chance levels of CORE",
            of_core(lambda core: core["baselines"]),
            "CORE is on different scales",
        ),
    )
    lines = []
    for what, value, meaning in things:
        shown = {}
        for run in runs:
            if (found := value(run)) is not None:
                shown.setdefault(str(found), []).append(run)
        if what == "examples of CORE":
            kinds = {examples_of(run["core"]) for run in runs if run["core"]} - {None}
            if len(kinds) < 2:
                continue
            meaning = "CORE cannot be paired"
            if len(shown) == 1:  # as many, and yet others
                meaning += "; they are as many, their fingerprints or chance levels differ"
        elif len(shown) < 2:
            continue
        lines.append(
            f"{what} differs: "
            + "; ".join(f"{value} ({names(of)})" for value, of in shown.items())
            + (f": {meaning}" if meaning else "")
        )
    return lines


def unfinished(runs):
    """A sentence for each run that is not complete."""
    return [
        f"{run['name']} is not completed: {run['status']}"
        + (f" ({in_a_line(run['reason'])})" if run["reason"] else "")
        + f" at step {run['step'] or 0:,} of {'?' if run['steps'] is None else format(run['steps'], ',')}; its numbers are not final"
        for run in runs
        if run["status"] != "completed"
    ]


# ---- words ----


def table(groups):
    """Runs as aligned columns; below the runs of a group its mean ± standard deviation."""
    heading = (
        "run",
        "depth",
        "params",
        "tokens",
        "FLOPs",
        "time",
        "val_bpb",
        "CORE",
        "95% interval",
        "n",
        "status",
    )
    rows = [heading]
    for group in groups:
        for run in group["runs"]:
            core = run["core"] if run["core_metric"] is not None else None
            error = (
                f"{core['low']:.4f} to {core['high']:.4f}"
                if core and core["low"] is not None
                else None
            )
            rows.append(
                (
                    run["name"],
                    None if run["depth"] is None else str(run["depth"]),
                    listing.short(run["parameters"]),
                    listing.short(run["tokens"]),
                    f"{run['total_training_flops']:.3g}" if run["total_training_flops"] else None,
                    None
                    if run["total_training_time"] is None
                    else human_time(run["total_training_time"]),
                    listing.fixed(run["val_bpb"]),
                    listing.fixed(run["core_metric"]),
                    error,
                    f"{core['n']:,}" if core else None,
                    run["status"],
                )
            )
        if len(group["runs"]) > 1:
            bpb, core = values_of(group, "val_bpb"), values_of(group, "core_metric")
            n = len(group["members"])
            rows.append(
                (
                    f"= {group['name']}",
                    *[""] * 5,
                    with_spread(bpb, n),
                    with_spread(core, n),
                    "",
                    f"{n} seeds",
                    "mean ± sd",
                )
            )
    return listing.aligned(rows)


def with_spread(values, n):
    """1.2345 ± 0.0012: mean and standard deviation; how many they are of is said where that is not n."""
    if not values:
        return "-"
    found = spread(values)
    sd = "" if found["sd"] is None else f" ± {found['sd']:.4f}"
    return f"{found['mean']:.4f}{sd}" + (f" (n = {len(values)})" if len(values) != n else "")


def labels_of(runs):
    """The CORE tasks that any run has, in the published order."""
    from tasks.core import LABELS

    return [
        label
        for label in LABELS
        if any(run["core"] and label in run["core"]["tasks"] for run in runs)
    ]


def task_table(runs):
    """CORE accuracy ± standard error by task and run, and where the numbers are from."""
    with_core = [run for run in runs if run["core"] and run["core"]["tasks"]]
    if not with_core:
        return "no run has CORE results"
    rows = [("task", "chance", *(run["name"] for run in with_core))]
    for label in labels_of(with_core):
        tasks = [run["core"]["tasks"].get(label) for run in with_core]
        chances = {f"{task['chance']:.3f}" for task in tasks if task}
        rows.append(
            (
                label,
                "/".join(sorted(chances)),
                *(
                    "-"
                    if task is None
                    else f"{task['accuracy']:.4f}"
                    + ("" if number(task.get("stderr")) is None else f" ± {task['stderr']:.4f}")
                    for task in tasks
                ),
            )
        )
    return (
        listing.aligned(rows)
        + "\n"
        + "\n".join(f"{run['name']}: CORE {core_in_words(run['core'])}" for run in with_core)
    )


def pairs_to_print(found, sign):
    """(those of the differences that are printed, a line that says so where that is not all). sign: 1 if more is better, else -1."""
    if len({name for entry in found for name in (entry["from"], entry["to"])}) <= ALL_PAIRS:
        return found, []
    totals = {}
    for entry in found:  # the one that is best against all others
        totals[entry["from"]] = totals.get(entry["from"], 0) - sign * (entry["difference"] or 0)
        totals[entry["to"]] = totals.get(entry["to"], 0) + sign * (entry["difference"] or 0)
    best = max(totals, key=totals.get)
    return [entry for entry in found if best in (entry["from"], entry["to"])], [
        f"  (pairs with {best}; --json has all {len(found)})"
    ]


def together(found):
    """What the intervals of these differences are, in words."""
    confidence = found[0]["confidence"]
    return (
        "95% intervals"
        if confidence == CONFIDENCE
        else f"intervals of {confidence:.2%}, which hold together in 95%"
    )


def difference_line(entry, noise):
    """One difference in words."""
    text = f"  {entry['to']} - {entry['from']}:"
    if entry["difference"] is None:
        return f"{text} cannot be compared: {entry['reason']}"
    text += f" {entry['difference']:+.4f}"
    if entry["low"] is None:
        return f"{text}, no interval: {entry['reason']}"
    beyond = entry["low"] > 0 or entry["high"] < 0
    seeds = (
        f" (n = {entry['n'][1]} and {entry['n'][0]} seeds"
        + (
            ", no spread at all)"
            if entry["df"] is None
            else f", {entry['df']:.1f} degrees of freedom)"
        )
        if "df" in entry
        else ""
    )
    return f"{text}, {entry['low']:+.4f} to {entry['high']:+.4f}{seeds}: {'more than' if beyond else 'within'} {noise}"


def noise_of_examples(found):
    """Lines on CORE by the paired bootstrap."""
    if not found:
        return []
    shown, less = pairs_to_print(found, 1)
    return [
        f"CORE, differences with {together(found)} (bootstrap over the examples, paired; the noise of the seed is not in it):",
        *(difference_line(entry, "the noise of the examples") for entry in shown),
        *less,
    ]


def noise_of_seeds(found, groups):
    """Lines on val_bpb, and on CORE where there are several seeds, by Welch's t-test."""
    lines = []
    for key, title, name, sign in (
        ("val_bpb", "val_bpb", "val_bpb", -1),
        ("core_seeds", "CORE", "core_metric", 1),
    ):
        spreads = hints(groups, name)
        if not found[key] or name == "core_metric" and not spreads:
            continue
        known = any(entry["low"] is not None for entry in found[key])
        method = f" with {together(found[key])} (Welch's t-test over seeds)" if known else ""
        shown, less = pairs_to_print(found[key], sign)
        lines += [
            f"{title}, differences{method}:",
            *(difference_line(entry, "the noise of the seeds") for entry in shown),
            *less,
        ]
        if any(entry["low"] is None and entry["difference"] is not None for entry in shown):
            lines += [
                f"  hint: by the spread of {group}, two single runs differ by up to {reach:.4f} by chance alone (95%); whether that "
                f"holds for other settings is not known"
                for group, reach in spreads.items()
            ]
    return lines


def as_json(run):
    """What --json says of a run."""
    core = run["core"]
    return {
        name: run[name]
        for name in (
            "name",
            "path",
            "status",
            "reason",
            "seed",
            "depth",
            "parameters",
            "step",
            "steps",
            "tokens",
            "total_training_flops",
            "total_training_time",
            "val_bpb",
            "min_val_bpb",
        )
    } | {
        "core": core
        and {
            **core,
            "tasks": {
                label: {
                    name: task.get(name)
                    for name in ("accuracy", "stderr", "centered", "chance", "n", "fingerprint")
                }
                for label, task in core["tasks"].items()
            },
        }
    }


def group_as_json(group):
    """What --json says of a group: of one run as well."""
    found = {
        "name": group["name"],
        "runs": [run["name"] for run in group["runs"]],
        "n": len(group["members"]),
    }
    for name in ("val_bpb", "core_metric"):
        found[name] = spread(values_of(group, name))
    return found


# ---- pictures ----


def draw(groups, out):
    """Write the pictures that there is something for; returns their paths. UsageError if they cannot be written."""
    looks, scale = plots.colors_of([group["runs"][0]["depth"] for group in groups])
    for group, look in zip(groups, looks, strict=True):
        group["look"] = look
    runs = [run for group in groups for run in group["runs"]]
    pictures = {}
    if any(run["steps_logged"] for run in runs):
        pictures["curves.png"] = plots.png(
            lambda figure: draw_training(figure, groups, scale), 17, 9.5
        )
    if any(run["core_metric"] is not None for run in runs):
        pictures["core.png"] = plots.png(lambda figure: draw_core(figure, groups, scale), 14, 6)
    if labels := labels_of(runs):
        height = min(60, 2 + -(-len(labels) // 2) * (0.35 + 0.17 * len(groups)))
        pictures["core_tasks.png"] = plots.png(
            lambda figure: draw_tasks(figure, groups, labels, scale), 15, height
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            write_atomic(out / name, content)
    except OSError as error:
        raise UsageError(
            f"--out={out}: cannot be written ({error.strerror}); name another folder, or add --no-plots"
        ) from None
    return [out / name for name in pictures]


def curve_of(group, name, axis, unit=1.0):
    """A group's curve of a metric: smoothed where it is of every step. Over several runs: at each step the mean of the metric, with its
    spread, and of where the runs are on the axis, since the time that a step takes differs from run to run."""
    members, places = [], []
    for run in group["members"] or group["runs"]:
        lines = [line for line in run["lines"] if plots.number(line.get(axis)) is not None]
        steps, y = plots.points(lines, name)
        if len(steps):
            members.append((steps, plots.smoothed(y) if name == "train/loss" else y))
            places.append(plots.points(lines, axis))
    steps, y, sd = plots.mean_of(members)
    x = np.mean([np.interp(steps, *place) for place in places], axis=0) / unit if places else steps
    return {"x": x, "y": y, "sd": sd, **group["look"]}


def draw_training(figure, groups, scale):
    """Training loss (above) and bits per byte (below) against step, training time and FLOPs."""
    axes = figure.subplots(2, len(AXES))
    runs = [run for group in groups for run in group["runs"]]
    runs = [run for run in runs if run["steps_logged"] >= FEW_STEPS] or runs
    ends = {
        axis: [
            end
            for run in runs
            if (end := max((number(line.get(axis)) or 0 for line in run["lines"]), default=0))
        ]
        for axis, _ in AXES
    }
    time, seconds = plots.unit_of_time(max(ends["total_training_time"], default=0))
    for column, (axis, title) in enumerate(AXES):
        unit = seconds if axis == "total_training_time" else 1
        for row, (name, label) in enumerate(
            (
                ("train/loss", "training loss (smoothed), nats a token"),
                ("val/bpb", "bits per byte of held-out text"),
            )
        ):
            here = axes[row][column]
            curves = [curve_of(group, name, axis, unit) for group in groups]
            if any(curve["sd"] is not None for curve in curves):
                label += "\nbands: ± standard deviation over seeds"
            if axis == "total_training_flops":  # there is no place for 0 on it
                curves = [
                    {
                        **curve,
                        **{
                            key: value if value is None else value[curve["x"] > 0]
                            for key, value in (
                                ("x", curve["x"]),
                                ("y", curve["y"]),
                                ("sd", curve["sd"]),
                            )
                        },
                    }
                    for curve in curves
                ]
            plots.draw_curves(
                here,
                curves,
                marker="o"
                if name == "val/bpb" and max(len(curve["x"]) for curve in curves) <= 40
                else "",
            )
            here.set_xlabel(
                f"{title}, {time}" if unit != 1 or axis == "total_training_time" else title
            )
            if column == 0:
                here.set_ylabel(label)
            if ends[axis]:
                low, high = min(ends[axis]) / unit, max(ends[axis]) / unit
                if axis == "total_training_flops" or high > 30 * low:
                    plots.log_scale(here, "x", low / 50, high * 1.15)
                else:
                    here.set_xlim(0, high * 1.01)
    plots.add_key(
        figure, list(axes.flat), [(group["name"], group["look"]) for group in groups], scale
    )


def draw_core(figure, groups, scale):
    """CORE against depth and against FLOPs, a point a run with its 95% interval; runs of one place stand beside each other."""
    left, right = figure.subplots(1, 2, sharey=True)
    shown = [
        (run, group) for group in groups for run in group["runs"] if run["core_metric"] is not None
    ]
    depths = sorted({run["depth"] for run, _ in shown if run["depth"] is not None})
    step = min([b - a for a, b in itertools.pairwise(depths)], default=1)
    for axes, name in ((left, "depth"), (right, "total_training_flops")):
        for place, run, group in beside(
            [(run[name], run, group) for run, group in shown if run[name]], name == "depth" and step
        ):
            core, look = run["core"], group["look"]
            value = run["core_metric"]
            reach = (
                None
                if core["low"] is None
                else [[max(0, value - core["low"])], [max(0, core["high"] - value)]]
            )
            axes.errorbar(
                place,
                value,
                yerr=reach,
                color=look["color"],
                fmt=plots.MARKERS[look["dash"]],
                markersize=7,
                capsize=4,
                elinewidth=1.6,
            )
            values = values_of(group, "core_metric")
            if (
                axes is right
                and values
                and run is group["members"][-1]
                and len(groups) <= len(plots.PALETTE)
            ):
                axes.annotate(
                    f"{statistics.fmean(values):.3f}",
                    (place, value),
                    xytext=(8, 5),
                    textcoords="offset points",
                    fontsize=10,
                    color=look["color"],
                    fontweight="bold",
                )
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
    flops = [run["total_training_flops"] for run, _ in shown if run["total_training_flops"]]
    if flops:
        plots.log_scale(right, "x", min(flops) / 1.6, max(flops) * 2.2)
    left.set(xlabel="depth", ylabel="CORE (95% interval over the examples)", xticks=depths)
    left.set_xlim(min(depths, default=0) - 0.7 * step, max(depths, default=1) + 0.7 * step)
    right.set_xlabel(
        "training FLOPs; runs of like FLOPs stand beside each other"
        + (
            "\nvalues: of a run, or the mean of its seeds"
            if len(groups) <= len(plots.PALETTE)
            else ""
        )
    )
    drawn = [
        group for group in groups if any(run["core_metric"] is not None for run in group["runs"])
    ]
    plots.add_key(
        figure, [left, right], [(group["name"], group["look"]) for group in drawn], scale, "point"
    )


def beside(points, step):
    """Points (x, ...) whose x agree to 2% moved apart: by parts of `step`, or where that is 0 by factors, for a logarithmic axis, of
    which the outermost two are at most 1.2 apart."""
    out = []
    for x, *rest in points:
        alike = [other for other in points if abs(other[0] - x) <= 0.02 * x]
        at = next(i for i, other in enumerate(alike) if other[1] is rest[0]) - (len(alike) - 1) / 2
        out.append(
            (
                x + at * 0.4 * step / max(4, len(alike))
                if step
                else x * 1.2 ** (at / max(4, len(alike))),
                *rest,
            )
        )
    return out


def draw_tasks(figure, groups, labels, scale):
    """Accuracy by task with its standard error, a bar a run or group of seeds, and the level of chance."""
    shown = [
        (group, cores)
        for group in groups
        if (
            cores := [
                run["core"]["tasks"]
                for run in group["members"]
                if run["core"] and run["core"]["tasks"]
            ]
        )
    ]
    half, thick = -(-len(labels) // 2), 0.84 / max(1, len(shown))
    columns = figure.subplots(1, 2, sharex=True)
    for axes, part in zip(columns, (labels[:half], labels[half:]), strict=True):
        for i, (group, cores) in enumerate(shown):
            for row, label in enumerate(part):
                if tasks := [tasks[label] for tasks in cores if label in tasks]:
                    place, accuracies = (
                        row - 0.42 + (i + 0.5) * thick,
                        [task["accuracy"] for task in tasks],
                    )
                    axes.barh(
                        place,
                        statistics.fmean(accuracies),
                        height=thick * 0.92,
                        color=group["look"]["color"],
                        edgecolor="white",
                        hatch=plots.HATCHES[group["look"]["dash"]],
                        linewidth=0,
                        xerr=statistics.fmean(number(task.get("stderr")) or 0 for task in tasks),
                        error_kw={
                            "elinewidth": 1.1,
                            "capsize": min(3, 10 * thick),
                            "ecolor": "#30363d",
                        },
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
        for row, label in enumerate(part):
            for chance in {
                tasks[label]["chance"] for _, cores in shown for tasks in cores if label in tasks
            }:
                axes.plot(
                    [chance, chance],
                    [row - 0.47, row + 0.47],
                    color="black",
                    linewidth=2.2,
                    linestyle=(0, (2, 1)),
                )
        axes.set_yticks(range(len(part)), part)
        axes.set_ylim(max(1, len(part)) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy")
    figure.suptitle(
        "CORE tasks: accuracy ± standard error over the examples; dashed: chance"
        + ("; small ticks: single seeds" if any(len(cores) > 1 for _, cores in shown) else ""),
        fontsize=12,
    )
    columns[0].set_xlim(left=0)
    plots.add_key(
        figure, list(columns), [(group["name"], group["look"]) for group, _ in shown], scale, "bar"
    )
