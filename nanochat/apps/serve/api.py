"""What the routes of the API do, without HTTP: from what a request asks for to its answer."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from nanochat.apps.serve.answers import Choice, Shape, echoed, usage
from nanochat.apps.serve.errors import Refused
from nanochat.apps.serve.metrics import Metrics
from nanochat.apps.serve.requests import Asked
from nanochat.apps.serve.transcript import Piece, Transcript, scored_prompt
from nanochat.apps.serve.work import Work
from nanochat.eval.engine import Ended, Token

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

    async def _events(self) -> AsyncIterator[tuple[int, Token | Ended]]:
        """(index of the choice, event) as they come."""
        async for index, event in self._work.events():
            if self._waits_for_token:
                self._waits_for_token = False
                self._metrics.first_token(time.monotonic() - self._began)
            yield index, event

    def _piece(self, index: int, event: Token | Ended) -> Piece:
        """What an event adds to a choice."""
        if self.asked.max_tokens:
            return self._transcripts[index].push(event)
        # only the prompt was wanted: a token that the engine generates is dropped
        return Piece("", (), "length" if isinstance(event, Ended) else None)

    async def answer(self) -> dict[str, Any]:
        """The whole answer. Raises Refused."""
        asked = self.asked
        choices = [Choice(echoed(asked, i)) for i in range(len(asked.requests))]
        async for index, event in self._events():
            choice = choices[index]
            choice.add(self._piece(index, event))
            # the log-probabilities of the prompt come with the end
            if isinstance(event, Ended) and asked.requests[index].prompt_logprobs:
                prompt = asked.prompt_of(index)
                scores = event.prompt_top[prompt.hidden :]
                choice.tokens[:0] = scored_prompt(asked.run.tokenizer, prompt.shown, scores)
        return {
            **self.shape.head,
            "choices": [self.shape.whole(i, choice) for i, choice in enumerate(choices)],
            "usage": usage(asked, self._n_generated()),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer in chunks, as server-sent events; a failure is the last of them."""
        try:
            for index in range(len(self.asked.requests)):
                for choice in self.shape.openings(index):
                    yield self._chunk([choice])
            async for index, event in self._events():
                piece = self._piece(index, event)
                if piece.text or piece.tokens or piece.reason:
                    yield self._chunk([self.shape.chunk(index, piece)])
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
