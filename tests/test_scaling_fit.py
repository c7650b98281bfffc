"""The laws of `nanochat sweep scaling_laws`: recovered from made-up losses, honest about noise."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanochat.apps.sweep import scaling_fit, scaling_picture
from nanochat.apps.sweep.facts import Facts
from nanochat.apps.sweep.predictions import Outcome, Prediction
from nanochat.apps.sweep.scaling_fit import Point, best_budget, fit_points, in_words, predict
from nanochat.common import UsageError
from nanochat.run import plots

BUDGETS = [1e16, 4e16, 1.6e17, 6.4e17]


def surface(budgets, noise=0.0, seed=0, floor=0.6, span=1.5, shift=0.3, depths=4):
    """Points on parabolas around N_opt = 0.1 C^0.48, with loss floor + 500 C^-0.2 there, and
    D = C / 6N."""
    generator = np.random.default_rng(seed)
    points = []
    for flops in budgets:
        for x in np.linspace(-span, span, depths) + shift:
            n = 0.1 * flops**0.48 * math.exp(x)
            loss = floor + 500 * flops**-0.2 + 0.05 * x**2 + noise * generator.standard_normal()
            points.append(Point(f"{flops:g}", flops, n, flops / (6 * n), loss))
    return points


def test_laws_are_recovered_without_noise():
    fit, _ = fit_points(surface(BUDGETS, noise=1e-9))
    assert fit.N_opt.exponent == pytest.approx(0.48, abs=1e-5)
    assert fit.N_opt.factor == pytest.approx(0.1, rel=1e-3)
    assert fit.D_opt.exponent == pytest.approx(0.52, abs=1e-5)
    assert fit.D_opt.factor == pytest.approx(1 / 0.6, rel=1e-3)
    ratio = 1 / 0.06 * np.exp(np.mean(np.log(BUDGETS)) * 0.04)
    assert fit.ratio.tokens_per_parameter == pytest.approx(ratio, rel=1e-4)
    law = fit.loss
    assert law.form == "E + A C^-gamma"
    assert law.gamma == pytest.approx(0.2, rel=0.005)
    assert pytest.approx(0.6, abs=1e-3) == law.E
    assert pytest.approx(500, rel=0.05) == law.A
    assert float(law.at(1e17)) == pytest.approx(0.6 + 500 * 1e17**-0.2, abs=1e-4)
    assert float(fit.N_opt.at(1e18)) == pytest.approx(0.1 * 1e18**0.48, rel=1e-3)
    assert best_budget(fit, 0.1 * 3e17**0.48) == pytest.approx(3e17, rel=1e-2)


def test_minima_of_a_surface_that_is_not_a_parabola():
    """E + A / N^0.34 + B / D^0.30, whose N_opt goes with C^(0.30 / 0.64)."""
    points = []
    for c in BUDGETS:
        for n in np.geomspace(3e6, 1.2e8, 6):
            d = c / (6 * n)
            points.append(Point(f"{c:g}", c, n, d, 0.6 + 30 * n**-0.34 + 60 * d**-0.3))
    fit, _ = fit_points(points)
    assert fit.N_opt.exponent == pytest.approx(0.30 / 0.64, abs=0.03)
    assert fit.D_opt.exponent == pytest.approx(0.34 / 0.64, abs=0.03)
    assert pytest.approx(0.6, abs=0.1) == fit.loss.E


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    """Of 60 noisy sweeps about 95% have the truth inside."""
    monkeypatch.setattr(scaling_fit, "DRAWS", 500)
    inside = {"alpha": 0, "beta": 0, "ratio": 0, "prediction": 0}
    generator = np.random.default_rng(7)
    flops = 2.5e18
    ratio = np.exp(np.mean(np.log(BUDGETS)) * 0.04) / 0.06
    for seed in range(60):
        fit, draws = fit_points(surface(BUDGETS, noise=0.003, seed=seed, depths=5))
        expected = predict(fit, draws, flops, 0.1 * flops**0.48)
        truth = 0.6 + 500 * flops**-0.2 + 0.003 * generator.standard_normal()
        for name, (low, high), value in (
            ("alpha", fit.N_opt.exponent_95, 0.48),
            ("beta", fit.D_opt.exponent_95, 0.52),
            ("ratio", fit.ratio.interval_95, ratio),
            ("prediction", expected.interval_95, truth),
        ):
            inside[name] += low <= value <= high
    assert all(count >= 50 for count in inside.values()), inside
    # neither of them says nothing
    low, high = fit.N_opt.exponent_95
    assert 0.005 < high - low < 0.2


def test_the_same_runs_give_the_same_intervals():
    first, second = (fit_points(surface(BUDGETS, noise=0.003))[0] for _ in range(2))
    assert first == second
    json.dumps(first.as_json(), allow_nan=False)


def test_a_minimum_outside_the_depths_is_left_out_and_reported():
    points = surface(BUDGETS, noise=1e-6)
    points += surface([2.56e18], noise=1e-6, shift=-2.5) + surface([2.5e15], noise=1e-6, shift=2.5)
    fit, _ = fit_points(points)
    without = [budget.budget for budget in fit.budgets if budget.N_opt is None]
    assert without == ["2.5e+15", "2.56e+18"]
    shown = in_words(fit)
    for budget, more in (("2.56e+18", "deeper"), ("2.5e+15", "shallower")):
        why = "is left out: the minimum is NOT inside the range of depths"
        assert f"budget {budget} {why}" in shown and f"add {more} models" in shown
    assert fit.N_opt.exponent == pytest.approx(0.48, abs=1e-3)


def test_too_few_minima_give_no_law():
    fit, draws = fit_points(surface(BUDGETS[:1]) + surface(BUDGETS[1:], span=0.5, shift=2))
    assert draws is None and fit.N_opt is None
    assert "no power laws: 1 budgets" in in_words(fit)
    with pytest.raises(UsageError, match="1 budgets"):
        predict(fit, draws, 1e18, 1e6)
    # numbers that do not exist are left out of the file
    assert {"curvature", "ln_flops_center"} & set(fit.as_json()) == set()


def test_budgets_with_two_runs_or_a_hill_have_no_minimum():
    hill = [replace(point, loss=-point.loss) for point in surface([1e15])]
    fit, _ = fit_points(surface(BUDGETS, noise=1e-6) + surface([1e19])[:2] + hill)
    reasons = {budget.budget: budget.left_out for budget in fit.budgets if budget.left_out}
    assert "2 completed runs" in reasons["1e+19"] and "opens downwards" in reasons["1e+15"]
    assert len(reasons) == 2


def test_three_depths_a_budget_have_no_interval():
    fit, draws = fit_points(surface(BUDGETS, depths=3))
    assert draws is None and fit.noise is None
    assert fit.N_opt.exponent == pytest.approx(0.48, abs=1e-6)
    assert "give four depths" in fit.intervals
    assert predict(fit, None, 1e18, 0.1 * 1e18**0.48).interval_95 is None


@pytest.mark.parametrize(
    "points, why",
    [
        (surface(BUDGETS[:3], noise=1e-4), "3 budgets"),
        (surface(BUDGETS, noise=0.02, span=2.5, seed=3), "down to 0"),
        (surface(BUDGETS, noise=1e-4, floor=0), "down to 0"),
    ],
    ids=["three_budgets", "noise", "no_floor"],
)
def test_a_floor_that_cannot_be_determined_is_not_claimed(points, why):
    fit, _ = fit_points(points)
    law = fit.loss
    assert law.E is None and law.form == "A C^-gamma" and why in law.why_line
    assert law.why_line in in_words(fit)
    if why == "down to 0" and fit.noise < 0.001:
        assert law.gamma == pytest.approx(0.2, abs=0.005)
        assert law.gamma_95[0] < 0.2 < law.gamma_95[1]


def test_predictions_reach_as_far_as_the_floor_that_is_not_known():
    """Losses that flatten out, with too much noise to tell E: the truth beyond the budgets is above
    the line of ln L against ln C."""
    flops = 4 * BUDGETS[-1]
    best = 0.1 * flops**0.48
    inside = claimed = 0
    for seed in range(40):
        fit, draws = fit_points(surface(BUDGETS, noise=0.01, seed=seed, depths=6))
        claimed += fit.loss.E is not None
        low, high = predict(fit, draws, flops, best).interval_95
        inside += low <= 0.6 + 500 * flops**-0.2 <= high
    assert claimed <= 20 and inside >= 36


def test_a_model_beside_the_optimum_is_predicted_worse():
    fit, draws = fit_points(surface(BUDGETS, noise=1e-5))
    best = 0.1 * 1e18**0.48
    at_best, beside = (predict(fit, draws, 1e18, n) for n in (best, 2 * best))
    worse = beside.val_bpb - at_best.val_bpb
    assert worse == pytest.approx(0.05 * math.log(2) ** 2, rel=0.02)
    assert beside.interval_95[0] < beside.val_bpb < beside.interval_95[1]


def test_flat_noisy_losses_stay_numbers():
    points = surface(BUDGETS, noise=0.2, span=0.3, shift=0, seed=5)
    fit, _ = fit_points(points + surface([1e18, 2e18], noise=0.01))
    json.dumps(fit.as_json(), allow_nan=False)
    in_words(fit)


def outcomes(fit, draws):
    """A prediction before its run and after it."""
    expected = predict(fit, draws, 2e18, 0.1 * 2e18**0.48)
    prediction = Prediction(9, 2e18, expected.val_bpb, expected.interval_95, {})
    done = Facts(status="completed", val_bpb=0.7)
    return [Outcome(prediction, Path("d9"), facts) for facts in (Facts(), done)]


def test_pictures(tmp_path):
    fit, draws = fit_points(surface(BUDGETS, noise=0.003) + surface([2e18], span=0.5, shift=-2))
    without_law, _ = fit_points(surface(BUDGETS, span=0.5, shift=2))
    for name, found, predictions in (
        ("a.png", fit, outcomes(fit, draws)),
        ("b.png", without_law, []),
    ):
        scaling_picture.draw_picture(found, predictions, tmp_path / name)
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 2


def test_ticks_are_plain_numbers():
    fit, draws = fit_points(surface(BUDGETS, noise=0.003))
    shown = []

    def draw(figure):
        scaling_picture.draw_laws(figure, fit, outcomes(fit, draws))
        figure.canvas.draw()
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            shown.extend(label.get_text() for label in axis.get_ticklabels(which="both"))

    plots.png(draw, 16, 6)
    assert "$" not in "".join(shown)
    assert {"1e17", "2e17"} & set(shown) and {"10M", "100M"} & set(shown)
