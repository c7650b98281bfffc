"""Generation: a key/value cache, the choice of the next token, and streams of ids or text.

Shape legend: B samples, T new tokens, S tokens in the cache, C width, K key/value heads, D head dim, V vocabulary.

The prompt runs through the model once (prefill), whatever the number of samples; then every step feeds one token a
sample. Choices are made on the CPU in fp64 from one seeded generator: a seed gives the same text on every run."""

import codecs
import itertools
import math
from typing import Any

import torch

from nanochat.common import UsageError, stream_seed
from nanochat.model.attention import attention, branched_attention

SAMPLE_TOKENS = 96  # length of the samples drawn during training


class NotNumbers(ValueError):
    """The model's logits are NaN or infinite, so that no token can be drawn."""


class LayerCache:
    """Keys and values of one layer, in buffers of fixed size.

    key_before: (B, 1, K, D), the last position's key as it was before shifting, rotating and normalising; None before the first
    and in models that shift none. lengths: see KVCache."""

    def __init__(self, batch_size, capacity, n_kv_head, head_dim, device, dtype, lengths=None):
        self.key_before, self.lengths = None, lengths
        self.keys = torch.empty(
            batch_size, capacity, n_kv_head, head_dim, device=device, dtype=dtype
        )
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k_BxTxKxD, v_BxTxKxD):
        """Store T more positions; returns all keys and all values so far, each (B, S, K, D), as views of the buffers. What fills an
        empty cache is kept as it is, without a copy.

        Into an empty cache a single row may be appended: it becomes the start of every row, and only that one row is
        returned. Raises ValueError when the positions do not fit or the number of rows is another one."""
        batch_size, capacity = self.keys.shape[:2]
        rows, T = k_BxTxKxD.shape[:2]
        end = self.length + T
        if end > capacity:
            raise ValueError(
                f"the key/value cache is full: it holds {self.length} of {capacity} positions and was "
                f"given {T} more; make it with a larger capacity"
            )
        if rows != batch_size and not (rows == 1 and self.length == 0):
            raise ValueError(f"the key/value cache has {batch_size} rows and was given {rows}")
        if k_BxTxKxD.shape == self.keys.shape:
            self.keys, self.values = k_BxTxKxD, v_BxTxKxD
        else:
            self.keys[:, self.length : end] = k_BxTxKxD
            self.values[:, self.length : end] = v_BxTxKxD
        self.length = end
        return self.keys[:rows, :end], self.values[:rows, :end]

    def remember(self, raw_keys_BxTxKxD):
        """Keep the last of the keys that were read, from which the next position's key is made."""
        if self.lengths is None:
            last = raw_keys_BxTxKxD[:, -1:].clone()  # a view would hold them all
        else:
            rows = torch.arange(len(self.lengths), device=raw_keys_BxTxKxD.device)
            last = raw_keys_BxTxKxD[rows, torch.tensor(self.lengths, device=rows.device) - 1][
                :, None
            ]
        self.key_before = last.expand(self.keys.size(0), -1, -1, -1)

    def attend(self, q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, window, backend):
        """attention() of the T newest positions, stored first, to all."""
        return attention(q_BxTxHxD, *self.append(k_BxTxKxD, v_BxTxKxD), window, backend)


class KVCache:
    """What the model remembers of the tokens it has read: keys and values per layer, and what smear needs.

    length: positions read so far. previous_embedding: (B, 1, C), the normalised embedding of the last token, or None
    before the first and in models without smear. layers: one LayerCache per layer. dtype is the model's compute dtype.
    lengths: tokens of each row where the rows that are read are padded, for a cache that is filled once, for Branches."""

    def __init__(self, config, batch_size, capacity, device, dtype, lengths=None):
        self.layers = [
            LayerCache(
                batch_size, capacity, config.n_kv_head, config.head_dim, device, dtype, lengths
            )
            for _ in range(config.depth)
        ]
        self.batch_size, self.lengths = batch_size, lengths
        self.length = 0
        self.previous_embedding = None

    def positions(self, T):
        """Of the next T tokens."""
        return slice(self.length, self.length + T)

    def advance(self, n_tokens, last_embedding_Bx1xC):
        """Count n_tokens as read, once every layer has appended them. The embedding is None in models without smear."""
        self.length += n_tokens
        if last_embedding_Bx1xC is not None:
            self.previous_embedding = last_embedding_Bx1xC.expand(self.batch_size, -1, -1)


class Branches:
    """Rows that each continue a beginning, for one pass: n of them the first beginning, n the second, and so on. The model reads it
    as a cache; nothing is stored.

    cache: a KVCache made with the lengths of the beginnings, each at least 1, and filled; what it holds behind them is not used.
    longest: tokens of the longest row, beginning included; what is fed behind is padding. last_embedding_BxC: of the last token of
    each beginning (GPT.embed), needed by models with smear."""

    def __init__(self, cache, n, longest, last_embedding_BxC):
        self.longest = longest
        self.layers = [BranchesOfLayer(layer, n) for layer in cache.layers]
        self.lengths_R = torch.tensor(
            cache.lengths, device=last_embedding_BxC.device
        ).repeat_interleave(n)
        self.previous_embedding = last_embedding_BxC.repeat_interleave(n, dim=0)[:, None]

    def positions(self, T):
        """Of the next T tokens of each row, (R, T)."""
        return (self.lengths_R[:, None] + torch.arange(T, device=self.lengths_R.device)).clamp(
            max=self.longest - 1
        )

    def advance(self, n_tokens, last_embedding_Bx1xC):
        """As a cache's; there is nothing to count."""


class BranchesOfLayer:
    """The part of Branches that belongs to one layer."""

    def __init__(self, layer, n):
        self.layer = layer
        self.key_before = (
            None if layer.key_before is None else layer.key_before.repeat_interleave(n, dim=0)
        )

    def remember(self, raw_keys_RxTxKxD):
        """As a layer's cache; there is no next time."""

    def attend(self, q_RxTxHxD, k_RxTxKxD, v_RxTxKxD, window, backend):
        """Attention of each branch to the beginning that it continues and to itself, the same for all backends."""
        return branched_attention(
            q_RxTxHxD,
            k_RxTxKxD,
            v_RxTxKxD,
            self.layer.keys,
            self.layer.values,
            self.layer.lengths,
            window,
        )


def sample_next(
    logits_BxV,
    generator,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    repetition_penalty=1.0,
    seen_BxV=None,
):
    """Draw one token per row. Returns (B,) int64 on the CPU.

    logits_BxV: any float dtype and device; the work is done in fp64 on the CPU, in this order:
    repetition_penalty  logits of the tokens marked in seen_BxV (bool, CPU) are divided by it (arXiv 1909.05858);
                        negative ones multiplied, so that they too become less likely; 1 is off
    temperature         divides the logits; 0 takes the most likely token
    top_k               keeps the k most likely tokens; 0, negative or None is off
    top_p               of those, keeps the smallest set of most likely tokens whose probability reaches p (nucleus,
                        arXiv 1904.09751), at least one; 1 or more is off
    generator: a CPU torch.Generator; one number a row is drawn from it, none at temperature 0.
    Raises NotNumbers when a logit is NaN or plus infinity."""
    logits = logits_BxV.detach().cpu().double()
    if not (logits < math.inf).all():  # false of NaN too
        raise NotNumbers(
            "the model's logits are not numbers (NaN or infinite): its weights are damaged; try an earlier checkpoint"
        )
    if repetition_penalty != 1 and seen_BxV is not None:
        penalised = torch.where(
            logits > 0, logits / repetition_penalty, logits * repetition_penalty
        )
        logits = torch.where(seen_BxV, penalised, logits)
    if temperature == 0:
        return logits.argmax(-1)
    V = logits.size(-1)
    kept_logits, kept_ids = logits.topk(
        min(top_k, V) if top_k and top_k > 0 else V
    )  # most likely first
    # the largest becomes 0 before the division, so that a tiny temperature cannot overflow
    cumulative = ((kept_logits - kept_logits[:, :1]) / temperature).softmax(-1).cumsum(-1)
    last = torch.full((logits.size(0), 1), kept_ids.size(-1) - 1)
    if (
        top_p < 1
    ):  # the first place whose running sum reaches p; rounding may leave the whole sum just short of it
        last = torch.minimum((cumulative < top_p).sum(-1, keepdim=True), last)
    # inverse of the cumulative distribution: a point below the kept mass falls into one token's share
    point = torch.rand(
        logits.size(0), 1, generator=generator, dtype=torch.float64
    ) * cumulative.gather(1, last)
    place = torch.searchsorted(cumulative, point, right=True)
    return kept_ids.gather(1, place)[:, 0]


def option_problems(
    max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, num_samples
):
    """What is wrong with generation settings: a list of (name, value, reason and remedy), empty when all are usable."""
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
            "must be a number from 0 up; use 0 for the most likely token each time, 0.8 for variety",
        ),
        (
            "top_k",
            top_k,
            top_k is None or top_k >= -1,
            "must be a number of tokens, such as 50; use 0 to turn it off",
        ),
        ("top_p", top_p, 0 < top_p <= 1, "must be above 0 and at most 1; use 1 to turn it off"),
        (
            "repetition_penalty",
            repetition_penalty,
            0 < repetition_penalty < math.inf,
            "must be above 0; use 1 to turn it off, 1.1 to discourage repeats",
        ),
        ("seed", seed, 0 <= seed < 2**63, "must be from 0 to 2^63 - 1; 42 is the default"),
        (
            "num_samples",
            num_samples,
            num_samples >= 1,
            "must be at least 1; use 1 for a single text",
        ),
    ]
    return [(name, value, reason) for name, value, usable, reason in checks if not usable]


def check_prompt(model, prompt_ids, max_new_tokens):
    """Raise UsageError for a prompt that is empty, holds unknown ids, or leaves too few positions for new tokens."""
    vocab_size, reach = model.config.vocab_size, model.rope_cos.size(0)
    if not prompt_ids:
        raise UsageError("the prompt has no tokens; start it with the tokenizer's BOS")
    unknown = [i for i in prompt_ids if not 0 <= i < vocab_size]
    if unknown:
        raise UsageError(
            f"the prompt holds the token id {unknown[0]}; this model knows 0 to {vocab_size - 1}: "
            "was it encoded with another tokenizer?"
        )
    if len(prompt_ids) + max_new_tokens > reach:
        raise UsageError(
            f"the prompt's {len(prompt_ids)} tokens and {max_new_tokens} new ones need "
            f"{len(prompt_ids) + max_new_tokens} positions; this model has {reach}: shorten the prompt or "
            "ask for fewer new tokens"
        )


def check_prompts(model, tokenizer, prompts, max_new_tokens):
    """Raise one UsageError naming every prompt that the model cannot take, before the first is continued."""
    problems = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            check_prompt(model, prompt_with_bos(tokenizer, prompt), max_new_tokens)
        except UsageError as error:
            problems.append(f"prompt {number} of {len(prompts)}: {error}")
    if problems:
        raise UsageError("\n".join(problems))


@torch.no_grad()
def last_logits(model, ids_BxT, cache=None):
    """Logits (B, V), fp32, for the token that follows ids_BxT (int64). No dropout; the model's mode is restored."""
    training = model.training
    if training:
        model.eval()
    try:
        # the head is applied to the last position only: for a long prompt all positions x V would be gigabytes
        return model.logits(model.hidden(ids_BxT, cache)[:, -1])
    finally:
        if training:
            model.train()


def generate_ids(
    model,
    prompt_ids,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    repetition_penalty=1.0,
    seed=0,
    num_samples=1,
    stop_id=None,
    use_cache=True,
):
    """Continue a prompt (a list of ids, BOS first). Returns an iterator that yields one list of num_samples ids a step.

    A sample that draws stop_id yields it and from then on None; the iterator ends after max_new_tokens steps, or when
    all samples have stopped. Settings are as in sample_next(); the penalty counts the prompt as seen. The same seed and
    num_samples give the same ids.
    use_cache=False reads the whole text again for every token: slow, the reference for the cached path.

    Raises UsageError, at the call, naming every unusable setting, or a prompt that is empty, holds ids outside the
    vocabulary or is too long. Between steps the gradient mode and the model's train or eval mode are the caller's."""
    problems = option_problems(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, num_samples
    )
    if problems:
        raise UsageError("\n".join(f"{name} {value}: {reason}" for name, value, reason in problems))
    check_prompt(model, prompt_ids, max_new_tokens)
    filters = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }
    return _steps(model, prompt_ids, max_new_tokens, filters, seed, num_samples, stop_id, use_cache)


def _steps(model, prompt_ids, max_new_tokens, filters, seed, num_samples, stop_id, use_cache):
    config, device = model.config, model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    seen_BxV = torch.zeros(num_samples, config.vocab_size, dtype=torch.bool)
    seen_BxV[:, prompt_ids] = True
    running = [True] * num_samples
    cache = None
    if use_cache:  # the last token drawn is never read, hence - 1
        cache = KVCache(
            config, num_samples, len(prompt_ids) + max_new_tokens - 1, device, model.compute_dtype
        )
    ids_BxT = torch.tensor(
        [prompt_ids], device=device
    )  # one row for all samples: the first logits are the same
    for _ in range(max_new_tokens):
        logits_BxV = last_logits(model, ids_BxT, cache).expand(num_samples, -1)
        next_B = sample_next(logits_BxV, generator, **filters, seen_BxV=seen_BxV)
        seen_BxV[torch.arange(num_samples), next_B] = True
        step = [i if runs else None for i, runs in zip(next_B.tolist(), running)]
        yield step
        running = [i is not None and i != stop_id for i in step]
        if not any(running):
            return
        # stopped samples stay in the batch, their tokens unused, so that the others draw what they would have drawn
        next_Bx1 = next_B[:, None].to(device)
        ids_BxT = (
            next_Bx1 if use_cache else torch.cat((ids_BxT.expand(num_samples, -1), next_Bx1), dim=1)
        )


def prompt_with_bos(tokenizer, prompt):
    """Ids of a prompt (str, may be empty) as the start of a document. UsageError if the tokenizer cannot encode it."""
    return [tokenizer.bos, *tokenizer.encode(prompt)]


def text_pieces(tokenizer, ids):
    """Text of a stream of ids, in pieces, up to BOS (which ends the document), None, or the stream's end.

    A character spread over several tokens comes out whole, with its last token; bytes that are no valid UTF-8 come
    out as U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        if i is None or i == tokenizer.bos:
            break
        if piece := decoder.decode(tokenizer.token_bytes(i)):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


def generate_text(model, tokenizer, prompt, max_new_tokens=256, **sampling):
    """Continue a text with one sample: an iterator over pieces of new text (str), as they are drawn, prompt left out.

    Ends with the document (BOS) or after max_new_tokens. sampling: temperature, top_k, top_p, repetition_penalty, seed
    and use_cache of generate_ids(), which also tells the errors raised, at the call."""
    ids = prompt_with_bos(tokenizer, prompt)
    steps = generate_ids(
        model, ids, max_new_tokens, num_samples=1, stop_id=tokenizer.bos, **sampling
    )
    return text_pieces(tokenizer, (step[0] for step in steps))


def generate_texts(model, tokenizer, prompt, num_samples, max_new_tokens=256, **sampling):
    """num_samples continuations of one text, drawn side by side: a list of str. Arguments as in generate_text()."""
    ids = prompt_with_bos(tokenizer, prompt)
    steps = list(
        generate_ids(
            model, ids, max_new_tokens, num_samples=num_samples, stop_id=tokenizer.bos, **sampling
        )
    )
    return [
        "".join(text_pieces(tokenizer, (step[s] for step in steps))) for s in range(num_samples)
    ]


def draw_samples(model, tokenizer, prompts, seed, step, stop):
    """Yields (prompt, text, "") for each prompt, as training samples at a step, or (prompt, None, reason) where it fails.

    stop: StopSignals; once stop.requested is set nothing more is yielded, half a text neither."""
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
        except Exception as error:  # whatever it is, a sample is not worth the run
            yield prompt, None, f"{type(error).__name__}: {error}"
        else:
            yield prompt, "".join(pieces), ""


def sample_prompts(path: str, tokenizer: Any, corpus: Any) -> list[str]:
    """The prompts of the samples that training draws.

    path: --sample-prompts, a file with a prompt on each line; if it is "", the prompts are "" and
    the beginnings of two held-out documents.
    Raises UsageError for a file that is not text or that the tokenizer cannot encode."""
    if not path:
        documents = itertools.islice(corpus.val[0].documents(), 2)
        return [
            "",
            *(tokenizer.decode(tokenizer.encode(document[:100])[:8]) for document in documents),
        ]
    try:
        with open(path, encoding="utf-8") as f:
            prompts = [line.rstrip("\n") for line in f]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--sample-prompts={path}: cannot be read as text ({error})"
        ) from None
    for prompt in prompts:
        tokenizer.encode(prompt)
    return prompts
