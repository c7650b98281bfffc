"""Requests that join and leave a running batch: each gets what it would get alone."""

import dataclasses
import threading

import pytest
import torch
from test_slots import model_of

from nanochat.common import UsageError
from nanochat.data.tokenizer import train_tokenizer
from nanochat.eval.engine import Ended, Engine, QueueFull, Request, Sampling, Token
from nanochat.eval.generation import generate_ids
from nanochat.eval.slots import TorchDecoder

GREEDY = Sampling(temperature=0)
PIECE = 4


@pytest.fixture(scope="module")
def tokenizer():
    """One id for each of 60 characters, and BOS."""
    return train_tokenizer("char", ["".join(map(chr, range(64, 124)))], -1)


@pytest.fixture(scope="module")
def model(tokenizer):
    assert tokenizer.vocab_size == 61
    return model_of("grouped, short windows")


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr("nanochat.eval.engine.PIECE", PIECE)


def prompt_of(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return (60, *torch.randint(0, 60, (n - 1,), generator=generator).tolist())


class Reader:
    """Takes the events of one request."""

    def __init__(self):
        self.events = []
        self.ended = threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Ended):
            self.ended.set()

    @property
    def tokens(self):
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def ids(self):
        return [token.id for token in self.tokens]

    @property
    def text(self):
        return "".join(event.text for event in self.events)

    @property
    def end(self):
        assert [type(event) for event in self.events].count(Ended) == 1
        return self.events[-1]


@pytest.fixture
def start(model, tokenizer):
    """Starts engines, whose threads end with the test."""
    started = []

    def start(**options):
        values = {"slots": 3, "positions": 60, "threads": 2, "report": lambda text: None}
        engine = Engine(model, tokenizer, **values | options)
        thread = threading.Thread(target=engine.run)
        thread.start()
        started.append((engine, thread))
        return engine

    yield start
    for engine, thread in started:
        engine.close()
        thread.join(30)
        assert not thread.is_alive()


def answers(engine, requests):
    """The readers of requests that are submitted together and waited for."""
    readers = [Reader() for _ in requests]
    for request, reader in zip(requests, readers, strict=True):
        engine.submit(request, reader)
    for reader in readers:
        assert reader.ended.wait(60)
    return readers


REQUESTS = [
    Request(prompt_of(n, seed=n), 12, sampling)
    for n, sampling in [
        (1, GREEDY),
        (4, Sampling(temperature=0.8, seed=1)),
        (9, Sampling(top_k=5, seed=2)),
        (17, Sampling(top_p=0.7, seed=3)),
        (6, Sampling(temperature=1.3, repetition_penalty=1.5, seed=4)),
        (11, Sampling(temperature=0.8, seed=5)),
        (2, dataclasses.replace(GREEDY, repetition_penalty=2.0)),
    ]
]


def alone(model, request):
    """The ids that generate_ids() draws, up to the end of the document."""
    sampling = request.sampling
    ids = [
        step[0]
        for step in generate_ids(
            model,
            list(request.prompt),
            request.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
        )
    ]
    return ids[: ids.index(60)] if 60 in ids else ids


@pytest.mark.parametrize("kind", ["decode.cpp", "PyTorch", "PyTorch, one at a time"])
def test_requests_get_what_the_model_says_alone(start, model, monkeypatch, kind):
    """More of them than slots, of different lengths and settings."""
    if kind != "decode.cpp":
        monkeypatch.setattr(
            "nanochat.eval.engine.open_decoder",
            lambda model, slots, positions, threads, report: TorchDecoder(model, slots, positions),
        )
    engine = start(batch_invariant=kind.endswith("at a time"))
    for request, reader in zip(REQUESTS, answers(engine, REQUESTS), strict=True):
        assert reader.ids == alone(model, request)
        assert reader.end.reason == ("length" if len(reader.ids) == 12 else "stop")
    counts = engine.counts()
    assert (counts.running, counts.waiting, counts.requests) == (0, 0, len(REQUESTS))
    assert counts.prompt_tokens == sum(len(request.prompt) for request in REQUESTS)


def test_a_request_is_the_same_alone_and_among_others(start):
    """To the last bit of its log-probabilities, also where its beginning was read for another."""
    asked = [dataclasses.replace(request, logprobs=3) for request in REQUESTS]
    beginning = prompt_of(13, seed=99)
    asked += [
        Request(beginning + prompt_of(n, seed=n)[1:], 8, GREEDY, logprobs=2) for n in (3, 6, 9)
    ]
    together = answers(start(), asked)
    for request, reader in zip(asked, together, strict=True):
        (by_itself,) = answers(start(slots=1, threads=1), [request])
        assert by_itself.events == reader.events


def test_what_prompts_have_in_common_is_read_once(start):
    engine = start()
    beginning = prompt_of(10, seed=1)
    first = Request(beginning + (1, 2, 3), 2, GREEDY)
    answers(engine, [first])
    assert engine.counts().shared_tokens == 0
    # 10 tokens in common: two pieces
    answers(engine, [Request(beginning + (4, 5, 6), 2, GREEDY)])
    assert engine.counts().shared_tokens == 8
    # the whole prompt again: its last token is always read
    answers(engine, [first])
    assert engine.counts().shared_tokens == 8 + 12


def test_log_probabilities_are_those_of_the_model(start, model):
    request = Request(prompt_of(11, seed=5), 6, GREEDY, logprobs=4, prompt_logprobs=True)
    (reader,) = answers(start(), [request])
    ids = list(request.prompt) + reader.ids
    with torch.no_grad():
        expected = model.logits(model.hidden(torch.tensor([ids]))[0]).double().log_softmax(-1)
    rows = [*reader.end.prompt_top, *((token.logprob, token.top) for token in reader.tokens)]
    assert rows[0] == (None, ()) and len(rows) == len(ids)
    for place, (logprob, top) in enumerate(rows[1:]):
        assert logprob == pytest.approx(expected[place, ids[place + 1]].item(), abs=1e-5)
        values, places = expected[place].topk(4)
        assert [i for i, _ in top] == places.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-5)


def test_a_prompt_is_scored_without_a_new_token(start):
    request = Request(prompt_of(9, seed=5), 0, GREEDY, logprobs=0, prompt_logprobs=True)
    (reader,) = answers(start(), [request])
    assert reader.tokens == [] and reader.end.reason == "length"
    assert len(reader.end.prompt_top) == 9


def test_a_text_ends_before_its_stop_text(start, model, tokenizer):
    request = Request(prompt_of(5, seed=1), 12, GREEDY)
    text = tokenizer.decode(alone(model, request))
    (reader,) = answers(start(), [dataclasses.replace(request, stop=(text[4:7], "never"))])
    assert reader.text == text[: text.index(text[4:7])] and reader.end.reason == "stop"


def test_a_request_that_is_cancelled_frees_its_slot(start, model):
    """While it is continued and while it waits."""
    engine = start(slots=1)
    began = threading.Event()
    first, second, third = Reader(), Reader(), Reader()

    def deliver(event):
        first(event)
        began.set()

    ticket = engine.submit(Request(prompt_of(2, seed=3), 58, Sampling(seed=1)), deliver)
    waiting = engine.submit(REQUESTS[0], second)
    engine.submit(REQUESTS[1], third)
    assert began.wait(60)
    engine.cancel(waiting)
    engine.cancel(ticket)
    engine.cancel(ticket)
    assert third.ended.wait(60)
    assert third.ids == alone(model, REQUESTS[1])
    assert second.events == [Ended("cancelled", "")]
    assert first.end.reason in ("cancelled", "stop", "length")


def test_a_full_queue_is_refused(model, tokenizer):
    """Nothing runs: the engine's loop has not been started."""
    engine = Engine(model, tokenizer, slots=1, queue=2, positions=60, threads=1)
    for _ in range(2):
        engine.submit(REQUESTS[0], Reader())
    with pytest.raises(QueueFull):
        engine.submit(REQUESTS[0], Reader())
    engine.close()
    engine.run()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": ()}, "no tokens"),
        ({"prompt": (60, 61)}, "token id 61"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 60}, "need 61 positions, and there are 60"),
        ({"sampling": Sampling(temperature=-1)}, "temperature -1"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature nan"),
        ({"sampling": Sampling(min_p=2)}, "min_p 2"),
        ({"logprobs": 21}, "logprobs 21"),
        ({"stop": ("",)}, "empty text"),
    ],
)
def test_what_can_never_be_honoured_is_refused(start, change, words):
    engine = start()
    with pytest.raises(UsageError, match=words):
        engine.submit(dataclasses.replace(Request((60,), 5), **change), Reader())


def test_newer_weights_are_used_once_nothing_runs(start, model, tokenizer):
    """A request that runs ends with the weights that it began with."""
    engine = start(slots=1)
    newer = model_of("grouped, short windows")
    with torch.no_grad():
        newer.head.weight.copy_(newer.head.weight.flip(0))
    request = REQUESTS[2]
    replaced = threading.Event()
    first, second = Reader(), Reader()

    def deliver(event):
        first(event)
        if not replaced.is_set():
            engine.replace_model(newer)
            replaced.set()

    engine.submit(request, deliver)
    assert replaced.wait(60)
    engine.submit(request, second)
    assert second.ended.wait(60)
    assert first.ids == alone(model, request)
    assert second.ids == alone(newer, request) != first.ids


def test_a_model_whose_numbers_are_none_ends_its_requests(start, model, tokenizer):
    broken = model_of("grouped, short windows")
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    engine = start()
    engine.replace_model(broken)
    (reader,) = answers(engine, [REQUESTS[0]])
    assert reader.end == Ended("error", "", "the model's logits are not numbers")


def test_an_engine_that_fails_ends_its_requests_and_serves_later_ones(start, model, monkeypatch):
    said = []
    engine = start(report=said.append)
    step = engine.decoder.step

    def fail_once(*arguments):
        monkeypatch.setattr(engine.decoder, "step", step)
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.decoder, "step", fail_once)
    (reader,) = answers(engine, [REQUESTS[0]])
    assert reader.end == Ended("error", "", "RuntimeError: a bug")
    assert said == ["the engine failed, and with it all running requests (RuntimeError: a bug)"]
    (reader,) = answers(engine, [REQUESTS[0]])
    assert reader.ids == alone(model, REQUESTS[0])


def test_closing_cancels_what_has_not_ended(model, tokenizer):
    engine = Engine(model, tokenizer, slots=1, positions=60, threads=1)
    readers = [Reader(), Reader()]
    for reader in readers:
        engine.submit(REQUESTS[0], reader)
    engine.close()
    engine.run()
    assert [reader.events for reader in readers] == [[Ended("cancelled", "")]] * 2
