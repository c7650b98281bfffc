"""Scaling laws from runs of equal FLOPs: parabolas of the loss against ln N, and power laws.

C: training FLOPs. N: parameters of the matrices and the head. D: training tokens. The minimum of
each budget's parabola is its best N; power laws go through the minima. This is approach 2 of
arXiv 2203.15556.

Intervals are 95% and come from a parametric bootstrap: DRAWS times (seed SEED) every run gets
normal noise of the size that the parabolas leave over, pooled over the budgets, that size itself
drawn by its chi-square (so that few runs give wide intervals), and everything is fitted again. They
know nothing of what is wrong in the same way everywhere, such as badly tuned rates."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nanochat.common import UsageError
from nanochat.run.tables import aligned, fixed, short

# beyond each end of a 95% interval lie 100 of these
DRAWS = 4000
# fixed, so that the same runs always give the same intervals
SEED = 1
# exponents of the loss that are tried first
GAMMAS = np.geomspace(0.005, 2.0, 80)
# runs of a budget for a parabola; one more leaves noise to measure
MIN_RUNS = 3
# budgets that can tell the floor of the loss from its exponent
MIN_BUDGETS_OF_FLOOR = 4

Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One completed run. budget: its label; loss: val_bpb."""

    budget: str
    flops: float
    N: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Budget:
    """The parabola of one budget, as in results.json.

    N and loss: of its runs. coefficients: of 1, ln N - center and its square; None without a
    parabola. left_out: why it takes no part in the power laws, "" if it does; then N_opt, D_opt,
    ratio (D/N) and val_bpb are those of the minimum, and the names in _95 their intervals, None
    where the noise is unknown."""

    budget: str
    flops: float
    left_out: str
    N: list[float]
    loss: list[float]
    center: float | None
    coefficients: list[float] | None
    N_opt: float | None = None
    D_opt: float | None = None
    ratio: float | None = None
    val_bpb: float | None = None
    N_opt_95: Interval | None = None
    D_opt_95: Interval | None = None
    ratio_95: Interval | None = None
    val_bpb_95: Interval | None = None


@dataclass(frozen=True)
class PowerLaw:
    """factor C^exponent, with intervals where the noise is known."""

    exponent: float
    factor: float
    exponent_95: Interval | None = None
    factor_95: Interval | None = None

    def at(self, flops: Any) -> Any:
        """The law's value for a budget, or for an array of them."""
        return self.factor * np.asarray(flops, dtype=float) ** self.exponent

    def as_json(self) -> dict[str, Any]:
        """The law in results.json, without the intervals that do not exist."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Ratio:
    """D/N at the optimum. what: the mean that it is."""

    tokens_per_parameter: float
    what: str
    interval_95: Interval | None


@dataclass(frozen=True)
class LossLaw:
    """E + A C^-gamma, the loss at the optimum. E is None, for 0, where the runs do not determine
    it, which why_line says."""

    form: str
    E: float | None
    E_95: Interval | None
    A: float
    gamma: float
    gamma_95: Interval | None
    why_line: str

    def at(self, flops: Any) -> Any:
        """The expected loss for a budget, or for an array of them."""
        return (self.E or 0.0) + self.A * np.asarray(flops, dtype=float) ** -self.gamma


@dataclass(frozen=True)
class Fit:
    """All that the runs say.

    noise: standard deviation of a run around its parabola, with degrees_of_freedom, None if it
    cannot be measured. intervals: how they were computed, or why there are none. why_not: why there
    are no power laws, "" if there are; without them all of the laws are None. curvature: mean
    coefficient of the square. ln_flops_center: where the power laws' two numbers are
    independent."""

    budgets: list[Budget]
    noise: float | None
    degrees_of_freedom: int
    N_opt: PowerLaw | None
    D_opt: PowerLaw | None
    ratio: Ratio | None
    loss: LossLaw | None
    intervals: str
    why_not: str
    draws_without_minimum: float | None = None
    curvature: float | None = None
    ln_flops_center: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The fit in results.json."""
        found = asdict(self)
        for name in ("N_opt", "D_opt"):
            law = getattr(self, name)
            found[name] = None if law is None else law.as_json()
        for name in ("draws_without_minimum", "curvature", "ln_flops_center"):
            if found[name] is None:
                del found[name]
        return found


@dataclass(frozen=True)
class FitDraws:
    """What predict() needs of the bootstrap; (draws,) arrays.

    n_line: slopes, and levels at ln_flops_center, of ln N_opt. loss: floors, factors and gammas of
    the loss law, with C over its geometric mean. curvature: mean over the budgets. noise: of a
    run. normal: standard normal draws."""

    n_line: tuple[np.ndarray, np.ndarray]
    loss: tuple[np.ndarray, np.ndarray, np.ndarray]
    curvature: np.ndarray
    noise: np.ndarray
    normal: np.ndarray


@dataclass(frozen=True)
class Expected:
    """A prediction for one run; interval_95 is None where the noise is unknown."""

    val_bpb: float
    interval_95: Interval | None


# ---- the fit ----


@dataclass(frozen=True)
class _Curve:
    """A parabola through n runs. x: ln N - center. solve: (3, n), what gives the coefficients of
    losses. ln_tokens: polynomial of ln D in x."""

    x: np.ndarray
    center: float
    solve: np.ndarray
    fitted: np.ndarray
    coefficients: np.ndarray
    ln_tokens: np.ndarray

    def minima(self, coefficients: np.ndarray) -> np.ndarray:
        """(..., 3) values ln N, ln D and loss at the minimum of (..., 3) coefficients."""
        level, slope, curvature = np.moveaxis(coefficients, -1, 0)
        # where the derivative, slope + 2 curvature x, is 0
        x = -slope / (2 * curvature)
        return np.stack(
            [
                x + self.center,
                np.polyval(self.ln_tokens, x),
                level - slope**2 / (4 * curvature),
            ],
            axis=-1,
        )


@dataclass(frozen=True)
class _Parabola:
    """A budget with its curve and minimum (ln N, ln D, loss), as far as they exist."""

    label: str
    flops: float
    N: np.ndarray
    loss: np.ndarray
    curve: _Curve | None
    minimum: np.ndarray | None
    left_out: str

    @property
    def residuals(self) -> np.ndarray:
        """What the curve leaves over of the losses."""
        return self.loss - self.curve.fitted

    def as_budget(self, minima: np.ndarray | None) -> Budget:
        """The public form. minima: (draws, 3), or None."""
        curve = self.curve
        shown = {
            "budget": self.label,
            "flops": self.flops,
            "left_out": self.left_out,
            "N": self.N.tolist(),
            "loss": self.loss.tolist(),
            "center": None if curve is None else curve.center,
            "coefficients": None if curve is None else curve.coefficients.tolist(),
        }
        if self.minimum is None or self.left_out:
            return Budget(**shown)
        ln_n, ln_d, loss = (float(value) for value in self.minimum)
        intervals = {}
        if minima is not None:
            intervals = {
                "N_opt_95": _interval(_exp(minima[:, 0])),
                "D_opt_95": _interval(_exp(minima[:, 1])),
                "ratio_95": _interval(_exp(minima[:, 1] - minima[:, 0])),
                "val_bpb_95": _interval(minima[:, 2]),
            }
        return Budget(
            **shown,
            N_opt=math.exp(ln_n),
            D_opt=math.exp(ln_d),
            ratio=math.exp(ln_d - ln_n),
            val_bpb=loss,
            **intervals,
        )


@dataclass(frozen=True)
class _Draws:
    """The bootstrap: minima (draws, budgets, 3), and (draws,) arrays as in FitDraws.

    lost: share of the draws that are left out because a parabola had no minimum, or one below
    zero."""

    minima: np.ndarray
    curvature: np.ndarray
    noise: np.ndarray
    normal: np.ndarray
    lost: float


def fit_points(points: Iterable[Point]) -> tuple[Fit, FitDraws | None]:
    """Fit parabolas and power laws to completed runs. The draws are for predict(), None where the
    noise cannot be measured."""
    # by label rather than by FLOPs, which differ a little from run to run as steps are whole
    by_budget: dict[str, list[Point]] = {}
    for point in points:
        by_budget.setdefault(point.budget, []).append(point)
    parabolas = sorted(
        (_parabola(label, group) for label, group in by_budget.items()), key=lambda p: p.flops
    )
    fitted = [p for p in parabolas if p.curve is not None]
    used = [p for p in fitted if not p.left_out]
    # a parabola takes three of a budget's degrees of freedom; those whose minimum is unusable
    # measure the noise as well
    dof = sum(len(p.loss) - 3 for p in fitted)
    noise = None
    if dof:
        noise = math.sqrt(sum(float(np.sum(p.residuals**2)) for p in fitted) / dof)
    intervals = (
        "none: no budget has more than three runs, so there is no noise to measure; give four "
        "depths or more"
    )
    if noise is not None:
        intervals = f"95%, parametric bootstrap, {DRAWS} draws, seed {SEED}"
    if len(used) < 2:
        return Fit(
            budgets=[p.as_budget(None) for p in parabolas],
            noise=noise,
            degrees_of_freedom=dof,
            N_opt=None,
            D_opt=None,
            ratio=None,
            loss=None,
            intervals=intervals,
            why_not=f"{len(used)} budgets have a minimum inside their range of depths; a power "
            f"law needs two",
        ), None
    draws = None
    if noise is not None:
        draws = _draw(used, noise, dof)
        if draws is None:
            intervals = (
                "none: too noisy, in no draw has every budget a minimum; give more depths, "
                "further apart"
            )
    return _laws(parabolas, used, draws, noise, dof, intervals)


def _laws(
    parabolas: Sequence[_Parabola],
    used: Sequence[_Parabola],
    draws: _Draws | None,
    noise: float | None,
    dof: int,
    intervals: str,
) -> tuple[Fit, FitDraws | None]:
    """The power laws through the minima of the budgets that are used."""
    ln_c = np.log([p.flops for p in used])
    # one row: the fit, as if it were a draw
    best = np.array([[p.minimum for p in used]])
    minima = losses = lost = None
    of_budget = {}
    if draws is not None:
        minima = draws.minima
        losses = minima[..., 2]
        lost = draws.lost
        of_budget = {p.label: minima[:, i] for i, p in enumerate(used)}
    n_law, n_line = _power_law(ln_c, best, minima, 0)
    d_law, _ = _power_law(ln_c, best, minima, 1)
    loss, loss_draws = _loss(ln_c, best[..., 2], losses)
    fit = Fit(
        budgets=[p.as_budget(of_budget.get(p.label)) for p in parabolas],
        noise=noise,
        degrees_of_freedom=dof,
        N_opt=n_law,
        D_opt=d_law,
        ratio=_ratio(best, minima),
        loss=loss,
        intervals=intervals,
        why_not="",
        draws_without_minimum=lost,
        curvature=float(np.mean([p.curve.coefficients[2] for p in used])),
        ln_flops_center=float(ln_c.mean()),
    )
    if draws is None:
        return fit, None
    return fit, FitDraws(n_line, loss_draws, draws.curvature, draws.noise, draws.normal)


def _parabola(label: str, points: Sequence[Point]) -> _Parabola:
    """The parabola of one budget, or why there is none."""
    # the first and the last N bound the range in which a minimum counts
    points = sorted(points, key=lambda point: point.N)
    ln_n = np.log([p.N for p in points])
    loss = np.array([p.loss for p in points])
    # whole steps: the runs of a budget differ by up to a step
    flops = float(np.exp(np.mean(np.log([p.flops for p in points]))))
    n = np.exp(ln_n)
    if len(set(n)) < MIN_RUNS:
        why = (
            f"{len(points)} completed runs with a loss; a parabola needs {MIN_RUNS} different "
            f"depths"
        )
        return _Parabola(label, flops, n, loss, None, None, why)
    # centred: ln N is large and varies little, so its columns 1, x and x^2 would be nearly parallel
    center = float(ln_n.mean())
    x = ln_n - center
    design = np.stack([np.ones_like(x), x, x**2], axis=1)
    # kept, because the bootstrap applies it to thousands of noisy losses
    solve = np.linalg.pinv(design)
    # at equal FLOPs ln D is nearly a line in ln N; the square is for attention, whose share changes
    # with the width
    ln_tokens = np.polyfit(x, np.log([p.tokens for p in points]), 2)
    coefficients = solve @ loss
    curve = _Curve(x, center, solve, design @ coefficients, coefficients, ln_tokens)
    minimum = None
    if coefficients[2] > 0:
        minimum = curve.minima(coefficients[None])[0]
    return _Parabola(label, flops, n, loss, curve, minimum, _why_left_out(ln_n, loss, minimum))


def _why_left_out(ln_n: np.ndarray, loss: np.ndarray, minimum: np.ndarray | None) -> str:
    """Why the minimum of a parabola through losses at increasing ln N cannot be used."""
    if minimum is None:
        return (
            "the parabola opens downwards, so it has no minimum; the depths are too near each "
            "other, or all on one side of it"
        )
    if minimum[2] <= 0:
        return "the parabola goes below zero; its points are too far from one"
    found = short(float(np.exp(minimum[0])))
    # beyond the runs a parabola is a guess, however well it fits them
    if not ln_n[0] <= minimum[0] <= ln_n[-1]:
        below = minimum[0] < ln_n[0]
        side = "below" if below else "above"
        more = "shallower" if below else "deeper"
        ends = f"{short(float(np.exp(ln_n[0])))} to {short(float(np.exp(ln_n[-1])))}"
        return (
            f"the minimum is NOT inside the range of depths: N = {found} is {side} {ends}; add "
            f"{more} models"
        )
    end = {ln_n[0]: "shallower", ln_n[-1]: "deeper"}.get(ln_n[loss.argmin()])
    # then the loss is still falling at that end, and the parabola's minimum is an accident
    if end and loss.min() < minimum[2]:
        return (
            f"the parabola has its minimum inside the range of depths, at N = {found}, but the run "
            f"at the end of the range is better than that; add {end} models"
        )
    return ""


def _draw(used: Sequence[_Parabola], noise: float, dof: int) -> _Draws | None:
    """The minima of parabolas through noisy losses; None if no draw is left."""
    generator = np.random.default_rng(SEED)
    # one size for a whole draw: it is a single unknown, not one for each run
    sizes = noise * np.sqrt(dof / generator.chisquare(dof, DRAWS))
    coefficients = []
    for p in used:
        # around the curve, not around the measured losses, which contain their noise already
        losses = p.curve.fitted + sizes[:, None] * generator.standard_normal((DRAWS, len(p.loss)))
        coefficients.append(losses @ p.curve.solve.T)
    # it opens upwards, and its minimum is positive
    kept = np.all(
        [(c[:, 2] > 0) & (4 * c[:, 0] * c[:, 2] > c[:, 1] ** 2) for c in coefficients], axis=0
    )
    if not kept.any():
        return None
    # the same draws of every budget, since a law in a draw needs all of its minima
    minima = [p.curve.minima(c[kept]) for p, c in zip(used, coefficients, strict=True)]
    return _Draws(
        minima=np.stack(minima, axis=1),
        curvature=np.mean([c[kept, 2] for c in coefficients], axis=0),
        noise=sizes[kept],
        normal=generator.standard_normal(DRAWS)[kept],
        lost=float(1 - kept.mean()),
    )


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(slopes, levels at the mean of x) of least-squares lines through (..., n) values y at n or
    (..., n) places x. There the two are independent."""
    x = x - x.mean(axis=-1, keepdims=True)
    return (y * x).sum(axis=-1) / (x**2).sum(axis=-1), y.mean(axis=-1)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _exp(x: Any) -> Any:
    """exp() that stays a number: the draws of a flat parabola have their minima anywhere."""
    return np.exp(np.clip(x, -600, 600))


def _power_law(
    ln_c: np.ndarray, best: np.ndarray, minima: np.ndarray | None, column: int
) -> tuple[PowerLaw, tuple[np.ndarray, np.ndarray] | None]:
    """(the law, its line in each draw) of ln N (column 0) or ln D (1) at the minima.

    best: (1, budgets, 3); minima: (draws, budgets, 3)."""
    (slope,), (level,) = _line(ln_c, best[..., column])
    exponent = float(slope)
    factor = float(np.exp(level - slope * ln_c.mean()))
    if minima is None:
        return PowerLaw(exponent, factor), None
    slopes, levels = _line(ln_c, minima[..., column])
    factors = _exp(levels - slopes * ln_c.mean())
    return PowerLaw(exponent, factor, _interval(slopes), _interval(factors)), (slopes, levels)


def _ratio(best: np.ndarray, minima: np.ndarray | None) -> Ratio:
    """D/N at the minima. best: (1, budgets, 3); minima: (draws, budgets, 3)."""
    # the geometric mean, in which a ratio twice too large and one half as large cancel
    found = np.exp((best[..., 1] - best[..., 0]).mean(axis=1))
    interval = None
    if minima is not None:
        interval = _interval(_exp((minima[..., 1] - minima[..., 0]).mean(axis=1)))
    return Ratio(float(found[0]), "geometric mean over the budgets", interval)


# ---- the loss at the optimum ----


def fit_loss(ln_c: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(E, A, gamma), each (n,): least-squares fits of (n, budgets) losses by
    E + A exp(-gamma (ln C - mean ln C)) with E >= 0.

    For a gamma the best E and A are known in closed form; gamma is searched among GAMMAS, then
    twice more around the best. All three are infinite for losses that do not fall."""
    ln_c = ln_c - ln_c.mean()
    # squared error, E, A, gamma
    best = np.full((4, len(losses)), np.inf)

    def attempt(gammas: np.ndarray) -> None:
        falling = np.exp(-gammas[:, None] * ln_c)
        slope, level = _line(falling, losses)
        floor = level - slope * falling.mean(axis=1)
        # where the best E is negative, the best that is allowed is 0
        below = floor < 0
        slope = np.where(below, (losses * falling).sum(axis=1) / (falling**2).sum(axis=1), slope)
        floor = np.where(below, 0.0, floor)
        error = ((floor[:, None] + slope[:, None] * falling - losses) ** 2).sum(axis=1)
        better = (error < best[0]) & (slope > 0)
        best[:, better] = np.stack([error, floor, slope, gammas])[:, better]

    # a grid, since for small gammas the error is too flat for a gradient to follow
    for gamma in GAMMAS:
        attempt(np.full(len(losses), gamma))
    grid = GAMMAS[1] / GAMMAS[0]
    # 41 factors over one step of the grid each way are step^(1/20) apart, which is how far the
    # second search has to reach
    for step in (grid, grid ** (1 / 20)):
        # losses that do not fall have found nothing yet, and any start serves them
        around = np.where(np.isfinite(best[3]), best[3], GAMMAS[0])
        for factor in np.geomspace(1 / step, step, 41):
            attempt(around * factor)
    return best[1], best[2], best[3]


LossDraws = tuple[np.ndarray, np.ndarray, np.ndarray]


def _loss(
    ln_c: np.ndarray, best: np.ndarray, losses: np.ndarray | None
) -> tuple[LossLaw, LossDraws | None]:
    """(the law, its floors, factors and gammas in each draw) of the loss at the optimum.

    E + A C^-gamma if the runs determine E, else a line of ln L against ln C. best: (1, budgets);
    losses: (draws, budgets)."""
    if len(ln_c) < MIN_BUDGETS_OF_FLOOR:
        why = f"{len(ln_c)} budgets cannot tell E from the exponent; it takes four"
        return _loss_line(ln_c, best, losses, why, None)
    if losses is None:
        why = "without a measured noise nothing says how well E is known"
        return _loss_line(ln_c, best, losses, why, None)
    (floor,), (factor,), (gamma,) = fit_loss(ln_c, best)
    drawn = fit_loss(ln_c, losses)
    floors, _, gammas = drawn
    if not np.isfinite(floor):
        return _loss_line(ln_c, best, losses, "the loss does not fall with the budget", drawn)
    # at the end of the grid the loss has all but stopped falling: E is then the last loss, not a
    # floor
    at_end = GAMMAS[-1]
    if (
        gamma >= at_end
        or floor == 0
        or not np.isfinite(floors).all()
        or np.percentile(floors, 2.5) <= 0
        or np.mean(gammas >= at_end) > 0.025
    ):
        why = (
            "its 95% interval reaches down to 0, or up to where the loss would have stopped "
            "falling already"
        )
        return _loss_line(ln_c, best, losses, why, drawn)
    law = LossLaw(
        form="E + A C^-gamma",
        E=float(floor),
        E_95=_interval(floors),
        # A is that of C in FLOPs; the fit's own is of C over its geometric mean
        A=float(factor * np.exp(gamma * ln_c.mean())),
        gamma=float(gamma),
        gamma_95=_interval(gammas),
        why_line="",
    )
    return law, drawn


def _loss_line(
    ln_c: np.ndarray,
    best: np.ndarray,
    losses: np.ndarray | None,
    why: str,
    with_floor: LossDraws | None,
) -> tuple[LossLaw, LossDraws | None]:
    """The law without a floor, and its draws. why: E cannot be determined. with_floor: the draws of
    the law with a floor, if there are any."""
    (slope,), (level,) = _line(ln_c, np.log(best))
    gamma_95 = draws = None
    if losses is not None:
        slopes, levels = _line(ln_c, np.log(losses))
        gamma_95 = _interval(-slopes)
        draws = (np.zeros_like(slopes), np.exp(levels), -slopes)
        # not to know E does not mean that it is 0: predictions reach as far as what E may be
        if with_floor is not None:
            found = np.isfinite(with_floor[0])
            draws = tuple(
                np.where(found, values, line)
                for values, line in zip(with_floor, draws, strict=True)
            )
    law = LossLaw(
        form="A C^-gamma",
        E=None,
        E_95=None,
        A=float(np.exp(level - slope * ln_c.mean())),
        gamma=float(-slope),
        gamma_95=gamma_95,
        why_line=f"E cannot be determined: {why}",
    )
    return law, draws


# ---- predictions ----


def best_budget(fit: Fit, n: float) -> float:
    """The FLOPs for which a model of N = n is the best. UsageError if the law does not rise."""
    law = fit.N_opt
    # only noise can give such a law
    if law.exponent <= 0:
        raise UsageError(
            f"N_opt does not rise with the budget (exponent {law.exponent:.3f}), so no budget "
            f"belongs to a depth"
        )
    return float(_exp(math.log(n / law.factor) / law.exponent))


def predict(fit: Fit, draws: FitDraws | None, flops: float, n: float) -> Expected:
    """What to expect of one run of that many FLOPs with N = n: the loss at the optimum, plus what
    the parabolas say for a model beside it. The interval includes the noise of that run.

    UsageError if there are no power laws."""
    if fit.loss is None:
        raise UsageError(f"no prediction: {fit.why_not}")
    away = math.log(n / fit.N_opt.at(flops))
    # away from the optimum every budget is taken to have the mean curvature
    expected = float(fit.loss.at(flops) + fit.curvature * away**2)
    if draws is None:
        return Expected(expected, None)
    x = math.log(flops) - fit.ln_flops_center
    floors, factors, gammas = draws.loss
    slopes, levels = draws.n_line
    losses = (
        floors
        + factors * np.exp(-gammas * x)
        + draws.curvature * (math.log(n) - levels - slopes * x) ** 2
    )
    # the run that is predicted has noise of its own, besides the uncertainty of the laws
    low, high = _interval(losses + draws.noise * draws.normal)
    # percentiles of skewed draws need not hold the value itself
    return Expected(expected, (min(low, expected), max(high, expected)))


# ---- words ----


def in_words(fit: Fit) -> str:
    """The fit for reading: a row for each budget, and the laws."""
    rows = [("budget", "N_opt", "95%", "D_opt", "95%", "D/N", "95%", "val_bpb")]
    rows += [_budget_row(budget) for budget in fit.budgets]
    lines = [aligned(rows)]
    lines += [
        f"budget {budget.budget} is left out: {budget.left_out}"
        for budget in fit.budgets
        if budget.left_out
    ]
    if fit.why_not:
        return "\n".join([*lines, f"no power laws: {fit.why_not}"])
    for name, law in (("N_opt", fit.N_opt), ("D_opt", fit.D_opt)):
        exponent = f"C^{law.exponent:.3f}{_in_brackets(law.exponent_95)}"
        lines.append(f"{name} = {law.factor:.3g} {exponent}")
    ratio = f"{fit.ratio.tokens_per_parameter:.2f}{_in_brackets(fit.ratio.interval_95)}"
    lines.append(f"D/N at the optimum, {fit.ratio.what}: {ratio}")
    law = fit.loss
    floor = "" if law.E is None else f"{law.E:.4f}{_in_brackets(law.E_95)} + "
    power = f"{law.A:.4g} C^-{law.gamma:.4f}{_in_brackets(law.gamma_95)}"
    lines.append(f"val_bpb at the optimum = {floor}{power}")
    if law.why_line:
        lines.append(law.why_line)
    noise = ""
    if fit.noise is not None:
        noise = f"; noise of a run {fit.noise:.4f} ({fit.degrees_of_freedom} degrees of freedom)"
    lines.append(f"intervals: {fit.intervals}{noise}")
    # what has no minimum cannot be counted, and it would lie far out
    if (fit.draws_without_minimum or 0) > 0.01:
        lines.append(
            f"in {fit.draws_without_minimum:.0%} of the draws a budget had no minimum; they are "
            f"left out, so the intervals are too narrow: add depths"
        )
    return "\n".join(lines)


def _budget_row(budget: Budget) -> tuple[str | None, ...]:
    n_95 = d_95 = ratio_95 = None
    if budget.N_opt_95 is not None:
        n_95 = " to ".join(map(short, budget.N_opt_95))
        d_95 = " to ".join(map(short, budget.D_opt_95))
        ratio_95 = " to ".join(fixed(value, 2) for value in budget.ratio_95)
    return (
        budget.budget,
        short(budget.N_opt),
        n_95,
        short(budget.D_opt),
        d_95,
        fixed(budget.ratio, 2),
        ratio_95,
        fixed(budget.val_bpb),
    )


def _in_brackets(interval: Interval | None) -> str:
    """An interval after its value; nothing if it is unknown."""
    return "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
