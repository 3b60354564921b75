"""Private training: the step of the one training loop that clips, adds noise, and samples patients (Abadi et al. 2016).

The guarantee is about a sum of vectors, one for each sampled unit, each no longer than `clip`. It holds only where each
vector is a function of **one record and public things**. What that means for each part of a recipe:

====================================  ==============================================================================
cross-entropy                         one record
distillation from the predecessor     one record; the predecessor is another site's output, or this site's, accounted for
teacher trust, attention transfer     one record and the predecessor
large models, auxiliary teacher       one record and what private steps yielded before (post-processing)
temperature, learning rate            functions of the step: DP-SGD's parameters are fixed before the first one
moving averages, weight selection     post-processing of noisy weights
class balance "none"                  one record
"site-prior", "weighted"              counts of private labels: refused, unless the prior is declared
label fraction below 1                drawn class by class it depends on all labels: under privacy each patient's labels
                                      are kept by a hash of the patient alone (`keeps_labels`)
images without labels                 units of their own, sampled, clipped and counted in the expected batch like others
privileged teachers                   trained on all records: refused, unless trained privately, on the same ledger
projector                             clipped together with the model, one vector
augmentation, dropout                 each image's random numbers must not depend on which others are in the batch. Drawn
                                      in order from a known seed they do: without one patient, all later images get
                                      other views. Fresh secret numbers have one distribution for every image, whoever
                                      else is there; so they come from the operating system, not from the run's seed
batch norm                            a function of the batch: refused (`models.private_ready`)
losses, trust, counts in the log      functions of all records: not in the log of a private training
bf16                                  off: clipping has been verified in fp32 only
====================================  ==============================================================================
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.entropy import Entropy
from chainward_shared.errors import ChainwardError, ModelError, PolicyRefusal, PrivacyError
from chainward_shared.models.ghost import GhostClipping
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.recipes import TrainingRecipe
from chainward_shared.seeds import derive_seed
from chainward_shared.settings import PrivacyUnit

logger = logging.getLogger("chainward.client")

_OF_ONE_RECORD = (ArithmeticError, LookupError, RuntimeError, ValueError)
"""What computing a loss may raise because of what a record holds."""


class PrivateTraining:
    """One private training on the loop of `training.loop`: hand it to `train` and read `steps_done` afterwards.

    Parameters
    ----------
    dp_sgd : fixed for the whole training; reserve ``dp_sgd.mechanism`` in the ledger first
    unlabelled_patients : str (m,), the patient of each image without label; needed where there are such images
    declared_prior : the objective's class counts are declared, not counted (`declared_counts`)
    private_teachers : the privileged teachers were trained privately and their cost is on the same ledger
    together : examples computed at once; 0, the default: as many as fit into memory. Changes no result
    views : of each example in a step, each augmented for itself; its gradient is their mean, clipped as one; default 1
    average_decay : of the weights' moving average, which the training yields; 0, the default: the last weights
    entropy : the operating system, unless a test wants to repeat itself
    """

    def __init__(
        self,
        dp_sgd: DpSgd,
        *,
        unlabelled_patients: np.ndarray | None = None,
        declared_prior: bool = False,
        private_teachers: bool = False,
        together: int = 0,
        views: int = 1,
        average_decay: float = 0.0,
        entropy: Entropy | None = None,
    ) -> None:
        self.dp_sgd, self.together, self.views, self.average_decay = dp_sgd, together, views, average_decay
        self.unlabelled_patients = unlabelled_patients
        self.declared_prior, self.private_teachers = declared_prior, private_teachers
        self.entropy = Entropy() if entropy is None else entropy
        self.steps_done = 0
        """What was spent up to now, of ``dp_sgd.steps``; a step counts from the moment its noise is drawn."""
        self._units: list[np.ndarray] = []
        self._ghost: GhostClipping | None = None
        self._parameters: list[nn.Parameter] = []
        self._sums: list[Tensor] = []
        self._left_out = 0

    def check(self, recipe: TrainingRecipe, unlabelled: int) -> None:
        """Refuse what is not a function of one record and public things.

        Raises
        ------
        PolicyRefusal
            Names the setting and what to do.
        """
        if recipe.class_balance != "none" and not self.declared_prior:
            raise PolicyRefusal(
                f"class-balance '{recipe.class_balance}' counts this site's labels, which is not allowed under privacy: "
                "declare the prior in site.yaml or set class-balance to 'none'"
            )
        if recipe.privileged is not None and not self.private_teachers:
            raise PolicyRefusal(
                "privileged teachers trained without privacy have seen every patient, and what they teach breaks the "
                "guarantee: train them privately or switch them off"
            )
        if unlabelled and (self.unlabelled_patients is None or len(self.unlabelled_patients) != unlabelled):
            found = 0 if self.unlabelled_patients is None else len(self.unlabelled_patients)
            raise PolicyRefusal(
                f"{unlabelled} images without label need their patients under privacy, found {found}; give them or set "
                "unlabelled-weight to 0"
            )
        if recipe.precision == "bf16":
            raise PolicyRefusal("precision 'bf16' is not verified for private training; set it to 'fp32' or 'auto'")

    def start(
        self, model: nn.Module, others: Sequence[nn.Module], parameters: Sequence[nn.Parameter], patients: np.ndarray
    ) -> None:
        """Prepare for training `model` on the images of `patients`, str (n,).

        Parameters
        ----------
        others : modules that are trained beside the model
        parameters : all that the optimiser changes

        Raises
        ------
        ModelError
            The optimiser changes a parameter that is in none of the modules: it would not be clipped.
        PrivacyError
            The unit is the patient and an image has none.
        """
        self._ghost = GhostClipping([model, *others])
        self._parameters = self._ghost.parameters
        if {id(p) for p in parameters if p.requires_grad} != {id(p) for p in self._parameters}:
            raise ModelError(
                "the optimiser's parameters are not those with per-example gradients; that is a fault here"
            )
        if not self.together:
            self.together = max(1, self._ghost.most_together() // self.views)
        beside = np.array([], dtype=str) if self.unlabelled_patients is None else self.unlabelled_patients
        self._units = units_of(np.concatenate([patients, beside]), self.dp_sgd.unit)
        self._sums = []

    def secret_generator(self, device: torch.device) -> torch.Generator:
        """Draw the state of PyTorch's own generators (dropout) anew and return a generator for augmentations."""
        torch.default_generator.set_state(self.entropy.generator().get_state())
        if device.type == "cuda":
            torch.cuda.manual_seed(self.entropy.integer())
        return self.entropy.generator()

    def sample(self) -> Tensor:
        """Return a Poisson sample of the units, one random image of each: int64 rows, ascending; often fewer or more than
        expected, perhaps none. Rows from n on are of images without labels."""
        inside = np.flatnonzero(self.entropy.uniform(len(self._units)) < self.dp_sgd.sample_rate)
        which = self.entropy.uniform(len(inside))
        rows = [self._units[unit][int(u * len(self._units[unit]))] for unit, u in zip(inside, which, strict=True)]
        return torch.tensor(sorted(int(row) for row in rows), dtype=torch.int64)

    def parts(self, rows: Tensor) -> Iterator[Tensor]:
        """Return `rows` in parts that fit into memory; none for an empty sample."""
        return iter(rows.split(self.together) if len(rows) else ())

    def accumulate(self, losses: Tensor) -> None:
        """Add the clipped gradient of each example's loss to the step's sum; losses (n views,), those of an example's views after
        one another."""
        assert self._ghost is not None
        for parameter in self._parameters:
            parameter.grad = None  # the noisy one of the step before
        (losses.sum() / self.views).backward()
        clipped = self._ghost.clipped_sum(len(losses) // self.views, self.dp_sgd.clip, self.views)
        if not self._sums:
            self._sums = clipped
            return
        # in float64: what one example adds must not change how the sum of all the others is rounded
        self._sums = [total.double().add_(more) for total, more in zip(self._sums, clipped, strict=True)]

    def finish_step(self) -> None:
        """Set each parameter's ``grad`` to the noisy mean: (sum + noise) / expected batch. Also after an empty sample.

        Sum and noise are in units of the clipping norm, which comes in last, when nothing is private any more.
        """
        if self.steps_done >= self.dp_sgd.steps:
            raise PrivacyError(f"all {self.dp_sgd.steps} private steps are done; one more was not reserved")
        self.steps_done += 1
        noises = self.entropy.normal([p.shape for p in self._parameters], self._parameters[0].device)
        for i, (parameter, noise) in enumerate(zip(self._parameters, noises, strict=True)):
            noise.mul_(self.dp_sgd.noise_multiplier)  # in place: new memory costs as much as a third of a small step
            if self._sums:
                noise.add_(self._sums[i])
            parameter.grad = noise.mul_(self.dp_sgd.clip / self.dp_sgd.expected_batch)
        self._sums = []

    def step(self, losses: Callable[[Tensor], Tensor]) -> None:
        """Do one step up to the optimiser's: a Poisson sample, in parts that fit into memory, and one draw of noise.

        An image whose loss can't be computed adds nothing, like one whose gradient is not finite: that a training fails,
        or what it says then, would tell whether the image is there.

        Parameters
        ----------
        losses : the loss of each example of some rows, (n,); a row without a loss of its own has 0. Of several views of an
            example it gets the row as many times
        """
        for rows in self.parts(self.sample()):
            self._add(losses, rows)
        self.finish_step()

    def _add(self, losses: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        assert self._ghost is not None
        try:
            self.accumulate(losses(rows.repeat_interleave(self.views)))
        except ChainwardError:  # of the model or the recipe, whatever the images
            raise
        except _OF_ONE_RECORD as error:
            self._ghost.forget()
            if len(rows) > 1:
                for row in rows.split(1):
                    self._add(losses, row)
                return
            if not self._left_out:
                logger.error("the loss of an image can't be computed, it adds nothing: %s", error, exc_info=True)
            self._left_out += 1

    def close(self) -> None:
        """Leave the model without any trace of single examples."""
        if self._left_out:
            logger.error("losses that could not be computed in this private training: %d", self._left_out)
        if self._ghost is not None:
            self._ghost.close()
        for parameter in self._parameters:
            parameter.grad = None
        self._ghost, self._parameters, self._sums = None, [], []


def units_of(patients: np.ndarray, unit: PrivacyUnit) -> list[np.ndarray]:
    """Return the rows of each unit: of each patient, in the order of first appearance, or each row alone.

    Raises
    ------
    PrivacyError
        The unit is the patient and an image has none.
    """
    if unit == "image":
        return [np.array([row]) for row in range(len(patients))]
    rows: dict[str, list[int]] = {}
    for row, patient in enumerate(patients):
        if not str(patient).strip():
            raise PrivacyError(
                f"image {row} has no patient, but patients are what privacy is to protect; "
                "give patient ids or set the unit to 'image'"
            )
        rows.setdefault(str(patient), []).append(row)
    return [np.array(of_one) for of_one in rows.values()]


def keeps_labels(patients: np.ndarray, fraction: float, seed: int, site: str) -> np.ndarray:
    """Return the rows whose labels are kept, ascending: about `fraction` of the patients, each by a hash of its own id.

    What happens to one patient does not depend on another, so this is allowed under privacy; a draw class by class is not.
    """
    named = [str(patient) for patient in patients]
    kept = {one for one in set(named) if derive_seed(seed, site, "labels-of", one) < fraction * 2.0**63}
    return np.flatnonzero([patient in kept for patient in named])


def declared_counts(prior: Sequence[float], *, multilabel: bool) -> Tensor:
    """Return a declared class prior in the form of `class_counts`, as of a million cases.

    Parameters
    ----------
    prior : share of each class; multi-label: share of cases with each finding

    Raises
    ------
    PrivacyError
        A share is not within [0, 1], or those of a single-label task don't add up to 1.
    """
    if not all(math.isfinite(p) and 0 <= p <= 1 for p in prior):
        raise PrivacyError(f"the declared prior {list(prior)} has a share that is not within 0 and 1")
    shares = torch.tensor(list(prior), dtype=torch.float64)
    if multilabel:
        return torch.stack([1 - shares, shares], dim=1).mul(1e6).round().long()
    if abs(float(shares.sum()) - 1) > 1e-3:
        raise PrivacyError(f"the declared prior {list(prior)} adds up to {float(shares.sum()):g}, expected 1")
    return shares.mul(1e6).round().long()
