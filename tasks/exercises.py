"""Exercises with exact answers, as conversations: what fine-tuning on a laptop can teach and
measure. Adding, reversing, sorting and copying.

An exercise is a function of its task, its split and its number. Whether a question is held out is
decided by a hash of its text, so that no held-out question is ever trained on."""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# one question in so many is held out
HELD_OUT_SHARE = 10
TRAIN = "train"
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Exercise:
    """A question and its only right answer."""

    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The exercise as a conversation."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]

    def is_solved_by(self, text: str) -> bool:
        """Whether a text is the answer, blank space around it left out."""
        return text.strip() == self.answer


def _sum(draw: random.Random) -> Exercise:
    a, b = draw.randrange(100), draw.randrange(100)
    return Exercise(f"{a} + {b} =", str(a + b))


def _reversal(draw: random.Random) -> Exercise:
    letters = _letters(draw, 3, 6)
    return Exercise(f"reverse {' '.join(letters)}", " ".join(reversed(letters)))


def _sorting(draw: random.Random) -> Exercise:
    letters = _letters(draw, 3, 6)
    return Exercise(f"sort {' '.join(letters)}", " ".join(sorted(letters)))


def _copying(draw: random.Random) -> Exercise:
    letters = " ".join(_letters(draw, 3, 6))
    return Exercise(f"copy {letters}", letters)


def _letters(draw: random.Random, fewest: int, most: int) -> list[str]:
    return draw.choices(LETTERS, k=draw.randint(fewest, most))


TASKS: dict[str, Callable[[random.Random], Exercise]] = {
    "sum": _sum,
    "reverse": _reversal,
    "sort": _sorting,
    "copy": _copying,
}


def exercises(task: str, split: str) -> Iterator[Exercise]:
    """The exercises of a task, one of TASKS, in a split, TRAIN or HELD_OUT: without end, in a fixed
    order. A question of TRAIN may come again, one of HELD_OUT may not: they end when none is new
    for a long time."""
    make = TASKS[task]
    seen: set[str] = set()
    since_new = 0
    for number in count():
        made = make(random.Random(f"{task} {number}"))
        if split_of(made.question) != split:
            continue
        if split == HELD_OUT:
            since_new = since_new + 1 if made.question in seen else 0
            if since_new > 1000:
                return
            if since_new:
                continue
            seen.add(made.question)
        yield made


def split_of(question: str) -> str:
    """The split that a question belongs to."""
    digest = hashlib.sha256(question.encode()).digest()
    return HELD_OUT if int.from_bytes(digest[:4], "little") % HELD_OUT_SHARE == 0 else TRAIN


def held_out(task: str, n: int) -> list[Exercise]:
    """The first n held-out exercises of a task, fewer if there are no more."""
    return list(islice(exercises(task, HELD_OUT), n))
