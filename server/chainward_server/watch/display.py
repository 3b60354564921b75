"""A snapshot as a picture on a terminal, as lines of text, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chainward_server.report.formats import duration, score
from chainward_server.results import LinkRecord
from chainward_server.run_state import iso
from chainward_server.standing import expected_end
from chainward_server.watch.snapshot import Snapshot, before, validation
from chainward_shared.words import listed

ROWS = 12
"""Hops, rounds and incidents that a terminal shows at most; the last ones, and fewer on one of few lines."""
_HEADLINES, _FRAME = 3, 5
"""Lines above the tables, and of a table's frame and header: what does not fit below is not shown by a terminal at all."""

QUIET = 60.0
"""Seconds without a sign of life from which on it is said. A hop gives none until it has finished."""


def headline(run: Snapshot) -> str:
    """Return where the run is: status, phase, piece of work, time so far, expected end."""
    if run.ended:
        return f"run {run.run} {run.status} after {duration(run.elapsed)}"
    place = run.place
    words = [f"run {run.run}", f"{run.phase}" + (f": {place}" if place else ""), f"{duration(run.elapsed)} so far"]
    return "; ".join([*words, end_in_words(run)])


def end_in_words(run: Snapshot) -> str:
    """Return e.g. ``"expected end 14:07:30, in 2 min 10 s"``, in local time."""
    end = expected_end(run)
    if end is None:
        return "expected end unknown"
    left = max(0.0, (end - run.time).total_seconds())
    if left < 1:
        return "expected to end any moment"
    local = end.astimezone()
    day = "" if local.date() == run.time.astimezone().date() else f"{local:%Y-%m-%d} "
    return f"expected end {day}{local:%H:%M:%S}, in {duration(left)}"


def silence(run: Snapshot) -> str | None:
    """Return how long there was no sign of life, and what that may mean; None where there was one lately."""
    if run.silent < QUIET:
        return None
    patience = run.config.federation.hop_deadline
    if run.silent <= patience:
        return (
            f"no sign of life for {duration(run.silent)}; a piece of work may take up to {duration(patience)} "
            "(federation.hop-deadline)"
        )
    return (
        f"no sign of life for {duration(run.silent)}, longer than federation.hop-deadline ({duration(patience)}): the "
        f"coordinator may have died; to go on, once it has: the same command with {run.how_to_resume}"
    )


def approval(run: Snapshot) -> str | None:
    """Return at which hospitals a person has not approved the run yet; None where none is waited for."""
    if not run.waiting:
        return None
    longest = max((run.time - since).total_seconds() for since in run.waiting.values())
    return f"waiting for the approval of a person at {listed(list(run.waiting))}, for {duration(max(0.0, longest))}"


def outcome(run: Snapshot) -> list[str]:
    """Return how a run ended, in lines."""
    lines = [headline(run) + (f": {run.reason or 'no reason was recorded'}" if run.status != "finished" else "")]
    lines += [
        f"{name}: balanced accuracy {score(scores.balanced_accuracy)}, macro AUC {score(scores.macro_auc)}, "
        f"{scores.n} pooled test images"
        for name, scores in run.final.items()
    ]
    report = run.path / "report.html"
    lines += [f"report: {report}"] if report.is_file() else []
    if run.how_to_resume:
        lines.append(f"to go on from the last finished piece of work: the same command with {run.how_to_resume}")
    return lines


def news(old: Snapshot | None, run: Snapshot) -> list[str]:
    """Return a line for everything that has happened since `old`; None: since the start."""
    lines = []
    numbers = {link.key: number for number, link in enumerate(run.links, 1)}
    seen = {link.key for link in old.links} if old else set()
    total = (run.sites or 0) * run.config.chain.laps * run.config.chain.strands
    for link in run.links:
        if link.key not in seen:
            lines.append(f"hop {numbers[link.key]}" + (f" of {total}" if total else "") + f"  {_link_line(run, link)}")
    for record in run.alone[len(old.alone) if old else 0 :]:
        own = record.metrics.validation if record.metrics else None
        figure = f": validation balanced accuracy {score(own.balanced_accuracy)}" if own else ""
        lines.append(f"{record.site} alone  {record.status}{figure}" + (f". {record.reason}" if record.reason else ""))
    for round_ in run.rounds[len(old.rounds) if old else 0 :]:
        lines.append(
            f"student round {round_.round} of {run.total_rounds}  {len(round_.sites)} sites, validation balanced accuracy "
            f"{score(validation(round_))}, {duration(round_.seconds)}"
        )
        lines += [f"student round {round_.round} went on without {site}: {why}" for site, why in round_.failed.items()]
    if not run.ended and (old is None or lines or old.phase != run.phase):
        lines.append(headline(run))
    if (old is None or set(old.waiting) != set(run.waiting)) and (waits := approval(run)):
        lines.append(waits)
    return lines


def _link_line(run: Snapshot, link: LinkRecord) -> str:
    site = link.site if run.config.chain.strands == 1 else f"{link.site} (strand {link.strand})"
    attempts = f", attempt {link.attempts}" if link.attempts > 1 else ""
    figure = ""
    if link.metrics:
        change = f"{score(before(link, run.links))} -> {score(validation(link))}"
        figure = f", validation balanced accuracy {change}"
    why = f". {link.reason}" if link.reason else ""
    return f"{site}: {link.status}, {duration(link.seconds)}{attempts}{figure}{why}"


def as_json(run: Snapshot, event: str) -> dict[str, Any]:
    """Return a snapshot as plain JSON values; times in UTC, durations in seconds."""
    place, last, end = run.place, run.links[-1] if run.links else None, expected_end(run)
    return {
        "schema": 1,
        "event": event,
        "time": iso(run.time),
        "run": run.run,
        "path": str(run.path),
        "status": run.status,
        "phase": run.phase,
        "reason": run.reason,
        "place": place and {"what": place.what, "number": place.number, "of": place.total, "sites": list(place.sites)},
        "last_hop": last
        and {
            "key": last.key,
            "site": last.site,
            "status": last.status,
            "attempts": last.attempts,
            "seconds": last.seconds,
            "validation_balanced_accuracy": validation(last),
        },
        "hops": len(run.links),
        "student_rounds": len(run.rounds),
        "incidents": [asdict(incident) for incident in run.incidents],
        "elapsed": round(run.elapsed, 1),
        "expected_end": end and iso(end),
        "silent": round(run.silent, 1),
        "waiting_for_approval": {site: iso(since) for site, since in run.waiting.items()},
        "final": {name: scores.model_dump() for name, scores in run.final.items()},
    }


def picture(run: Snapshot, height: int = 100) -> RenderableType:
    """Return what a terminal of `height` lines shows: where the run is, the last hops and rounds, and what went wrong."""
    tables = bool(run.links) + bool(run.rounds)
    room = height - _HEADLINES - _FRAME * tables
    rows = max(1, min(ROWS, room // max(1, tables + bool(run.incidents))))
    parts: list[RenderableType] = [Text(headline(run), style="bold")]
    parts += [Text(warning, style="yellow") for warning in (approval(run), silence(run)) if warning]
    if run.links:
        table = Table("hop", "site", "status", "attempts", "time", "validation balanced accuracy")
        for number, link in list(enumerate(run.links, 1))[-rows:]:
            style = None if link.status in ("done", "retried") else "red"
            figures = f"{score(before(link, run.links))} → {score(validation(link))}" if link.metrics else ""
            table.add_row(
                str(number),
                Text(link.site),
                Text(link.status, style=style or ""),
                str(link.attempts),
                duration(link.seconds),
                figures,
            )
        parts.append(table)
    if run.rounds:
        table = Table("student round", "sites", "time", "validation balanced accuracy")
        for round_ in run.rounds[-rows:]:
            which, took = f"{round_.round} of {run.total_rounds}", duration(round_.seconds)
            table.add_row(which, str(len(round_.sites)), took, score(validation(round_)))
        parts.append(table)
    for incident in run.incidents[-rows:]:
        why = f". {incident.reason}" if incident.reason else ""
        parts.append(Text(f"{incident.what}: {incident.status}{why}", style="red"))
    return Group(*parts)
