"""A command line as data, for programs: `train.py --help-json`, `nanochat APP --help-json`."""

import argparse
import json
from typing import Any


def answer_in_json(words: list[str]) -> list[str]:
    """The words with --help in place of --help-json. From now on every parser of this process
    prints its help as JSON."""

    def print_help(parser: argparse.ArgumentParser, file: Any = None) -> None:
        print(json.dumps(describe(parser), indent=2), file=file)

    # the apps build their parsers where they use them, and all of them answer --help by this method
    argparse.ArgumentParser.print_help = print_help
    return ["--help" if word == "--help-json" else word for word in words]


def describe(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What a parser takes: its options in the order of --help, and its commands by name."""
    options = []
    commands: dict[str, Any] = {}
    # argparse has no public way to list what was declared
    for group in parser._action_groups:
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                commands |= {name: describe(sub) for name, sub in action.choices.items()}
            elif not isinstance(action, argparse._HelpAction):
                options.append({"group": group.title, **_option(action)})
    return {
        "program": parser.prog,
        "usage": " ".join(parser.format_usage().split()[1:]),
        "description": parser.description,
        "options": options,
        "commands": commands,
        "epilog": parser.epilog,
    }


def _option(action: argparse.Action) -> dict[str, Any]:
    """One option or positional argument. words: how it is written, [] for a positional one. type:
    "switch" takes no value. default: None also where it is stated in the help alone."""
    default = action.default
    # most of train.py's flags leave no trace unless they are given
    if default is argparse.SUPPRESS or callable(default):
        default = None
    kind = "switch"
    if action.nargs != 0:
        # a parser of our own has the name of what it returns
        kind = getattr(action.type, "__name__", "str").lstrip("_").removesuffix("_argument")
    return {
        "name": action.dest,
        "words": list(action.option_strings),
        "type": kind,
        "values": action.nargs if action.nargs is not None else 1,
        "required": action.required,
        "default": default,
        "choices": list(action.choices) if action.choices else None,
        # formatted by argparse itself: a help text may have its default in it
        "help": action.help and action.help % {**vars(action), "default": action.default},
    }
