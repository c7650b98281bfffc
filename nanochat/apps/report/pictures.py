"""The curves of a run, drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanochat.run import plots
from nanochat.run.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# readable on white and on dark
BLUE = "#3d7fc4"
ORANGE = "#D55E00"


def draw_loss_picture(figure: "Figure", run: RunRecord) -> None:
    """loss.png: training loss and bits per byte."""
    left, right = figure.subplots(1, 2)
    draw_loss(left, run)
    draw_bpb(right, run)
    # the two are read together, step by step
    right.set_xlim(left.get_xlim())
    left.set_title(f"{run.name}: training")
    right.set_title(f"{run.name}: validation")


# ---- one curve, on axes of its own ----


def draw_steps(axes: "Axes", run: RunRecord, name: str, title: str) -> None:
    """A metric of every step, and smoothed, with its last smoothed value in the corner."""
    x, y = plots.points(run.lines, name)
    axes.set(xlabel="step", ylabel=title)
    if not len(x):
        plots.say(axes, "none")
        return
    # the raw values stay visible behind it, since smoothing alone would hide spikes
    smooth = plots.Curve(x, plots.smoothed(y), None, plots.Look(BLUE, "-"))
    axes.plot(x, y, color=BLUE, linewidth=0.7, alpha=0.35)
    plots.draw_curves(axes, [smooth], labels=False)
    # neither the first steps nor single outliers set the range
    low, high = axes.get_ylim()
    late = y[x >= min(plots.EARLY * x[-1], x[-1])]
    usual_low, usual_high = np.quantile(late, [0.01, 0.99])
    room = 0.1 * (usual_high - usual_low)
    axes.set_ylim(min(low, usual_low - room), max(high, usual_high + room))
    # the smoothed value, since the last step on its own may be an outlier
    last = smooth.y[-1]
    axes.set_title(
        f"{last:,.0f}" if abs(last) >= 1000 else f"{last:#.4g}",
        loc="right",
        color=BLUE,
        fontsize=11,
        fontweight="bold",
    )


def draw_loss(axes: "Axes", run: RunRecord) -> None:
    """Training loss of each step and smoothed."""
    draw_steps(axes, run, "train/loss", "training loss, nats a token")


def draw_bpb(axes: "Axes", run: RunRecord) -> None:
    """Bits per byte of held-out text, next to what compressors reach on the same text."""
    x, y = plots.points(run.lines, "val/bpb")
    axes.set(xlabel="step", ylabel="bits per byte of held-out text")
    if not len(x):
        plots.say(axes, "not evaluated yet")
        return
    axes.plot(x, y, color=ORANGE, marker="o", markersize=3.5, linewidth=1.6)
    # beside the axes, where no curve can cover it
    axes.text(
        1.015,
        y[-1],
        f"{y[-1]:.4f}",
        transform=axes.get_yaxis_transform(),
        va="center",
        color=ORANGE,
        fontweight="bold",
    )
    # two dashes: more compressors than two have never been recorded
    for (name, bits), dash in zip(run.compressed_bpb.items(), ("--", ":"), strict=False):
        axes.axhline(bits, color=plots.GREY, linestyle=dash, linewidth=1.2)
        axes.annotate(
            f"{name} {bits:.2f}",
            (0.005, bits),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(0, 3),
            color=plots.GREY,
            fontsize=9.5,
        )
    axes.margins(y=0.12)
    # evaluations begin after some steps; the axis begins with training
    axes.set_xlim(left=min(0, x[0]))


def draw_rate(axes: "Axes", run: RunRecord) -> None:
    """The learning rate as it is, from zero."""
    x, y = plots.points(run.lines, "train/lr")
    axes.plot(x, y, color=BLUE, linewidth=1.7)
    axes.set(xlabel="step", ylabel="learning rate")
    # a rate is read against 0, to see how far it has decayed
    axes.set_ylim(bottom=0)


def draw_grad_norm(axes: "Axes", run: RunRecord) -> None:
    """The norm of the gradient before clipping."""
    draw_steps(axes, run, "train/grad_norm", "gradient norm")


def draw_speed(axes: "Axes", run: RunRecord) -> None:
    """Tokens a second of all devices."""
    draw_steps(axes, run, "train/tok_per_sec", "tokens a second")


def draw_mfu(axes: "Axes", run: RunRecord) -> None:
    """The share of the hardware's peak that the model's FLOPs are."""
    draw_steps(axes, run, "train/mfu", "model FLOPs utilisation, percent")


# ---- the pictures of a page ----


@dataclass(frozen=True)
class Picture:
    """A picture of the page. metric: without which there is nothing to draw."""

    title: str
    metric: str
    draw: Callable[["Axes", RunRecord], None]


PICTURES = (
    Picture("Training loss", "train/loss", draw_loss),
    Picture("Bits per byte", "val/bpb", draw_bpb),
    Picture("Learning rate of the matrices", "train/lr", draw_rate),
    Picture("Gradient norm", "train/grad_norm", draw_grad_norm),
    Picture("Speed", "train/tok_per_sec", draw_speed),
    Picture("MFU", "train/mfu", draw_mfu),
)
