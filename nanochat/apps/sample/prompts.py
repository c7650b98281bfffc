"""Prompts from flags, files and standard input."""

from pathlib import Path
from typing import TextIO

from nanochat.common import UsageError
from nanochat.data.text import read_prompts, read_text

# a --prompt-from that is standard input
STDIN = "-"


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


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody may be at the other end; there is no stream where it was closed."""
    return stream is not None and stream.isatty()
