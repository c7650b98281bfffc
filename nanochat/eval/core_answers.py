"""A model's answers to the prompts of CORE (tasks/core.py).

Shape legend: B prompts, R rows of all their choices, T tokens, C width, P scored positions,
V vocabulary.

Whatever costs time is computed once: the tokens that the choices of an example have in common run
through the model one time and their keys and values serve every choice, and the head is applied to
the scored positions only. The prompts of a batch have similar lengths."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from nanochat.eval.kv_cache import Branches, KVCache
from tasks.core import Prompt

# fp32 logits that exist at the same time
CHUNK_LOGITS = 2**23
# tokens of one pass, padding included, in a process that does nothing but evaluate
BATCH_TOKENS = {"cuda": 65536, "cpu": 8192, "mps": 8192}
# what one more pass costs, in tokens: padding up to this many is cheaper
CALL_TOKENS = 256


class Answer(NamedTuple):
    """The answer to a prompt."""

    # the choice with the smallest mean loss; for language modelling 1 if every token of the
    # continuation is the most likely one, else 0
    choice: int
    # choices without a scored token, which are never chosen over others
    n_empty: int


class _Tail(NamedTuple):
    """What a row of a prompt holds behind the shared beginning."""

    # place among the R rows of the batch
    row: int
    # int32 (T,)
    ids: np.ndarray
    # where the scored span begins in ids, 1 or later: the id before it predicts it
    start: int


def tokens_of(prompt: Prompt) -> int:
    """Tokens of a prompt that run through the model."""
    return prompt.shared + sum(len(row) - prompt.shared for row in prompt.rows)


def batches(prompts: list[Prompt], batch_tokens: int) -> Iterator[list[Prompt]]:
    """Lists of prompts that run through the model together.

    They have similar lengths, so that little is padded, and at most batch_tokens tokens, padding
    included (one prompt at least)."""
    # prompts of similar lengths are neighbours, and those without a beginning come last
    order = sorted(
        prompts, key=lambda prompt: (prompt.shared, max(map(len, prompt.rows))), reverse=True
    )
    batch = []
    cost = 0
    for prompt in order:
        alone = _cost([prompt])
        together = _cost([*batch, prompt])
        # a prompt without a beginning has no last token of one, which branches start from
        unlike = batch and batch[0].shared and not prompt.shared
        if batch and (unlike or together > batch_tokens or together > cost + alone + CALL_TOKENS):
            yield batch
            batch = []
            together = alone
        batch.append(prompt)
        cost = together
    if batch:
        yield batch


def _cost(batch: list[Prompt]) -> int:
    """Tokens that run through the model for a batch, padding included."""
    longest_shared = max(prompt.shared for prompt in batch)
    most_rows = max(len(prompt.rows) for prompt in batch)
    longest_tail = max(len(row) - prompt.shared for prompt in batch for row in prompt.rows)
    return len(batch) * (longest_shared + most_rows * longest_tail)


def answers_of(
    model: torch.nn.Module, batch: list[Prompt], kind: str, device: torch.device
) -> list[Answer]:
    """The model's answer to each prompt of a batch of tasks of one kind (tasks.core.KINDS).

    model: as in nanochat.eval.core.evaluate().
    Raises ValueError if a loss is not a finite number."""
    # every prompt gets as many rows as the one with the most choices; the extra ones are empty
    n_rows = max(len(prompt.rows) for prompt in batch)
    beginnings = _read_beginnings(model, batch, n_rows, device)
    tails = [
        _Tail(b * n_rows + i, row[prompt.shared :], start - prompt.shared)
        for b, prompt in enumerate(batch)
        for i, (row, start) in enumerate(zip(prompt.rows, prompt.starts, strict=True))
    ]
    fed = [np.zeros(0, dtype=np.int64)] * (len(batch) * n_rows)
    for tail in tails:
        fed[tail.row] = tail.ids
    hidden_RxTxC = model.hidden(padded(fed).to(device), beginnings)

    # the hidden state at position t predicts token t + 1
    row_P = torch.cat([torch.full((len(ids) - start,), row) for row, ids, start in tails])
    position_P = torch.cat([torch.arange(start - 1, len(ids) - 1) for _, ids, start in tails])
    targets_P = torch.cat([torch.from_numpy(ids[start:]).long() for _, ids, start in tails])
    hidden_PxC = hidden_RxTxC[row_P.to(device), position_P.to(device)]
    nats_P, hits_P = score(model, hidden_PxC, targets_P.to(device))

    lengths = [len(ids) - start for _, ids, start in tails]
    nats_of_rows = iter(nats_P.split(lengths))
    hits_of_rows = iter(hits_P.split(lengths))
    answers = []
    for prompt in batch:
        nats = [next(nats_of_rows) for _ in prompt.rows]
        hits = [next(hits_of_rows) for _ in prompt.rows]
        if kind == "language_modeling":
            answers.append(_whether_predicted(hits[0]))
        else:
            answers.append(_most_likely(nats, prompt.row_of))
    return answers


def _read_beginnings(
    model: torch.nn.Module, batch: list[Prompt], n_rows: int, device: torch.device
) -> Branches | None:
    """Run the shared beginnings through the model, for n_rows rows that continue each of them.

    None if there are none; all prompts of a batch have one or none has."""
    lengths = [prompt.shared for prompt in batch]
    if not max(lengths):
        return None
    ids_BxT = padded([prompt.rows[0][: prompt.shared] for prompt in batch]).to(device)
    cache = KVCache(model.config, *ids_BxT.shape, device, model.compute_dtype, lengths)
    model.hidden(ids_BxT, cache, fill=True)
    last_B = torch.tensor([prompt.rows[0][prompt.shared - 1] for prompt in batch], device=device)
    longest = max(len(row) for prompt in batch for row in prompt.rows)
    return Branches(cache, n_rows, longest, model.embed(last_B))


def _whether_predicted(hits_P: torch.Tensor) -> Answer:
    """The answer of language modelling, from whether each token is the most likely one."""
    if len(hits_P) == 0:
        # an empty continuation predicts nothing, and so nothing right
        return Answer(0, 1)
    return Answer(int(hits_P.all()), 0)


def _most_likely(nats_of_rows: list[torch.Tensor], row_of: list[int]) -> Answer:
    """The first choice with the smallest mean loss, from the losses of the distinct rows."""
    means = [float(nats_P.mean()) if len(nats_P) else math.inf for nats_P in nats_of_rows]
    losses = [means[row] for row in row_of]
    return Answer(losses.index(min(losses)), sum(map(math.isinf, losses)))


def padded(rows: list[np.ndarray]) -> torch.Tensor:
    """int64 (R, longest) of rows of ids, filled up with zeros, which no earlier token sees."""
    ids_RxT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids_RxT[i, : len(row)] = torch.from_numpy(row)
    return ids_RxT


def score(
    model: torch.nn.Module, hidden_PxC: torch.Tensor, targets_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats and whether the target is the most likely token: (P,) fp64, (P,) bool.

    Both are on the CPU. The logits are computed in chunks, as all of them may be gigabytes.
    Raises ValueError if a loss is not a finite number."""
    # P may be 0
    nats = [torch.zeros(0, dtype=torch.float64)]
    hits = [torch.zeros(0, dtype=torch.bool)]
    rows = max(1, CHUNK_LOGITS // model.config.vocab_size)
    for hidden, targets in zip(hidden_PxC.split(rows), targets_P.split(rows), strict=True):
        logits = model.logits(hidden)
        loss = logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]
        nats.append(loss.double().cpu())
        hits.append((logits.argmax(-1) == targets).cpu())
    nats_P = torch.cat(nats)
    if not nats_P.isfinite().all():
        raise ValueError("the model's losses are not finite numbers; its weights are damaged")
    return nats_P, torch.cat(hits)
