"""Pictures of runs, drawn by matplotlib's Agg canvas, for `nanochat report`, `compare` and `sweep`.

Matplotlib is imported where a figure is made, and never reads a text as a formula, since the names
of runs are the user's. Imports no torch."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat.common import install_hint
from nanochat.run.records import finite_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (jfly.uni-koeln.de/color), which colour-blind people can tell apart,
# without yellow and black, whose contrast with a white or a dark page is too low.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# twelve curves: each colour as a solid line, then as a dashed one
DASHES = ("-", (0, (4, 1.6)))
MARKERS = dict(zip(DASHES, "oD", strict=True))
HATCHES = dict(zip(DASHES, (None, "////"), strict=True))
DISTINCT = len(PALETTE) * len(DASHES)
# for what is not a run: readable on white and on dark
GREY = "#8a8f98"
# (page, text, frame) colours, by whether the page is dark
INKS = {
    False: ("#ffffff", "#1d2530", "#8a94a3"),
    True: ("#161b22", "#e6e9ee", "#7d8795"),
}
DPI = 110
# share of a curve, at its start, that does not decide the range of the y axis
EARLY = 0.08
# a smoothed value is the mean of so many steps, or of this share of all steps if that is more
SMOOTHING_STEPS = 40
SMOOTHING_SHARE = 1 / 25
# points of a mean over seeds
GRID_POINTS = 1000
# characters of a name below a picture
LONGEST_NAME = 60


@dataclass(frozen=True)
class Look:
    """How a run is drawn: its colour, and the dash of its lines (one of DASHES)."""

    color: Any
    dash: Any


@dataclass(frozen=True)
class ColorScale:
    """The meaning of colours where there are too many curves to tell apart: a value's name and
    its range."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A line of a picture: (n,) arrays x and y; sd: the standard deviation of y, or None."""

    x: np.ndarray
    y: np.ndarray
    sd: np.ndarray | None
    look: Look

    def where(self, kept: np.ndarray) -> "Curve":
        """The points that a (n,) array of bools keeps."""
        sd = None if self.sd is None else self.sd[kept]
        return Curve(self.x[kept], self.y[kept], sd, self.look)


def png(draw: Callable[["Figure"], None], width: float, height: float, dark: bool = False) -> bytes:
    """A PNG of width x height inches that draw(figure) fills. UsageError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise install_hint("matplotlib", "drawing pictures") from None
    page, text, frame = INKS[dark]
    style = {
        "figure.facecolor": page,
        "axes.facecolor": page,
        "text.color": text,
        "axes.labelcolor": text,
        "axes.edgecolor": frame,
        "xtick.color": text,
        "ytick.color": text,
        "grid.color": frame,
        "grid.alpha": 0.25,
        "axes.grid": True,
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "axes.axisbelow": True,
        "text.parse_math": False,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(style):
        # pyplot would keep every figure and look for a display
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()


# ---- numbers of a run's lines ----


def points(lines: Sequence[dict], name: str, axis: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """(x, y) float64 arrays of the metrics lines that hold both, ordered by x.

    Of several lines with the same x the last one counts."""
    found = {
        line[axis]: line[name]
        for line in lines
        if finite_number(line.get(axis)) is not None and finite_number(line.get(name)) is not None
    }
    # a resumed run writes some steps again, later in the file
    order = sorted(found)
    return np.array(order, dtype=np.float64), np.array([found[x] for x in order], dtype=np.float64)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of the steps around each step.

    At the start, where a loss falls fast, only as many steps after it as there are before it; at
    the end, where it hardly moves, whatever steps exist."""
    n = len(values)
    # differences of running sums: one pass, however wide the mean is
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(n)
    reach = np.minimum(max(SMOOTHING_STEPS, int(n * SMOOTHING_SHARE)) // 2, at)
    first = at - reach
    after = np.minimum(at + reach + 1, n)
    return (sums[after] - sums[first]) / (after - first)


def mean_of(
    members: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(x, mean, standard deviation) of curves (x, y), interpolated over the x that all of them
    reach. A single curve is returned as it is, without a deviation."""
    members = [(x, y) for x, y in members if len(x)]
    if not members:
        return np.empty(0), np.empty(0), None
    if len(members) == 1:
        return (*members[0], None)
    low = max(x[0] for x, _ in members)
    high = min(x[-1] for x, _ in members)
    grid = np.unique(np.concatenate([x for x, _ in members] + [[low, high]]))
    grid = grid[(grid >= low) & (grid <= high)]
    if len(grid) > GRID_POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, GRID_POINTS).astype(int)]
    values = np.stack([np.interp(grid, x, y) for x, y in members])
    return grid, values.mean(axis=0), values.std(axis=0, ddof=1)


# ---- colours ----


def looks_of(depths: Sequence[int | None]) -> tuple[list[Look], ColorScale | None]:
    """A Look for each curve of these depths, and the scale of their colours, if they are on one.

    Up to DISTINCT curves can be told apart. More are coloured by depth, or by their order if most
    depths occur more than once."""
    if len(depths) <= DISTINCT:
        looks = [
            Look(PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE)]) for i in range(len(depths))
        ]
        return looks, None
    from matplotlib import colormaps

    known = [depth for depth in depths if depth is not None]
    if 2 * len(set(known)) > len(depths):
        name = "depth"
        values = [min(known) if depth is None else depth for depth in depths]
    else:
        name = "run, in the order of the table"
        values = list(range(1, len(depths) + 1))
    scale = ColorScale(name, min(values), max(values))
    shades = colormaps["viridis"]
    # the last part of the map is too pale on white
    looks = [
        Look(shades(0.9 * (value - scale.low) / (scale.high - scale.low)), "-") for value in values
    ]
    return looks, scale


def add_key(
    figure: "Figure",
    axes: Sequence["Axes"],
    entries: Sequence[tuple[str, Look]],
    scale: ColorScale | None,
    kind: str = "line",
) -> None:
    """Below all axes: the names beside their looks, or the bar of a colour scale.

    kind: what the picture is made of: "line", "point" (MARKERS) or "bar" (HATCHES)."""
    if scale:
        _add_color_bar(figure, axes, scale)
    elif entries:
        handles = [_handle(look, kind) for _, look in entries]
        # a blank first: matplotlib leaves out names that begin with "_"
        shown = [f" {_cut(name)}" for name, _ in entries]
        # an entry is its line, its name, and the space between
        inches = 1.1 + 0.1 * max(map(len, shown))
        columns = max(1, min(len(entries), int(figure.get_figwidth() / inches)))
        figure.legend(handles, shown, loc="outside lower center", ncols=columns, handlelength=2.8)


def _cut(name: str) -> str:
    """A name with its middle left out if it is too long."""
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 2]}...{name[-LONGEST_NAME // 2 :]}"


def _handle(look: Look, kind: str) -> Any:
    """What stands before a name in the key."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if kind == "line":
        return Line2D([], [], color=look.color, linestyle=look.dash, linewidth=2.5)
    if kind == "point":
        marker = MARKERS[look.dash]
        return Line2D([], [], color=look.color, linestyle="", marker=marker, markersize=7)
    return Patch(facecolor=look.color, edgecolor="white", linewidth=0, hatch=HATCHES[look.dash])


def _add_color_bar(figure: "Figure", axes: Sequence["Axes"], scale: ColorScale) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    shades = LinearSegmentedColormap.from_list(
        "shades", colormaps["viridis"](np.linspace(0, 0.9, 64))
    )
    figure.colorbar(
        ScalarMappable(Normalize(scale.low, scale.high), shades),
        ax=axes,
        location="bottom",
        shrink=0.4,
        aspect=50,
        pad=0.02,
        label=scale.name,
        ticks=MaxNLocator(integer=True),
    )


# ---- axes ----


def apart(values: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Places for labels at these values, in their order: inside low..high and at least `gap` apart,
    or closer if there is not enough room."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    places = [min(max(values[i], low), high) for i in order]
    # upwards to make room, then downwards to bring back what was pushed out at the top
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], high - gap * (len(places) - 1 - i))
    out = [0.0] * len(values)
    for i, place in zip(order, places, strict=True):
        out[i] = place
    return out


def range_of(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """(low, high) of the y axis; None without any points.

    It holds all of the curves but their beginnings, which would dwarf the rest."""
    ends = []
    for curve in curves:
        if len(curve.x):
            late = curve.x >= min(EARLY * curve.x[-1], curve.x[-1])
            spread = 0 if curve.sd is None else curve.sd[late]
            ends += [(curve.y[late] - spread).min(), (curve.y[late] + spread).max()]
    if not ends:
        return None
    low = min(ends)
    high = max(ends)
    # a level curve has no range of its own
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
    return low - room, high + room


def draw_curves(
    axes: "Axes",
    curves: Sequence[Curve],
    digits: int = 3,
    marker: str = "",
    labels: bool = True,
) -> None:
    """Curves with their bands, the y axis fitted to them, and the last values at the right edge."""
    for curve in curves:
        if curve.sd is not None:
            axes.fill_between(
                curve.x,
                curve.y - curve.sd,
                curve.y + curve.sd,
                alpha=0.2,
                linewidth=0,
                color=curve.look.color,
            )
        # a line through one point cannot be seen
        alone = "o" if len(curve.x) == 1 else ""
        axes.plot(
            curve.x,
            curve.y,
            linestyle=curve.look.dash,
            linewidth=1.7,
            marker=marker or alone,
            markersize=4,
            color=curve.look.color,
        )
    limits = range_of(curves)
    if limits is None:
        say(axes, "none")
        return
    axes.set_ylim(limits)
    shown = [curve for curve in curves if len(curve.x)]
    if labels and len(shown) <= DISTINCT:
        heights = [(curve.y[-1] - limits[0]) / (limits[1] - limits[0]) for curve in shown]
        for curve, place in zip(shown, apart(heights, 0.062), strict=True):
            axes.text(
                1.015,
                place,
                f"{curve.y[-1]:.{digits}f}",
                transform=axes.transAxes,
                color=curve.look.color,
                va="center",
                fontsize=10,
                fontweight="bold",
            )


def say(axes: "Axes", text: str) -> None:
    """A word in the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")


def short_number(value: float) -> str:
    """A tick's number as text: 0.1, 50, 2e15."""
    if 1e-4 < abs(value) < 1e5:
        return f"{value:g}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def log_scale(
    axes: "Axes",
    direction: str,
    low: float,
    high: float,
    shown: Callable[[float], str] = short_number,
) -> None:
    """Make the x or y axis (direction) logarithmic over low..high, with the ticks' texts `shown`.

    It has ticks even where it spans less than a decade, where matplotlib's own has none."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{direction}scale": "log", f"{direction}lim": (low, high)})
    if high < 100 * low:
        steps = (1, 2, 5)
    elif high < 1000 * low:
        steps = (1, 3)
    else:
        steps = (1,)
    axis = getattr(axes, f"{direction}axis")
    axis.set_major_locator(LogLocator(10, subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axis.set_minor_formatter(NullFormatter())


def unit_of_time(seconds: float) -> tuple[str, int]:
    """(name, seconds of one) of the unit in which times up to this one read best."""
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return name, size
    return "seconds", 1
