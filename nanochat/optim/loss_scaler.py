"""Training in fp16: loss scaling (arXiv 1710.03740)."""

import torch

INITIAL_SCALE, MIN_SCALE = 2.0**16, 1.0
GROWTH_STEPS = 2000  # in a row without overflow, after which the scale is doubled


class LossScaler:
    """The factor on the loss that keeps its gradients within the range of fp16, below which most of them would be zero.

    It is halved when they overflow and doubled when they have not for a long time. A power of two, so that multiplying and
    dividing by it rounds nothing. Its state changes alike on all ranks, since what it is told is the same on all."""

    def __init__(self, state=None):
        """state: what state() returned when the run was saved; None at its start."""
        self.scale, self.good_steps = state or (INITIAL_SCALE, 0)

    def state(self):
        """[scale, steps since it changed], for the checkpoint."""
        return [self.scale, self.good_steps]

    def backward(self, model, inputs, targets, accumulation):
        """Backward pass of a micro-batch, one of `accumulation`; gradients come out scaled. Returns its mean loss in nats, not scaled,
        detached."""
        factor = self.scale / accumulation
        loss = model(inputs, targets, reduction="mean", upstream=factor)
        (loss * factor).backward()
        return loss.detach()

    @torch.no_grad()
    def unscale(self, parameters):
        """Divide the gradients, which are fp32, by the scale; what overflowed stays infinite."""
        torch._foreach_mul_([parameter.grad for parameter in parameters], 1 / self.scale)

    def update(self, finite):
        """Adapt to a step whose gradients were finite on all ranks, or not. True if the scale was lowered, which may mend that."""
        self.good_steps = self.good_steps + 1 if finite else 0
        lowered = not finite and self.scale > MIN_SCALE
        if lowered:
            self.scale /= 2
        if self.good_steps == GROWTH_STEPS:
            self.scale, self.good_steps = 2 * self.scale, 0
        return lowered
