"""`nanochat export`: a run as a folder for transformers or llama.cpp, or as a page; and models of
other programs as runs.

A llama run becomes a plain Llama folder, or a gguf file; a speedrun run carries its modelling file
for transformers, and llama.cpp does not know it. Both become an HTML file that runs in a browser.
Data files are safetensors, JSON and gguf. What was written is read again and compared before it
gets its name."""

import argparse
import sys
from pathlib import Path

from nanochat.common import EXIT_COMPLETED, EXIT_FAILED, UsageError, path_argument, step_argument
from nanochat.run.folder import run_argument


def build_parser() -> argparse.ArgumentParser:
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat export",
        allow_abbrev=False,
        description="Write a run as a Hugging Face folder (--format hf), as one HTML file that "
        "runs the model in a browser, offline (--format html), or a llama run as a file for "
        "llama.cpp and Ollama (--format gguf), or turn the Hugging Face folder of an exported "
        "llama back into a run (--format run). --from imports models of other programs as "
        "runs. The result is loaded and compared with the original "
        "before it gets its name. The comparison needs the package transformers (hf) or xllamacpp "
        "(gguf); without it the folder is written and reported as not verified.",
    )
    parser.add_argument(
        "source",
        nargs="?",
        default="",
        type=run_argument,
        metavar="RUN",
        help="run folder, for example out/d4, or its tag; with --format run, the Hugging Face "
        "folder",
    )
    # Folders of others are never overwritten: there is no flag for that.
    parser.add_argument(
        "out",
        nargs="?",
        default="",
        type=path_argument,
        metavar="OUT",
        help="folder to create; it must be new or empty. With --format html a new file, .html",
    )
    _add_import_flags(parser)
    parser.add_argument(
        "--format",
        default="",
        choices=("hf", "gguf", "html", "run"),
        help="hf: a folder for AutoModelForCausalLM.from_pretrained(OUT); a speedrun model needs "
        "trust_remote_code=True. gguf: model.gguf and a Modelfile for Ollama, of a llama that was "
        "trained with --tokenizer=bpe-llama, gpt2, char or byte. html: one file with weights as "
        "small integers, tokenizer and a page to play with the model. run: a run folder for "
        "train.py and the other apps (default: hf; with --from: run)",
    )
    parser.add_argument(
        "--step",
        type=step_argument,
        default=-1,
        metavar="N",
        help="checkpoint to export, by its step; best: the best by validation; -1: the newest "
        "(default: %(default)s); only with --format hf, gguf and html",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "q8_0"),
        help="dtype of the saved weights: float32 is lossless, bfloat16 takes half the space, q8_0 "
        "(8 bits and a scale for each 32 weights; only with --format gguf) about a quarter "
        "(default: %(default)s); only with --format hf and gguf",
    )
    parser.add_argument(
        "--push",
        default="",
        metavar="REPO",
        help="also upload what was written and verified to a new private repository on the Hugging "
        "Face hub, NAME or OWNER/NAME; needs a token that may write, in HF_TOKEN or by `hf auth "
        "login` (default: no upload); not with --format run",
    )
    parser.add_argument(
        "--public", action="store_true", help="let everybody see the repository of --push"
    )
    return parser


def _add_import_flags(parser: argparse.ArgumentParser) -> None:
    """What replaces RUN and OUT for models of other programs."""
    parser.add_argument(
        "--from",
        dest="foreign",
        default="",
        type=path_argument,
        metavar="PATH",
        help="instead of RUN: import a model of another program, a Hugging Face folder of a Llama, "
        "a .bin of llama2.c, or a ckpt.pt of nanoGPT (with --format hf only). Only data is read, "
        "never code",
    )
    parser.add_argument(
        "--out",
        dest="import_out",
        default="",
        type=path_argument,
        metavar="OUT",
        help="folder to create with --from: of a run, or with --format hf for transformers",
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        type=path_argument,
        metavar="PATH",
        help="tokenizer of the model of --from: a run folder, a folder with tokenizer.json, gpt2, "
        "or with --format hf the meta.pkl of nanoGPT's characters (default: the one in the folder "
        "of --from)",
    )


def main(argv: list[str]) -> int:
    """Run the app with its arguments, without the app's name. Returns the exit code.

    UsageError for wrong flags, an unusable source, or a folder OUT that exists."""
    # The usual parser would take one positional and refuse another one behind a flag.
    args = build_parser().parse_intermixed_args(argv)
    # All at once, and before anything slow.
    problems = _import_problems(args) if args.foreign else _run_problems(args)
    args.format = args.format or ("run" if args.foreign else "hf")
    problems += _problems(args.format, args.step, args.dtype)
    problems += _push_problems(args)
    if problems:
        raise UsageError("\n".join(problems))
    source = Path(args.foreign or args.source)
    out = Path(args.import_out or args.out)
    # These import torch, which takes seconds and which --help does not need.
    from nanochat.apps.export.importing import import_model
    from nanochat.apps.export.push import card_of_page, open_destination, push
    from nanochat.apps.export.to_gguf import export_gguf
    from nanochat.apps.export.to_html import export_html
    from nanochat.apps.export.to_huggingface import export_run
    from nanochat.apps.export.verify import ExportFailed
    from nanochat.run.loading import step_of

    # Only the command line writes the newest as -1: it has no other word for None.
    step = None if args.step == -1 else args.step
    destination = None
    if args.push:
        # Before the work: what the hub would refuse.
        destination = open_destination(args.push, args.format, args.public)
        # A run may go on, and the card of a page is written after the page.
        step = step_of(source, step) if args.format == "html" else step
    try:
        if args.foreign or args.format == "run":
            import_model(source, out, args.format, args.tokenizer)
        elif args.format == "gguf":
            export_gguf(source, out, step, args.dtype)
        elif args.format == "html":
            export_html(source, out, step)
        else:
            export_run(source, out, step, args.dtype)
    # Not a UsageError: the request was valid, and another release of a package may honour it.
    except ExportFailed as error:
        print(f"nanochat export: failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    if destination:
        card = card_of_page(source, step) if args.format == "html" else ""
        print(push(destination, out, card))
    return EXIT_COMPLETED


def _run_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the source and the destination of a command without --from."""
    problems = []
    if not args.out:
        problems.append("export needs RUN and OUT, or --from PATH and --out OUT")
    if args.import_out:
        problems.append(f"--out {args.import_out}: works only with --from; name OUT after RUN")
    if args.tokenizer and args.format != "run":
        problems.append(
            f"--tokenizer {args.tokenizer}: works only with --from, since a run has its own; leave "
            "it out"
        )
    return problems


def _import_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of a command with --from."""
    problems = []
    if args.source:
        problems.append(
            f"--from {args.foreign}: excludes RUN ({args.source}); name the new folder with --out"
        )
    if not args.import_out:
        problems.append(f"--from {args.foreign}: needs --out, the folder to create")
    if args.format in ("gguf", "html"):
        problems.append(
            f"--format {args.format}: works only on a run; import one with --from first, then "
            "export it"
        )
    # With --format run these have messages of their own.
    if args.format == "hf" and args.step != -1:
        problems.append(f"--step {args.step}: has no effect with --from; leave it out")
    if args.format == "hf" and args.dtype != "float32":
        problems.append(
            f"--dtype {args.dtype}: has no effect with --from, which writes float32; leave it out"
        )
    if args.format == "hf" and args.push:
        problems.append(f"--push {args.push}: has no effect with --from; leave it out")
    return problems


def _push_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with --push and --public."""
    problems = []
    if args.push and args.format == "run":
        problems.append(
            f"--push {args.push}: works only with --format hf, gguf and html; a run folder is for "
            "this program alone"
        )
    if args.public and not args.push:
        problems.append("--public: has no effect without --push; add --push REPO, or leave it out")
    return problems


def _problems(target: str, step: int | str, dtype: str) -> list[str]:
    """What is wrong with the flags. target: of --format."""
    # A flag without effect would leave its user believing that it had one.
    problems = []
    if step != "best" and step < -1:
        problems.append(f"--step {step}: must be the step of a checkpoint; use -1 for the newest")
    if target == "run" and step != -1:
        problems.append(
            f"--step {step}: works only with --format hf, gguf and html, since a Hugging Face "
            "folder has no steps; leave it out"
        )
    if target == "run" and dtype != "float32":
        problems.append(
            f"--dtype {dtype}: works only with --format hf and gguf, since a run's weights are "
            "float32; leave it out"
        )
    if target == "html" and dtype != "float32":
        problems.append(
            f"--dtype {dtype}: works only with --format hf and gguf, since a page takes the fewest "
            "bits that keep its logits within 1e-2 of float32's; leave it out"
        )
    if target == "hf" and dtype == "q8_0":
        problems.append(
            "--dtype q8_0: works only with --format gguf, since transformers has no such dtype; "
            "use bfloat16"
        )
    return problems
