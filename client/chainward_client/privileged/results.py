"""What privileged teachers say of the cases of a site, and how the teachers fare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeacherReport:
    """How one teacher fares. Stays in the site's own log.

    Attributes
    ----------
    cases : training cases that have the modality
    balanced_accuracy : out of fold, under privacy on the training cases themselves; multi-label: the mean over the
        findings. NaN where no case can tell
    """

    cases: int
    balanced_accuracy: float


@dataclass(frozen=True)
class PrivilegedTargets:
    """What the privileged teachers of a site say of each of n cases. Never leaves the site.

    A case with report and table has the mean of the two teachers' logits, and their embeddings side by side, each of
    length 1. A case with one of them has that one, and zeros for the other, which `present` keeps out of every comparison.

    Attributes
    ----------
    logits : float32 (n, classes), out of fold (under privacy of the one teacher); 0 where not taught
    taught : bool (n, classes), the classes that all teachers of this case have seen; under privacy all classes
    embeddings : float32 (n, d), 0 where not present
    present : bool (n, d), the dimensions of the modalities that the case has
    multilabel : whether the classes are questions of their own
    report : of each teacher, "text" and "table"
    private : whether the teachers were trained privately, and paid for on the site's ledger
    """

    logits: Tensor
    taught: Tensor
    embeddings: Tensor
    present: Tensor
    multilabel: bool
    report: Mapping[str, TeacherReport]
    private: bool = False

    @property
    def available(self) -> Tensor:
        """Return which cases have something privileged, bool (n,)."""
        return self.present.any(dim=1)
