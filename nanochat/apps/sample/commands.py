"""What a line of the interactive mode asks for: a prompt, a setting, or another command. Pure."""

import difflib
from dataclasses import dataclass

from nanochat.common import UsageError, step_argument
from nanochat.run.folder import run_argument

# command: the setting that it changes (an argument of eval.writer.request_from()), its type, and an
# example
SETTINGS = {
    "temp": ("temperature", float, "0.8"),
    "top_k": ("top_k", int, "50"),
    "top_p": ("top_p", float, "0.95"),
    "min_p": ("min_p", float, "0.05"),
    "penalty": ("repetition_penalty", float, "1.1"),
    "max": ("max_new_tokens", int, "256"),
    "seed": ("seed", int, "42"),
}
# names of flags and of other programs
ALIASES = {
    "temperature": "temp",
    "repetition_penalty": "penalty",
    "max_tokens": "max",
    "exit": "quit",
    "q": "quit",
    "?": "help",
}
HELP = (
    ("/again", "write the last text again; with a fixed seed it comes out the same"),
    ("/continue", "go on from the end of the text that is shown"),
    ("/new", "write a document from nothing"),
    ("/temp X", "0: always the most likely token; 1: the model's distribution"),
    ("/top_k N", "only the N most likely tokens; 0: off"),
    ("/top_p X", "only the most likely tokens whose probability reaches X; 1: off"),
    ("/min_p X", "only tokens at least X times as likely as the most likely one; 0: off"),
    ("/penalty X", "above 1: fewer repetitions; 1: off"),
    ("/max N", "new tokens at most"),
    ("/seed N|random", "the same seed gives the same text; random: another one each time"),
    ("/step N|best|list", "another checkpoint of this run; -1: the newest"),
    ("/model RUN", "another run folder"),
    ("/compare STEP ...", "the last prompt on several steps, with the same seed"),
    ("/settings", "what is set"),
    ("/quit", "leave, as does Ctrl-D"),
)
# what these do with --chat
CHAT_HELP = {
    "/again": "answer the last message again; with a fixed seed the answer is the same",
    "/continue": "go on with the answer that is shown",
    "/new": "begin a new conversation",
    "/compare STEP ...": "answers to the last message by several steps, with the same seed",
}
COMMANDS = tuple(usage.split()[0].removeprefix("/") for usage, _ in HELP) + ("help",)


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str


@dataclass(frozen=True)
class Change:
    """A setting gets a value; a seed of None is another one for each text."""

    command: str
    name: str
    value: float | int | None


@dataclass(frozen=True)
class Action:
    """One of COMMANDS that changes no setting. words: a run folder, or steps."""

    name: str
    words: tuple[str | int, ...] = ()


def parse(line: str) -> Prompt | Change | Action | None:
    """What a line asks for; None if it is blank.

    A line is a prompt, to the last blank, unless it begins with "/"; "//" begins a prompt that
    begins with "/". UsageError, of one line, for what is no command."""
    if not line.strip():
        return None
    if not line.startswith("/") or line.startswith("//"):
        return Prompt(line[1:] if line.startswith("//") else line)
    given, _, rest = line[1:].strip().partition(" ")
    name = given.lower().replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        raise UsageError(_unknown(given, name))
    rest = rest.strip()
    if name in SETTINGS:
        return _change(name, rest)
    if name == "model":
        return Action(name, (_path(rest),))
    if name in ("step", "compare"):
        return Action(name, _steps(name, rest))
    if rest:
        raise UsageError(f"/{name} takes nothing behind it, and {rest!r} was given")
    return Action(name)


def _unknown(given: str, name: str) -> str:
    near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
    meant = f" did you mean /{ALIASES.get(near[0], near[0])}?" if near else ""
    return (
        f"/{given}: no such command;{meant} /help lists them, and // begins a prompt that begins "
        f"with /"
    )


def _change(command: str, word: str) -> Change:
    name, kind, example = SETTINGS[command]
    if command == "seed" and word == "random":
        return Change(command, name, None)
    try:
        return Change(command, name, kind(word))
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        given = f", and {word!r} was given" if word else ""
        raise UsageError(f"/{command} needs {what}, such as /{command} {example}{given}") from None


def _path(word: str) -> str:
    """A folder; quotes around it are dropped."""
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        word = word[1:-1]
    if not word:
        raise UsageError("/model needs a run folder, such as /model out/d4")
    return run_argument(word)


def _steps(command: str, rest: str) -> tuple[str | int, ...]:
    words = rest.replace(",", " ").split()
    if command == "step" and words in ([], ["list"]):
        return ("list",)
    if not words:
        raise UsageError("/compare needs steps, such as /compare 100 best; /step lists them")
    if command == "step" and len(words) > 1:
        raise UsageError("/step takes one step; /compare takes several")
    steps = []
    for word in words:
        try:
            steps.append(step_argument(word))
        except ValueError:
            raise UsageError(
                f"/{command} {word}: must be the step of a checkpoint, best, or -1 for the newest; "
                f"/step lists them"
            ) from None
    return tuple(steps)


def completions(line: str, word: str) -> list[str]:
    """What the word at the end of a line may become: commands, or words for /seed and /step."""
    if line == word:
        return [f"/{name} " for name in sorted(COMMANDS) if f"/{name}".startswith(word)]
    choices = {"/seed": ["random"], "/step": ["best", "list"], "/compare": ["best"]}
    return [each for each in choices.get(line.split(" ")[0], []) if each.startswith(word)]
