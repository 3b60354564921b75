"""How a training went, as a site tells it."""

from __future__ import annotations

from pydantic import Field

from chainward_shared.outside import Count, Lines, Loss, PerEpoch, Record, Seconds, Word
from chainward_shared.privacy.dp_sgd import DpSgd


class TrainingLog(Record):
    """How one training went; lists hold one value per epoch, `seconds` is the whole of it.

    `images` counts labelled images times epochs; `unlabelled`: images without labels that were used beside them.
    `attention`, `unlabelled_loss`, `privileged`: the mean of that term of the loss, unweighted; empty where it is not used.
    `privacy`: the DP-SGD parameters of a private training, of which nothing else but `seconds` tells anything: the
    lists are empty and `images` is the expected number. `notes`: what the site switched off, a line each.
    """

    epochs: Count
    steps: Count
    images: Count
    unlabelled: Count = 0
    loss: PerEpoch[Loss]
    temperature: PerEpoch[Loss] = Field(default_factory=list)
    teacher_trust: PerEpoch[Loss] = Field(default_factory=list)
    attention: PerEpoch[Loss] = Field(default_factory=list)
    unlabelled_loss: PerEpoch[Loss] = Field(default_factory=list)
    privileged: PerEpoch[Loss] = Field(default_factory=list)
    seconds: Seconds
    precision: Word
    privacy: DpSgd | None = None
    notes: Lines = Field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Images that went through training per second; 0 where no time was measured."""
        return self.images / self.seconds if self.seconds > 0 else 0.0
