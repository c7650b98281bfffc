"""Validation: bits per byte of held-out text."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.eval.unison import EvaluationFailed, sum_or_leave
from nanochat.optim.sharding import passes_of_its_own
from nanochat.ranks import rank, world_size


@dataclass(frozen=True)
class BitsPerByte:
    """The result of an evaluation, over all ranks."""

    # nats of all scored tokens / (ln 2 * their UTF-8 bytes)
    bpb: float
    # nats per scored token
    loss: float
    # those scored; special tokens count as neither
    tokens: int
    bytes: int


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module,
    pieces: list[np.ndarray],
    byte_counts: np.ndarray,
    batch_tokens: int,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> BitsPerByte:
    """Score held-out pieces, each alone in its row after a BOS.

    All ranks call it and share the work.
    pieces: as from data.rows.held_out_pieces(). byte_counts: int64 (V,), UTF-8 bytes of each token
    id, 0 for special tokens. batch_tokens: tokens of a batch at most, padding included (a batch has
    one piece at least). interrupted: asked before each batch; True stops the evaluation.
    The model's train or eval mode is restored.
    Raises Stopped on every rank when any was interrupted, and EvaluationFailed on every rank when
    any could not score its share or when the sum is not a finite number."""
    was_training = model.training
    model.eval()
    # nats, tokens, bytes; in fp64, so that neither batching nor the number of ranks shows
    sums = torch.zeros(3, dtype=torch.float64)
    stopped = False
    error = None
    try:
        with passes_of_its_own(model):
            for batch in batches_by_length(pieces[rank() :: world_size()], batch_tokens):
                if interrupted():
                    stopped = True
                    break
                sums += _score(model, batch, byte_counts, device)
    except Exception as caught:
        # not raised here: the other ranks would wait for this one's sums
        error = caught
    finally:
        model.train(was_training)
    failure = "" if error is None else f"{type(error).__name__}: {error}"
    sums = sum_or_leave(sums, device, stopped=stopped, failure=failure, cause=error)
    nats, n_tokens, n_bytes = sums.tolist()
    if not math.isfinite(nats) or n_bytes == 0:
        raise EvaluationFailed(f"{nats} nats over {n_bytes:.0f} bytes of held-out text")
    return BitsPerByte(
        bpb=nats / (math.log(2) * n_bytes),
        loss=nats / n_tokens,
        tokens=int(n_tokens),
        bytes=int(n_bytes),
    )


def _score(
    model: torch.nn.Module, batch: list[np.ndarray], byte_counts: np.ndarray, device: torch.device
) -> torch.Tensor:
    """(3,) float64: nats, tokens and bytes of the tokens of a batch that stand for bytes."""
    ids_BxT, targets_BxT = pad(batch)
    # Not by a call, in which a sharded model exchanges more than in hidden(): see
    # passes_of_its_own().
    nats_BxT = model.forward(ids_BxT.to(device), targets_BxT.to(device)).cpu().double()
    # padding has target -1: any id may stand in for it, since it is multiplied by 0
    n_bytes_BxT = torch.as_tensor(byte_counts)[targets_BxT.clamp_min(0)] * (targets_BxT >= 0)
    counted_BxT = n_bytes_BxT > 0
    return torch.stack(
        [
            nats_BxT[counted_BxT].sum(),
            counted_BxT.sum().double(),
            n_bytes_BxT.sum().double(),
        ]
    )


def batches_by_length(pieces: list[np.ndarray], batch_tokens: int) -> Iterator[list[np.ndarray]]:
    """Lists of pieces of similar length, so that little is padded.

    The padded size of a list is at most batch_tokens, unless it is a single piece."""
    batch = []
    # longest first: the first piece of a batch is its longest, and an out-of-memory error is early
    for piece in sorted(pieces, key=len, reverse=True):
        if batch and (len(batch) + 1) * (len(batch[0]) - 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def pad(pieces: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), each int64 (B, longest - 1): ids padded with 0, targets with -1."""
    longest = max(len(piece) for piece in pieces) - 1
    ids = np.zeros((len(pieces), longest), dtype=np.int64)
    targets = np.full((len(pieces), longest), -1, dtype=np.int64)
    for i, piece in enumerate(pieces):
        ids[i, : len(piece) - 1] = piece[:-1]
        targets[i, : len(piece) - 1] = piece[1:]
    return torch.from_numpy(ids), torch.from_numpy(targets)
