"""What the coordinator holds of the sites' privacy: their signed statements, checked as they come, and privacy.json."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared.errors import StatementError
from chainward_shared.privacy.entries import Head
from chainward_shared.privacy.record import PrivacyRecord, privacy_record, read_privacy_record
from chainward_shared.privacy.statements import Statement, Statements, parse_statement
from chainward_shared.protocol import SiteCard

logger = logging.getLogger("chainward")


class RunPrivacy:
    """The statements of a run's private sites.

    A statement comes with every piece of work. The first of a site is held against the last that an earlier run of the same
    output folder holds of it, so that a ledger that was put back, or another key, is noticed from run to run.

    Parameters
    ----------
    on : whether the run asks for privacy at all
    run_id : of the run, as the sites are told it
    cards : what the sites have said of themselves
    known : the last statement that earlier runs hold of each site
    own : statements that an earlier part of this run has left
    write : takes what privacy.json is to hold; default: nothing is written
    """

    def __init__(
        self,
        *,
        on: bool,
        run_id: str,
        cards: Mapping[str, SiteCard],
        known: Mapping[str, Statement] | None = None,
        own: Iterable[Statement] = (),
        write: Callable[[PrivacyRecord], None] = lambda record: None,
    ) -> None:
        self.on, self._run_id, self._cards, self._write = on, run_id, cards, write
        self._statements = Statements(known=dict(known or {}))
        for statement in own:
            self._statements.add(statement)

    def is_private(self, site: str) -> bool:
        """Return whether what leaves this site in this run comes with a statement."""
        return self.on and self._cards[site].privacy is not None

    def seen_head(self, site: str) -> Head | None:
        """Return how far this site's ledger went when it was last seen; the site must not have less."""
        last = self._statements.last(site) or self._statements.known(site)
        return None if last is None else last.head

    def take(self, statement: Statement | None, site: str, hop: str) -> None:
        """Check and keep the statement that came with a piece of work.

        Raises
        ------
        StatementError
            There is none and must be, or it can't be right; what came with it must not be used.
        """
        if statement is None:
            if self.is_private(site):
                raise StatementError(f"site '{site}' trains privately and sent no privacy statement")
            return
        self._statements.accept(statement, site=site, run=self._run_id, hop=hop)
        self.write(None)

    def write(self, results: Results | None) -> None:
        """Write privacy.json; at the end, with `results`, also what the sites without a statement did."""
        trained = None if results is None else _trained(results)
        sites = list(self._cards)
        self._write(privacy_record(self._statements, sites, trained=trained))


def _trained(results: Results) -> set[str]:
    """Return the sites from which a model came."""
    links = {link.site for link in results.links if link.bytes_up}
    alone = {record.site for record in results.alone if record.metrics is not None}
    heads = {site for record in results.heads for site in record.sites}
    return links | alone | heads | {site for round_ in results.student_rounds for site in round_.sites}


def run_privacy(folder: RunFolder, cards: Mapping[str, SiteCard], *, simulated: bool) -> RunPrivacy:
    """Return the statements of the run that `folder` holds; simulated sites have a new ledger in every run."""
    record = folder.path / "privacy.json"
    own = [parse_statement(content) for content in read_privacy_record(record).statements] if record.exists() else []
    return RunPrivacy(
        on=folder.config.privacy.mode != "off",
        run_id=folder.run_id,
        cards=cards,
        known={} if simulated else last_of_earlier_runs(folder.path),
        own=own,
        write=folder.write_privacy,
    )


def last_of_earlier_runs(folder: Path) -> dict[str, Statement]:
    """Return each site's newest statement in the run folders beside this one; what can't be read is left out."""
    newest: dict[str, Statement] = {}
    for path in sorted(folder.parent.glob("*/privacy.json")):
        if path.parent == folder:
            continue
        try:
            statements = [parse_statement(content) for content in read_privacy_record(path).statements]
        except StatementError as error:
            logger.warning("an earlier run's privacy statements are left aside: %s", error)
            continue
        for statement in statements:
            before = newest.get(statement.site)
            if before is None or statement.head.sequence >= before.head.sequence:
                newest[statement.site] = statement
    return newest
