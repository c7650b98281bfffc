"""`nanochat serve` under load: streams at a time, each compared with the same request alone, and
llama.cpp's server with the same weights."""

import contextlib
import http.client
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.apps.bench.others import TEMPERATURE, TOP_K, exported, run_folder_of
from nanochat.common import UsageError, counted, in_a_line
from nanochat.eval.llama_server import in_own_process, serving
from nanochat.limits import available_cpus
from nanochat.run.timing import Entry

if TYPE_CHECKING:
    from nanochat.model.decoder import Decoder

STREAMS = 32
# of a prompt and its continuation, where the context is long enough
PROMPT_TOKENS = 64
NEW_TOKENS = 128
SAMPLING = {"temperature": TEMPERATURE, "top_k": TOP_K}
# seconds after which a server that says nothing hangs
PATIENCE = 300.0
# what llama.cpp needs to choose as we do, and to write as many tokens in every text
OF_LLAMA_CPP = {
    "samplers": ["top_k", "temperature"],
    "ignore_eos": True,
    "cache_prompt": False,
}


@dataclass(frozen=True)
class Answer:
    """What came of a request. first_seconds: from the request to the first text."""

    text: str
    reason: str | None
    n_tokens: int
    first_seconds: float

    def equals(self, other: "Answer") -> bool:
        """Whether the same text came, and all of it."""
        return self.reason is not None and (self.text, self.reason) == (other.text, other.reason)


@dataclass(frozen=True)
class Load:
    """Answers to every body one at a time, and to many at a time, by the index of their body.

    seconds: for all of them."""

    alone: list[Answer]
    alone_seconds: float
    together: list[tuple[int, Answer]]
    together_seconds: float


def time_serving(
    model: "Decoder", words: list[str], seconds: float, report: Callable[[str], None]
) -> Iterator[Entry]:
    """Entries of `nanochat serve`, and of llama.cpp's server for a llama where it is installed.

    words: flags of serve. seconds: of the load. report: gets a line about what is left out."""
    bodies = bodies_for(model.config.max_seq_len, model.config.vocab_size)
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as folder:
        run = run_folder_of(model, Path(folder) / "run")
        with _nanochat_server(run, words) as address:
            yield from entries_of("serve", put_under_load(address, {}, bodies, seconds))
        if model.config.arch != "llama":
            report("llama.cpp: left out, since it knows no speedrun model; use --arch=llama")
            return
        if missing := [p for p in ("gguf", "xllamacpp") if not importlib.util.find_spec(p)]:
            report(f"llama.cpp: left out; to see it: pip install {' '.join(missing)}")
            return
        gguf = exported(run, "gguf", "float32", "llama.cpp", report)
        if gguf is None:
            return
        arguments = (gguf / "model.gguf", model.config.max_seq_len, bodies, seconds)
        try:
            load = in_own_process(_load_of_llama_cpp, *arguments)
        # Of any class, as llama.cpp's errors are.
        except Exception as error:
            report(f"llama.cpp: left out: {in_a_line(error)}")
            return
        yield from entries_of("llama.cpp f32 server", load)


def bodies_for(context_tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    """Requests with different prompts and seeds."""
    generator = random.Random(0)
    n_prompt = min(PROMPT_TOKENS, context_tokens // 4)
    bos = vocab_size - 1
    return [
        {
            "prompt": [bos, *(generator.randrange(bos) for _ in range(n_prompt - 1))],
            "max_tokens": min(NEW_TOKENS, context_tokens // 2),
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **SAMPLING,
        }
        for seed in range(STREAMS)
    ]


def put_under_load(
    address: str, headers: dict[str, str], bodies: list[dict[str, Any]], seconds: float
) -> Load:
    """Ask everything alone, and then STREAMS at a time for some seconds."""
    # A warm-up: what is loaded or compiled on first use is not timed.
    ask(address, headers, bodies[0])
    started = time.perf_counter()
    alone = [ask(address, headers, body) for body in bodies]
    alone_seconds = time.perf_counter() - started

    together: list[tuple[int, Answer]] = []
    failures: list[BaseException] = []
    started = time.perf_counter()

    def stream(first: int) -> None:
        index = first
        try:
            while time.perf_counter() - started < seconds:
                together.append((index, ask(address, headers, bodies[index])))
                # Others each time, so that no two streams go the same way side by side.
                index = (index + 1) % len(bodies)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Load(alone, alone_seconds, together, time.perf_counter() - started)


def ask(address: str, headers: dict[str, str], body: dict[str, Any]) -> Answer:
    """The answer to a completion that is streamed. UsageError if the server refuses it."""
    text, reason, n_tokens, first_seconds = "", None, 0, 0.0
    started = time.perf_counter()
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json", **headers}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise UsageError(f"serve: status {response.status}: {response.read(500)!r}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            for choice in event.get("choices", ()):
                if choice["text"] and not text:
                    first_seconds = time.perf_counter() - started
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
    return Answer(text, reason, n_tokens, first_seconds)


def entries_of(program: str, load: Load) -> Iterator[Entry]:
    """The entries of a load: tokens a second, and whether what came together came alone."""
    n_alone = sum(answer.n_tokens for answer in load.alone)
    yield Entry(
        f"{program}, 1 stream",
        [load.alone_seconds],
        n_alone,
        note=f"{counted(len(load.alone), 'text')}, one after the other; {_first_text(load.alone)}",
    )
    answers = [answer for _, answer in load.together]
    n_tokens = sum(answer.n_tokens for answer in answers)
    n_equal = sum(answer.equals(load.alone[index]) for index, answer in load.together)
    speedup = n_tokens / load.together_seconds / (n_alone / load.alone_seconds)
    yield Entry(
        f"{program}, {STREAMS} streams",
        [load.together_seconds],
        n_tokens,
        note=f"{speedup:.1f} times 1 stream; {n_equal} of {len(answers)} texts complete and equal "
        f"to the same alone; {_first_text(answers)}",
    )


def _first_text(answers: list[Answer]) -> str:
    first = [1000 * answer.first_seconds for answer in answers]
    return f"first text after {statistics.median(first):.0f} ms, {max(first):.0f} at most"


@contextlib.contextmanager
def _nanochat_server(run: Path, words: list[str]) -> Iterator[str]:
    """Serve a run in a process of its own inside the `with`; gives host and port.

    UsageError if it does not start."""
    command = [sys.executable, "-m", "nanochat", "serve", str(run), "--port=0", "--no-watch"]
    command += [f"--slots={STREAMS}", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        for said in process.stdout:
            if said.startswith("listening on "):
                break
        else:
            raise UsageError(f"serve: the server ended: {said.strip() or 'no message'}")
        yield said.split()[2].rstrip(",").removeprefix("http://")
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def _load_of_llama_cpp(
    path: Path, context_tokens: int, bodies: list[dict[str, Any]], seconds: float
) -> Load:
    bodies = [body | OF_LLAMA_CPP for body in bodies]
    # Keys and values in fp32, as ours.
    with serving(
        path, context_tokens, slots=STREAMS, threads=available_cpus(), exact=True
    ) as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        return put_under_load(server.address, headers, bodies, seconds)
