"""`nanochat evaluate RUN ...`: CORE, bits per byte and samples of runs and Hugging Face models."""

import argparse
import functools
import json
from typing import TYPE_CHECKING

from nanochat.apps.evaluate.config import is_foreign, read_config
from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    UsageError,
    add_model_flags,
    path_argument,
    step_argument,
    valid_unicode,
)
from nanochat.run.folder import run_argument

# only for annotations: these modules import torch, which --help does not need
if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from nanochat.apps.evaluate.measure import Machine
    from nanochat.apps.evaluate.report import Report
    from nanochat.apps.evaluate.subject import Subject

# a flag that concerns one measurement -> the flag that asks for that measurement
PART_OF = {
    "tasks": "core",
    "max_per_task": "core",
    "core_bundle": "core",
    "baselines": "core",
    "core_crop": "core",
    "core_chat": "core",
    "data": "bpb",
    "eval_tokens": "bpb",
    "prompt": "sample",
    "max_tokens": "sample",
    "seed": "sample",
}


def build_parser() -> argparse.ArgumentParser:
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat evaluate",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Measure trained models by any of --core, --bpb and --sample. Results are "
        "printed, and written as Markdown, JSON and CSV. With several runs, their differences in "
        "CORE to the first are reported with their uncertainty, paired by example. Under torchrun, "
        "all processes share the work.",
    )
    add = parser.add_argument
    add(
        "runs",
        type=run_argument,
        metavar="RUN",
        nargs="+",
        help="run folder, such as out/d4, its tag, or folder of a Hugging Face causal language "
        "model",
    )
    add(
        "--step",
        type=step_argument,
        default=-1,
        metavar="N",
        help="checkpoint, by its step; best: the best by validation; -1: the newest",
    )
    add(
        "--out",
        type=path_argument,
        default="",
        metavar="FOLDER",
        help="folder of the results; empty: RUN/evaluations. Earlier ones stay: after step_000500 "
        "comes step_000500_2, and `nanochat report` and `compare` take the newest",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    _add_core_flags(parser)
    _add_bpb_and_sample_flags(parser)
    _add_device_flags(parser)
    return parser


def _add_core_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the CORE metric").add_argument
    add("--core", action="store_true", help="measure CORE")
    add(
        "--tasks",
        type=comma_separated,
        default=(),
        metavar="LABELS",
        help="labels of some of the 22 tasks, separated by commas; they give no CORE metric; "
        "empty: all",
    )
    add(
        "--max-per-task",
        type=int,
        # the number that train.py takes on CUDA, so that results of training and of this app
        # compare
        default=500,
        metavar="N",
        help="examples of each task, at most; -1: all",
    )
    add(
        "--core-bundle",
        type=path_argument,
        default="",
        metavar="FOLDER",
        help="bundle with the tasks; empty: the cached one, downloaded once",
    )
    add(
        "--baselines",
        default="v1",
        choices=("v1", "v2"),
        help="chance levels: v1 as first published, v2 as corrected in 2025 (three tasks differ)",
    )
    add(
        "--core-crop",
        action="store_true",
        help="crop prompts to the model's sequence length, each choice to its last tokens, as is "
        "published for GPT-2, instead of to ten times that",
    )
    add(
        "--core-chat",
        action="store_true",
        help="ask the multiple-choice tasks in the chat format, as a run of `nanochat sft` was "
        "taught; the result is no CORE metric",
    )


def _add_bpb_and_sample_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("bits per byte").add_argument
    add("--bpb", action="store_true", help="measure bits per byte, loss and perplexity")
    add(
        "--data",
        type=path_argument,
        default="",
        help="text, as in train.py: all of the files, or the held-out part of a dataset; empty: "
        "the run's own validation text",
    )
    add(
        "--eval-tokens",
        type=int,
        default=-1,
        metavar="N",
        help="tokens to score, at most; -1: all",
    )
    add = parser.add_argument_group("samples").add_argument
    add("--sample", action="store_true", help="draw a sample for each prompt")
    add(
        "--prompt",
        # an argument that is not UTF-8 arrives as lone surrogates, which no tokenizer encodes
        type=valid_unicode,
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be given several times; without any, a new document is begun",
    )
    add(
        "--max-tokens",
        type=int,
        # as long as the samples that train.py draws (SAMPLE_TOKENS)
        default=96,
        metavar="N",
        help="new tokens of each sample, at most",
    )
    add("--seed", type=int, default=42, help="seed of the samples")


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where to compute")
    add_model_flags(group, auto="as in train.py")
    group.add_argument(
        "--batch-tokens",
        type=int,
        default=-1,
        metavar="N",
        help="tokens in one pass of the model; -1: chosen by device",
    )


def comma_separated(text: str) -> tuple[str, ...]:
    """argparse type of a tuple of words."""
    # a comma at the end is a habit, not a task without a name
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _flag_problems(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """A message for every flag that is unusable, whatever the runs are."""
    # here, not above: they import numpy
    from nanochat.eval.core_chat import choice_problem
    from tasks.core import label_problem

    problems = []
    if not (args.core or args.bpb or args.sample):
        problems.append("nothing to measure: add --core, --bpb or --sample")
    # a flag without its measurement would change nothing: refused, not ignored
    for name, part in PART_OF.items():
        if getattr(args, name) != parser.get_default(name) and not getattr(args, part):
            problems.append(f"{_flag(name)}: belongs to --{part}; add that, or omit the flag")
    if problem := label_problem(args.tasks) or (args.core_chat and choice_problem(args.tasks)):
        problems.append(problem)
    # not in PART_OF, since two measurements use it
    if args.batch_tokens != -1 and not (args.core or args.bpb):
        problems.append("--batch-tokens: belongs to --core and --bpb; add one, or omit the flag")
    for name in ("max_per_task", "eval_tokens", "batch_tokens"):
        value = getattr(args, name)
        if value < 1 and value != -1:
            problems.append(f"{_flag(name)}={value}: must be at least 1, or -1")
    if args.max_tokens < 1:
        problems.append(f"--max-tokens={args.max_tokens}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        problems.append(f"--seed={args.seed}: must be from 0 to 2^63 - 1")
    if args.step != "best" and args.step < -1:
        problems.append(
            f"--step={args.step}: must be the step of a checkpoint, best, or -1 for the newest"
        )
    return problems


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _run_problems(
    run: str, *, step: int | str, sample: bool, bpb: bool, data: str, core_chat: bool
) -> list[str]:
    """A message for every flag that is unusable with this run."""
    try:
        config = read_config(run)
    except UsageError as error:
        # without its config nothing else can be said of a run
        return [str(error)]
    problems = []
    foreign = is_foreign(config)
    if foreign and step != -1:
        problems.append(
            f"--step={step}: {run} is a Hugging Face folder and has no steps; omit the flag"
        )
    if foreign and sample:
        problems.append(
            f"--sample: {run} is a Hugging Face folder, which cannot be sampled from; "
            f"`nanochat export` turns a Llama into a run"
        )
    # only a run of train.py records the text it was validated on
    if bpb and not data and (foreign or "data" not in config):
        kind = "is a Hugging Face folder" if foreign else "was imported"
        problems.append(f"--bpb: {run} {kind} and has no text of its own; name one with --data")
    if core_chat:
        # here, not above: they import numpy
        from nanochat.data.tokenizer import read_tokenizer
        from nanochat.eval.core_chat import chat_problem

        tokenizer = None if foreign else read_tokenizer(run)
        if problem := chat_problem(tokenizer, run):
            problems.append(problem)
    return problems


def main(argv: list[str]) -> int:
    """Evaluate, print, write. Returns 0, or 1 if something asked for could not be measured.

    Raises one UsageError with a line for every unusable flag, before anything is measured."""
    parser = build_parser()
    args = parser.parse_args(argv)
    # all of them at once, and before a model is loaded: a second one would cost another start
    problems = _flag_problems(args, parser)
    for run in args.runs:
        problems += _run_problems(
            run,
            step=args.step,
            sample=args.sample,
            bpb=args.bpb,
            data=args.data,
            # alone it is refused already
            core_chat=args.core and args.core_chat,
        )
    if problems:
        raise UsageError("\n".join(problems))
    return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    """main() with flags that are usable; imports what computes."""
    # here, not above: these import torch, which --help and refused flags do not need
    from nanochat import hardware, ranks
    from nanochat.apps.evaluate.measure import Machine
    from nanochat.apps.evaluate.report import as_json, check_writable, results_folder, write
    from nanochat.apps.evaluate.subject import open_subject
    from nanochat.eval.core_bundle import find_bundle

    device_type = hardware.pick_device_type(args.device_type)
    hardware.prepare(device_type)
    device = ranks.setup(device_type)
    dtype, _ = hardware.pick_dtype(args.dtype, device_type)
    # with --json, the JSON is all that is printed
    say = _silent if args.json else ranks.print0
    machine = Machine(device, args.batch_tokens, say, show_progress=not args.json)
    # found out before hours of work, not after
    folders = [results_folder(args.out, run) for run in args.runs]
    ranks.from_rank0_or_raise(lambda: check_writable(folders))
    bundle = None
    if args.core:
        bundle = ranks.from_rank0_or_raise(lambda: find_bundle(args.core_bundle, say))
    reports = []
    for run, folder in zip(args.runs, folders, strict=True):
        subject = open_subject(run, args.step, device, dtype)
        # all against one, since differences between neighbours could not be read together
        first = reports[0] if reports else None
        report = _report_of(args, subject, machine, dtype, bundle, first)
        reports.append(report)
        # rank 0 writes; a disk that is full ends all ranks
        path = ranks.from_rank0_or_raise(
            lambda folder=folder, report=report: write(report, folder, name_run=bool(args.out))
        )
        say(f"written: {path}.md, .json, .csv")
    if args.json:
        # one array at the end, so that the output is valid JSON for any number of runs
        ranks.print0(json.dumps([as_json(report) for report in reports], indent=2))
    ranks.close()
    # after all runs: one failed measurement should not cost those that follow
    if any(report.failed() for report in reports):
        return EXIT_FAILED
    return EXIT_COMPLETED


def _report_of(
    args: argparse.Namespace,
    subject: "Subject",
    machine: "Machine",
    dtype: "torch.dtype",
    bundle: "Path | None",
    first: "Report | None",
) -> "Report":
    """Measure and print all that the flags ask for. first: the report to compare CORE with."""
    from nanochat import hardware, ranks
    from nanochat.apps.evaluate.measure import draw, measure_bpb, measure_core
    from nanochat.apps.evaluate.report import Report, as_text, difference
    from nanochat.eval.generation import check_prompts, prompt_with_bos

    device = machine.device
    dtype_name = str(dtype).removeprefix("torch.")
    machine.say(f"{subject.title}: {device.type} x {ranks.world_size()}, {dtype_name}")
    # an empty prompt is a beginning as well: the model then starts a document of its own
    prompts = args.prompt or [""]
    # samples come last, and a prompt that is too long should not cost the rest
    if args.sample:
        encode = functools.partial(prompt_with_bos, subject.tokenizer)
        check_prompts(subject.model, encode, prompts, args.max_tokens)
    bpb = core = samples = compared = None
    if args.bpb:
        bpb = measure_bpb(subject, machine, data=args.data, eval_tokens=args.eval_tokens)
    if args.core:
        core = measure_core(
            subject,
            machine,
            bundle=bundle,
            labels=args.tasks,
            max_per_task=args.max_per_task,
            baselines=args.baselines,
            crop=args.core_crop,
            chat=args.core_chat,
        )
        if first is not None:
            compared = difference(core.result, first.run, first.core.result)
    if args.sample:
        samples = draw(subject, prompts, max_tokens=args.max_tokens, seed=args.seed)
    report = Report(
        title=subject.title,
        run=subject.run,
        step=subject.step,
        device=hardware.describe(device),
        ranks=ranks.world_size(),
        dtype=dtype_name,
        bpb=bpb,
        core=core,
        samples=samples,
        difference=compared,
    )
    # printed run by run: what is done should be seen before the next run takes its time
    machine.say(as_text(report))
    return report


def _silent(text: str) -> None:
    """print() of nothing."""
