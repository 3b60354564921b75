"""The rows of the report's tables, computed from `Results`; what is missing gives None, never an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

from chainward_server.report.colours import ink_on, shade
from chainward_server.results import AloneRecord, LinkRecord, Results, SiteScores
from chainward_shared.evaluation.localisation import LocalisationScores
from chainward_shared.evaluation.scores import Scores

METRICS = ("balanced_accuracy", "macro_auc", "accuracy", "ece")
LABELS = {"chain": "Chain", "student": "Compact student"}


@dataclass(frozen=True)
class ChainLink:
    """A link with its place: `number` counts within the strand; `strand` and `lap` count from 1 as well."""

    number: int
    strand: int
    lap: int
    record: LinkRecord

    @property
    def pooled(self) -> Scores | None:
        return _at(_test(self.record), None)


@dataclass(frozen=True)
class Alone:
    """One metric of the hospitals alone on the pooled test images. `sites`: how many `mean` averages."""

    mean: float
    best: float
    best_site: str
    sites: int


@dataclass(frozen=True)
class ComparisonRow:
    """One set of test images and what models reach on it. ``scores[metric]``: alone, chain, student. `interval`: the ends of a
    95 % interval of the chain's balanced accuracy; None where its images were not counted class by class."""

    label: str
    n: int | None
    scores: Mapping[str, tuple[float | None, ...]]
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ModelRow:
    """One model on the pooled test images. `kind`: alone, chain or student. `own`: on its own images."""

    label: str
    kind: str
    scores: Scores | None
    own: float | None = None


@dataclass(frozen=True)
class HeatCell:
    """Balanced accuracy of a link's model on a site's test images; `change`: against the link before."""

    value: float | None
    change: float | None
    trained_here: bool
    background: str
    ink: str


@dataclass(frozen=True)
class HeatRow:
    """A link's model on every site, then pooled; no cells where the link left no model."""

    link: ChainLink
    cells: list[HeatCell]


@dataclass(frozen=True)
class HeatMap:
    """Rows per strand in chain order. `low` and `high`: the ends of the colour scale."""

    columns: list[str]
    strands: list[list[HeatRow]]
    low: float
    high: float

    @property
    def empty(self) -> bool:
        return not any(row.cells for rows in self.strands for row in rows)


@dataclass(frozen=True)
class Incident:
    """Something that did not go to plan: what, how it ended, and why."""

    what: str
    status: str
    reason: str | None


@dataclass(frozen=True)
class ClassMix:
    """Cases per class at every site that counted them, in one split. `total`: over these sites. `images`: at each site and
    in all; multi-label, an image counts for each of its findings."""

    split: str
    sites: list[tuple[str, list[int]]]
    total: list[int]
    images: list[int]


@dataclass(frozen=True)
class LooksRow:
    """Where one model looks: in the test images of one site, or of all. `kind`: chain or student."""

    model: str
    kind: str
    site: str
    pooled: bool
    scores: LocalisationScores


def site_names(results: Results) -> list[str]:
    """Every site the run knows of: in the order in which they are described, then those only seen at work."""
    described = [site.site for site in results.data.sites]
    seen = [link.site for link in results.links] + [record.site for record in results.alone]
    return list(dict.fromkeys(described + seen))


def strands(results: Results) -> list[list[ChainLink]]:
    """The links of each strand, in the order in which they ran."""
    if not results.links:
        return []
    first_strand = min(link.strand for link in results.links)
    first_lap = min(link.lap for link in results.links)
    by_strand: dict[int, list[ChainLink]] = {}
    for record in sorted(results.links, key=lambda link: (link.strand, link.lap, link.step)):
        links = by_strand.setdefault(record.strand, [])
        links.append(ChainLink(len(links) + 1, record.strand - first_strand + 1, record.lap - first_lap + 1, record))
    return list(by_strand.values())


def last_scored(results: Results) -> ChainLink | None:
    """The link furthest along the chain that left a scored model."""
    scored = [link for links in strands(results) for link in links if link.pooled]
    return max(scored, key=lambda link: link.number, default=None)


def alone_summary(results: Results, metric: str = "balanced_accuracy") -> Alone | None:
    """Mean and best of the hospitals alone on the pooled test images; None where none was scored."""
    values = {
        record.site: value
        for record in results.alone
        if record.metrics and (value := getattr(record.metrics.test.pooled, metric)) is not None
    }
    if not values:
        return None
    best_site = max(values, key=lambda site: values[site])
    return Alone(fmean(values.values()), values[best_site], best_site, len(values))


def comparison_rows(results: Results) -> list[ComparisonRow]:
    """Own model, chain and student on each hospital's test images; last on all hospitals' pooled.

    Pooled, "alone" is the mean over the hospitals.
    """
    chain, student = (results.final.get(kind) for kind in LABELS)
    alone = {record.site: test for record in results.alone if (test := _test(record))}
    rows = []
    for site in site_names(results):
        trio = (_at(alone.get(site), site), _at(chain, site), _at(student, site))
        images = max((scores.n for scores in trio if scores), default=None)
        rows.append(ComparisonRow(site, images, {m: tuple(_metric(scores, m) for scores in trio) for m in METRICS}))
    images = max((scores.pooled.n for scores in (chain, student, *alone.values()) if scores), default=None)
    pooled = {}
    for m in METRICS:
        mean = alone_summary(results, m)
        pooled[m] = (mean.mean if mean else None, _metric(_at(chain, None), m), _metric(_at(student, None), m))
    return [*rows, ComparisonRow("All hospitals", images, pooled)]


def model_rows(results: Results) -> list[ModelRow]:
    """Every model on the pooled test images: chain, student, then each hospital alone."""
    rows = [
        ModelRow(label, kind, results.final[kind].pooled) for kind, label in LABELS.items() if kind in results.final
    ]
    for record in results.alone:
        test = _test(record)
        own = _metric(_at(test, record.site), "balanced_accuracy")
        rows.append(ModelRow(record.site, "alone", _at(test, None), own))
    return rows


def looks_rows(results: Results) -> list[LooksRow]:
    """How well each final model's attention finds the regions of interest: over all hospitals, then at each."""
    rows = []
    for kind, label in LABELS.items():
        if found := results.localization.get(kind):
            rows.append(LooksRow(label, kind, "All hospitals", True, found.pooled))
            rows += [LooksRow(label, kind, site, False, scores) for site, scores in found.sites.items()]
    return rows


def heat_map(results: Results) -> HeatMap:
    """Balanced accuracy of every link's model on every site's test images."""
    sites, chains = site_names(results), strands(results)
    values = [
        value
        for links in chains
        for link in links
        for site in (*sites, None)
        if (value := _metric(_at(_test(link.record), site), "balanced_accuracy")) is not None
    ]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 0.1:  # a finer scale would paint noise as contrast
        low, high = (low + high) / 2 - 0.05, (low + high) / 2 + 0.05
    return HeatMap(sites, [list(_heat_rows(links, sites, low, high)) for links in chains], low, high)


def _heat_rows(links: list[ChainLink], sites: list[str], low: float, high: float) -> Iterator[HeatRow]:
    before: dict[str | None, float | None] = {}
    for link in links:
        if link.pooled is None:
            yield HeatRow(link, [])
            continue
        cells = []
        for site in (*sites, None):
            old, new = before.get(site), _metric(_at(_test(link.record), site), "balanced_accuracy")
            background = "transparent" if new is None else shade((new - low) / (high - low))
            difference = None if new is None or old is None else new - old
            ink = "inherit" if new is None else ink_on(background)
            cells.append(HeatCell(new, difference, site == link.record.site, background, ink))
            before[site] = new
        yield HeatRow(link, cells)


def incidents(results: Results) -> list[Incident]:
    """All that was retried, skipped, refused or failed, in the order of the run."""
    found = []
    several = len({link.strand for link in results.links}) > 1
    for links in strands(results):
        for link in links:
            if link.record.status != "done":
                place = f"strand {link.strand}, link {link.number}" if several else f"link {link.number}"
                found.append(Incident(f"{link.record.site}, {place}", link.record.status, link.record.reason))
    found += [
        Incident(f"{record.site}, training alone", record.status, record.reason)
        for record in results.alone
        if record.status != "done"
    ]
    found += [
        Incident(f"{site}, student round {number}", "failed", reason)
        for number, record in enumerate(results.student_rounds, 1)
        for site, reason in record.failed.items()
    ]
    found += [
        Incident(f"{site}, statistics round {record.key}", "failed", reason)
        for record in results.heads
        for site, reason in record.failed.items()
    ]
    return found


def class_mixes(results: Results) -> list[ClassMix]:
    """Cases per class and site, for each split that at least one site described."""
    mixes = []
    for split in ("train", "val", "test"):
        rows = [(site.site, site.class_counts[split]) for site in results.data.sites if site.class_counts.get(split)]
        if rows:
            width = max(len(counts) for _, counts in rows)
            rows = [(site, counts + [0] * (width - len(counts))) for site, counts in rows]
            total = [sum(column) for column in zip(*(counts for _, counts in rows), strict=True)]
            images = [sum(counts) for _, counts in rows]
            if multilabel(results):
                size_of = {site.site: getattr(site, split) for site in results.data.sites}
                images = [size_of[site] for site, _ in rows]
            mixes.append(ClassMix(split, rows, total, [*images, sum(images)]))
    return mixes


def multilabel(results: Results) -> bool:
    """Whether an image may have several findings, or none."""
    return results.data.task == "multilabel"


def test_counts(results: Results) -> list[int]:
    """How many pooled test cases stand behind each recall that balanced accuracy averages; empty where no site said.

    Single-label: the cases of each class that has one. Multi-label: for each finding that some images have and some
    have not, the number of either (sensitivity and specificity).
    """
    tests = [mix for mix in class_mixes(results) if mix.split == "test"]
    if not multilabel(results):
        return [cases for mix in tests for cases in mix.total if cases]
    return [
        count
        for mix in tests
        for cases in mix.total
        if 0 < cases < mix.images[-1]
        for count in (cases, mix.images[-1] - cases)
    ]


def margin(value: float, counts: list[int]) -> float:
    """Half the width of a 95 % interval of a balanced accuracy over classes with so many cases: normal approximation, classes
    independent."""
    return 1.96 * sqrt(value * (1 - value) * sum(1 / n for n in counts)) / len(counts)


def chance(results: Results) -> float | None:
    """Balanced accuracy of guessing; None where no site counted its test cases."""
    counts = test_counts(results)
    if not counts:
        return None
    return 0.5 if multilabel(results) else 1 / len(counts)


def _test(record: LinkRecord | AloneRecord) -> SiteScores | None:
    return record.metrics.test if record.metrics else None


def _at(scores: SiteScores | None, site: str | None) -> Scores | None:
    """The scores at a site; of None those over all sites."""
    if scores is None:
        return None
    return scores.pooled if site is None else scores.sites.get(site)


def _metric(scores: Scores | None, name: str) -> float | None:
    value: float | None = getattr(scores, name) if scores else None
    return value
