"""Secure sums as the stages of a run ask for them: over whom, and again where too few were there to the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from chainward_server.sites import Failure, Sites, Summable, Summed, TooFewSitesError, Work
from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import MaskedSum, SiteCard

logger = logging.getLogger("chainward")


def summed_everywhere(
    sites: Sites,
    what: str,
    work: Callable[[str], Work[Summable]],
    *,
    retries: int,
    asked: Collection[str] | None = None,
    weights: Callable[[Sequence[str]], Mapping[str, float]] | None = None,
    check: Callable[[str, MaskedSum], None] = lambda site, answer: None,
) -> Summed:
    """Return what the sites' numbers add up to, and why sites are missing, from all attempts.

    A sum that too few sites took part in to the end is tried again: without those that will not take part, and the last time
    without any that failed.

    Parameters
    ----------
    what : is summed, for the log
    work : what is asked of a site
    retries : so many times it is tried again
    asked : the sites to ask; default: all
    weights : what the numbers of each of some sites are multiplied by; default 1
    check : as of `Sites.summed`

    Raises
    ------
    ChainwardError
        They were too few each time.
    """
    members, failed = [site for site in sites.ids if asked is None or site in asked], dict[str, Failure]()
    for attempt in range(1 + retries):
        try:
            summed = sites.summed(
                {site: work(site) for site in members}, weights=weights(members) if weights else None, check=check
            )
        except TooFewSitesError as error:
            failed |= error.failed
            last = attempt + 1 == retries
            members = [site for site in members if not (site in failed and (last or failed[site].final))]
            reasons = "; ".join(failure.reason for failure in error.failed.values()) or "nobody said why"
            logger.warning("%s: %s (%s)%s", what, error, reasons, "; trying again" if attempt < retries else "")
            if not members:
                break
        else:
            failed |= summed.failed
            found = replace(summed, failed={site: why for site, why in failed.items() if site not in summed.sites})
            for reason in found.reasons.values():
                logger.warning("%s goes on without a site: %s", what, reason)
            return found
    raise ChainwardError(f"{what}: there was no secure sum (the log says why); resume the run when the sites are there")


def card_of_all(cards: Sequence[SiteCard]) -> SiteCard:
    """Return what all sites together would say of themselves, without the counts of classes.

    Of a split of which one doesn't say how many images it has, they don't either.
    """
    sizes: dict[str, int | None] = {}
    for split in ("train", "val", "test"):
        told = [getattr(card, split) for card in cards]
        sizes[split] = None if None in told else sum(told)
    return cards[0].model_copy(update=sizes | {"class_counts": {}})
