"""Which node is which site, before anything is trained."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flwr.serverapp import Grid

from chainward_server.claims import check_card
from chainward_server.exchange import Exchange, Introduced, Member, introduced
from chainward_server.flower_sites import FlowerSites
from chainward_server.request import Reply, Request
from chainward_server.sites import Failure
from chainward_shared import __version__
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError, ProtocolError, nearest
from chainward_shared.protocol import CardRequest, Hello, HelloRequest, SimulatedSite, SiteCard

logger = logging.getLogger("chainward")

POLL_SECONDS = 1.0


def meet(
    grid: Grid,
    config: RunConfig,
    state_dir: Path,
    *,
    bound: Mapping[str, str] | None = None,
    earlier: Mapping[str, str] | None = None,
    run_id: str = "run",
) -> FlowerSites:
    """Find the sites among the connected nodes and collect their cards.

    Simulated nodes share the simulated sites among them, however many nodes Flower has started; a deployed node is the
    site that its own site.yaml says. Of several nodes that say the same, one is taken (`_deployed_members`), and the others
    are refused by name.

    Parameters
    ----------
    state_dir : folder in which simulated sites keep their state
    bound : public keys of sites with which this run has begun; no other node is taken for such a site
    earlier : the keys that sites had in runs before this one
    run_id : of the run, as the sites are told it

    Raises
    ------
    ChainwardError
        An expected site is missing at the deadline or refuses, a site runs another version, or the sites don't agree on
        task, classes and images.
    """
    started = time.monotonic()
    deadline = config.federation.deadline
    members = _members(grid, config, state_dir, started, _Keys(bound or {}, earlier or {}))
    for site, member in members.items():
        if member.key is not None and (earlier or {}).get(site, member.key) != member.key:
            logger.warning(
                "site '%s' shows another key than in earlier runs; ask the hospital whether it is right", site
            )
    deployed = all(member.simulated is None for member in members.values())
    exchange = (
        Exchange(grid, members, _hello(config), check_every=config.federation.check_every)
        if deployed
        else Exchange(grid, members)
    )
    logger.info("sites: %s", ", ".join(members))
    requests = {site: Request("query", CardRequest(simulated=member.simulated)) for site, member in members.items()}
    left = max(1.0, deadline - (time.monotonic() - started))
    answers = exchange.ask(requests, SiteCard, deadline=left, patience=left)
    cards = _cards(answers)
    exchange.members = {site: members[site] for site in cards}
    _check_cards(cards)
    return FlowerSites(exchange, cards, config.federation, run_id)


def _cards(answers: Mapping[str, Reply[SiteCard] | Failure]) -> dict[str, SiteCard]:
    """Return the cards of the sites that take part; one whose card can't be true is left out, and said.

    Raises
    ------
    ChainwardError
        A site did not answer, or refused; or none is left.
    """
    failures = [answer.reason for answer in answers.values() if isinstance(answer, Failure) and not answer.malformed]
    if failures:
        more = f" (and {len(failures) - 1} more sites)" if len(failures) > 1 else ""
        raise ChainwardError(f"{failures[0]}{more}")
    cards, left_out = {}, []
    for site, answer in answers.items():
        try:
            if isinstance(answer, Failure):
                raise ProtocolError(answer.reason)
            check_card(answer.body)
            cards[site] = answer.body
        except ProtocolError as error:
            left_out.append(f"site '{site}' is left out of the run, its card can't be used: {error}")
            logger.warning("%s", left_out[-1])
    if not cards:
        raise ChainwardError(left_out[0])
    return cards


def _members(grid: Grid, config: RunConfig, state_dir: Path, started: float, keys: _Keys) -> dict[str, Member]:
    """Return the members in chain order, waiting until all expected ones are there."""
    hello = _hello(config)
    known: dict[int, Introduced] = {}
    failures: dict[int, str] = {}
    reported = 0.0
    while True:
        left = config.federation.deadline - (time.monotonic() - started)
        new = [node for node in grid.get_node_ids() if node not in known]
        for node, answer in introduced(grid, new, hello, max(1.0, left)).items():
            if isinstance(answer, Failure):
                failures[node] = answer.reason.replace(f"site '{node}'", f"node {node}")
            else:
                known[node] = answer
                failures.pop(node, None)
        hellos = {node: one.hello for node, one in known.items()}
        _check_versions(config, hellos)
        simulated = [node for node, body in hellos.items() if body.site is None]
        if simulated and len(simulated) < len(known):
            raise ChainwardError(
                f"{len(simulated)} of {len(known)} nodes have no site.yaml (simulated) and the others have; start all alike"
            )
        if simulated:
            return _simulated_members(config, {node: hellos[node] for node in simulated}, state_dir)
        deployed = _deployed_members(known, keys)
        missing = _missing(config, deployed)
        if deployed and not missing:
            order = config.expected_sites or sorted(deployed)
            return {site: deployed[site] for site in order}
        waited = time.monotonic() - started
        if waited > config.federation.deadline:
            words = "".join(f"; {reason}" for reason in [*failures.values(), *keys.refused.values()][:1])
            raise ChainwardError(
                f"after {waited:.0f} s (federation.deadline) {missing or 'every site'} is missing; "
                f"connected: {', '.join(sorted(deployed)) or 'none'}{words}"
            )
        if waited - reported > 10:
            reported = waited
            logger.info(
                "waiting for %s (%.0f s of %.0f s)", missing or "the first site", waited, config.federation.deadline
            )
        time.sleep(POLL_SECONDS)


def _check_versions(config: RunConfig, known: dict[int, Hello]) -> None:
    """Refuse sites whose client is of another minor version: what a recipe means may differ between minor versions."""
    for node, body in known.items():
        takes_part = body.site is None or not config.expected_sites or body.site in config.expected_sites
        if takes_part and _minor(body.version) != _minor(__version__):
            name = f"node {node}" if body.site is None else f"site '{body.site}'"
            raise ChainwardError(
                f"{name} runs chainward {body.version[:40]!r}, the coordinator {__version__!r}; install the same minor version, "
                f"{_minor(__version__)}, on both sides"
            )


def _minor(version: str) -> str:
    """Return major and minor version: "0.1" of "0.1.3"."""
    return ".".join(version.split(".")[:2])


def _hello(config: RunConfig) -> HelloRequest:
    return HelloRequest(
        source=config.data.source, num_sites=_simulated_count(config), label_skew=config.data.label_skew
    )


def _missing(config: RunConfig, deployed: dict[str, Member]) -> str:
    """Return in words which sites are still missing; empty if none is."""
    if config.expected_sites:
        absent = [site for site in config.expected_sites if site not in deployed]
        return ", ".join(f"'{site}'{nearest(site, deployed)}" for site in absent)
    lacking = max(config.federation.num_sites, 1) - len(deployed)
    return f"{lacking} more site(s)" if lacking > 0 else ""


@dataclass
class _Keys:
    """By which keys sites are known, and which nodes were refused, with the reason for each."""

    bound: Mapping[str, str]
    earlier: Mapping[str, str]
    refused: dict[int, str] = field(default_factory=dict)

    def refuse(self, node: int, reason: str) -> None:
        """Note, and say once, why a node is not taken for the site that it says it is."""
        if node not in self.refused:
            logger.warning("%s", reason)
        self.refused[node] = reason


def _deployed_members(known: Mapping[int, Introduced], keys: _Keys) -> dict[str, Member]:
    """Return which node is which site. Nobody takes part who can't show the key with which the run has begun; else of
    several nodes with one name the one whose key earlier runs know is taken, or else the one that was met first."""
    members: dict[str, Member] = {}
    for node, one in sorted(known.items(), key=lambda item: not _is_of_earlier_runs(item[1], keys)):
        site = one.hello.site or ""
        if keys.bound.get(site, one.key) != one.key:
            keys.refuse(
                node, f"node {node} says that it is site '{site}' and can't show that site's key; it is refused"
            )
        elif site in members:
            keys.refuse(
                node,
                f"node {node} says that it is site '{site}', which node {members[site].node_id} is; it is refused. Correct "
                "the site.yaml of one of them",
            )
        else:
            members[site] = Member(site, node, key=one.key)
            keys.refused.pop(node, None)
    return members


def _is_of_earlier_runs(one: Introduced, keys: _Keys) -> bool:
    return one.key is not None and keys.earlier.get(one.hello.site or "") == one.key


def _simulated_members(config: RunConfig, known: dict[int, Hello], state_dir: Path) -> dict[str, Member]:
    """Spread the simulated sites over the nodes, in the order of the nodes' partitions."""
    nodes = sorted(known, key=lambda node: (known[node].partition or 0, node))
    if problem := known[nodes[0]].problem:
        raise ChainwardError(problem)
    available = known[nodes[0]].simulated_sites
    order = list(config.expected_sites) or available
    if unknown := [site for site in order if site not in available]:
        raise ChainwardError(
            f"federation.sites names '{unknown[0]}'{nearest(unknown[0], available)}; the data has {', '.join(available)}"
        )
    budgets = [site for site in config.privacy.simulated_budgets() if site]
    if unknown := [site for site in (*config.privacy.simulated_site_ids, *budgets) if site not in order]:
        raise ChainwardError(
            f"privacy.simulated-sites or privacy.simulated-budget names '{unknown[0]}'{nearest(unknown[0], order)}; the run "
            f"has {', '.join(order)}"
        )
    if config.chain.strands > len(order):
        raise ChainwardError(
            f"chain.strands = {config.chain.strands}, but there are {len(order)} sites, and no site holds two strands at once"
        )
    members = {}
    for position, site in enumerate(order):
        simulated = SimulatedSite(
            index=available.index(site),
            source=config.data.source,
            num_sites=_simulated_count(config),
            label_skew=config.data.label_skew,
            seed=config.seed,
            state_dir=str(state_dir),
            policy=config.privacy.simulated_policy(site),
        )
        members[site] = Member(site, nodes[position % len(nodes)], simulated)
    return members


def _simulated_count(config: RunConfig) -> int:
    """Return how many sites the data source shall yield; 0: as many as it has, of which federation.sites names some."""
    return 0 if config.expected_sites else config.federation.num_sites


def _check_cards(cards: dict[str, SiteCard]) -> None:
    first = next(iter(cards.values()))
    for site, card in cards.items():
        if card.site != site:
            raise ChainwardError(f"site '{site}' now says it is '{card.site}'; correct its site.yaml")
        for what in ("task", "classes", "image_size", "channels"):
            if getattr(card, what) != getattr(first, what):
                raise ChainwardError(
                    f"site '{site}' has {what.replace('_', ' ')} {getattr(card, what)}, site '{first.site}' has "
                    f"{getattr(first, what)}; agree on one in the sites' data files"
                )
