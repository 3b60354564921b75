"""A site that trains privately: its policy, its ledger, and the work that the two of them allow.

The order, for every piece of work that costs privacy: the policy checks what is asked (`check`), its cost is reserved on
disk, the training begins, the last noisy step commits, the work is stored, and only then it leaves, with a statement of
the ledger. What fails after the reservation stays spent, all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from chainward_client.checkpoint import Checkpoint
from chainward_client.data.site_data import SiteData
from chainward_client.entropy import Entropy
from chainward_client.policy import (
    asked_of_site,
    asked_units,
    check_request,
    check_scale,
    check_units,
    releases_in,
    releases_of_run,
    reserve,
    whole_run,
)
from chainward_client.private_training import PrivateTraining, declared_counts
from chainward_client.site_ledger import create_site_ledger, open_site_ledger
from chainward_shared.errors import PolicyRefusal, PrivacyError, SpentError
from chainward_shared.privacy.accounting import Mechanism, spent
from chainward_shared.privacy.dp_sgd import DpSgd, dp_sgd_of, rounded_units
from chainward_shared.privacy.ledger import Ledger, Reservation
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.privacy.statements import Statement, sign_statement
from chainward_shared.private_sums import LENGTH
from chainward_shared.protocol import SharedNoise
from chainward_shared.recipes import PrivacyRecipe, TrainingRecipe

logger = logging.getLogger("chainward.client")

_ROUNDING = 1 + 1e-6
NO_CLASS_SHARES = "class-balance off: the counts of this site's labels are private, and it declares no class shares"


@dataclass(frozen=True)
class PrivateSite:
    """What a site's private work needs.

    Attributes
    ----------
    policy, ledger, key : the site's own
    entropy : where noise and sampling come from; a test may repeat itself, and the ledger then says so
    """

    policy: PrivacyPolicy
    ledger: Ledger
    key: Ed25519PrivateKey
    entropy: Entropy

    @classmethod
    def open(cls, policy: PrivacyPolicy, state_dir: Path, site: str, *, create: bool = False) -> PrivateSite:
        """Open a site's ledger, or, in a simulation (`create`), make it.

        Raises
        ------
        PrivacyError
            Ledger or key are missing or damaged, or the folder can't be written.
        """
        if create:
            create_site_ledger(state_dir, site)
        ledger, key = open_site_ledger(state_dir, site)
        return cls(policy, ledger, key, Entropy())

    def work(self, run: str, hop: str) -> PrivateWork:
        """Return what a piece of work of a run spends through."""
        return PrivateWork(self, run, hop)


def check_data(policy: PrivacyPolicy, data: SiteData) -> None:
    """Check a policy against the training data.

    Raises
    ------
    PolicyRefusal
        Delta is not below 1 / units, patients can't be told apart, or the images' grey scale was measured on all of them.
    """
    check_scale(measured=data.scale is not None)
    check_units(policy, _true_units(policy, data), has_patient_ids=data.has_patient_ids)


def declared_units(policy: PrivacyPolicy, data: SiteData) -> int:
    """Return the number of patients (or images) with training data that others may know: declared, or rounded down."""
    return policy.units or rounded_units(_true_units(policy, data))


def _true_units(policy: PrivacyPolicy, data: SiteData) -> int:
    patients = data.splits["train"].patients
    return len(np.unique(patients)) if policy.unit == "patient" else len(patients)


R = TypeVar("R", bound=TrainingRecipe)


@dataclass(frozen=True)
class Prepared(Generic[R]):
    """A recipe as a private training can follow it.

    Attributes
    ----------
    counts : in the form of `losses.class_counts`, declared by the site; ones where it declares none
    notes : a line on each thing that is switched off
    """

    recipe: R
    counts: Tensor
    notes: list[str]


@dataclass(frozen=True)
class PrivateWork:
    """One piece of work of a run at a private site, which may hold several private trainings and releases."""

    site: PrivateSite
    run: str
    hop: str

    def prepared(self, recipe: R, data: SiteData) -> Prepared[R]:
        """Return the recipe as a private training can follow it.

        Raises
        ------
        PolicyRefusal
            The classes that the site declares shares of are not those of the data.
        """
        shares = self.site.policy.class_shares
        if shares is None:
            nothing = torch.ones(len(data.classes), dtype=torch.int64)
            if recipe.class_balance == "none":
                return Prepared(recipe, nothing, [])
            return Prepared(recipe.model_copy(update={"class_balance": "none"}), nothing, [NO_CLASS_SHARES])
        if set(shares) != set(data.classes):
            named = ", ".join(sorted(set(shares) ^ set(data.classes)))
            raise PolicyRefusal(
                f"privacy.class_shares and the data's classes differ: {named}; give each class its share"
            )
        prior = [shares[name] for name in data.classes]
        return Prepared(recipe, declared_counts(prior, multilabel=data.task == "multilabel"), [])

    def dp_sgd(self, recipe: TrainingRecipe, data: SiteData, *, epochs: int, batch_size: int) -> DpSgd:
        """Return the DP-SGD parameters of a training: their noise is that of all the run's trainings and noised scores together.

        Raises
        ------
        PolicyRefusal
            The policy doesn't fit the data, or no noise is enough.
        """
        check_data(self.site.policy, data)
        try:
            asked = asked_of_site(self.site.policy, recipe.privacy)
            before = releases_of_run(self.site.policy, asked)
            units = asked_units(asked, declared_units(self.site.policy, data))
            return dp_sgd_of(asked, units=units, epochs=epochs, batch_size=batch_size, before=before)
        except PrivacyError as error:
            raise PolicyRefusal(str(error)) from error

    @contextmanager
    def training(
        self,
        recipe: TrainingRecipe,
        data: SiteData,
        *,
        phase: str,
        epochs: int | None = None,
        batch_size: int | None = None,
        unlabelled_patients: np.ndarray | None = None,
        private_teachers: bool = False,
        checkpoint: Checkpoint | None = None,
    ) -> Iterator[PrivateTraining]:
        """Reserve one private training, hand it out, and note in the ledger what became of it.

        Parameters
        ----------
        phase : "link", "alone", "student" or "teacher-text", for the ledger
        epochs, batch_size : default those of the recipe, or the batch size of its privacy
        unlabelled_patients, private_teachers : see `PrivateTraining`
        checkpoint : what an interrupted training left: it goes on inside its reservation, which pays for it already

        Raises
        ------
        PolicyRefusal
            It doesn't fit into the site's budget, or into what the run said it would spend. Nothing was spent.
        LedgerError
            The ledger can't be written; nothing was trained.
        SpentError
            The training failed; all that was reserved is spent.
        """
        asked = asked_of_site(self.site.policy, recipe.privacy)
        dp_sgd = self.dp_sgd(
            recipe, data, epochs=epochs or recipe.epochs, batch_size=batch_size or asked.batch_size or recipe.batch_size
        )
        private = PrivateTraining(
            dp_sgd,
            unlabelled_patients=unlabelled_patients,
            declared_prior=self.site.policy.class_shares is not None,
            private_teachers=private_teachers,
            views=asked.views if recipe.augmentation != "none" and not phase.startswith("teacher") else 1,
            average_decay=asked.average_decay,
            entropy=self.site.entropy,
        )
        # what the recipe alone makes impossible costs nothing; a teacher's training has no teachers of its own
        own = recipe.model_copy(update={"privileged": None}) if phase.startswith("teacher") else recipe
        private.check(own, 0 if unlabelled_patients is None else len(unlabelled_patients))
        ledger = self.site.ledger
        reservation = None if checkpoint is None else self._resumed(checkpoint, phase, dp_sgd)
        if reservation is None:
            self._check_training(asked, data, dp_sgd.mechanism)
            reservation = self._reserve(dp_sgd.mechanism, phase, dp_sgd.clip)
        if checkpoint is not None:
            checkpoint.reservation = reservation.entry.sequence
        reservation.begin()
        try:
            yield private
        except Exception as error:
            # whether and when it failed may follow from single records: to the ledger it looks like any other
            ledger.commit(reservation, reservation.mechanism.steps)
            raise SpentError(f"a private training failed, and is charged in full: {error}") from error
        ledger.commit(reservation, max(1, private.steps_done))

    def _resumed(self, checkpoint: Checkpoint, phase: str, dp_sgd: DpSgd) -> Reservation | None:
        """Return the open reservation in which a training began that left this checkpoint; else forget the checkpoint."""
        saved = checkpoint.load()
        if saved is None:
            return None
        reservation = self.site.ledger.resume(self.run, phase, self.hop)
        if (
            reservation is None
            or reservation.entry.sequence != saved.reservation
            or reservation.mechanism != dp_sgd.mechanism
        ):
            checkpoint.remove()
            return None
        return reservation

    @contextmanager
    def statistics(
        self, asked: PrivacyRecipe, data: SiteData, *, stage: int, shared: SharedNoise | None = None
    ) -> Iterator[float]:
        """Reserve one release of sums, hand out how much noise to add, and note in the ledger that it is spent.

        `stage`: which of the releases of a statistics round it is, see `chainward_shared.privacy.dp_sgd.STAGES`. `shared`: in a
        secure sum, this site's share of the noise; what the ledger notes is the noise of all shares that the site relies on.

        Nothing that depends on a single record comes before the reservation, and whatever fails after it fails alike.

        Raises
        ------
        PolicyRefusal
            It doesn't fit into the site's budget, or the run has had all the statistics rounds that it asked for. Nothing was
            spent.
        LedgerError
            The ledger can't be written; nothing was summed up.
        SpentError
            Summing up failed; the release is spent.
        """
        check_data(self.site.policy, data)
        asked = asked_of_site(self.site.policy, asked)
        try:
            done = self._check_run(asked, data)
            planned = [one for one in releases_of_run(self.site.policy, asked) if one.kind == "gaussian"]
        except PrivacyError as error:
            raise PolicyRefusal(str(error)) from error
        noise = planned[stage].noise_multiplier if planned else 0.0
        released = sum(one.steps for one in done if one.kind == "gaussian" and one.noise_multiplier == noise)
        if not planned or released >= planned[stage].steps:
            raise PolicyRefusal(
                f"over what the run asks for: it planned {asked.statistics} private statistics rounds and has had {released}; "
                "work that failed counts, too"
            )
        if shared is not None and not shared.is_enough(noise):
            raise PolicyRefusal(
                f"{shared.sites} shares of noise of {shared.each:.4g} are less than the {noise:.4g} that the site's policy asks "
                "for (its delta, its noised scores); set privacy.delta to the site's, or federation.secure-noise-from=1"
            )
        mechanism = Mechanism("gaussian", noise, 1.0, 1)
        phase = "statistics" if shared is None else f"statistics, with noise of {shared.sites} sites"
        reservation = self._reserve(mechanism, phase, LENGTH)
        reservation.begin()
        try:
            yield mechanism.noise_multiplier if shared is None else shared.each
        except Exception as error:
            raise SpentError(f"a private statistics round failed, and is charged: {error}") from error
        finally:
            self.site.ledger.commit(reservation, 1)

    def release(self) -> bool:
        """Charge one release of noised scores; False where the run has had all of its own, or the budget has none left.

        Raises
        ------
        LedgerError
            The ledger can't be written.
        """
        policy, ledger = self.site.policy, self.site.ledger
        mechanism = policy.metrics_mechanism()
        assert mechanism is not None
        ledger.reload()
        if releases_in(ledger.mechanisms(self.run)) >= policy.metrics_releases:
            logger.warning("scores are withheld: the run has had its %d noised releases", policy.metrics_releases)
            return False
        try:
            reservation = self._reserve(mechanism, "scores")
        except PolicyRefusal as refusal:
            logger.warning("scores are withheld: %s", refusal)
            return False
        reservation.begin()
        ledger.commit(reservation, 1)
        return True

    def statement(self) -> Statement:
        """Return the signed statement that leaves with this piece of work."""
        ledger = self.site.ledger
        ledger.reload()
        return sign_statement(ledger, self.site.key, self.run, self.hop, self.site.policy.terms)

    def _reserve(self, mechanism: Mechanism, phase: str, clip_norm: float | None = None) -> Reservation:
        return reserve(
            self.site.policy,
            self.site.ledger,
            mechanism,
            run=self.run,
            phase=phase,
            hop=self.hop,
            clip_norm=clip_norm,
            seeded=self.site.entropy.seeded,
        )

    def _check_training(self, asked: PrivacyRecipe, data: SiteData, training: Mechanism) -> None:
        """Refuse at once a run that can't be carried out to its end, and a training beyond what the run asked for."""
        done = self._check_run(asked, data)
        if asked.epsilon is None:
            return
        together = [*(one for one in done if one.kind == "dp-sgd"), *releases_of_run(self.site.policy, asked)]
        if spent([*together, training], asked.delta) > asked.epsilon * _ROUNDING:
            raise PolicyRefusal(
                f"over what the run asks for: epsilon {spent([training], asked.delta):.4g} more after "
                f"{spent(together, asked.delta):.4g} of {asked.epsilon:.4g} (privacy.epsilon); work that failed or was repeated "
                "has used the rest"
            )

    def _check_run(self, asked: PrivacyRecipe, data: SiteData) -> list[Mechanism]:
        """Return what the run has spent here; before anything but scores, check that all of it fits."""
        policy, ledger = self.site.policy, self.site.ledger
        ledger.reload()
        done = ledger.mechanisms(self.run)
        if all(one.kind == "laplace" for one in done) and (asked.run or asked.statistics):
            left = policy.metrics_mechanism(max(0, policy.metrics_releases - releases_in(done)))
            units = asked_units(asked, declared_units(policy, data))
            rest = [one for one in whole_run(policy, asked, units) if one.kind != "laplace"]
            check_request(policy, ledger, [*rest, *([left] if left else [])], self.run)
        return done
