"""The routes of the page's heat map: which held-out text there is, and scores of a text."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from nanochat.apps.serve.errors import TIMED_OUT, Refused
from nanochat.apps.serve.guard import Guard, read_body, unless_gone
from nanochat.apps.serve.requests import find_run
from nanochat.apps.serve.runs import OlderStep, ServedRun
from nanochat.apps.serve.scores import (
    HeldOut,
    Question,
    pieces_of_passage,
    pieces_of_text,
    read_question,
    scores,
)
from nanochat.apps.serve.steps import Steps, busy
from nanochat.run.folder import RunFolder

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

# requests that may wait while a text is scored
MOST_WAITING = 8


class Heat:
    """The functions of the routes. held_out: None if no held-out text is to be shown."""

    def __init__(
        self,
        runs: list[ServedRun],
        steps: Steps,
        guard: Guard,
        timeout_s: float,
        held_out: HeldOut | None,
    ) -> None:
        self.runs = runs
        self.steps = steps
        self.guard = guard
        self.timeout_s = timeout_s
        self.held_out = held_out
        # one text at a time, so that neither memory nor threads are short
        self._turn = asyncio.Lock()
        self._n_waiting = 0

    async def passages(self, request: "Request") -> "Response":
        """GET /heat/held-out/NAME: the name of a run's text, and how many passages of it there
        are."""
        from starlette.responses import JSONResponse

        return JSONResponse(await self._in_turn(self._passages(request.path_params["name"])))

    async def scores(self, request: "Request") -> "Response":
        """POST /heat/scores."""
        from starlette.responses import JSONResponse

        raw = await read_body(request.scope, request.receive, self.guard.body_seconds)
        if raw is None:
            return JSONResponse({})
        question = await asyncio.to_thread(read_question, raw)
        scored = self._in_turn(self._scores(question))
        return JSONResponse(await unless_gone(scored, request.receive))

    async def _in_turn(self, work: Any) -> dict[str, Any]:
        """The result of a coroutine, which runs when the others have ended. Raises Refused if it
        takes too long, or too many wait."""
        if self._n_waiting >= MOST_WAITING:
            work.close()
            raise busy("too many requests wait for texts to be scored")
        self._n_waiting += 1
        try:
            return await asyncio.wait_for(self._after_others(work), self.timeout_s)
        except asyncio.TimeoutError:
            raise Refused(
                f"the request took longer than {self.timeout_s:g} seconds (--timeout); give a "
                f"shorter text",
                code="timeout",
                status=TIMED_OUT,
            ) from None
        finally:
            self._n_waiting -= 1
            # of one that never began
            work.close()

    async def _after_others(self, work: Any) -> dict[str, Any]:
        async with self._turn:
            return await work

    async def _passages(self, name: str) -> dict[str, Any]:
        run = self._run(name)
        passages = await asyncio.to_thread(self._held_out().passages, run)
        config = await asyncio.to_thread(RunFolder(run.folder).read_config)
        return {"name": config["data"]["name"], "passages": len(passages)}

    async def _scores(self, question: Question) -> dict[str, Any]:
        async with self._checkpoint(question.model) as run:
            pieces = await asyncio.to_thread(self._pieces, question, run)
            stop = threading.Event()
            try:
                return await asyncio.to_thread(scores, run, pieces, stop)
            finally:
                # whoever asked may be gone: its thread ends soon
                stop.set()

    @contextlib.asynccontextmanager
    async def _checkpoint(self, name: str) -> AsyncIterator[ServedRun]:
        """The run or checkpoint of that name. Raises Refused."""
        try:
            run = find_run(self.runs, name)
        except OlderStep as named:
            async with self.steps.held(named.run, named.step) as older:
                yield older
            return
        yield run

    def _pieces(self, question: Question, run: ServedRun) -> list:
        if question.text is not None:
            return pieces_of_text(question.text, run)
        return pieces_of_passage(question.passage, run, self._run(question.of), self._held_out())

    def _run(self, name: str) -> ServedRun:
        """The run of that name, or of which it names a checkpoint. Raises Refused."""
        try:
            return find_run(self.runs, name)
        except OlderStep as named:
            return named.run

    def _held_out(self) -> HeldOut:
        if self.held_out is None:
            raise Refused(
                "this server shows no held-out text (--no-watch); paste a text",
                code="no_watch",
                status=404,
            )
        return self.held_out


def heat_routes(heat: Heat) -> list["Route"]:
    """The routes of the heat map."""
    from starlette.routing import Route

    return [
        Route("/heat/held-out/{name:path}", heat.passages),
        Route("/heat/scores", heat.scores, methods=["POST"]),
    ]
