"""The runs in a folder, one row each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chainward_server.results import named
from chainward_server.watch.snapshot import Snapshot, look
from chainward_shared.errors import RunFolderError, StatementError
from chainward_shared.outside import Shown
from chainward_shared.privacy.record import read_privacy_record


@dataclass(frozen=True)
class RunSummary(Shown):
    """One run. `chain` and `student`: balanced accuracy on the pooled test images, three decimals.

    Attributes
    ----------
    status : as in `run.json`; "gone": its process has ended without a word; or "damaged"
    started, updated : ISO 8601
    elapsed : seconds from the start to the end, or until now
    silent : seconds without a sign of life of a run under way
    sites : how many take part
    hops : finished hops
    data : what the run trains on, as its report names it; while no site has answered, what was asked for
    privacy : how the sites trained; while that is not written down, what was asked for
    """

    run: str
    status: str
    phase: str | None = None
    started: str | None = None
    updated: str | None = None
    elapsed: float | None = None
    silent: float | None = None
    sites: int | None = None
    hops: int | None = None
    seed: int | None = None
    privacy: str | None = None
    synthetic: bool | None = None
    data: str | None = None
    chain: str | None = None
    student: str | None = None
    reason: str | None = None


def list_runs(directory: Path) -> list[RunSummary]:
    """Return the runs in a folder, newest first; one whose files are damaged is listed as such."""
    return [_summary(file.parent) for file in sorted(directory.expanduser().glob("*/run.json"), reverse=True)]


def _summary(path: Path) -> RunSummary:
    try:
        run = look(path)
    except RunFolderError as error:
        return RunSummary(path.name, "damaged", reason=str(error))
    figures = {
        name: None if (value := scores.balanced_accuracy) is None else f"{value:.3f}"
        for name, scores in run.final.items()
    }
    return RunSummary(
        run=run.run,
        status=run.status,
        phase=run.phase,
        started=run.started.isoformat(timespec="seconds"),
        updated=run.updated.isoformat(timespec="seconds"),
        elapsed=run.elapsed,
        silent=run.silent,
        sites=run.sites,
        hops=len(run.links),
        seed=run.config.seed,
        privacy=_privacy(run),
        synthetic=run.results.data.synthetic if run.results else None,
        data=run.results.data.source if run.results else named(run.config.data.source),
        chain=figures.get("chain"),
        student=figures.get("student"),
        reason=run.reason or run.note,
    )


def _privacy(run: Snapshot) -> str:
    try:
        return read_privacy_record(run.path / "privacy.json").mode
    except StatementError:
        return f"{run.config.privacy.mode}" if run.ended else f"{run.config.privacy.mode} (asked)"
