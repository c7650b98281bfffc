"""A server for tests: an engine without a model, its application, and a real server in a thread."""

import contextlib
import queue
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.common import UsageError
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.engine import Counts, Ended, QueueFull, Scored, Token
from nanochat.eval.generation import TextStream

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from nanochat.apps.serve.app import build_app  # noqa: E402
from nanochat.apps.serve.guard import Guard  # noqa: E402
from nanochat.apps.serve.runs import ServedRun  # noqa: E402
from nanochat.apps.serve.server import config_of, listen, url_of  # noqa: E402

BYTES = Tokenizer("byte", [bytes([i]) for i in range(256)])
ENDED = object()


class FakeModel:
    """Scores each token by the one before it."""

    def __init__(self):
        self.config = SimpleNamespace(vocab_size=257)
        self.embedding = torch.nn.Embedding(257, 1)

    def hidden(self, ids):
        return ids[..., None].float()

    def logits(self, hidden):
        return -(hidden - torch.arange(257)).abs() / 10


class FakeEngine:
    """Continues every text with letters that depend on the seed, one request at a time.

    With `held`, requests are taken and not worked on. cancelled: set when a request was cancelled
    before its end. end: an event that ends every text at its beginning."""

    is_batch_invariant = True

    def __init__(self, positions=64, queue_size=4, slots=2, held=False, tokenizer=BYTES):
        self.positions = positions
        self.queue_size = queue_size
        self.slots = slots
        self.held = held
        self.tokenizer = tokenizer
        self.model = FakeModel()
        self.requests = []
        self.waiting = {}
        self.most_waiting = 0
        self.cancelled = threading.Event()
        self.submitted = threading.Event()
        self.end = None
        self.models = []
        self._inbox = queue.Queue()

    def check(self, request):
        if not request.prompt or max(request.prompt) >= self.tokenizer.vocab_size:
            raise UsageError("the prompt holds an unknown id")

    def submit(self, request, deliver):
        self.check(request)
        if len(self.waiting) >= self.queue_size:
            raise QueueFull
        ticket = len(self.requests)
        self.most_waiting = max(self.most_waiting, len(self.waiting) + 1)
        self.requests.append(request)
        self.waiting[ticket] = deliver
        self._inbox.put((ticket, request, deliver))
        self.submitted.set()
        return ticket

    def cancel(self, ticket):
        if self.waiting.pop(ticket, None):
            self.cancelled.set()

    def replace_model(self, model):
        self.models.append(model)

    def close(self):
        self._inbox.put(ENDED)

    def counts(self):
        n = len(self.requests)
        return Counts(0, len(self.waiting), n, 0, 0, 0, 0)

    def run(self):
        while (taken := self._inbox.get()) is not ENDED:
            if taken == "fail":
                raise RuntimeError("the engine is broken")
            if not self.held:
                self._serve(*taken)

    def fail(self):
        """Let the engine's thread end by an error."""
        self._inbox.put("fail")

    def _serve(self, ticket, request, deliver):
        stream = TextStream(self.tokenizer, request.stop)
        if request.prompt_logprobs:
            scores = (self._score(i, request) for i in request.prompt[1:])
            deliver(Scored(((None, ()), *scores)))
        for i in range(0 if self.end else request.max_new_tokens):
            letter = 97 + (request.sampling.seed + i) % 26
            deliver(Token(letter, stream.push(letter), *self._score(letter, request)))
            if stream.ended:
                self._finish(ticket, deliver, Ended("stop", ""))
                return
        self._finish(ticket, deliver, self.end or Ended("length", stream.end()))

    def _finish(self, ticket, deliver, ended):
        self.waiting.pop(ticket, None)
        deliver(ended)

    def _score(self, i, request):
        if request.logprobs is None:
            return None, ()
        return -i / 100, ((i, -i / 100), (i - 1, -i / 10))[: request.logprobs]


def served(name="d4", max_tokens=40, engine=None, **options):
    """A ServedRun of a fake engine."""
    engine = engine or FakeEngine(**options)
    config = SimpleNamespace(max_seq_len=32)
    return ServedRun(
        name, Path("no-such-folder"), 500, config, engine.tokenizer, engine, max_tokens
    )


def application(
    *runs,
    api_key=None,
    host="127.0.0.1",
    timeout_s=30.0,
    body_seconds=20.0,
    watch=None,
    load=None,
    steps_in_memory=0,
):
    """The ASGI application of these runs, or of one fake one."""
    guard = Guard(host, api_key, body_seconds)
    runs = list(runs or [served()])
    return build_app(runs, guard, timeout_s, load, print, watch, steps_in_memory)


@contextlib.contextmanager
def running(app):
    """A real server of an application on a free port; gives its URL."""
    import uvicorn

    with listen("127.0.0.1", 0) as listener:
        url = url_of(listener)
        server = uvicorn.Server(config_of(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
