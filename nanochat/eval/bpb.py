"""Validation: bits per byte of held-out text, as DESIGN defines it."""

import math

import numpy as np
import torch

from nanochat.ranks import rank, sum_over_ranks, world_size


class EvaluationFailed(Exception):
    """An evaluation that could not be finished; training can go on without its number."""


@torch.no_grad()
def bits_per_byte(model, pieces, byte_counts, batch_tokens, device, interrupted=lambda: False):
    """Score held-out pieces (data.held_out_pieces), each alone in its row after a BOS.

    byte_counts: int64 (V,), bytes of each token id, 0 for special tokens. batch_tokens: padded tokens a batch at most.
    interrupted: asked before each batch; true leaves early.
    Returns {"bpb": sum nats / (ln 2 * sum bytes), "loss": nats per token, "tokens", "bytes"} over all ranks, or None on
    every rank when any was interrupted. Sums are in fp64, so that neither batching nor the number of ranks changes the result.
    Raises EvaluationFailed on every rank when any rank could not finish its share."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(
        5, dtype=torch.float64
    )  # nats, tokens, bytes, ranks that failed, ranks that were interrupted
    problem = None
    try:
        for batch in batches_by_length(pieces[rank() :: world_size()], batch_tokens):
            if interrupted():
                sums[4] = 1
                break
            ids, targets = pad(batch)
            nats = model(ids.to(device), targets.to(device)).cpu().double()
            n_bytes = torch.as_tensor(byte_counts)[targets.clamp_min(0)] * (targets >= 0)
            sums[:3] += torch.stack(
                [nats[n_bytes > 0].sum(), (n_bytes > 0).sum().double(), n_bytes.sum().double()]
            )
    except (
        Exception
    ) as error:  # told to the other ranks, which would otherwise wait for this one's sums
        problem, sums[3] = error, 1
    finally:
        model.train(was_training)
    nats, tokens, n_bytes, failed, left = sum_over_ranks(
        sums.to(device if device.type == "cuda" else "cpu")
    ).tolist()
    if left:
        return None
    if failed:
        raise EvaluationFailed(
            f"{type(problem).__name__}: {problem}" if problem else "another rank failed"
        ) from problem
    if not math.isfinite(nats) or n_bytes == 0:
        raise EvaluationFailed(f"{nats} nats over {n_bytes:.0f} bytes of held-out text")
    return {
        "bpb": nats / (math.log(2) * n_bytes),
        "loss": nats / tokens,
        "tokens": int(tokens),
        "bytes": int(n_bytes),
    }


def batches_by_length(pieces, batch_tokens):
    """Lists of pieces of similar length whose padded size is at most batch_tokens (one piece at least)."""
    batch = []
    for piece in sorted(pieces, key=len, reverse=True):  # the first piece of a batch is its longest
        if batch and (len(batch) + 1) * (len(batch[0]) - 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def pad(pieces):
    """(ids, targets) int64 (B, longest - 1) of a list of pieces; inputs padded with 0, targets with -1."""
    longest = max(len(piece) for piece in pieces) - 1
    ids, targets = (
        np.zeros((len(pieces), longest), dtype=np.int64),
        np.full((len(pieces), longest), -1, dtype=np.int64),
    )
    for i, piece in enumerate(pieces):
        ids[i, : len(piece) - 1], targets[i, : len(piece) - 1] = piece[:-1], piece[1:]
    return torch.from_numpy(ids), torch.from_numpy(targets)
