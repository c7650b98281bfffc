"""Requests that join and leave a running batch: each gets what it would get alone."""

import dataclasses
import threading

import pytest
import torch
from test_slots import model_of

from nanochat.common import UsageError
from nanochat.data.chat import with_chat
from nanochat.data.tokenizer import train_tokenizer
from nanochat.eval.engine import Ended, Engine, QueueFull, Request, Sampling, Scored, Token
from nanochat.eval.generation import generate_ids
from nanochat.eval.slots import TorchDecoder, in_compute_dtype
from nanochat.eval.ties import TOLERANCE
from nanochat.eval.writer import Writer
from nanochat.model.growing import grown

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


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, repetition_penalty=1.2)])
def test_near_ties_are_counted_where_the_batch_may_decide(start, model, monkeypatch, sampling):
    """All are near-ties by a tolerance beyond all logits, none by one of 0."""
    requests = [Request(prompt_of(5, seed=i), 6, sampling) for i in range(3)]
    engine = start()
    answers(engine, requests)
    assert engine.is_batch_invariant and "decode.cpp" in engine.mode
    assert engine.counts().near_ties == 0

    monkeypatch.setattr(
        "nanochat.eval.engine.open_decoder",
        lambda model, slots, positions, threads, report: TorchDecoder(model, slots, positions),
    )
    invariant = start(batch_invariant=True)
    answers(invariant, requests)
    assert invariant.is_batch_invariant and "one text at a time" in invariant.mode
    assert invariant.counts().near_ties == 0

    for tolerance in (0.0, 1000.0):
        monkeypatch.setitem(TOLERANCE, torch.float32, tolerance)
        fast = start()
        readers = answers(fast, requests)
        assert not fast.is_batch_invariant and "--batch-invariant" in fast.mode
        # the first token of each is chosen before others are beside it
        n_chosen = sum(len(reader.ids) - 1 for reader in readers)
        ended = sum(reader.end.reason == "stop" for reader in readers)
        assert fast.counts().near_ties == (n_chosen + ended if tolerance else 0)


def test_logits_of_a_batch_stay_within_the_tolerance(model):
    """What near-ties are counted by: PyTorch's products of 8 rows and of one, in fp32."""
    # two decoders: a slot remembers what it read last
    beside, alone = (TorchDecoder(in_compute_dtype(model), 8, 60) for _ in range(2))
    numbers = list(range(8))
    together = beside.step(numbers, [0] * 8, numbers)
    alone = torch.cat([alone.step([i], [0], [i]) for i in numbers])
    assert (together - alone).abs().max() < TOLERANCE[torch.float32]


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
    # the prompt's come before any token
    scored = reader.events[0]
    rows = [*scored.prompt_top, *((token.logprob, token.top) for token in reader.tokens)]
    assert rows[0] == (None, ()) and len(rows) == len(ids)
    for place, (logprob, top) in enumerate(rows[1:]):
        assert logprob == pytest.approx(expected[place, ids[place + 1]].item(), abs=1e-5)
        values, places = expected[place].topk(4)
        assert [i for i, _ in top] == places.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-5)


def test_a_prompt_is_scored_without_a_new_token(start):
    request = Request(prompt_of(9, seed=5), 0, GREEDY, logprobs=0, prompt_logprobs=True)
    (reader,) = answers(start(), [request])
    scored, end = reader.events
    assert isinstance(scored, Scored) and len(scored.prompt_top) == 9
    assert end == Ended("length", "")


def test_a_text_ends_before_its_stop_text(start, model, tokenizer):
    request = Request(prompt_of(5, seed=1), 12, GREEDY)
    text = tokenizer.decode(alone(model, request))
    (reader,) = answers(start(), [dataclasses.replace(request, stop=(text[4:7], "never"))])
    assert reader.text == text[: text.index(text[4:7])] and reader.end == Ended("stop", "")
    # the token that completes the stop text is an event too, as its beginning may be shown
    assert reader.ids == alone(model, request)[: text.index(text[4:7]) + 3]


def test_a_text_ends_with_a_turn_of_a_chat(model, tokenizer, monkeypatch):
    chat = with_chat(tokenizer)
    drawn = iter([5, 6, chat.special_ids["<|turn_end|>"], 7])
    monkeypatch.setattr("nanochat.eval.engine._choose", lambda *given: ([next(drawn)], 0))
    with Writer(grown(model, chat.vocab_size), chat) as writer:
        events = [event for _, event in writer.events([Request(prompt_of(3, 0), 9, GREEDY)])]
    assert [event.id for event in events[:-1]] == [5, 6]
    assert events[-1] == Ended("stop", "", id=chat.special_ids["<|turn_end|>"])


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
