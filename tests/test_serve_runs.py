"""`nanochat serve` with real models: OpenAI's client against a server on a port, and runs that are
followed while they train."""

import asyncio
import os
import shutil
import socket
from argparse import Namespace

import pytest
import small
import torch
from serving import FakeEngine, application, running

from nanochat import load
from nanochat.apps.serve import build_parser
from nanochat.apps.serve.errors import Refused
from nanochat.apps.serve.runs import OlderStep, ServedRun, load_runs, newest_stamp
from nanochat.apps.serve.steps import Steps
from nanochat.common import UsageError
from nanochat.eval.generation import generate_text, last_logits
from nanochat.run.loading import load_run


@pytest.fixture(scope="module")
def folder():
    return small.finished() / "run"


@pytest.fixture(scope="module")
def model_and_tokenizer(folder):
    return load(folder)


@pytest.fixture(scope="module")
def url(folder):
    args = build_parser().parse_args([str(folder), "--slots=4", "--device-type=cpu"])
    with running(application(*load_runs(args), load=load_run, steps_in_memory=1)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


PROMPT = "7 squared is"
GREEDY = {"model": "run", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}


def greedy(model_and_tokenizer, max_new_tokens=12, stop=()):
    model, tokenizer = model_and_tokenizer
    pieces = generate_text(model, tokenizer, PROMPT, max_new_tokens, stop, temperature=0)
    return "".join(pieces)


def test_the_client_lists_models(client):
    (model,) = client.models.list().data
    assert model.id == "run" and model.step == 12
    assert {4, 8, 12} < set(model.steps) and model.best_step in model.steps
    assert client.models.retrieve("run").positions == 32


def test_a_completion_is_what_the_model_generates(client, model_and_tokenizer):
    answer = client.completions.create(**GREEDY)
    assert answer.choices[0].text == greedy(model_and_tokenizer)
    assert answer.usage.completion_tokens == 12
    ids = [model_and_tokenizer[1].bos, *PROMPT.encode()]
    assert client.completions.create(**GREEDY | {"prompt": ids}).choices == answer.choices


def test_a_stream(client, model_and_tokenizer):
    stream = client.completions.create(
        **GREEDY, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == greedy(model_and_tokenizer)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 12


def test_log_probabilities_are_the_models(client, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    answer = client.completions.create(**GREEDY | {"max_tokens": 3}, logprobs=2, echo=True)
    logprobs = answer.choices[0].logprobs
    text = PROMPT + greedy(model_and_tokenizer, 3)
    ids = torch.tensor([[tokenizer.bos, *text.encode()]])
    expected = [
        last_logits(model, ids[:, :end]).double().log_softmax(-1)[0, ids[0, end]].item()
        for end in range(1, ids.size(1))
    ]
    assert logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    # temperature 0 takes the most likely
    for chosen, top in list(zip(logprobs.token_logprobs, logprobs.top_logprobs))[-3:]:
        assert chosen == max(top.values())


def test_chat(client):
    messages = [{"role": "user", "content": "7"}]
    options = {"model": "run", "messages": messages, "max_tokens": 4, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=1)
    assert len(whole.choices[0].logprobs.content) == 4
    chunks = list(client.chat.completions.create(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_the_clients_errors(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**GREEDY | {"temperature": -1})
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(**GREEDY | {"model": "other"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="run", input="hi")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="run", input="hi")
    with pytest.raises(openai.BadRequestError) as caught:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        messages = [{"role": "user", "content": "7"}]
        client.chat.completions.create(model="run", messages=messages, tools=tools)
    assert caught.value.param == "tools"


def test_streams_together_equal_streams_alone(client):
    """Several requests of different settings, more than there are slots, and each alone."""
    openai = pytest.importorskip("openai")
    import asyncio

    settings = [
        {"prompt": f"{i} squared", "seed": i, "temperature": i / 4, "max_tokens": 4 + i}
        for i in range(8)
    ]
    alone = [client.completions.create(model="run", **each).choices[0].text for each in settings]

    async def streamed(asking, each):
        stream = await asking.completions.create(model="run", stream=True, **each)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def together():
        base_url = str(client.base_url)
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as asking:
            return await asyncio.gather(*(streamed(asking, each) for each in settings))

    assert asyncio.run(together()) == alone


def test_no_file_of_the_run_is_served(url):
    port = int(url.rsplit(":", 1)[1])
    for path in ("/config.json", "/../config.json", "/v1/models/../../config.json"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 404 ")


# ---- RUN@STEP ----


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_step_is_a_model(client, folder, step):
    model, tokenizer = load(folder, step)
    name = f"run@{step}"
    answer = client.completions.create(**GREEDY | {"model": name})
    assert answer.choices[0].text == greedy((model, tokenizer))
    assert answer.system_fingerprint == f"step_{step}"
    chunks = client.completions.create(**GREEDY | {"model": name}, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert client.models.retrieve(name).step == step


@pytest.mark.parametrize(
    "name", ["run@5", "run@08", "run@", "run@4@4", "@4", "run@-1", "run@" + "9" * 40]
)
def test_steps_that_do_not_exist(client, name):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(**GREEDY | {"model": name})
    assert caught.value.code == "model_not_found"
    assert (name != "run@5") or "it has 4, " in str(caught.value)


@pytest.fixture
def older(folder):
    """A ServedRun at step 12 whose older steps get fake engines, and what closed them."""
    model, tokenizer = load_run(folder, 12)
    one = ServedRun("run", folder, 12, model.config, tokenizer, FakeEngine(), 10)
    one.open_engine = lambda model, tokenizer: FakeEngine()
    return one


def test_the_step_that_was_not_asked_for_the_longest_gives_way(older):
    loaded = []

    def load(folder, step):
        loaded.append(step)
        return load_run(folder, step)

    async def ask():
        steps = Steps(2, load, print)
        for step in (4, 8, 4, 12, 4, 8):
            async with steps.held(older, step) as run:
                assert (run.name, run.step) == (f"run@{step}", step)
                assert run.thread.is_alive()
        await steps.close()
        return run

    assert not asyncio.run(ask()).thread.is_alive()
    assert loaded == [4, 8, 12, 8]


def test_a_step_that_is_used_does_not_give_way(older):
    async def ask():
        steps = Steps(1, load_run, print)
        async with steps.held(older, 4) as run:
            with pytest.raises(Refused, match="all in use") as caught:
                async with steps.held(older, 8):
                    pass
        assert caught.value.status == 429
        # its engine still works on a request
        run.works.add("work")
        with pytest.raises(Refused, match="all in use"):
            async with steps.held(older, 8):
                pass
        run.works.clear()
        async with steps.held(older, 8) as other:
            assert other.step == 8
        assert not run.thread.is_alive()
        await steps.close()

    asyncio.run(ask())


def test_a_step_that_was_written_anew_is_loaded_anew(older, tmp_path):
    older.folder = small.copy_run(older.folder.parent, tmp_path)
    manifest = older.folder / "checkpoints" / "step_000004" / "manifest.json"

    async def ask():
        steps = Steps(1, load_run, print)
        found = []
        for seconds in (1e9, 1e9, 2e9):
            os.utime(manifest, (seconds, seconds))
            async with steps.held(older, 4) as run:
                found.append(run)
        assert found[0] is found[1] and found[2] is not found[0]
        assert not found[0].thread.is_alive()
        # an engine that failed is not asked again
        found[2].problem = "it is broken"
        async with steps.held(older, 4) as run:
            assert run is not found[2]
        await steps.close()

    asyncio.run(ask())


@pytest.mark.parametrize(
    "most, step, error, status, message",
    [
        (0, 4, None, 404, "--steps-in-memory 0"),
        (1, 5, None, 404, "has no checkpoint of that step; it has 4, "),
        (1, 4, UsageError("/home/me/run is damaged"), 404, "damaged or was removed"),
        (1, 4, MemoryError("no memory"), 503, "console says why"),
    ],
)
def test_steps_that_cannot_be_loaded(older, capsys, most, step, error, status, message):
    def load(folder, step):
        raise error

    async def ask():
        async with Steps(most, load, print).held(older, step):
            pass

    with pytest.raises(Refused, match=message) as caught:
        asyncio.run(ask())
    assert caught.value.status == status and "/home" not in caught.value.message
    assert (error is None) or str(error) in capsys.readouterr().out


def test_the_step_that_is_served_is_not_loaded_again(older):
    assert older.answers_to("run") and older.answers_to("run@12")
    assert not older.answers_to("other@12") and not older.answers_to("run@x")
    older.follows = True
    with pytest.raises(OlderStep) as caught:
        older.answers_to("run@12")
    assert (caught.value.run, caught.value.step) == (older, 12)


# ---- --follow ----


@pytest.fixture
def followed(folder, tmp_path):
    """A run that has come to step 8, its checkpoint of step 12, and its ServedRun."""
    run = small.copy_run(folder.parent, tmp_path)
    later = shutil.move(run / "checkpoints" / "step_000012", tmp_path / "step_000012")
    model, tokenizer = load_run(run, 8)
    one = ServedRun("run", run, 8, model.config, tokenizer, FakeEngine(), 10, follows=True)
    one.looked_at = newest_stamp(run)
    return run, later, one


def test_a_newer_checkpoint_is_served(followed):
    run, later, one = followed
    lines = []
    one.follow(load_run, lines.append)
    assert one.engine.models == []
    shutil.move(later, run / "checkpoints")
    one.follow(load_run, lines.append)
    one.follow(load_run, lines.append)
    (model,) = one.engine.models
    expected, _ = load_run(run, 12)
    for mine, its in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert one.step == 12 and lines == ["run: serves step 12"]


def test_a_damaged_checkpoint_is_not_served(followed):
    run, later, one = followed
    weights = later / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.move(later, run / "checkpoints")
    lines = []
    for _ in range(2):
        one.follow(load_run, lines.append)
    # reported once
    assert one.engine.models == [] and one.step == 8
    assert len(lines) == 1 and "damaged" in lines[0]


def test_weights_that_cannot_be_used_leave_those_in_use(followed):
    run, later, one = followed
    shutil.move(later, run / "checkpoints")
    lines = []

    def out_of_memory(*_):
        raise MemoryError("no memory")

    one.follow(out_of_memory, lines.append)
    one.config = Namespace()
    one.looked_at = None
    one.follow(load_run, lines.append)
    assert one.engine.models == [] and one.step == 8
    assert "no memory" in lines[0] and "another shape" in lines[1]


def test_a_run_without_checkpoints_changes_nothing(followed, tmp_path):
    _, _, one = followed
    one.folder = tmp_path
    one.follow(load_run, pytest.fail)
