"""The hospital's command, as it is typed, and the coordinator's audit of a run."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import tomli_w

from chainward_client import cli
from chainward_client.policy import reserve
from chainward_client.site_config import load_site_config
from chainward_client.site_ledger import create_site_ledger, key_path, ledger_path, open_site_ledger
from chainward_shared.config import RunConfig
from chainward_shared.errors import LedgerError, PrivacyError
from chainward_shared.privacy.accounting import Mechanism
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.record import privacy_record
from chainward_shared.privacy.statements import Statements, sign_statement


@pytest.fixture
def site_yaml(tmp_path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(f"site: oak\ndata: data.yaml\nstate: {tmp_path / 'state'}\nprivacy: {{epsilon: 4, delta: 1e-5}}\n")
    return path


@pytest.fixture
def typed(monkeypatch, capsys):
    """Type a command; returns exit code, stdout and stderr."""

    def type_(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["chainward-site", *map(str, words)])
        monkeypatch.setattr("chainward_client.cli.console", cli.PlainConsole(width=250))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return type_


def train(site_yaml: Path, steps: int = 20) -> tuple[Ledger, dict[str, object]]:
    """Train, and return the ledger and the run's privacy.json."""
    config = load_site_config(site_yaml)
    ledger, key = open_site_ledger(config.state_dir(site_yaml), "oak")
    mechanism = Mechanism("dp-sgd", 20.0, 1.0, steps)
    reservation = reserve(config.privacy, ledger, mechanism, run="r", phase="chain", hop="one", clip_norm=1.0)
    reservation.begin()
    ledger.commit(reservation, steps)
    statement = sign_statement(ledger, key, "r", "one", config.privacy.terms)
    return ledger, privacy_record(Statements([statement]), ["oak"]).to_json()


def test_keys_are_made_once_and_only_the_owner_may_read_them(site_yaml, typed, tmp_path):
    code, first, _ = typed("keys", site_yaml)
    assert code == 0
    assert "SHA256:" in first
    secret = key_path(tmp_path / "state")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    content = secret.read_bytes()
    assert typed("keys", site_yaml) == (0, first, "")
    assert secret.read_bytes() == content


def test_an_audit_prints_a_table_and_writes_json_and_a_page(site_yaml, typed, tmp_path):
    typed("keys", site_yaml)
    train(site_yaml)
    code, out, _ = typed("audit", site_yaml, "--html", tmp_path / "audit.html")
    assert code == 0
    assert "lifetime" in out and "ledger oak: fine" in out
    assert (tmp_path / "audit.html").read_text().startswith("<!DOCTYPE html>")
    code, out, _ = typed("audit", site_yaml, "--json")
    assert (code, json.loads(out)["verdict"]) == (0, "fine")


def test_an_audit_of_a_bare_ledger_says_whose_key_it_believes(site_yaml, typed, tmp_path):
    typed("keys", site_yaml)
    train(site_yaml)
    code, out, _ = typed("audit", ledger_path(tmp_path / "state"))
    assert code == 0
    assert "checked against the key that the ledger names itself, SHA256:" in out


def test_an_audit_ends_with_1_over_budget_and_2_when_damaged(site_yaml, typed, tmp_path):
    typed("keys", site_yaml)
    ledger, _ = train(site_yaml)
    site_yaml.write_text(site_yaml.read_text().replace("epsilon: 4", "epsilon: 0.5"))
    code, out, _ = typed("audit", site_yaml)
    assert code == 1
    assert "violation: site oak, lifetime: epsilon" in out
    ledger.path.write_bytes(ledger.path.read_bytes()[:-9])
    code, out, _ = typed("audit", site_yaml)
    assert code == 2
    assert "entry 3 is damaged" in out


def test_an_audit_compares_with_what_was_told(site_yaml, typed, tmp_path):
    typed("keys", site_yaml)
    backup = {path: path.read_bytes() for path in (tmp_path / "state/privacy").iterdir() if path.is_file()}
    _, record = train(site_yaml)
    told = tmp_path / "privacy.json"
    told.write_text(json.dumps(record))
    assert typed("audit", site_yaml, "--told", told)[0] == 0
    for path, content in backup.items():
        path.write_bytes(content)
    code, out, _ = typed("audit", site_yaml, "--told", told)
    assert code == 1
    assert "an older copy was put back" in out


@pytest.mark.parametrize("words", [("audit", "missing.yaml"), ("audit", "missing.jsonl"), ("keys", "missing.yaml")])
def test_what_is_not_there_is_refused_in_one_line(typed, words):
    code, out, err = typed(*words)
    assert (code, out) == (2, "")
    assert err.startswith("chainward-site: missing.") and len(err.splitlines()) == 1


def test_an_audit_before_there_are_keys_says_what_to_do(site_yaml, typed):
    code, _, err = typed("audit", site_yaml)
    assert code == 2
    assert "`chainward-site keys`" in err


# --- keys and ledger belong together ---


def test_a_ledger_that_is_gone_is_not_replaced(tmp_path):
    ledger = create_site_ledger(tmp_path, "oak")
    ledger.path.unlink()
    ledger.path.with_name("ledger.jsonl.head").unlink()
    for open_ in (open_site_ledger, create_site_ledger):
        with pytest.raises(LedgerError, match="the ledger is gone, but the key that signed it is there"):
            open_(tmp_path, "oak")


def test_a_key_that_is_gone_is_not_replaced(tmp_path):
    create_site_ledger(tmp_path, "oak")
    key_path(tmp_path).unlink()
    with pytest.raises(LedgerError, match="there is a ledger that it signed; restore the key"):
        create_site_ledger(tmp_path, "oak")


def test_keys_go_on_where_they_were_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(Ledger, "create", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        create_site_ledger(tmp_path, "oak")
    assert key_path(tmp_path).exists() and not ledger_path(tmp_path).exists()
    monkeypatch.undo()
    assert create_site_ledger(tmp_path, "oak").head.sequence == 1
    assert open_site_ledger(tmp_path, "oak")[0].head.sequence == 1


def test_a_key_that_others_may_read_is_refused(tmp_path):
    create_site_ledger(tmp_path, "oak")
    key_path(tmp_path).chmod(0o644)
    with pytest.raises(PrivacyError, match=r"others may read this private key \(mode 0644\); expected 0600"):
        open_site_ledger(tmp_path, "oak")


def test_another_key_does_not_open_the_ledger(tmp_path):
    one, other = (create_site_ledger(tmp_path / name, "oak") for name in ("one", "other"))
    assert one.public_key != other.public_key
    key_path(tmp_path / "one").write_bytes(key_path(tmp_path / "other").read_bytes())
    with pytest.raises(LedgerError, match="not signed with the key SHA256:"):
        open_site_ledger(tmp_path / "one", "oak")


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_what_is_no_key_is_refused(tmp_path, content):
    create_site_ledger(tmp_path, "oak")
    key_path(tmp_path).write_bytes(content)
    with pytest.raises(PrivacyError, match="not a private key in PEM format"):
        open_site_ledger(tmp_path, "oak")


# --- the coordinator's audit ---


@pytest.fixture
def run_folder(tmp_path) -> Path:
    path = tmp_path / "runs" / "r"
    path.mkdir(parents=True)
    state = {"schema": 1, "run_id": "r", "status": "finished", "started": "2030-01-01", "updated": "2030-01-01"}
    (path / "run.json").write_text(json.dumps(state))
    (path / "config.toml").write_text(tomli_w.dumps(RunConfig().tables()))
    return path


def coordinator(run_folder: Path, *words: object) -> tuple[int, str]:
    from typer.testing import CliRunner

    from chainward_server.cli import app

    result = CliRunner().invoke(app, ["audit", "r", "--dir", str(run_folder.parent), *map(str, words)])
    return result.exit_code, result.output + str(result.exception or "")


def test_the_coordinator_audits_a_private_run(site_yaml, typed, run_folder, tmp_path):
    typed("keys", site_yaml)
    _, record = train(site_yaml)
    (run_folder / "privacy.json").write_text(json.dumps(record))
    code, out = coordinator(run_folder, "--json")
    assert (code, json.loads(out)["sites"][0]["site"]) == (0, "oak")
    assert coordinator(run_folder, "--html", tmp_path / "audit.html")[0] == 0
    assert "oak" in (tmp_path / "audit.html").read_text()
    record["statements"][0]["epsilon_run"] = 0.01
    (run_folder / "privacy.json").write_text(json.dumps(record))
    assert coordinator(run_folder)[0] == 2


def test_a_run_without_privacy_says_so_and_is_no_failure(run_folder):
    (run_folder / "privacy.json").write_text(json.dumps({"mode": "off", "sites": {"oak": {"mode": "off"}}}))
    code, out = coordinator(run_folder)
    assert code == 0
    assert "differential privacy was off in this run" in out


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{", "damaged (not JSON)"), ("[]", "not the privacy.json"), ('{"mode": "dp-sgd"}', "no statement")],
)
def test_a_damaged_privacy_json_is_refused(run_folder, content, problem):
    (run_folder / "privacy.json").write_text(content)
    code, out = coordinator(run_folder)
    assert code != 0
    assert problem in out
