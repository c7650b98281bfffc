"""How well a model foresees the answers in conversations: nats per token and bits per byte of what
fine-tuning learns."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.data.packing import NO_TARGET, Encoded
from nanochat.eval.unison import EvaluationFailed, sum_or_leave
from nanochat.ranks import rank, world_size


@dataclass(frozen=True)
class AnswerLoss:
    """loss: mean nats of the targets, ends of turns included. bpb: nats of the targets that stand
    for bytes, per byte, in bits. targets, bytes: how many there were."""

    loss: float
    bpb: float
    targets: int
    bytes: int


def answer_loss(
    model: torch.nn.Module,
    encoded: Encoded,
    byte_counts: np.ndarray,
    batch_tokens: int,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> AnswerLoss:
    """Score every conversation alone; each rank takes its share.

    byte_counts: int64 (V,), bytes of each token, 0 for special ones. batch_tokens: tokens of a
    batch at most, padding included (one conversation at least). interrupted: asked before each
    batch. The model's train or eval mode is restored.
    Raises Stopped on every rank when any was interrupted, and EvaluationFailed on every rank when
    any could not score its share or when there are no targets or no finite sum."""
    was_training = model.training
    model.eval()
    # nats, targets, nats of those that stand for bytes, bytes; in fp64, so that neither batching
    # nor the number of ranks shows
    sums = torch.zeros(4, dtype=torch.float64)
    stopped = False
    error = None
    mine = range(rank(), len(encoded.lengths), world_size())
    try:
        for batch in _batches(encoded.lengths, mine, batch_tokens):
            if interrupted():
                stopped = True
                break
            sums += _score(model, [encoded[i] for i in batch], byte_counts, device)
    except Exception as caught:
        # not raised here: the other ranks would wait for this one's sums
        error = caught
    finally:
        model.train(was_training)
    failure = "" if error is None else f"{type(error).__name__}: {error}"
    sums = sum_or_leave(sums, device, stopped=stopped, failure=failure, cause=error)
    nats, n_targets, nats_of_bytes, n_bytes = sums.tolist()
    if not math.isfinite(nats) or n_targets == 0:
        raise EvaluationFailed(f"{nats} nats over {n_targets:.0f} targets in held-out answers")
    # answers may be empty but for the end of their turn
    bpb = nats_of_bytes / (math.log(2) * n_bytes) if n_bytes else math.nan
    return AnswerLoss(nats / n_targets, bpb, int(n_targets), int(n_bytes))


def _batches(lengths: np.ndarray, numbers: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of conversations of similar length, the longest first."""
    batch: list[int] = []
    for number in sorted(numbers, key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * (lengths[batch[0]] - 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _score(
    model: torch.nn.Module,
    conversations: Sequence[tuple[np.ndarray, np.ndarray]],
    byte_counts: np.ndarray,
    device: torch.device,
) -> torch.Tensor:
    """(4,) float64: nats and number of all targets, nats and bytes of those that stand for
    bytes."""
    longest = max(len(ids) for ids, _ in conversations) - 1
    ids_BxT = np.zeros((len(conversations), longest), dtype=np.int64)
    targets_BxT = np.full((len(conversations), longest), NO_TARGET, dtype=np.int64)
    for i, (ids, mask) in enumerate(conversations):
        # unsigned ids have no room for NO_TARGET
        ids = ids.astype(np.int64)
        ids_BxT[i, : len(ids) - 1] = ids[:-1]
        targets_BxT[i, : len(ids) - 1] = np.where(mask[1:], ids[1:], NO_TARGET)
    inputs, targets = torch.from_numpy(ids_BxT).to(device), torch.from_numpy(targets_BxT)
    with torch.no_grad():
        nats_BxT = model(inputs, targets.to(device)).cpu().double()
    is_target = targets != NO_TARGET
    n_bytes_BxT = torch.as_tensor(byte_counts)[targets.clamp_min(0)] * is_target
    counted = n_bytes_BxT > 0
    return torch.stack(
        [
            nats_BxT[is_target].sum(),
            is_target.sum().double(),
            nats_BxT[counted].sum(),
            n_bytes_BxT.sum().double(),
        ]
    )
