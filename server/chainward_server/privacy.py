"""What the coordinator holds of the sites' privacy: their signed statements, checked as they come, and privacy.json."""

from __future__ import annotations

import logging
from pathlib import Path

from chainward_server.rendezvous import Consortium
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared.errors import StatementError
from chainward_shared.privacy.entries import Head
from chainward_shared.privacy.statements import (
    Statement,
    Statements,
    parse_statement,
    privacy_record,
    read_statements,
)

logger = logging.getLogger("chainward")


class RunPrivacy:
    """The statements of a run's private sites.

    A statement comes with every piece of work. The first of a site is held against the last that an earlier run of the same
    output folder holds of it, so that a ledger that was put back, or another key, is noticed from run to run.
    """

    def __init__(self, folder: RunFolder, consortium: Consortium) -> None:
        self._folder, self._consortium = folder, consortium
        earlier = {} if consortium.simulated else last_of_earlier_runs(folder.path)
        self._statements = Statements(known=earlier)
        if (folder.path / "privacy.json").exists():
            for content in read_statements(folder.path / "privacy.json"):
                self._statements.add(parse_statement(content))

    @property
    def on(self) -> bool:
        """Whether the run asks for privacy at all."""
        return self._folder.config.privacy.mode != "off"

    def is_private(self, site: str) -> bool:
        """Return whether what leaves this site in this run comes with a statement."""
        return self.on and self._consortium.cards[site].privacy is not None

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
        self._statements.accept(statement, site=site, run=self._folder.state.run_id, hop=hop)
        self.write(None)

    def write(self, results: Results | None) -> None:
        """Write privacy.json; at the end, with `results`, also what the sites without a statement did."""
        trained = None if results is None else _trained(results)
        sites = list(self._consortium.cards)
        self._folder.write_privacy(privacy_record(self._statements, sites, trained=trained))


def _trained(results: Results) -> set[str]:
    """Return the sites from which a model came."""
    links = {link.site for link in results.links if link.bytes_up}
    alone = {record.site for record in results.alone if record.metrics is not None}
    return links | alone | {site for round_ in results.student_rounds for site in round_.sites}


def last_of_earlier_runs(folder: Path) -> dict[str, Statement]:
    """Return each site's newest statement in the run folders beside this one; what can't be read is left out."""
    newest: dict[str, Statement] = {}
    for path in sorted(folder.parent.glob("*/privacy.json")):
        if path.parent == folder:
            continue
        try:
            statements = [parse_statement(content) for content in read_statements(path)]
        except StatementError as error:
            logger.warning("an earlier run's privacy statements are left aside: %s", error)
            continue
        for statement in statements:
            before = newest.get(statement.site)
            if before is None or statement.head.sequence >= before.head.sequence:
                newest[statement.site] = statement
    return newest
