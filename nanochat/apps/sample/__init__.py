"""`nanochat sample RUN`: continue prompts with a trained model, on the console."""

import argparse
import json
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from nanochat.apps.sample.prompts import STDIN, is_terminal, prompts_of, read_prompt
from nanochat.common import (
    EXIT_COMPLETED,
    UsageError,
    add_model_flags,
    path_argument,
    step_argument,
    valid_unicode,
)
from nanochat.run.folder import run_argument

DEFAULT_SEED = 42


def build_parser() -> argparse.ArgumentParser:
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat sample",
        allow_abbrev=False,
        description="Continue prompts with a trained model. A single sample appears as it is "
        "drawn; several samples of a prompt are drawn together and appear together. On a terminal "
        "and without a prompt, prompts and commands are read line by line. Several runs or steps "
        "continue the same prompts with the same seed, side by side if the terminal is wide "
        "enough.",
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=run_argument,
        metavar="RUN",
        help="run folder, such as out/d4, or its tag: d4",
    )
    add(
        "--step",
        type=step_argument,
        action="append",
        metavar="N",
        help="checkpoint, by its step; best: the best by validation; -1: the newest (default); may "
        "be given several times",
    )
    add(
        "--interactive",
        action="store_true",
        help="read prompts and commands from standard input, line by line; the default on a "
        "terminal without a prompt; /help lists the commands",
    )
    add(
        "--chat",
        action="store_true",
        help="talk with a run of `nanochat sft`: each prompt is a message, and its answer is "
        "printed; line by line, each message is answered with those before in mind",
    )
    add(
        "--system",
        type=valid_unicode,
        default="",
        metavar="TEXT",
        help="with --chat: a message from the system, before all others",
    )
    add("--json", action="store_true", help="print JSON instead of text, when all is drawn")
    _add_prompt_flags(parser)
    _add_sampling_flags(parser)
    add_model_flags(parser)
    return parser


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--prompt",
        # bytes of the command line that are not UTF-8 arrive as lone surrogates
        type=valid_unicode,
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be given several times; '': a new document, which is what is "
        "written without any prompt if this is not a terminal",
    )
    add(
        "--prompt-from",
        type=path_argument,
        action="append",
        default=[],
        metavar="FILE",
        help="text file (UTF-8) that is one prompt, of any number of lines; the line end at its "
        "end is dropped; -: standard input; may be given several times",
    )
    add(
        "--prompts-file",
        type=path_argument,
        metavar="FILE",
        help="text file (UTF-8) with more prompts, one a line; blank lines are skipped",
    )
    add(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="continuations of each prompt (default %(default)s)",
    )
    add(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="new tokens at most (default %(default)s); a sample ends earlier when the model ends "
        "the document, or at --stop",
    )
    add(
        "--stop",
        type=valid_unicode,
        action="append",
        default=[],
        metavar="TEXT",
        help="a sample ends before this text; may be given several times; in bash $'\\n' is a line "
        "end",
    )


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divides the logits; 0: always the most likely token; 1: the model's distribution "
        "(default %(default)s)",
    )
    add(
        "--top-k",
        type=int,
        default=50,
        metavar="K",
        help="draw only from the K most likely tokens; 0: off (default %(default)s)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw only from the smallest set of most likely tokens whose probability reaches P; "
        "1: off (default %(default)s)",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw only tokens at least P times as probable as the most likely one; 0: off "
        "(default %(default)s)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: makes tokens less likely that the text already contains; 1: off "
        "(default %(default)s)",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help=f"the same seed gives the same text (default {DEFAULT_SEED}; --interactive: another "
        "one for each text)",
    )


def main(argv: list[str]) -> int:
    """Run the app with its arguments (without the app's name); returns the exit code.

    Raises one UsageError with a line for every unusable value, before the model is loaded."""
    args = build_parser().parse_args(argv)
    args.step = args.step or [-1]
    # named as the arguments of request_of(), so that one dict serves the check and the drawing
    sampling = {
        "max_new_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": DEFAULT_SEED if args.seed is None else args.seed,
    }
    is_prompted = bool(args.prompt or args.prompt_from or args.prompts_file)
    is_interactive = args.interactive or not is_prompted and _is_conversation(args)
    prompts = _checked_prompts(args, sampling, is_prompted or is_interactive)
    options = {**sampling, "stop": tuple(args.stop)}
    if is_interactive:
        # the same text for every prompt would be no conversation
        _converse(args, {**options, "seed": args.seed}, prompts if is_prompted else [])
        return EXIT_COMPLETED

    # here, not above: they import torch
    from nanochat.apps.sample.drawing import draw, load_subject
    from nanochat.apps.sample.printing import print_compared, print_samples

    asked = [(run, step) for run in args.runs for step in args.step]
    if len(asked) == 1 and not args.json:
        print_samples(load_subject(*asked[0], args), prompts, args.num_samples, options)
        return EXIT_COMPLETED
    # one model after the other, since all may not fit into memory
    drawn = [
        draw(load_subject(run, step, args), prompts, args.num_samples, options)
        for run, step in asked
    ]
    if args.json:
        print(json.dumps([asdict(text) for texts in drawn for text in texts], indent=2))
    else:
        print_compared(drawn, len(prompts), args.num_samples, args.chat)
    return EXIT_COMPLETED


def _is_conversation(args: Namespace) -> bool:
    """Whether one checkpoint is to write one text, and somebody is there to talk to it."""
    if args.json or args.num_samples * len(args.runs) * len(args.step) != 1:
        return False
    return is_terminal(sys.stdin) and is_terminal(sys.stdout)


def _checked_prompts(args: Namespace, sampling: dict[str, Any], has_prompt: bool) -> list[str]:
    """The prompts of the command line. has_prompt: one is given there, or will be read.

    One UsageError with a line for every unusable value."""
    # here for the same reason as in main(): this module imports torch
    from nanochat.eval.generation import option_problems

    # all problems at once, and before the model is loaded, which may take a while
    problems = []
    for name, value, reason in option_problems(num_samples=args.num_samples, **sampling):
        # the one flag whose name is shorter than the argument that it sets
        flag = "max-tokens" if name == "max_new_tokens" else name.replace("_", "-")
        problems.append(f"--{flag} {value}: {reason}")
    problems += [
        f"--step {step}: must be the step of a checkpoint; use -1 for the newest"
        for step in args.step
        if step != "best" and step < -1
    ]
    if "" in args.stop:
        problems.append("--stop '': an empty text is everywhere; name a text, or leave it out")
    if args.system and not args.chat:
        problems.append("--system: needs --chat; add that, or leave it out")
    if args.chat and not has_prompt:
        problems.append(
            "--chat: has no message to answer; give --prompt or --prompt-from, or --interactive to "
            "read messages line by line"
        )
    if args.interactive:
        conflicts = {
            "--json": args.json,
            f"--num-samples {args.num_samples}": args.num_samples > 1,
            f"--prompt-from {STDIN}": STDIN in args.prompt_from,
            "several runs": len(args.runs) > 1,
            "several steps": len(args.step) > 1,
        }
        problems += [
            f"--interactive: cannot be combined with {name}; leave out one of the two"
            for name, is_given in conflicts.items()
            if is_given
        ]
    # an unreadable file is one more line, not the end of the check
    prompts = []
    try:
        prompts = args.prompt + [read_prompt(path) for path in args.prompt_from]
        prompts = prompts_of(prompts, args.prompts_file)
    except UsageError as error:
        problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return prompts


def _converse(args: Namespace, settings: dict[str, Any], prompts: list[str]) -> None:
    """Continue the prompts of the command line, and then do what standard input says."""
    from nanochat.apps.sample.drawing import load_subject
    from nanochat.apps.sample.session import Session
    from nanochat.apps.sample.terminal import reader_of_lines

    subject = load_subject(args.runs[0], args.step[0], args)
    session = Session(subject, settings, args, is_terminal(sys.stdin))
    try:
        session.run(prompts, reader_of_lines())
    finally:
        session.close()
