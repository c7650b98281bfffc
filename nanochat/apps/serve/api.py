"""What the routes of the API do, without HTTP: from what a request asks for to its answer."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from nanochat.apps.serve.answers import Choice, Shape, echoed, opening, usage
from nanochat.apps.serve.errors import Refused
from nanochat.apps.serve.metrics import Metrics
from nanochat.apps.serve.requests import Asked
from nanochat.apps.serve.transcript import Piece, Transcript, scored_prompt
from nanochat.apps.serve.work import Work
from nanochat.eval.engine import Ended, Event, Scored

LAST_EVENT = b"data: [DONE]\n\n"


class Conversation:
    """An HTTP request that was submitted to the engine. close() when it is over."""

    def __init__(self, asked: Asked, shape: Shape, timeout_s: float, metrics: Metrics) -> None:
        """Submits the requests. Raises Refused if the model cannot take them now."""
        self.asked = asked
        self.shape = shape
        self._began = time.monotonic()
        self._metrics = metrics
        self._waits_for_token = True
        self._transcripts = [
            Transcript(asked.run.tokenizer, asked.logprobs is not None, len(echoed(asked, i)))
            for i in range(len(asked.requests))
        ]
        self._work = Work(asked.run, asked.requests, timeout_s)

    def close(self) -> None:
        """Free the slots of whatever is still running."""
        self._work.close()

    def _n_generated(self) -> int:
        return sum(transcript.n_tokens for transcript in self._transcripts)

    async def _batches(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """(index of the choice, what an event adds to it), as they come."""
        async for batch in self._work.batches():
            is_token = any(not isinstance(event, Scored) for _, event in batch)
            if self._waits_for_token and is_token:
                self._waits_for_token = False
                self._metrics.first_token(time.monotonic() - self._began)
            yield [(index, self._piece(index, event)) for index, event in batch]

    def _piece(self, index: int, event: Event) -> Piece:
        if isinstance(event, Scored):
            prompt, tokenizer = self.asked.prompt_of(index), self.asked.run.tokenizer
            scores = event.prompt_top[prompt.hidden :]
            tokens = scored_prompt(tokenizer, prompt.shown, scores)
            return Piece(echoed(self.asked, index), tokens)
        if self.asked.max_tokens:
            return self._transcripts[index].push(event)
        # only the prompt was wanted: a token that the engine generates is dropped
        return Piece("", (), "length" if isinstance(event, Ended) else None)

    async def answer(self) -> dict[str, Any]:
        """The whole answer. Raises Refused."""
        asked = self.asked
        choices = [Choice(opening(asked, i)) for i in range(len(asked.requests))]
        async for batch in self._batches():
            for index, piece in batch:
                choices[index].add(piece)
        return {
            **self.shape.head,
            "choices": [self.shape.whole(i, choice) for i, choice in enumerate(choices)],
            "usage": usage(asked, self._n_generated()),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, those that belong together in one piece: a chunk for
        each choice, with the tokens that came since the last one. A failure is the last event."""
        try:
            for index in range(len(self.asked.requests)):
                for choice in self.shape.openings(index):
                    yield self._chunk([choice])
            async for batch in self._batches():
                added: dict[int, Choice] = {}
                for index, piece in batch:
                    added.setdefault(index, Choice()).add(piece)
                chunks = [
                    self._chunk([self.shape.chunk(index, choice)])
                    for index, choice in added.items()
                    if choice.text or choice.tokens or choice.reason
                ]
                if chunks:
                    yield b"".join(chunks)
            if self.asked.include_usage:
                yield self._chunk([], usage(self.asked, self._n_generated()))
            yield LAST_EVENT
        except Refused as refusal:
            # the status has been sent already
            yield event_of(refusal.body())

    def _chunk(self, choices: list[dict[str, Any]], total: dict[str, int] | None = None) -> bytes:
        content = {**self.shape.chunk_head, "choices": choices}
        if self.asked.include_usage:
            content["usage"] = total
        return event_of(content)


def event_of(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, allow_nan=False)}\n\n".encode()
