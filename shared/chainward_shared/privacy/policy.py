"""A site's own rules on privacy, as data. Enforced by the site (`chainward_client.policy`); nothing a message can change."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from chainward_shared.outside import Record
from chainward_shared.privacy.accounting import Mechanism
from chainward_shared.settings import PrivacyUnit

MetricsRelease = Literal["withhold", "noised", "exact"]
Budget = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
ClassName = Annotated[str, Field(max_length=1_000)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Terms(Record):
    """What of a site's policy others may know.

    Attributes
    ----------
    epsilon : budget of the site's lifetime, over all runs
    delta : at which every epsilon is meant; below 1 over the number of units
    epsilon_per_run : cap on what the coordinator calls one run; None, the default: only the lifetime's budget
    unit : what is protected: "patient" with all images (default), or one "image"
    metrics : what of scores and counts may leave: nothing ("withhold", the default), with Laplace noise that is charged to the
        ledger ("noised"), or as they are ("exact"), which no guarantee covers
    """

    epsilon: Budget
    delta: float = Field(gt=0, lt=1, allow_inf_nan=False)
    epsilon_per_run: Budget | None = None
    unit: PrivacyUnit = "patient"
    metrics: MetricsRelease = "withhold"


class PrivacyPolicy(Terms):
    """The `privacy` block of site.yaml: the terms, and what nobody else need know.

    Attributes
    ----------
    required : whether a run without privacy is refused, default true
    epsilon_per_day : cap on any 24 hours, over all runs whatever they are called, default none
    metrics_epsilon : what one noised release costs; with ``metrics: noised`` only
    metrics_releases : noised releases that one run may have, default 4. A private run plans them into its epsilon; scores
        that are asked for beyond them are withheld
    privileged_teachers :
        whether teachers that read reports or tables may train, privately and charged to the ledger; default false
    units : number of patients (or images) with training data that the site declares; not secret, and it need not be exact.
        Sampling rates and the site's weight in averages come from it. Default: the true number, rounded down to a digit
        and a half
    class_shares : share of each class that the site declares, by name; not secret. Default: none, and nothing is adjusted
        by the classes' frequencies. Multi-label: share of the images with each finding
    """

    required: bool = True
    epsilon_per_day: Budget | None = None
    metrics_epsilon: Budget | None = None
    metrics_releases: int = Field(default=4, ge=1, le=1000)
    privileged_teachers: bool = False
    units: int | None = Field(default=None, ge=1, le=10**9)
    class_shares: dict[ClassName, Share] | None = Field(default=None, max_length=10_000)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("epsilon_per_run", "epsilon_per_day"):
            cap = getattr(self, name)
            if cap is not None and cap > self.epsilon:
                raise ValueError(f"{name} {cap:g} is above epsilon {self.epsilon:g}, the lifetime's budget")
        if (self.metrics == "noised") != (self.metrics_epsilon is not None):
            raise ValueError(
                "metrics_epsilon says what a release with 'metrics: noised' costs; give both or neither "
                f"(metrics is '{self.metrics}')"
            )
        if self.units is not None and self.delta >= 1 / self.units:
            raise ValueError(f"delta {self.delta:g} is not below 1 / {self.units}, the declared number of {self.unit}s")
        return self

    @property
    def terms(self) -> Terms:
        """What of the policy others may know; it goes into every statement."""
        return Terms(**{name: getattr(self, name) for name in Terms.model_fields})

    def metrics_mechanism(self, releases: int = 1) -> Mechanism | None:
        """Return what releases of noised metrics are charged as; None where none is charged."""
        if self.metrics_epsilon is None or not releases:
            return None
        return Mechanism("laplace", 1 / self.metrics_epsilon, 1.0, releases)
