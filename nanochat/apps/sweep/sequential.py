"""The test of `nanochat sweep try`: is a change better than the baseline? Decided after as few
pairs of runs as possible. Imports no torch.

A pair is a run of the baseline and one of the change with the same seed, and its gain is positive
where the change is better. After each pair from the third on, Student's t for paired differences
asks two questions: is the mean gain above what is kept, and is it below what was looked for? The
answer to either ends the trial.

Who looks again after each pair is wrong more often than at one look (Armitage, McPherson and Rowe,
J. R. Stat. Soc. A 132, 1969). As in Pocock's group-sequential tests (Biometrika 64, 1977) every
look has the same, smaller level. It is the error of the trial divided by the number of looks: then
the trial as a whole cannot err more often (Boole's inequality), however the looks depend on each
other, and no table is needed.

The spread of a few pairs may be small by chance. So a gain must also exceed the noise floor, which
does not depend on them: the mean gain that as many pairs of unchanged runs would exceed in one of
ten trials, if their seeds differed. It is a second lock, so it need not be as tight as the first: a
tighter one would make the trial wait for what a common seed has already cancelled."""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.run.statistics import student_quantile

# two differences hardly show their spread
FIRST_LOOK = 3
# of a trial, on each side
ERROR = 0.05
# share of A/A trials that stays below the noise floor
FLOOR_CONFIDENCE = 0.9

KEEP = "keep"
REJECT = "reject"
UNDECIDED = "undecided"

# the same few values in every trial
quantile = functools.lru_cache(maxsize=None)(student_quantile)


@dataclass(frozen=True)
class Design:
    """What is fixed before the first run.

    pairs: the most that are trained. gain: the one looked for. min_gain, smaller than gain: what a
    change has to exceed. Both in the unit of the gains."""

    pairs: int
    gain: float
    min_gain: float = 0.0

    @property
    def first_look(self) -> int:
        """Pairs at the first look."""
        return min(FIRST_LOOK, self.pairs)

    @property
    def level(self) -> float:
        """The one-sided error of each look."""
        return ERROR / (self.pairs - self.first_look + 1)


@dataclass(frozen=True)
class Noise:
    """How much runs differ that differ in nothing but the seed.

    sd: standard deviation of the gain of a pair of them. runs: from how many runs it was estimated;
    None if it was given as known."""

    sd: float
    runs: int | None

    def floor(self, pairs: int) -> float:
        """The mean gain that so many pairs of unchanged runs exceed in one of ten trials."""
        # known exactly; otherwise a few runs know their own spread badly
        if self.runs is None:
            reach = statistics.NormalDist().inv_cdf(FLOOR_CONFIDENCE)
        else:
            reach = quantile(FLOOR_CONFIDENCE, self.runs - 1)
        return reach * self.sd / math.sqrt(pairs)


def noise_of_runs(values: Sequence[float], relative: bool) -> Noise:
    """The Noise of two or more results of the baseline with different seeds.

    relative: gains are shares of the baseline's result. The two runs of a pair are taken for
    independent, the worst case: those of a trial share a seed, and mostly vary together."""
    sd = math.sqrt(2) * statistics.stdev(values)
    if relative:
        sd /= statistics.fmean(values)
    return Noise(sd, len(values))


@dataclass(frozen=True)
class Look:
    """What n pairs show. Everything is in the unit of the gains.

    mean, sd: of the gains; low, high: bounds of the mean at the level of a look, so that all looks
    of a trial hold together with a probability of 1 - 2 ERROR. sd, low and high are None before the
    first look, floor with a single pair. verdict: "" if another pair is needed."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    floor: float | None
    verdict: str


def look(gains: Sequence[float], design: Design, noise: Noise | None) -> Look:
    """Judge the gains of the pairs so far, one at least. noise: None if it is not known yet."""
    n = len(gains)
    mean = math.fsum(gains) / n
    floor = noise.floor(n) if noise else None
    if n < design.first_look or noise is None:
        return Look(n, mean, None, None, None, floor, "")
    # of the differences, which is smaller than that of the runs where a seed moves both alike
    sd = math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (n - 1))
    reach = quantile(1 - design.level, n - 1) * sd / math.sqrt(n)
    low, high = mean - reach, mean + reach
    verdict = ""
    # both may hold of a gain between min_gain and gain: it is real, and so it is kept
    if low > design.min_gain and mean >= floor:
        verdict = KEEP
    elif high < design.gain:
        verdict = REJECT
    elif n >= design.pairs:
        verdict = UNDECIDED
    return Look(n, mean, sd, low, high, floor, verdict)
