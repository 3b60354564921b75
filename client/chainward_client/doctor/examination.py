"""Is this hospital ready to take part? `examine` makes all checks of ``chainward-site check``."""

from __future__ import annotations

from pathlib import Path

from chainward_client.doctor.data import open_data
from chainward_client.doctor.machine import (
    check_disk,
    check_flower,
    check_gpu,
    check_memory,
    check_own_clock,
    check_state,
    check_versions,
    running_supernodes,
)
from chainward_client.doctor.network import Endpoint, check_network
from chainward_client.doctor.privacy import check_plan, check_plan_limits, check_policy, need_of
from chainward_client.doctor.report import Check, Diagnosis, ok, problem, skipped
from chainward_client.site_config import SiteConfig, load_site_config
from chainward_shared.config import RunConfig
from chainward_shared.errors import DataError


def examine(
    site_yaml: Path,
    *,
    plan: RunConfig | None = None,
    superlink: Endpoint | None = None,
    root_certificates: Path | None = None,
    auth_key: Path | None = None,
    health: Endpoint | None = None,
) -> Diagnosis:
    """Return what is right and wrong with a site; nothing is trained, spent or sent, and nothing is changed.

    Parameters
    ----------
    plan : the run that the coordinator means to start, as of `planned_run.read_plan`
    superlink, root_certificates, auth_key, health : see `check_network`

    Raises
    ------
    DataError
        There is no such site.yaml. A wrong one is a problem among the others.
    """
    if not site_yaml.is_file():
        raise DataError(f"{site_yaml}: there is no such file; `chainward-site init DIR` writes one")
    checks = [check_versions()]
    config = None
    try:
        config = load_site_config(site_yaml)
        checks.append(ok("configuration", f"{site_yaml}: site '{config.site}'"))
    except DataError as error:
        checks.append(problem("configuration", str(error), "client/site.example.yaml shows all keys"))
        checks.append(skipped("data, state, policy", "not looked at: they stand in site.yaml"))
    if config is not None:
        checks += _of_site(site_yaml, config, plan)
    checks.append(check_gpu())
    checks += check_flower(running_supernodes())
    checks += check_network(superlink, root_certificates, auth_key, health)
    return Diagnosis(site_yaml.name if config is None else config.site, tuple(checks))


def _of_site(site_yaml: Path, config: SiteConfig, plan: RunConfig | None) -> list[Check]:
    state = config.state_dir(site_yaml).absolute()
    path = (site_yaml.parent / Path(config.data).expanduser()).resolve()
    data, checks = open_data(path, config.site, state)
    need = need_of(plan or RunConfig(), data, planned=plan is not None)
    checks += [*check_state(state), check_disk(state, need), check_memory(need), check_own_clock(state)]
    checks += check_policy(config.privacy, state, config.site, data)
    if plan is None:
        checks.append(skipped("plan", "epsilon of the consortium's run: not computed", "give --plan"))
    elif data is None:
        checks.append(skipped("plan", "not looked at: the data can't be used"))
    else:
        checks.append(check_plan_limits(plan, config.limits, data))
        checks += check_plan(plan, config.privacy, state, config.site, data)
    return checks
