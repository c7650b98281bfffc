"""Preference losses against sums written out in fp64, forward and backward."""

import math

import pytest
import torch

from nanochat.model.preference_loss import (
    answer_logprobs,
    compared,
    pair_loss,
    preference_loss,
    rewards,
)

CASES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(chosen, rejected, reference_chosen, reference_rejected, beta, variant, smoothing):
    """(loss, its derivative for the chosen log-probability) of one pair."""
    h = (chosen - rejected) - (reference_chosen - reference_rejected)
    if variant == "ipo":
        return (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
    p = sigmoid(beta * h)
    loss = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)
    return loss, beta * (smoothing * p - (1 - smoothing) * (1 - p))


@pytest.mark.parametrize("variant, smoothing", CASES)
@pytest.mark.parametrize("beta", [0.03, 0.1, 0.5])
def test_against_the_equations(variant, smoothing, beta):
    generator = torch.Generator().manual_seed(0)
    # log-probabilities of answers of a few dozen tokens
    values = -60 * torch.rand(4, 7, generator=generator)
    policy = values[:2].clone().requires_grad_()
    losses = preference_loss(
        *policy, *values[2:], beta=beta, variant=variant, label_smoothing=smoothing
    )
    losses.sum().backward()
    for i in range(7):
        loss, slope = by_hand(*values[:, i].double().tolist(), beta, variant, smoothing)
        assert losses[i].item() == pytest.approx(loss, rel=2e-5, abs=1e-6)
        assert policy.grad[0, i].item() == pytest.approx(slope, rel=2e-4, abs=1e-6)
        assert policy.grad[1, i].item() == -policy.grad[0, i].item()


def test_a_policy_that_is_its_reference():
    """The loss is log 2, and no pair has a larger reward than the other."""
    logprobs = torch.tensor([-3.0, -50.0])
    same = preference_loss(logprobs, logprobs - 1, logprobs, logprobs - 1, beta=0.1)
    torch.testing.assert_close(same, torch.full((2,), math.log(2)))
    assert rewards(logprobs, logprobs, 0.1).tolist() == [0.0, 0.0]


def test_extreme_differences_stay_finite():
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = preference_loss(far, -far, far.detach() * 0, far.detach() * 0, beta=0.5)
    losses.sum().backward()
    assert losses.tolist() == [pytest.approx(1e4), pytest.approx(0.0)]
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("variant, smoothing", CASES)
def test_pairs_in_rows(variant, smoothing):
    """Rows alternate; only targets count; the loss of ipo takes means, rewards never do."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 9, (6, 5), generator=generator)
    targets[torch.rand(6, 5, generator=generator) < 0.4] = -1
    targets[:, 0] = 3
    nats = torch.rand(6, 5, generator=generator) * (targets != -1)
    reference = -3 * torch.rand(6, generator=generator)
    loss, logged = pair_loss(
        nats, targets, reference, beta=0.1, variant=variant, label_smoothing=smoothing
    )
    sums = [-sum(row) for row in nats.double().tolist()]
    pairs = [(sums[i], sums[i + 1], *reference[i : i + 2].tolist()) for i in (0, 2, 4)]
    taken = pairs
    if variant == "ipo":
        n = (targets != -1).sum(1).tolist()
        lengths = [(n[i], n[i + 1], n[i], n[i + 1]) for i in (0, 2, 4)]
        taken = [
            [total / count for total, count in zip(*pair, strict=True)]
            for pair in zip(pairs, lengths, strict=True)
        ]
    expected = sum(by_hand(*pair, 0.1, variant, smoothing)[0] for pair in taken)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    gains = [(0.1 * (c - rc), 0.1 * (r - rr)) for c, r, rc, rr in pairs]
    assert logged.tolist() == pytest.approx(
        [
            sum(chosen > rejected for chosen, rejected in gains),
            sum(chosen for chosen, _ in gains),
            sum(rejected for _, rejected in gains),
            sum(pair[0] for pair in pairs),
            sum(pair[1] for pair in pairs),
        ],
        rel=1e-5,
    )


def test_an_answer_without_targets_has_no_mean():
    empty = torch.zeros(1, dtype=torch.int64)
    assert compared(answer_logprobs(torch.zeros(1, 3)), empty, "ipo").tolist() == [0.0]


def test_an_unknown_variant():
    zeros = torch.zeros(1)
    with pytest.raises(ValueError, match="choose sigmoid or ipo"):
        preference_loss(zeros, zeros, zeros, zeros, beta=0.1, variant="hinge")
