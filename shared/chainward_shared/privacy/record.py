"""What a run keeps of its sites' privacy, privacy.json: how each trained, what it spent, and all that they have signed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chainward_shared.errors import StatementError
from chainward_shared.outside import visible_values
from chainward_shared.privacy.policy import MetricsRelease
from chainward_shared.privacy.statements import Statement, Statements
from chainward_shared.settings import PrivacyUnit
from chainward_shared.words import first_problem, listed

SiteMode = Literal["dp-sgd", "off", "no model"]
RunMode = Literal["off", "dp-sgd", "dp-sgd at some sites"]


class SiteFacts(BaseModel):
    """How one site trained; without privacy everything but `mode` is None.

    Attributes
    ----------
    mode : "dp-sgd"; "off": without privacy; "no model": none came from it
    epsilon, epsilon_lifetime : spent in the run, and over all runs, at `delta`
    budget, left : of the site's lifetime
    unit, metrics : as its policy says
    seeded : noise came from a seed: a test
    """

    model_config = ConfigDict(frozen=True)

    mode: SiteMode = "off"
    epsilon: float | None = None
    delta: float | None = None
    unit: PrivacyUnit | None = None
    epsilon_lifetime: float | None = None
    budget: float | None = None
    left: float | None = None
    metrics: MetricsRelease | None = None
    seeded: bool | None = None


class PrivacyRecord(BaseModel):
    """The content of a run's privacy.json.

    Attributes
    ----------
    mode : whether all sites, some or none trained privately
    statement : the same in words, with what is outside the guarantee
    sites : all sites of the run
    statements : what the sites have signed, as parsed JSON: each is for the audit to check
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    mode: RunMode
    statement: str = ""
    sites: dict[str, SiteFacts] = Field(default_factory=dict)
    statements: tuple[Any, ...] = ()

    @property
    def private(self) -> list[str]:
        """The sites that have spent something."""
        return [site for site, facts in self.sites.items() if facts.epsilon is not None]

    @property
    def absent(self) -> list[str]:
        """The sites from which no model came."""
        return [site for site, facts in self.sites.items() if facts.mode == "no model"]

    @property
    def trained(self) -> list[str]:
        """All other sites."""
        return [site for site in self.sites if site not in self.absent]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def read_privacy_record(path: Path) -> PrivacyRecord:
    """Return the content of a run's privacy.json.

    Raises
    ------
    StatementError
        The file can't be read, or is no privacy.json.
    """
    try:
        content = visible_values(json.loads(path.read_bytes()))
    except OSError as error:
        raise StatementError(f"{path}: can't be read ({error.strerror}); name the privacy.json of a run") from error
    except (ValueError, RecursionError) as error:
        raise StatementError(f"{path}: damaged (not JSON); restore the run folder") from error
    try:
        record = PrivacyRecord.model_validate(content)
    except ValidationError as error:
        raise StatementError(f"{path}: not the privacy.json of a run ({first_problem(error)})") from error
    if record.mode != "off" and not record.statements:
        raise StatementError(
            f"{path}: the run was private (mode '{record.mode}'), but no statement is in it; restore it"
        )
    return record


def privacy_record(
    statements: Statements, sites: Sequence[str], *, trained: Iterable[str] | None = None
) -> PrivacyRecord:
    """Return what privacy.json is to hold of a run.

    Parameters
    ----------
    statements : what the sites have signed
    sites : all sites of the run; one without a statement trained without privacy, or not at all
    trained : those from which a model came; None: unknown, all of them
    """
    came = set(sites) if trained is None else set(trained)
    facts = {site: _facts(statements.last(site), came=site in came) for site in sites}
    private, others, absent = (
        [site for site in sites if facts[site].mode == mode] for mode in ("dp-sgd", "off", "no model")
    )
    if private:
        said = f"{len(private)} of {len(sites)} sites trained with differential privacy."
        if others:
            said += f" Nothing bounds what left {listed(others)}."
    else:
        said = (
            "No site trained with differential privacy. Images, reports and tables stayed at the sites, but nothing bounds "
            "what the models, the scores and the class counts that left them reveal about a patient."
        )
    if absent:
        said += f" No model came from {listed(absent)}."
    if exact := [site for site in private if facts[site].metrics == "exact"]:
        said += f" Scores and counts of {listed(exact)} left as they are: they are outside of the guarantee."
    return PrivacyRecord(
        schema_=1,
        mode="off" if not private else "dp-sgd" if not others else "dp-sgd at some sites",
        statement=said,
        sites=facts,
        statements=tuple(statement.to_json() for statement in statements.all),
    )


def _facts(last: Statement | None, *, came: bool) -> SiteFacts:
    if last is None:
        return SiteFacts(mode="off" if came else "no model", epsilon=None, delta=None)
    return SiteFacts(
        mode="dp-sgd",
        epsilon=last.epsilon_run,
        delta=last.terms.delta,
        unit=last.terms.unit,
        epsilon_lifetime=last.epsilon_lifetime,
        budget=last.terms.epsilon,
        left=last.left,
        metrics=last.terms.metrics,
        seeded=last.seeded,
    )
