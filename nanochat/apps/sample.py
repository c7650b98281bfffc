"""`nanochat sample RUN`: continue prompts with a trained model, on the console."""

import argparse
from pathlib import Path

from nanochat.common import EXIT_COMPLETED, UsageError, step_argument

# Flags whose name differs from the setting's name in nanochat.eval.generation.
FLAG_OF = {"max_new_tokens": "--max-tokens"}


def build_parser():
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat sample",
        allow_abbrev=False,
        description="Continue prompts with a trained model. One sample of a prompt appears as it is drawn; several "
        "samples are drawn side by side and appear together.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, for example out/d4")
    parser.add_argument(
        "--step",
        type=step_argument,
        default=-1,
        metavar="N",
        help="checkpoint by its step, or best: the best by validation (-1: the newest; default %(default)s)",
    )
    # what to continue
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be given several times; without any, a new document is begun",
    )
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="more prompts, one a line, UTF-8; blank lines are skipped",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="continuations of each prompt (default %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="new tokens at most (default %(default)s); a sample ends earlier when the model ends "
        "the document",
    )
    # how to choose
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divides the logits: 0 always takes the most likely token, 1 is the model's distribution "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=50,
        metavar="K",
        help="only the K most likely tokens (0: off; default %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the smallest set of most likely tokens whose probability reaches P "
        "(1: off; default %(default)s)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="makes tokens already in the text less likely when above 1 (1: off; default %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        metavar="N",
        help="the same seed gives the same text (default %(default)s)",
    )
    # where to compute
    parser.add_argument(
        "--device-type",
        default="",
        choices=("", "cuda", "mps", "cpu"),
        help="default: the first present of cuda, mps, cpu",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="of the products (default %(default)s: float32 on CPUs, bfloat16 on GPUs that have it)",
    )
    return parser


def read_prompts(args):
    """Prompts in order: those of --prompt, then the lines of --prompts-file; one empty prompt if neither is given.

    Raises UsageError for a file that cannot be read or has no prompt in it."""
    if args.prompts_file is None:
        return args.prompt or [""]
    try:
        lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--prompts-file {args.prompts_file}: cannot be read as UTF-8 text ({error}); "
            "give a text file with one prompt a line"
        ) from None
    from_file = [line for line in lines if line.strip()]
    if not from_file:
        raise UsageError(f"--prompts-file {args.prompts_file}: holds no prompt; write one a line")
    return args.prompt + from_file


def check_settings(args, sampling):
    """The prompts to continue. Raises one UsageError with a line for every unusable value."""
    from nanochat.eval.generation import option_problems

    problems = [
        f"{FLAG_OF.get(name, '--' + name.replace('_', '-'))} {value}: {reason}"
        for name, value, reason in option_problems(num_samples=args.num_samples, **sampling)
    ]
    if args.step != "best" and args.step < -1:
        problems.append(
            f"--step {args.step}: must be the step of a checkpoint; use -1 for the newest"
        )
    prompts = []
    try:
        prompts = read_prompts(args)
    except UsageError as error:
        problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return prompts


def main(argv):
    """Run the app with its arguments (without the app's name); returns the exit code. Raises UsageError."""
    args = build_parser().parse_args(argv)
    sampling = {
        "max_new_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
    }
    prompts = check_settings(args, sampling)

    from nanochat import load
    from nanochat.eval.generation import NotNumbers, check_prompts, generate_text, generate_texts

    model, tokenizer = load(
        args.run,
        step=None if args.step == -1 else args.step,
        device_type=args.device_type,
        dtype=args.dtype,
    )
    check_prompts(model, tokenizer, prompts, args.max_tokens)

    titled = len(prompts) * args.num_samples > 1
    try:
        for p, prompt in enumerate(prompts, start=1):
            if args.num_samples == 1:  # an iterator of pieces, printed as they are drawn
                samples = [generate_text(model, tokenizer, prompt, **sampling)]
            else:
                texts = generate_texts(model, tokenizer, prompt, args.num_samples, **sampling)
                samples = [[text] for text in texts]
            for s, pieces in enumerate(samples, start=1):
                if titled:
                    print(f"--- prompt {p} of {len(prompts)}, sample {s} of {args.num_samples} ---")
                print(prompt, end="", flush=True)
                for piece in pieces:
                    print(piece, end="", flush=True)
                print()
    except NotNumbers as error:
        print(flush=True)  # ends the line of the prompt
        raise UsageError(f"{args.run}: {error}, with --step N or --step best") from None
    return EXIT_COMPLETED
