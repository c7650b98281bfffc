"""What came of the runs of a sweep: facts from their folders, tables, noise over seeds, differences to a baseline.

Reads config.json, summary.json and the notes of sweep.py; changes nothing. Only completed runs count in any mean or fit."""

import json
import math

from nanochat.common import human_time, read_json
from nanochat.compare import spread
from nanochat.runlog import RunFolder
from nanochat.runs import DAMAGES, aligned, describe, fixed, short

FAILURE = "failed.json"  # sweep.py's note in the folder of a run that failed; it goes when the run is started again
NUMBERS = ("depth", "seed", "width", "parameters", "scaling_parameters", "step", "tokens", "flops", "epochs", "seconds", "tok_per_sec",
           "val_bpb", "min_val_bpb", "core_metric", "core_metric_n")


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
    except FileNotFoundError:  # the usual case; another process may also have taken it away just now
        return found
    return found | {"status": "failed", "reason": note["reason"], "failed_at": note["at"]}


def _of_run(path):
    """facts() of a folder that holds a run. Raises one of DAMAGES."""
    config, run, summary = RunFolder(path).read_config(), describe(path), {}
    if (path / "summary.json").exists():
        summary = read_json(path / "summary.json", "run folder")
    tokens, plan = run["tokens"], config["plan"]
    return {**{name: run[name] for name in NUMBERS if name in run}, "status": run["status"], "reason": run["reason"],
            "failed_at": run["updated"] if run["status"] == "failed" else None, "seed": config["seed"], "width": config["model"]["width"],
            "scaling_parameters": plan["scaling_parameters"], "flops": tokens and tokens * plan["flops_per_token"],
            "epochs": tokens and tokens / config["data"]["tokens_per_epoch"], "seconds": run["total_training_time"],
            "core_metric_n": summary.get("core_metric_n")}


def collect(runs):
    """[{name, path, flags, ...facts()}] of sweep.Run objects, in their order."""
    return [{"name": run.name, "path": str(run.path), "flags": run.flags, **facts(run.path)} for run in runs]


def completed(rows):
    return [row for row in rows if row["status"] == "completed"]


def seconds_in_words(seconds):
    return None if seconds is None else human_time(seconds)


def table(rows):
    """collect()'s rows for reading: one line a run, then why those that are not complete are not."""
    heading = ("run", "status", "params", "N", "tokens", "D/N", "epochs", "FLOPs", "time", "val_bpb", "CORE")
    lines = [(row["name"], row["status"], short(row["parameters"]), short(row["scaling_parameters"]), short(row["tokens"]),
              row["tokens"] and fixed(row["tokens"] / row["scaling_parameters"], 1), fixed(row["epochs"], 2),
              row["flops"] and f"{row['flops']:.2e}", seconds_in_words(row["seconds"]), fixed(row["val_bpb"]), fixed(row["core_metric"]))
             for row in rows]
    reasons = [f"{row['name']}: {row['status']}: {row['reason']}" for row in rows if row["status"] != "completed" and row["reason"]]
    repeats = [row["name"] for row in rows if (row["epochs"] or 0) > 1]
    if repeats:
        reasons.append(f"more than one pass over the data: {', '.join(repeats)}")
    return "\n".join([aligned([heading, *[[cell or None for cell in line] for line in lines]]), *reasons])


def noise(rows):
    """{val_bpb: spread(), core_metric: spread()} of the completed runs."""
    return {name: spread([row[name] for row in completed(rows) if row[name] is not None]) for name in ("val_bpb", "core_metric")}


def ablation(rows):
    """One dict a variant, in order: name, status, n and mean of val_bpb, and differences to the variant "baseline", paired by seed.

    rows: runs named VARIANT/seedS. difference, core_difference and seconds_difference are {mean, se, n} over the seeds that both
    have completed: variant - baseline; se is null below two pairs. status: completed, or how many of its runs failed or are left."""
    variants = {}
    for row in rows:
        variant, seed = row["name"].split("/")
        variants.setdefault(variant, {})[seed] = row
    results = []
    for name, of_seed in variants.items():
        done = {seed: row for seed, row in of_seed.items() if row["status"] == "completed"}
        left = [row["status"] for row in of_seed.values() if row["status"] != "completed"]
        entry = {"name": name, "status": ", ".join(f"{left.count(status)} of {len(of_seed)} {status}" for status in dict.fromkeys(left))
                 or "completed"}
        for what in ("val_bpb", "seconds"):
            entry[what] = spread([row[what] for row in done.values() if row[what] is not None])
        for difference, what in (("difference", "val_bpb"), ("core_difference", "core_metric"), ("seconds_difference", "seconds")):
            pairs = [(row[what], variants["baseline"][seed][what]) for seed, row in done.items()
                     if seed in variants["baseline"] and variants["baseline"][seed]["status"] == "completed"]
            found = spread([mine - base for mine, base in pairs if mine is not None and base is not None])
            se = None if found["sd"] is None else found["sd"] / math.sqrt(found["n"])
            entry[difference] = None if name == "baseline" else {"mean": found["mean"], "se": se, "n": found["n"]}
        results.append(entry)
    return results


def ablation_table(variants):
    """ablation()'s result for reading."""
    heading = ("variant", "val_bpb", "to baseline", "se", "pairs", "CORE", "se", "time", "to baseline", "status")
    lines = [heading]
    for entry in variants:
        cells = [entry["name"], fixed(entry["val_bpb"]["mean"])]
        difference, core, seconds = (entry[name] or {"mean": None, "se": None, "n": 0}
                                     for name in ("difference", "core_difference", "seconds_difference"))
        slower = None
        if seconds["mean"] is not None:
            slower = f"{100 * seconds['mean'] / (entry['seconds']['mean'] - seconds['mean']):+.1f}%"
        cells += [fixed(difference["mean"], sign="+"), fixed(difference["se"]), str(difference["n"]) if entry["difference"] else None,
                  fixed(core["mean"], sign="+"), fixed(core["se"]), seconds_in_words(entry["seconds"]["mean"]), slower, entry["status"]]
        lines.append(cells)
    return aligned(lines)


def result_line(**values):
    """The last line of a script: RESULT name=value ...; null as null, numbers with six digits."""
    def shown(value):
        return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return "RESULT " + " ".join(f"{name}={shown(value)}" for name, value in values.items())
