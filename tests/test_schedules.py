"""Derived settings and learning-rate schedules, against worked examples."""

import dataclasses
import math

import pytest

from nanochat.optim import schedules
from nanochat.optim.schedules import BaseRates, Schedule
from nanochat.run import flags

BASE = BaseRates(
    optimizer="muon",
    matrix_lr=0.02,
    embedding_lr=0.3,
    unembedding_lr=0.004,
    scalar_lr=0.5,
    weight_decay=0.2,
    adam_beta1=0.8,
    adam_beta2=0.95,
)


def groups(batch, tokens, reference, width=768, base=BASE):
    factor = schedules.lr_factor(batch)
    decay = schedules.decay_factor(batch, tokens, reference)
    return schedules.group_settings(base, factor, decay, width)


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


@pytest.mark.parametrize(
    "tokens, row_tokens, device_rows, rows",
    [
        (1e9, 2048, 1, 256),  # 2^19 / 2^11
        (1e9, 2048, 96, 288),  # whole passes of all devices
        (3.2e6, 512, 1, 4),
        (100, 512, 1, 1),  # never less than a row
        (100, 512, 8, 8),  # nor than a row for each device
    ],
)
def test_rows_a_step(tokens, row_tokens, device_rows, rows):
    assert schedules.derive_rows(tokens, 1e9, row_tokens, device_rows) == rows


def test_a_least_batch_is_rounded_up_to_whole_passes():
    assert schedules.derive_rows(100, 1e9, 512, 3, least_batch_tokens=2048) == 6


@pytest.mark.parametrize(
    "tokens, update_flops, flops_per_token, batch",
    [
        (1e9, 1024, 4, 1024),  # exactly a quarter of the passes
        (1e9, 1025, 4, 2048),
        # depth 4, 192 wide: five minutes and one minute of a CPU with AVX2
        (1e6, 8_500_000_000, 18_300_000, 2048),
        (2e5, 8_500_000_000, 18_300_000, 1024),
        (1e9, 0, 50, 1),
        (10, 1024, 4, 1),
    ],
)
def test_the_least_batch_of_a_time_budget(tokens, update_flops, flops_per_token, batch):
    assert schedules.timed_batch_tokens(tokens, update_flops, flops_per_token) == batch


def test_lr_factor():
    assert schedules.lr_factor(2**19) == 1
    assert schedules.lr_factor(2**21) == 2
    assert schedules.lr_factor(schedules.LR_FLOOR_BATCH_TOKENS) == schedules.lr_factor(64)


def test_tables_of_many_rows_keep_higher_rates_at_small_batches():
    for batch, factor in ((2**9, 2**0.5), (2**16, 2**0.5), (3 * 2**15, (4 / 3) ** 0.5)):
        assert schedules.table_factor(batch, 4096) == pytest.approx(factor)
        assert schedules.table_factor(batch, 65) == 1
    assert {schedules.table_factor(2**power, 2**15) for power in (17, 19, 21)} == {1}
    plain, higher = (schedules.group_settings(BASE, 0.5, 1.0, 768, by) for by in (1.0, 1.5))
    for name in ("embedding", "value_embeddings", "unembedding"):
        assert higher[name]["lr"] == pytest.approx(1.5 * plain[name]["lr"])
    assert higher["matrices"] == plain["matrices"] and higher["scalars"] == plain["scalars"]


def test_weight_decay_keeps_lr_times_decay_times_steps():
    """Constant T_epoch: over any run of at least MIN_STEPS the sum of lr x decay is that of the
    reference."""
    whole = 0.02 * 0.2 * 1e9 / 2**19
    for batch, tokens in ((2**19, 1e9), (2**20, 8e9), (2**11, 3.2e6), (2**17, 1e9)):
        group = groups(batch, tokens, 1e9)["matrices"]
        assert group["lr"] * group["weight_decay"] * tokens / batch == pytest.approx(whole)
    short = groups(2**11, 20 * 2**11, 1e9)["matrices"]
    assert short["lr"] * short["weight_decay"] * schedules.MIN_STEPS == pytest.approx(whole)


def test_groups_scale_with_batch_and_width():
    at_reference = groups(2**19, 1e9, 1e9)
    assert at_reference["matrices"]["lr"] == 0.02
    assert "beta1" not in at_reference["matrices"]
    assert at_reference["embedding"]["lr"] == 0.3
    wide = groups(2**21, 1e9, 1e9, 4 * 768)
    # x 2 for the batch, / 2 for the width
    assert wide["embedding"]["lr"] == pytest.approx(0.3)
    assert wide["matrices"]["lr"] == pytest.approx(0.04)
    adamw = dataclasses.replace(BASE, optimizer="adamw", matrix_lr=0.01)
    matrices = groups(2**19, 1e9, 1e9, base=adamw)["matrices"]
    assert (matrices["lr"], matrices["beta1"]) == (0.01, 0.8)


def test_scalars_have_an_eps_that_ignores_rounding_noise():
    assert groups(2**19, 1e9, 1e9)["scalars"]["eps"] >= 1e-6


@pytest.mark.parametrize(
    "given, matrix, embedding, unembedding",
    [
        ([], 0.02, 0.3, 0.004),
        (["--optimizer=adamw"], 0.003, 0.3, 0.004),
        (["--arch=llama"], 0.02, 0.012, 0.004),
        (["--matrix-lr=0.5", "--embedding-lr=0", "--unembedding-lr=2"], 0.5, 0, 2),
    ],
)
def test_rates_of_the_flags(given, matrix, embedding, unembedding):
    base = BaseRates.from_flags(flags.parse(given))
    assert (base.matrix_lr, base.embedding_lr, base.unembedding_lr) == (
        matrix,
        embedding,
        unembedding,
    )


def test_trapezoid():
    lrm = [schedules.lr_multiplier(step, 10, 2, 4, 0.1, "trapezoid") for step in range(10)]
    assert lrm == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325])


def test_cosine():
    lrm = [schedules.lr_multiplier(step, 9, 1, 0, 0.0, "cosine") for step in (0, 1, 5, 8)]
    assert lrm == pytest.approx([1 / 2, 1, 0.5, 0.5 * (1 + math.cos(math.pi * 7 / 8))])


def test_no_warmdown_and_single_step():
    assert schedules.lr_multiplier(4, 5, 0, 0, 0.0, "trapezoid") == 1
    assert schedules.lr_multiplier(0, 1, 0, 0, 0.0, "trapezoid") == 1


@pytest.mark.parametrize("shape", ["trapezoid", "cosine"])
def test_the_multiplier_never_reaches_zero_before_the_end(shape):
    lrm = [schedules.lr_multiplier(step, 100, 3, 50, 0.0, shape) for step in range(100)]
    assert min(lrm) > 0


@pytest.mark.parametrize(
    "schedule, warmup, warmdown",
    [
        (Schedule("trapezoid", 0.1, -1, 0.5, 0.0), 4, 20),
        (Schedule("trapezoid", 0.1, 7, 0.5, 0.0), 7, 20),
        (Schedule("trapezoid", 0.1, 0, 0.0, 0.0), 0, 0),
        (Schedule("cosine", 0.1, -1, 0.5, 0.0), 4, 0),
    ],
)
def test_warm_up_and_warm_down_of_40_steps(schedule, warmup, warmdown):
    assert (schedule.warmup(40), schedule.warmdown(40)) == (warmup, warmdown)


def test_momentum_rises_and_stays():
    steps = (0, 10, schedules.MUON_MOMENTUM_STEPS, 10**6)
    start, early, end, later = (schedules.muon_momentum(step) for step in steps)
    assert start == schedules.MUON_MOMENTUM_START < early < end
    assert end == later == schedules.MUON_MOMENTUM_END
