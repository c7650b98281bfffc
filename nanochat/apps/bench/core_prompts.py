"""CORE in `nanochat bench`: our answers to its prompts, against one example at a time."""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from nanochat import hardware
from nanochat.apps.bench.text import python_text, temporary_base_dir
from nanochat.data.sources import open_corpus
from nanochat.data.token_cache import fit_tokenizer
from nanochat.eval.core import len_limit
from nanochat.eval.core_answers import BATCH_TOKENS, answers_of, batches, padded
from nanochat.model.build import for_inference
from nanochat.model.config import GPTConfig
from nanochat.run.timing import Entry
from tasks.core import Prompt, Task, prompts_of, read_bundle, read_examples, shots_of

if TYPE_CHECKING:
    from nanochat.model.decoder import Decoder

# Of each task: so many examples, among them the longest.
EXAMPLES, LONGEST = 25, 10
# The naive way takes minutes, so it is not timed more often than this.
MOST_REPEATS = 3


def time_core(model: "Decoder", folder: Path, repeats: int) -> Iterator[Entry]:
    """Answers to prompts of a CORE bundle: one example at a time, and as `nanochat evaluate`."""
    device = next(model.parameters()).device
    tasks, prompts = _prompts(folder, model.config)

    def naive() -> None:
        with _without_cpp(model):
            for of_task in prompts.values():
                for prompt in of_task:
                    answer_naively(model, prompt, device)

    def ours() -> None:
        # Copying the weights is part of an evaluation, so it is timed too.
        inference = for_inference(model)
        for label, of_task in prompts.items():
            for batch in batches(of_task, BATCH_TOKENS[device.type]):
                answers_of(inference, batch, tasks[label].kind, device)

    # In training mode large layers would run in fp8 if --fp8 was given.
    model.eval()
    naive_seconds, seconds = _alternating(naive, ours, min(repeats, MOST_REPEATS), device)
    model.train()
    n_prompts = sum(map(len, prompts.values()))
    n_tokens = 0
    for of_task in prompts.values():
        n_tokens += sum(len(row) for prompt in of_task for row in prompt.rows)
    speedup = statistics.median(naive_seconds) / statistics.median(seconds)
    yield Entry("core, naive", naive_seconds, n_tokens, note=f"{n_prompts} prompts one by one")
    yield Entry("core", seconds, n_tokens, note=f"{speedup:.1f} times as fast as naive")


@contextlib.contextmanager
def _without_cpp(model: "Decoder") -> Iterator[None]:
    """The model as PyTorch alone computes it."""
    backend = model.blocks[0].attention.backend
    for block in model.blocks:
        block.attention.backend = "blocked" if backend == "native" else backend
    try:
        yield
    finally:
        for block in model.blocks:
            block.attention.backend = backend


@torch.no_grad()
def _alternating(
    first: Callable[[], None], second: Callable[[], None], repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of two functions, called in turn so that a machine that slows down slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for function, seconds in zip((first, second), times, strict=True):
            started = time.perf_counter()
            function()
            hardware.synchronize(device.type)
            seconds.append(time.perf_counter() - started)
    # The first call of each warms up.
    return times[0][1:], times[1][1:]


def answer_naively(model: "Decoder", prompt: Prompt, device: torch.device) -> None:
    """What a plain evaluation computes: the choices as a batch, and the logits of all tokens."""
    ids = padded(prompt.rows).to(device)
    logits = model(ids)
    nats = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(-1, ids.size(1) - 1)
    hits = logits.argmax(-1)[:, :-1] == ids[:, 1:]
    for r, (row, start) in enumerate(zip(prompt.rows, prompt.starts, strict=True)):
        span = slice(start - 1, len(row) - 1)
        # item() waits for the device, as an evaluation that reads each answer does.
        nats[r, span].mean().item()
        hits[r, span].all().item()


def _prompts(folder: Path, config: GPTConfig) -> tuple[dict[str, Task], dict[str, list[Prompt]]]:
    """The tasks of a bundle, and some prompts of each, by label."""
    with temporary_base_dir() as base:
        corpus = open_corpus(str(python_text(base)))
        tokenizer = fit_tokenizer(corpus, "bpe", config.vocab_size)
    tasks = read_bundle(folder).tasks
    limit = len_limit(config)
    prompts = {}
    for label, task in tasks.items():
        examples = read_examples(task).examples
        places = longest_and_others(task, examples)
        prompts[label] = prompts_of(task, examples, tokenizer, limit, places)
    return tasks, prompts


def longest_and_others(task: Task, examples: list[dict]) -> list[int]:
    """Places of EXAMPLES examples of a task: those with the longest prompts, by characters, which
    decide the memory, and others of all lengths."""
    # Characters stand for tokens: tokenizing whole tasks to choose among them would take minutes.
    alone = [len(json.dumps(example)) for example in examples]
    sizes = []
    for i, size in enumerate(alone):
        sizes.append(size + sum(alone[shot] for shot in shots_of(task, i, len(alone))))
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    others = order[LONGEST:]
    n_others = EXAMPLES - LONGEST
    if len(others) < n_others:
        return order[:LONGEST]
    spread = [others[i * len(others) // n_others] for i in range(n_others)]
    return order[:LONGEST] + spread
