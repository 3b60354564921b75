"""Policy, ledger, and what the run that the consortium plans would cost this site."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from chainward_client.data.site_data import SiteData
from chainward_client.doctor.machine import Need, size
from chainward_client.doctor.report import Check, ok, problem, skipped, warning
from chainward_client.limits import check_limits
from chainward_client.policy import asked_of_site, asked_units, check_request, check_run, whole_run
from chainward_client.precision import best_device
from chainward_client.private_site import check_data, declared_units
from chainward_client.site_config import SiteLimits
from chainward_client.site_ledger import key_path, ledger_path, open_site_ledger
from chainward_shared.config import RunConfig
from chainward_shared.errors import LedgerError, ModelError, PolicyRefusal, PrivacyError
from chainward_shared.models import Architecture, count_parameters, skeleton
from chainward_shared.models.of_run import run_architectures
from chainward_shared.models.private_ready import check_private_ready
from chainward_shared.pretrained.begin import Beginning, as_if_begun
from chainward_shared.privacy.accounting import spent
from chainward_shared.privacy.audit import audit_ledger
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.privacy.signing import load_public_key, public_key_path
from chainward_shared.words import listed

_WEIGHT = 4
"""Bytes of a float32."""


def check_policy(policy: PrivacyPolicy | None, state: Path, site: str, data: SiteData | None) -> list[Check]:
    """Check the policy against the data, and the ledger against the policy."""
    if policy is None:
        return [
            warning(
                "policy",
                "site.yaml has no privacy block: the site takes part in runs without differential privacy, and refuses others",
                "add the block if what leaves shall be bounded; docs/privacy.md says what it protects from",
            )
        ]
    per_run = f", {policy.epsilon_per_run:g} per run" if policy.epsilon_per_run is not None else ""
    terms = f"epsilon {policy.epsilon:g} in the site's lifetime{per_run}, delta {policy.delta:g}, per {policy.unit}"
    rule = "runs without privacy are refused" if policy.required else "runs without privacy are taken, too"
    found = f"{terms}; scores: {policy.metrics}; {rule}"
    checks = [ok("policy", found)]
    if policy.epsilon > 20:
        checks = [warning("policy", found, "an epsilon above 20 bounds next to nothing; see docs/privacy.md")]
    if data is not None:
        try:
            check_data(policy, data)
        except PolicyRefusal as refusal:
            checks.append(problem("policy: data", str(refusal), "change site.yaml (delta, unit) or the data file"))
        else:
            shown = "declared" if policy.units else "rounded down from the true number"
            told = declared_units(policy, data)
            checks.append(ok("policy: data", f"others learn of {told} {policy.unit}s ({shown}) and no exact number"))
    return [*checks, check_ledger(policy, state, site)]


def check_ledger(policy: PrivacyPolicy, state: Path, site: str) -> Check:
    """Verify key and ledger, and say what is left of the budget; `chainward-site audit` says more."""
    path = ledger_path(state)
    if not path.exists() and not key_path(state).exists():
        return problem(
            "ledger", f"{path}: there is none yet", "chainward-site keys SITE_YAML makes key and ledger, once"
        )
    try:
        open_site_ledger(state, site)
        public = load_public_key(public_key_path(key_path(state)))
    except (LedgerError, PrivacyError) as error:
        return problem("ledger", str(error), "chainward-site audit says more; restore from the backup")
    audit = audit_ledger(path, public, site, terms=policy.terms)
    if audit.exit_code:
        return problem("ledger", audit.findings[0].what, "chainward-site audit says more")
    (of_site,) = audit.sites
    assert of_site.lifetime is not None
    spent_so_far, left = of_site.lifetime.epsilons, of_site.lifetime.left
    used = spent_so_far.enforced if spent_so_far is not None else 0.0
    runs = len(of_site.runs)
    found = f"whole and signed; epsilon {used:.4g} of {policy.epsilon:g} spent in {runs} runs, {left or 0.0:.4g} left"
    if used and left is not None and left < 0.1 * policy.epsilon:
        return warning("ledger", found, "what is left pays for little; who decides on the budget should know")
    if of_site.open:
        return warning("ledger", f"{found}; {of_site.open} reservations without an end, which count in full", "")
    return ok("ledger", found)


# --- the planned run ---


def architectures(config: RunConfig, data: SiteData) -> list[Architecture]:
    """Return the models of a run at this site: the chain's, and the students' where there are any.

    Raises
    ------
    ModelError
        A backbone is unknown, or doesn't suit the site's images.
    """
    return run_architectures(config, beginning(config, data).architecture)


def beginning(config: RunConfig, data: SiteData) -> Beginning:
    """Return what a run begins with at this site, random weights in place of pretrained ones.

    Raises
    ------
    ModelError
        As `architectures`.
    """
    image = data.splits["train"].images
    return as_if_begun(config, classes=len(data.classes), channels=int(image.shape[1]), image_size=int(image.shape[-1]))


def need_of(config: RunConfig, data: SiteData | None, *, planned: bool) -> Need:
    """Return what a run needs at this site, about; without data, or with a backbone that doesn't suit them, a small one.

    Disk: the last three answers, a half-finished training (parameters and two moments), three auxiliary teachers. Memory:
    the images twice, and for each model in use parameters, gradients and two moments.
    """
    large = small = 30_000_000
    images = 0
    if data is not None:
        images = sum(cases.images.numel() for cases in data.splits.values())
        try:
            large, *rest = (count_parameters(skeleton(one)) for one in architectures(config, data))
            small = rest[0] if rest else 0
        except ModelError:
            pass
    disk = _WEIGHT * (6 * large + 9 * small)
    memory = 2 * images + _WEIGHT * (5 * large + 5 * small)
    return Need(disk, memory, "the planned run" if planned else f"a run with {config.chain.backbone}")


def check_plan_limits(config: RunConfig, limits: SiteLimits, data: SiteData) -> Check:
    """Check the run that the coordinator means to start against what this hospital lets a coordinator ask for."""
    name = "plan: limits"
    laps = config.chain.laps if config.chain.compare_alone else 1
    asked: list[BaseModel] = [config.link_recipe(), config.link_recipe(laps=laps)]
    asked += [config.student_recipe(stage) for stage in ("distil", "finetune")] if config.student.rounds else []
    try:
        asked += architectures(config, data)
        for one in asked:
            check_limits(one, limits)
    except ModelError as error:
        return skipped(name, f"not looked at: {error}")
    except PolicyRefusal as refusal:
        return problem(name, f"this site would refuse: {refusal}", "agree with the coordinator, or raise the limit")
    return ok(name, "the run asks for nothing beyond this hospital's limits")


def check_plan(config: RunConfig, policy: PrivacyPolicy | None, state: Path, site: str, data: SiteData) -> list[Check]:
    """Check the run that the coordinator means to start: would this site train, with which models, and what would it cost?"""
    private = config.privacy.mode != "off"
    checks = _backbones(config, data, private=private and policy is not None)
    if policy is None and config.privacy.mode == "by-policy":
        return [ok("plan: privacy", "by-policy: this site has no policy and trains without privacy"), *checks]
    guided = any(config.privileged.recipe_for(part) is not None for part in ("links", "students"))
    try:
        check_run(policy, private=private, unit=config.privacy.unit if private else None, privileged=guided)
    except PolicyRefusal as refusal:
        return [problem("plan: privacy", f"this site would refuse: {refusal}", "agree with the coordinator"), *checks]
    if policy is None or not private:
        return [ok("plan: privacy", "the run has no differential privacy, and the site asks for none"), *checks]
    return [_cost(config, policy, state, site, data), *checks]


def _cost(config: RunConfig, policy: PrivacyPolicy, state: Path, site: str, data: SiteData) -> Check:
    """Return the epsilon of the plan at this site, what is spent already, and whether the two fit."""
    name = "plan: epsilon"
    asked = asked_of_site(policy, config.privacy_recipe())
    units = asked_units(asked, declared_units(policy, data))
    try:
        mechanisms = whole_run(policy, asked, units)
    except PrivacyError as error:
        return problem(name, f"this site would refuse: {error}", "agree on another plan with the coordinator")
    work = [f"{one.steps} steps at sample rate {one.sample_rate:.3g}" for one in mechanisms if one.kind == "dp-sgd"]
    if work:
        work.insert(0, f"noise multiplier {mechanisms[-1].noise_multiplier:.3g}")
    if asked.statistics:
        work.append(f"{asked.statistics} private statistics round{'s' * (asked.statistics > 1)}")
    cost = spent(mechanisms, policy.delta)
    plan = (
        f"epsilon {cost:.4g} at delta {policy.delta:g} per {policy.unit}, {', '.join(work)}, of {units} {policy.unit}s"
    )
    try:
        ledger, _ = open_site_ledger(state, site)
    except PrivacyError:
        return problem(name, f"{plan}; there is no ledger to hold it against", "see the check 'ledger'")
    before = spent(ledger.mechanisms(), policy.delta)
    together = spent([*ledger.mechanisms(), *mechanisms], policy.delta)
    try:
        check_request(policy, ledger, mechanisms, "the planned run")
    except PolicyRefusal as refusal:
        return problem(
            name, f"this site would refuse: {refusal}", f"agree on another plan with the coordinator ({plan})"
        )
    found = f"{plan}; {before:.4g} of {policy.epsilon:g} spent, together {together:.4g}: fits"
    if policy.metrics == "noised":
        found += f"; {policy.metrics_releases} releases of noised scores are in it"
    if together > 0.9 * policy.epsilon:
        return warning(name, found, "work that has to be done again pays again: there is little left for that")
    return ok(name, found)


def _backbones(config: RunConfig, data: SiteData, *, private: bool) -> list[Check]:
    try:
        models = architectures(config, data)
        for model in models if private else ():
            check_private_ready(model, best_device().type)
    except ModelError as error:
        return [problem("plan: backbone", str(error), "tell the coordinator: the run would stop at its start")]
    found = listed([f"{model.name} ({size(_WEIGHT * count_parameters(skeleton(model)))})" for model in models])
    if private:
        return [ok("plan: backbone", f"{found}: per-example gradients compared one by one here, right")]
    untried = [skipped("plan: private training", "not tried: this site has no policy")]
    return [*(untried if config.privacy.mode != "off" else []), ok("plan: backbone", found)]
