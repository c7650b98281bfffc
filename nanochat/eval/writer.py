"""Texts of one model, drawn in the caller's thread by the engine that serves: the same prompt,
settings and seed give the same text in both."""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from nanochat.common import Report, note_once
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.engine import Ended, Engine, Event, Request, Sampling
from nanochat.eval.generation import NotNumbers, prompt_with_bos, stop_texts
from nanochat.model.decoder import Decoder


def request_of(
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> Request:
    """The request that continues a text, which may be "", as the beginning of a document.

    The new text ends with the document, before the first of the texts in `stop`, or after
    max_new_tokens. sampling: of engine.Sampling. UsageError for a text that the tokenizer cannot
    encode, or an empty stop text."""
    return request_from(prompt_with_bos(tokenizer, prompt), max_new_tokens, stop, **sampling)


def request_from(
    ids: Sequence[int], max_new_tokens: int = 256, stop: Sequence[str] = (), **sampling: Any
) -> Request:
    """The request that continues token ids, BOS first; otherwise as request_of()."""
    return Request(tuple(ids), max_new_tokens, Sampling(**sampling), stop_texts(stop))


class Writer:
    """Continues texts of a model, which must not be trained meanwhile. Close it, or use it in a
    `with` block."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, *, slots: int = 1, report: Report = note_once
    ) -> None:
        """slots: texts that are continued together. report(text): gets a line when something is
        unusual."""
        self.model = model
        self.tokenizer = tokenizer
        self.slots = slots
        self.report = report
        self._engine = self._open(model.config.max_seq_len)

    def _open(self, positions: int) -> Engine:
        # The caller decides how many texts wait.
        return Engine(
            self.model,
            self.tokenizer,
            slots=self.slots,
            positions=positions,
            queue=2**31,
            report=self.report,
        )

    def events(self, requests: Sequence[Request]) -> Iterator[tuple[int, Event]]:
        """(index of the request, event) as they come, until every request has ended; whoever reads
        no further draws no further.

        Raises UsageError for a request that cannot be honoured, NotNumbers for weights that are
        damaged."""
        engine = self._engine_for(requests)
        for request in requests:
            engine.check(request)
        arrived: deque[tuple[int, Event]] = deque()
        tickets = [
            engine.submit(request, functools.partial(_note, arrived, index))
            for index, request in enumerate(requests)
        ]
        n_running = len(requests)
        try:
            while n_running:
                while not arrived:
                    engine.advance()
                index, event = arrived.popleft()
                if isinstance(event, Ended):
                    if event.reason == "error":
                        raise NotNumbers
                    n_running -= 1
                yield index, event
        except GeneratorExit:
            for ticket in tickets:
                engine.cancel(ticket)
            raise
        except BaseException:
            # It may have been interrupted anywhere.
            self.close()
            raise

    def texts(self, requests: Sequence[Request]) -> list[str]:
        """The new text of each request. Errors as in events()."""
        texts = [""] * len(requests)
        for index, event in self.events(requests):
            texts[index] += event.text
        return texts

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """The engine, opened again if there is none or if a request needs more positions."""
        needed = max(len(request.prompt) + request.max_new_tokens for request in requests)
        reach = self.model.rope_cos.size(0)
        at_hand = self._engine.positions if self._engine else self.model.config.max_seq_len
        if needed > at_hand and at_hand < reach:
            self.close()
            # Twice, since a text that grows is continued again.
            at_hand = min(2 * needed, reach)
        if self._engine is None:
            self._engine = self._open(at_hand)
        return self._engine

    def close(self) -> None:
        """End the threads of the engine."""
        if self._engine is not None:
            self._engine.close()
            # Closed, it only tidies up.
            self._engine.run()
            self._engine = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _note(arrived: deque[tuple[int, Event]], index: int, event: Event) -> None:
    arrived.append((index, event))
