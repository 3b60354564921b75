"""The site's own rules on privacy: the `privacy` block of site.yaml. Above anything that a coordinator asks.

Refusals come before training and say what was asked, what is spent, what is left and the longest training that still fits.
They hold numbers and names of settings only, so that they may be sent; how many patients a site has is never among them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import timedelta

from chainward_shared.errors import PolicyRefusal
from chainward_shared.privacy.accounting import Mechanism, largest_steps, spent
from chainward_shared.privacy.dp_sgd import run_mechanisms, statistics_mechanisms
from chainward_shared.privacy.ledger import Ledger, Reservation
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.recipes import PrivacyRecipe
from chainward_shared.settings import PrivacyUnit

logger = logging.getLogger("chainward")

DAY = timedelta(hours=24)


def check_units(policy: PrivacyPolicy, units: int, *, has_patient_ids: bool) -> None:
    """Check the policy against the site's training data.

    Parameters
    ----------
    units : patients (or images, if that is the unit) in the training data
    has_patient_ids : whether the data say which image is of which patient

    Raises
    ------
    PolicyRefusal
        Delta is not below 1 / `units`, or patients can't be told apart.
    """
    if policy.unit == "patient" and not has_patient_ids:
        raise PolicyRefusal(
            "the policy protects patients (unit: patient), but the data have no patient ids; "
            "add them to the data file, or protect images (unit: image)"
        )
    if units < 1 or policy.delta >= 1 / units:
        logger.error(
            "delta %g is not below 1/%d, the number of %ss in the training data", policy.delta, units, policy.unit
        )
        raise PolicyRefusal(
            f"delta {policy.delta:g} is not below 1 over the number of {policy.unit}s in the training data; "
            "a mechanism that publishes a record with that probability would pass. Lower delta in site.yaml"
        )


def check_scale(*, measured: bool) -> None:
    """Refuse private work on images whose grey scale was measured over all patients: one more or less changes the others' images.

    Raises
    ------
    PolicyRefusal
        It was; the data file has to declare it.
    """
    if measured:
        raise PolicyRefusal(
            "the images have more than 8 bits and their grey scale was measured over all patients, which no noise accounts "
            "for; declare it in the data file (image.scale: [black, white])"
        )


def check_run(
    policy: PrivacyPolicy | None, *, private: bool, unit: PrivacyUnit | None = None, privileged: bool = False
) -> None:
    """Check what kind of training a run asks for, before anything is computed.

    Parameters
    ----------
    policy : the site's; None: site.yaml has no `privacy` block
    private : whether the run asks for differential privacy
    unit : what the run wants to protect; None: whatever the site does
    privileged : whether the run wants a privileged teacher to be trained here

    Raises
    ------
    PolicyRefusal
        The policy requires privacy and the run has none, the run is private and the site has no policy, the units
        differ, or privileged teachers may not train here.
    """
    if policy is None:
        if private:
            raise PolicyRefusal("the run is private, but this site has no budget: site.yaml lacks the 'privacy' block")
        return
    if not private:
        if policy.required:
            raise PolicyRefusal(
                "the policy requires differential privacy and the run has none; set privacy.mode = 'dp-sgd'"
            )
        return
    if unit not in (None, policy.unit):
        raise PolicyRefusal(f"the run protects one {unit}, the policy of this site one {policy.unit}")
    if privileged and not policy.privileged_teachers:
        raise PolicyRefusal(
            "the run asks for a privileged teacher; the policy has privileged_teachers: false, "
            "since its training would be charged to the budget too"
        )


def check_request(policy: PrivacyPolicy, ledger: Ledger, asked: Sequence[Mechanism], run: str) -> None:
    """Check that `asked` fits into what the policy leaves: over the site's lifetime, within 24 hours, within the run.

    The answer holds only while the ledger is held: `reserve` checks and reserves in one go.

    Raises
    ------
    PolicyRefusal
        It doesn't fit. The message says what was asked, spent, left, and the longest training that fits.
    LedgerError
        The ledger can't be read.
    """
    ledger.reload()
    for scope, budget, before in _budgets(policy, ledger, run):
        after = spent([*before, *asked], policy.delta)
        if after <= budget:
            continue
        already = spent(before, policy.delta)
        raise PolicyRefusal(
            f"over budget: epsilon {spent(asked, policy.delta):.4g} asked, {already:.4g} of {budget:.4g} spent {scope}, "
            f"{max(0.0, budget - already):.4g} left; together {after:.4g} at delta {policy.delta:g}. "
            f"{_longest_that_fits(policy, ledger, asked, run)}"
        )


def reserve(
    policy: PrivacyPolicy,
    ledger: Ledger,
    mechanism: Mechanism,
    *,
    run: str,
    phase: str,
    hop: str,
    clip_norm: float | None = None,
    seeded: bool = False,
) -> Reservation:
    """Check that a mechanism fits and reserve it, in one go: no other process can spend in between.

    Parameters
    ----------
    phase, hop : for which piece of work of the run
    clip_norm : norm to which what each unit adds is clipped; None for a Laplace release
    seeded : whether its noise can be replayed

    Raises
    ------
    PolicyRefusal
        It doesn't fit, or the ledger counts in another unit than the policy; nothing was reserved.
    LedgerError
        The ledger can't be read or written: nothing may be trained.
    """
    check_request(policy, ledger, [mechanism], run)  # the accountants take seconds: not while others wait
    with ledger.exclusive():
        if units := {str(one.reserved.unit) for one in ledger.spendings()} - {policy.unit}:
            raise PolicyRefusal(
                f"the ledger of this site counts per {units.pop()}, its policy per {policy.unit}; "
                "an epsilon of the one says nothing of the other. Set the unit back"
            )
        check_request(policy, ledger, [mechanism], run)
        return ledger.reserve(
            mechanism,
            run=run,
            phase=phase,
            hop=hop,
            unit=policy.unit,
            delta=policy.delta,
            clip_norm=clip_norm,
            seeded=seeded,
        )


def _budgets(policy: PrivacyPolicy, ledger: Ledger, run: str) -> Iterator[tuple[str, float, list[Mechanism]]]:
    """Yield what limits spending: in which scope, how much, and what is spent of it."""
    yield "in the site's lifetime", policy.epsilon, ledger.mechanisms()
    if policy.epsilon_per_day is not None:
        yield "in the last 24 hours", policy.epsilon_per_day, ledger.mechanisms_within(DAY)
    if policy.epsilon_per_run is not None:
        yield "in this run", policy.epsilon_per_run, ledger.mechanisms(run)


def releases_of_run(policy: PrivacyPolicy, asked: PrivacyRecipe) -> list[Mechanism]:
    """Return the releases of a run, which its epsilon has to cover: noised scores, as many as one run may have, and the sums
    of its statistics rounds.

    Raises
    ------
    PolicyRefusal
        They leave nothing of it.
    """
    scores = policy.metrics_mechanism(policy.metrics_releases)
    if scores is None:
        return statistics_mechanisms(asked)
    if asked.epsilon is not None and (cost := spent([scores], asked.delta)) >= asked.epsilon:
        raise PolicyRefusal(
            f"noised scores alone, {policy.metrics_releases} releases at epsilon {policy.metrics_epsilon:g} each, come to "
            f"{cost:.4g} of the epsilon {asked.epsilon:.4g} that the run asks for (privacy.epsilon): the policy needs a "
            "lower metrics_epsilon or metrics_releases, or the run a higher epsilon"
        )
    return [scores, *statistics_mechanisms(asked, [scores])]


def asked_of_site(policy: PrivacyPolicy, asked: PrivacyRecipe | None) -> PrivacyRecipe:
    """Return what a private run asks of a site, at the policy's delta where that is smaller: the guarantee holds for both."""
    assert asked is not None
    return asked.model_copy(update={"delta": min(asked.delta, policy.delta)})


def asked_units(asked: PrivacyRecipe, declared: int) -> int:
    """Return how many of the patients (or images) that a site declares a run trains on."""
    return max(1, round(declared * asked.share))


def whole_run(policy: PrivacyPolicy, asked: PrivacyRecipe, units: int) -> list[Mechanism]:
    """Return all that a run costs this site when it is carried out to its end: its releases, then its trainings.

    Raises
    ------
    PrivacyError
        No noise is enough.
    """
    return run_mechanisms(asked, units=units, before=releases_of_run(policy, asked))


def releases_in(mechanisms: Sequence[Mechanism]) -> int:
    """Return the number of releases of noised scores among what was spent."""
    return sum(mechanism.steps for mechanism in mechanisms if mechanism.kind == "laplace")


def _longest_that_fits(policy: PrivacyPolicy, ledger: Ledger, asked: Sequence[Mechanism], run: str) -> str:
    trainings = [mechanism for mechanism in asked if mechanism.kind == "dp-sgd" and mechanism.noise_multiplier > 0]
    if not trainings:
        return "No such release fits"
    longest = max(trainings, key=lambda mechanism: mechanism.steps)
    others = list(asked)
    others.remove(longest)
    fitting = longest.steps
    for _, budget, before in _budgets(policy, ledger, run):
        if fitting:
            noise, rate = longest.noise_multiplier, longest.sample_rate
            fitting = min(fitting, largest_steps([*before, *others], noise, rate, policy.delta, budget))
    at = f"at noise multiplier {longest.noise_multiplier:g} and sample rate {longest.sample_rate:g}"
    if not fitting:
        return f"Not one step {at} fits: ask for more noise, or leave this site out"
    return f"The longest training that fits {at}: {fitting} of the {longest.steps} steps asked"
