"""`nanochat sample RUN`: continue prompts with a trained model, on the console."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat import output
from nanochat.common import (
    EXIT_COMPLETED,
    UsageError,
    add_model_flags,
    path_argument,
    step_argument,
    valid_unicode,
)
from nanochat.data.text import read_prompts, read_text

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.decoder import Decoder

# a --prompt-from that is standard input
STDIN = "-"


def build_parser() -> argparse.ArgumentParser:
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat sample",
        allow_abbrev=False,
        description="Continue prompts with a trained model. A single sample appears as it is "
        "drawn; several samples of a prompt are drawn together and appear together.",
    )
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help="run folder, for example out/d4")
    add(
        "--step",
        type=step_argument,
        default=-1,
        metavar="N",
        help="checkpoint, by its step; best: the best by validation; -1: the newest "
        "(default %(default)s)",
    )
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
        help="text to continue; may be given several times; without any, a new document is begun",
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
        default=42,
        metavar="N",
        help="the same seed gives the same text (default %(default)s)",
    )


def prompts_of(given: list[str], path: str | None) -> list[str]:
    """The prompts in order: those of --prompt, then the lines of --prompts-file; [""] without any.

    Raises UsageError for a file that cannot be read or that holds no prompt."""
    if path is None:
        # an empty prompt is a beginning as well: the model then starts a document of its own
        return given or [""]
    return given + read_prompts(path, "--prompts-file")


def read_prompt(path: str) -> str:
    """The prompt that a whole file is, or standard input, without the line end at its end.

    Raises UsageError if it cannot be read."""
    text = _standard_input() if path == STDIN else read_text(Path(path), f"--prompt-from={path}:")
    # editors and `echo` put the last line end there
    return text.removesuffix("\n")


def _standard_input() -> str:
    """The text of standard input. UsageError if it cannot be read."""
    try:
        # utf-8-sig: a byte order mark is not text
        # the descriptor, since there is no sys.stdin where it was closed
        with open(0, encoding="utf-8-sig", newline="", closefd=False) as file:
            # as in texts to train on
            return file.read().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--prompt-from=-: standard input cannot be read as UTF-8 text ({error}); give it text"
        ) from None


def main(argv: list[str]) -> int:
    """Run the app with its arguments (without the app's name); returns the exit code.

    Raises one UsageError with a line for every unusable value, before the model is loaded."""
    args = build_parser().parse_args(argv)
    # named as the arguments of generate_text(), so that one dict serves the check and the drawing
    sampling = {
        "max_new_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
    }
    # all problems at once, and before the model is loaded, which may take a while
    problems = _sampling_problems(sampling, args.num_samples)
    if args.step != "best" and args.step < -1:
        problems.append(
            f"--step {args.step}: must be the step of a checkpoint; use -1 for the newest"
        )
    if "" in args.stop:
        problems.append("--stop '': an empty text is everywhere; name a text, or leave it out")
    # an unreadable file is one more line, not the end of the check
    prompts = []
    try:
        prompts = args.prompt + [read_prompt(path) for path in args.prompt_from]
        prompts = prompts_of(prompts, args.prompts_file)
    except UsageError as error:
        problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))

    # here, not above: they import torch
    from nanochat import load
    from nanochat.eval.generation import NotNumbers

    step = None if args.step == -1 else args.step
    model, tokenizer = load(args.run, step=step, device_type=args.device_type, dtype=args.dtype)
    limits = token_limits(model, tokenizer, prompts, args.max_tokens)
    # a single sample is printed bare, so that it can be piped as text
    titled = len(prompts) * args.num_samples > 1
    try:
        for p, (prompt, limit) in enumerate(zip(prompts, limits, strict=True), start=1):
            options = {**sampling, "max_new_tokens": limit, "stop": args.stop}
            samples = samples_of(model, tokenizer, prompt, args.num_samples, options)
            for s, pieces in enumerate(samples, start=1):
                if titled:
                    print(f"--- prompt {p} of {len(prompts)}, sample {s} of {args.num_samples} ---")
                _print_text(prompt, pieces)
                if output.reader_is_gone():
                    return EXIT_COMPLETED
    except NotNumbers as error:
        # ends the line of the prompt
        print(flush=True)
        raise UsageError(f"{args.run}: {error}, with --step N or --step best") from None
    return EXIT_COMPLETED


def token_limits(
    model: "Decoder", tokenizer: "Tokenizer", prompts: list[str], max_tokens: int
) -> list[int]:
    """New tokens of each prompt at most: max_tokens, or as many as the model has positions for.

    Prints a note about each prompt where that is fewer, or where the context of training is
    exceeded. UsageError that names every prompt that cannot be continued at all."""
    from nanochat.eval.generation import check_prompts, prompt_with_bos, room_for

    # all of them before the first is printed: one that is too long should not show up only at the
    # end
    check_prompts(model, tokenizer, prompts, 1)
    limits = []
    for p, prompt in enumerate(prompts, start=1):
        room = room_for(model, len(prompt_with_bos(tokenizer, prompt)), max_tokens)
        limits.append(room.max_new_tokens)
        if room.note:
            which = f"prompt {p} of {len(prompts)}: " if len(prompts) > 1 else ""
            # not among the text, which may be piped
            print(f"note: {which}{room.note}", file=sys.stderr)
    return limits


def samples_of(
    model: "Decoder",
    tokenizer: "Tokenizer",
    prompt: str,
    num_samples: int,
    options: dict[str, Any],
) -> Iterator[Iterable[str]]:
    """The samples of a prompt, each in pieces to print. options: of generate_text()."""
    from nanochat.eval.generation import generate_text, generate_texts

    # drawn while it is printed; several samples share each step and end at different ones
    if num_samples == 1:
        yield generate_text(model, tokenizer, prompt, **options)
        return
    for text in generate_texts(model, tokenizer, prompt, num_samples, **options):
        yield [text]


def _sampling_problems(sampling: dict[str, float], num_samples: int) -> list[str]:
    """A message for every unusable setting, by the name of its flag."""
    # here for the same reason as in main(): this module imports torch
    from nanochat.eval.generation import option_problems

    problems = []
    for name, value, reason in option_problems(num_samples=num_samples, **sampling):
        # the one flag whose name is shorter than the argument that it sets
        flag = "max-tokens" if name == "max_new_tokens" else name.replace("_", "-")
        problems.append(f"--{flag} {value}: {reason}")
    return problems


def _print_text(prompt: str, pieces: Iterable[str]) -> None:
    """Print a prompt and its continuation, each piece as soon as it is drawn."""
    # flushed, so that text appears as it is drawn in a pipe as well
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        # as after `| head`
        if output.reader_is_gone():
            return
    print()
