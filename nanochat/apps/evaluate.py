"""`nanochat evaluate RUN ...`: CORE, bits per byte and samples of finished or running runs, or of a Hugging Face folder."""

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import time
from pathlib import Path

from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    UsageError,
    human_time,
    read_json,
    step_argument,
    valid_unicode,
    write_atomic,
    write_json,
)

LOGITS_SHARE = 8  # a Hugging Face model, which makes all logits of a pass, gets that many times fewer tokens at once
# A flag that says more about one part -> the flag that asks for that part.
PART_OF = {
    "tasks": "core",
    "max_per_task": "core",
    "core_bundle": "core",
    "baselines": "core",
    "core_crop": "core",
    "data": "bpb",
    "eval_tokens": "bpb",
    "prompt": "sample",
    "max_tokens": "sample",
    "seed": "sample",
}


def build_parser():
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat evaluate",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Measure trained models: any of --core, --bpb and --sample. Results are printed and written as Markdown, JSON and CSV. "
        "With several runs, their differences in CORE are told with their uncertainty, paired by example. "
        "Several processes share the work when started by torchrun.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="run folder, or folder of a Hugging Face causal language model",
    )
    parser.add_argument(
        "--step",
        type=step_argument,
        default=-1,
        metavar="N",
        help="checkpoint by its step, or best; -1: the newest",
    )
    parser.add_argument(
        "--out", default="", metavar="FOLDER", help="where results go; empty: RUN/evaluations"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group = parser.add_argument_group("the CORE metric")
    group.add_argument("--core", action="store_true", help="measure it")
    group.add_argument(
        "--tasks",
        type=comma_separated,
        default=(),
        metavar="LABELS",
        help="some of its 22 tasks by label, "
        "separated by commas (then there is no CORE); empty: all",
    )
    group.add_argument(
        "--max-per-task", type=int, default=500, metavar="N", help="examples of a task; -1: all"
    )
    group.add_argument(
        "--core-bundle",
        default="",
        metavar="FOLDER",
        help="its bundle; empty: the cached one, downloaded once",
    )
    group.add_argument(
        "--baselines",
        default="v1",
        choices=("v1", "v2"),
        help="chance levels: as first published, or as corrected in 2025 (three tasks differ)",
    )
    group.add_argument(
        "--core-crop",
        action="store_true",
        help="crop prompts to the context instead of ten times that",
    )
    group = parser.add_argument_group("bits per byte")
    group.add_argument("--bpb", action="store_true", help="measure it, with loss and perplexity")
    group.add_argument(
        "--data",
        default="",
        help="text, as in train.py: files are read whole, of a dataset the held-out part; empty: "
        "what the run was validated on",
    )
    group.add_argument(
        "--eval-tokens", type=int, default=-1, metavar="N", help="tokens at most; -1: all"
    )
    group = parser.add_argument_group("samples")
    group.add_argument("--sample", action="store_true", help="draw some")
    group.add_argument(
        "--prompt",
        type=valid_unicode,
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be given several times; without any, a new document is begun",
    )
    group.add_argument(
        "--max-tokens", type=int, default=96, metavar="N", help="of a sample, at most"
    )
    group.add_argument("--seed", type=int, default=42, help="of samples")
    group = parser.add_argument_group("where to compute")
    group.add_argument(
        "--device-type",
        default="",
        choices=("", "cuda", "mps", "cpu"),
        help="empty: the first of cuda, mps, cpu",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="of products, as in train.py",
    )
    group.add_argument(
        "--batch-tokens",
        type=int,
        default=-1,
        metavar="N",
        help="tokens of a pass of the model; -1: by device",
    )
    return parser


def comma_separated(text):
    """argparse type of a tuple of words."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def check(args, parser):
    """One UsageError with a line for every flag that cannot be used, or not on one of the runs."""
    from tasks.core import label_problem

    problems = []
    if not (args.core or args.bpb or args.sample):
        problems.append("nothing to measure: add --core, --bpb or --sample")
    for name, part in PART_OF.items():
        if getattr(args, name) != parser.get_default(name) and not getattr(args, part):
            problems.append(
                f"--{name.replace('_', '-')}: belongs to --{part}; add that, or leave it out"
            )
    if problem := label_problem(args.tasks):
        problems.append(problem)
    if args.batch_tokens != -1 and not (args.core or args.bpb):
        problems.append(
            "--batch-tokens: belongs to --core and --bpb; add one of them, or leave it out"
        )
    for name in ("max_per_task", "eval_tokens", "batch_tokens"):
        if getattr(args, name) < 1 and getattr(args, name) != -1:
            problems.append(
                f"--{name.replace('_', '-')}={getattr(args, name)}: must be at least 1, or -1"
            )
    if args.max_tokens < 1:
        problems.append(f"--max-tokens={args.max_tokens}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        problems.append(f"--seed={args.seed}: must be from 0 to 2^63 - 1")
    if args.step != "best" and args.step < -1:
        problems.append(
            f"--step={args.step}: must be the step of a checkpoint, best, or -1 for the newest"
        )
    for run in args.runs:
        try:
            config = read_config(run)
        except UsageError as error:
            problems.append(str(error))
            continue
        foreign = is_foreign(config)
        if foreign and args.step != -1:
            problems.append(
                f"--step={args.step}: {run} is a Hugging Face folder and has no steps; leave the flag out"
            )
        if foreign and args.sample:
            problems.append(
                f"--sample: {run} is a Hugging Face folder; `nanochat export` turns a Llama into a run, which can sample"
            )
        if args.bpb and not args.data and (foreign or "data" not in config):
            problems.append(
                f"--bpb: {run} {'is a Hugging Face folder' if foreign else 'was imported'}: say on which text, with --data"
            )
    if problems:
        raise UsageError("\n".join(problems))


def read_config(run):
    """config.json of a run or of a Hugging Face folder. UsageError for what is neither."""
    path, wanted = (
        Path(run) / "config.json",
        "name a run folder, for example out/d4, or one of a Hugging Face model",
    )
    if not path.parent.is_dir():
        raise UsageError(f"{run}: no such folder; {wanted}")
    if not path.exists():
        raise UsageError(f"{run}: it has no config.json; {wanted}")
    config = read_json(path, str(run))
    if not isinstance(config, dict) or not (
        is_foreign(config) or isinstance(config.get("args"), dict)
    ):
        raise UsageError(
            f"{run}: its config.json is neither a run's nor a Hugging Face model's; {wanted}"
        )
    return config


def is_foreign(config):
    """Whether a config.json is a Hugging Face model's."""
    return "model_type" in config


def check_writable(args):
    """UsageError if a folder of results, which need not exist yet, cannot be written: found out before hours of work, not after."""
    for folder in (folder_of_results(args, run).absolute() for run in args.runs):
        there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(
                f"--out: {folder} cannot be written ({there} is {'read-only' if there.is_dir() else 'not a folder'}); name "
                f"another folder with --out"
            )


def main(argv):
    """Evaluate, print, write. Returns 0, or 1 if something asked for could not be measured. Raises UsageError."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check(args, parser)
    import torch

    from nanochat import hardware, ranks
    from nanochat.eval.generation import check_prompts

    device_type = hardware.pick_device_type(args.device_type)
    hardware.prepare(device_type)
    device = ranks.setup(device_type)
    dtype, _ = hardware.pick_dtype(args.dtype, device_type)
    say = (lambda text: None) if args.json else ranks.print0
    ranks.from_rank0_or_raise(lambda: check_writable(args))
    bundle = None
    if args.core:
        from nanochat.eval.core_bundle import find_bundle

        bundle = ranks.from_rank0_or_raise(lambda: find_bundle(args.core_bundle, say))
    reports = []
    for run in args.runs:
        subject = Subject(run, args.step, device, dtype)
        say(
            f"{subject.title}: {device_type} x {ranks.world_size()}, {str(dtype).removeprefix('torch.')}"
        )
        report = {
            "run": str(run),
            "step": subject.step,
            "device": hardware.describe(device),
            "ranks": ranks.world_size(),
            "dtype": str(dtype).removeprefix("torch."),
        }
        if args.sample:
            check_prompts(
                subject.model, subject.tokenizer, args.prompt or [""], args.max_tokens
            )
        if args.bpb:
            report["bpb"] = measure_bpb(args, subject, device, say)
        if args.core:
            report["core"] = measure_core(args, subject, bundle, device, say)
        if args.sample:
            report["samples"] = draw(args, subject)
        if reports and args.core:
            report["difference"] = difference(report, reports[0])
        reports.append(report)
        say(as_text(report))
        path = ranks.from_rank0_or_raise(lambda: write(args, subject, report))
        say(f"written: {path}.md, .json, .csv")
    if args.json:
        ranks.print0(json.dumps(reports, indent=2))
    ranks.close()
    failed = any(
        report.get("bpb", {}).get("reason") or report.get("core", {}).get("failed")
        for report in reports
    )
    return EXIT_FAILED if failed else EXIT_COMPLETED


class Subject:
    """What is evaluated: model, tokenizer, and for a run folder its config.

    folder; step: of the checkpoint, None for a Hugging Face folder; title: for people."""

    def __init__(self, path, step, device, dtype):
        from nanochat import ranks
        from nanochat.eval import hf_model
        from nanochat.run import loading

        self.folder, self.config, self.step = Path(path), read_config(path), None
        self.foreign = is_foreign(self.config)
        if self.foreign:
            self.model, self.tokenizer = hf_model.load(path, device, dtype)
            self.title = str(path)
            return
        # one for all ranks: a run that trains meanwhile gets newer ones
        self.step = ranks.from_rank0_or_raise(
            lambda: loading.step_of(path, None if step == -1 else step)
        )
        self.model, self.tokenizer = loading.load_run(
            path, self.step, device.type, str(dtype).removeprefix("torch.")
        )
        self.model.to(device)
        self.title = f"{path}, step {self.step}"

    def batch_tokens(self, args, device):
        """Tokens of one pass of the model."""
        if args.batch_tokens != -1:
            return args.batch_tokens
        from nanochat.eval.core_answers import BATCH_TOKENS

        if (
            self.foreign
        ):  # not a context at least: that of others may be 100,000 tokens, each with its logits
            return BATCH_TOKENS[device.type] // LOGITS_SHARE
        return max(BATCH_TOKENS[device.type], self.model.config.max_seq_len)


# ---- measuring ----


def measure_bpb(args, subject, device, say):
    """{"bpb", "loss", "perplexity", "tokens", "bytes", "seconds", "data", "reason"} over text."""
    from nanochat import ranks
    from nanochat.data.rows import held_out_pieces
    from nanochat.data.sources import is_remote, open_corpus
    from nanochat.data.token_cache import TokenCache
    from nanochat.eval.bpb import bits_per_byte
    from nanochat.eval.unison import EvaluationFailed

    given, started = args.data, time.monotonic()
    if given:
        named = given == "python" or is_remote(given)
        shards = ranks.from_rank0_or_raise(
            lambda: open_corpus(given, report=say).val if named else whole(given)
        )
    else:
        of_run = subject.config["data"]
        given = of_run["name"]
        corpus = ranks.from_rank0_or_raise(
            lambda: open_corpus(
                subject.config["args"]["data"],
                subject.config["args"]["val_data"],
                of_run.get("revision", ""),
                say,
            )
        )
        if corpus.fingerprint != of_run["fingerprint"]:
            raise UsageError(
                f"--bpb: the text of {subject.folder} ({given}) is not what it was when the run was started; name "
                f"another with --data"
            )
        shards = corpus.val
    T, limit = (
        subject.model.config.max_seq_len,
        args.eval_tokens if args.eval_tokens != -1 else 10**15,
    )
    if subject.foreign:
        pieces = _pieces(shards, subject.tokenizer, T, limit)
    else:
        cache = TokenCache(subject.tokenizer, os.cpu_count() or 1, report=say)
        ranks.from_rank0_or_raise(lambda: cache.prepare(shards, lambda shards: shards))
        pieces = held_out_pieces(shards, cache, T, limit)
    if not pieces:
        raise UsageError(f"--data={given}: holds no text")
    try:
        result = bits_per_byte(
            subject.model,
            pieces,
            subject.tokenizer.byte_counts(),
            subject.batch_tokens(args, device),
            device,
        )
        found = dataclasses.asdict(result)
    except EvaluationFailed as error:
        found = {"bpb": None, "loss": None, "tokens": 0, "bytes": 0, "reason": str(error)}
    return {
        "reason": None,
        **found,
        "perplexity": None if found["loss"] is None else math.exp(min(found["loss"], 700)),
        "data": str(given),
        "seconds": time.monotonic() - started,
    }


def whole(pattern):
    """[the shard of all files that a path, folder or glob names]."""
    from nanochat.data.sources import file_shard, find_files, hash_files

    files = find_files(pattern)
    return [file_shard(files, hashes=hash_files(files))]


def _pieces(shards, tokenizer, row_tokens, max_tokens):
    """As data.held_out_pieces(), for a tokenizer that is not ours: nothing is cached, and it may lose or add bytes (UsageError)."""
    import numpy as np

    pieces, left, byte_counts = [], max_tokens, tokenizer.byte_counts()
    for shard in shards:
        for document in shard.documents():
            ids = tokenizer.encode_batch([document])[0]
            if (found := byte_counts[ids].sum()) != (n_bytes := len(document.encode("utf-8"))):
                raise UsageError(
                    f"--bpb: the tokenizer of {tokenizer.folder} makes tokens of {found:,} bytes of a document's {n_bytes:,}: "
                    f"bits per byte need one that keeps text as it is"
                )
            ids = ids[:left].astype(np.int64)
            pieces += [
                np.concatenate(([tokenizer.bos], ids[start : start + row_tokens]))
                for start in range(0, len(ids), row_tokens)
            ]
            left -= len(ids)
            if left == 0:
                return pieces
    return pieces


def measure_core(args, subject, bundle, device, say):
    """The result of nanochat.eval.core.evaluate(), with `failed`: whether a task that was asked for is missing."""
    from nanochat import hardware, ranks
    from nanochat.eval import core
    from nanochat.run.plan import ASSUMED_MFU
    from tasks.core import LABELS

    config = subject.model.config
    tasks = core.open_core(
        bundle,
        subject.tokenizer,
        config.max_seq_len if subject.foreign else core.len_limit(config, args.core_crop),
        max_per_task=args.max_per_task,
        labels=args.tasks or LABELS,
        baselines=args.baselines,
        threads=os.cpu_count() or 1,
        keep=False,
        shares=not subject.foreign,
    )
    peak, _ = ranks.from_rank0_or_raise(lambda: hardware.peak_flops(device))
    for line in tasks.describe(
        subject.model.flops_per_token(), ASSUMED_MFU * peak * ranks.world_size()
    ):
        say(line)
    bar = progress_bar(args)
    try:
        result = core.measure(
            tasks,
            "",
            subject.model,
            batch_tokens=subject.batch_tokens(args, device),
            device=device,
            progress=bar,
        )
    finally:
        bar(None, "", 0)
    missing = [
        label
        for label in args.tasks or LABELS
        if label not in result.tasks or result.tasks[label].accuracy is None
    ]
    return {
        **dataclasses.asdict(result),
        "limit": tasks.limit,
        "baselines": args.baselines,
        "max_per_task": args.max_per_task,
        "failed": bool(missing),
    }


def progress_bar(args):
    """progress() of core.evaluate() as a bar with the time left on a terminal, and nothing elsewhere. None as the share closes it."""
    import sys

    from nanochat import ranks

    if args.json or ranks.rank() or not sys.stderr.isatty():
        return lambda share, label, seconds_left: None
    from tqdm import tqdm

    bar = tqdm(total=100, bar_format="CORE {percentage:3.0f}%|{bar:20}| {desc}", leave=False)

    def show(share, label, seconds_left):
        if share is None:
            bar.close()
        else:
            bar.n = 100 * share
            bar.set_description_str(f"{label} | eta {human_time(seconds_left)}")

    return show


def draw(args, subject):
    """[{"prompt", "text"}] of samples."""
    from nanochat.eval.generation import NotNumbers, generate_text

    try:
        return [
            {
                "prompt": prompt,
                "text": "".join(
                    generate_text(
                        subject.model,
                        subject.tokenizer,
                        prompt,
                        args.max_tokens,
                        seed=args.seed,
                        temperature=0.8,
                        top_k=50,
                    )
                ),
            }
            for prompt in args.prompt or [""]
        ]
    except NotNumbers as error:
        raise UsageError(f"{subject.title}: {error}") from None


def difference(report, other):
    """What the CORE metrics of two reports differ by, with its interval where examples can be paired."""
    from tasks.core import Answers, interval

    mine, theirs = report["core"], other["core"]
    if mine["core_metric"] is None or theirs["core_metric"] is None:
        return {
            "to": other["run"],
            "core_metric": None,
            "low": None,
            "high": None,
            "reason": "one of the two has no CORE metric",
        }
    found = {
        "to": other["run"],
        "core_metric": mine["core_metric"] - theirs["core_metric"],
        "reason": None,
    }
    try:
        low, high = interval(
            *(
                {label: Answers.from_json(task) for label, task in found["tasks"].items()}
                for found in (mine, theirs)
            )
        )
    except ValueError as error:
        return {**found, "low": None, "high": None, "reason": str(error)}
    return {**found, "low": low, "high": high}


# ---- telling ----


def folder_of_results(args, run):
    """Where the results of a run go."""
    return Path(args.out or Path(run) / "evaluations")


def write(args, subject, report):
    """Write the report as .md, .json and .csv; returns their path without the ending. Earlier ones stay.

    They are named after the step, and in --out, where those of other runs may be, after the run too."""
    folder = folder_of_results(args, subject.folder)
    run, step = (
        subject.folder.resolve().name,
        "" if subject.step is None else f"step_{subject.step:06d}",
    )
    name = "_".join(part for part in (run if args.out or not step else "", step) if part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = 0
        while os.path.exists(
            (path := str(folder / name) + (f"_{taken + 1}" if taken else "")) + ".json"
        ):
            taken += 1
        write_atomic(f"{path}.md", as_markdown(subject, report))
        write_atomic(f"{path}.csv", as_csv(report))
        write_json(f"{path}.json", report)
    except OSError as error:
        raise UsageError(
            f"--out: {folder} cannot be written ({error.strerror}); name another folder with --out"
        ) from None
    return path


def sentences(report):
    """What a report says in words, one sentence a line."""
    lines = []
    if found := report.get("bpb"):
        lines.append(
            f"bits per byte on {found['data']}: "
            + (
                f"none: {found['reason']}"
                if found["reason"]
                else f"{found['bpb']:.4f}, loss {found['loss']:.4f} nats a token, perplexity {found['perplexity']:.2f} "
                f"({found['tokens']:,} tokens, {found['bytes']:,} bytes, {human_time(found['seconds'])})"
            )
        )
    if found := report.get("core"):
        if found["core_metric"] is None:
            lines.append(f"no CORE metric: {found['reason']}")
        else:
            lines.append(
                f"CORE {found['core_metric']:.4f}, 95% interval {found['low']:.4f} to {found['high']:.4f} (bootstrap over the "
                f"examples), n = {found['n']:,}, {human_time(found['seconds'])}"
            )
        cut = any(task["n"] < task["examples"] for task in found["tasks"].values())
        lines.append(
            f"chance levels {found['baselines']}; prompts of at most {found['limit']:,} tokens; "
            + (
                f"a sample of at most {found['max_per_task']} examples a task"
                if cut
                else "all examples"
            )
        )
    if found := report.get("difference"):
        lines.append(
            f"difference in CORE to {found['to']}: "
            + (
                f"none: {found['reason']}"
                if found["core_metric"] is None
                else f"{found['core_metric']:+.4f}"
                + (
                    f" (no interval: {found['reason']})"
                    if found["low"] is None
                    else f", 95% interval {found['low']:+.4f} to {found['high']:+.4f}, paired by example"
                    + ("" if found["low"] > 0 or found["high"] < 0 else ": within the noise")
                )
            )
        )
    return lines


COLUMNS = (
    "task",
    "accuracy",
    "±",
    "chance",
    "centered",
    "n",
    "of",
    "shots",
    "empty",
    "cropped",
    "bad lines",
    "time",
)


def core_rows(report):
    """The CORE table as rows of text."""
    rows = []
    for label, task in report["core"]["tasks"].items():
        if task["accuracy"] is None:
            rows.append(
                (
                    label,
                    "none",
                    "",
                    f"{task['chance']:.3f}",
                    task["reason"],
                    "",
                    "",
                    "",
                    "",
                    "",
                    "",
                    "",
                )
            )
            continue
        rows.append(
            (
                label,
                f"{task['accuracy']:.4f}",
                "" if task["stderr"] is None else f"{task['stderr']:.4f}",
                f"{task['chance']:.3f}",
                f"{task['centered']:.4f}",
                str(task["n"]),
                str(task["examples"]),
                str(task["shots"]),
                str(task["empty_spans"]),
                str(task["cropped"]),
                str(task["malformed"]),
                human_time(task["seconds"]),
            )
        )
    return rows


def as_text(report):
    """A report for the console."""
    lines = []
    if "core" in report:
        rows = [COLUMNS, *core_rows(report)]
        widths = [max(len(row[i]) for row in rows if row[1] != "none") for i in range(len(COLUMNS))]
        lines += [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in rows
        ]
    lines += sentences(report)
    for sample in report.get("samples", ()):
        lines += [f"--- sample, prompt {sample['prompt']!r}", sample["prompt"] + sample["text"]]
    return "\n".join(lines)


def as_markdown(subject, report):
    """A report as a page of Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in report["device"].items())
    lines = [f"# {subject.title}", "", f"{report['dtype']} on {report['ranks']} x {machine}", ""]
    lines += [f"- {sentence}" for sentence in sentences(report)] + [""]
    if "core" in report:
        lines += [
            "| " + " | ".join(row) + " |"
            for row in (COLUMNS, ["---"] * len(COLUMNS), *core_rows(report))
        ] + [""]
    for sample in report.get("samples", ()):
        lines += (
            [f"Prompt {sample['prompt']!r}:", ""]
            + ["    " + line for line in (sample["prompt"] + sample["text"]).split("\n")]
            + [""]
        )
    return "\n".join(lines)


def as_csv(report):
    """A report's numbers, one a line: metric, value, standard error, bounds of the interval, number of examples."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(("metric", "value", "stderr", "low", "high", "n"))
    if found := report.get("bpb"):
        for name in ("bpb", "loss", "perplexity", "seconds"):
            table.writerow((name, found[name], "", "", "", found["tokens"]))
    if found := report.get("core"):
        table.writerow(
            ("core_metric", found["core_metric"], "", found["low"], found["high"], found["n"])
        )
        for label, task in found["tasks"].items():
            table.writerow((f"core/{label}", task["accuracy"], task["stderr"], "", "", task["n"]))
            table.writerow((f"centered_results/{label}", task["centered"], "", "", "", task["n"]))
    if found := report.get("difference"):
        table.writerow(
            (
                "core_metric_difference",
                found["core_metric"],
                "",
                found["low"],
                found["high"],
                report["core"]["n"],
            )
        )
    return out.getvalue()
