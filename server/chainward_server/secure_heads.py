"""Statistics rounds by secure sums: the total of all sites, asked for again where too few took part to the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from chainward_server.claims import check_sums
from chainward_server.context import Run
from chainward_server.results import HeadRecord
from chainward_server.sites import Failure, Summed, TooFewSitesError, Work
from chainward_shared.discriminant import HeadSums
from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import SiteCard, StatisticsTask
from chainward_shared.secure_sums import FRACTION_BITS
from chainward_shared.weights import StateDict

logger = logging.getLogger("chainward")


def is_secure(run: Run) -> bool:
    """Return whether a run's sums are secure ones: because it says so, or a site gives them in no other way."""
    mode = run.config.federation.secure_sums
    return mode == "on" or (mode == "required-by-site" and any(card.secure_sums for card in run.sites.cards.values()))


def added_up(run: Run, task: StatisticsTask, state: StateDict) -> tuple[HeadRecord, StateDict]:
    """Return the record of a statistics round and what the sums of all sites that took part add up to.

    Raises
    ------
    ChainwardError
        Too few sites took part to the end, at every attempt, or no images have such sums.
    """
    summed, failed = _summed(run, task, state)
    failed = {site: failure for site, failure in failed.items() if site not in summed.sites}
    for failure in failed.values():
        logger.warning("statistics round '%s' goes on without a site: %s", task.hop, failure.reason)
    images = {split: round(float(summed.state[f"{split}.images"])) for split in ("train", "val")}
    card = _card_of_all([run.sites.cards[site] for site in summed.sites])
    rounding = len(summed.sites) * len(card.classes) * 2.0**-FRACTION_BITS
    weights = torch.tensor(task.class_weights, dtype=torch.float64) if task.class_weights else None
    train, validation = HeadSums.from_state(summed.state, "train", weights), HeadSums.from_state(summed.state, "val")
    check_sums(train, "train", images["train"], card, rounding=rounding)
    check_sums(validation, "val", images["val"], card, rounding=rounding)
    return HeadRecord(
        key=task.hop,
        sites=summed.sites,
        secure=True,
        failed={site: failure.reason for site, failure in failed.items()},
        unreached=[site for site, failure in failed.items() if failure.lost],
        images=images["train"],
        validation=images["val"],
        seconds=summed.seconds,
        bytes_down=summed.bytes_down,
        bytes_up=summed.bytes_up,
    ), summed.state


def _summed(run: Run, task: StatisticsTask, state: StateDict) -> tuple[Summed, dict[str, Failure]]:
    members, failed, retries = list(run.sites.ids), dict[str, Failure](), run.config.chain.retries
    for attempt in range(1 + retries):
        try:
            summed = run.sites.summed({site: Work(task, {"model": state}) for site in members})
        except TooFewSitesError as error:
            failed |= error.failed
            members = [site for site in members if not (site in failed and failed[site].final)]
            reasons = "; ".join(failure.reason for failure in error.failed.values()) or "nobody said why"
            again = "; trying again" if attempt < retries else ""
            logger.warning("statistics round '%s': %s (%s)%s", task.hop, error, reasons, again)
        else:
            return summed, failed | dict(summed.failed)
    raise ChainwardError(
        f"statistics round '{task.hop}': there was no secure sum (the log says why); resume the run when the sites are there, or "
        "set chain.head and student.head to 'trained'"
    )


def _card_of_all(cards: Sequence[SiteCard]) -> SiteCard:
    """Return what all sites together would say of themselves, without the counts of classes."""
    validation = [card.val for card in cards if card.val is not None]
    return cards[0].model_copy(
        update={
            "train": sum(card.train for card in cards),
            "val": sum(validation) if len(validation) == len(cards) else None,
            "class_counts": {},
        }
    )
