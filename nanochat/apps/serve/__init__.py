"""`nanochat serve RUN [RUN ...]`: trained models behind an API that OpenAI's clients speak, and a
page to try them and to watch runs."""

import argparse
from argparse import Namespace
from pathlib import Path

from nanochat.common import (
    EXIT_COMPLETED,
    UsageError,
    add_model_flags,
    install_hint,
    path_argument,
    step_argument,
)
from nanochat.run.folder import run_argument

PURPOSE = "nanochat serve"


def build_parser() -> argparse.ArgumentParser:
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat serve",
        allow_abbrev=False,
        description="Serve runs over HTTP: /v1/models, /v1/completions and /v1/chat/completions as "
        "OpenAI's clients expect them, /health, and /metrics for Prometheus; and a page for "
        "browsers at /, which plays with the models and watches runs. The name of a model is the "
        "name of its run folder. SIGTERM and Ctrl-C let running requests finish for some "
        "seconds.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=run_argument,
        metavar="RUN",
        help="run folder, for example out/d4, or its tag: d4",
    )
    _add_model_flags(parser)
    _add_watch_flags(parser)
    _add_network_flags(parser)
    _add_limit_flags(parser)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--step",
        type=step_argument,
        default=-1,
        metavar="N",
        help="checkpoint, by its step; best: the best by validation; -1: the newest "
        "(default %(default)s)",
    )
    add(
        "--follow",
        action="store_true",
        help="while a run is training, replace its weights by those of each newer checkpoint, "
        "between requests",
    )
    add(
        "--steps-in-memory",
        type=int,
        default=4,
        metavar="N",
        help="checkpoints that are kept in memory besides those that are always served; a request "
        "names one as RUN@STEP, it is then loaded, and the one that was not asked for the longest "
        "gives way; 0: such requests are refused (default %(default)s)",
    )
    add(
        "--batch-invariant",
        action="store_true",
        help="a text gets the same tokens whatever runs beside it, bit for bit; without effect on "
        "CPUs with a C++ compiler, where that is always so; elsewhere texts are then computed one "
        "at a time, which is slower",
    )
    add_model_flags(parser)


def _add_watch_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--watch",
        default="",
        type=path_argument,
        metavar="FOLDER",
        help="the page shows the curves and samples of the runs in this folder, up to 2 levels "
        "below (default: the folder that holds the first RUN)",
    )
    add(
        "--no-watch",
        dest="watch",
        action="store_const",
        const=None,
        help="the page shows no curves, no samples and no held-out text",
    )


def _add_network_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on, and a name that requests may use for this server besides "
        "localhost; 0.0.0.0: all addresses (default %(default)s, this machine only)",
    )
    add(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="port to listen on; 0: any free one, which is printed (default %(default)s)",
    )
    add(
        "--api-key",
        metavar="KEY",
        help="requests must send 'Authorization: Bearer KEY'; default: none is needed",
    )


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--slots",
        type=int,
        default=8,
        metavar="N",
        help="texts of a model that are generated together (default %(default)s)",
    )
    add(
        "--queue",
        type=int,
        default=64,
        metavar="N",
        help="texts of a model that may wait for a slot; further requests get status 429 "
        "(default %(default)s)",
    )
    add(
        "--max-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="new tokens that a request may ask for (default %(default)s)",
    )
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="a request that takes longer, waiting included, ends with status 504 "
        "(default %(default)g)",
    )


# name, whether a value is usable, reason and remedy; NaN fails every comparison
CHECKS = (
    ("port", lambda port: 0 <= port <= 65535, "must be from 0 to 65535"),
    ("steps_in_memory", lambda n: 0 <= n <= 1000, "must be from 0 to 1000"),
    ("slots", lambda n: 1 <= n <= 1024, "must be from 1 to 1024"),
    ("queue", lambda n: 1 <= n <= 100_000, "must be from 1 to 100000"),
    ("max_tokens", lambda n: n >= 1, "must be at least 1"),
    ("timeout", lambda seconds: 0 < seconds <= 86400, "must be above 0 and at most 86400 seconds"),
)


def check_arguments(args: Namespace) -> None:
    """Raises one UsageError with a line for every unusable value."""
    problems = [
        f"--{name.replace('_', '-')} {getattr(args, name)}: {reason}"
        for name, usable, reason in CHECKS
        if not usable(getattr(args, name))
    ]
    if args.step != "best" and args.step < -1:
        problems.append(
            f"--step {args.step}: must be the step of a checkpoint; use -1 for the newest"
        )
    if args.follow and args.step != -1:
        problems.append(
            f"--step {args.step}: --follow serves the newest checkpoint; give only one of the two"
        )
    if args.watch and not Path(args.watch).is_dir():
        problems.append(
            f"--watch {args.watch}: no such folder; name one that holds runs, or use --no-watch"
        )
    if args.api_key is not None and not (args.api_key.isascii() and args.api_key.strip()):
        problems.append(
            f"--api-key {args.api_key!r}: must be visible ASCII characters; leave it out to serve "
            f"without a key"
        )
    if problems:
        raise UsageError("\n".join(problems))


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code, 0 after an orderly end.

    UsageError for unusable flags, a run that cannot be loaded, a missing package, or an address
    that cannot be listened on."""
    args = build_parser().parse_args(argv)
    check_arguments(args)
    for package in ("starlette", "uvicorn"):
        try:
            __import__(package)
        except ImportError:
            raise install_hint(package, PURPOSE) from None

    # here, not above: they import torch
    from nanochat.apps.serve.runs import load_runs
    from nanochat.apps.serve.server import listen, serve

    # before the models are loaded, which may take a while
    with listen(args.host, args.port) as socket:
        serve(load_runs(args), args, socket)
    return EXIT_COMPLETED
