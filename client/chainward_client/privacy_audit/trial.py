"""The trials of `audit --empirical`: the private training that is installed here, and, if asked for, broken versions."""

from __future__ import annotations

import time
from collections.abc import Callable

from chainward_client.privacy_audit.checks import CHECKS, mechanism_problems
from chainward_client.privacy_audit.one_run import CANARIES, audit_training
from chainward_client.privacy_audit.sabotage import SABOTAGES, Sabotage
from chainward_shared.errors import PrivacyError
from chainward_shared.privacy.accounting import solve_noise_multiplier
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.privacy.empirical import Empirical, Trial
from chainward_shared.privacy.policy import Terms

EPSILON, DELTA = 1.0, 1e-5
"""What is attacked where no policy is known."""
TELLING = 4.0
"""Above this epsilon an attack of `CANARIES` can hardly refute anything, whatever is wrong."""
MOST_CANARIES = 20_000
"""More take minutes and more than a gigabyte."""
_STEPS = 12


def try_training(
    epsilon: float,
    delta: float,
    source: str,
    *,
    canaries: int = CANARIES,
    sabotage: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Empirical:
    """Check the private step and attack a short training at `epsilon`; seconds.

    Everybody is in every step of the attacked training: sampling would only help to hide, and is checked for itself.

    Parameters
    ----------
    source : where epsilon comes from, for the report
    canaries : of the attack
    sabotage : also try versions that are broken on purpose, each of which should be found out
    say : called with a line of progress

    Raises
    ------
    PrivacyError
        A number is out of its range.
    """
    if canaries > MOST_CANARIES:
        raise PrivacyError(f"{canaries} canaries are more than {MOST_CANARIES}, for which memory and time are meant")
    units = max(1, canaries // 2)
    dp_sgd = DpSgd(
        unit="patient",
        delta=delta,
        noise_multiplier=solve_noise_multiplier(epsilon, delta, [(1.0, _STEPS)]),
        sample_rate=1.0,
        expected_batch=float(units),
        steps=_STEPS,
        clip=1.0,
    )
    say(
        f"audit: {CHECKS} checks and an attack with {canaries} canaries at epsilon {epsilon:g}, delta {delta:g} ({source})"
    )
    trials = [_try(dp_sgd, Sabotage("as installed", attacked=True), True, canaries, say)]
    if sabotage:
        trials += [_try(dp_sgd, one, False, canaries, say) for one in SABOTAGES]
    return Empirical(source, delta, dp_sgd.noise_multiplier, dp_sgd.steps, CHECKS, tuple(trials))


def attacked_epsilon(terms: Terms | None) -> tuple[float, float, str]:
    """Return the epsilon and delta at which a site's training is attacked, and where they come from."""
    if terms is None:
        return EPSILON, DELTA, "no policy is known: a default"
    allowed = terms.epsilon if terms.epsilon_per_run is None else terms.epsilon_per_run
    of = "in its lifetime" if terms.epsilon_per_run is None else "for one run"
    if allowed <= TELLING:
        return allowed, terms.delta, f"what the policy allows {of}"
    return TELLING, terms.delta, f"the policy allows {allowed:g} {of}; above {TELLING:g} attacks tell little"


def _try(dp_sgd: DpSgd, version: Sabotage, honest: bool, canaries: int, say: Callable[[str], None]) -> Trial:
    started = time.monotonic()
    problems = mechanism_problems(version.training, version.ledger, version.release)
    attack = audit_training(dp_sgd, canaries=canaries, training=version.training) if version.attacked else None
    trial = Trial(version.name, honest, tuple(problems), attack)
    found = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "no problem"
    bound = f", epsilon at least {attack.measured:.2f} by attack" if attack else ""
    say(f"audit: training {trial.name}: {found} in the step{bound} ({time.monotonic() - started:.1f} s)")
    return trial
