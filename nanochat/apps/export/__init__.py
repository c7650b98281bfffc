"""`nanochat export`: a run as a folder for transformers or for llama.cpp, or back to a run.

A llama run becomes a plain Llama folder, or a gguf file; a speedrun run carries its modelling file
for transformers, and llama.cpp does not know it. Data files are safetensors, JSON and gguf. What
was written is loaded again and compared before the folder gets its name."""

import argparse
import sys
from pathlib import Path

from nanochat.common import EXIT_COMPLETED, EXIT_FAILED, UsageError, path_argument, step_argument


def build_parser() -> argparse.ArgumentParser:
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat export",
        allow_abbrev=False,
        description="Write a run as a Hugging Face folder (--format hf), or a llama run as a file "
        "for llama.cpp and Ollama (--format gguf), or turn the Hugging Face folder of an exported "
        "llama back into a run (--format run). The result is loaded and compared with the original "
        "before it gets its name. The comparison needs the package transformers (hf) or xllamacpp "
        "(gguf); without it the folder is written and reported as not verified.",
    )
    parser.add_argument(
        "source",
        type=path_argument,
        metavar="RUN",
        help="run folder, for example out/d4; with --format run, the Hugging Face folder",
    )
    # Folders of others are never overwritten: there is no flag for that.
    parser.add_argument(
        "out", type=path_argument, metavar="OUT", help="folder to create; it must be new or empty"
    )
    parser.add_argument(
        "--format",
        default="hf",
        choices=("hf", "gguf", "run"),
        help="hf: a folder for AutoModelForCausalLM.from_pretrained(OUT); a speedrun model needs "
        "trust_remote_code=True. gguf: model.gguf and a Modelfile for Ollama, of a llama that was "
        "trained with --tokenizer=gpt2, char or byte. run: a run folder for train.py and the other "
        "apps (default: %(default)s)",
    )
    parser.add_argument(
        "--step",
        type=step_argument,
        default=-1,
        metavar="N",
        help="checkpoint to export, by its step; best: the best by validation; -1: the newest "
        "(default: %(default)s); only with --format hf and gguf",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "q8_0"),
        help="dtype of the saved weights: float32 is lossless, bfloat16 takes half the space, q8_0 "
        "(8 bits and a scale for each 32 weights; only with --format gguf) about a quarter "
        "(default: %(default)s); only with --format hf and gguf",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the app with its arguments, without the app's name. Returns the exit code.

    UsageError for wrong flags, an unusable source, or a folder OUT that exists."""
    args = build_parser().parse_args(argv)
    # All at once, and before anything slow.
    problems = _problems(args.format, args.step, args.dtype)
    if problems:
        raise UsageError("\n".join(problems))
    source = Path(args.source)
    out = Path(args.out)
    # These import torch, which takes seconds and which --help does not need.
    from nanochat.apps.export.from_huggingface import import_folder
    from nanochat.apps.export.to_gguf import export_gguf
    from nanochat.apps.export.to_huggingface import export_run
    from nanochat.apps.export.verify import ExportFailed

    # Only the command line writes the newest as -1: it has no other word for None.
    step = None if args.step == -1 else args.step
    try:
        if args.format == "run":
            import_folder(source, out)
        elif args.format == "gguf":
            export_gguf(source, out, step, args.dtype)
        else:
            export_run(source, out, step, args.dtype)
    # Not a UsageError: the request was valid, and another release of a package may honour it.
    except ExportFailed as error:
        print(f"nanochat export: failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_COMPLETED


def _problems(target: str, step: int | str, dtype: str) -> list[str]:
    """What is wrong with the flags. target: of --format."""
    # A flag without effect would leave its user believing that it had one.
    problems = []
    if step != "best" and step < -1:
        problems.append(f"--step {step}: must be the step of a checkpoint; use -1 for the newest")
    if target == "run" and step != -1:
        problems.append(
            f"--step {step}: works only with --format hf and gguf, since a Hugging Face folder "
            "has no steps; leave it out"
        )
    if target == "run" and dtype != "float32":
        problems.append(
            f"--dtype {dtype}: works only with --format hf and gguf, since a run's weights are "
            "float32; leave it out"
        )
    if target == "hf" and dtype == "q8_0":
        problems.append(
            "--dtype q8_0: works only with --format gguf, since transformers has no such dtype; "
            "use bfloat16"
        )
    return problems
