"""What a sequence of noisy mechanisms costs: three accountants from libraries, one of them enforced.

RDP and PRV are Opacus', PLD is Google's dp-accounting. All bound epsilon from above for neighbouring data sets that
differ in one unit (a patient, or an image) being there or not. PLD is enforced; the others check it, being other
code built on other mathematics. Equal mechanisms add up, so that ten entries of 100 steps are one of 1,000.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from chainward_shared.errors import PrivacyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MechanismKind = Literal["dp-sgd", "gaussian", "laplace"]

AGREEMENT = 0.02
"""PLD and PRV may differ by this share of PLD."""
SMALLEST_DIFFERENCE = 3e-3
"""PLD and PRV may always differ by this much: below an epsilon of 0.15 it is more than `AGREEMENT`, and both accountants'
discretisation shows."""
MOST_NOISE = 1e5
"""A noise multiplier above this is no training any more."""

_PLD_INTERVAL = 1e-4  # dp-accounting's default
_PLD_FINE_UP_TO = 20.0  # above this epsilon the interval doubles with it: memory and time would explode
_MORE_ORDERS = (80.0, 96.0, 128.0, 192.0, 256.0, 512.0, 1024.0)  # Opacus' end at 63: too few for an epsilon below 0.3
_LARGEST_STEPS = 10**7
_LEAST_NOISE = 0.01


@dataclass(frozen=True)
class Mechanism:
    """One kind of noisy step, and how often it was done.

    Attributes
    ----------
    kind :
        "dp-sgd": a sum of vectors clipped to length 1, of a Poisson sample, plus Gaussian noise (all in units of the
        clipping norm). "gaussian": such a sum of all units, each with one vector no longer than 1. "laplace": one number or
        vector plus Laplace noise.
    noise_multiplier : standard deviation of the noise over the clipping norm; "laplace": scale of the noise over the
        L1 sensitivity. 0 is no privacy, an epsilon of infinity
    sample_rate : probability with which a unit is in a step, in (0, 1]; of releases ("gaussian", "laplace"): 1
    steps : number of steps, or of releases

    Raises
    ------
    PrivacyError
        A number is out of its range.
    """

    kind: MechanismKind
    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(MechanismKind):
            raise PrivacyError(
                f"mechanism '{self.kind}' is unknown; expected one of {', '.join(get_args(MechanismKind))}"
            )
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise PrivacyError(f"{self.kind}: noise multiplier {self.noise_multiplier} is not a number of at least 0")
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(f"{self.kind}: sample rate {self.sample_rate} is not within (0, 1]")
        if self.kind != "dp-sgd" and self.sample_rate != 1:
            raise PrivacyError(f"{self.kind}: sample rate {self.sample_rate} is not 1; a release sees every unit")
        if self.steps != int(self.steps) or self.steps < 0:
            raise PrivacyError(f"{self.kind}: {self.steps} steps is not a whole number of at least 0")


@dataclass(frozen=True)
class Epsilons:
    """Epsilon at one delta by three accountants.

    Attributes
    ----------
    rdp : Opacus' Rényi accountant, the loosest
    prv : Opacus' privacy random variable accountant, its upper bound; nan where it fails
    pld : dp-accounting's privacy loss distributions, pessimistic
    problem : one sentence where they don't order or agree as they must, else None
    """

    rdp: float
    prv: float
    pld: float
    problem: str | None

    @property
    def enforced(self) -> float:
        """The epsilon that counts: PLD's."""
        return self.pld


def epsilons(mechanisms: Sequence[Mechanism], delta: float) -> Epsilons:
    """Return the epsilon of all `mechanisms` together by the three accountants, and whether they agree.

    Raises
    ------
    PrivacyError
        `delta` is not within (0, 1).
    """
    merged = _merged(mechanisms)
    pld, rdp = spent(mechanisms, delta), _rdp_epsilon(merged, delta)
    if not merged or math.isinf(pld):
        return Epsilons(rdp, pld, pld, None if rdp == pld else f"PLD finds epsilon {pld}, RDP {rdp:.4f}")
    error = max(1e-3, min(0.01, 0.006 * pld), 5e-4 * pld)
    try:
        prv = _prv_epsilon(merged, delta, min(error, 0.5))
    except (RuntimeError, ValueError, FloatingPointError) as failure:
        return Epsilons(rdp, math.nan, pld, f"the PRV accountant fails: {failure}")
    return Epsilons(rdp, prv, pld, _problem(rdp, prv, pld, error))


def spent(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return the enforced epsilon of all `mechanisms` together: PLD, remembered. 0 without any.

    Raises
    ------
    PrivacyError
        `delta` is not within (0, 1).
    """
    _check_delta(delta)
    return _spent(_merged(mechanisms), delta)


def largest_steps(
    before: Sequence[Mechanism], noise_multiplier: float, sample_rate: float, delta: float, epsilon: float
) -> int:
    """Return how many steps of DP-SGD still fit into `epsilon` after what was spent `before`; 0 if none, at most 10^7.

    Raises
    ------
    PrivacyError
        A number is out of its range.
    """
    _check_budget(epsilon, delta)

    def fits(steps: int, *, rough: bool = False) -> bool:
        mechanisms = [*before, Mechanism("dp-sgd", noise_multiplier, sample_rate, steps)]
        return (_rdp_epsilon(_merged(mechanisms), delta) if rough else spent(mechanisms, delta)) <= epsilon

    if not fits(1):
        return 0
    most = 1
    # RDP is quick and above PLD: where it fits, PLD does
    while most < _LARGEST_STEPS and (fits(2 * most, rough=True) or fits(2 * most)):
        most *= 2
    if most >= _LARGEST_STEPS:
        return _LARGEST_STEPS
    too_many = 2 * most
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most


def solve_noise_multiplier(
    epsilon: float, delta: float, trainings: Sequence[tuple[float, int]], before: Sequence[Mechanism] = ()
) -> float:
    """Return the smallest noise multiplier, to 0.1 % and rounded up, with which `trainings` with DP-SGD after `before`
    stay within `epsilon` together.

    Parameters
    ----------
    trainings : sample rate and steps of each; at least one

    Raises
    ------
    PrivacyError
        A number is out of its range, or what was spent before leaves nothing: no noise is enough.
    """
    _check_budget(epsilon, delta)
    steps = sum(of_one for _, of_one in trainings)
    if not trainings or min(of_one for _, of_one in trainings) < 1:
        raise PrivacyError(f"a private training of {steps} steps has no noise multiplier; give at least 1 step")
    already = spent(before, delta)

    def cost(noise: float, *, rough: bool = False) -> float:
        mechanisms = [*before, *(Mechanism("dp-sgd", noise, rate, of_one) for rate, of_one in trainings)]
        return _rdp_epsilon(_merged(mechanisms), delta) if rough else spent(mechanisms, delta)

    enough = 1.0
    while enough < MOST_NOISE and cost(enough, rough=True) > epsilon:  # RDP is quick and above PLD
        enough *= 2
    if enough >= MOST_NOISE:
        if cost(MOST_NOISE) > epsilon:
            raise PrivacyError(
                f"no noise keeps {steps} private steps within epsilon {epsilon:g} at delta "
                f"{delta:g}: {already:.4g} of it is spent already; raise the budget or train less"
            )
        enough = MOST_NOISE
    while enough > _LEAST_NOISE and (cost(enough / 2, rough=True) <= epsilon or cost(enough / 2) <= epsilon):
        enough /= 2
    if enough <= _LEAST_NOISE:
        return enough

    from scipy.optimize import brentq

    def over(log_noise: float) -> float:
        return math.log(max(cost(math.exp(log_noise)), 1e-12) / epsilon)

    root = brentq(over, math.log(enough / 2), math.log(enough), xtol=2e-4)
    noise = math.ceil(math.exp(root) * 1e4) / 1e4
    while cost(noise) > epsilon:  # more noise costs less
        noise = math.ceil(noise * 1.0003 * 1e4) / 1e4
    return float(noise)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta {delta} is not within (0, 1); it should be below 1 over the number of patients")


def _check_budget(epsilon: float, delta: float) -> None:
    _check_delta(delta)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"epsilon {epsilon} is not a finite number above 0")


def _merged(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """Return the same mechanisms with equal ones added up, in the order in which they appear first."""
    steps: dict[tuple[MechanismKind, float, float], int] = {}
    for one in mechanisms:
        if one.steps:
            key = (one.kind, float(one.noise_multiplier), float(one.sample_rate))
            steps[key] = steps.get(key, 0) + int(one.steps)
    return tuple(Mechanism(*key, steps[key]) for key in steps)


def privacy_loss(mechanisms: Sequence[Mechanism], delta: float) -> Any:
    """Return dp-accounting's loss distribution of all `mechanisms` (there must be a step), as `spent` uses it; None: infinite."""
    return _loss(_merged(mechanisms), delta)


@lru_cache(maxsize=4096)
def _spent(merged: tuple[Mechanism, ...], delta: float) -> float:
    if not merged:
        return 0.0
    loss = _loss(merged, delta)
    return math.inf if loss is None else float(loss.get_epsilon_for_delta(delta))


def _loss(merged: tuple[Mechanism, ...], delta: float) -> Any:
    if math.isinf(rough := _rdp_epsilon(merged, delta)):
        return None
    coarser = max(0, math.ceil(math.log2(max(rough, _PLD_FINE_UP_TO) / _PLD_FINE_UP_TO)))
    interval = _PLD_INTERVAL * 2.0**coarser
    for end in range(200, len(merged), 200):  # so that a long ledger does not recurse too deep
        _pld(merged[:end], interval)
    return _pld(merged, interval)


@lru_cache(maxsize=16)
def _pld(merged: tuple[Mechanism, ...], interval: float) -> Any:
    """Return the privacy loss distribution of all of them; that of all but the last, a ledger say, is remembered."""
    last = _pld_of_one(merged[-1], interval)
    return last if len(merged) == 1 else _pld(merged[:-1], interval).compose(last)


@lru_cache(maxsize=16)
def _pld_of_one(one: Mechanism, interval: float) -> Any:
    if one.kind != "laplace" and one.sample_rate == 1:  # Gaussians add up to a Gaussian
        return _pld_of_step(one.kind, one.noise_multiplier / math.sqrt(one.steps), 1.0, interval)
    step = _pld_of_step(one.kind, one.noise_multiplier, one.sample_rate, interval)
    return step.self_compose(one.steps) if one.steps > 1 else step


@lru_cache(maxsize=16)
def _pld_of_step(kind: MechanismKind, noise_multiplier: float, sample_rate: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    if kind == "laplace":
        return pld.from_laplace_mechanism(noise_multiplier, value_discretization_interval=interval)
    return pld.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=interval
    )


def _rdp_epsilon(merged: tuple[Mechanism, ...], delta: float) -> float:
    _check_delta(delta)
    if not merged:
        return 0.0
    if any(one.noise_multiplier == 0 for one in merged):
        return math.inf
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    orders = tuple(float(order) for order in RDPAccountant.DEFAULT_ALPHAS) + _MORE_ORDERS
    curves = [one.steps * _rdp_curve(one.kind, one.noise_multiplier, one.sample_rate, orders) for one in merged]
    divergences = sum(curves, np.zeros(len(orders)))
    with warnings.catch_warnings():  # at the smallest or largest order it is still a bound
        warnings.filterwarnings("ignore", message="Optimal order is")
        epsilon, _ = get_privacy_spent(orders=list(orders), rdp=divergences, delta=delta)
    return max(0.0, float(epsilon))


@lru_cache(maxsize=256)
def _rdp_curve(
    kind: MechanismKind, noise_multiplier: float, sample_rate: float, orders: tuple[float, ...]
) -> NDArray[np.float64]:
    if kind != "laplace":
        from opacus.accountants.analysis.rdp import compute_rdp

        with np.errstate(all="ignore"):
            curve = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(orders))
        return np.asarray(curve, dtype=np.float64)
    # Mironov 2017, table II; logarithms are added so that little noise at a high order does not overflow
    a, loss = np.asarray(orders), 1.0 / noise_multiplier
    up = np.log(a / (2 * a - 1)) + (a - 1) * loss
    down = np.log((a - 1) / (2 * a - 1)) - a * loss
    return np.minimum(np.logaddexp(up, down) / (a - 1), loss)


def _prv_epsilon(merged: tuple[Mechanism, ...], delta: float, error: float) -> float:
    """Return Opacus' PRV upper bound, `error` above its estimate.

    Opacus composes only subsampled Gaussians by itself; its discretisation and composition take any privacy random
    variable with a distribution function, and `_LaplacePrv` is one.
    """
    from opacus.accountants.analysis.prv import (
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        compute_safe_domain_size,
        discretize,
    )

    gaussians = [one for one in merged if one.kind != "laplace"]
    laplaces = [one for one in merged if one.kind == "laplace"]
    delta_error = delta / 1000  # Opacus' default
    of_gaussians = [PoissonSubsampledGaussianPRV(one.sample_rate, one.noise_multiplier) for one in gaussians]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = 3.0
        if gaussians:
            limit = compute_safe_domain_size(of_gaussians, [one.steps for one in gaussians], error, delta_error)
        limit += sum(one.steps / one.noise_multiplier for one in laplaces)  # a release never loses more than 1 / scale
        steps = [one.steps for one in (*gaussians, *laplaces)]
        mesh = error / math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)  # as PRVAccountant._get_domain
        domain = Domain.create_aligned(-limit, limit, mesh)
        variables = [*of_gaussians, *(_LaplacePrv(one.noise_multiplier) for one in laplaces)]
        discrete = [
            discretize(TruncatedPrivacyRandomVariable(variable, domain.t_min, domain.t_max), domain)
            for variable in variables
        ]
        composed = compose_heterogeneous(discrete, steps)
        _, _, upper = composed.compute_epsilon(delta, delta_error, error)
    if not math.isfinite(upper):
        raise RuntimeError(f"its epsilon is {upper}")
    return max(0.0, float(upper))


class _LaplacePrv:
    """Privacy loss of one release with Laplace noise of this scale at sensitivity 1.

    With output x the loss is ``(|x - 1| - |x|) / scale``, x Laplace around 0: 1 / scale with probability 1/2, -1 / scale
    with probability exp(-1 / scale) / 2, and in between as the exponential's tail says.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def cdf(self, t: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Return the probability of a loss of at most `t`, of its shape."""
        loss = 1.0 / self.scale
        between = 0.5 * np.exp(-(1.0 / self.scale - np.minimum(t, loss)) / 2.0)
        return np.where(np.asarray(t) >= loss, 1.0, np.where(np.asarray(t) < -loss, 0.0, between))


def _problem(rdp: float, prv: float, pld: float, error: float) -> str | None:
    if abs(prv - pld) > max(AGREEMENT * pld, SMALLEST_DIFFERENCE):
        return f"PRV finds epsilon {prv:.4f}, PLD {pld:.4f}: more than {AGREEMENT:.0%} apart"
    if rdp < pld - 1e-3 * max(1.0, pld) or rdp < prv - 2 * error:
        return f"RDP finds epsilon {rdp:.4f}, below PRV's {prv:.4f} or PLD's {pld:.4f}, of which it is an upper bound"
    return None
