"""How far a run is, and when it is expected to end: for the run itself and for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean

from chainward_server.results import AloneRecord, LinkRecord, Results, StudentRound
from chainward_server.schedule import ALONE_WORK, LINK_WORK, STUDENT_WORK, Hop, schedule, site_order
from chainward_shared.config import RunConfig

SLOWEST_PACE = 2.0
"""Most that the time between the pieces (scoring, handing over) is taken to add, as a factor; the time for which a stopped run
lay still counts there too, and must not decide."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run is at one moment.

    Attributes
    ----------
    phase : as in `run.json`
    results : what it has measured; None before the first finished piece of work
    private : the sites that train privately; they don't train alone
    one_machine : its hospitals are simulated on one machine, others all work at once
    started, updated : when it began, and when it last wrote something down
    time : when it was looked at
    ended : whether nothing more will come: it failed, or finished and wrote its report
    """

    config: RunConfig
    phase: str
    results: Results | None
    private: frozenset[str] = frozenset()
    one_machine: bool
    started: datetime
    updated: datetime
    time: datetime
    ended: bool = False

    @property
    def links(self) -> list[LinkRecord]:
        """The finished hops, in the order in which they were written down."""
        return self.results.links if self.results else []

    @property
    def alone(self) -> list[AloneRecord]:
        """The sites that have trained alone."""
        return self.results.alone if self.results else []

    @property
    def rounds(self) -> list[StudentRound]:
        """The finished rounds of the students."""
        return self.results.student_rounds if self.results else []

    @property
    def total_rounds(self) -> int:
        """How many student rounds there will be."""
        student = self.config.student
        return student.rounds + student.finetune_rounds if student.rounds else 0

    @property
    def turns(self) -> list[list[Hop]] | None:
        """The chain as it is planned; None while the sites, or their order, are not known.

        Also None once a hop was at another site than planned: then the schedule says nothing of what comes.
        """
        chain = self.config.chain
        if self.results is None or chain.order == "weakest-next":
            return None
        sizes = {site.site: site.train or 0 for site in self.results.data.sites}
        turns = schedule(site_order(list(sizes), sizes, chain, self.config.seed), chain.laps, chain.strands)
        sites = {hop.key: hop.site for turn in turns for hop in turn}
        return turns if all(sites.get(link.key) == link.site for link in self.links) else None


def expected_end(run: Standing) -> datetime | None:
    """Return when the run is expected to end; None before the first finished hop, and after the end.

    A hop is expected to take as long per image as those before it, a hospital alone and a student round in proportion until
    there are some to go by. A piece that takes longer than expected moves the end.
    """
    pieces = remaining_pieces(run)
    if pieces is None:
        return None
    pace = _pace(run)
    as_expected = run.updated + timedelta(seconds=pace * sum(pieces))
    return max(as_expected, run.time + timedelta(seconds=pace * sum(pieces[1:])))


def remaining_pieces(run: Standing) -> list[float] | None:
    """Return the seconds that each piece of work still to come is expected to take, the one under way first.

    Hops of one turn run at the same time and are one piece, and so are all hospitals alone. None before the first hop.
    """
    if run.ended or run.results is None:
        return None
    work = {site.site: float(site.train or 1) for site in run.results.data.sites}
    trained = [link for link in run.links if link.metrics] or run.links
    spent = sum(link.seconds for link in trained)
    images = sum(work.get(link.site, fmean(work.values())) for link in trained)
    if not spent or not images:
        return None
    config = run.config
    per_image = spent / images / (LINK_WORK * config.chain.epochs)  # of one epoch without a teacher
    together = sum if run.one_machine else max
    pieces = []
    if run.phase in ("rendezvous", "chain"):
        pieces += [per_image * LINK_WORK * config.chain.epochs * images for images in _turns_left(run, work)]
    if config.chain.compare_alone and run.phase in ("rendezvous", "chain", "alone"):
        # with one lap, the first link of a strand is its site alone, unless it has a teacher
        first_is_alone = config.chain.laps == 1 and config.chain.head == "trained"
        trained_already = {link.site for link in run.links if link.predecessor is None and first_is_alone}
        to_train = {site: images for site, images in work.items() if site not in trained_already | run.private}
        if to_train and len(run.alone) < len(work) - len(run.private):
            total = per_image * ALONE_WORK * config.chain.epochs * config.chain.laps * together(to_train.values())
            pieces.append(max(0.0, total - max((a.seconds for a in run.alone if a.site in to_train), default=0.0)))
    guessed = per_image * STUDENT_WORK * config.student.epochs * together(work.values())
    stages = ["distil"] * config.student.rounds + ["finetune"] * (run.total_rounds - config.student.rounds)
    for stage in stages[len(run.rounds) :] if run.total_rounds else []:
        same = [round_.seconds for round_ in run.rounds if round_.stage == stage]
        known = same or [round_.seconds for round_ in run.rounds]
        pieces.append(fmean(known) if known else guessed)
    return pieces


def _turns_left(run: Standing, work: dict[str, float]) -> list[float]:
    """Return the images of each turn that is left, those of the largest site where several sites train at once."""
    chain, mean = run.config.chain, fmean(work.values())
    done = {link.key for link in run.links}
    turns = run.turns
    if turns is None:  # which site is next is not known
        return [mean] * (chain.laps * len(work) - len(done) // chain.strands)
    left: list[list[Hop]] = [[hop for hop in turn if hop.key not in done] for turn in turns]
    return [max(work.get(hop.site, mean) for hop in turn) for turn in left if turn]


def _pace(run: Standing) -> float:
    """Return how much longer the run has taken than its pieces of work, between 1 and `SLOWEST_PACE`."""
    turns: dict[tuple[int, int], float] = {}
    for link in run.links:
        turns[link.lap, link.step] = max(turns.get((link.lap, link.step), 0.0), link.seconds)
    pieces = sum(turns.values()) + sum(round_.seconds for round_ in run.rounds)
    pieces += max((record.seconds for record in run.alone), default=0.0)
    rendezvous = run.results.timings.get("rendezvous", 0.0) if run.results else 0.0
    taken = (run.updated - run.started).total_seconds() - rendezvous
    return min(SLOWEST_PACE, max(1.0, taken / pieces)) if pieces else 1.0
