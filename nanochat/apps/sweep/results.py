"""What came of the runs of a sweep: facts from their folders, tables, noise over seeds, differences to a baseline.

Reads config.json, summary.json and the notes of sweep.py; changes nothing. Only completed runs count in any mean or fit."""

import json
import math

from nanochat.apps.compare import CONFIDENCE, spread, student_quantile
from nanochat.apps.runs import DAMAGES, aligned, describe, fixed, short
from nanochat.common import human_time, read_json
from nanochat.run.log import RunFolder

FAILURE = "failed.json"  # sweep.py's note in the folder of a run that failed; it goes when the run is started again
NUMBERS = (
    "depth",
    "seed",
    "width",
    "parameters",
    "scaling_parameters",
    "step",
    "tokens",
    "flops",
    "epochs",
    "seconds",
    "tok_per_sec",
    "val_bpb",
    "min_val_bpb",
    "core_metric",
    "core_metric_n",
    "git_commit",
)


def facts(path):
    """A run folder as a dict: status, reason, failed_at (seconds since 1970, null unless it failed) and NUMBERS, null where there is none.

    status: completed, failed, stopped, died (killed without a word), running (a process has it), or "not started". flops, tokens and
    seconds are those trained; epochs is tokens over the tokens of one pass."""
    found = {"status": "not started", "reason": "", "failed_at": None, **dict.fromkeys(NUMBERS)}
    try:
        if RunFolder(path).holds_run():
            found |= _of_run(path)
    except DAMAGES as error:
        found |= {"status": "failed", "reason": f"damaged run folder ({error})", "failed_at": 0.0}
    if found["status"] in ("completed", "running"):
        return found
    try:
        note = json.loads((path / FAILURE).read_text(encoding="utf-8"))
        return found | {
            "status": "failed",
            "reason": str(note["reason"]),
            "failed_at": float(note["at"]),
        }
    except (
        FileNotFoundError
    ):  # the usual case; another process may also have taken it away just now
        return found
    except DAMAGES as error:
        return found | {
            "status": "failed",
            "reason": f"damaged {FAILURE} ({error})",
            "failed_at": 0.0,
        }


def _of_run(path):
    """facts() of a folder that holds a run. Raises one of DAMAGES."""
    config, run, summary = RunFolder(path).read_config(), describe(path), {}
    if (path / "summary.json").exists():
        summary = read_json(path / "summary.json", "run folder")
    tokens, plan = run["tokens"], config["plan"]
    return {
        **{name: run[name] for name in NUMBERS if name in run},
        "status": run["status"],
        "reason": run["reason"],
        "failed_at": run["updated"] if run["status"] == "failed" else None,
        "seed": config["seed"],
        "width": config["model"]["width"],
        "scaling_parameters": plan["scaling_parameters"],
        "flops": tokens and tokens * plan["flops_per_token"],
        "epochs": tokens and tokens / config["data"]["tokens_per_epoch"],
        "seconds": run["total_training_time"],
        "core_metric_n": summary.get("core_metric_n"),
        "git_commit": config.get("git_commit"),
    }


def collect(runs):
    """[{name, path, flags, ...facts()}] of sweep.Run objects, in their order."""
    return [
        {"name": run.name, "path": str(run.path), "flags": run.flags, **facts(run.path)}
        for run in runs
    ]


def completed(rows):
    return [row for row in rows if row["status"] == "completed"]


def seconds_in_words(seconds):
    return None if seconds is None else human_time(seconds)


def table(rows):
    """collect()'s rows for reading: one line a run, then why those that are not complete are not."""
    heading = (
        "run",
        "status",
        "params",
        "N",
        "tokens",
        "D/N",
        "epochs",
        "FLOPs",
        "time",
        "val_bpb",
        "CORE",
    )
    lines = [
        (
            row["name"],
            row["status"],
            short(row["parameters"]),
            short(row["scaling_parameters"]),
            short(row["tokens"]),
            row["tokens"] and fixed(row["tokens"] / row["scaling_parameters"], 1),
            fixed(row["epochs"], 2),
            row["flops"] and f"{row['flops']:.2e}",
            seconds_in_words(row["seconds"]),
            fixed(row["val_bpb"]),
            fixed(row["core_metric"]),
        )
        for row in rows
    ]
    reasons = [
        f"{row['name']}: {row['status']}: {row['reason']}"
        for row in rows
        if row["status"] != "completed" and row["reason"]
    ]
    repeats = [row["name"] for row in rows if (row["epochs"] or 0) > 1]
    if repeats:
        reasons.append(f"more than one pass over the data: {', '.join(repeats)}")
    by_commit = {}
    for row in rows:
        if row["git_commit"]:
            by_commit.setdefault(str(row["git_commit"])[:8], []).append(row["name"])
    if len(by_commit) > 1:
        reasons.append(
            "warning: trained by different versions of the code: "
            + "; ".join(f"{commit}: {', '.join(names)}" for commit, names in by_commit.items())
        )
    return "\n".join(
        [aligned([heading, *[[cell or None for cell in line] for line in lines]]), *reasons]
    )


def noise(rows):
    """{val_bpb: spread(), core_metric: spread()} of the completed runs."""
    return {
        name: spread([row[name] for row in completed(rows) if row[name] is not None])
        for name in ("val_bpb", "core_metric")
    }


def ablation(rows):
    """One dict a variant, in order: name, status, n and mean of val_bpb, and differences to the variant "baseline", paired by seed.

    rows: runs named VARIANT/seedS. difference, core_difference and seconds_difference are {mean, se, reach, n} over the seeds that both
    have completed: variant - baseline, reach half a 95% interval (Student's t); both null below two pairs. status: completed, or how
    many of its runs failed or are left."""
    variants = {}
    for row in rows:
        variant, seed = row["name"].split("/")
        variants.setdefault(variant, {})[seed] = row
    results = []
    for name, of_seed in variants.items():
        done = {seed: row for seed, row in of_seed.items() if row["status"] == "completed"}
        left = [row["status"] for row in of_seed.values() if row["status"] != "completed"]
        entry = {
            "name": name,
            "status": ", ".join(
                f"{left.count(status)} of {len(of_seed)} {status}" for status in dict.fromkeys(left)
            )
            or "completed",
        }
        for what in ("val_bpb", "seconds", "flops"):
            entry[what] = spread([row[what] for row in done.values() if row[what] is not None])
        for difference, what in (
            ("difference", "val_bpb"),
            ("core_difference", "core_metric"),
            ("seconds_difference", "seconds"),
        ):
            pairs = [
                (row[what], variants["baseline"][seed][what])
                for seed, row in done.items()
                if seed in variants["baseline"]
                and variants["baseline"][seed]["status"] == "completed"
            ]
            found = spread(
                [mine - base for mine, base in pairs if mine is not None and base is not None]
            )
            se = None if found["sd"] is None else found["sd"] / math.sqrt(found["n"])
            reach = (
                None if se is None else se * student_quantile((1 + CONFIDENCE) / 2, found["n"] - 1)
            )
            entry[difference] = (
                None
                if name == "baseline"
                else {"mean": found["mean"], "se": se, "reach": reach, "n": found["n"]}
            )
        results.append(entry)
    return results


def ablation_table(variants):
    """ablation()'s result for reading."""

    def with_reach(difference, digits, unit=1.0, suffix=""):
        if difference is None or difference["mean"] is None:
            return None
        reach = "" if difference["reach"] is None else f" ± {difference['reach'] * unit:.{digits}f}"
        return f"{difference['mean'] * unit:+.{digits}f}{reach}{suffix}"

    lines = [
        (
            "variant",
            "val_bpb",
            "to baseline",
            "pairs",
            "CORE to baseline",
            "FLOPs",
            "time",
            "to baseline",
            "status",
        )
    ]
    for entry in variants:
        difference, seconds = entry["difference"], entry["seconds_difference"]
        percent = (
            0.0
            if seconds is None or seconds["mean"] is None
            else 100 / (entry["seconds"]["mean"] - seconds["mean"])
        )
        pairs = str(difference["n"]) if difference else None
        lines.append(
            (
                entry["name"],
                fixed(entry["val_bpb"]["mean"]),
                with_reach(difference, 4),
                pairs,
                with_reach(entry["core_difference"], 4),
                entry["flops"]["mean"] and f"{entry['flops']['mean']:.3g}",
                seconds_in_words(entry["seconds"]["mean"]),
                with_reach(seconds, 1, percent, "%"),
                entry["status"],
            )
        )
    note = "\n± is half of a 95% interval over the seeds, each variant by itself; without one the noise is unknown"
    return aligned(lines) + note * (len(variants) > 1)


def result_line(**values):
    """The last line of a script: RESULT name=value ...; null as null, numbers with six digits."""

    def shown(value):
        return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)

    return "RESULT " + " ".join(f"{name}={shown(value)}" for name, value in values.items())
