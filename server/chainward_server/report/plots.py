"""Pictures of the report: matplotlib drawings as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from chainward_server.report.colours import ALONE, CHAIN, STRAND_COLOURS, STRAND_MARKERS, STUDENT
from chainward_shared.evaluation.operating import THRESHOLDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from chainward_server.report.class_rows import ModelByClass
    from chainward_server.report.tables import Alone, ChainLink, ComparisonRow

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False,  # a "$" in a site's name is a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a919c",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.7,
    "text.color": "#1d232b",
    "axes.labelcolor": "#1d232b",
    "xtick.color": "#414a55",
    "ytick.color": "#1d232b",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_SMALL: dict[str, Any] = {"fontsize": 7.5, "color": "#5b6470"}
_WIDTH = 10.5
"""Inches; the page shows a picture at its full width, so this sets the size of the letters."""
_SIDE, _MOST_CURVES = 3.4, 8
_MARGINS = {"left": 0.21, "right": 0.95, "top": 0.92, "bottom": 0.17}
"""Of every square alike, so that their axes stand side by side; numbers of up to six characters have their place."""


def comparison_plot(rows: Sequence[ComparisonRow], chance: float | None) -> Markup | None:
    """Bars of alone, chain and student per set of test images, for balanced accuracy and macro AUC.

    `chance`: balanced accuracy of guessing. None where there is nothing to draw.
    """
    arms = [
        (index, label, colour)
        for index, label, colour in (
            (0, "Hospital alone (pooled: mean of the hospitals)", ALONE),
            (1, "Chain", CHAIN),
            (2, "Compact student", STUDENT),
        )
        if any(row.scores[metric][index] is not None for row in rows for metric in ("balanced_accuracy", "macro_auc"))
    ]
    if not arms:
        return None
    rows = [rows[-1], *rows[:-1]]
    slots = len(arms) + 0.9
    with drawing("comparison", 0.75 + 0.155 * slots * len(rows)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        panel_facts = (("balanced_accuracy", "Balanced accuracy", chance), ("macro_auc", "Macro AUC", 0.5))
        for axes, (metric, title, guess) in zip(panels, panel_facts, strict=True):
            for order, (index, label, colour) in enumerate(arms):
                values = [row.scores[metric][index] for row in rows]
                heights = [group * slots + order for group in range(len(rows))]
                axes.barh(heights, [value or 0 for value in values], 0.86, color=colour, label=label)
                for height, value in zip(heights, values, strict=True):
                    text = "–" if value is None else f"{value:.3f}"
                    axes.text((value or 0) + 0.012, height, text, va="center", fontsize=7.5)
            if guess is not None:
                axes.axvline(guess, color="#1d232b", linewidth=0.9, linestyle=(0, (2, 2)))
                axes.set_xlabel(f"dotted: guessing ({guess:.3f})", loc="left", **_SMALL)
            axes.axhline(slots - 0.95, color="#8a919c", linewidth=0.8)
            axes.set_xlim(0, 1.1)
            axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
            axes.grid(axis="x")
            axes.tick_params(length=0)
            axes.spines["left"].set_visible(False)
            axes.spines["bottom"].set_visible(False)
            axes.set_title(title)
        middle = (len(arms) - 1) / 2
        panels[0].set_yticks([group * slots + middle for group in range(len(rows))], [short(row.label) for row in rows])
        panels[0].get_yticklabels()[0].set_fontweight("bold")
        panels[0].set_ylim(len(rows) * slots - 0.9, -0.8)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        return as_svg(figure, "comparison")


def curve_plot(strands: Sequence[Sequence[ChainLink]], alone: Alone | None, alone_auc: Alone | None) -> Markup | None:
    """Pooled test balanced accuracy and macro AUC after each link, a curve per strand; None without any."""
    if not any(link.pooled for links in strands for link in links):
        return None
    with drawing("curve", 5.4) as figure:
        panels = figure.subplots(2, 1, sharex=True)
        panel_facts = (("balanced_accuracy", "Balanced accuracy", alone), ("macro_auc", "Macro AUC", alone_auc))
        for axes, (metric, title, reference) in zip(panels, panel_facts, strict=True):
            _curves(axes, strands, metric)
            if reference:
                axes.axhline(reference.mean, color="#5b6470", linewidth=1.2, label="Alone, mean")
                axes.axhline(reference.best, color="#5b6470", linewidth=1.2, linestyle=(0, (4, 2)), label="Alone, best")
            _mark_laps_and_gaps(axes, strands)
            axes.grid(axis="y")
            axes.tick_params(length=0)
            axes.margins(y=0.16)
            axes.set_title(title)
        _name_links(panels[1], strands)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 6))
        return as_svg(figure, "curve")


def _curves(axes: Axes, strands: Sequence[Sequence[ChainLink]], metric: str) -> None:
    """Draw a curve for each strand; a single short one has its figures beside the points."""
    for index, links in enumerate(strands):
        points = [
            (link.number, value)
            for link in links
            if link.pooled and (value := getattr(link.pooled, metric)) is not None
        ]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=STRAND_COLOURS[index % len(STRAND_COLOURS)],
            marker=STRAND_MARKERS[index % len(STRAND_MARKERS)],
            linewidth=2,
            markersize=5.5,
            label=f"Strand {index + 1}" if len(strands) > 1 else "Chain, after each link",
        )
        if len(strands) == 1 and len(points) <= 12:
            for x, y in points:
                axes.annotate(
                    f"{y:.3f}",
                    (x, y),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )


def _name_links(axes: Axes, strands: Sequence[Sequence[ChainLink]]) -> None:
    """Number the links below the lower panel, and name their sites where there is one strand."""
    longest = max(strands, key=len)
    names = [link.record.site for link in longest]
    axes.set_xlim(0.4, len(longest) + 0.6)
    if len(strands) > 1:
        axes.set_xticks([link.number for link in longest])
        axes.set_xlabel("link of the strand")
        return
    steep = len(names) > 7 or max(map(len, names)) > 11
    axes.set_xticks(
        [link.number for link in longest],
        [f"{link.number}  {short(link.record.site)}" for link in longest],
        rotation=38 if steep else 0,
        ha="right" if steep else "center",
        rotation_mode="anchor",
    )


def _mark_laps_and_gaps(axes: Axes, strands: Sequence[Sequence[ChainLink]]) -> None:
    longest = max(strands, key=len)
    for before, after in pairwise(longest):
        if before.lap != after.lap:
            axes.axvline(before.number + 0.5, color="#8a919c", linewidth=0.9, linestyle=(0, (1, 2)))
    laps = {link.lap: link.number for link in reversed(longest)}
    if len(laps) > 1:
        for lap, number in laps.items():
            axes.text(number - 0.45, 0.03, f"lap {lap}", transform=axes.get_xaxis_transform(), **_SMALL)
    if len(strands) == 1:
        for link in longest:
            if link.pooled is None:
                axes.axvspan(link.number - 0.4, link.number + 0.4, color="#eef0f3", zorder=0)
                upright: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center"}
                axes.text(
                    link.number, 0.5, link.record.status, transform=axes.get_xaxis_transform(), **upright, **_SMALL
                )


def reliability_plot(model: ModelByClass) -> Markup | None:
    """How often decisions are right, against their probability; before and after calibration. None without any."""
    if not model.found.as_given:
        return None
    with drawing(f"reliability-{model.kind}", _SIDE, _SIDE, fitted=False) as figure:
        axes = figure.subplots(gridspec_kw=_MARGINS)
        axes.plot([0, 1], [0, 1], color="#8a919c", linewidth=0.9, linestyle=(0, (2, 2)))
        for bins, label, colour, marker in (
            (model.found.as_given, "as the model says", ALONE, "s"),
            (model.found.as_calibrated, "calibrated", CHAIN if model.kind == "chain" else STUDENT, "o"),
        ):
            if bins:
                x, y = [one.probability for one in bins], [one.share for one in bins]
                axes.plot(x, y, label=label, color=colour, marker=marker, linewidth=1.6, markersize=4.5)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("probability")
        axes.set_ylabel("how often it is so")
        axes.grid()
        axes.legend(loc="upper left")
        axes.set_title(f"Reliability: {model.label.lower()}")
        return as_svg(figure, f"reliability-{model.kind}")


def decision_plots(model: ModelByClass) -> list[Markup]:
    """The decision curve of each class, at most eight of those with the most test images."""
    rows = [(row, curve) for row, curve in zip(model.rows, model.found.net_benefit, strict=False) if not row.few]
    rows = sorted(rows, key=lambda one: -one[0].decided.cases)[:_MOST_CURVES]
    pictures = []
    for number, (row, curve) in enumerate(rows):
        share = row.decided.cases / (row.decided.cases + row.decided.others)
        everyone = [share - (1 - share) * at / (1 - at) for at in THRESHOLDS]
        with drawing(f"decision-{model.kind}-{number}", 2.7, _SIDE, fitted=False) as figure:
            axes = figure.subplots(gridspec_kw=_MARGINS)
            axes.axhline(0, color="#8a919c", linewidth=1, label="act on none")
            axes.plot(THRESHOLDS, everyone, color="#8a919c", linewidth=1, linestyle=(0, (3, 2)), label="act on all")
            colour = CHAIN if model.kind == "chain" else STUDENT
            axes.plot(THRESHOLDS, curve, color=colour, linewidth=1.8, label="act on the model")
            axes.set_ylim(-0.15 * share, 1.12 * share)
            axes.set_xlim(0, 1)
            axes.set_xlabel("acts from this probability on")
            axes.set_ylabel("net benefit")
            axes.grid()
            axes.legend(loc="upper right", fontsize=7)
            axes.set_title(short(row.name))
            pictures.append(as_svg(figure, f"decision-{model.kind}-{number}"))
    return pictures


def short(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"


@contextmanager
def drawing(name: str, height: float, width: float = _WIDTH, *, fitted: bool = True) -> Iterator[Figure]:
    """Hand out an empty drawing in the page's style; `height` and `width` in inches, the default that of the page.

    `fitted`: its margins are made for what stands in them, which takes two thirds of the time of a small drawing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        yield Figure(figsize=(width, height), layout="constrained" if fitted else None)


def as_svg(figure: Figure, name: str) -> Markup:
    """The drawing as an SVG element that scales with the page. `name` keeps its ids apart from others'."""
    buffer, none = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    return Markup(text)  # matplotlib escapes every text it draws
