"""Several texts side by side on a terminal, or one below the other."""

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

from nanochat.common import ceil_div, printable

# columns of the narrowest text that can be read
LEAST_WIDTH = 28
GAP = " | "


def shown(text: str) -> str:
    """The text as it is printed: on a terminal, without what could move the cursor."""
    return printable(text) if sys.stdout.isatty() else text


def print_side_by_side(texts: Sequence[tuple[str, str]]) -> None:
    """Print (title, text), in columns if this is a terminal that is wide enough."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    print(side_by_side([(title, shown(text)) for title, text in texts], width))


def blocks(texts: Sequence[tuple[str, str]]) -> str:
    """(title, text) one below the other."""
    return "\n".join(f"--- {title} ---\n{text}" for title, text in texts)


def side_by_side(texts: Sequence[tuple[str, str]], width: int) -> str:
    """(title, text) in columns that fill `width` columns of a terminal, in several rows if they
    would become too narrow; one below the other if not even two fit."""
    most = (width + len(GAP)) // (LEAST_WIDTH + len(GAP))
    if most < 2 or len(texts) < 2:
        return blocks(texts)
    # rows as full as each other
    n_rows = ceil_div(len(texts), most)
    n = ceil_div(len(texts), n_rows)
    rows = [_row(texts[first : first + n], n, width) for first in range(0, len(texts), n)]
    return "\n\n".join(rows)


def _row(texts: Sequence[tuple[str, str]], n: int, width: int) -> str:
    own = (width - (n - 1) * len(GAP)) // n
    columns = []
    for title, text in texts:
        heading = textwrap.wrap(title, own) or [""]
        columns.append([*heading, "-" * own, *wrapped(text, own)])
    lines = zip_longest(*columns, fillvalue="")
    return "\n".join(GAP.join(padded(part, own) for part in line).rstrip() for line in lines)


def padded(text: str, width: int) -> str:
    """The text with blanks behind it, so that it takes `width` columns."""
    return text + " " * (width - columns_of(text))


def columns_of(text: str) -> int:
    """The columns that a text takes on a terminal: two for a wide character, none for one that is
    combined with the character before it."""
    return sum(map(_columns_of_character, text))


def _columns_of_character(character: str) -> int:
    # what joins or modifies others, and has no form of its own
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, those that are too long broken at blanks, or inside a word that is too
    long itself."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        lines += _broken(line, width)
    return lines


def _broken(line: str, width: int) -> list[str]:
    """A line in pieces of at most `width` columns."""
    pieces = []
    start = 0
    taken = 0
    # behind the last blank of the piece
    gap = None
    for at, character in enumerate(line):
        own = _columns_of_character(character)
        # blanks may stand beyond the edge, where nobody sees them
        if taken + own > width and at > start and character != " ":
            end = gap or at
            pieces.append(line[start:end].rstrip())
            start = end
            gap = None
            taken = columns_of(line[start:at])
        taken += own
        if character == " ":
            gap = at + 1
    return [*pieces, line[start:].rstrip()]
