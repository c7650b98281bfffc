"""Scaling laws from runs of equal FLOPs: parabolas of the loss against ln N, their minima, and power laws through the minima.

C: training FLOPs. N: parameters of the matrices and the head. D: training tokens. As approach 2 of arXiv 2203.15556.

Intervals are 95% and come from a parametric bootstrap: DRAWS times (seed SEED) every run gets normal noise of the size that the
parabolas leave over, pooled over the budgets, that size itself drawn by its chi-square (so that few runs give wide intervals), and
everything is fitted again. They know nothing of what is wrong in the same way everywhere, such as badly tuned rates."""

import math

import numpy as np

from nanochat.apps.runs import aligned, fixed, short
from nanochat.common import UsageError, write_atomic
from nanochat.run import plots

DRAWS, SEED = 4000, 1
GAMMAS = np.geomspace(0.005, 2.0, 80)  # exponents of the loss that are tried first
MIN_RUNS = 3  # of a budget for a parabola; one more leaves noise to measure


def fit_points(points):
    """Everything that the runs say. points: [{budget (its label), flops, N, tokens, loss}], completed runs only.

    Returns (result, draws): result is plain JSON; draws holds arrays for predict(), or None where the noise cannot be measured."""
    by_budget = {}
    for point in points:
        by_budget.setdefault(point["budget"], []).append(point)
    parabolas = [_parabola(label, group) for label, group in by_budget.items()]
    parabolas.sort(key=lambda p: p["flops"])
    fitted = [p for p in parabolas if "coefficients" in p]
    used = [p for p in fitted if not p["left_out"]]
    dof = sum(len(p["x"]) - 3 for p in fitted)
    noise = (
        math.sqrt(sum(float(np.sum(p["residuals"] ** 2)) for p in fitted) / dof) if dof else None
    )
    result = {
        "budgets": [],
        "noise": noise,
        "degrees_of_freedom": dof,
        "N_opt": None,
        "D_opt": None,
        "ratio": None,
        "loss": None,
        "intervals": f"95%, parametric bootstrap, {DRAWS} draws, seed {SEED}"
        if noise is not None
        else "none: no budget has more than three runs, so there is no noise to measure; give four depths or more",
        "why_not": "",
    }
    if len(used) < 2:
        result["why_not"] = (
            f"{len(used)} budgets have a minimum inside their range of depths; a power law needs two"
        )
        result["budgets"] = [_shown(p, None) for p in parabolas]
        return result, None

    ln_c = np.log([p["flops"] for p in used])
    best = np.array(
        [[p["minimum"] for p in used]]
    )  # one row: the fit; 3 values a budget: ln N, ln D, loss
    draws = _draw(used, noise, dof) if noise is not None else None
    if noise is not None and draws is None:
        result["intervals"] = (
            "none: too noisy, in no draw has every budget a minimum; give more depths, further apart"
        )
    for i, p in enumerate(used):
        p["draws"] = None if draws is None else draws["minima"][:, i]
    result["budgets"] = [_shown(p, p.get("draws")) for p in parabolas]
    if draws is not None:
        result["draws_without_minimum"] = draws["lost"]
    # the lines are centred at the mean of ln C, where their two numbers are independent
    for what, axis in (("N_opt", 0), ("D_opt", 1)):
        slope, level = _line(ln_c, best[..., axis])
        entry = {
            "exponent": float(slope[0]),
            "factor": float(np.exp(level[0] - slope[0] * ln_c.mean())),
        }
        if draws is not None:
            slopes, levels = _line(ln_c, draws["minima"][..., axis])
            entry |= {
                "exponent_95": _interval(slopes),
                "factor_95": _interval(_exp(levels - slopes * ln_c.mean())),
            }
            draws[what] = (slopes, levels)
        result[what] = entry
    ratio = np.exp((best[..., 1] - best[..., 0]).mean(axis=1))
    result["ratio"] = {
        "tokens_per_parameter": float(ratio[0]),
        "what": "geometric mean over the budgets",
        "interval_95": None
        if draws is None
        else _interval(_exp((draws["minima"][..., 1] - draws["minima"][..., 0]).mean(axis=1))),
    }
    result["loss"] = _loss(ln_c, best[..., 2], draws)
    result["curvature"] = float(np.mean([p["coefficients"][2] for p in used]))
    result["ln_flops_center"] = float(ln_c.mean())
    return result, draws


def _parabola(label, points):
    """The parabola of one budget, or why there is none. `left_out` says why it takes no part in the power laws."""
    points = sorted(points, key=lambda point: point["N"])
    ln_n, loss = np.log([p["N"] for p in points]), np.array([p["loss"] for p in points])
    parabola = {
        "label": label,
        "flops": float(np.exp(np.mean(np.log([p["flops"] for p in points])))),
        "N": np.exp(ln_n),
        "loss": loss,
        "tokens": [p["tokens"] for p in points],
        "left_out": "",
    }
    if len(set(parabola["N"])) < MIN_RUNS:
        return parabola | {
            "left_out": f"{len(points)} completed runs with a loss; a parabola needs {MIN_RUNS} different depths"
        }
    center = float(ln_n.mean())
    x = ln_n - center
    design = np.stack([np.ones_like(x), x, x**2], axis=1)
    solve = np.linalg.pinv(design)
    # at equal FLOPs ln D is nearly a line in ln N; the square is for attention, whose share changes with the width
    tokens = np.polyfit(x, np.log(parabola["tokens"]), 2)
    coefficients = solve @ loss
    parabola |= {
        "x": x,
        "center": center,
        "solve": solve,
        "fit": design @ coefficients,
        "residuals": loss - design @ coefficients,
        "coefficients": coefficients,
        "ln_tokens": tokens,
    }
    if coefficients[2] <= 0:
        return parabola | {
            "left_out": "the parabola opens downwards, so it has no minimum; the depths are too near each other, or all "
            "on one side of it"
        }
    minimum = _minima(parabola, coefficients[None])[0]
    parabola["minimum"] = minimum
    if minimum[2] <= 0:
        return parabola | {
            "left_out": "the parabola goes below zero; its points are too far from one"
        }
    inside, found = ln_n[0] <= minimum[0] <= ln_n[-1], float(np.exp(minimum[0]))
    end = {ln_n[0]: "shallower", ln_n[-1]: "deeper"}.get(ln_n[loss.argmin()])
    if inside and end and loss.min() < minimum[2]:
        parabola["left_out"] = (
            f"the parabola has its minimum inside the range of depths, at N = {short(found)}, and the run at the "
            f"end of the range is better than that; add {end} models"
        )
    if not inside:
        side, more = ("below", "shallower") if minimum[0] < ln_n[0] else ("above", "deeper")
        parabola["left_out"] = (
            f"the minimum is NOT inside the range of depths: N = {short(found)} is {side} "
            f"{short(float(parabola['N'][0]))} to {short(float(parabola['N'][-1]))}; add {more} models"
        )
    return parabola


def _minima(parabola, coefficients):
    """(..., 3) values ln N, ln D and loss at the minimum of parabolas with these (..., 3) coefficients."""
    level, slope, curvature = np.moveaxis(coefficients, -1, 0)
    x = -slope / (2 * curvature)
    return np.stack(
        [
            x + parabola["center"],
            np.polyval(parabola["ln_tokens"], x),
            level - slope**2 / (4 * curvature),
        ],
        axis=-1,
    )


def _draw(used, noise, dof):
    """The minima of parabolas through noisy losses: {"minima": (draws, budgets, 3), "curvature": (draws,), "noise": (draws,), "lost"}.

    Draws in which a parabola has no minimum, or one below zero, are left out; lost is their share. None if no draw is left."""
    generator = np.random.default_rng(SEED)
    sizes = noise * np.sqrt(dof / generator.chisquare(dof, DRAWS))
    coefficients = [
        (p["fit"] + sizes[:, None] * generator.standard_normal((DRAWS, len(p["x"])))) @ p["solve"].T
        for p in used
    ]
    kept = np.all(
        [(c[:, 2] > 0) & (4 * c[:, 0] * c[:, 2] > c[:, 1] ** 2) for c in coefficients], axis=0
    )
    if not kept.any():
        return None
    return {
        "minima": np.stack(
            [_minima(p, c[kept]) for p, c in zip(used, coefficients, strict=True)], axis=1
        ),
        "curvature": np.mean([c[kept, 2] for c in coefficients], axis=0),
        "noise": sizes[kept],
        "normal": generator.standard_normal(DRAWS)[kept],
        "lost": float(1 - kept.mean()),
    }


def _line(x, y):
    """(slopes, levels at the mean of x) of least-squares lines through (..., n) values y at n or (..., n) places x."""
    x = x - x.mean(axis=-1, keepdims=True)
    return (y * x).sum(axis=-1) / (x**2).sum(axis=-1), y.mean(axis=-1)


def _interval(values):
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def _exp(x):
    """exp() that stays a number: the draws of a flat parabola have their minima anywhere."""
    return np.exp(np.clip(x, -600, 600))


def fit_loss(ln_c, losses):
    """(E, A, gamma) arrays of least-squares fits of (n, budgets) losses by E + A exp(-gamma (ln C - mean ln C)), E >= 0.

    For a gamma the best E and A are known in closed form; gamma is looked for among GAMMAS, then twice more around the best. All three
    are infinite for losses that do not fall."""
    ln_c = ln_c - ln_c.mean()
    best = np.full((4, len(losses)), np.inf)  # squared error, E, A, gamma

    def attempt(gammas):
        falling = np.exp(-gammas[:, None] * ln_c)
        slope, level = _line(falling, losses)
        floor = level - slope * falling.mean(axis=1)
        below = floor < 0  # then the best that is allowed has E = 0
        slope = np.where(below, (losses * falling).sum(axis=1) / (falling**2).sum(axis=1), slope)
        floor = np.where(below, 0.0, floor)
        error = ((floor[:, None] + slope[:, None] * falling - losses) ** 2).sum(axis=1)
        better = (error < best[0]) & (slope > 0)
        best[:, better] = np.stack([error, floor, slope, gammas])[:, better]

    for gamma in GAMMAS:
        attempt(np.full(len(losses), gamma))
    for step in (GAMMAS[1] / GAMMAS[0], (GAMMAS[1] / GAMMAS[0]) ** (1 / 20)):
        around = np.where(np.isfinite(best[3]), best[3], GAMMAS[0])
        for factor in np.geomspace(1 / step, step, 41):
            attempt(around * factor)
    return best[1], best[2], best[3]


def _loss(ln_c, best, draws):
    """The law of the loss at the optimum: E + A C^-gamma if the runs determine E, else a line of ln L against ln C."""
    why, extrapolated = "", None
    if len(ln_c) < 4:
        why = f"{len(ln_c)} budgets cannot tell E from the exponent; it takes four"
    elif draws is None:
        why = "without noise to measure nothing says how well E is known"
    else:
        losses = draws["minima"][..., 2]
        (floor,), (factor,), (gamma,) = fit_loss(ln_c, best)
        extrapolated = floors, factors, gammas = fit_loss(ln_c, losses)
        found = np.isfinite(floors)
        if not np.isfinite(floor):
            why = "the loss does not fall with the budget"
        elif (
            gamma >= GAMMAS[-1]
            or floor == 0
            or not found.all()
            or np.percentile(floors, 2.5) <= 0
            or np.mean(gammas >= GAMMAS[-1]) > 0.025
        ):
            why = "its 95% interval reaches down to 0, or up to where the loss would have ended falling already"
        else:
            draws["loss"] = (floors, factors, gammas)
            # A is that of C in FLOPs; the fit's own is of C over its geometric mean
            return {
                "form": "E + A C^-gamma",
                "E": float(floor),
                "E_95": _interval(floors),
                "A": float(factor * np.exp(gamma * ln_c.mean())),
                "gamma": float(gamma),
                "gamma_95": _interval(gammas),
                "why_line": "",
            }
    slope, level = _line(ln_c, np.log(best))
    law = {
        "form": "A C^-gamma",
        "E": None,
        "E_95": None,
        "A": float(np.exp(level[0] - slope[0] * ln_c.mean())),
        "gamma": float(-slope[0]),
        "gamma_95": None,
        "why_line": f"E cannot be determined: {why}",
    }
    if draws is not None:
        slopes, levels = _line(ln_c, np.log(draws["minima"][..., 2]))
        law["gamma_95"] = _interval(-slopes)
        draws["loss"] = lines = (np.zeros_like(slopes), np.exp(levels), -slopes)
        if (
            extrapolated
        ):  # not to know E does not mean that it is 0: predictions reach as far as what E may be
            draws["loss"] = tuple(
                np.where(found, values, line)
                for values, line in zip(extrapolated, lines, strict=True)
            )
    return law


def loss_at(result, flops):
    """Expected loss at the optimum of a budget (or an array of them), by fit_points()'s result."""
    law = result["loss"]
    return (law["E"] or 0.0) + law["A"] * np.asarray(flops, dtype=float) ** -law["gamma"]


def optimum(result, what, flops):
    """N_opt or D_opt (`what`) of a budget, or of an array of them."""
    return result[what]["factor"] * np.asarray(flops, dtype=float) ** result[what]["exponent"]


def best_budget(result, n):
    """The FLOPs at which a model of N = n is the best. UsageError if the power law does not rise."""
    law = result["N_opt"]
    if law["exponent"] <= 0:
        raise UsageError(
            f"N_opt does not rise with the budget (exponent {law['exponent']:.3f}): no budget can be named for a depth"
        )
    return float(_exp(math.log(n / law["factor"]) / law["exponent"]))


def predict(result, draws, flops, n):
    """{"val_bpb", "interval_95"} expected of one run of that many FLOPs with N = n; the interval holds the noise of that run too.

    The loss at the optimum, plus what the parabolas say for a model beside it; interval_95 is null where the noise is unknown."""
    if result["loss"] is None:
        raise UsageError(f"no prediction: {result['why_not']}")
    away = math.log(n / optimum(result, "N_opt", flops))
    expected = float(loss_at(result, flops) + result["curvature"] * away**2)
    if draws is None:
        return {"val_bpb": expected, "interval_95": None}
    x = math.log(flops) - result["ln_flops_center"]
    floors, factors, gammas = draws["loss"]
    slopes, levels = draws["N_opt"]
    losses = (
        floors
        + factors * np.exp(-gammas * x)
        + draws["curvature"] * (math.log(n) - levels - slopes * x) ** 2
    )
    low, high = _interval(losses + draws["noise"] * draws["normal"])
    return {"val_bpb": expected, "interval_95": [min(low, expected), max(high, expected)]}


def _shown(parabola, draws):
    """A budget for results.json. draws: (draws, 3) minima, or None."""
    entry = {
        "budget": parabola["label"],
        "flops": parabola["flops"],
        "left_out": parabola["left_out"],
        "N": parabola["N"].tolist(),
        "loss": parabola["loss"].tolist(),
        "center": parabola.get("center"),
        "coefficients": parabola["coefficients"].tolist() if "coefficients" in parabola else None,
        **dict.fromkeys(
            ("N_opt", "D_opt", "ratio", "val_bpb", "N_opt_95", "D_opt_95", "ratio_95", "val_bpb_95")
        ),
    }
    if "minimum" in parabola and not parabola["left_out"]:
        ln_n, ln_d, loss = (float(value) for value in parabola["minimum"])
        entry |= {
            "N_opt": math.exp(ln_n),
            "D_opt": math.exp(ln_d),
            "ratio": math.exp(ln_d - ln_n),
            "val_bpb": loss,
        }
        if draws is not None:
            entry |= {
                "N_opt_95": _interval(_exp(draws[:, 0])),
                "D_opt_95": _interval(_exp(draws[:, 1])),
                "ratio_95": _interval(_exp(draws[:, 1] - draws[:, 0])),
                "val_bpb_95": _interval(draws[:, 2]),
            }
    return entry


def in_words(result):
    """fit_points()'s result for reading."""

    def between(interval, show):
        return None if interval is None else f"{show(interval[0])} to {show(interval[1])}"

    rows = [("budget", "N_opt", "95%", "D_opt", "95%", "D/N", "95%", "val_bpb")]
    rows += [
        (
            b["budget"],
            short(b["N_opt"]),
            between(b["N_opt_95"], short),
            short(b["D_opt"]),
            between(b["D_opt_95"], short),
            fixed(b["ratio"], 2),
            between(b["ratio_95"], lambda v: fixed(v, 2)),
            fixed(b["val_bpb"]),
        )
        for b in result["budgets"]
    ]
    lines = [aligned(rows)] + [
        f"budget {b['budget']} is left out: {b['left_out']}"
        for b in result["budgets"]
        if b["left_out"]
    ]
    if result["why_not"]:
        return "\n".join([*lines, f"no power laws: {result['why_not']}"])

    def of(interval):
        return "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"

    lines += [
        f"{what} = {result[what]['factor']:.3g} C^{result[what]['exponent']:.3f}{of(result[what].get('exponent_95'))}"
        for what in ("N_opt", "D_opt")
    ]
    ratio, law = result["ratio"], result["loss"]
    lines.append(
        f"D/N at the optimum, {ratio['what']}: {ratio['tokens_per_parameter']:.2f}{of(ratio['interval_95'])}"
    )
    floor = "" if law["E"] is None else f"{law['E']:.4f}{of(law['E_95'])} + "
    lines.append(
        f"val_bpb at the optimum = {floor}{law['A']:.4g} C^-{law['gamma']:.4f}{of(law['gamma_95'])}"
    )
    lines += [law["why_line"]] if law["why_line"] else []
    noise = result["noise"]
    lines.append(
        f"intervals: {result['intervals']}"
        + (
            ""
            if noise is None
            else f"; noise of a run {noise:.4f} ({result['degrees_of_freedom']} degrees of freedom)"
        )
    )
    if result.get("draws_without_minimum", 0) > 0.01:
        lines.append(
            f"in {result['draws_without_minimum']:.0%} of the draws a budget had no minimum; they are left out, so the intervals "
            "are too narrow: add depths"
        )
    return "\n".join(lines)


def draw_picture(result, predictions, path):
    """The parabolas with their points and minima, the two power laws, and the loss at the optimum, as a PNG (replaced atomically).

    predictions: [{"flops", "val_bpb", "interval_95", "measured"}], measured null before the run."""
    write_atomic(path, plots.png(lambda figure: _draw_laws(figure, result, predictions), 16, 6))


def _draw_laws(figure, result, predictions):
    left, middle, right = figure.subplots(1, 3)
    budgets = result["budgets"]
    _draw_parabolas(left, budgets)
    used = [b for b in budgets if b["N_opt"] is not None]
    flops = np.array([b["flops"] for b in used])
    if not result["why_not"]:
        ends = np.array(
            [flops[0] / 1.5, max([flops[-1], *(p["flops"] for p in predictions)]) * 1.5]
        )
        for what, name, color in (
            ("N_opt", "N, parameters", "#1f4e8c"),
            ("D_opt", "D, tokens", "#b4541a"),
        ):
            values = np.array([b[what] for b in used])
            errors = (
                None
                if used[0][f"{what}_95"] is None
                else np.abs(np.array([b[f"{what}_95"] for b in used]).T - values)
            )
            law = result[what]
            interval = (
                ""
                if law.get("exponent_95") is None
                else "  [{:.2f}, {:.2f}]".format(*law["exponent_95"])
            )
            middle.errorbar(
                flops, values, errors, fmt="o", color=color, markersize=5, capsize=3, linewidth=1.2
            )
            middle.plot(
                ends,
                optimum(result, what, ends),
                color=color,
                linewidth=1.4,
                label=f"{name}: C^{law['exponent']:.2f}{interval}",
            )
        plots.log_scale(middle, "x", *ends)
        # intervals may reach very far; what they are of stays in view
        plots.log_scale(
            middle, "y", min(b["N_opt"] for b in used) / 4, max(b["D_opt"] for b in used) * 4, short
        )
        _legend(middle)
        along = np.geomspace(*ends, 100)
        law = result["loss"]
        formula = (
            f"C^-{law['gamma']:.3f}"
            if law["E"] is None
            else f"{law['E']:.3f} + A C^-{law['gamma']:.3f}"
        )
        right.plot(along, loss_at(result, along), color="#1f4e8c", linewidth=1.4, label=formula)
        values = np.array([b["val_bpb"] for b in used])
        errors = (
            None
            if used[0]["val_bpb_95"] is None
            else np.abs(np.array([b["val_bpb_95"] for b in used]).T - values)
        )
        right.errorbar(
            flops,
            values,
            errors,
            fmt="o",
            color="#1f4e8c",
            markersize=5,
            capsize=3,
            linewidth=1.2,
            label="minima",
        )
        for i, p in enumerate(predictions):
            errors = (
                None
                if p["interval_95"] is None
                else np.abs(np.array([p["interval_95"]]).T - p["val_bpb"])
            )
            right.errorbar(
                [p["flops"]],
                [p["val_bpb"]],
                errors,
                fmt="D",
                color="#777777",
                markersize=5,
                capsize=3,
                label="predicted" if i == 0 else None,
            )
            if p["measured"] is not None:
                right.plot(
                    [p["flops"]],
                    [p["measured"]],
                    "x",
                    color="#b4541a",
                    markersize=9,
                    markeredgewidth=2,
                    zorder=5,
                    label="measured" if i == 0 else None,
                )
        seen = [
            *values,
            *loss_at(result, ends),
            *(p["measured"] for p in predictions if p["measured"] is not None),
        ]
        margin = 0.15 * (max(seen) - min(seen)) + 0.002
        plots.log_scale(right, "x", *ends)
        right.set_ylim(min(seen) - margin, max(seen) + margin)
        _legend(right)
    else:
        for axes in (middle, right):
            axes.text(
                0.5, 0.5, "no power law", transform=axes.transAxes, ha="center", color="#777777"
            )
            axes.set(xticks=[], yticks=[])
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


def _draw_parabolas(axes, budgets):
    from matplotlib import colormaps

    for i, budget in enumerate(budgets):
        color = colormaps["viridis"](0.85 * i / max(1, len(budgets) - 1))
        n = np.array(budget["N"])
        label = f"{budget['flops']:.3g} FLOPs" + (" (left out)" if budget["left_out"] else "")
        axes.plot(n, budget["loss"], "o", color=color, markersize=4.5, label=label)
        if budget["coefficients"] is not None:
            along = np.linspace(np.log(n.min()), np.log(n.max()), 100)
            axes.plot(
                np.exp(along),
                np.polyval(budget["coefficients"][::-1], along - budget["center"]),
                color=color,
                linewidth=1.3,
                linestyle="--" if budget["left_out"] else "-",
            )
        if budget["N_opt"] is not None:
            axes.plot(
                budget["N_opt"], budget["val_bpb"], "*", color="#b4541a", markersize=12, zorder=5
            )
    smallest, largest = (end(n for budget in budgets for n in budget["N"]) for end in (min, max))
    plots.log_scale(axes, "x", smallest / 1.2, largest * 1.2, short)
    _legend(axes, columns=2)


def _legend(axes, columns=1):
    """Below the axes, where no curve is."""
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)
