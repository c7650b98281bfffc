"""Derived settings and learning-rate schedules, against worked examples."""

import math
from types import SimpleNamespace

import pytest

from nanochat.optim import schedules

ARGS = SimpleNamespace(
    embedding_lr=0.3,
    unembedding_lr=0.004,
    matrix_lr=-1,
    scalar_lr=0.5,
    weight_decay=0.2,
    adam_beta1=0.8,
    adam_beta2=0.95,
    optimizer="muon",
)


@pytest.mark.parametrize(
    "tokens, reference, batch",
    [
        (1e9, 1e9, 2**19),  # the reference itself
        (8e9, 1e9, 2**20),  # 2^19 x 8^0.383 = 2^20.15
        (64e9, 1e9, 2**21),  # 2^19 x 64^0.383 = 2^21.3
        (3.2e6, 1e9, 2**11),  # small: 3.2e6 / 1500 = 2,133 and so 2,048
        (100, 1e9, 1),
    ],
)
def test_batch_rule(tokens, reference, batch):
    assert schedules.derive_batch_tokens(tokens, reference) == batch


def test_batch_grows_with_the_horizon():
    batches = [schedules.derive_batch_tokens(10**e, 1e9) for e in range(3, 13)]
    assert batches == sorted(batches)


def test_lr_factor():
    assert schedules.lr_factor(2**19) == 1
    assert schedules.lr_factor(2**21) == 2
    assert schedules.lr_factor(schedules.LR_FLOOR_BATCH_TOKENS) == schedules.lr_factor(64)


def test_weight_decay_keeps_lr_times_decay_times_steps():
    """Constant T_epoch: over any run of at least MIN_STEPS the sum of lr x decay is that of the reference."""
    reference = 1e9
    whole = 0.02 * 0.2 * reference / 2**19
    for batch, tokens in ((2**19, 1e9), (2**20, 8e9), (2**11, 3.2e6), (2**17, 1e9)):
        group = schedules.group_settings(ARGS, batch, tokens, reference, 768)["matrices"]
        assert group["lr"] * group["weight_decay"] * tokens / batch == pytest.approx(
            whole * schedules.MATRIX_LR["muon"] / 0.02
        )
    short = schedules.group_settings(ARGS, 2**11, 20 * 2**11, reference, 768)["matrices"]
    assert short["lr"] * short["weight_decay"] * schedules.MIN_STEPS == pytest.approx(
        whole * schedules.MATRIX_LR["muon"] / 0.02
    )


def test_groups_scale_with_batch_and_width():
    at_reference = schedules.group_settings(ARGS, 2**19, 1e9, 1e9, 768)
    assert (
        at_reference["matrices"]["lr"] == schedules.MATRIX_LR["muon"]
        and "beta1" not in at_reference["matrices"]
    )
    assert at_reference["embedding"]["lr"] == 0.3
    wide = schedules.group_settings(ARGS, 2**21, 1e9, 1e9, 4 * 768)
    assert wide["embedding"]["lr"] == pytest.approx(0.3)  # x 2 for the batch, / 2 for the width
    assert wide["matrices"]["lr"] == pytest.approx(2 * schedules.MATRIX_LR["muon"])
    given = SimpleNamespace(**{**vars(ARGS), "matrix_lr": 0.01, "optimizer": "adamw"})
    matrices = schedules.group_settings(given, 2**19, 1e9, 1e9, 768)["matrices"]
    assert (matrices["lr"], matrices["beta1"]) == (0.01, 0.8)


def test_scalars_have_an_eps_that_ignores_rounding_noise():
    assert schedules.group_settings(ARGS, 2**19, 1e9, 1e9, 768)["scalars"]["eps"] >= 1e-6


def test_trapezoid():
    lrm = [schedules.lr_multiplier(step, 10, 2, 4, 0.1, "trapezoid") for step in range(10)]
    assert lrm == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325])


def test_cosine():
    lrm = [schedules.lr_multiplier(step, 9, 1, 0, 0.0, "cosine") for step in (0, 1, 5, 8)]
    assert lrm == pytest.approx([1 / 2, 1, 0.5, 0.5 * (1 + math.cos(math.pi * 7 / 8))])


def test_no_warmdown_and_single_step():
    assert schedules.lr_multiplier(4, 5, 0, 0, 0.0, "trapezoid") == 1
    assert schedules.lr_multiplier(0, 1, 0, 0, 0.0, "trapezoid") == 1


def test_the_multiplier_never_reaches_zero_before_the_end():
    for schedule in ("trapezoid", "cosine"):
        assert all(
            schedules.lr_multiplier(step, 100, 3, 50, 0.0, schedule) > 0 for step in range(100)
        )


def test_momentum_rises_and_stays():
    values = [
        schedules.muon_momentum(step) for step in (0, 10, schedules.MUON_MOMENTUM_STEPS, 10**6)
    ]
    assert (
        values[0]
        == schedules.MUON_MOMENTUM_START
        < values[1]
        < values[2]
        == values[3]
        == schedules.MUON_MOMENTUM_END
    )
