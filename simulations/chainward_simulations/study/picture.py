"""A study's pictures: one dot per seed and arm, mean and spread; and where chains look without and with privileged teachers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from chainward_shared.errors import DataError
from chainward_simulations.examples import example_figure
from chainward_simulations.study.configured_arms import ConfiguredArm
from chainward_simulations.study.results import StudyResult
from chainward_simulations.study.store import StudyFolder, chain_file, load_chain
from chainward_simulations.study.workers import open_sites

_PANELS = (("balanced_accuracy", "balanced accuracy"), ("macro_auc", "macro AUC"))
_INK, _DOT, _LINE = "#1d232b", "#1f4e8c", "#d55e00"


def study_picture(result: StudyResult, title: str) -> bytes:
    """Return a PNG: per arm a dot for each seed, and the mean with two standard errors to either side."""
    arms = result.arms
    style: dict[Any, Any] = {
        "text.parse_math": False,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 1.3 + 0.36 * len(arms)), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_INK)
        axes = figure.subplots(1, len(_PANELS), sharey=True, squeeze=False)[0]
        for panel, (metric, name) in zip(axes, _PANELS, strict=True):
            reference = next((arm for arm in arms if arm.name == result.reference), None)
            if reference and (spread := reference.pooled[metric]):
                panel.axvline(spread.mean, color="#c3c8cf", linewidth=1, zorder=0)
            for row, arm in enumerate(arms):
                values = [v for r in arm.records if (v := getattr(r.pooled, metric)) is not None]
                panel.plot(values, [row] * len(values), "o", color=_DOT, alpha=0.55, markersize=5, linestyle="none")
                spread = arm.pooled[metric]
                if spread is not None:
                    error = 0.0 if spread.sd is None else 2 * spread.sd / spread.seeds**0.5
                    panel.errorbar([spread.mean], [row], xerr=[error], fmt="|", color=_LINE, markersize=12, capsize=3)
            panel.set_title(name, loc="left", fontsize=9)
            panel.grid(axis="x", color="#e3e6ea", linewidth=0.7)
            panel.set_axisbelow(True)
        axes[0].set_yticks(range(len(arms)), [arm.name for arm in arms])
        axes[0].set_ylim(len(arms) - 0.4, -0.6)
        figure.supxlabel("dots: seeds; bar: mean and two standard errors of it", fontsize=8, color="#414a55")
        contents = io.BytesIO()
        figure.savefig(contents, format="png", dpi=130)
    return contents.getvalue()


def attention_pictures(
    folder: StudyFolder, configured: Sequence[ConfiguredArm], seed: int, reference: str | None
) -> bytes | None:
    """Return test images with their regions, and where the chain looks without and with privileged teachers, as PNG.

    Compared are, of `seed`, the first chain without privileged teachers (the reference arm if it is one) and the first
    with. None where the study lacks one of them, or no test image has a region.
    """
    arms = [arm for arm in configured if arm.arm.trainer == "chain" and folder.record_of(arm.name, seed)]
    arms.sort(key=lambda arm: arm.name != reference)
    without = next((arm for arm in arms if arm.config.privileged.mode == "off"), None)
    guided = next((arm for arm in arms if arm.config.privileged.mode != "off"), None)
    if without is None or guided is None:
        return None
    chains = [load_chain(chain_file(folder.path, arm.of_seed(seed).chain_digest(), seed)) for arm in (without, guided)]
    names = ("without teachers", "with teachers")
    found = {name: (chain.architecture, chain.model) for name, chain in zip(names, chains, strict=True) if chain}
    if len(found) < len(names):
        return None
    try:
        return example_figure(found, open_sites(without.of_seed(seed).config), seed=seed, only_regions=True)
    except DataError:
        return None
