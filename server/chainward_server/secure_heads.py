"""Statistics rounds by secure sums: the total of all sites, asked for again where too few took part to the end."""

from __future__ import annotations

import torch

from chainward_server.claims import check_sums
from chainward_server.context import Run
from chainward_server.results import HeadRecord
from chainward_server.secure_rounds import card_of_all, summed_everywhere
from chainward_server.sites import Summed, Work
from chainward_shared.discriminant import HeadSums
from chainward_shared.protocol import StatisticsTask
from chainward_shared.secure_sums import FRACTION_BITS
from chainward_shared.weights import StateDict


def added_up(run: Run, task: StatisticsTask, state: StateDict) -> tuple[HeadRecord, StateDict]:
    """Return the record of a statistics round and what the sums of all sites that took part add up to.

    Raises
    ------
    ChainwardError
        Too few sites took part to the end, at every attempt, or no images have such sums.
    """
    what = f"statistics round '{task.hop}'"
    work = Work(task, {"model": state})
    summed = summed_everywhere(run.sites, what, lambda site: work, retries=run.config.chain.retries)
    images = {split: round(float(summed.state[f"{split}.images"])) for split in ("train", "val")}
    card = card_of_all([run.sites.cards[site] for site in summed.sites])
    rounding = len(summed.sites) * len(card.classes) * 2.0**-FRACTION_BITS
    weights = torch.tensor(task.class_weights, dtype=torch.float64) if task.class_weights else None
    train, validation = HeadSums.from_state(summed.state, "train", weights), HeadSums.from_state(summed.state, "val")
    check_sums(train, "train", images["train"], card, rounding=rounding)
    check_sums(validation, "val", images["val"], card, rounding=rounding)
    record = head_record(task.hop, summed, images["train"], images["val"], secure=True)
    return record, summed.state


def head_record(key: str, summed: Summed, images: int, validation: int = 0, *, secure: bool) -> HeadRecord:
    """Return the record of a statistics round over so many images, without what its head will be."""
    return HeadRecord(
        key=key,
        sites=summed.sites,
        secure=secure,
        failed=summed.reasons,
        unreached=summed.unreached,
        images=images,
        validation=validation,
        seconds=summed.seconds,
        bytes_down=summed.bytes_down,
        bytes_up=summed.bytes_up,
    )
