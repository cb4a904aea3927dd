"""Names in pictures: they keep clear of each other and of points, or stay away."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("matplotlib", reason="the report needs the extra fastcalib[report]")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from fastcalib.report.labels import Labels


def boxes(ax: Axes) -> dict[str, tuple[float, float, float, float]]:
    found = {text.get_text(): text.get_window_extent() for text in ax.texts}
    return {name: (box.x0, box.y0, box.x1, box.y1) for name, box in found.items()}


def test_names_do_not_meet() -> None:
    rng = np.random.default_rng(0)
    figure, ax = plt.subplots(figsize=(4, 3), layout="constrained")
    labels = Labels()
    points = rng.random((40, 2)) ** 3  # crowded in one corner
    for i, (x, y) in enumerate(points):
        ax.plot([x], [y], "o", ms=4)
        labels.add(ax, f"rule {i}", [(x, y)], "black")
    labels.place(figure)
    found = boxes(ax)
    assert 10 < len(found) < 40  # some have no room
    for (x0, y0, x1, y1), (u0, v0, u1, v1) in itertools.combinations(found.values(), 2):
        assert not (x0 < u1 - 0.5 and u0 < x1 - 0.5 and y0 < v1 - 0.5 and v0 < y1 - 0.5)  # half a pixel of rounding
    at = ax.transData.transform(points)
    frame = figure.bbox
    for x0, y0, x1, y1 in found.values():
        assert not ((x0 < at[:, 0]) & (at[:, 0] < x1) & (y0 < at[:, 1]) & (at[:, 1] < y1)).any()
        assert x0 >= frame.x0 and y0 >= frame.y0 and y1 <= frame.y1
    plt.close(figure)


def test_a_name_goes_beside_its_point_and_off_a_line_where_it_can() -> None:
    figure, ax = plt.subplots()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.plot([0.5, 1], [0.5, 0.5])  # to the right of the point
    ax.plot([0.5], [0.5], "o")
    labels = Labels()
    labels.add(ax, "name", [(0.5, 0.5)], "black")
    labels.add(ax, "nowhere", [(np.nan, 0.5)], "black")
    labels.place(figure)
    _, y0, x1, y1 = boxes(ax)["name"]
    x, y = ax.transData.transform((0.5, 0.5))
    assert x1 < x and x - x1 < 12 and y0 < y < y1  # left of it, on its height
    assert set(boxes(ax)) == {"name"}
    plt.close(figure)


def test_a_name_above_a_stroke_is_there_or_nowhere() -> None:
    figure, ax = plt.subplots()
    ax.set(xscale="log", xlim=(1, 100), ylim=(0, 2))
    labels = Labels()
    for x in (10, 10.2, 50):
        ax.plot([x], [1], "|", ms=20)
        labels.add(ax, f"at {x}", [(x, 1)], "black", above=True)
    labels.place(figure)
    found = boxes(ax)
    assert set(found) == {"at 10", "at 50"}
    for name, x in (("at 10", 10), ("at 50", 50)):
        px, py = ax.transData.transform((x, 1))
        x0, y0, x1, _ = found[name]
        assert (x0 + x1) / 2 == pytest.approx(px, abs=2) and y0 > py + 10 * figure.dpi / 72  # clear of half the stroke
    plt.close(figure)
