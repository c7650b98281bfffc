"""`nanochat serve`: the API, against an engine without a model."""

import json
from types import SimpleNamespace

import pytest
from serving import BYTES, FakeEngine, application, served

from nanochat.__main__ import main as nanochat
from nanochat.apps.serve import build_parser, check_arguments
from nanochat.apps.serve.answers import ChatShape, Choice
from nanochat.apps.serve.fields import Message
from nanochat.apps.serve.requests import transcript
from nanochat.apps.serve.transcript import (
    NO_CHANCE,
    Piece,
    Transcript,
    finite,
    scored_prompt,
    shown,
)
from nanochat.apps.serve.work import gather_seconds
from nanochat.common import UsageError, stream_seed
from nanochat.data.chat import render, with_chat
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.engine import Ended, Token

from starlette.testclient import TestClient  # isort: skip  (serving skips without it)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def client_of(*runs, **options):
    return TestClient(application(*runs, **options), base_url="http://localhost:8000")


@pytest.fixture(scope="module")
def engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def client(engine):
    with client_of(served(engine=engine)) as client:
        yield client


def completion(client, **fields):
    """A completion of "hi" by the letters from seed 0, with these fields; the checked answer."""
    response = client.post(COMPLETIONS, json={"prompt": "hi", "seed": 0, "max_tokens": 5} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(response):
    """The objects of a stream of server-sent events, which must be complete."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *data, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(each.removeprefix("data: ")) for each in data]


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


# ---- completions ----


def test_a_completion_has_openais_shape(client):
    answer = completion(client)
    assert answer["object"] == "text_completion" and answer["model"] == "d4"
    assert answer["id"].startswith("cmpl-") and answer["system_fingerprint"] == "step_500"
    choice = {"index": 0, "text": "abcde", "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]
    # BOS is read as well
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


@pytest.mark.parametrize(
    "prompt, ids",
    [
        ("hi", [[256, 104, 105]]),
        (["hi", "o"], [[256, 104, 105], [256, 111]]),
        ("<|bos|>hi", [[256, 104, 105]]),
        ([104, 105], [[104, 105]]),
        ([256, 104], [[256, 104]]),
        ([256], [[256]]),
        ([[104], [256, 105]], [[104], [256, 105]]),
    ],
)
def test_prompts(client, engine, prompt, ids):
    """Texts begin with BOS; ids are taken as they are."""
    before = len(engine.requests)
    answer = completion(client, prompt=prompt)
    assert [list(request.prompt) for request in engine.requests[before:]] == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(ids)))


def test_settings_reach_the_engine(client, engine):
    completion(
        client,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.2,
        stop="z",
        max_tokens=9,
        logprobs=2,
    )
    request = engine.requests[-1]
    settings = request.sampling
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.5, 0.9, 7)
    assert (settings.min_p, settings.repetition_penalty, settings.seed) == (0.1, 1.2, 0)
    assert (request.stop, request.max_new_tokens, request.logprobs) == (("z",), 9, 2)


def test_choices_differ_by_their_seeds(client, engine):
    before = len(engine.requests)
    answer = completion(client, n=2, seed=5, prompt=["a", "b"])
    seeds = [request.sampling.seed for request in engine.requests[before:]]
    # the first is that of the same request with n = 1
    assert seeds == [5, stream_seed(5, "choice", 1)] * 2
    assert texts(answer)[0] == texts(completion(client, seed=5))[0] == "fghij"
    # prompts are counted once
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 20


def test_without_a_seed_texts_differ(client, engine):
    for _ in range(2):
        completion(client, seed=None)
    assert engine.requests[-1].sampling.seed != engine.requests[-2].sampling.seed


@pytest.mark.parametrize(
    "stop, text, n_entries",
    [("c", "ab", 2), (["x", "bc"], "a", 1), ("de", "abc", 3), ([], "abcde", 5)],
)
def test_stop_texts_end_text_and_log_probabilities(client, stop, text, n_entries):
    answer = completion(client, stop=stop, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == text
    assert choice["finish_reason"] == ("stop" if stop else "length")
    assert len(choice["logprobs"]["tokens"]) == n_entries
    streamed = client.post(
        COMPLETIONS,
        json={
            "prompt": "hi",
            "seed": 0,
            "max_tokens": 5,
            "stop": stop,
            "logprobs": 0,
            "stream": True,
        },
    )
    chunks = [chunk["choices"][0] for chunk in events(streamed)]
    assert "".join(chunk["text"] for chunk in chunks) == text
    assert sum(len(chunk["logprobs"]["tokens"]) for chunk in chunks) == n_entries
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]


def test_log_probabilities(client):
    logprobs = completion(client, logprobs=2, max_tokens=2)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.97, -0.98],
        "top_logprobs": [{"a": -0.97, "`": -9.7}, {"b": -0.98, "a": -9.8}],
        "text_offset": [0, 1],
    }


def test_echo(client):
    answer = completion(client, echo=True, logprobs=1, max_tokens=2, prompt=["hi", "é"])
    first, second = answer["choices"]
    assert (first["text"], second["text"]) == ("hiab", "éab")
    assert first["logprobs"]["tokens"] == ["h", "i", "a", "b"]
    assert first["logprobs"]["token_logprobs"] == [-1.04, -1.05, -0.97, -0.98]
    # a token may be a part of a character
    assert second["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "a", "b"]
    assert second["logprobs"]["text_offset"] == [0, 0, 1, 2]


def test_echo_shows_the_bos_that_a_client_gives(client):
    """Entries stand where the ids of the request do, which lm_eval relies on."""
    for prompt in ([256, 104], "<|bos|>h"):
        answer = completion(client, echo=True, logprobs=1, max_tokens=1, prompt=prompt)
        (choice,) = answer["choices"]
        assert choice["text"] == "<|bos|>ha"
        assert choice["logprobs"]["token_logprobs"] == [None, -1.04, -0.97]
        assert choice["logprobs"]["top_logprobs"][0] is None
    without = completion(client, echo=True, logprobs=1, max_tokens=1, prompt=[104, 105])
    assert without["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.05, -0.97]


def test_a_prompt_alone_can_be_scored(client):
    answer = completion(client, echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "hi" and choice["logprobs"]["token_logprobs"] == [-1.04, -1.05]
    assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_equals_the_whole_answer(client, logprobs):
    fields = {"prompt": ["hi", "o"], "n": 2, "seed": 3, "max_tokens": 6, "echo": True}
    fields["logprobs"] = logprobs
    whole = completion(client, **fields)
    response = client.post(
        COMPLETIONS, json=fields | {"stream": True, "stream_options": {"include_usage": True}}
    )
    *chunks, last = events(response)
    joined = [""] * 4
    scores = [[] for _ in joined]
    for chunk in chunks:
        assert chunk["usage"] is None and chunk["object"] == "text_completion"
        (choice,) = chunk["choices"]
        joined[choice["index"]] += choice["text"]
        scores[choice["index"]] += (choice["logprobs"] or {}).get("token_logprobs", [])
    assert joined == texts(whole)
    for choice, streamed in zip(whole["choices"], scores, strict=True):
        assert streamed == (choice["logprobs"] or {}).get("token_logprobs", [])
    assert last["choices"] == [] and last["usage"] == whole["usage"]


def test_tokens_that_come_together_share_a_message(client):
    """The first one does not wait for others."""
    body = {"prompt": "hi", "max_tokens": 30, "stream": True, "logprobs": 1, "seed": 0}
    chunks = events(client.post(COMPLETIONS, json=body))
    counts = [len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks]
    assert sum(counts) == 30 and len(counts) < 30


def test_more_texts_than_slots_and_queue():
    """They are handed on as others end, and one request leaves room in the queue for others."""
    engine = FakeEngine(queue_size=2, slots=1)
    with client_of(served(engine=engine)) as client:
        answer = completion(client, prompt=[[97 + i] for i in range(9)], echo=True, max_tokens=2)
    assert [text[0] for text in texts(answer)] == list("abcdefghi")
    assert {text[1:] for text in texts(answer)} == {"ab"} and engine.most_waiting <= 2


def test_of_many_requests_each_gets_rarer_messages():
    assert [gather_seconds(n) for n in (1, 10, 25, 50, 1000)] == [0.04, 0.04, 0.1, 0.2, 0.2]


# ---- chat ----


def test_chat(client, engine):
    body = {"messages": HELLO, "seed": 0, "max_tokens": 2, "logprobs": True, "top_logprobs": 1}
    answer = client.post(CHAT, json=body).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "ab", "refusal": None}
    a = {"token": "a", "logprob": -0.97, "bytes": [97]}
    assert choice["logprobs"]["content"][0] == {**a, "top_logprobs": [a]}
    assert BYTES.decode(engine.requests[-1].prompt[1:]) == "User: Hello\nAssistant:"
    assert engine.requests[-1].stop == ("\nUser:", "\nSystem:")


def test_chat_streams(client):
    body = {"messages": HELLO, "seed": 0, "max_completion_tokens": 3, "stream": True}
    chunks = events(client.post(CHAT, json=body))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "abc"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_chat_without_a_limit_takes_the_room_that_there_is(client, engine):
    assert client.post(CHAT, json={"messages": HELLO}).status_code == 200
    n_prompt = len(engine.requests[-1].prompt)
    assert engine.requests[-1].max_new_tokens == min(40, engine.positions - n_prompt)


def test_a_transcript():
    messages = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes"))
    assert transcript(messages[:2]) == "System: Be brief.\nUser: Hi\nAssistant:"
    # an answer that was begun is continued
    assert transcript(messages) == "System: Be brief.\nUser: Hi\nAssistant: Yes"


CHATTY = with_chat(BYTES)


@pytest.fixture
def chat_engine():
    return FakeEngine(tokenizer=CHATTY)


@pytest.fixture
def chat_client(chat_engine):
    with client_of(served(engine=chat_engine)) as client:
        yield client


def test_chat_in_the_format_of_the_model(chat_client, chat_engine):
    """Contents that spell special tokens are plain text; nothing but the model ends the answer."""
    system = {"role": "developer", "content": "Be <|turn_end|>"}
    body = {"messages": [system, *HELLO], "seed": 0, "max_tokens": 2}
    answer = chat_client.post(CHAT, json=body).json()
    assert answer["choices"][0]["message"]["content"] == "ab"
    (request,) = chat_engine.requests
    rendered, _ = render(CHATTY, [system | {"role": "system"}, *HELLO], generation_prompt=True)
    assert list(request.prompt) == rendered.tolist() and request.stop == ()
    assert answer["usage"]["prompt_tokens"] == len(rendered)
    assert chat_client.get("/v1/models").json()["data"][0]["chat"] is True


def test_a_chat_goes_on_with_an_answer_that_was_begun(chat_client, chat_engine):
    messages = [*HELLO, {"role": "assistant", "content": "Wel"}]
    assert chat_client.post(CHAT, json={"messages": messages, "stop": "b"}).status_code == 200
    (request,) = chat_engine.requests
    assert list(request.prompt) == render(CHATTY, messages)[0].tolist()[:-1]
    assert request.stop == ("b",)


def test_an_answer_keeps_its_first_blank_and_ends_with_the_turn(chat_engine):
    asked = SimpleNamespace(run=served(engine=chat_engine), requests=[None], logprobs=None)
    shape = ChatShape(asked)
    assert shape.whole(0, Choice(" a"))["message"]["content"] == " a"
    assert shape.chunk(0, Piece(" a"))["delta"] == {"content": " a"}


@pytest.mark.parametrize(
    "messages, words",
    [
        ([*HELLO, *HELLO], "message 2 is from user where assistant is expected"),
        ([{"role": "assistant", "content": "a"}], "message 1 is from assistant"),
        ([{"role": "system", "content": "a"}], "no message from the user"),
        ([{"role": "user", "content": "a" * 60}], "has 64 tokens"),
        ([{"role": "user", "content": "a" * 5800}], "has 5800 bytes of text"),
    ],
)
def test_what_the_format_of_chats_cannot_say_is_refused(chat_client, messages, words):
    answer = chat_client.post(CHAT, json={"messages": messages})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "messages" and words in error["message"]


# ---- what is refused ----

REFUSED = [
    # fields of a completion, and the one that is named
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**4000]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "x" * 64}, "prompt"),
    ({"prompt": "x" * 100_000}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"n": 1025}, "n"),
    ({"n": 0}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 41}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 5.0}, "max_tokens"),
    ({"max_tokens": 40, "prompt": "x" * 30}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": 2}, "min_p"),
    ({"top_k": 2.5}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": "a" * 201}, "stop"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"other": 1}}, "stream_options"),
    ({"model": 5}, "model"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"presence_penalty": False}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"nonsense": 1}, "nonsense"),
    ({"user": [[[[]]]] * 3}, "user"),
]


@pytest.mark.parametrize("fields, param", REFUSED, ids=str)
def test_refused_completions(client, fields, param):
    response = client.post(COMPLETIONS, json={"prompt": "hi"} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and param in error["message"]
    assert error["type"] == "invalid_request_error" and len(error["message"]) <= 600


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
    ],
    ids=str,
)
def test_refused_chats(client, fields, param):
    response = client.post(CHAT, json={"messages": HELLO} | fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"", "not valid JSON"),
        (b"[]", "JSON object"),
        (b'{"prompt": "hi"', "not valid JSON"),
        (b'{"prompt": "hi", "temperature": NaN}', "NaN"),
        (b'{"prompt": "hi", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "hi", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"\\ud800": 1}', "not a field"),
        (b'{"prompt": "hi", "model": "\\udfff"}', "surrogate"),
        (b'{"prompt": "caf\xe9"}', "UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"user": ' + b"[" * 50 + b"]" * 50 + b"}", "nested"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_bodies(client, raw, words):
    response = client.post(COMPLETIONS, content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/images/generations", 404),
        ("POST", "/v1/audio/speech", 404),
        ("GET", "/v1/files", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/config.json", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/../config.json", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models/d4", 405),
        ("OPTIONS", "/v1/completions", 405),
    ],
)
def test_what_is_not_offered(client, method, path, status):
    response = client.request(method, path, headers={"Content-Type": "application/json"})
    assert response.status_code == status and response.json()["error"]["message"]
    assert "access-control-allow-origin" not in response.headers


def test_an_unknown_model_is_named(client):
    response = client.post(COMPLETIONS, json={"model": "gpt-9", "prompt": "hi"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_values_that_change_nothing_are_admitted(client):
    """Clients send them whatever their user asked for."""
    completion(client, presence_penalty=0.0, frequency_penalty=0, logit_bias={}, best_of=1)
    completion(client, suffix=None, stop=None, logprobs=None, user="me", model="d4", top_k=-1)


# ---- several models, failures, counts ----


def test_several_models():
    with client_of(served("d4"), served("d6")) as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["d4", "d6"]
        assert client.get("/v1/models/d6").json()["step"] == 500
        assert completion(client, model="d6")["model"] == "d6"
        response = client.post(COMPLETIONS, json={"prompt": "hi"})
        assert response.status_code == 400 and response.json()["error"]["param"] == "model"


def test_a_full_queue():
    """A request of which no text finds a place."""
    engine = FakeEngine(held=True, queue_size=1)
    with client_of(served(engine=engine)) as client:
        engine.waiting[99] = None
        response = client.post(COMPLETIONS, json={"prompt": "hi", "n": 2})
        assert response.status_code == 429 and response.headers["Retry-After"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert list(engine.waiting) == [99]


def test_a_request_that_takes_too_long():
    engine = FakeEngine(held=True)
    with client_of(served(engine=engine), timeout_s=0.01) as client:
        response = client.post(COMPLETIONS, json={"prompt": "hi"})
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        streamed = client.post(COMPLETIONS, json={"prompt": "hi", "stream": True})
        # no [DONE]: the text is not complete
        (event,) = streamed.text.strip().split("\n\n")
        assert json.loads(event.removeprefix("data: "))["error"]["type"] == "timeout_error"
        assert engine.waiting == {}


@pytest.mark.parametrize(
    "end, words",
    [(Ended("error", "", "the weights"), "weights"), (Ended("cancelled", ""), "ending")],
)
def test_a_model_that_fails(end, words):
    engine = FakeEngine()
    engine.end = end
    with client_of(served(engine=engine)) as client:
        response = client.post(COMPLETIONS, json={"prompt": "hi"})
        assert response.status_code == 503 and words in response.json()["error"]["message"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_ends_by_an_error():
    """What waits for it gets an answer, and /health tells."""
    engine = FakeEngine(held=True)
    run = served(engine=engine)
    with client_of(run) as client:
        assert client.get("/health").json() == {
            "status": "ok",
            "steps": {"d4": 500},
            "problems": [],
        }
        submit = engine.submit

        def submit_and_fail(*arguments):
            ticket = submit(*arguments)
            engine.fail()
            return ticket

        engine.submit = submit_and_fail
        for _ in range(2):
            response = client.post(COMPLETIONS, json={"prompt": "hi"})
            assert response.status_code == 503 and "broken" in response.json()["error"]["message"]
        assert client.get("/health").status_code == 503


def test_metrics():
    with client_of(served('a"b')) as client:
        completion(client)
        client.get("/nowhere")
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for line in (
        'nanochat_http_requests_total{path="/v1/completions",status="200"} 1',
        'nanochat_http_requests_total{path="other",status="404"} 1',
        'nanochat_model_step{model="a\\"b"} 500',
        'nanochat_engine_requests_total{model="a\\"b"} 1',
        'nanochat_engine_waiting{model="a\\"b"} 0',
        'nanochat_engine_near_ties_total{model="a\\"b"} 0',
        'nanochat_engine_batch_invariant{model="a\\"b"} 1',
        "nanochat_first_token_seconds_count 1",
    ):
        assert line in lines


# ---- parts ----


def test_a_token_that_reaches_into_a_stop_text_is_listed():
    """Its beginning is shown; one that stands behind the end is not."""
    tokenizer = Tokenizer("bpe", [b"ab", b"cd", b"de"])
    transcript = Transcript(tokenizer, keeps_tokens=True)
    pieces = [
        transcript.push(event)
        for event in (Token(0, "ab", -1.0, ()), Token(1, "c", -2.0, ()), Ended("stop", ""))
    ]
    assert [token.id for piece in pieces for token in piece.tokens] == [0, 1]
    assert transcript.n_tokens == 2
    transcript = Transcript(tokenizer, keeps_tokens=True)
    # the stop text is "cde": what it began with is held back
    pieces = [
        transcript.push(event)
        for event in (
            Token(0, "ab", -1.0, ()),
            Token(1, "", -2.0, ()),
            Token(2, "", -3.0, ()),
            Ended("stop", ""),
        )
    ]
    assert [token.id for piece in pieces for token in piece.tokens] == [0]


def test_tokens_of_an_unfinished_character_are_kept():
    transcript = Transcript(BYTES, keeps_tokens=True)
    first = transcript.push(Token(0xC3, "", -1.0, ()))
    assert (first.text, first.tokens) == ("", ())
    last = transcript.push(Ended("length", "\N{REPLACEMENT CHARACTER}"))
    assert [token.id for token in last.tokens] == [0xC3]


def test_what_json_cannot_hold():
    assert finite(float("-inf")) == NO_CHANCE and finite(float("nan")) is None
    assert shown(BYTES, 0xC3) == "bytes:\\xc3" and shown(BYTES, 256) == BYTES.bos_text
    with pytest.raises(ValueError):
        scored_prompt(BYTES, (1, 2), [(None, ())])


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--port=70000"], "--port 70000"),
        (["--slots=0", "--queue=0"], "--queue 0"),
        (["--timeout=nan"], "--timeout nan"),
        (["--step=5", "--follow"], "--follow"),
        (["--step=-3"], "--step -3"),
        (["--api-key="], "--api-key"),
        (["--max-tokens=0"], "--max-tokens 0"),
    ],
)
def test_flags(flags, word):
    with pytest.raises(UsageError, match=word):
        check_arguments(build_parser().parse_args(["RUN", *flags]))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["serve", "/no/such/run", "--port=0"], "run folder"),
        (["serve", "RUN", "--host=no.such.host.invalid"], "--host no.such.host.invalid"),
    ],
)
def test_what_cannot_be_served(argv, words, capsys):
    assert nanochat(argv) == 2
    assert words in capsys.readouterr().err
