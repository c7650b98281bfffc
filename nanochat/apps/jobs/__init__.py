"""`nanochat jobs`: see runs while they train, and steer them from another shell."""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable

from nanochat.apps.jobs.cleanup import clean_up
from nanochat.apps.jobs.listing import list_runs, show_status
from nanochat.apps.jobs.naming import RUN_HELP, named
from nanochat.apps.jobs.state import Place
from nanochat.apps.jobs.verbs import Outcome, Refused, abort, order, stop
from nanochat.apps.jobs.watch import DEFAULT_SECONDS, follow
from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    Report,
    UsageError,
    path_argument,
    printable,
    step_argument,
)
from nanochat.run.control import MOST_MINUTES
from nanochat.run.flags import FLAGS, GROUPS, START, Flag, flag, live_problems

Commands = argparse._SubParsersAction
# has a run do something; takes the command line, and lines on what is being done
Action = Callable[[Place, argparse.Namespace, Report], Outcome]


def build_parser() -> argparse.ArgumentParser:
    """The parser with its commands. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat jobs",
        allow_abbrev=False,
        # the epilog has one line for each command, which the default formatter would join
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="See runs while they train, and steer them from another shell.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = [
        _add_list(commands),
        _add_status(commands),
        _add_watch(commands),
        _add_save(commands),
        _add_stop(commands),
        _add_abort(commands),
        _add_land(commands),
        _add_pause(commands),
        _add_continue(commands),
        _add_set(commands),
        _add_cleanup(commands),
        _add_fork(commands),
    ]
    # argparse's own help only names the commands, and what a reader looks for is their arguments;
    # the first word of a usage is "usage:"
    usages = [" ".join(command.format_usage().split()[1:]) for command in parsers]
    heading = "commands in full (nanochat jobs COMMAND --help explains them):"
    parser.epilog = "\n".join([heading, *(f"  {usage}" for usage in usages)])
    return parser


def main(argv: list[str]) -> int:
    """Run a command. Returns the exit code: 0 when it is done, 1 if the run refused or failed.

    UsageError for a run that does not exist and for flags that do not fit."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown and args.command == "set":
        # whatever the value is, the answer says which flags can be set
        names = [word.split("=")[0] for word in unknown if word.startswith("--")]
        values = {name[2:].replace("-", "_"): None for name in names}
        raise UsageError("; ".join(live_problems(values)) or f"not flags: {' '.join(unknown)}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args.do(args)


# ----- commands that look


def _add(
    commands: Commands, name: str, text: str, more: str = "", aliases: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    """A command's parser. text: its help, with which its description begins."""
    command = commands.add_parser(
        name,
        aliases=aliases,
        allow_abbrev=False,
        help=text,
        description=f"{text[0].upper()}{text[1:]}. {more}".strip(),
    )
    command.add_argument("--json", action="store_true", help="print JSON, with nothing rounded")
    return command


def _add_list(commands: Commands) -> argparse.ArgumentParser:
    command = _add(
        commands,
        "list",
        "your runs that are training, or were in the last seven days",
        "A run is found whatever its --out-dir. Its process tells how it is; where that is gone or "
        "does not answer, its files do.",
    )
    command.add_argument(
        "runs",
        nargs="*",
        type=path_argument,
        metavar="RUN",
        help="only these: tags, run folders, or folders of runs, whoever started them",
    )
    command.add_argument(
        "--out-dir",
        action="append",
        default=[],
        type=path_argument,
        metavar="FOLDER",
        help="only the runs in this folder; may be given several times",
    )
    command.add_argument("--all", action="store_true", help="older ones as well")
    command.set_defaults(do=list_runs)
    return command


def _add_status(commands: Commands) -> argparse.ArgumentParser:
    command = _add(commands, "status", "everything that is known of a run now")
    command.add_argument("run", type=path_argument, metavar="RUN", help=RUN_HELP)
    command.set_defaults(do=show_status)
    return command


def _add_watch(commands: Commands) -> argparse.ArgumentParser:
    command = _add(
        commands,
        "watch",
        "a live view of a run, with its loss as a picture",
        "It ends with the run. q or Ctrl-C leaves it, and the run continues. Where standard output "
        "is no terminal, a line is printed at each change.",
    )
    command.add_argument("run", type=path_argument, metavar="RUN", help=RUN_HELP)
    command.add_argument(
        "--every",
        type=_positive,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help="between two looks (default %(default)s)",
    )
    command.add_argument("--once", action="store_true", help="show it once")
    command.set_defaults(do=follow)
    return command


def _add_cleanup(commands: Commands) -> argparse.ArgumentParser:
    command = _add(
        commands,
        "cleanup",
        "remove dead sockets, and what announced processes that are gone",
        "Runs and their checkpoints stay as they are. What is removed is listed.",
    )
    command.add_argument(
        "folders",
        nargs="*",
        type=path_argument,
        metavar="FOLDER",
        help="run folders, or folders of runs, to look through as well",
    )
    command.set_defaults(do=clean_up)
    return command


# ----- a new run


def _add_fork(commands: Commands) -> argparse.ArgumentParser:
    command = _add(
        commands,
        "fork",
        "a new run that continues from a checkpoint of another one, with other flags",
        "The new folder holds all that it needs, with the parent's records up to that step; the "
        "parent is only read. Rates, schedule, horizon, text, seed and whatever a resumed run may "
        "change can be changed; shape, tokenizer, batch and optimizer cannot. With --land it is a "
        "finished model of what the parent had learned by then. Prints the command that trains it.",
    )
    # its own would list every flag of train.py
    command.usage = (
        "nanochat jobs fork RUN --tag NEW [--step N|best] [--land] [--out-dir FOLDER] [--start] "
        "[--json] [flags of train.py]"
    )
    command.add_argument("parent", type=path_argument, metavar="RUN", help=RUN_HELP)
    command.add_argument("--tag", required=True, metavar="NEW", help="name of the new run folder")
    command.add_argument(
        "--step", type=step_argument, metavar="N|best", help="checkpoint (default: the newest)"
    )
    command.add_argument(
        "--out-dir",
        type=path_argument,
        metavar="FOLDER",
        help="folder of the new run folder (default: the one that RUN is in)",
    )
    command.add_argument(
        "--land",
        action="store_true",
        help="begin the warm-down at the checkpoint and complete, in 15%% of the steps so far, as "
        "`nanochat jobs land` does with a run that is training",
    )
    command.add_argument("--start", action="store_true", help="train it now, in this process")
    # a flag that is not given leaves no trace, and keeps its parent's value
    command.argument_default = argparse.SUPPRESS
    for title, rows in GROUPS.items():
        group = command.add_argument_group(title)
        for row in rows:
            if row.on_resume != START:
                _as_in_parent(row).add_to(group)
    command.set_defaults(do=_fork)
    return command


def _as_in_parent(row: Flag) -> Flag:
    """A flag of train.py whose default is the value that the parent has."""
    # the default of a switch makes it one
    if isinstance(row.default, bool):
        return row
    return dataclasses.replace(row, type=row.type or type(row.default), default="as RUN has it")


def _fork(args: argparse.Namespace) -> int:
    # here, since it needs torch
    from nanochat.apps.jobs.fork import fork

    of_run = [name for name, row in FLAGS.items() if row.on_resume != START]
    given = {name: vars(args)[name] for name in of_run if name in vars(args)}
    return fork(args, given)


# ----- commands that change a run


def _add_order(
    commands: Commands,
    name: str,
    action: Action,
    text: str,
    more: str = "",
    aliases: tuple[str, ...] = (),
) -> argparse.ArgumentParser:
    command = _add(commands, name, text, more, aliases)
    command.add_argument("run", type=path_argument, metavar="RUN", help=RUN_HELP)
    command.add_argument(
        "--timeout",
        type=_positive,
        metavar="SECONDS",
        help="stop waiting after so many seconds, with exit code 1; the run still does what it was "
        "asked for (default: wait until it is done)",
    )
    command.set_defaults(do=functools.partial(_act, action))
    return command


def _add_save(commands: Commands) -> argparse.ArgumentParser:
    return _add_order(commands, "save", _order, "save a checkpoint now, and train on")


def _add_stop(commands: Commands) -> argparse.ArgumentParser:
    return _add_order(
        commands,
        "stop",
        _stop,
        "finish the step, save, and end; --resume continues",
        aliases=("save-stop",),
    )


def _add_abort(commands: Commands) -> argparse.ArgumentParser:
    return _add_order(
        commands,
        "abort",
        _abort,
        "end a run within a second, without saving",
        "Also one that hangs: processes that do not end by themselves are killed. What was saved "
        "before stays.",
    )


def _add_land(commands: Commands) -> argparse.ArgumentParser:
    command = _add_order(
        commands,
        "land",
        _land,
        "begin the warm-down now, and complete the run",
        "The decision is recorded, and a run that is resumed repeats it.",
    )
    command.add_argument(
        "--minutes",
        type=_positive,
        metavar="M",
        help="for the warm-down (default: 15%% of the training time so far)",
    )
    return command


def _add_pause(commands: Commands) -> argparse.ArgumentParser:
    return _add_order(
        commands,
        "pause",
        _order,
        "wait between two steps, with the CPU and the memory of the GPU free",
    )


def _add_continue(commands: Commands) -> argparse.ArgumentParser:
    return _add_order(commands, "continue", _order, "let a paused run train on")


def _add_set(commands: Commands) -> argparse.ArgumentParser:
    command = _add_order(
        commands,
        "set",
        _set,
        "change flags of a run while it is training",
        "The change is recorded, and a run that is resumed repeats it.",
    )
    for row in FLAGS.values():
        if row.live:
            # a flag that is not given keeps the value that it has
            kind = row.type or type(row.default)
            dataclasses.replace(row, type=kind, default="unchanged").add_to(command)
    return command


def _act(action: Action, args: argparse.Namespace) -> int:
    """Have a run do something; print what it is doing, and what became of it."""
    place = named(args.run)
    about = {"run": str(place.path), "command": args.command}

    def say(text: str) -> None:
        if not args.json:
            print(printable(f"{place.tag}: {text}"), flush=True)

    try:
        outcome = action(place, args, say)
    except Refused as refusal:
        if args.json:
            print(json.dumps({**about, "error": str(refusal)}))
        else:
            text = f"nanochat jobs {args.command}: {place.tag}: {refusal}"
            print(printable(text), file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        # __main__ would say that it was stopped, which could be read as the run
        print("\nno longer waiting; the run still does what it was asked for", file=sys.stderr)
        return EXIT_FAILED
    if args.json:
        print(json.dumps({**about, "done": outcome.done, "step": outcome.step}))
    else:
        say(outcome.done)
    return EXIT_COMPLETED


def _order(place: Place, args: argparse.Namespace, say: Report) -> Outcome:
    return order(place, {"verb": args.command}, args.timeout, say)


def _land(place: Place, args: argparse.Namespace, say: Report) -> Outcome:
    if args.minutes is not None and args.minutes > MOST_MINUTES:
        raise UsageError(f"--minutes={args.minutes:g}: longer than a year; give a shorter time")
    return order(place, {"verb": "land", "minutes": args.minutes}, args.timeout, say)


def _set(place: Place, args: argparse.Namespace, say: Report) -> Outcome:
    live = {name: getattr(args, name) for name, row in FLAGS.items() if row.live}
    values = {name: value for name, value in live.items() if value is not None}
    if not values:
        flags = ", ".join(flag(name) for name in live)
        raise UsageError(f"nothing to set; give at least one of {flags}")
    if problems := live_problems(values):
        raise UsageError("\n".join(problems))
    return order(place, {"verb": "set", "values": values}, args.timeout, say)


def _stop(place: Place, args: argparse.Namespace, say: Report) -> Outcome:
    return stop(place, args.timeout, say)


def _abort(place: Place, args: argparse.Namespace, say: Report) -> Outcome:
    return abort(place, args.timeout, say)


def _positive(text: str) -> float:
    """argparse type: a finite number above 0. ValueError otherwise."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value
