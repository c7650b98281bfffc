"""The parts that `nanochat bench` times. Each yields entries as they are measured."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.apps.bench.core_prompts import time_core
from nanochat.apps.bench.decoding import time_decoding
from nanochat.apps.bench.planning import time_plan
from nanochat.apps.bench.saving import time_saving
from nanochat.apps.bench.serving import time_serving
from nanochat.apps.bench.steering import time_steering
from nanochat.apps.bench.text import python_text, temporary_base_dir
from nanochat.common import UsageError, human_bytes
from nanochat.data.rows import Rows
from nanochat.data.sources import Corpus, open_corpus
from nanochat.data.token_cache import TokenCache, fit_tokenizer
from nanochat.data.tokenizer import Tokenizer
from nanochat.limits import available_cpus
from nanochat.run.timing import Entry, measured
from nanochat.run.workload import (
    Setup,
    TrainingStep,
    chosen_loss,
    time_attention,
    time_loss,
    ways_of_attention,
    windows_of,
)

# A first compilation takes minutes on a slow machine; beyond this, something hangs.
START_UP_SECONDS = 900
# Simulated by the data part: eight machines of eight.
MANY_RANKS = 64
# The smallest vocabulary that the data part trains a tokenizer for.
LEAST_VOCAB = 300


@dataclass(frozen=True)
class Bench:
    """What the parts work on. training: None if no part that was asked for needs a model.
    core_bundle: None leaves CORE out. train_words: a command line of train.py with the same shape.
    serving_seconds: of the load on the server.
    report: prints a line."""

    setup: Setup
    repeats: int
    training: TrainingStep | None
    core_bundle: Path | None
    train_words: list[str]
    serving_seconds: float
    saving_steps: int
    save_every: int
    report: Callable[[str], None]


def entries_of(part: str, bench: Bench) -> Iterator[Entry]:
    """The entries of one part, as they are measured."""
    return PARTS[part](bench)


def _step(bench: Bench) -> Iterator[Entry]:
    yield bench.training.time_step(bench.repeats)


def _forward(bench: Bench) -> Iterator[Entry]:
    yield bench.training.time_forward(bench.repeats)


def _backward(bench: Bench) -> Iterator[Entry]:
    yield bench.training.time_backward(bench.repeats)


def _optimizer(bench: Bench) -> Iterator[Entry]:
    yield bench.training.time_update(bench.repeats)


def _attention(bench: Bench) -> Iterator[Entry]:
    for window in windows_of(bench.setup.config):
        for name, function in ways_of_attention(bench.setup).items():
            yield time_attention(bench.setup, name, window, function, bench.repeats)


def _loss(bench: Bench) -> Iterator[Entry]:
    yield time_loss(bench.setup, "loss", chosen_loss(bench.setup), bench.repeats)
    yield time_loss(bench.setup, "loss, plain PyTorch", None, bench.repeats)


def _data(bench: Bench) -> Iterator[Entry]:
    """Text to token ids in the cache, and cached ids to batches."""
    setup = bench.setup
    threads = available_cpus()
    rows = setup.shape.device_batch_size
    row_tokens = setup.config.max_seq_len
    with temporary_base_dir() as folder:
        corpus = open_corpus(str(python_text(folder)))
        tokenizer = fit_tokenizer(corpus, "bpe", max(setup.config.vocab_size, LEAST_VOCAB))
        shard = corpus.train[0]
        seconds = []
        n_tokens = 0
        # A new cache each time, because it remembers lengths; and no file to be found in it.
        for _ in range(bench.repeats):
            cache = TokenCache(tokenizer, threads)
            started = time.perf_counter()
            n_tokens = cache.length(shard)
            seconds.append(time.perf_counter() - started)
            cache.path(shard).unlink()
        yield Entry("tokenize", seconds, n_tokens, note="and write to the cache")

        reader = Rows(corpus, TokenCache(tokenizer, threads), row_tokens, seed=1)
        # Other rows every time: the same ones would come from the processor's caches.
        steps = itertools.count()

        def batch() -> None:
            reader.batch(next(steps), rows, 0, rows, 0, 1)

        entry = measured("rows", batch, setup.device, bench.repeats, tokens=setup.tokens)
        # What was measured is of the training device, and these batches are not there yet.
        yield replace(entry, memory_bytes=None)
        yield from _data_of_many_ranks(corpus, tokenizer, row_tokens, rows)


def _data_of_many_ranks(
    corpus: Corpus, tokenizer: Tokenizer, row_tokens: int, rows: int
) -> Iterator[Entry]:
    """What each of MANY_RANKS ranks does for its first batch of so many rows, and for the next; one
    after another, as on cores of their own. The tokens are in the cache."""
    readers = [
        Rows(corpus, TokenCache(tokenizer, 1), row_tokens, seed=1) for _ in range(MANY_RANKS)
    ]
    size = TokenCache(tokenizer, 1).path(corpus.train[0]).stat().st_size
    notes = (f"each opens and checks a token file of {human_bytes(size)}", "of each")
    for step, (name, note) in enumerate(zip(("first batch", "next batch"), notes, strict=True)):
        seconds = []
        for rank, reader in enumerate(readers):
            started = time.perf_counter()
            reader.batch(step, MANY_RANKS * rows, 0, rows, rank, MANY_RANKS)
            seconds.append(time.perf_counter() - started)
        yield Entry(f"{name}, {MANY_RANKS} ranks", seconds, rows * row_tokens, note=note)


def _decode(bench: Bench) -> Iterator[Entry]:
    training = bench.training
    return time_decoding(training.model, training.inputs[0], bench.repeats, bench.report)


def _core(bench: Bench) -> Iterator[Entry]:
    if bench.core_bundle is not None:
        yield from time_core(bench.training.model, bench.core_bundle, bench.repeats)


def _start_up(bench: Bench) -> Iterator[Entry]:
    """`train.py --help`, and train.py from the command to the end of its first step, with an empty
    and then with a filled cache of kernels."""
    with temporary_base_dir() as folder:
        text = python_text(folder)
        # Three, as the first one reads Python's files from the disk.
        help_seconds = [_seconds_of_train(["--help"], folder) for _ in range(3)]
        yield Entry("start-up, --help", help_seconds)
        words = [
            f"--data={text}",
            f"--out-dir={folder}",
            f"--device-type={bench.setup.device.type}",
            *bench.train_words,
            "--num-iterations=1",
            "--eval-every=-1",
            "--sample-every=-1",
            "--no-save",
            "--overwrite",
        ]
        # A cold start happens once: afterwards the cache is warm.
        for name, n in (("start-up, first step, cold", 1), ("start-up, first step, warm", 2)):
            seconds = [_seconds_of_train(words, folder) for _ in range(n)]
            yield Entry(name, seconds, note="from the command to the end of step 1")


def _seconds_of_train(words: list[str], folder: Path) -> float:
    """Seconds that a process of train.py takes. Raises UsageError if it fails."""
    # Under the temporary folder, so that the first start finds no compiled kernels.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")}
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "train", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_UP_SECONDS,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(
            f"start-up: train.py ended with exit code {process.returncode}: {last}; leave this "
            f"part out with --only"
        )
    return time.perf_counter() - started


def _saving(bench: Bench) -> Iterator[Entry]:
    yield from time_saving(bench.training, bench.saving_steps, bench.save_every)


def _steering(bench: Bench) -> Iterator[Entry]:
    yield from time_steering(bench.training, bench.repeats, bench.report)


def _plan(bench: Bench) -> Iterator[Entry]:
    yield from time_plan(bench.setup, bench.repeats)


def _serve(bench: Bench) -> Iterator[Entry]:
    setup = bench.setup
    words = [f"--device-type={setup.device.type}", f"--dtype={setup.dtype_name}"]
    yield from time_serving(bench.training.model, words, bench.serving_seconds, bench.report)


PARTS: dict[str, Callable[[Bench], Iterator[Entry]]] = {
    "step": _step,
    "forward": _forward,
    "backward": _backward,
    "optimizer": _optimizer,
    "attention": _attention,
    "loss": _loss,
    "data": _data,
    "decode": _decode,
    "core": _core,
    "start-up": _start_up,
    "saving": _saving,
    "steering": _steering,
    "serve": _serve,
    "plan": _plan,
}
