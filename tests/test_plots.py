"""What pictures are made of: curves, colours, ranges, labels, ticks."""

import math

import numpy as np
import pytest

from nanochat.run import plots

LOOK = plots.Look("black", "-")


def test_points_are_the_last_finite_values_in_order():
    lines = [
        {"step": 2, "a": 5.0},
        {"step": 0, "a": 1.0},
        {"step": 1, "a": None},
        {"step": 2, "a": 7.0},
        {"step": 3, "a": True},
        {"step": 4, "a": math.inf},
        {"a": 3.0},
    ]
    x, y = plots.points(lines, "a")
    assert x.tolist() == [0, 2] and y.tolist() == [1, 7]


def test_smoothed_curves():
    assert plots.smoothed(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    # 41 steps wide; at the start as many as there are on both sides, at the end those before it
    straight = np.arange(1000.0)
    smooth = plots.smoothed(straight)
    assert smooth[:-20] == pytest.approx(straight[:-20]) and smooth[-1] == pytest.approx(989)
    impulse = np.zeros(1000)
    impulse[500] = 41
    assert plots.smoothed(impulse)[479:522].tolist() == [0.0] + [1.0] * 41 + [0.0]


def test_a_mean_is_over_what_all_curves_reach():
    first = (np.array([0.0, 10, 20]), np.array([0.0, 10, 20]))
    second = (np.array([5.0, 15]), np.array([7.0, 17]))
    x, mean, sd = plots.mean_of([first, second])
    assert x.tolist() == [5, 10, 15] and mean.tolist() == [6, 11, 16]
    assert sd == pytest.approx(np.full(3, math.sqrt(2)))
    empty = (np.empty(0), np.empty(0))
    _, mean, sd = plots.mean_of([(np.array([1.0]), np.array([2.0])), empty])
    assert mean.tolist() == [2] and sd is None
    assert len(plots.mean_of([empty])[0]) == 0


def test_up_to_twelve_curves_differ_in_colour_or_dash():
    looks, scale = plots.looks_of([4] * 12)
    assert scale is None and len(set(looks)) == 12


def test_more_curves_are_coloured_by_depth_or_order():
    looks, scale = plots.looks_of([2, 2, *range(3, 15)])
    assert scale == plots.ColorScale("depth", 2, 14)
    assert looks[0] == looks[1] != looks[2] and len({look.color for look in looks}) == 13
    _, scale = plots.looks_of([4] * 14)
    assert scale == plots.ColorScale("run, in the order of the table", 1, 14)


def test_ticks_of_logarithmic_axes():
    values = (0.1, 50.0, 1000.0, 2e15, 1e17, 1e-5)
    shown = [plots.short_number(value) for value in values]
    assert shown == ["0.1", "50", "1000", "2e15", "1e17", "1e-5"]


def test_the_first_steps_do_not_set_the_range():
    x = np.arange(1000.0)
    low, high = plots.range_of([plots.Curve(x, 2 + 98 * np.exp(-x / 10), None, LOOK)])
    assert 1.9 < low < 2 and high < 2.2
    # few points all count, with their bands
    few = plots.Curve(np.array([50.0, 100]), np.array([1.8, 1.6]), np.array([0.1, 0.1]), LOOK)
    low, high = plots.range_of([few])
    assert low < 1.5 and high > 1.9
    assert plots.range_of([plots.Curve(np.empty(0), np.empty(0), None, LOOK)]) is None


def test_labels_do_not_overlap():
    assert plots.apart([0.5, 0.1], 0.2) == [0.5, 0.1]
    places = plots.apart([0.97, 0.5, 0.51, 0.99, 0.52], 0.1)
    assert sorted(places) == pytest.approx([places[1], places[2], places[4], places[0], places[3]])
    assert min(np.diff(sorted(places))) >= 0.1 - 1e-12 and max(places) <= 1
    assert max(plots.apart([0.5] * 40, 0.1)) <= 1 and plots.apart([], 0.1) == []
