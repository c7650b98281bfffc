"""`nanochat serve` under hostile requests, half of them valid but for one field. Each case follows
from its seed: `fuzz_case(seed)` replays it."""

import json
import random

import pytest
from serving import FakeEngine, application, served

from nanochat.apps.serve.fields import CHAT, COMPLETION, NEUTRAL
from nanochat.apps.serve.scores import HEAT

from starlette.testclient import TestClient  # isort: skip  (serving skips without it)

# what a body without such settings may be answered with; there is no key, no slow body, and the
# engine neither fails nor is slow
STATUSES = {200, 400, 403, 404, 405, 413, 415, 429}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT, "/heat/scores": HEAT}
VALID = {
    "/v1/completions": {
        "model": "d4",
        "prompt": "hi",
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "n": 1,
        "stop": ["z"],
        "seed": 3,
        "logprobs": 1,
        "stream": False,
    },
    "/v1/chat/completions": {
        "model": "d4",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4,
        "temperature": 0.5,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": False,
    },
    "/heat/scores": {"model": "d4", "text": "hi \N{SNOWMAN}"},
}
# as they stand in JSON, so that what Python cannot write is among them
VALUES = [
    "null true false 0 1 -1 2 5 6 63 64 65 0.0 -0.0 1.5 1e-320 1e999 -1e999 NaN Infinity -Infinity",
    "9223372036854775807 9223372036854775808 -9223372036854775809",
    '"" "a" "\\ud800" "\\udc00\\ud800" "\\u0000" "\\uffff" "x" "1" "NaN" "\\u202e" "d4"',
    '"d4@500" "d4@7" "d4@" "d4@99999999999999999999"',
    '[] [[]] [[[]]] {} [{}] [null] [""] ["a","b"] ["a",1] [1,"a"] [1] [256] [257] [-1]',
    "[1.0] [true] [[1],[2]] [[1],2] [[1],[]] [9223372036854775808] [[257]] [[256,256]]",
    '{"include_usage":true} {"include_usage":1} {"type":"text"} {"type":"json_object"} {"5":-100}',
    '[{"role":"user"}] [{"role":"user","content":null}] [{"role":"system","content":"a"}]',
    '[{"role":"user","content":[{"type":"text","text":"a"}]}] [{"role":"tool","content":"a"}]',
    '[{"role":{},"content":"a"}] [{"role":"user","content":"\\ud800"}]',
]
SMALL = [value for line in VALUES for value in line.split(" ")]
LARGE = [
    "9" * 400,
    "9" * 5000,
    "-" + "9" * 60,
    "[" * 2000 + "]" * 2000,
    "[" * 40 + "1" + "]" * 40,
    '{"a":' * 300 + "1" + "}" * 300,
    '"' + "x" * 70_000 + '"',
    '"' + "\N{SNOWMAN}" * 64 + '"',
    "[" + ",".join(["1"] * 5000) + "]",
    "[" + ",".join(["[1]"] * 500) + "]",
    "[" + ",".join(['"a"'] * 500) + "]",
]
HEADERS = [
    {"Host": "evil.example"},
    {"Host": "localhost:99999"},
    {"Host": "[::1"},
    {"Origin": "https://evil.example"},
    {"Origin": "http://localhost:8000"},
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/json; charset=utf-16"},
    {"Content-Type": "application/json\xff"},
    {"Content-Length": "-1"},
    {"Content-Length": "99999999999999999999"},
    {"Content-Length": "\xb2"},
    {"Authorization": "Bearer \xff"},
    {"Transfer-Encoding": "gzip"},
]


class Case:
    """One request: everything about it follows from the seed."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.method = "POST"
        self.path = self.rng.choice(list(PATHS))
        self.headers = {"Content-Type": "application/json"}
        valid = {name: json.dumps(value) for name, value in VALID[self.path].items()}
        streams = "stream" in valid and self.rng.random() < 0.1
        fields = valid | ({"stream": "true"} if streams else {})
        kind = self.rng.choice(
            ["field"] * 6 + ["fields", "json", "bytes", "headers", "path", "none"]
        )
        getattr(self, f"change_{kind}")(fields)

    def value(self):
        return self.rng.choice(LARGE if self.rng.random() < 0.1 else SMALL)

    def join(self, fields):
        self.body = "{" + ",".join(f"{json.dumps(k)}:{v}" for k, v in fields.items()) + "}"
        self.body = self.body.encode("utf-8", "surrogatepass")

    def name(self):
        names = [field.name for field in PATHS[self.path]] * 3
        return self.rng.choice([*names, *NEUTRAL, "nonsense", "\ud800", ""])

    def change_none(self, fields):
        self.join(fields)

    def change_field(self, fields):
        self.join(fields | {self.name(): self.value()})

    def change_fields(self, fields):
        kept = {name: value for name, value in fields.items() if self.rng.random() < 0.5}
        self.join(kept | {self.name(): self.value() for _ in range(self.rng.randrange(6))})

    def change_json(self, fields):
        self.body = self.value().encode()

    def change_bytes(self, fields):
        self.join(fields)
        body = bytearray(self.body)
        for _ in range(self.rng.randrange(1, 4)):
            body[self.rng.randrange(len(body))] = self.rng.randrange(256)
        self.body = bytes(body[: self.rng.randrange(len(body) + 1)])

    def change_headers(self, fields):
        self.join(fields)
        self.headers = self.headers | self.rng.choice(HEADERS)

    def change_path(self, fields):
        self.join(fields)
        self.method = self.rng.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "NONE"])
        paths = [
            "/",
            "/v1",
            "/v1/models/%00",
            "/v1/models/d4@7",
            "/heat/held-out/d4",
            "/heat/held-out/..%2f..%2fconfig.json",
            "/v1/models/../../config.json",
            "/%2e%2e/config.json",
        ]
        paths += [
            "/health",
            "/metrics",
            "/v1/models",
            "/v1/responses",
            "/\N{SNOWMAN}",
            "//",
            "/v1/",
        ]
        self.path = self.rng.choice(paths)


def fuzz_case(client, seed):
    """Send the request of a seed and check the answer."""
    case = Case(seed)
    headers = [(name.encode(), value.encode("latin-1")) for name, value in case.headers.items()]
    response = client.request(case.method, case.path, content=case.body, headers=headers)
    assert response.status_code in STATUSES, response.text
    if case.method == "HEAD" or case.path == "/metrics":
        return response.status_code
    kind = response.headers["content-type"].partition(";")[0]
    # the page
    if kind == "text/html":
        assert case.method == "GET" and "content-security-policy" in response.headers
    elif kind == "text/event-stream":
        assert response.text.endswith("data: [DONE]\n\n")
    elif response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    else:
        # strict JSON, whatever the numbers
        json.loads(response.text, parse_constant=pytest.fail)
    return response.status_code


def fuzz(seeds):
    """{status: count} of the requests of these seeds."""
    engine = FakeEngine(queue_size=8)
    counts = {}
    with TestClient(
        application(served(engine=engine)), base_url="http://localhost:8000", follow_redirects=False
    ) as client:
        for seed in seeds:
            try:
                status = fuzz_case(client, seed)
            except Exception as error:
                raise AssertionError(f"case {seed}") from error
            counts[status] = counts.get(status, 0) + 1
            assert engine.waiting == {}, f"case {seed} left something behind"
    # nothing that was refused has disturbed what follows
    assert counts[200] > len(seeds) / 20 and counts[400] > len(seeds) / 4
    return counts


def test_hostile_requests():
    fuzz(range(400))


@pytest.mark.slow
def test_many_hostile_requests():
    print(fuzz(range(1000, 11_000)))
