"""The text of one choice as it grows, and which tokens' log-probabilities belong to it by now."""

import codecs
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.eval.engine import Ended, Token

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer

# what OpenAI reports for a probability of 0: JSON has no infinity
NO_CHANCE = -9999.0


@dataclass(frozen=True)
class ScoredToken:
    """A token with its log-probability (None for the first of a text) and the most likely ones.

    offset: characters of the text before it."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What became certain with an event. reason: "stop" or "length" with the last piece."""

    text: str
    tokens: tuple[ScoredToken, ...] = ()
    reason: str | None = None


class Transcript:
    """One choice. Tokens are held back until their text is certain: a stop text may drop them."""

    def __init__(self, tokenizer: "Tokenizer", keeps_tokens: bool, begins_at: int = 0) -> None:
        """keeps_tokens: whether log-probabilities are wanted. begins_at: characters before it."""
        # tokens that were generated, without one that ends the document
        self.n_tokens = 0
        self._tokenizer = tokenizer
        self._keeps_tokens = keeps_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoded = begins_at
        self._certain = begins_at
        self._held: list[ScoredToken] = []

    def push(self, event: Token | Ended) -> Piece:
        """Take the next event of the engine; returns what is certain by now."""
        self._certain += len(event.text)
        if isinstance(event, Token):
            self.n_tokens += 1
            if self._keeps_tokens:
                self.hold(event.id, event.logprob, event.top)
            return Piece(event.text, self.taken(self._certain))
        # a text that was not cut keeps the tokens of an unfinished character as well
        end = math.inf if event.reason == "length" else self._certain
        return Piece(event.text, self.taken(end), event.reason)

    def hold(self, token_id: int, logprob: float | None, top: tuple) -> None:
        """Keep a token until taken() finds its place certain."""
        self._held.append(ScoredToken(token_id, logprob, tuple(top), self._decoded))
        content = self._tokenizer.spelling(token_id)
        self._decoded += len(self._decoder.decode(content))

    def taken(self, end: float) -> tuple[ScoredToken, ...]:
        """Take the held tokens that begin before a place in the text."""
        taken = tuple(token for token in self._held if token.offset < end)
        del self._held[: len(taken)]
        return taken


def scored_prompt(
    tokenizer: "Tokenizer", ids: tuple[int, ...], scores: Iterable[tuple[float | None, tuple]]
) -> tuple[ScoredToken, ...]:
    """The tokens of a prompt with their log-probabilities, as they stand at the start of a text."""
    transcript = Transcript(tokenizer, keeps_tokens=True)
    for token_id, (logprob, top) in zip(ids, scores, strict=True):
        transcript.hold(token_id, logprob, top)
    return transcript.taken(math.inf)


def shown(tokenizer: "Tokenizer", token_id: int) -> str:
    """A token as text; bytes that are not UTF-8 as OpenAI spells them, "bytes:\\xe2\\x82"."""
    content = tokenizer.spelling(token_id)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def finite(logprob: float | None) -> float | None:
    """A log-probability as JSON can hold it."""
    if logprob is None or math.isnan(logprob):
        return None
    return max(logprob, NO_CHANCE)
