"""Pictures of runs, drawn by matplotlib's Agg canvas: what `nanochat report` and `nanochat compare` share. Imports no torch.

A curve is a dict: x and y (arrays), sd (of y over seeds, or None), color, dash (a line style).
Matplotlib is imported where a figure is made; its text is never read as formulas, since names of runs are the user's."""

import io
import sys

import numpy as np

from nanochat.common import install_hint

# Okabe and Ito's palette (jfly.uni-koeln.de/color), which colour-blind people can tell apart, without yellow and black, whose
# contrast with a white or a dark page is too low. Twelve curves: each colour as a solid line, then as a dashed one.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (4, 1.6)))
MARKERS, HATCHES = (
    dict(zip(DASHES, "oD", strict=True)),
    dict(zip(DASHES, (None, "////"), strict=True)),
)  # of points and bars
DISTINCT = len(PALETTE) * len(DASHES)
EARLY = 0.08  # share of a curve, at its start, that does not decide the range of the y axis
SMOOTHING_STEPS, SMOOTHING_SHARE = (
    40,
    1 / 25,
)  # steps that a smoothed curve is a mean of: the greater of a number and a share of all
GRID_POINTS = 1000  # of a mean over seeds
DPI = 110
LARGEST = sys.float_info.max  # integers beyond it are no numbers to draw
LONGEST_NAME = 60  # characters of a name below a picture
GREY = "#8a8f98"  # of what is no run: readable on white and on dark
INKS = {
    False: ("#ffffff", "#1d2530", "#8a94a3"),
    True: ("#161b22", "#e6e9ee", "#7d8795"),
}  # dark: (page, text, lines of the frame)


def png(draw, width, height, dark=False):
    """The bytes of a PNG of width x height inches, filled by draw(figure)."""
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
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()


# ---- numbers of a run's lines ----


def number(value):
    """A finite int or float as it is; None for anything else that a damaged file may hold."""
    return (
        value
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
        else None
    )


def points(lines, name, axis="step"):
    """(x, y) arrays of the metrics lines that hold both, ordered by x, one y for an x (the last written)."""
    found = {
        line[axis]: line[name]
        for line in lines
        if number(line.get(axis)) is not None and number(line.get(name)) is not None
    }
    order = sorted(found)
    return np.array(order, dtype=np.float64), np.array([found[x] for x in order], dtype=np.float64)


def smoothed(values):
    """The mean of the steps around each: as many on both sides, so fewer at the start, where a loss falls fast; at the end, where it
    hardly moves, those that there are."""
    n, reach = len(values), max(SMOOTHING_STEPS, int(len(values) * SMOOTHING_SHARE)) // 2
    sums, at = np.concatenate([[0.0], np.cumsum(values)]), np.arange(n)
    reach = np.minimum(reach, at)
    first, after = at - reach, np.minimum(at + reach + 1, n)
    return (sums[after] - sums[first]) / (after - first)


def mean_of(members):
    """(x, mean, standard deviation) of curves [(x, y)] over the x that all of them reach, interpolated; of one curve: itself, None."""
    members = [(x, y) for x, y in members if len(x)]
    if len(members) < 2:
        return (*members[0], None) if members else (np.empty(0), np.empty(0), None)
    low, high = max(x[0] for x, _ in members), min(x[-1] for x, _ in members)
    grid = np.unique(np.concatenate([x for x, _ in members] + [[low, high]]))
    grid = grid[(grid >= low) & (grid <= high)]
    if len(grid) > GRID_POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, GRID_POINTS).astype(int)]
    values = np.stack([np.interp(grid, x, y) for x, y in members])
    return grid, values.mean(axis=0), values.std(axis=0, ddof=1)


# ---- colours ----


def colors_of(depths):
    """A list of {"color", "dash"} for curves of these depths, and the (name, low, high) of the colour map that was used, or None.

    Up to DISTINCT curves are told apart; more are coloured by depth, or in their order where depths hardly tell them apart."""
    if len(depths) <= DISTINCT:
        return [
            {"color": PALETTE[i % len(PALETTE)], "dash": DASHES[i // len(PALETTE)]}
            for i in range(len(depths))
        ], None
    from matplotlib import colormaps

    known = [depth for depth in depths if depth is not None]
    by_depth = 2 * len(set(known)) > len(depths)
    values = (
        [min(known) if depth is None else depth for depth in depths]
        if by_depth
        else list(range(1, len(depths) + 1))
    )
    low, high = min(values), max(values)
    shades = colormaps["viridis"]
    # its last part is too pale on white
    return [
        {"color": shades(0.9 * (value - low) / (high - low)), "dash": "-"} for value in values
    ], ("depth" if by_depth else "run, in the order of the table", low, high)


def add_key(figure, axes, entries, scale, kind="line"):
    """Below all axes: names beside their colours, or the colour bar of colors_of(). entries: [(name, {"color", "dash"})].

    kind: what the picture is made of: "line", "point" (MARKERS) or "bar" (HATCHES)."""
    if scale:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize
        from matplotlib.ticker import MaxNLocator

        name, low, high = scale
        shades = LinearSegmentedColormap.from_list(
            "shades", colormaps["viridis"](np.linspace(0, 0.9, 64))
        )
        figure.colorbar(
            ScalarMappable(Normalize(low, high), shades),
            ax=axes,
            location="bottom",
            shrink=0.4,
            aspect=50,
            pad=0.02,
            label=name,
            ticks=MaxNLocator(integer=True),
        )
    elif entries:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        shapes = {
            "line": lambda look: Line2D(
                [], [], color=look["color"], linestyle=look["dash"], linewidth=2.5
            ),
            "point": lambda look: Line2D(
                [],
                [],
                color=look["color"],
                linestyle="",
                marker=MARKERS[look["dash"]],
                markersize=7,
            ),
            "bar": lambda look: Patch(
                facecolor=look["color"], edgecolor="white", linewidth=0, hatch=HATCHES[look["dash"]]
            ),
        }
        handles = [shapes[kind](look) for _, look in entries]
        # a blank first: matplotlib leaves out what begins with "_"
        shown = [
            " "
            + (
                name
                if len(name) <= LONGEST_NAME
                else f"{name[: LONGEST_NAME // 2]}...{name[-LONGEST_NAME // 2 :]}"
            )
            for name, _ in entries
        ]
        inches = 1.1 + 0.1 * max(
            map(len, shown)
        )  # of an entry: its line, its name, and what lies between
        columns = max(1, min(len(entries), int(figure.get_figwidth() / inches)))
        figure.legend(handles, shown, loc="outside lower center", ncols=columns, handlelength=2.8)


# ---- axes ----


def apart(values, gap, low=0.0, high=1.0):
    """Places for labels at these values, in their order: at least `gap` apart and inside low..high, as far as there is room."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    places = [min(max(values[i], low), high) for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], high - gap * (len(places) - 1 - i))
    out = [0.0] * len(values)
    for i, place in zip(order, places, strict=True):
        out[i] = place
    return out


def range_of(curves):
    """(low, high) of the y axis: all of the curves but their beginnings, which would dwarf the rest; None without any."""
    parts = []
    for curve in curves:
        x, y, sd = curve["x"], curve["y"], curve["sd"]
        if len(x):
            late = x >= min(EARLY * x[-1], x[-1])
            spread = 0 if sd is None else sd[late]
            parts += [(y[late] - spread).min(), (y[late] + spread).max()]
    if not parts:
        return None
    low, high = min(parts), max(parts)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
    return low - room, high + room


def draw_curves(axes, curves, digits=3, marker="", labels=True):
    """Curves with their bands, the y axis fitted to them, and the last values at the right edge."""
    for curve in curves:
        look = {"color": curve["color"]}
        if curve["sd"] is not None:
            axes.fill_between(
                curve["x"],
                curve["y"] - curve["sd"],
                curve["y"] + curve["sd"],
                alpha=0.2,
                linewidth=0,
                **look,
            )
        marked = marker or ("o" if len(curve["x"]) == 1 else "")
        axes.plot(
            curve["x"],
            curve["y"],
            linestyle=curve["dash"],
            linewidth=1.7,
            marker=marked,
            markersize=4,
            **look,
        )
    limits = range_of(curves)
    if limits is None:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center")
        return
    axes.set_ylim(limits)
    shown = [curve for curve in curves if len(curve["x"])]
    if labels and len(shown) <= DISTINCT:
        heights = [(curve["y"][-1] - limits[0]) / (limits[1] - limits[0]) for curve in shown]
        for curve, place in zip(shown, apart(heights, 0.062), strict=True):
            axes.text(
                1.015,
                place,
                f"{curve['y'][-1]:.{digits}f}",
                transform=axes.transAxes,
                color=curve["color"],
                va="center",
                fontsize=10,
                fontweight="bold",
            )


def short_number(value):
    """A tick's number as text: 0.1, 50, 2e15."""
    return (
        f"{value:g}"
        if 1e-4 < abs(value) < 1e5
        else f"{value:.0e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    )


def log_scale(axes, direction, low, high, shown=short_number):
    """Make the x or y axis (direction) logarithmic over low..high, with ticks that are there also where it spans less than a decade.

    shown: what stands at a tick, of its value."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{direction}scale": "log", f"{direction}lim": (low, high)})
    axis = getattr(axes, f"{direction}axis")
    axis.set_major_locator(
        LogLocator(
            10,
            subs=(1, 2, 5) if high < 100 * low else (1, 3) if high < 1000 * low else (1,),
            numticks=12,
        )
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axis.set_minor_formatter(NullFormatter())


def unit_of_time(seconds):
    """(name, seconds of one) of the unit in which times up to this one read best."""
    return next(
        (
            (name, size)
            for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60))
            if seconds >= 2 * size
        ),
        ("seconds", 1),
    )
