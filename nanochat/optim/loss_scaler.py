"""Loss scaling for training in fp16 (arXiv 1710.03740)."""

from collections.abc import Callable, Iterable

import torch

INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0
GROWTH_STEPS = 2000  # consecutive steps without overflow, after which the scale is doubled


class LossScaler:
    """The factor on the loss that keeps its gradients within the range of fp16, below which most of
    them would be zero. Switched off, it changes nothing.

    The scale is halved when gradients overflow and doubled when they have not for a long time. It
    is a power of two, so that multiplying and dividing by it rounds nothing. All ranks pass the
    same verdict to update(), so the state stays the same on all of them."""

    def __init__(self, enabled: bool, state: list[float] | None = None) -> None:
        """state: what state() returned when the run was saved; None when a run begins."""
        self.enabled = enabled
        self.scale, self.good_steps = state or (INITIAL_SCALE, 0)

    def state(self) -> list[float] | None:
        """[scale, steps since it changed], for the checkpoint; None if switched off."""
        return [self.scale, self.good_steps] if self.enabled else None

    def backward(self, loss_of: Callable[[float], torch.Tensor], divisor: float) -> torch.Tensor:
        """Forward and backward pass of a micro-batch, whose loss counts divided by `divisor`.

        loss_of(upstream): its loss, given the factor that will stand before it. Adds to the
        gradients, which come out scaled. Returns the loss, neither scaled nor divided, detached."""
        # Not the scaled path with a factor of 1: the loss would round its gradients at another
        # size, and runs of earlier versions would not continue bit for bit.
        if not self.enabled:
            loss = loss_of(1.0)
            (loss / divisor).backward()
            return loss.detach()
        # The loss makes its gradients before this factor arrives; it is announced, so that they are
        # rounded at the size that they will have.
        factor = self.scale / divisor
        loss = loss_of(factor)
        (loss * factor).backward()
        return loss.detach()

    @torch.no_grad()
    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the gradients, which are fp32, by the scale; what overflowed stays infinite."""
        if self.enabled:
            torch._foreach_mul_([parameter.grad for parameter in parameters], 1 / self.scale)

    def update(self, finite: bool) -> bool:
        """Adapt to a step whose gradients were finite on all ranks, or not. Returns True if the
        scale was lowered, which may mend that."""
        if not self.enabled:
            return False
        # An overflow starts the count again, so that a scale that is just too large is tried
        # rarely.
        self.good_steps = self.good_steps + 1 if finite else 0
        lowered = not finite and self.scale > MIN_SCALE
        if lowered:
            self.scale /= 2
        if self.good_steps == GROWTH_STEPS:
            self.scale *= 2
            self.good_steps = 0
        return lowered
