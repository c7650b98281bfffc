"""Spreads, Student's t and Welch's test, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from nanochat.run.statistics import (
    MeanDifference,
    Spread,
    joint_confidence,
    spread,
    student_quantile,
    two_sided_quantile,
    welch,
)


def test_spreads_of_any_number_of_values():
    assert spread([1.0, 1.2, 1.4]) == Spread(pytest.approx(1.2), pytest.approx(0.2), 3)
    assert spread([0.5]) == Spread(0.5, None, 1)
    assert spread([]) == Spread(None, None, 0)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.995])
def test_student_quantiles_have_closed_forms(p):
    """For 1, 2 and 4 degrees of freedom."""
    one = math.tan(math.pi * (p - 0.5))
    assert student_quantile(p, 1) == pytest.approx(one, rel=1e-6)
    two = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    assert student_quantile(p, 2) == pytest.approx(two, rel=1e-6)
    root = math.sqrt(p * (1 - p))
    x = math.cos(math.acos(2 * root) / 3) / (2 * root)
    assert student_quantile(p, 4) == pytest.approx(2 * math.sqrt(x - 1), rel=1e-6)


def test_student_quantiles_of_many_and_of_broken_degrees_of_freedom():
    normal = 1.959964 * (1 + (1.959964**2 + 1) / 4e5)
    assert student_quantile(0.975, 1e5) == pytest.approx(normal, rel=1e-5)
    # between 4.3027 and 3.1824
    assert student_quantile(0.975, 2.5) == pytest.approx(3.5582, abs=0.02)
    assert two_sided_quantile(2) == student_quantile(0.975, 2) == pytest.approx(4.302653, rel=1e-6)


def test_welch_by_hand():
    """Variances 4e-4 and 1e-4 of three each: s^2 = 5e-4 / 3, df = 25 / (16/2 + 1/2) = 50 / 17."""
    found = welch([1.50, 1.52, 1.54], [1.40, 1.41, 1.42])
    df = 50 / 17
    assert found.difference == pytest.approx(-0.11)
    assert found.df == pytest.approx(df)
    assert (found.high + found.low) / 2 == pytest.approx(-0.11)
    # the density of Student's t, summed: 95% of it lies within the interval
    t = (found.high - found.low) / 2 / math.sqrt(5e-4 / 3)
    at = np.linspace(-t, t, 200_001)
    factor = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    density = factor * (1 + at**2 / df) ** (-(df + 1) / 2)
    assert float(density[:-1].sum() * (at[1] - at[0])) == pytest.approx(0.95, abs=1e-5)


def test_welch_without_any_spread():
    assert welch([1.0, 1.0], [2.0, 2.0]) == MeanDifference(1.0, 1.0, 1.0, None)


def test_several_intervals_hold_together():
    assert [joint_confidence(n) for n in (0, 1, 6)] == pytest.approx([0.95, 0.95, 1 - 0.05 / 6])
