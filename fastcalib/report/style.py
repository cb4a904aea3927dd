"""How the pictures look: the page's colours in light, quiet axes, and one chart beside the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

# One a run, as in templates/style.css.
COLOURS = ("#0067A5", "#C04A06", "#007A5A", "#9C3F74", "#7D6200", "#3D5FC4", "#8A3B2F", "#44484D")
INK, GREY = "#1D1F21", "#686D73"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#BDBDB8",
    "axes.labelcolor": "#44484D",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECECE6",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    # Names and tokens are shown as they are: a $ in them is no formula. Text stays text in SVG.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastcalib",
}


def colour(run: int) -> str:
    """The colour of a run."""
    return COLOURS[run % len(COLOURS)]


def facets(
    titles: Sequence[str], size: tuple[float, float] = (3.9, 3.0), columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """One chart a title, ``columns`` beside each other: else at most three, two where there are two or four."""
    columns = columns or (len(titles) if len(titles) <= 3 else 2 if len(titles) == 4 else 3)
    rows = -(-len(titles) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    axes = list(grid.flat)
    for ax in axes[len(titles) :]:
        ax.set_visible(False)
    for ax, title in zip(axes, titles):
        ax.set_title(title)
    return figure, axes[: len(titles)]


def share_axis(ax: Axes, which: str, most: float = 1.0) -> None:
    """From 0 to 100%, the same in every chart; as far as needed where ``most`` of the values is small."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: percents(value)))
    if most <= 0.4:
        (ax.set_xlim if which == "x" else ax.set_ylim)(0, 1.08 * most or 1)
        return
    (ax.set_xlim if which == "x" else ax.set_ylim)(-0.02, 1.03)
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1])


def percents(share: float) -> str:
    """
    >>> percents(0.25), percents(3e-7), percents(0.3 * 3)
    ('25%', '0.00003%', '90%')
    """
    return f"{100 * share:.8f}".rstrip("0").rstrip(".") + "%"


def log_axis(ax: Axes, which: str, share: bool = False) -> None:
    """Logarithmic, its powers of ten written out."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis.set_major_formatter(FuncFormatter(lambda v, _: percents(v) if share else f"{v:,g}"))
    axis.set_minor_formatter(NullFormatter())


def name_runs(figure: Figure, names: Sequence[str]) -> None:
    """The names of several runs, each in its colour, below the charts."""
    if len(names) < 2:
        return
    handles = [Line2D([], [], color=colour(run), lw=2.5) for run in range(len(names))]
    figure.legend(handles, names, loc="outside lower left", ncols=min(len(names), 4))
