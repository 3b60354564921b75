"""The rows of the report's class-by-class tables, and what they can't say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chainward_server.report.tables import LABELS, multilabel, site_names
from chainward_server.results import ByClass, ClassScores, Results
from chainward_shared.evaluation.intervals import mean_of_proportions
from chainward_shared.evaluation.operating import MIN_CASES, OperatingPoint, Tally


@dataclass(frozen=True)
class ClassRow:
    """One class on the pooled test images: as the model decides, and at its operating point."""

    name: str
    point: OperatingPoint
    decided: Tally
    at_point: Tally | None

    @property
    def few(self) -> bool:
        """Whether there are too few test images of it, or of all others, to say anything."""
        return self.decided.few


@dataclass(frozen=True)
class SiteRow:
    """One site's test images, class by class: at the operating point where there is one, else as the model decides."""

    site: str
    tallies: list[Tally]
    balanced: tuple[float, float] | None


@dataclass(frozen=True)
class ModelByClass:
    """One final model, class by class."""

    kind: str
    label: str
    found: ByClass
    rows: list[ClassRow]
    sites: list[SiteRow]
    missing_sites: list[str]

    @property
    def at_points(self) -> bool:
        """Whether any class has an operating point."""
        return any(point.log_odds is not None for point in self.found.points)

    @property
    def too_few(self) -> list[ClassRow]:
        """Classes with too few test images to say."""
        return [row for row in self.rows if row.few]

    @property
    def without_point(self) -> dict[str, list[str]]:
        """Why classes have no operating point: the reason, and which classes."""
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.point.missing is not None:
                reasons.setdefault(row.point.missing, []).append(row.name)
        return reasons


def models_by_class(results: Results) -> list[ModelByClass]:
    """Return the final models that were counted on test images, class by class."""
    found = []
    for kind, label in LABELS.items():
        by_class = results.by_class.get(kind)
        if by_class is None or not by_class.pooled:
            continue
        rows = [
            ClassRow(name, point, scores.decided, scores.at_point)
            for name, point, scores in zip(results.data.classes, by_class.points, by_class.pooled, strict=True)
        ]
        sites = [
            SiteRow(site, [one.at_point or one.decided for one in scores], balanced_interval(scores, results))
            for site, scores in by_class.sites.items()
        ]
        missing = [site for site in site_names(results) if site not in by_class.sites]
        found.append(ModelByClass(kind, label, by_class, rows, sites, missing))
    return found


def balanced_interval(scores: Sequence[ClassScores], results: Results) -> tuple[float, float] | None:
    """Return the ends of a 95 % interval of the balanced accuracy as the model decides; see `mean_of_proportions`.

    Images are taken as independent, and, multi-label, findings too. None where no class has images.
    """
    return mean_of_proportions(list(_proportions([one.decided for one in scores], results)))


def _proportions(tallies: Sequence[Tally], results: Results) -> Iterator[tuple[int, int]]:
    for tally in tallies:
        if not multilabel(results):
            if tally.cases:
                yield tally.found, tally.cases
        elif tally.cases and tally.others:
            yield tally.found, tally.cases
            yield tally.cleared, tally.others


def interval_of(results: Results, kind: str, site: str | None = None) -> tuple[float, float] | None:
    """Return the interval of a final model's balanced accuracy at a site, or pooled; None where it is unknown."""
    by_class = results.by_class.get(kind)
    if by_class is None:
        return None
    scores = by_class.pooled if site is None else by_class.sites.get(site, [])
    return balanced_interval(scores, results) if scores else None


def gaps(results: Results) -> list[str]:
    """Return what a reader might look for in the report and not find, a sentence each."""
    found = []
    if results.final and not results.alone:
        found.append("no hospital trained alone, so nothing says what the chain adds")
    if "chain" in results.final and "student" not in results.final:
        found.append("there is no compact student")
    chain = results.by_class.get("chain")
    if chain is None and "chain" in results.final:
        found.append("nothing class by class: the run kept no counts")
    for model in models_by_class(results)[:1]:
        if few := model.too_few:
            names = ", ".join(f"{row.name} ({min(row.decided.cases, row.decided.others)})" for row in few)
            found.append(f"classes with fewer than {MIN_CASES} test images, of which nothing can be said: {names}")
        if model.missing_sites:
            found.append(f"no counts of {', '.join(model.missing_sites)} (withheld, or not reached)")
        for reason, lacking in model.without_point.items():
            found.append(f"no operating point of {', '.join(lacking)}: {reason}")
    if chain is not None and chain.calibration.missing:
        found.append(f"no calibration: {chain.calibration.missing}")
    return found
