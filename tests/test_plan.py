"""The plan of a run: what follows from the dial, worked by hand, and what is due at a step."""

import dataclasses
import itertools
import json

import pytest

import train
from nanochat.common import UsageError
from nanochat.optim.schedules import Schedule
from nanochat.run import flags
from nanochat.run.clock import Clock
from nanochat.run.plan import (
    Horizon,
    Machine,
    ModelSize,
    Plan,
    due,
    early_end,
    model_config,
    size_of,
    steps_to_land,
)
from nanochat.run.state import TrainState

MACHINE = Machine("cpu", devices=1, peak_flops=1e12, peak="assumed")


def plan_of(*given, vocab_size=32768, machine=MACHINE, tokens_per_epoch=1e9):
    """The plan that train.py derives from these flags."""
    args = flags.parse(list(given))
    config = model_config(args, vocab_size)
    return train.derive_plan(args, config, tokens_per_epoch, machine)


# ---- the dial ----


@dataclasses.dataclass(frozen=True)
class Worked:
    """A plan worked by hand. adam_factor: of every AdamW learning rate."""

    width: int
    scaling_parameters: int
    batch_tokens: int
    steps: int
    matrix_lr: float
    adam_factor: float
    weight_decay: float


# The key: (depth, aspect ratio, tokens a row, vocabulary). Width w = depth x ratio, rounded up to
# whole heads of 128; N = 12 depth w^2 + V w; D = 10.5 N; D_ref is D of depth 12 at the same ratio
# and vocabulary. B = 2^round(19 + 0.383 log2(D / D_ref)), at most 2^floor(log2(D / 1500)).
# Steps = round(D / B), and then D = steps x B. Learning rates: x sqrt(max(B, 2^16) / 2^19), those
# of AdamW also x sqrt(768 / w). Decay: 0.2 x (B / 2^19) x (D_ref / D) / the first of these factors.
WORKED = {
    # N = 12 x 4 x 256^2 + 32768 x 256 = 3,145,728 + 8,388,608; D = 121,110,528.
    # N_ref = 12 x 12 x 768^2 + 32768 x 768 = 84,934,656 + 25,165,824 = 110,100,480.
    # N / N_ref = 11 / 105; 19 + 0.383 x -3.255 = 17.75, so 2^18; but D / 1500 = 80,740 = 2^16.3.
    # lr x sqrt(1 / 8) = 0.353553; AdamW's x sqrt(3) = 0.612372.
    # Decay 0.2 x 1/8 x 105/11 / 0.353553.
    (4, 64, 2048, 32768): Worked(256, 11534336, 2**16, 1848, 0.00707107, 0.612372, 0.674966),
    # the reference itself: B / B_ref = D / D_ref = 1; D / B = 1,156,055,040 / 2^19 = 2205
    (12, 64, 2048, 32768): Worked(768, 110100480, 2**19, 2205, 0.02, 1.0, 0.2),
    # N = 12 x 24 x 1536^2 + 32768 x 1536 = 679,477,248 + 50,331,648; D = 7,662,993,408.
    # N / N_ref = 232 / 35; 19 + 0.383 x 2.7287 = 20.05, so 2^20, of which D holds 7308.
    # lr x sqrt(2) = 1.414214; AdamW's x sqrt(1 / 2): 1. Decay 0.2 x 2 x 35/232 / 1.414214.
    (24, 64, 2048, 32768): Worked(1536, 729808896, 2**20, 7308, 0.0282843, 1.0, 0.0426702),
    # w = 192, rounded up to two heads; N = 12 x 6 x 256^2 + 257 x 256 = 4,718,592 + 65,792;
    # D = 50,236,032. The reference is 384 wide: N_ref = 12 x 12 x 384^2 + 257 x 384 = 21,332,352.
    # D / 1500 = 33,491 = 2^15.03; D / 2^15 = 1533.08. Below 2^16 the learning rates stay as they
    # are there: 0.353553 and x sqrt(3). Decay with D = 1533 x 2^15 = 50,233,344:
    # 0.2 x 1/16 x 223,989,696 / 50,233,344 / 0.353553.
    (6, 32, 256, 257): Worked(256, 4784384, 2**15, 1533, 0.00707107, 0.612372, 0.157649),
}


@pytest.mark.parametrize("dial", WORKED)
def test_the_dial(dial):
    depth, ratio, T, vocab_size = dial
    expected = WORKED[dial]
    given = [f"--depth={depth}", f"--aspect-ratio={ratio}", f"--max-seq-len={T}"]
    plan = plan_of(*given, vocab_size=vocab_size)
    assert model_config(flags.parse(given), vocab_size).width == expected.width
    assert plan.scaling_parameters == expected.scaling_parameters
    assert plan.total_batch_tokens == expected.batch_tokens
    assert plan.rows_per_step == expected.batch_tokens // T
    assert plan.num_iterations == expected.steps
    assert plan.tokens == expected.steps * expected.batch_tokens
    assert (plan.warmup_steps, plan.warmdown_steps) == (0, round(expected.steps / 2))
    matrices = plan.groups["matrices"]
    assert matrices["lr"] == pytest.approx(expected.matrix_lr, rel=1e-5)
    assert matrices["weight_decay"] == pytest.approx(expected.weight_decay, rel=1e-5)
    at_reference = {
        "embedding": 0.3,
        "value_embeddings": 0.3,
        "unembedding": 0.004,
        "scalars": 0.5 * 0.01,
    }
    # tables of many rows learn as at 2^17 tokens, the others as at 2^16
    many = 1.0
    if vocab_size >= 1024 and expected.batch_tokens < 2**17:
        many = (2**17 / max(2**16, expected.batch_tokens)) ** 0.5
    rates = {name: group["lr"] for name, group in plan.groups.items() if name != "matrices"}
    assert rates == pytest.approx(
        {
            name: rate * expected.adam_factor * (1.0 if name == "scalars" else many)
            for name, rate in at_reference.items()
        },
        rel=1e-5,
    )
    assert all(plan.groups[name]["weight_decay"] == 0 for name in at_reference)


def test_the_dial_of_a_llama():
    """The same matrices and head, so the same plan; only its table learns at a rate of its own."""
    llama = plan_of("--depth=24", "--arch=llama")
    speedrun = plan_of("--depth=24")
    assert llama.scaling_parameters == speedrun.scaling_parameters
    assert llama.num_iterations == speedrun.num_iterations
    assert llama.groups["matrices"] == speedrun.groups["matrices"]
    assert llama.groups["embedding"]["lr"] == pytest.approx(0.012)


def test_rows_are_whole_passes_of_all_devices():
    """d4: 2^16 tokens are 32 rows of 2048, rounded up to 3 devices x 4 rows."""
    machine = dataclasses.replace(MACHINE, devices=3)
    plan = plan_of("--depth=4", "--device-batch-size=4", machine=machine)
    assert plan.rows_per_step == 36 and plan.total_batch_tokens == 36 * 2048
    # 121,110,528 / 73,728 = 1642.67
    assert plan.num_iterations == 1643


def test_a_short_run_decays_no_faster_than_one_of_1500_steps():
    """d12 for 20 steps at its own batch: decay 0.2 x D_ref / (1500 x 2^19) = 0.2 x 2205 / 1500."""
    plan = plan_of("--depth=12", "--num-iterations=20")
    assert plan.total_batch_tokens == 2**19 and plan.tokens == 20 * 2**19
    assert plan.groups["matrices"]["weight_decay"] == pytest.approx(0.2 * 2205 / 1500)


def test_a_warm_up_longer_than_the_run():
    plan_of("--depth=4", "--num-iterations=10", "--warmup-steps=5")
    with pytest.raises(UsageError, match="--warmup-steps=6: .* 5 .* 10 steps; give at most 5"):
        plan_of("--depth=4", "--num-iterations=10", "--warmup-steps=6")


def test_the_size_of_a_model():
    """d4 as a llama, whose MLP is 8/3 x 256 wide, rounded up to 704: N of
    4 x (4 x 256^2 + 3 x 256 x 704) + 32768 x 256, 6 FLOPs each, plus attention."""
    config = model_config(flags.parse(["--depth=4", "--arch=llama"]), 32768)
    size = size_of(config, aspect_ratio=64)
    assert size.scaling_parameters == 3211264 + 8388608
    assert size.reference_tokens == 10.5 * 110100480
    # 4 layers of 2 heads x 128 channels that see 2048 keys
    assert size.flops_per_token == 6 * 11599872 + 12 * 256 * 4 * 2048


# ---- the horizon ----

SIZE = ModelSize(
    {}, scaling_parameters=1000, flops_per_token=50, muon_flops=1000, reference_tokens=1e6
)


@pytest.mark.parametrize(
    "name, value, batch, tokens",
    [
        ("num_iterations", 10, 256, 2560),
        # the batch is then that of the default ratio
        ("num_iterations", 10, -1, 10500),
        ("target_flops", 1e6, 256, 20000),
        ("target_tokens", 5e5, 256, 500000),
        # 400 tokens an epoch
        ("target_epochs", 2.5, 256, 1000),
        # 30 s at 50% of two devices of 1e6 FLOP/s
        ("target_minutes", 0.5, 256, 600000),
        ("target_param_data_ratio", 20, 256, 20000),
    ],
)
def test_tokens_of_each_horizon(name, value, batch, tokens):
    machine = Machine("cpu", devices=2, peak_flops=1e6, peak="assumed")
    found = Horizon(name, value).tokens(SIZE, machine, 400, batch)
    assert found == pytest.approx(tokens)


@pytest.mark.parametrize(
    "given, horizon",
    [
        ([], Horizon("target_param_data_ratio", 10.5)),
        (["--target-param-data-ratio=20"], Horizon("target_param_data_ratio", 20)),
        (["--target-minutes=5", "--target-epochs=2"], Horizon("target_epochs", 2)),
        (["--target-tokens=1e6", "--target-flops=1e9"], Horizon("target_flops", 1e9)),
        (["--target-flops=1e9", "--num-iterations=7"], Horizon("num_iterations", 7)),
    ],
)
def test_the_first_horizon_given_wins(given, horizon):
    assert Horizon.from_flags(flags.parse(given)) == horizon


@pytest.mark.parametrize(
    "name, value, tokens, steps",
    [
        ("num_iterations", 7, 12345, 7),
        ("target_tokens", 1000, 1000, 4),
        ("target_tokens", 1, 1, 1),
    ],
)
def test_steps_of_a_horizon(name, value, tokens, steps):
    assert Horizon(name, value).steps(tokens, batch_tokens=256) == steps


@pytest.mark.parametrize(
    "given",
    [
        "--num-iterations=1848",
        "--target-tokens=121110528",
        "--target-param-data-ratio=10.5",
        "--target-epochs=2",
    ],
)
def test_horizons_of_the_same_length_are_the_same_run(given):
    plan = plan_of("--depth=4", given, tokens_per_epoch=121110528 / 2)
    default = plan_of("--depth=4")
    same = {"horizon": default.horizon, "horizon_value": default.horizon_value}
    assert dataclasses.replace(plan, **same) == default


# ---- time budgets ----


def budget(*given):
    """A plan with a time budget of 10 minutes, estimated at 40 steps of 2048 tokens."""
    plan = plan_of("--depth=4", "--total-batch-size=2048", "--target-minutes=10", *given)
    plan.warmup_steps = plan.schedule.warmup(40)
    return plan


def multipliers(plan, steps):
    return [plan.lr_multiplier(step) for step in steps]


@pytest.mark.parametrize(
    "given, peak_flops, batch_tokens",
    [
        # 0.5 x 10^11 FLOP/s x 300 s / 29.1e6 = 515,000 tokens, of which D / 1500 would be a row
        # of 512. Muon: 4 layers x 5.03e9 FLOPs, a third of the passes of 2,048 tokens; but of 4,096
        # fewer than 150 steps would be left.
        ([], 1e11, 2048),
        ([], 1.3e11, 4096),
        (["--optimizer=adamw"], 1e11, 512),
        # a horizon of tokens: time is not what is limited
        (["--target-tokens=515000"], 1e11, 512),
        # 51 million tokens: the rule D / 1500 asks for more
        ([], 1e13, 32768),
    ],
    ids=["slow", "less slow", "adamw", "tokens", "fast"],
)
def test_the_batch_of_a_time_budget(given, peak_flops, batch_tokens):
    machine = dataclasses.replace(MACHINE, peak_flops=peak_flops)
    shape = ["--depth=4", "--max-seq-len=512", "--target-minutes=5"]
    plan = plan_of(*shape, *given, vocab_size=4096, machine=machine)
    assert plan.total_batch_tokens == batch_tokens


def test_an_open_budget_has_no_last_step_and_no_warm_down():
    plan = budget()
    assert plan.num_iterations is None
    assert plan.budget_seconds == plan.budget_to_fit(0) == plan.budget_to_fit(10**9) == 600
    assert plan.estimated_seconds(MACHINE) == 600
    assert plan.warmdown_begins is None and plan.last_row() is None
    assert not plan.is_last(10**9)
    assert multipliers(plan, (0, 10**9)) == [1.0, 1.0]


def test_fixing_the_steps_of_a_budget():
    """100 steps, of which 20 are over: the last 50 are the warm-down."""
    plan = budget()
    plan.fix_steps(100, done=20)
    assert (plan.num_iterations, plan.tokens, plan.last_row()) == (100, 204800, 100)
    assert plan.budget_seconds == 600 and plan.budget_to_fit(20) is None
    assert (plan.warmdown_begins, plan.warmdown_steps, plan.fixed_at) == (50, 50, 20)
    assert plan.is_last(100) and not plan.is_last(99)
    assert multipliers(plan, (0, 20, 50, 75, 99)) == [1.0, 1.0, 1.0, 0.5, 0.02]


def decided_at(plan, rate=1.0):
    """The steps before which the length of a budget is decided again, when each decision finds that
    what is left takes `rate` times as many steps."""
    found = []
    step = plan.fixed_at
    while not plan.is_last(step):
        if plan.budget_to_fit(step):
            found.append(step)
            plan.set_steps(step + round(rate * (plan.num_iterations - step)), done=step)
        step += 1
    return found


@pytest.mark.parametrize(
    "given, steps",
    [
        # where the warm-down begins, then after half of what is left
        ([], [50, 75, 88, 94, 97]),
        (["--warmdown-ratio=0.2"], [60, 80, 90, 95, 98]),
        # no warm-down after the length is known: after half of what is left
        (["--warmdown-ratio=0"], [60, 80, 90, 95, 98]),
        (["--warmdown-ratio=0.9"], [60, 80, 90, 95, 98]),
        (["--lr-schedule=cosine"], [60, 80, 90, 95, 98]),
    ],
)
def test_when_the_length_of_a_budget_is_corrected(given, steps):
    plan = budget(*given)
    plan.set_steps(100, done=20)
    assert decided_at(plan) == steps
    assert plan.num_iterations == plan.scheduled_steps == 100


def test_a_run_by_steps_is_never_corrected():
    plan = plan_of("--depth=4", "--num-iterations=100")
    assert [plan.budget_to_fit(step) for step in range(100)] == [None] * 100


@pytest.mark.parametrize("given", [[], ["--final-lr-frac=0.25"], ["--lr-schedule=cosine"]])
@pytest.mark.parametrize("rate", [0.7, 1.3])
def test_a_correction_stretches_what_is_left_of_the_schedule(given, rate):
    """The learning rate has no jump, never rises, and ends where it would have ended."""
    plan = budget(*given)
    plan.set_steps(1000, done=100)
    as_fixed = multipliers(dataclasses.replace(plan), range(1001))
    assert len(decided_at(plan, rate)) > 3 and plan.num_iterations != 1000
    corrected = multipliers(plan, range(plan.num_iterations))
    first = plan.corrections[0][0]
    assert corrected[:first] == as_fixed[:first]
    falls = [before - after for before, after in itertools.pairwise(corrected)]
    assert min(falls) >= 0 and max(falls) < 0.03
    assert plan.lr_multiplier(plan.num_iterations) == pytest.approx(as_fixed[-1], abs=1e-9)
    # at the first correction a new slope begins
    assert plan.lr_multiplier(first) == as_fixed[first]


def test_a_correction_by_hand():
    """100 steps with a warm-down from 50; there 100 more are found to fit, and at 100 only 20."""
    plan = budget()
    plan.set_steps(100, done=20)
    plan.set_steps(150, done=50)
    plan.set_steps(120, done=100)
    assert (plan.num_iterations, plan.tokens, plan.warmdown_begins) == (120, 120 * 2048, 50)
    assert multipliers(plan, (49, 50, 75, 99, 100, 110)) == pytest.approx(
        [1.0, 1.0, 0.75, 0.51, 0.5, 0.25]
    )
    assert plan.is_last(120) and plan.last_row() == 120


def test_a_correction_before_the_warm_down_moves_its_beginning():
    """Of 100 steps the last 20 are the warm-down; at 60, 80 more fit: the last half of them."""
    plan = budget("--warmdown-ratio=0.2")
    plan.set_steps(100, done=20)
    plan.set_steps(140, done=60)
    assert plan.warmdown_begins == 100
    assert plan.checkpoint_due(100, False, -1) == "before_warmdown"
    assert multipliers(plan, (60, 100, 110, 120, 139)) == [1.0, 1.0, 0.75, 0.5, 0.025]
    plan.set_steps(120, done=100)
    assert plan.warmdown_begins == 100
    assert multipliers(plan, (100, 110, 119)) == pytest.approx([1.0, 0.5, 0.05])


def test_a_landing_begins_the_warm_down_at_once():
    """At step 20 of 100, 10 steps of landing: the rate falls from what it is to the last one."""
    plan = plan_of("--depth=4", "--num-iterations=100", "--total-batch-size=2048")
    plan.land(30, done=20)
    assert (plan.num_iterations, plan.tokens, plan.warmdown_begins) == (30, 30 * 2048, 20)
    assert plan.is_last(30) and plan.last_row() == 30
    assert plan.checkpoint_due(20, False, -1) == "before_warmdown"
    assert multipliers(plan, (0, 19, 20, 25, 29)) == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.1])


@pytest.mark.parametrize("given", [[], ["--final-lr-frac=0.25"], ["--lr-schedule=cosine"]])
def test_a_landing_in_the_warm_down_falls_from_the_rate_that_it_has(given):
    plan = plan_of("--depth=4", "--num-iterations=1000", *given)
    begins = plan.warmdown_begins
    before = multipliers(plan, range(801))
    plan.land(840, done=800)
    plan.land(820, done=810)
    landed = multipliers(plan, range(821))
    assert landed[:801] == before
    assert landed[810] == pytest.approx((3 * before[800] + plan.schedule.final_lr_frac) / 4)
    assert landed[820] == plan.schedule.final_lr_frac
    falls = [before - after for before, after in itertools.pairwise(landed[800:])]
    assert min(falls) > 0
    # of a cosine, which has no warm-down, it is where the landing began
    assert plan.warmdown_begins == (800 if begins is None else begins)


def test_a_time_budget_that_is_landed_is_corrected_no_more():
    """Also before its length has been measured; a longer horizon makes it a budget again."""
    plan = budget()
    plan.land(12, done=10)
    assert plan.budget_to_fit(11) is None and plan.num_iterations == 12
    assert multipliers(plan, (9, 10, 11)) == [1.0, 1.0, 0.5]
    again = Plan.from_config({"args": {}, "plan": json.loads(json.dumps(plan.as_dict()))})
    assert multipliers(again, range(12)) == multipliers(plan, range(12))
    again.fix_steps(100)
    assert multipliers(again, (11, 50, 75)) == [1.0, 1.0, 0.5]


def test_a_fork_lands_in_a_share_of_its_steps():
    """Whatever its parent decided later."""
    plan = budget()
    plan.set_steps(400, done=20)
    plan.set_steps(420, done=210)
    plan.set_steps(440, done=320)
    plan.land(410, done=390)
    plan.land_fork(300)
    assert (plan.landings, plan.corrections) == ([[300, 345]], [[210, 420]])
    assert plan.num_iterations == 345 and plan.lr_multiplier(345) == 0
    with pytest.raises(UsageError, match="--land: the run ends at step 345 anyway"):
        plan.land_fork(310)


def test_how_many_steps_a_landing_has():
    """15% of the training time, or the minutes that are given, at the latest rate."""
    now = [0.0]
    clock = Clock(now=lambda: now[0])
    state = TrainState(step=100, training_seconds=400.0)
    assert steps_to_land(clock, state, None) is None
    for number in range(8):
        with clock.step(number):
            now[0] += 2.0
    assert steps_to_land(clock, state, None) == 30
    assert steps_to_land(clock, state, 0.5) == 15
    assert steps_to_land(clock, state, 1e-9) == 1


def test_the_warm_down_does_not_begin_in_the_past():
    plan = budget()
    plan.fix_steps(30, done=20)
    assert (plan.warmdown_begins, plan.warmdown_steps) == (20, 10)
    assert multipliers(plan, (19, 20, 21)) == [1.0, 1.0, 0.9]


def test_a_warm_up_that_is_over_does_not_begin_again():
    """4 steps of warm-up by the estimate of 40 steps; 10 by the 100 that are measured."""
    plan = budget("--warmup-ratio=0.1")
    plan.fix_steps(100, done=20)
    assert plan.warmup_steps == plan.warmup_before == 4
    assert multipliers(plan, (0, 3, 4, 20)) == [1 / 5, 4 / 5, 1.0, 1.0]


def test_a_warm_up_in_progress_is_stretched():
    """The steps before keep the learning rates that they had, for a run that resumes from there."""
    plan = budget("--warmup-ratio=0.1")
    plan.fix_steps(100, done=2)
    assert (plan.warmup_steps, plan.warmup_before, plan.fixed_at) == (10, 4, 2)
    assert multipliers(plan, (0, 1, 2, 9, 10)) == [1 / 5, 2 / 5, 3 / 11, 10 / 11, 1.0]


def test_a_cosine_begins_when_the_budget_is_fixed():
    plan = budget("--lr-schedule=cosine")
    assert multipliers(plan, (0, 50)) == [1.0, 1.0]
    plan.fix_steps(100, done=20)
    assert (plan.warmdown_steps, plan.warmdown_begins) == (0, None)
    assert multipliers(plan, (0, 19, 50)) == pytest.approx([1.0, 1.0, 0.5])


# ---- config.json ----


def test_round_trip_through_config_json():
    plan = budget("--warmup-ratio=0.1", "--final-lr-frac=0.25")
    plan.fix_steps(100, done=2)
    plan.set_steps(110, done=50)
    values = json.loads(json.dumps(plan.as_dict()))
    assert Plan.from_config({"args": {}, "plan": values}) == plan


@pytest.mark.parametrize(
    "given, schedule",
    [
        ([], Schedule("trapezoid", 0.0, -1, 0.5, 0.0)),
        (["--warmdown-ratio=0.2", "--warmup-ratio=0.1"], Schedule("trapezoid", 0.1, -1, 0.2, 0.0)),
        (["--final-lr-frac=0.1"], Schedule("trapezoid", 0.0, -1, 0.5, 0.1)),
    ],
)
def test_a_config_json_of_an_earlier_version(given, schedule):
    """It lacks the schedule and the horizon's value in its plan, and flags that came later."""
    given = ["--depth=4", "--target-epochs=3", *given]
    plan = plan_of(*given)
    args = vars(flags.parse(given))
    later = ("given", "lr_schedule", "warmup_steps", "patience")
    old_args = {name: value for name, value in args.items() if name not in later}
    missing = (
        "schedule",
        "horizon_value",
        "fixed_at",
        "warmup_before",
        "scheduled_steps",
        "corrections",
    )
    values = {name: value for name, value in plan.as_dict().items() if name not in missing}
    found = Plan.from_config({"args": old_args, "plan": values})
    assert found == plan
    assert found.schedule == schedule and found.horizon_value == 3


# ---- what is due at a step ----


@pytest.mark.parametrize(
    "step, last, every, kind",
    [
        (0, False, -1, ""),
        (0, False, 3, ""),
        (3, False, -1, ""),
        (3, False, 3, "permanent"),
        (4, False, 3, ""),
        # the warm-down begins there
        (6, False, -1, "before_warmdown"),
        (6, False, 3, "before_warmdown"),
        (9, False, 3, "permanent"),
        (12, True, -1, "final"),
        (12, True, 3, "final"),
        # an early end
        (6, True, 3, "final"),
    ],
)
def test_checkpoints_of_12_steps(step, last, every, kind):
    plan = plan_of("--depth=4", "--num-iterations=12")
    assert plan.warmdown_begins == 6
    assert plan.checkpoint_due(step, last, every) == kind


def test_checkpoints_at_given_steps():
    plan = plan_of("--depth=4", "--num-iterations=12")
    kinds = [plan.checkpoint_due(step, step == 12, 5, {3, 6}) for step in (2, 3, 5, 6, 12)]
    assert kinds == ["", "permanent", "permanent", "before_warmdown", "final"]


@pytest.mark.parametrize(
    "given", [["--num-iterations=12", "--warmdown-ratio=0"], ["--target-minutes=1"]]
)
def test_without_a_warm_down_there_is_no_checkpoint_before_it(given):
    plan = plan_of("--depth=4", *given)
    assert [plan.checkpoint_due(step, False, -1) for step in range(12)] == [""] * 12


@pytest.mark.parametrize(
    "every, step, last, is_due",
    [
        (5, 0, False, False),
        (5, 4, False, False),
        (5, 5, False, True),
        (5, 10, False, True),
        (5, 12, True, True),
        (5, 0, True, False),
        (-1, 5, False, False),
        (-1, 12, True, False),
    ],
)
def test_what_happens_every_so_many_steps(every, step, last, is_due):
    assert due(every, step, last) is is_due


@pytest.mark.parametrize(
    "stop_at, patience, bpb, stale, reason",
    [
        (-1, -1, 0.5, 99, ""),
        (1.5, -1, 1.6, 0, ""),
        (1.5, -1, 1.5, 0, "val/bpb 1.5000 reached --stop-at-bpb=1.5"),
        (1.5, 3, 1.25, 3, "val/bpb 1.2500 reached --stop-at-bpb=1.5"),
        (-1, 3, 2.0, 2, ""),
        (-1, 3, 2.0, 3, "3 evaluations without improvement (--patience)"),
        (-1, 3, 2.0, 4, "3 evaluations without improvement (--patience)"),
        (1.5, 1, float("nan"), 0, ""),
    ],
)
def test_early_ends(stop_at, patience, bpb, stale, reason):
    assert early_end(stop_at, patience, bpb, stale) == reason
