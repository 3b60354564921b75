"""A deployed consortium: hospitals with a site.yaml, data, keys and policies of their own.

Once in this process, in seconds; and once with `flwr run server/app` on a SuperLink with TLS, node authentication and a
database, and a SuperNode for each of three hospitals.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from flower_deployment import write_site
from flwr.app import Context, RecordDict
from loopback_grid import LoopbackGrid
from safetensors.torch import load_file

import chainward_client.app
from chainward_client.site_key import identity
from chainward_client.site_ledger import create_site_ledger, ledger_path, open_site_ledger
from chainward_server.run_folder import RunFolder
from chainward_shared.privacy.audit import audit_statements
from chainward_shared.privacy.signing import fingerprint, public_text
from chainward_shared.protocol import MaskedSum, StatisticsResult, kind_of

SITES = ("ash", "birch", "cedar")

POLICY = {"epsilon": 50.0, "delta": 1.0e-3}
"""Of cedar, which is the one private hospital."""


@pytest.fixture
def asked(tiny):
    """The run that the coordinator asks for."""
    private = {"privacy.mode": "by-policy", "privacy.epsilon": 20.0, "privacy.delta": 1.0e-3}
    return tiny | private | {"federation.sites": ",".join(SITES)}


def check_outcome(folder: RunFolder, sites: Path) -> None:
    """Look at the run folder, and at what the hospitals under `sites` keep."""
    assert folder.state.status == "finished", folder.state.reason
    results = folder.load_results()
    assert results.data.source == "the sites' own data"
    assert [(link.site, link.status) for link in results.links] == [(site, "done") for site in SITES]
    for name in ("chain", "student"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder.model_path(name)).values()), name
    assert sorted(results.final["student"].sites) == ["ash", "birch"], "a private hospital withholds its scores"
    assert (folder.path / "report.html").stat().st_size > 10_000
    record = json.loads((folder.path / "privacy.json").read_text())
    assert audit_statements(folder.state.run_id, record["statements"], list(record["sites"])).exit_code == 0
    assert open_site_ledger(sites / "cedar" / "state", "cedar")[0].spendings(), "the hospital's own ledger has it"
    assert not ledger_path(sites / "ash" / "state").exists()
    told = "".join(path.read_text() for path in folder.path.glob("*.json"))
    assert not re.search(r"(ash|birch|cedar)-(train|val|test)-\d", told), "no file name of a case"
    assert not any(str(sites / site) in told for site in SITES), "no path of a hospital"


def test_hospitals_train_by_their_own_site_yaml(coordinated, asked, small_consortium, tmp_path):
    for site in SITES:
        write_site(tmp_path / site, site, small_consortium, POLICY if site == "cedar" else None)
    create_site_ledger(tmp_path / "cedar" / "state", "cedar")

    def at_the_hospital(message, answer):
        site = SITES[message.metadata.dst_node_id - 101]
        node_config = {"site-config": str(tmp_path / site / "site.yaml")}
        context = Context(1, message.metadata.dst_node_id, node_config, state=RecordDict(), run_config={})
        return chainward_client.app.app(message, context)

    settings = asked | {"output.dir": str(tmp_path / "runs")}
    folder, _ = coordinated(settings, LoopbackGrid(len(SITES), at_the_hospital))
    check_outcome(folder, tmp_path)


def test_hospitals_that_know_each_other_add_up_what_nobody_sees(coordinated, asked, small_consortium, tmp_path):
    paths = {site: write_site(tmp_path / site, site, small_consortium) for site in SITES}
    keys = {site: fingerprint(public_text(identity(tmp_path / site / "state"))) for site in SITES}
    for site, path in paths.items():
        partners = {other: key for other, key in keys.items() if other != site}
        terms = {"secure_sums": {"partners": partners, "required": True}}
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | terms))
    kinds = set()

    def at_the_hospital(message, answer):
        node_config = {"site-config": str(paths[SITES[message.metadata.dst_node_id - 101]])}
        context = Context(1, message.metadata.dst_node_id, node_config, state=RecordDict(), run_config={})
        reply = chainward_client.app.app(message, context)
        kinds.add(kind_of(reply.content))
        return reply

    changes = {"privacy.mode": "off", "chain.head": "statistics", "chain.refit": "end", "student.rounds": 0}
    settings = asked | changes | {"output.dir": str(tmp_path / "runs"), "federation.secure-sums": "required-by-site"}
    settings = {key: value for key, value in settings.items() if key not in ("privacy.epsilon", "privacy.delta")}
    _, results = coordinated(settings, LoopbackGrid(len(SITES), at_the_hospital))
    assert [(head.secure, head.sites) for head in results.heads] == [(True, list(SITES))] * 2
    assert MaskedSum.KIND in kinds
    assert StatisticsResult.KIND not in kinds


@pytest.mark.deployment
def test_three_hospitals_train_over_tls_with_keys_that_the_superlink_knows(deployment, asked):
    deployment.start_superlink()
    for site in SITES:
        deployment.add_site(site, POLICY if site == "cedar" else None)
        deployment.start_site(site, online=False)
    for site in SITES:
        deployment.wait_online(site)
    run = deployment.submit(asked)
    check_outcome(deployment.wait_for_run(), deployment.folder)
    assert deployment.flower_status(run) == "finished:completed"
    logs = "".join(path.read_text(errors="replace") for path in deployment.folder.rglob("*.log"))
    assert "Traceback" not in logs
    assert "Start `flwr-clientapp` process" not in logs, "each request was a copy of the prepared process"
    assert not re.search(r"(ash|birch|cedar)-(train|val|test)-\d", logs), "no file name of a case"
