"""Losses that prefer one answer to another: direct preference optimization and its variants.

Shape legend: B pairs of answers."""

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANTS = ("sigmoid", "ipo")


def preference_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair, (B,).

    The four inputs are log-probabilities (fp32) of the answers under the policy and under the
    reference: for "sigmoid" the sum over an answer's tokens, for "ipo" the mean.

    sigmoid: equation 7 of arXiv 2305.18290, -log s(beta h), where h is by how much more the policy
    prefers the chosen answer than the reference does. label_smoothing: the share of pairs that is
    taken to be labelled the wrong way round (conservative DPO: that share of the loss is that of
    the swapped pair). ipo: (h - 1 / (2 beta))^2, equation 17 of arXiv 2310.12036.
    Raises ValueError for another variant."""
    preferred_B = (chosen_B - rejected_B) - (reference_chosen_B - reference_rejected_B)
    if variant == "sigmoid":
        right_B = -F.logsigmoid(beta * preferred_B)
        swapped_B = -F.logsigmoid(-beta * preferred_B)
        return (1 - label_smoothing) * right_B + label_smoothing * swapped_B
    if variant == "ipo":
        return (preferred_B - 1 / (2 * beta)).square()
    raise ValueError(f"variant {variant!r}; choose {' or '.join(VARIANTS)}")


def rewards(policy_B: Tensor, reference_B: Tensor, beta: float) -> Tensor:
    """The implicit reward of each answer, (B,), detached: beta times by how much likelier it is
    under the policy than under the reference (arXiv 2305.18290, below equation 7)."""
    return beta * (policy_B - reference_B).detach()


def answer_logprobs(nats_BxT: Tensor) -> Tensor:
    """Log-probabilities of answers, (B,), from the cross-entropy of their tokens.

    nats: 0 where there is no target, as the model returns them."""
    return -nats_BxT.sum(dim=1)


def compared(logprobs_B: Tensor, lengths_B: Tensor, variant: str) -> Tensor:
    """What preference_loss() compares of log-probabilities of answers, (B,): their sums over an
    answer's tokens, or for "ipo" the means. lengths: tokens of each answer."""
    if variant == "ipo":
        return logprobs_B / lengths_B.clamp_min(1)
    return logprobs_B


def pair_loss(
    nats_2BxT: Tensor,
    targets_2BxT: Tensor,
    reference_2B: Tensor,
    *,
    beta: float,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(sum of the losses, (5,) sums to log), of rows in which each chosen answer is followed by its
    rejected one.

    targets: -1 outside of the answers. reference: log-probabilities of the same rows under the
    reference, as answer_logprobs() gives them. Logged: pairs whose chosen answer has the larger
    reward, rewards of the chosen, of the rejected, log-probabilities of the chosen, of the
    rejected; detached, sums over an answer's tokens in every variant."""
    logprobs_2B = answer_logprobs(nats_2BxT)
    lengths_2B = (targets_2BxT != -1).sum(dim=1)
    policy_2B = compared(logprobs_2B, lengths_2B, variant)
    compared_reference_2B = compared(reference_2B, lengths_2B, variant)
    losses_B = preference_loss(
        policy_2B[0::2],
        policy_2B[1::2],
        compared_reference_2B[0::2],
        compared_reference_2B[1::2],
        beta=beta,
        variant=variant,
        label_smoothing=label_smoothing,
    )
    chosen_B, rejected_B = logprobs_2B[0::2], logprobs_2B[1::2]
    chosen_reward_B, rejected_reward_B = rewards(logprobs_2B, reference_2B, beta).view(-1, 2).T
    logged = torch.stack(
        [
            (chosen_reward_B > rejected_reward_B).float().sum(),
            chosen_reward_B.sum(),
            rejected_reward_B.sum(),
            chosen_B.detach().sum(),
            rejected_B.detach().sum(),
        ]
    )
    return losses_B.sum(), logged
