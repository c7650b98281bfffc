"""How an evaluation ends: on every rank at the same point and for the same reason."""

import torch

from nanochat.ranks import sum_over_ranks
from nanochat.signals import Stopped


class EvaluationFailed(Exception):
    """An evaluation that could not be completed. Training continues without its number."""


def sum_or_leave(
    sums: torch.Tensor,
    device: torch.device,
    *,
    stopped: bool,
    failure: str = "",
    cause: Exception | None = None,
    failed_elsewhere: str = "another rank failed",
) -> torch.Tensor:
    """Sum the ranks' shares of an evaluation. Every rank calls this, even one that failed.

    sums: (N,) float64 on the CPU, the same N on every rank. stopped: this rank was asked to stop.
    failure: why this rank could not complete its share, from the exception `cause`; "" if it could.
    failed_elsewhere: the reason on the ranks whose own share is complete.
    Returns (N,) float64.
    Raises Stopped on every rank if any was asked to stop, else EvaluationFailed on every rank if
    any failed: a rank that raised on its own would leave the others waiting for its sums."""
    # in the same exchange as the sums: a second one would cost as much again
    votes = torch.tensor([stopped, bool(failure)], dtype=torch.float64)
    # NCCL sums only tensors in GPU memory; MPS has no float64
    meeting_place = device if device.type == "cuda" else torch.device("cpu")
    total = sum_over_ranks(torch.cat((votes, sums)).to(meeting_place)).cpu()
    any_stopped, any_failed = total[:2].tolist()
    # a stop comes first: a resumed run repeats the evaluation, which a failure would put on record
    if any_stopped:
        raise Stopped
    if any_failed:
        raise EvaluationFailed(failure or failed_elsewhere) from cause
    return total[2:]
