"""Texts that are drawn in the caller's thread: those of the reference, and of a serving engine."""

import dataclasses
import threading

import pytest
import torch
from test_engine import GREEDY, Reader, alone, prompt_of
from test_slots import model_of

from nanochat.common import UsageError
from nanochat.data.tokenizer import train_tokenizer
from nanochat.eval.engine import Ended, Engine, Request, Sampling
from nanochat.eval.generation import NotNumbers
from nanochat.eval.writer import Writer

REQUESTS = [
    Request(prompt_of(n, seed=n), 12, sampling)
    for n, sampling in [
        (1, GREEDY),
        (70, Sampling(temperature=0.8, top_k=50, seed=1)),
        (9, Sampling(temperature=1.2, min_p=0.02, repetition_penalty=1.3, seed=2)),
    ]
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("char", ["".join(map(chr, range(64, 124)))], -1)


@pytest.fixture(scope="module")
def model():
    return model_of("grouped, short windows")


@pytest.fixture
def writer(model, tokenizer):
    with Writer(model, tokenizer, report=lambda text: None) as writer:
        yield writer


def test_texts_are_those_of_the_model(writer, model, tokenizer):
    for request in [each for each in REQUESTS if not each.sampling.min_p]:
        assert writer.texts([request]) == [tokenizer.decode(alone(model, request))]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_texts_are_those_of_a_serving_engine(model, tokenizer, slots):
    """To the last bit of the log-probabilities, however many are continued together."""
    asked = [dataclasses.replace(request, logprobs=2) for request in REQUESTS]
    engine = Engine(model, tokenizer, slots=8, positions=90, report=lambda text: None)
    served = [Reader() for _ in asked]
    for request, reader in zip(asked, served, strict=True):
        engine.submit(request, reader)
    thread = threading.Thread(target=engine.run)
    thread.start()
    for reader in served:
        assert reader.ended.wait(60)
    engine.close()
    thread.join(30)
    found = [[] for _ in asked]
    with Writer(model, tokenizer, slots=slots, report=lambda text: None) as writer:
        for index, event in writer.events(asked):
            found[index].append(event)
    assert found == [reader.events for reader in served]


def test_a_text_that_is_left_is_drawn_no_further(writer, monkeypatch):
    steps = []
    step = type(writer._engine.decoder).step
    monkeypatch.setattr(
        type(writer._engine.decoder), "step", lambda *args: steps.append(1) or step(*args)
    )
    request = Request(prompt_of(3, seed=3), 40, Sampling(seed=7))
    events = writer.events([request])
    whole = writer.texts([request])[0]
    steps.clear()
    pieces = [next(events)[1].text for _ in range(3)]
    assert whole.startswith("".join(pieces)) and len(steps) == 2
    engine = writer._engine
    events.close()
    assert writer.texts([request]) == [whole] and writer._engine is engine


def test_an_interrupted_engine_is_replaced(writer, monkeypatch):
    request = Request(prompt_of(3, seed=3), 8, GREEDY)
    whole = writer.texts([request])
    engine = writer._engine
    advance = engine.advance

    def interrupted():
        advance()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.texts([request])
    assert writer.texts([request]) == whole and writer._engine is not engine


def test_texts_may_be_longer_than_the_context_of_training(writer, model):
    """And end at the last position that the model has."""
    context, reach = model.config.max_seq_len, model.rope_cos.size(0)
    long = Request(prompt_of(context + 5, seed=1), 3, GREEDY)
    (*_, (_, ended)) = writer.events([long])
    assert ended.reason in ("stop", "length") and writer._engine.positions < reach
    with pytest.raises(UsageError, match=f"need {reach + 1} positions, and there are {reach}"):
        writer.texts([Request(prompt_of(reach - 1, seed=1), 2, GREEDY)])
    # a refusal leaves nothing behind
    (*_, (_, ended)) = writer.events([long])
    assert isinstance(ended, Ended) and writer._engine.counts().requests == 1


def test_damaged_weights_are_told(tokenizer):
    model = model_of("grouped, short windows")
    with torch.no_grad():
        model.head_weight().fill_(float("nan"))
    with (
        Writer(model, tokenizer, report=lambda text: None) as writer,
        pytest.raises(NotNumbers, match="damaged"),
    ):
        writer.texts([REQUESTS[0]])


def test_the_model_of_the_caller_stays_as_it_is(tokenizer):
    """It may be in training, with dropout."""
    model = model_of("grouped, short windows").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with Writer(model, tokenizer, report=lambda text: None) as writer:
        expected = writer.texts([REQUESTS[1]])
    assert model.training and all(each.requires_grad for each in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with Writer(model.eval(), tokenizer, report=lambda text: None) as writer:
        assert writer.texts([REQUESTS[1]]) == expected
