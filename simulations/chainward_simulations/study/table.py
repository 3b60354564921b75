"""A study's results as a table for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from rich.table import Table

from chainward_simulations.study.results import METRICS, ArmResult, StudyResult
from chainward_simulations.study.statistics import COVERAGE, Difference, Spread
from chainward_simulations.study.tune import Tuned

_MINUTE = 60
Columns = dict[str, Callable[[ArmResult], str]]
"""Titles, and what stands in the row of an arm."""


def study_table(result: StudyResult) -> Table:
    """Return one row per arm, in the order in which they were named; without differences where there is no ranking."""
    if result.unranked:
        result = replace(result, reference=None, alone=None)
    rarest = "" if result.rarest is None else f" (rarest class: {result.rarest.cases} images)"
    table = Table("arm", "seeds", "balanced accuracy", f"macro AUC{rarest}", "accuracy", "ECE", title_justify="left")
    compared = _compared(result)
    for title in compared:
        table.add_column(title)
    for title in _COSTS:
        table.add_column(title, justify="right")
    for arm in result.arms:
        name = (f"{arm.name} (same as {arm.same_as})" if arm.same_as else arm.name) + (" (mean)" if arm.best else "")
        seeds, further = str(len(arm.records)), [cell(arm) for cell in [*compared.values(), *_COSTS.values()]]
        table.add_row(name, seeds, *(_spread(arm.pooled[metric]) for metric in METRICS), *further)
        if arm.best:
            table.add_row(f"{arm.name} (best site)", seeds, *(_spread(arm.best[metric]) for metric in METRICS))
    return table


def _compared(result: StudyResult) -> Columns:
    """Return the columns that only some studies have: what arms are compared with, and where they look."""
    found: Columns = {}
    against = f"minus {result.reference}"
    if result.reference:
        found[f"balanced accuracy {against}"] = lambda arm: _difference(arm.differences.get("balanced_accuracy"))
        found[f"macro AUC {against}"] = lambda arm: _difference(arm.differences.get("macro_auc"))
    if result.alone:
        found["balanced accuracy minus best site"] = lambda arm: _difference(arm.over_best.get("balanced_accuracy"))
    if any(arm.localisation.get("lift") for arm in result.arms):
        found["lift"] = lambda arm: _spread(arm.localisation.get("lift"), digits=2)
        if result.reference:
            found[f"lift {against}"] = lambda arm: _difference(arm.differences.get("lift"), digits=2)
    return found


def _mean(arm: ArmResult, figure: str) -> float:
    return fmean(getattr(record, figure) for record in arm.records)


_COSTS: Columns = {
    "images per model": lambda arm: f"{_mean(arm, 'images_per_model'):,.0f}".replace(",", " "),
    "steps": lambda arm: f"{_mean(arm, 'steps'):,.0f}".replace(",", " "),
    "minutes": lambda arm: f"{_mean(arm, 'seconds') / _MINUTE:.1f}",
    "parameters": lambda arm: f"{arm.records[0].parameters / 1e6:.2f} M",
    "ms per image": lambda arm: "" if arm.latency_ms is None else f"{arm.latency_ms:.1f}",
}


def tuning_note(tuned: Tuned) -> str:
    """Return what the search for settings found, ready to be typed."""
    before = "" if tuned.before is None else f" ({tuned.before:.3f} with the settings as given)"
    return (
        f"best of {tuned.trials} trials, {tuned.objective.replace('-', ' ')} {tuned.value:.3f} on the validation images of "
        f"seed 0{before}: --set '{tuned.as_set()}'"
    )


def notes(result: StudyResult) -> list[str]:
    """Return what a reader of the table must know, one line each."""
    failures = [f"failed: {arm}, seed {seed}: {reason}" for arm, seed, reason in result.failures]
    if not result.arms:
        return failures
    lines = [
        "On the test images of all sites together: mean ± standard deviation over the seeds. Figures of several models "
        "(alone) are means over them; the best site is chosen by its balanced accuracy on these same images.",
    ]
    if result.unranked:
        lines.append(result.unranked)
        result = replace(result, reference=None, alone=None)
    if result.reference:
        lines.append(
            f"Differences to {result.reference} are paired by seed and image; in brackets the {COVERAGE:.0%} bootstrap "
            "interval over patients and seeds."
        )
    if result.alone:
        lines.append(
            f"best site: of {result.alone}, chosen anew for each seed on these same test images; the interval does not hold what "
            "that choice flatters it by."
        )
    if result.rarest is not None:
        lines.append(
            f"The rarest class of the test images is '{result.rarest.name}' with {result.rarest.cases}"
            " (the fewest of any seed): balanced accuracy and macro AUC give it the weight of any other."
        )
    lines.append(
        "images per model: labelled images times epochs that went into one model, a student's with its chain's; "
        "steps and minutes: of all trainings of the arm, per seed."
    )
    lines += [f"the data: {note}" for note in result.data_notes]
    if any(arm.localisation for arm in result.arms):
        lines.append(
            "lift: attention inside the region of interest over what chance would put there, mean over the images that "
            "have one; 1 is chance."
        )
    return lines + failures


def _spread(one: Spread | None, digits: int = 3) -> str:
    if one is None:
        return "none"
    return f"{one.mean:.{digits}f}" + ("" if one.sd is None else f" ± {one.sd:.{digits}f}")


def _difference(one: Difference | None, digits: int = 3) -> str:
    return "" if one is None else f"{one.mean:+.{digits}f} [{one.low:+.{digits}f}, {one.high:+.{digits}f}]"
