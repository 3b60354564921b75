"""A few test images with their region of interest, and where models look in them: one picture for a report.

Only for images that are on this machine: the picture shows patients.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.evaluation import class_probabilities
from chainward_shared.errors import DataError
from chainward_shared.evaluation.attention_maps import attention_maps
from chainward_shared.evaluation.classification import DECISION
from chainward_shared.evaluation.localisation import score_maps
from chainward_shared.models import Architecture, build_model
from chainward_shared.preprocessing import resized, scaled_for
from chainward_shared.seeds import numpy_generator
from chainward_shared.weights import StateDict

REGION, RIGHT, WRONG = "#00d5ff", "#1d232b", "#c8102e"
STRONGEST = 0.6
"""Opacity of the map where attention is strongest; where there is none the image is left as it is."""
_LONGEST = 26
"""Characters of a line above an image."""
_CELL, _CAPTION, _LABEL, _NOTE = 1.6, 0.36, 0.34, 0.62
"""Inches: side of an image, height of what is written above it, width of the row's name, height of the note."""


@dataclass(frozen=True)
class Example:
    """One test case that may be shown.

    Attributes
    ----------
    site : id of the hospital
    row : position among the site's test images
    labels : indices of the classes that are true of it; multi-label: any number of them
    hits : for each model, whether it classifies the case correctly
    """

    site: str
    row: int
    labels: tuple[int, ...]
    hits: tuple[bool, ...]


def example_figure(
    models: Mapping[str, tuple[Architecture, StateDict]],
    sites: Mapping[str, SiteData],
    *,
    count: int = 6,
    seed: int = 0,
    only_regions: bool = False,
) -> bytes:
    """Draw test images, and below each where every model looks, as a PNG.

    A column is a case, a row is a model. Regions of interest are outlined; where no test image has one, any may be shown, and
    then nothing says whether a model looks at the right place. The cases are drawn at random, by `seed`, evenly over classes,
    hospitals and the last model's right and wrong answers; where a model looks has no say.

    Parameters
    ----------
    models : name -> architecture and weights, in the order of the rows; e.g. "without" and "with" the privileged teacher
    sites : the data of the hospitals, on this machine
    count : cases to show; fewer where there are fewer, or fewer have a region
    only_regions : refuse where no test image has a region

    Raises
    ------
    DataError
        There is no test image, or none has a region and that is asked for.
    """
    built = {name: _built(*model) for name, model in models.items()}
    shown, outlined = _shown(sites, only_regions=only_regions)
    probabilities = {
        site: [_probabilities(model, sites[site]) for model in built.values()]
        for site, rows in shown.items()
        if rows.size
    }
    candidates = [
        example
        for site, found in probabilities.items()
        for example in _candidates(site, sites[site], found, shown[site])
    ]
    if not candidates:
        raise DataError("no site has a test image to show: check the splits of the data")
    chosen = choose(candidates, count, seed)
    with matplotlib.rc_context(
        {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "text.parse_math": False}
    ):
        figure, axes = _canvas(len(chosen), list(built), outlined=outlined)
        for column, example in enumerate(chosen):
            data = sites[example.site]
            case = data.splits["test"].take([example.row])
            masks = case.privileged.masks if outlined else None
            mask = None if masks is None else masks[0].numpy()
            side = case.images.shape[-2:] if mask is None else mask.shape
            _draw(axes[0, column], case, mask)
            truth = ", ".join(data.classes[label] for label in example.labels) or "no finding"
            _write(axes[0, column], truth, example.site)
            for row, (model, size) in enumerate(built.values(), start=1):
                map_ = attention_maps(model, scaled_for(model, resized(case.images, size)), size=(side[0], side[1]))
                _draw(axes[row, column], case, mask, map_[0].numpy())
                answer = _answer(probabilities[example.site][row - 1][example.row], data.classes)
                lift = "" if masks is None else f"lift {float(score_maps(map_, masks).lift[0]):.1f}×"
                hit = example.hits[row - 1]
                _write(axes[row, column], f"{answer} {'✓' if hit else '✗'}", lift, hit)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _shown(sites: Mapping[str, SiteData], *, only_regions: bool) -> tuple[dict[str, np.ndarray], bool]:
    """Return which rows of every site's test images may be shown, and whether they are those with a region."""
    tests = {site: data.splits["test"] for site, data in sites.items()}
    regions = {site: _regions(cases) for site, cases in tests.items()}
    if any(rows.size for rows in regions.values()):
        return regions, True
    if only_regions:
        raise DataError("no test image has a region of interest to show: give masks or boxes in the data file")
    return {site: np.arange(len(cases)) for site, cases in tests.items()}, False


def choose(candidates: list[Example], count: int, seed: int) -> list[Example]:
    """Return `count` examples, spread over classes, sites, and hits and misses of the last model; in order of class.

    They are taken one by one in random order: each time one whose class, site and outcome were taken least so far.
    """
    order = numpy_generator(seed, "examples").permutation(len(candidates))
    waiting = [candidates[index] for index in order]
    taken: Counter[tuple[str, object]] = Counter()
    chosen: list[Example] = []

    def traits(example: Example) -> tuple[tuple[str, object], ...]:
        return ("class", example.labels), ("site", example.site), ("hit", example.hits[-1])

    while waiting and len(chosen) < count:
        example = min(waiting, key=lambda candidate: sum(taken[trait] for trait in traits(candidate)))
        waiting.remove(example)
        taken.update(traits(example))
        chosen.append(example)
    return sorted(chosen, key=lambda example: (example.labels, example.site, example.row))


def _built(architecture: Architecture, state: StateDict) -> tuple[torch.nn.Module, int]:
    model = build_model(architecture, seed=0)
    model.load_state_dict(state)
    return model.eval(), architecture.image_size


def _probabilities(model: tuple[torch.nn.Module, int], data: SiteData) -> np.ndarray:
    threads = torch.get_num_threads()
    return class_probabilities(model[0], data.splits["test"], len(data.classes), threads, image_size=model[1])


def _regions(cases: Cases) -> np.ndarray:
    """Return the rows of the cases that have a region of interest, int64 (n,)."""
    masks = cases.privileged.masks
    if masks is None:
        return np.zeros(0, dtype=np.int64)
    shares = masks.flatten(1).float().mean(dim=1)
    found: np.ndarray = torch.nonzero((shares > 0) & (shares < 1)).flatten().numpy()
    return found


def _candidates(site: str, data: SiteData, probabilities: list[np.ndarray], rows: np.ndarray) -> list[Example]:
    truth = data.splits["test"].labels.numpy()
    labels: list[tuple[int, ...]]
    if truth.ndim == 1:
        labels = [(int(label),) for label in truth]
        hits = [found.argmax(axis=1) == truth for found in probabilities]
    else:
        labels = [tuple(np.flatnonzero(row).tolist()) for row in truth]
        hits = [((found >= DECISION) == (truth > 0)).all(axis=1) for found in probabilities]
    return [Example(site, row, labels[row], tuple(bool(hit[row]) for hit in hits)) for row in rows.tolist()]


def _answer(probabilities: np.ndarray, classes: tuple[str, ...]) -> str:
    best = int(probabilities.argmax())
    return f"{classes[best]} {100 * probabilities[best]:.0f} %"


def _canvas(columns: int, models: list[str], *, outlined: bool) -> tuple[Figure, np.ndarray]:
    rows = 1 + len(models)
    width = max(_LABEL + columns * _CELL, 6.5)
    height = rows * (_CELL + _CAPTION) + _NOTE
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = np.empty((rows, columns), dtype=object)
    for row, name in enumerate(["image", *models]):
        bottom = _NOTE + (rows - 1 - row) * (_CELL + _CAPTION)
        for column in range(columns):
            left = _LABEL + column * _CELL
            box = (left / width, bottom / height, (_CELL - 0.06) / width, _CELL / height)
            axes[row, column] = figure.add_axes(box)
            axes[row, column].set_axis_off()
        middle = (bottom + _CELL / 2) / height
        figure.text(0.06 / width, middle, name, rotation=90, va="center", fontsize=9, fontweight="bold", color=RIGHT)
    outline = "Blue outline: the marked region." if outlined else "No region is marked in these images."
    lift = " Lift: attention inside the region, times chance." if outlined else ""
    note = (
        f"{outline} Colour: the model's attention, from none (clear) to its strongest (yellow).\n"
        f"Above a map: the class that the model predicts, its probability, ✓ right or ✗ wrong.{lift}\n"
        "Cases drawn at random over classes, hospitals, right and wrong answers."
    )
    figure.text(_LABEL / width, (_NOTE - 0.08) / height, note, va="top", fontsize=6.5, color="#414a55", wrap=True)
    return figure, axes


def _draw(axes: Axes, case: Cases, mask: np.ndarray | None, map_: np.ndarray | None = None) -> None:
    pixels = case.images[0].permute(1, 2, 0).numpy()
    if pixels.shape[2] == 3:
        axes.imshow(pixels, interpolation="bilinear")
    else:
        axes.imshow(pixels[:, :, 0], cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    if map_ is not None:
        axes.imshow(map_, cmap="inferno", vmin=0, vmax=1, alpha=STRONGEST * map_, interpolation="bilinear")
    if mask is None:
        return
    extent = (-1, mask.shape[1], -1, mask.shape[0])  # the centres of the outermost pixels, padded by one
    outline = axes.contour(np.pad(mask, 1), levels=[0.5], colors=REGION, linewidths=1.1, extent=extent)
    outline.set_path_effects([withStroke(linewidth=2.0, foreground="black", alpha=0.5)])
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)


def _write(axes: Axes, first: str, second: str, right: bool = True) -> None:
    for line, text, colour in ((0.165, first, RIGHT if right else WRONG), (0.04, second, "#414a55")):
        axes.annotate(
            text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…",
            (0, 1),
            (0, 72 * line),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=7.5 if colour != "#414a55" else 6.5,
            color=colour,
        )
