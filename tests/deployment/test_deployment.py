"""`flwr run server/app` on a SuperLink with TLS, node authentication and a database, and three hospitals."""

from __future__ import annotations

import json
import re

import pytest
from safetensors.torch import load_file

from chainward_client.keys import open_site_ledger
from chainward_shared.privacy.audit import audit_statements

SITES = ("ash", "birch", "cedar")

POLICY = {"epsilon": 50.0, "delta": 1.0e-3, "units": 20}

pytestmark = pytest.mark.deployment


def test_three_hospitals_of_which_one_is_private_train_one_model(deployment, tiny):
    deployment.start_superlink()
    for site in SITES:
        deployment.add_site(site, POLICY if site == "cedar" else None)
        deployment.start_site(site, online=False)
    for site in SITES:
        deployment.wait_online(site)
    settings = tiny | {
        "federation.sites": ",".join(SITES),
        "privacy.mode": "by-policy",
        "privacy.epsilon": 20.0,
        "privacy.delta": 1.0e-3,
    }
    run = deployment.submit(settings)
    folder = deployment.wait_for_run()
    assert folder.state.status == "finished", deployment.logs()
    results = folder.load_results()

    assert [(link.site, link.status) for link in results.links] == [(site, "done") for site in SITES]
    for name in ("chain", "student"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder.model_path(name)).values()), name
    assert results.final["student"].sites["ash"].n > 0
    assert results.final["student"].sites.get("cedar") is None, "a private hospital withholds its scores by default"
    assert (folder.path / "report.html").stat().st_size > 10_000

    record = json.loads((folder.path / "privacy.json").read_text())
    audited = audit_statements(folder.state.run_id, record["statements"], list(record["sites"]))
    assert audited.exit_code == 0
    ledger, _ = open_site_ledger(deployment.site_dir("cedar") / "state", "cedar")
    assert ledger.head.entries > 1, "what was spent is in the hospital's own ledger"
    assert not (deployment.site_dir("ash") / "state" / "privacy").exists()

    assert deployment.flower_status(run) == "finished:completed"
    everything = "".join(path.read_text(errors="replace") for path in deployment.folder.rglob("*.log"))
    assert "Traceback" not in everything
    assert not re.search(r"(ash|birch|cedar)-(train|val|test)-\d", everything), "no file name of a case is in a log"
