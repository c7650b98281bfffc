"""Preference pairs made of any text: how a text goes on is preferred to the same words in disorder.

Both answers have the same words and the same blank space between them, so that neither length nor
vocabulary tells which is preferred."""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# words of a prompt, and of its continuation
PROMPT_WORDS = 12
ANSWER_WORDS = 12


@dataclass(frozen=True)
class Continuation:
    """A beginning, how it goes on, and the same words in another order."""

    prompt: str
    chosen: str
    rejected: str

    def as_line(self) -> dict[str, str]:
        """A line of the files that `nanochat dpo --data` takes."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


def continuations(documents: Iterable[str], n: int, seed: int) -> list[Continuation]:
    """n pairs from all places of the documents alike, in a random order; fewer if there are not as
    many places. A function of its arguments alone."""
    draw = random.Random(seed)
    kept: list[list[str]] = []
    # a sample of a sequence whose length is not known: each place is kept with the same probability
    for number, words in enumerate(_places(documents)):
        if number < n:
            kept.append(words)
        elif (i := draw.randrange(number + 1)) < n:
            kept[i] = words
    draw.shuffle(kept)
    return [_continuation(words, draw) for words in kept]


def _places(documents: Iterable[str]) -> Iterator[list[str]]:
    """The words of each place, with the blank space behind them: places follow one another, without
    those whose answer has no two different words."""
    n_words = PROMPT_WORDS + ANSWER_WORDS
    for document in documents:
        words = re.findall(r"\S+\s*", document)
        for first in range(0, len(words) - n_words + 1, n_words):
            place = words[first : first + n_words]
            if len({word.strip() for word in place[PROMPT_WORDS:]}) > 1:
                yield place


def _continuation(words: list[str], draw: random.Random) -> Continuation:
    answer = words[PROMPT_WORDS:]
    texts = [word.rstrip() for word in answer]
    blanks = [word[len(text) :] for word, text in zip(answer, texts, strict=True)]
    mixed = texts
    while mixed == texts:
        mixed = draw.sample(texts, len(texts))
    chosen, rejected = (
        "".join(text + blank for text, blank in zip(order, blanks, strict=True)).strip()
        for order in (texts, mixed)
    )
    return Continuation("".join(words[:PROMPT_WORDS]).strip(), chosen, rejected)
