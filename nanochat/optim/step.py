"""The forward and backward passes of a training step: the one copy that train.py, `nanochat bench`
and the cost of saving share."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer

Batch = tuple[np.ndarray | torch.Tensor, np.ndarray | torch.Tensor]


def forward_backward(
    model: torch.nn.Module,
    scaler: LossScaler,
    batch: Batch,
    accumulation: int,
    device: torch.device,
    dropout_seed: int | None = None,
) -> torch.Tensor:
    """Add the gradients of one of `accumulation` micro-batches; returns its mean loss in nats,
    detached.

    batch: (inputs, targets), int64 (rows, tokens). dropout_seed: of the micro-batch, so that
    resuming needs no generator state; None without dropout."""
    # The seed says all about the masks of this pass: the same step draws the same ones, whatever
    # ran before it.
    if dropout_seed is not None:
        torch.manual_seed(dropout_seed)
    # Pinned memory, where the rows come from it, makes this copy overlap with the passes before.
    inputs, targets = (torch.as_tensor(ids).to(device, non_blocking=True) for ids in batch)
    return scaler.backward(model, inputs, targets, accumulation)


def accumulate(
    model: torch.nn.Module,
    optimizer: Optimizer,
    scaler: LossScaler,
    micro_batches: Sequence[Batch],
    device: torch.device,
    dropout_seed: Callable[[int], int | None] = lambda micro: None,
) -> torch.Tensor:
    """The passes of a whole step on this rank; returns the mean loss of its micro-batches, 0-D.

    dropout_seed(micro): of each micro-batch. During the last one, gradients may travel to the other
    ranks as soon as they are made, unless they have to be unscaled first."""
    n = len(micro_batches)
    # Summed on the device: reading each loss would wait for its pass.
    loss = torch.zeros((), device=device)
    for micro, batch in enumerate(micro_batches):
        # Gradients of earlier passes are not whole yet.
        optimizer.early = micro == n - 1 and not scaler.enabled
        seed = dropout_seed(micro)
        loss += forward_backward(model, scaler, batch, n, device, seed) / n
    return loss
