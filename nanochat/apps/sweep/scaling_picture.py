"""The picture of a scaling sweep: parabolas and minima, the two power laws, loss at the optimum."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanochat.apps.sweep.predictions import Outcome
from nanochat.apps.sweep.scaling_fit import Budget, Fit, PowerLaw
from nanochat.common import write_atomic
from nanochat.run import plots
from nanochat.run.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = "#1f4e8c"
RED = "#b4541a"
GREY = "#777777"


def draw_picture(fit: Fit, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the picture as a PNG, replacing an older one atomically."""
    content = plots.png(lambda figure: draw_laws(figure, fit, outcomes), 16, 6)
    write_atomic(path, content)


def draw_laws(figure: "Figure", fit: Fit, outcomes: Sequence[Outcome]) -> None:
    """Fill a figure with the three parts."""
    left, middle, right = figure.subplots(1, 3)
    _draw_parabolas(left, fit.budgets)
    used = [budget for budget in fit.budgets if budget.N_opt is not None]
    if fit.why_not:
        # an empty part with a reason, rather than a picture of another shape
        for axes in (middle, right):
            axes.text(0.5, 0.5, "no power law", transform=axes.transAxes, ha="center", color=GREY)
            axes.set(xticks=[], yticks=[])
    else:
        # the lines reach as far as the predictions that they make
        last = max([used[-1].flops, *(outcome.prediction.flops for outcome in outcomes)])
        ends = np.array([used[0].flops / 1.5, last * 1.5])
        _draw_power_laws(middle, fit, used, ends)
        _draw_loss(right, fit, used, outcomes, ends)
    left.set(
        xlabel="N, parameters of matrices and head",
        ylabel="bits per byte of held-out text",
        title="runs of equal FLOPs",
    )
    middle.set(
        xlabel="C, training FLOPs",
        ylabel="parameters, tokens",
        title="best model and best amount of data (bars: 95%)",
    )
    right.set(
        xlabel="C, training FLOPs",
        ylabel="bits per byte at the best N",
        title="loss at the optimum (bars: 95%)",
    )


def _draw_parabolas(axes: "Axes", budgets: Sequence[Budget]) -> None:
    from matplotlib import colormaps

    for i, budget in enumerate(budgets):
        # the last part of the map is too pale on white
        color = colormaps["viridis"](0.85 * i / max(1, len(budgets) - 1))
        n = np.array(budget.N)
        label = f"{budget.flops:.3g} FLOPs" + (" (left out)" if budget.left_out else "")
        axes.plot(n, budget.loss, "o", color=color, markersize=4.5, label=label)
        if budget.coefficients is not None:
            # only between the runs: beyond them the parabola means nothing
            along = np.linspace(np.log(n.min()), np.log(n.max()), 100)
            axes.plot(
                np.exp(along),
                np.polyval(budget.coefficients[::-1], along - budget.center),
                color=color,
                linewidth=1.3,
                linestyle="--" if budget.left_out else "-",
            )
        if budget.N_opt is not None:
            # above the runs, since the best of them may lie right under the minimum
            axes.plot(budget.N_opt, budget.val_bpb, "*", color=RED, markersize=12, zorder=5)
    # budgets that are left out stay in view: they show which depths are missing
    sizes = [n for budget in budgets for n in budget.N]
    plots.log_scale(axes, "x", min(sizes) / 1.2, max(sizes) * 1.2, short)
    # one entry for each budget would make a single column as high as the axes
    _legend(axes, columns=2)


def _draw_power_laws(axes: "Axes", fit: Fit, used: Sequence[Budget], ends: np.ndarray) -> None:
    _draw_power_law(axes, fit.N_opt, used, "N_opt", ends, "N, parameters", BLUE)
    _draw_power_law(axes, fit.D_opt, used, "D_opt", ends, "D, tokens", RED)
    plots.log_scale(axes, "x", *ends)
    # intervals may reach very far; what they belong to stays in view
    low = min(budget.N_opt for budget in used) / 4
    high = max(budget.D_opt for budget in used) * 4
    plots.log_scale(axes, "y", low, high, short)
    _legend(axes)


def _draw_power_law(
    axes: "Axes",
    law: PowerLaw,
    used: Sequence[Budget],
    what: str,
    ends: np.ndarray,
    name: str,
    color: str,
) -> None:
    """N_opt or D_opt (what) of the budgets, and the line through them."""
    values = np.array([getattr(budget, what) for budget in used])
    intervals = [getattr(budget, f"{what}_95") for budget in used]
    interval = ""
    if law.exponent_95 is not None:
        low, high = law.exponent_95
        interval = f"  [{low:.2f}, {high:.2f}]"
    flops = [budget.flops for budget in used]
    axes.errorbar(
        flops,
        values,
        _reach(values, intervals),
        fmt="o",
        color=color,
        markersize=5,
        capsize=3,
        linewidth=1.2,
    )
    label = f"{name}: C^{law.exponent:.2f}{interval}"
    axes.plot(ends, law.at(ends), color=color, linewidth=1.4, label=label)


def _reach(values: np.ndarray, intervals: Sequence) -> np.ndarray | None:
    """(2, n) distances of the ends of intervals from their values; None if there are none."""
    # the noise is known for all budgets or for none, so the first interval tells
    if intervals[0] is None:
        return None
    # a bootstrap's interval may leave its own value outside, and matplotlib refuses negative
    # distances
    return np.abs(np.array(intervals).T - values)


def _draw_loss(
    axes: "Axes",
    fit: Fit,
    used: Sequence[Budget],
    outcomes: Sequence[Outcome],
    ends: np.ndarray,
) -> None:
    """The loss at the minima, the law through them, and the predictions."""
    law = fit.loss
    formula = f"C^-{law.gamma:.3f}"
    if law.E is not None:
        formula = f"{law.E:.3f} + A {formula}"
    # evenly spaced on the logarithmic axis
    along = np.geomspace(*ends, 100)
    axes.plot(along, law.at(along), color=BLUE, linewidth=1.4, label=formula)
    values = np.array([budget.val_bpb for budget in used])
    axes.errorbar(
        [budget.flops for budget in used],
        values,
        _reach(values, [budget.val_bpb_95 for budget in used]),
        fmt="o",
        color=BLUE,
        markersize=5,
        capsize=3,
        linewidth=1.2,
        label="minima",
    )
    for i, outcome in enumerate(outcomes):
        # one entry in the legend for all of them
        _draw_outcome(axes, outcome, with_label=i == 0)
    measured = [outcome.measured for outcome in outcomes if outcome.measured is not None]
    # intervals of predictions may be very wide, and would flatten the curve
    seen = [*values, *law.at(ends), *measured]
    # some room even if all values are equal
    margin = 0.15 * (max(seen) - min(seen)) + 0.002
    plots.log_scale(axes, "x", *ends)
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    _legend(axes)


def _draw_outcome(axes: "Axes", outcome: Outcome, with_label: bool) -> None:
    """A prediction with its interval, and what was measured."""
    prediction = outcome.prediction
    axes.errorbar(
        [prediction.flops],
        [prediction.val_bpb],
        _reach(np.array([prediction.val_bpb]), [prediction.interval_95]),
        fmt="D",
        color=GREY,
        markersize=5,
        capsize=3,
        label="predicted" if with_label else None,
    )
    if outcome.measured is not None:
        axes.plot(
            [prediction.flops],
            [outcome.measured],
            "x",
            color=RED,
            markersize=9,
            markeredgewidth=2,
            zorder=5,
            label="measured" if with_label else None,
        )


def _legend(axes: "Axes", columns: int = 1) -> None:
    """Below the axes, where no curve is."""
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)
