"""The ASGI application: routes, and what becomes of refusals, lost clients and defects."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from nanochat.apps.serve.answers import ChatShape, CompletionShape, model_object
from nanochat.apps.serve.api import Conversation, event_of
from nanochat.apps.serve.errors import ENDING, UNAVAILABLE, Refused, error_body
from nanochat.apps.serve.guard import Guard, Message, Receive, read_body, unless_gone
from nanochat.apps.serve.heat import Heat, heat_routes
from nanochat.apps.serve.metrics import CONTENT_TYPE, Metrics
from nanochat.apps.serve.page import page_routes
from nanochat.apps.serve.requests import Asked, asked_chat, asked_completion, find_run
from nanochat.apps.serve.runs import FOLLOW_SECONDS, OlderStep, ServedRun
from nanochat.apps.serve.scores import HeldOut
from nanochat.apps.serve.steps import Steps
from nanochat.apps.serve.watch import Watch
from nanochat.common import Report
from nanochat.run import checkpoint

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

Send = Callable[[Message], Awaitable[None]]
Load = Callable[..., tuple]
# the paths that /metrics tells apart
PATHS = (
    "/",
    "/watch/runs",
    "/heat/scores",
    "/health",
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
)
OFFER = (
    "this server offers /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics "
    "and, for browsers, /"
)
# a client that reads slowly has this much longer than the answer
SENDING_SECONDS = 60.0


class Application:
    """What the routes share, and their functions."""

    def __init__(self, runs: list[ServedRun], guard: Guard, timeout_s: float, steps: Steps) -> None:
        self.runs = runs
        self.guard = guard
        self.timeout_s = timeout_s
        self.steps = steps
        self.metrics = Metrics()

    async def models(self, request: "Request") -> "Response":
        """GET /v1/models."""
        data = await asyncio.to_thread(_listed, self.runs)
        return _json({"object": "list", "data": data})

    async def model(self, request: "Request") -> "Response":
        """GET /v1/models/NAME."""
        try:
            run = find_run(self.runs, request.path_params["name"])
        except OlderStep as named:
            async with self.steps.held(named.run, named.step) as run:
                return _json(model_object(run))
        return _json((await asyncio.to_thread(_listed, [run]))[0])

    async def health(self, request: "Request") -> "Response":
        """GET /health: whether every engine works."""
        problems = [run.problem for run in self.runs if run.problem]
        steps = {run.name: run.step for run in self.runs}
        status = UNAVAILABLE if problems else 200
        content = {"status": "failed" if problems else "ok", "steps": steps, "problems": problems}
        return _json(content, status)

    async def show_metrics(self, request: "Request") -> "Response":
        """GET /metrics."""
        from starlette.responses import Response

        return Response(self.metrics.text(self.runs), media_type=CONTENT_TYPE)

    async def completions(self, request: "Request") -> "Response":
        """POST /v1/completions."""
        return await self._generate(request, asked_completion, CompletionShape)

    async def chat(self, request: "Request") -> "Response":
        """POST /v1/chat/completions."""
        return await self._generate(request, asked_chat, ChatShape)

    async def _generate(
        self,
        request: "Request",
        read: Callable[[bytes, list[ServedRun]], Asked],
        shape: type[CompletionShape] | type[ChatShape],
    ) -> "Response":
        raw = await read_body(request.scope, request.receive, self.guard.body_seconds)
        if raw is None:
            return _json({})
        try:
            conversation = await self._begin(raw, self.runs, read, shape)
        except OlderStep as named:
            async with self.steps.held(named.run, named.step) as older:
                conversation = await self._begin(raw, [*self.runs, older], read, shape)
        if conversation.asked.stream:
            return _event_stream(conversation, self.timeout_s + SENDING_SECONDS)
        try:
            answer = await unless_gone(conversation.answer(), request.receive)
        finally:
            conversation.close()
        return _json(answer)

    async def _begin(
        self,
        raw: bytes,
        runs: list[ServedRun],
        read: Callable[[bytes, list[ServedRun]], Asked],
        shape: type[CompletionShape] | type[ChatShape],
    ) -> Conversation:
        # in another thread: a long prompt takes a while to encode
        asked = await asyncio.to_thread(read, raw, runs)
        return Conversation(asked, shape(asked), self.timeout_s, self.metrics)


def _listed(runs: list[ServedRun]) -> list[dict[str, Any]]:
    """The models of runs, with the steps of their checkpoints, of which each is a model too."""
    return [
        model_object(run)
        | {
            "steps": checkpoint.steps_of(run.folder),
            "best_step": checkpoint.best_step(run.folder),
        }
        for run in runs
    ]


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, headers)


def _event_stream(conversation: Conversation, seconds: float) -> "Response":
    """A response of server-sent events that frees its slots however it ends."""
    from starlette.responses import StreamingResponse

    class EventStream(StreamingResponse):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            try:
                await asyncio.wait_for(super().__call__(scope, receive, send), seconds)
            except asyncio.TimeoutError:
                # The client does not read. The connection is closed without an end of the stream.
                return
            except asyncio.CancelledError:
                # a stream that only stopped would pass for a complete text
                await send({"type": "http.response.body", "body": event_of(ENDING.body())})
            finally:
                conversation.close()

    return EventStream(conversation.events(), media_type="text/event-stream")


class Gate:
    """ASGI middleware around everything: the guard, headers of every response, and counts."""

    def __init__(self, app: Callable[..., Awaitable[None]], application: Application) -> None:
        self.app = app
        self.application = application

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request; what is not HTTP passes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics = self.application.metrics
        began = time.monotonic()
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        metrics.in_progress += 1
        try:
            try:
                self.application.guard.check(scope)
            except Refused as refusal:
                await refused(None, refusal)(scope, receive, send_and_note)
                return
            await self.app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            # By uvicorn, when the time of a server that ends is over. Nothing runs above this.
            await refused(None, ENDING)(scope, receive, send_and_note)
        finally:
            metrics.in_progress -= 1
            path = scope["path"] if scope["path"] in PATHS else "other"
            metrics.answered(path, status, time.monotonic() - began)


# no proxy may keep or collect what a model says, no browser may guess what it is
HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
)


def refused(request: "Request | None", refusal: Refused) -> "Response":
    """The response to a request that is refused."""
    return _json(refusal.body(), refusal.status, dict(refusal.headers))


def _not_found(request: "Request", error: Any) -> "Response":
    """The response for paths and methods without a route."""
    path = request.url.path
    if error.status_code == 404:
        message = f"{path} is not available; {OFFER}"
    else:
        message = f"{request.method} {path}: {error.detail}; {OFFER}"
    return _json(error_body(message, error.status_code), error.status_code, error.headers)


def _defect(request: "Request", error: Exception) -> "Response":
    """The response to a request that met a defect; its traceback goes to the console."""
    message = "an internal error; the console of the server shows it"
    return _json(error_body(message, 500), 500)


def build_app(
    runs: list[ServedRun],
    guard: Guard,
    timeout_s: float,
    load: Load,
    report: Report,
    watch: Watch | None = None,
    steps_in_memory: int = 0,
) -> "Starlette":
    """The application. It starts the engines and ends them.

    load: as loading.load_run(), for other checkpoints. watch: the runs that the page shows.
    steps_in_memory: as the flag."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    steps = Steps(steps_in_memory, load, report)
    application = Application(runs, guard, timeout_s, steps)
    heat = Heat(runs, steps, guard, timeout_s, HeldOut(report) if watch else None)
    routes = [
        *page_routes(watch),
        *heat_routes(heat),
        Route("/health", application.health),
        Route("/metrics", application.show_metrics),
        Route("/v1/models", application.models),
        Route("/v1/models/{name:path}", application.model),
        Route("/v1/completions", application.completions, methods=["POST"]),
        Route("/v1/chat/completions", application.chat, methods=["POST"]),
    ]
    handlers = {Refused: refused, HTTPException: _not_found, Exception: _defect}

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        followers = [asyncio.create_task(follow(run, load, report)) for run in runs if run.follows]
        for run in runs:
            run.start()
        try:
            yield
        finally:
            for follower in followers:
                follower.cancel()
            await steps.close()
            for run in runs:
                await asyncio.to_thread(run.close)

    middleware = [Middleware(Gate, application=application)]
    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan
    )
    # to paths that are not offered there is one answer
    app.router.redirect_slashes = False
    return app


async def follow(run: ServedRun, load: Load, report: Report) -> None:
    """Serve each newer checkpoint of a run, for ever."""
    while True:
        await asyncio.sleep(FOLLOW_SECONDS)
        await asyncio.to_thread(run.follow, load, report)
