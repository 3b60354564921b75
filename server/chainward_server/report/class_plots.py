"""Small pictures of the class-by-class part: reliability diagrams and decision curves, one square each, for any screen."""

from __future__ import annotations

from markupsafe import Markup

from chainward_server.report.class_rows import ModelByClass
from chainward_server.report.colours import ALONE, CHAIN, STUDENT
from chainward_server.report.plots import as_svg, drawing, short
from chainward_shared.evaluation.operating import THRESHOLDS

_SIDE, _MOST_CURVES = 3.4, 8
_MARGINS = {"left": 0.21, "right": 0.95, "top": 0.92, "bottom": 0.17}
"""Of every square alike, so that their axes stand side by side; numbers of up to six characters have their place."""


def reliability_plot(model: ModelByClass) -> Markup | None:
    """How often decisions are right, against their probability; before and after calibration. None without any."""
    if not model.found.as_given:
        return None
    with drawing(f"reliability-{model.kind}", _SIDE, _SIDE, fitted=False) as figure:
        axes = figure.subplots(gridspec_kw=_MARGINS)
        axes.plot([0, 1], [0, 1], color="#8a919c", linewidth=0.9, linestyle=(0, (2, 2)))
        colour = CHAIN if model.kind == "chain" else STUDENT
        for bins, label, style in (
            (model.found.as_given, "as the model says", {"color": ALONE, "marker": "s"}),
            (model.found.as_calibrated, "calibrated", {"color": colour, "marker": "o"}),
        ):
            if bins:
                axes.plot(
                    [one.probability for one in bins],
                    [one.share for one in bins],
                    label=label,
                    linewidth=1.6,
                    markersize=4.5,
                    **style,  # type: ignore[arg-type]
                )
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
