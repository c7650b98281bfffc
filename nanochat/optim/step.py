"""The forward and backward passes of a training step: the one copy that all training loops,
`nanochat bench` and the cost of saving share."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer

# what a loss takes: arrays or tensors of a micro-batch, rows first
Batch = tuple[np.ndarray | torch.Tensor, ...]
# (model, the batch on its device, the factor that will stand before the loss) -> loss, 0-D
Loss = Callable[[torch.nn.Module, Sequence[torch.Tensor], float], torch.Tensor]


def own_thread_on(device: torch.device) -> None:
    """Let the calling thread work for a rank's device: a new thread begins on GPU 0, on which every
    rank would take memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def page_locked(batch: Batch, device: torch.device) -> Batch:
    """A batch in memory from which a GPU copies while it computes; as it is for other devices.

    From any other memory the copy begins when everything before it is done."""
    if device.type != "cuda":
        return batch
    return tuple(torch.as_tensor(part).contiguous().pin_memory() for part in batch)


def mean_loss(
    model: torch.nn.Module, batch: Sequence[torch.Tensor], upstream: float
) -> torch.Tensor:
    """Mean nats per target. batch: (inputs, targets), int64 (rows, tokens)."""
    inputs, targets = batch
    return model(inputs, targets, reduction="mean", upstream=upstream)


def summed_loss(
    model: torch.nn.Module, batch: Sequence[torch.Tensor], upstream: float
) -> torch.Tensor:
    """Nats of all targets of a micro-batch: divided by the targets of the whole step, however it
    is dealt out, it is the loss of one big batch. batch: as mean_loss()."""
    inputs, targets = batch
    return model(inputs, targets, reduction="sum", upstream=upstream)


def forward_backward(
    model: torch.nn.Module,
    scaler: LossScaler,
    batch: Batch,
    divisor: float,
    device: torch.device,
    dropout_seed: int | None = None,
    loss_of: Loss = mean_loss,
) -> torch.Tensor:
    """Add the gradients of a micro-batch, whose loss counts divided by `divisor`; returns its loss
    undivided, detached.

    dropout_seed: of the micro-batch, so that resuming needs no generator state; None without
    dropout."""
    # The seed says all about the masks of this pass: the same step draws the same ones, whatever
    # ran before it.
    if dropout_seed is not None:
        torch.manual_seed(dropout_seed)
    on_device = [torch.as_tensor(part).to(device, non_blocking=True) for part in batch]
    return scaler.backward(functools.partial(loss_of, model, on_device), divisor)


def accumulate(
    model: torch.nn.Module,
    optimizer: Optimizer,
    scaler: LossScaler,
    micro_batches: Sequence[Batch],
    device: torch.device,
    dropout_seed: Callable[[int], int | None] = lambda micro: None,
    loss_of: Loss = mean_loss,
    divisor: float | None = None,
) -> torch.Tensor:
    """The passes of a whole step on this rank; returns the sum of its losses over the divisor, 0-D.

    dropout_seed(micro): of each micro-batch. divisor: of each loss, by default the number of
    micro-batches, which makes the sum a mean. During the last pass, gradients may travel to the
    other ranks as soon as they are made, unless they have to be unscaled first."""
    n = len(micro_batches)
    if divisor is None:
        divisor = n
    # Summed on the device: reading each loss would wait for its pass.
    loss = torch.zeros((), device=device)
    for micro, batch in enumerate(micro_batches):
        # Gradients of earlier passes are not whole yet.
        optimizer.early = micro == n - 1 and not scaler.enabled
        seed = dropout_seed(micro)
        passed = forward_backward(model, scaler, batch, divisor, device, seed, loss_of)
        loss += passed / divisor
    return loss
