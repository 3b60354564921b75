"""The run in plain words and in a few figures; a chain or student that is worse is called worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from chainward_server.report import tables
from chainward_server.report.formats import bytes_size, change, count, number_word, percent, score, times
from chainward_server.results import Results

SAME = 0.01
"""Differences of balanced accuracy below this are called "about the same"."""


@dataclass(frozen=True)
class Card:
    """One headline figure. `kind` chooses its colour: alone, chain, student or size."""

    kind: str
    title: str
    figure: str
    unit: str
    details: list[str]


@dataclass(frozen=True)
class Banner:
    """A warning above everything else. `kind`: failed, incomplete or synthetic."""

    kind: str
    title: str
    text: str


def verdict(results: Results, status: str, config: Mapping[str, Mapping[str, object]]) -> str:
    """What came out, in two or three sentences."""
    chain = results.final.get("chain")
    if chain is None:
        return _unfinished(results, status, config)
    opening = "This run is incomplete. " if status == "incomplete" else ""
    trained = {link.site for link in results.links if link.metrics or link.succeeded}
    everyone = tables.site_names(results)
    who = number_word(len(trained))
    if len(trained) < len(everyone):
        who += f" of {number_word(len(everyone)).lower()}"
    who += " hospital" if len(everyone) == 1 else " hospitals"
    value = chain.pooled.balanced_accuracy
    classifier, metric = "one classifier", "balanced accuracy"
    if tables.multilabel(results):
        classifier += f" of {len(results.data.classes)} findings"
        metric = "mean balanced accuracy of the findings"
    if value is None and chain.pooled.n == 0 and any(site.test is None for site in results.data.sites):
        return (
            f"{opening}{who} trained {classifier}. Their privacy policies withhold all scores; how good it is, only "
            "they can say."
        )
    if value is None:
        return f"{opening}{who} trained {classifier}. Without test images its balanced accuracy is unknown."
    images = f"{count(chain.pooled.n)} test images of {'all hospitals' if len(everyone) > 1 else 'that hospital'}"
    sentences = [f"{opening}{who} trained {classifier}: {metric} {score(value)} on {images}."]
    sentences += _chain_against_alone(results, value, tables.alone_summary(results))
    sentences += _student_against_chain(results, value)
    return " ".join(sentences)


def remarks(results: Results) -> list[str]:
    """What a reader needs to weigh the verdict: hospital by hospital, chance, and how exact it is."""
    found = [f"The data: {note}." for note in results.data.notes]
    chain = results.final.get("chain")
    value = chain.pooled.balanced_accuracy if chain else None
    wins, losses, hospitals = _at_home(results)
    if hospitals > 1:
        found.append(
            f"Each on its own test images: the chain is better than the hospital's own model at {wins} of "
            f"{hospitals} hospitals, worse at {losses}."
        )
    counts, chance = tables.test_counts(results), tables.chance(results)
    best = tables.alone_summary(results)
    if value is not None and counts:
        assumed = ", were the findings independent" if tables.multilabel(results) else ""
        margin = tables.margin(value, counts)
        found.append(
            f"Guessing would reach {score(chance)}. On these test images the chain's figure is "
            f"uncertain by about ±{margin:.3f} (95 %{assumed})"
            + (
                ", more than its distance to the best hospital alone"
                if best and abs(value - best.best) < margin
                else ""
            )
            + ". One run with one seed says nothing about the spread between runs."
        )
    if results.alone:
        found.append(
            "A hospital alone trained for as many epochs as one chain spends at that hospital; "
            "the chain is the work of all its links."
        )
    return found


def cards(results: Results) -> list[Card]:
    """The headline figures: chain, alone, student, and what the student saves."""
    unit = "balanced accuracy, mean of findings" if tables.multilabel(results) else "balanced accuracy"
    return [_chain_card(results, unit), _alone_card(results, unit), _student_card(results, unit), *_size_card(results)]


def _chain_card(results: Results, unit: str) -> Card:
    if chain := results.final.get("chain"):
        figures = [f"macro AUC {score(chain.pooled.macro_auc)}", f"{count(chain.pooled.n)} test images, all hospitals"]
        return Card("chain", "The chain", score(chain.pooled.balanced_accuracy), unit, figures)
    if last := tables.last_scored(results):
        assert last.pooled is not None
        figures = [f"macro AUC {score(last.pooled.macro_auc)}", f"after link {last.number}: {last.record.site}"]
        return Card("chain", "Last finished link", score(last.pooled.balanced_accuracy), unit, figures)
    return Card("chain", "The chain", score(None), unit, ["no link has finished"])


def _alone_card(results: Results, unit: str) -> Card:
    alone = tables.alone_summary(results)
    if alone is None:
        return Card("alone", "One hospital alone", score(None), unit, ["no hospital trained alone"])
    figures = [f"best {score(alone.best)} ({alone.best_site})", f"mean of {alone.sites}, same test images"]
    return Card("alone", "One hospital alone", score(alone.mean), unit, figures)


def _student_card(results: Results, unit: str) -> Card:
    chain, student = results.final.get("chain"), results.final.get("student")
    if student is None:
        return Card("student", "Compact student", score(None), unit, ["not trained"])
    figures = [f"macro AUC {score(student.pooled.macro_auc)}"]
    if chain and None not in (chain.pooled.balanced_accuracy, student.pooled.balanced_accuracy):
        difference = (student.pooled.balanced_accuracy or 0) - (chain.pooled.balanced_accuracy or 0)
        figures.insert(0, f"{change(difference)} against the chain")
    return Card("student", "Compact student", score(student.pooled.balanced_accuracy), unit, figures)


def _size_card(results: Results) -> list[Card]:
    large, small = results.models.get("chain"), results.models.get("student")
    if not large or not small:
        return []
    figures = [
        f"{bytes_size(small.file_bytes)} instead of {bytes_size(large.file_bytes)}",
        f"{times(_ratio(large.latency_ms, small.latency_ms))} as fast, "
        f"{small.latency_ms:.1f} instead of {large.latency_ms:.1f}\u00a0ms",
    ]
    share = percent(_ratio(small.file_bytes, large.file_bytes))
    return [Card("size", "Student's size", share, "of the chain's", figures)]


def banners(results: Results, status: str, reason: str | None) -> list[Banner]:
    """What a reader must know before any figure."""
    found = []
    if status == "incomplete":
        found.append(Banner("failed", "This run is incomplete", f"{reason or 'Why was not recorded'}."))
    elif status == "stopped":
        found.append(Banner("failed", "This run was stopped", reason or "Figures below are what is there."))
    elif status == "failed":
        found.append(Banner("failed", "This run failed", reason or "No reason was recorded."))
    elif status == "running":
        found.append(
            Banner("incomplete", "This run is not finished", reason or "Figures below are what is there so far.")
        )
    missing = [link.record for links in tables.strands(results) for link in links if not link.record.succeeded]
    if missing:
        names = "; ".join(
            f"{link.site} {link.status}" + (f" ({link.reason})" if link.reason else "") for link in missing
        )
        title = f"{len(missing)} of {len(results.links)} links added nothing to the chain"
        found.append(Banner("incomplete", title, names))
    if results.data.synthetic:
        found.append(Banner("synthetic", "Synthetic phantoms", "No patients; nothing here speaks about real images."))
    return found


def _unfinished(results: Results, status: str, config: Mapping[str, Mapping[str, object]]) -> str:
    finished = sum(link.succeeded for link in results.links)
    planned = _planned_links(results, config)
    links = f"{finished} of {planned} links" if planned else f"{finished} links"
    opening = {
        "failed": f"The run failed after {links}; no final classifier came out.",
        "stopped": f"The run was stopped after {links}; no final classifier came out.",
        "running": f"The run is under way: {links} finished.",
    }.get(status, f"The run ended after {links} without a final classifier.")
    last = tables.last_scored(results)
    if last is None or last.pooled is None:
        return opening
    return (
        f"{opening} The last finished link, at {last.record.site}, reaches balanced accuracy "
        f"{score(last.pooled.balanced_accuracy)} on {count(last.pooled.n)} test images of all hospitals."
    )


def _planned_links(results: Results, config: Mapping[str, Mapping[str, object]]) -> int | None:
    laps, chains = (config.get("chain", {}).get(key, 1) for key in ("laps", "strands"))
    if not isinstance(laps, int) or not isinstance(chains, int):
        return None
    planned = laps * chains * len(tables.site_names(results))
    return planned if planned >= len(results.links) else None


def _at_home(results: Results) -> tuple[int, int, int]:
    """At how many hospitals the chain is better than their own model on their own images, at how many worse, of how many."""
    pairs = [
        (alone, ours)
        for row in tables.comparison_rows(results)[:-1]
        for alone, ours, _ in [row.scores["balanced_accuracy"]]
        if alone is not None and ours is not None
    ]
    wins = sum(round(ours - alone, 3) >= SAME for alone, ours in pairs)
    return wins, sum(round(alone - ours, 3) >= SAME for alone, ours in pairs), len(pairs)


def _reservations(results: Results, value: float, best: float) -> str:
    """What the small print takes back of "better than every hospital alone", for the same sentence."""
    _, losses, hospitals = _at_home(results)
    counts = tables.test_counts(results)
    found = []
    if counts and value - best < tables.margin(value, counts):
        found.append("by less than these test images can tell")
    if losses:
        found.append(f"and on their own images {losses} of {hospitals} do better with their own model")
    return "".join(f", {words}" for words in found)


def _chain_against_alone(results: Results, value: float, alone: tables.Alone | None) -> list[str]:
    if alone is None and _private(results):
        return ["No hospital trained alone: that comparison would have been paid for with the privacy of its patients."]
    if alone is None:
        return ["No hospital trained alone, so there is nothing to compare it with."]
    if alone.sites == 1:
        return [
            f"The hospital {alone.best_site} alone reaches {score(alone.mean)}: "
            f"the chain is {_compared(value, alone.mean)} that."
        ]
    to_mean, to_best = _compared(value, alone.mean), _compared(value, alone.best)
    if to_best == "better than":
        judgement = f"the chain is better than every hospital alone{_reservations(results, value, alone.best)}"
    elif to_mean == to_best:
        judgement = f"the chain is {to_mean} the average hospital alone and {to_best} the best one"
    else:
        judgement = f"the chain is {to_mean} the average hospital alone, but {to_best} the best one"
    return [
        f"A hospital alone reaches {score(alone.mean)} on average and {score(alone.best)} at best "
        f"({alone.best_site}): {judgement}."
    ]


def _student_against_chain(results: Results, value: float) -> list[str]:
    student = results.final.get("student")
    if student is None:
        return ["There is no compact student."]
    small = student.pooled.balanced_accuracy
    if small is None:
        return []
    large_model, small_model = results.models.get("chain"), results.models.get("student")
    size = _ratio(small_model.file_bytes, large_model.file_bytes) if large_model and small_model else None
    with_size = f", with {percent(size)} of its size" if size is not None else ""
    return [
        f"The compact student is {_compared(small, value)} the chain: {score(small)} "
        f"({change(small - value)}){with_size}."
    ]


def _compared(value: float, reference: float) -> str:
    difference = round(value - reference, 3)
    if abs(difference) < SAME:
        return "about the same as"
    return "better than" if difference > 0 else "worse than"


def _private(results: Results) -> bool:
    return any(link.training and link.training.privacy for link in results.links)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
