"""Names beside the points and lines of a picture, clear of each other, of the points, if they can of the lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
# left, bottom, right, top, in pixels
Box = tuple[float, float, float, float]
GAP = 5.0  # from a point to its name, in points of type
TALL = 12.0  # the same above the strokes of ranks
DESCENT = 0.2  # of the height of a line of text, below its baseline: a position is that of the baseline


@dataclass
class _Label:
    ax: Axes
    text: str
    points: Points
    colour: str
    above: bool


@dataclass
class Labels:
    """What is to be named in one figure; :meth:`place` does it, once everything else is drawn."""

    size: float = 7.0
    wanted: list[_Label] = field(default_factory=list)

    def add(self, ax: Axes, text: str, points: Points, colour: str, above: bool = False) -> None:
        """A name for the first of some points that has room, at whichever side; or above it and nowhere else."""
        self.wanted.append(_Label(ax, text, [p for p in points if np.isfinite(p).all()], colour, above))

    def place(self, figure: Figure) -> None:
        """Put the names into the figure; one that finds no room stays away."""
        figure.draw_without_rendering()  # nothing has a place in pixels before
        for ax in dict.fromkeys(label.ax for label in self.wanted):
            taken, lines = _drawn(ax)
            for label in self.wanted:
                if label.ax is ax and (box := self._put(label, taken, lines)):
                    taken.append(box)

    def _put(self, label: _Label, taken: list[Box], lines: np.ndarray) -> Box | None:
        ax = label.ax
        if not label.points:
            return None
        text = ax.annotate(
            label.text,
            label.points[0],
            (0, 0),
            textcoords="offset points",
            size=self.size,
            color=label.colour,
            zorder=5,
        )
        text.set_in_layout(False)  # the layout has been made, and this must not move it
        extent = text.get_window_extent()
        width, height = extent.width, extent.height
        room = ax.get_window_extent()
        frame = (room.x0 - 2, room.y0 - 2, room.x1 + 0.04 * room.width, room.y1 + height + 4)
        scale = ax.figure.dpi / 72
        free = []
        for point in label.points:
            x, y = ax.transData.transform(point)
            for left, bottom in _around(x, y, width, height, scale, label.above):
                box = (left, bottom, left + width, bottom + height)
                inside = frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
                if inside and not any(_meet(box, other) for other in taken):
                    free.append((point, (left - x) / scale, (bottom - y) / scale, box))
        if not free:
            text.remove()
            return None
        point, dx, dy, box = next((spot for spot in free if not _crossed(spot[3], lines)), free[0])
        text.xy = point
        text.set_position((dx, dy + DESCENT * height / scale))
        return box


def _around(x: float, y: float, width: float, height: float, scale: float, above: bool) -> list[tuple[float, float]]:
    """Lower left corners to try, the best first."""
    centre = x - width / 2
    if above:
        return [(centre, y + TALL * scale)]
    gap = GAP * scale
    right, left, middle = x + gap, x - gap - width, y - height / 2
    over, under = y + gap, y - gap - height
    return [(right, middle), (left, middle), (centre, over), (centre, under), (right, over), (right, under),
            (left, over), (left, under)]  # fmt: skip


def _drawn(ax: Axes) -> tuple[list[Box], np.ndarray]:
    """Boxes of the lone points of the axes, and places along its lines, (n, 2), all in pixels."""
    boxes, along = [], [np.empty((0, 2))]
    for line in ax.get_lines():
        at = line.get_transform().transform(np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float))
        at = at[np.isfinite(at).all(1)]
        if line.get_linestyle() in ("None", "", " ") or len(at) == 1:
            boxes += [(x - 3, y - 3, x + 3, y + 3) for x, y in at.tolist()]
        else:
            steps = np.linspace(0, 1, 12)[:, None, None]
            along.append((at[:-1] + steps * np.diff(at, axis=0)).reshape(-1, 2))
    return boxes, np.concatenate(along)


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crossed(box: Box, lines: np.ndarray) -> bool:
    x, y = lines.T
    return bool(((box[0] < x) & (x < box[2]) & (box[1] < y) & (y < box[3])).any())
