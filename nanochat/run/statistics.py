"""Means with their spread, and intervals for differences between groups of runs.

A number of one run says little: another seed gives another number. What decides is the spread over
seeds, and with two or three seeds that spread is itself badly known, which is why Student's t and
not the normal distribution gives the intervals. Imports no torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (with n - 1) of n numbers; None where n is too small for one."""

    mean: float | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class MeanDifference:
    """Mean of the second group minus mean of the first, its interval, and the degrees of freedom.

    df is None where neither group has any spread: then the interval is the difference itself."""

    difference: float
    low: float
    high: float
    df: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of any number of values, none included."""
    return Spread(
        mean=statistics.fmean(values) if values else None,
        sd=statistics.stdev(values) if len(values) > 1 else None,
        n=len(values),
    )


def student_quantile(p: float, df: float) -> float:
    """The p-quantile (0.5 <= p < 1) of Student's t with df >= 1 degrees of freedom, whole or not.

    With t = sqrt(df) tan(a), the probability of 0..t is an integral of cos^(df-1) over 0..a;
    Simpson's rule gives it to 1e-9, and bisection inverts it."""
    # only some of what imports this module needs quantiles, and numpy slows down the start
    import numpy as np

    # by lgamma, since gamma itself overflows from df = 343 on
    factor = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    # an odd number of points, as Simpson's rule needs
    weights = np.ones(2001)
    weights[1:-1:2] = 4
    weights[2:-1:2] = 2

    def probability(angle: float) -> float:
        at = np.linspace(0, angle, 2001)
        return factor * float(weights @ np.cos(at) ** (df - 1)) * angle / 2000 / 3

    # an angle below pi/2 stands for any t, so the search is bounded
    low = 0.0
    high = math.pi / 2
    # 60 halvings of pi/2 are finer than a float can tell apart
    for _ in range(60):
        middle = (low + high) / 2
        if probability(middle) < p - 0.5:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


def two_sided_quantile(df: float, confidence: float = CONFIDENCE) -> float:
    """How many standard errors a two-sided interval of this confidence reaches each way."""
    return student_quantile((1 + confidence) / 2, df)


def welch(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> MeanDifference:
    """mean(second) - mean(first) by Welch's t-test (Biometrika 34, 1947).

    The groups may have different spreads and sizes; each needs at least two numbers."""
    spread_first = statistics.variance(first) / len(first)
    spread_second = statistics.variance(second) / len(second)
    difference = statistics.fmean(second) - statistics.fmean(first)
    squared = spread_first + spread_second
    # equal numbers: df would be 0/0
    if squared == 0:
        return MeanDifference(difference, difference, difference, None)
    df = squared**2 / (spread_first**2 / (len(first) - 1) + spread_second**2 / (len(second) - 1))
    reach = two_sided_quantile(df, confidence) * math.sqrt(squared)
    return MeanDifference(difference, difference - reach, difference + reach, df)


def joint_confidence(n: int) -> float:
    """Confidence of each of n intervals so that all of them hold together with CONFIDENCE.

    Bonferroni's correction. Without it the best of many equal runs, picked by the same numbers,
    would often seem to be better than the noise."""
    return 1 - (1 - CONFIDENCE) / max(1, n)
