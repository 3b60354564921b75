"""The curve of a run so far, as points of a small drawing that the page's template makes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chainward_server.watch.snapshot import Snapshot, validation

HEIGHT = 230
LEFT, RIGHT, TOP, BOTTOM = 42, 52, 22, 34
MOST_LABELS = 8
LETTER = 9
"""Units of the width that a letter takes, about."""


@dataclass(frozen=True)
class Point:
    """A scored model: where it is drawn, what it reached, and its label, empty where there is no room for one."""

    x: float
    y: float
    value: str
    name: str
    kind: str


@dataclass(frozen=True)
class Curve:
    """All points, in the order in which the models came; `levels`: height and text of the grid's lines."""

    width: int
    height: int
    points: list[Point]
    levels: list[tuple[float, str]]

    def path(self, kind: str) -> str:
        """Return the points of one kind as an SVG polyline has them."""
        return " ".join(f"{point.x},{point.y}" for point in self.points if point.kind == kind)


def curve_of(run: Snapshot, width: int) -> Curve | None:
    """Return the validation balanced accuracy after each link and round, `width` units wide; None before the first."""
    found: list[tuple[float, str, str]] = []
    for link in run.links:
        if (value := validation(link)) is not None:
            found.append((value, link.site, "chain"))
    for round_ in run.rounds:
        if (value := validation(round_)) is not None:
            found.append((value, f"round {round_.round}", "student"))
    if not found:
        return None
    values = [value for value, _, _ in found]
    low = max(0.0, math.floor(10 * (min(values) - 0.05)) / 10)
    high = min(1.0, math.ceil(10 * (max(values) + 0.05)) / 10)
    inner = HEIGHT - TOP - BOTTOM

    def height(value: float) -> float:
        return round(TOP + inner * (1 - (value - low) / (high - low)), 1)

    step = (width - LEFT - RIGHT) / max(1, len(found) - 1)
    every = max(1, math.ceil(len(found) / (MOST_LABELS if width > 500 else 3)))
    letters = max(12, int(step * every / LETTER))
    points = []
    for index, (value, name, kind) in enumerate(found):
        told = index % every == 0 or index == len(found) - 1
        shown = name if len(name) <= letters else name[: letters - 1] + "…"
        points.append(
            Point(
                round(LEFT + index * step, 1),
                height(value),
                f"{value:.3f}" if told else "",
                shown if told and (index == len(found) - 1 or len(found) - 1 - index >= every / 2) else "",
                kind,
            )
        )
    count = round(10 * (high - low))
    tenths = range(0, count + 1, 1 if count <= 5 else 2)
    return Curve(width, HEIGHT, points, [(height(low + tenth / 10), f"{low + tenth / 10:.1f}") for tenth in tenths])
