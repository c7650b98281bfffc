"""The heat map's routes: scores are those of an evaluation, and nothing else is read."""

import json
import math
import threading

import numpy as np
import pytest
import small
import torch
from serving import FakeEngine, application, served

from nanochat import load
from nanochat.apps.serve import build_parser, scores
from nanochat.apps.serve.runs import load_runs
from nanochat.apps.serve.scores import pieces_of_text
from nanochat.apps.serve.watch import Watch
from nanochat.eval.bpb import bits_per_byte
from nanochat.run.loading import load_run
from nanochat.run.training_text import held_out_shards

from starlette.testclient import TestClient  # isort: skip  (serving skips without it)

TEXT = "7 squared is 49 \N{SNOWMAN}; and 8 squared is 64, which is more.\n" * 3


@pytest.fixture(scope="module")
def folder():
    return small.finished() / "run"


@pytest.fixture(scope="module")
def client(folder):
    args = build_parser().parse_args([str(folder), "--device-type=cpu"])
    app = application(
        *load_runs(args), load=load_run, steps_in_memory=2, watch=Watch(folder.parent)
    )
    with TestClient(app, base_url="http://localhost:8000") as client:
        yield client


def scored(client, **question):
    response = client.post("/heat/scores", json=question)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_constant=pytest.fail)


def refusal(client, **question):
    response = client.post("/heat/scores", json=question)
    return response.status_code, response.json()["error"]["message"]


@pytest.mark.parametrize("name, step", [("run", 12), ("run@4", 4), ("run@12", 12)])
def test_scores_are_those_of_the_evaluation(client, folder, name, step):
    model, tokenizer = load(folder, step)
    found = scored(client, model=name, text=TEXT)
    ids = tokenizer.encode(TEXT)
    pieces = [np.array([tokenizer.bos, *ids[i : i + 32]]) for i in range(0, len(ids), 32)]
    expected = bits_per_byte(model, pieces, tokenizer.byte_counts(), 64, torch.device("cpu"))
    assert found["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert found["bpb"] == pytest.approx(expected.bpb, abs=1e-5)
    assert (found["bytes"], found["step"]) == (expected.bytes, step)
    # and token by token, each piece alone
    nats = [
        model(torch.from_numpy(piece[None, :-1]), torch.from_numpy(piece[None, 1:]))[0]
        for piece in pieces
    ]
    assert found["nats"] == pytest.approx(torch.cat(nats).tolist(), abs=1e-5)
    assert found["starts"] == list(range(0, len(ids), 32))
    assert found["text"] == TEXT


def test_alternatives_are_the_most_likely(client, folder):
    model, tokenizer = load(folder)
    found = scored(client, model="run", text="7 squared")
    ids = torch.tensor([[tokenizer.bos, *b"7 squared"]])
    with torch.no_grad():
        logprobs = model(ids).double().log_softmax(-1)[0]
    for i, top in enumerate(found["top"]):
        values, places = logprobs[i].topk(scores.ALTERNATIVES)
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)
        assert -found["nats"][i] <= top[0][1] + 1e-6


def test_places_of_tokens_that_share_a_character(client):
    found = scored(client, model="run", text="a\N{SNOWMAN}b")
    assert found["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x98", "bytes:\\x83", "b"]
    assert found["offset"] == [0, 1, 1, 1, 2]


def test_passages_are_the_pieces_of_the_evaluation(client, folder):
    model, tokenizer = load(folder)
    offered = client.get("/heat/held-out/run").json()
    assert offered == client.get("/heat/held-out/run@4").json()
    summary = small.summary(folder.parent)
    nats, n_bytes = 0.0, 0
    for passage in range(offered["passages"]):
        found = scored(client, model="run", passage=passage, of="run")
        nats += math.fsum(found["nats"])
        n_bytes += found["bytes"]
    # the run's own last evaluation
    assert nats / (math.log(2) * n_bytes) == pytest.approx(summary["val_bpb"], abs=1e-5)
    status, message = refusal(client, model="run", passage=offered["passages"], of="run@8")
    assert status == 400 and f"passages 0 to {offered['passages'] - 1}" in message


def test_text_that_changed_or_is_gone_is_not_shown(folder, tmp_path, capsys):
    run = small.copy_run(folder.parent, tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert held_out_shards(config, print)
    args = build_parser().parse_args([str(run), "--device-type=cpu"])
    for name, value in (
        ("fingerprint", "other"),
        ("args", {"data": "/etc/no-such", "val_data": ""}),
    ):
        part = config if name == "args" else config["data"]
        part[name] = value
        (run / "config.json").write_text(json.dumps(config))
        app = application(*load_runs(args), watch=Watch(tmp_path))
        with TestClient(app, base_url="http://localhost:8000") as client:
            response = client.get("/heat/held-out/run")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "no_held_out"
        assert str(tmp_path) not in response.text and "no-such" not in response.text
        assert "no held-out text" in capsys.readouterr().out


def test_another_tokenizer_reads_the_text_of_a_passage():
    class HeldOut:
        def passages(self, run):
            # begins and ends within a character
            return [np.array([256, 0x83, *b"ab", 0xE2])]

    class Tokenizer:
        fingerprint, bos = "another", 256

        def encode(self, text):
            return list(text.encode())

    source, other = served("one"), served("two")
    (piece,) = scores.pieces_of_passage(0, other, source, HeldOut())
    assert piece.tolist() == [256, 0x83, *b"ab", 0xE2]
    other.tokenizer = Tokenizer()
    (piece,) = scores.pieces_of_passage(0, other, source, HeldOut())
    assert piece.tolist() == [256, *b"ab"]


# ---- refusals and limits ----


@pytest.mark.parametrize(
    "question, status, message",
    [
        ({"text": "a"}, 400, "model: is missing"),
        ({"model": "run"}, 400, "give either"),
        ({"model": "run", "text": "a", "passage": 0, "of": "run"}, 400, "give either"),
        ({"model": "run", "passage": 0}, 400, "of: names the run"),
        ({"model": "run", "text": "a", "of": "run"}, 400, "of: names the run"),
        ({"model": "run", "text": ""}, 400, "text: is empty"),
        ({"model": "run", "text": "a" * 5000}, 400, "at most 4096 tokens"),
        ({"model": "run", "text": "\ud800"}, 400, "lone surrogate"),
        ({"model": "run", "passage": -1, "of": "run"}, 400, "passage: must be"),
        ({"model": "run", "passage": 0, "of": "../run"}, 404, "not served"),
        ({"model": "run@5", "text": "a"}, 404, "no checkpoint of that step"),
        ({"model": "other", "text": "a"}, 404, "not served"),
        ({"model": "run", "text": "a", "seed": 1}, 400, "seed: is not a field"),
    ],
)
def test_refusals(client, question, status, message):
    response = client.post(
        "/heat/scores",
        content=json.dumps(question),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/heat/scores", "/heat/held-out/d4"])
def test_guards(path):
    key = {"Authorization": "Bearer secret"}
    client = TestClient(application(api_key="secret"), base_url="http://localhost:8000")
    method = "POST" if path == "/heat/scores" else "GET"
    body = {"json": {"model": "d4", "text": "a"}} if method == "POST" else {}
    with client:
        for wrong in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            assert client.request(method, path, headers=key | wrong, **body).status_code == 403
        assert client.request(method, path, **body).status_code == 401
        plain = {"Content-Type": "text/plain"} | key
        if method == "POST":
            assert client.post(path, content="{}", headers=plain).status_code == 415
            assert client.post(path, headers=key, **body).status_code == 200
        else:
            # no folder is watched
            response = client.get(path, headers=key)
            assert response.json()["error"]["code"] == "no_watch"


def test_a_model_of_nan_is_shown_as_such():
    engine = FakeEngine()
    engine.model.logits = lambda hidden: torch.full((len(hidden), 257), math.nan)
    with TestClient(application(served(engine=engine)), base_url="http://localhost:8000") as client:
        found = scored(client, model="d4", text="ab")
    assert found["nats"] == [None, None] and found["loss"] is None and found["bpb"] is None


def test_a_long_text_is_left_when_whoever_asked_is_gone():
    run = served()
    stop = threading.Event()
    stop.set()
    assert scores.scores(run, pieces_of_text("abc", run), stop) == {}


def test_only_some_may_wait_and_none_for_ever():
    engine = FakeEngine()
    go = threading.Event()
    hidden = engine.model.hidden
    engine.model.hidden = lambda ids: (go.wait(20), hidden(ids))[1]
    app = application(served(engine=engine), timeout_s=0.5)
    with TestClient(app, base_url="http://localhost:8000") as client:
        status, message = refusal(client, model="d4", text="ab")
        assert status == 504 and "took longer than 0.5 seconds" in message
        go.set()
        assert scored(client, model="d4", text="ab")["text"] == "ab"
