"""What a run's folder says at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from chainward_server.report import tables
from chainward_server.report.tables import Incident
from chainward_server.results import LinkRecord, StudentRound
from chainward_server.run_folder import RunFolder
from chainward_server.standing import Standing
from chainward_server.stop import is_orphan
from chainward_shared.errors import StatementError
from chainward_shared.evaluation.scores import Scores
from chainward_shared.privacy.record import read_privacy_record


@dataclass(frozen=True)
class Place:
    """Where a run is in its phase.

    Attributes
    ----------
    what : "hop", "hospital alone" or "student round"
    number : of the piece of work under way, counted from 1
    total : how many there are; None while the sites are not known
    sites : where it is being trained; empty where that is not known
    """

    what: str
    number: int
    total: int | None
    sites: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.what} {self.number}" + (f" of {self.total}" if self.total else "")
        return f"{text}, at {', '.join(self.sites)}" if self.sites else text


@dataclass(frozen=True)
class Snapshot(Standing):
    """A run at one moment.

    Attributes
    ----------
    status : as in `run.json`; "gone": it says running, and its process on this machine has ended
    how_to_resume : the option that resumes it; None where that can't help
    note : what a person should know of a run that is at work
    waiting : the sites where a person has not approved the run yet, and since when
    epsilon : what each private site has spent in this run so far, by its signed statement
    """

    path: Path
    run: str
    status: str
    reason: str | None
    how_to_resume: str | None = None
    note: str | None = None
    waiting: Mapping[str, datetime] = field(default_factory=dict)
    epsilon: Mapping[str, float] = field(default_factory=dict)

    @property
    def elapsed(self) -> float:
        """Seconds since the run was first started, until now or until it ended."""
        return max(0.0, ((self.updated if self.ended else self.time) - self.started).total_seconds())

    @property
    def silent(self) -> float:
        """Seconds since the run last wrote something down; 0 once it has ended."""
        return 0.0 if self.ended else max(0.0, (self.time - self.updated).total_seconds())

    @property
    def incidents(self) -> list[Incident]:
        """All that was retried, skipped, refused or failed so far, with the reasons."""
        return tables.incidents(self.results) if self.results else []

    @property
    def final(self) -> dict[str, Scores]:
        """Scores of the final models on the pooled test images, as far as there are any."""
        final = self.results.final if self.results else {}
        return {name: scores.pooled for name, scores in final.items() if scores.pooled and scores.pooled.n}

    @property
    def sites(self) -> int | None:
        """How many sites take part; None while that is not known."""
        if self.results:
            return len(self.results.data.sites)
        return len(self.config.expected_sites) or self.config.federation.num_sites or None

    @property
    def place(self) -> Place | None:
        """Where the run is in its phase; None in a phase without pieces, and after the end."""
        if self.ended:
            return None
        if self.phase == "chain":
            chain, sites = self.config.chain, self.sites
            total = chain.laps * chain.strands * sites if sites else None
            done = {link.key for link in self.links}
            pending = next(
                (left for turn in self.turns or [] if (left := [hop for hop in turn if hop.key not in done])), []
            )
            number = len(done) + 1
            return Place("hop", min(number, total or number), total, tuple(hop.site for hop in pending))
        if self.phase == "alone":
            number, total = len(self.alone) + 1, self.sites and self.sites - len(self.private)
            return Place("hospital alone", min(number, total or number), total)
        if self.phase == "students":
            return Place("student round", min(len(self.rounds) + 1, self.total_rounds), self.total_rounds)
        return None


def look(path: Path, now: datetime | None = None) -> Snapshot:
    """Return what a run's folder says now.

    Raises
    ------
    RunFolderError
        There is no run folder, or a file of it is damaged.
    """
    folder = RunFolder.open(path)
    if gone := _is_gone(folder):
        folder = RunFolder.open(path)  # it may have ended properly between the two looks
        gone = _is_gone(folder)
    state = folder.state
    results = folder.load_results()
    time = now or datetime.now(UTC)
    updated = moment(state.updated, time)
    running = state.status == "running" and not gone
    epsilon = _epsilon(path / "privacy.json")
    return Snapshot(
        path=path,
        run=state.run_id,
        status="gone" if gone else state.status,
        phase=state.phase,
        reason=_why_gone(folder) if gone else state.reason,
        started=moment(state.started, time),
        updated=updated,
        time=time,
        ended=not running,
        config=folder.config,
        results=results,
        private=frozenset(epsilon),
        one_machine=(path / "simulated-sites").is_dir(),
        how_to_resume=folder.how_to_resume,
        note=None if gone or state.status != "running" else _orphaned(folder),
        waiting={site: moment(since, time) for site, since in state.waiting.items()} if running else {},
        epsilon=epsilon,
    )


def _is_gone(folder: RunFolder) -> bool:
    state = folder.state
    return state.status == "running" and state.process is not None and state.process.gone


def _orphaned(folder: RunFolder) -> str | None:
    process = folder.state.process and folder.state.process.find()
    if process is None or not is_orphan(process):
        return None
    return f"goes on without its SuperLink, which was killed; to end it: chainward stop {folder.how_to_name}"


def _why_gone(folder: RunFolder) -> str:
    process = folder.state.process
    return f"its process {process.pid if process else ''} has ended without a word: it was killed, or the machine was restarted"


def validation(record: LinkRecord | StudentRound) -> float | None:
    """Return the pooled validation balanced accuracy of a hop's or a round's model, if there is one."""
    scores = record.validation if isinstance(record, StudentRound) else None
    if isinstance(record, LinkRecord) and record.metrics:
        scores = record.metrics.validation
    return scores.balanced_accuracy if scores else None


def before(link: LinkRecord, links: list[LinkRecord]) -> float | None:
    """Return the same of the model that a hop started from."""
    earlier: Mapping[str, float | None] = {
        other.site: validation(other)
        for other in links[: links.index(link)]
        if other.strand == link.strand and other.metrics
    }
    return earlier.get(link.predecessor or "")


def moment(text: str, otherwise: datetime) -> datetime:
    """Return the time that an ISO 8601 text names, UTC where it names no zone; `otherwise` for any other text."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return otherwise
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _epsilon(file: Path) -> dict[str, float]:
    """Return what each private site has signed to have spent in the run."""
    try:
        sites = read_privacy_record(file).sites
    except StatementError:
        return {}  # none yet; whether it is damaged is the audit's to say
    return {site: facts.epsilon for site, facts in sites.items() if facts.epsilon is not None}
