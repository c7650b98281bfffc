"""Generation: the choice of the next token, streams of ids and of text, and samples in training.

Shape legend: B samples, T tokens, V vocabulary.

The prompt runs through the model once, whatever the number of samples; then every step feeds one
token of each sample. Tokens are drawn on the CPU in fp64 from one seeded generator, so that a seed
gives the same text on every run."""

import codecs
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UsageError, counted, stream_seed
from nanochat.data.text import read_prompts
from nanochat.eval.kv_cache import KVCache
from nanochat.model.decoder import Decoder

# tokens of a sample drawn during training
SAMPLE_TOKENS = 96
# Beyond so many numbers torch uses several threads, which are slow to wake up and then spin for a
# while on the cores that the threads of decode.cpp need. Exponentials of 2,049 numbers are enough,
# and indexing by a list of rows: NumPy, which has no threads, does these.
ONE_THREAD_NUMBERS = (1 << 15) - 1
# of the most likely tokens, which are looked at before all are sorted
SORTED_FIRST = 64


class NotNumbers(ValueError):
    """The model's logits are NaN or infinite, so no token can be drawn."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not numbers (NaN or infinite): its weights are damaged; "
            "try an earlier checkpoint"
        )


# ---- the choice of a token ----


def sample_next(
    logits_BxV: Tensor,
    generator: torch.Generator | None,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seen_BxV: Tensor | None = None,
) -> Tensor:
    """Draw one token for each row. Returns int64 (B,) on the CPU.

    generator: on the CPU; one number is drawn from it for each row, none at temperature 0. The rest
    as in choose()."""
    point_Bx1 = None
    if temperature != 0:
        point_Bx1 = draw_points(logits_BxV.size(0), generator)
    return choose(
        logits_BxV, point_Bx1, temperature, top_k, top_p, repetition_penalty, seen_BxV=seen_BxV
    )


def draw_points(n: int, generator: torch.Generator | None) -> Tensor:
    """The n random numbers, fp64 (n, 1), with which choose() draws n tokens."""
    return torch.rand(n, 1, generator=generator, dtype=torch.float64)


def choose(
    logits_BxV: Tensor,
    point_Bx1: Tensor | None,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    min_p: float = 0.0,
    seen_BxV: Tensor | None = None,
) -> Tensor:
    """The token of each row that a random number between 0 and 1 draws. Returns int64 (B,) on the
    CPU.

    logits_BxV: any float dtype and device; computed with on the CPU, probabilities in fp64, in this
    order:
    repetition_penalty  divides the logits of the tokens marked in seen_BxV (bool, CPU), or
                        multiplies negative ones, so that all become less likely; 1: off
                        (arXiv 1909.05858)
    temperature         divides the logits; 0: always the most likely token (no point is needed)
    top_k               keeps the k most likely tokens; 0, negative or None: off
    top_p               of those, keeps the smallest set of most likely tokens whose probability
                        reaches p, one at least; 1 or more: off (nucleus, arXiv 1904.09751)
    min_p               keeps tokens at least min_p times as probable as the most likely one; 0: off
    Raises NotNumbers if a logit is NaN or plus infinity."""
    logits_BxV = logits_BxV.detach().cpu()
    # 16-bit ones have few values between two neighbours
    if logits_BxV.dtype != torch.float64:
        logits_BxV = logits_BxV.float()
    if repetition_penalty != 1 and seen_BxV is not None:
        logits_BxV = penalised(logits_BxV, repetition_penalty, seen_BxV)
    # the limit of a small temperature, without a division by zero
    if temperature == 0:
        # NumPy, which spends less on a call than torch
        chosen_B = torch.from_numpy(logits_BxV.numpy().argmax(-1))
        _check_numbers(logits_BxV.gather(1, chosen_B[:, None]))
        return chosen_B

    V = logits_BxV.size(1)
    cuts = (temperature, top_p, min_p)
    k = min(top_k, V) if top_k and top_k > 0 else V
    # Sorting all tokens takes longer than a small model; nearly always a few of them decide.
    is_partial = k == V > SORTED_FIRST
    n_sorted = SORTED_FIRST if is_partial else k
    parts = logits_BxV.split(max(1, ONE_THREAD_NUMBERS // V))
    tops = [part.topk(n_sorted) for part in parts]
    kept_logits = torch.cat([top.values for top in tops])
    kept_ids = torch.cat([top.indices for top in tops])
    _check_numbers(kept_logits[:, :1])
    points_Bx1 = point_Bx1.numpy()
    if not is_partial:
        chosen_B, _ = _draw(kept_logits, kept_ids, points_Bx1, *cuts)
        return torch.from_numpy(chosen_B)
    totals = []
    for part, top in zip(parts, tops, strict=True):
        shares = (part - top.values[:, :1]) / temperature
        np.exp(shares.numpy(), out=shares.numpy())
        totals.append(shares.sum(-1, keepdim=True, dtype=torch.float64))
    total_Bx1 = torch.cat(totals).numpy()
    chosen_B, is_decided_B = _draw(kept_logits, kept_ids, points_Bx1, *cuts, total_Bx1)
    # row by row, so that a text gets the same token alone and among others
    for row in np.flatnonzero(~is_decided_B):
        chosen_B[row] = _draw_among_more(logits_BxV[row], points_Bx1[row : row + 1], *cuts)
    return torch.from_numpy(chosen_B)


def _check_numbers(highest_Bx1: Tensor) -> None:
    """Raises NotNumbers unless the largest logit of each row is one; NaN counts as the largest."""
    # written so that NaN fails too
    if not (highest_Bx1 < math.inf).all():
        raise NotNumbers


def _draw_among_more(
    logits_V: Tensor, point_1x1: np.ndarray, temperature: float, top_p: float, min_p: float
) -> int:
    """choose() for a row that its SORTED_FIRST most likely tokens do not decide: among more of
    them, and more, until they do."""
    V = len(logits_V)
    numbers_V = logits_V.numpy().astype(np.float64)
    total_1x1 = _shares(numbers_V, numbers_V.max(), temperature).sum().reshape(1, 1)
    k = SORTED_FIRST
    while True:
        k = min(8 * k, V)
        # all of them decide
        total = total_1x1 if k < V else None
        top = logits_V[None].topk(k)
        chosen_1, is_decided_1 = _draw(
            top.values, top.indices, point_1x1, temperature, top_p, min_p, total
        )
        if is_decided_1[0]:
            return int(chosen_1[0])


def penalised(logits_BxV: Tensor, repetition_penalty: float, seen_BxV: Tensor) -> Tensor:
    """Logits with the repetition penalty of choose()."""
    together = max(1, ONE_THREAD_NUMBERS // logits_BxV.size(1))
    parts = []
    for logits, seen in zip(logits_BxV.split(together), seen_BxV.split(together), strict=True):
        # dividing a negative logit would make its token more likely
        less = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        parts.append(torch.where(seen, less, logits))
    return torch.cat(parts)


def _draw(
    kept_logits: Tensor,
    kept_ids: Tensor,
    point_Bx1: np.ndarray,
    temperature: float,
    top_p: float,
    min_p: float,
    total_Bx1: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """choose() among the k most likely tokens of each row, int64 (B,), and whether they decide,
    bool (B,). In NumPy: for so few numbers the calls cost most, and torch's cost more.

    kept_logits, kept_ids (B, k): of these, the most likely first. total_Bx1: the sum over all
    tokens, relative to the most likely one, if all may be drawn; None if only these k may."""
    k = kept_ids.size(1)
    logits_Bxk = kept_logits.numpy().astype(np.float64)
    shares_Bxk = _shares(logits_Bxk, logits_Bxk[:, :1], temperature)
    kept_Bx1 = shares_Bxk.sum(-1, keepdims=True) if total_Bx1 is None else total_Bx1
    cumulative_Bxk = (shares_Bxk / kept_Bx1).cumsum(-1)
    last_B = np.full(len(logits_Bxk), k - 1)
    if top_p < 1:
        # the first place whose running sum reaches p; rounding may leave even the whole sum short
        last_B = np.minimum((cumulative_Bxk < top_p).sum(-1), last_B)
    if min_p > 0:
        last_B = np.minimum((shares_Bxk >= min_p).sum(-1) - 1, last_B)
    # invert the cumulative distribution: a point below the kept mass falls into one token's share
    rows_B = np.arange(len(last_B))
    mass_Bx1 = cumulative_Bxk[rows_B, last_B][:, None]
    is_decided_B = np.ones(len(last_B), dtype=bool)
    if total_Bx1 is not None and (top_p < 1 or min_p > 0):
        # where the cut is further on, its mass is not known
        is_decided_B = last_B < k - 1
    elif total_Bx1 is not None:
        is_decided_B = point_Bx1[:, 0] < cumulative_Bxk[:, -1]
        mass_Bx1 = np.ones_like(mass_Bx1)
    place_B = (cumulative_Bxk <= point_Bx1 * mass_Bx1).sum(-1)
    # behind the last one: not decided
    place_B = np.minimum(place_B, k - 1)
    return kept_ids.numpy()[rows_B, place_B], is_decided_B


def _shares(logits: np.ndarray, highest: np.ndarray, temperature: float) -> np.ndarray:
    """How likely tokens are, relative to the most likely one, of logits in fp64."""
    # The largest becomes 0 before the division; the others may become -inf, whose share is 0.
    with np.errstate(over="ignore"):
        return np.exp((logits - highest) / temperature)


class Problem(NamedTuple):
    """An unusable setting of generate_ids(): its name, its value, and reason and remedy."""

    name: str
    value: float | None
    reason: str


def option_problems(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    repetition_penalty: float,
    seed: int,
    num_samples: int = 1,
    min_p: float = 0.0,
) -> list[Problem]:
    """All unusable settings; an empty list if every one is usable."""
    # name, value, whether it is usable, reason and remedy; NaN fails every comparison
    checks = [
        (
            "max_new_tokens",
            max_new_tokens,
            max_new_tokens >= 1,
            "must be at least 1, for example 256 tokens",
        ),
        (
            "temperature",
            temperature,
            0 <= temperature < math.inf,
            "must be a number from 0 up; use 0 for the most likely token, 0.8 for variety",
        ),
        (
            "top_k",
            top_k,
            top_k is None or top_k >= -1,
            "must be a number of tokens, such as 50; use 0 to turn it off",
        ),
        (
            "top_p",
            top_p,
            0 < top_p <= 1,
            "must be above 0 and at most 1; use 1 to turn it off",
        ),
        (
            "min_p",
            min_p,
            0 <= min_p <= 1,
            "must be from 0 to 1; use 0 to turn it off, 0.05 to drop unlikely tokens",
        ),
        (
            "repetition_penalty",
            repetition_penalty,
            0 < repetition_penalty < math.inf,
            "must be above 0; use 1 to turn it off, 1.1 to discourage repeats",
        ),
        (
            "seed",
            seed,
            0 <= seed < 2**63,
            "must be from 0 to 2^63 - 1; 42 is the default",
        ),
        (
            "num_samples",
            num_samples,
            num_samples >= 1,
            "must be at least 1; use 1 for a single text",
        ),
    ]
    return [Problem(name, value, reason) for name, value, usable, reason in checks if not usable]


# ---- prompts ----


def check_prompt(model: Decoder, prompt_ids: list[int], max_new_tokens: int) -> None:
    """Raises UsageError for a prompt that is empty, holds unknown ids, or is too long.

    A model has positions for a prompt and its continuation together."""
    vocab_size = model.config.vocab_size
    # the rotary table is longer than the sequence length of training
    reach = model.rope_cos.size(0)
    if not prompt_ids:
        raise UsageError("the prompt has no tokens; start it with the tokenizer's BOS")
    unknown = [i for i in prompt_ids if not 0 <= i < vocab_size]
    if unknown:
        raise UsageError(
            f"the prompt holds the token id {unknown[0]}, and this model's ids are 0 to "
            f"{vocab_size - 1}: was the prompt encoded with another tokenizer?"
        )
    needed = len(prompt_ids) + max_new_tokens
    if needed > reach:
        raise UsageError(
            f"the prompt's {counted(len(prompt_ids), 'token')} and {max_new_tokens} new need "
            f"{needed} positions; this model has {reach}: shorten the prompt or ask for fewer new "
            f"tokens"
        )


def check_prompts(
    model: Decoder, encode: Callable[[str], list[int]], prompts: list[str], max_new_tokens: int
) -> None:
    """Raises one UsageError that names every prompt the model cannot continue.

    encode: the ids of a prompt, such as those of prompt_with_bos(); may raise UsageError."""
    problems = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            check_prompt(model, encode(prompt), max_new_tokens)
        except UsageError as error:
            problems.append(f"prompt {number} of {len(prompts)}: {error}")
    if problems:
        raise UsageError("\n".join(problems))


class Room(NamedTuple):
    """How many new tokens fit behind a prompt, and a sentence if something about that is unusual.

    max_new_tokens: what was asked for, or fewer. note: "" if prompt and new tokens stay within the
    context of training."""

    max_new_tokens: int
    note: str


def room_for(model: Decoder, n_prompt: int, max_new_tokens: int) -> Room:
    """What becomes of a request for max_new_tokens behind a prompt of n_prompt tokens, with BOS.

    The prompt and one new token must fit, as check_prompt() makes sure."""
    context = model.config.max_seq_len
    reach = model.rope_cos.size(0)
    fitting = min(max_new_tokens, reach - n_prompt)
    if fitting < max_new_tokens:
        note = (
            f"the text ends after {counted(fitting, 'new token')} at the latest: this model has "
            f"{reach} positions, and the prompt takes {n_prompt} of them"
        )
    elif n_prompt > context:
        note = (
            f"the prompt's {n_prompt} tokens exceed the {context} tokens of context that the model "
            f"was trained with; nothing is cut, but the text may be poor"
        )
    elif n_prompt + max_new_tokens > context:
        note = (
            f"the prompt's {counted(n_prompt, 'token')} and up to {max_new_tokens} new exceed the "
            f"{context} tokens of context that the model was trained with; nothing is cut, but the "
            f"text may be poor from there on"
        )
    else:
        note = ""
    return Room(fitting, note)


def prompt_with_bos(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt (may be "") as the beginning of a document.

    Raises UsageError if the tokenizer cannot encode it."""
    return [tokenizer.bos, *tokenizer.encode(prompt)]


# ---- streams of ids ----


@torch.no_grad()
def last_logits(model: Decoder, ids_BxT: Tensor, cache: KVCache | None = None) -> Tensor:
    """Logits, fp32 (B, V), of the token that follows ids_BxT (int64).

    Without dropout; the model's train or eval mode is restored."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        # the head is applied to the last position only: logits of a long prompt are gigabytes
        return model.logits(model.hidden(ids_BxT, cache)[:, -1])
    finally:
        if was_training:
            model.train()


def generate_ids(
    model: Decoder,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
    stop_ids: Collection[int] = (),
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue a prompt (ids, BOS first). Yields one list of num_samples ids for each step.

    A sample that draws one of stop_ids yields it, and None from then on. The iterator ends after
    max_new_tokens steps, or when all samples have stopped. Settings are those of sample_next(); the
    penalty counts the prompt's tokens as seen. The same seed and num_samples give the same ids.
    use_cache=False reads the whole text again for every token: slow, the reference for the cache.
    Between steps the gradient mode and the model's train or eval mode are the caller's.

    Raises UsageError, at the call, that names every unusable setting, or for a prompt that is
    empty, holds ids outside the vocabulary or is too long; NotNumbers as sample_next()."""
    problems = option_problems(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, num_samples
    )
    if problems:
        raise UsageError("\n".join(f"{name} {value}: {reason}" for name, value, reason in problems))
    check_prompt(model, prompt_ids, max_new_tokens)
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }
    # a generator function would run its checks only when the first step is read
    return _steps(
        model, prompt_ids, max_new_tokens, sampling, seed, num_samples, stop_ids, use_cache
    )


def _steps(
    model: Decoder,
    prompt_ids: list[int],
    max_new_tokens: int,
    sampling: dict[str, float],
    seed: int,
    num_samples: int,
    stop_ids: Collection[int],
    use_cache: bool,
) -> Iterator[list[int | None]]:
    """generate_ids() with settings that are usable. A generator runs only when it is read."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    # tokens that the repetition penalty applies to
    seen_BxV = torch.zeros(num_samples, model.config.vocab_size, dtype=torch.bool)
    seen_BxV[:, prompt_ids] = True
    running = [True] * num_samples
    cache = None
    if use_cache:
        # the last token drawn is never read
        capacity = len(prompt_ids) + max_new_tokens - 1
        dtype = model.compute_dtype
        cache = KVCache(model.config, num_samples, capacity, device, dtype, one_by_one=True)
    # one row for all samples: their first logits are the same
    ids_BxT = torch.tensor([prompt_ids], device=device)
    for _ in range(max_new_tokens):
        logits_BxV = last_logits(model, ids_BxT, cache).expand(num_samples, -1)
        next_B = sample_next(logits_BxV, generator, **sampling, seen_BxV=seen_BxV)
        seen_BxV[torch.arange(num_samples), next_B] = True
        step = [i if runs else None for i, runs in zip(next_B.tolist(), running)]
        yield step
        running = [i is not None and i not in stop_ids for i in step]
        if not any(running):
            return
        # stopped samples stay in the batch, unread, so that the others draw what they would have
        next_Bx1 = next_B[:, None].to(device)
        if use_cache:
            ids_BxT = next_Bx1
        else:
            ids_BxT = torch.cat((ids_BxT.expand(num_samples, -1), next_Bx1), dim=1)


# ---- streams of text ----


class TextStream:
    """Turns the ids of one sample, in order, into its text, which ends at BOS (the end of the
    document), at the end of a turn in a chat, at None, or before the first of the stop texts.

    A character of several tokens comes out whole, with its last token; bytes that are not valid
    UTF-8 come out as U+FFFD. What may be the beginning of a stop text is held back until that is
    decided."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_id: int | None) -> str:
        """Take the next id; returns the text that is certain by now, perhaps "". Nothing may be
        pushed once the text has ended."""
        if token_id is None or token_id in self.tokenizer.end_ids:
            return self.end()
        self._held += self._decoder.decode(self.tokenizer.spelling(token_id))
        return self._certain()

    def end(self) -> str:
        """End the text; returns the rest of it."""
        # what is left of a character whose last token never came
        self._held += self._decoder.decode(b"", final=True)
        piece = self._certain()
        if not self.ended:
            piece += self._held
        self.ended = True
        return piece

    def _certain(self) -> str:
        """Take the text out of what is held that no further token can change."""
        if not self.stop:
            piece, self._held = self._held, ""
            return piece
        found = [(self._held.index(stop), stop) for stop in self.stop if stop in self._held]
        if found:
            # The one that is complete first, however the text is divided into tokens.
            place, _ = min(found, key=lambda at: (at[0] + len(at[1]), at[0]))
            self.ended = True
            return self._held[:place]
        n_waiting = max((_overlap(self._held, stop) for stop in self.stop), default=0)
        n_certain = len(self._held) - n_waiting
        piece, self._held = self._held[:n_certain], self._held[n_certain:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop text begins."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def text_pieces(
    tokenizer: Any, ids: Iterable[int | None], stop: Sequence[str] = ()
) -> Iterator[str]:
    """The text of a stream of ids, in pieces, as TextStream gives them; none is empty."""
    stream = TextStream(tokenizer, stop)
    for i in ids:
        if piece := stream.push(i):
            yield piece
        if stream.ended:
            return
    if piece := stream.end():
        yield piece


def generate_text(
    model: Decoder,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> Iterator[str]:
    """Continue a text with one sample: pieces of new text as they are drawn, without the prompt.

    Ends with the document (BOS), before the first of the texts in `stop`, or after max_new_tokens.
    sampling: temperature, top_k, top_p, repetition_penalty, seed and use_cache of generate_ids().
    Errors, also those of generate_ids(), are raised at the call."""
    stop = stop_texts(stop)
    ids = prompt_with_bos(tokenizer, prompt)
    steps = generate_ids(
        model, ids, max_new_tokens, num_samples=1, stop_ids=tokenizer.end_ids, **sampling
    )
    return text_pieces(tokenizer, (step[0] for step in steps), stop)


def stop_texts(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop texts; a single text counts as one. UsageError for an empty one."""
    # A string is a sequence too: of its characters, each of which would end the text.
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in texts:
        raise UsageError("stop: a text to stop before must not be empty; leave it out")
    return texts


# ---- samples in training ----


class Sample(NamedTuple):
    """A sample drawn during training. text: the continuation, or None with a `problem`."""

    prompt: str
    text: str | None
    problem: str


def draw_samples(
    model: Decoder, tokenizer: Any, prompts: list[str], seed: int, step: int, stop: Any
) -> Iterator[Sample]:
    """A sample for each prompt, as training draws them at a step, on rank 0 only.

    stop: a signals.StopSignals; once stop.requested is set nothing more is yielded, and no part of
    a text. A sample that fails is yielded without a text and with its problem."""
    # tiny models of tests have positions for few tokens
    n_tokens = min(SAMPLE_TOKENS, 4 * model.config.max_seq_len)
    for i, prompt in enumerate(prompts):
        pieces = []
        try:
            for piece in generate_text(
                model,
                tokenizer,
                prompt,
                max_new_tokens=n_tokens,
                temperature=0.8,
                top_k=50,
                seed=stream_seed(seed, "sample", step, i),
            ):
                pieces.append(piece)
                if stop.requested:
                    return
        except Exception as error:
            # of any kind: no sample is worth the run
            yield Sample(prompt, None, f"{type(error).__name__}: {error}")
        else:
            yield Sample(prompt, "".join(pieces), "")


def sample_prompts(path: str, tokenizer: Any, corpus: Any) -> list[str]:
    """The prompts of the samples that training draws.

    path: --sample-prompts, a file for read_prompts(); if it is "", the prompts are "" and
    the beginnings of two held-out documents.
    Raises UsageError for a file that is not text or that the tokenizer cannot encode."""
    if not path:
        documents = itertools.islice(corpus.val[0].documents(), 2)
        # 100 characters are enough for 8 tokens, and not a whole book to tokenize
        beginnings = [tokenizer.encode(document[:100])[:8] for document in documents]
        return ["", *(tokenizer.decode(ids) for ids in beginnings)]
    prompts = read_prompts(path, "--sample-prompts")
    # raises now what would otherwise fail at the first sample, hours later
    for prompt in prompts:
        tokenizer.encode(prompt)
    return prompts
