"""The audit finds what is wrong with a ledger or with the statements of a run, and its page says so to people."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ledgers import KEY, WORK, gaussian, new_ledger, spend

from chainward_shared.privacy import audit as audit_module
from chainward_shared.privacy.accounting import Epsilons, Mechanism, epsilons
from chainward_shared.privacy.audit import audit_ledger, audit_statements
from chainward_shared.privacy.findings import Audit
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.policy import Terms
from chainward_shared.privacy.report import render_audit
from chainward_shared.privacy.signing import sign
from chainward_shared.privacy.statements import Statement, sign_statement

TERMS = Terms(epsilon=4.0, delta=1e-5, epsilon_per_run=3.0)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return new_ledger(tmp_path)


def train(ledger: Ledger, steps: int, run: str = "r", hop: str = "h", **more: object) -> Statement:
    spend(ledger, gaussian(steps), steps, run=run, hop=hop, **more)
    return sign_statement(ledger, KEY, run, hop, TERMS)


def audited(ledger: Ledger, terms: Terms | None = TERMS, told: tuple[object, ...] = ()) -> Audit:
    return audit_ledger(ledger.path, KEY.public_key(), "oak", terms=terms, told=told)


def whats(audit: Audit, severity: str) -> str:
    return " | ".join(finding.what for finding in audit.findings if finding.severity == severity)


def forged(statement: Statement, **changes: object) -> dict[str, object]:
    """A statement with changes that the site's own key signed."""
    unsigned = Statement.model_validate(statement.to_json() | changes)
    return {**unsigned.to_json(), "signature": sign(KEY, "privacy statement", unsigned.message)}


# --- a site's ledger ---


def test_a_ledger_within_its_budget_is_fine(ledger):
    train(ledger, 40, run="first")
    train(ledger, 50, run="second")
    audit = audited(ledger)
    (site,) = audit.sites
    assert (audit.exit_code, audit.verdict, audit.findings) == (0, "fine", ())
    assert site.lifetime.epsilons == epsilons([gaussian(90)], 1e-5)
    assert {spent.run: spent.epsilons for spent in site.runs} == {
        "first": epsilons([gaussian(40)], 1e-5),
        "second": epsilons([gaussian(50)], 1e-5),
    }
    assert site.lifetime.left == pytest.approx(4 - site.lifetime.epsilons.pld)


def test_an_empty_ledger_is_fine(ledger):
    audit = audited(ledger)
    assert audit.exit_code == 0
    assert audit.sites[0].lifetime.epsilons.enforced == 0


@pytest.mark.parametrize(
    ("terms", "where"),
    [(Terms(epsilon=1.0, delta=1e-5), "lifetime"), (Terms(epsilon=9.0, delta=1e-5, epsilon_per_run=1.0), "run r")],
)
def test_spending_over_the_policy_is_found(ledger, terms, where):
    train(ledger, 60)
    audit = audited(ledger, terms)
    assert audit.exit_code == 1
    (finding,) = [finding for finding in audit.findings if finding.severity == "violation"]
    assert finding.where == f"site oak, {where}"
    assert re.fullmatch(r"epsilon 1\.\d{4} is over the budget of 1", finding.what)


def test_seeded_noise_fails_the_audit(ledger):
    train(ledger, 5, seeded=True)
    audit = audited(ledger)
    assert audit.exit_code == 1
    assert "noise came from a seed" in whats(audit, "violation")


def test_training_without_noise_fails_the_audit(ledger):
    ledger.reserve(Mechanism("dp-sgd", 0.0, 1.0, 5), **WORK)
    assert "done without noise" in whats(audited(ledger), "violation")


def test_accountants_that_contradict_each_other_fail_the_audit(ledger, monkeypatch):
    train(ledger, 5)
    monkeypatch.setattr(audit_module, "epsilons", lambda *_: Epsilons(0.1, 0.3, 0.2, "PRV finds 0.3, PLD 0.2"))
    audit = audited(ledger)
    assert audit.exit_code == 1
    assert "the accountants contradict each other: PRV finds 0.3, PLD 0.2" in whats(audit, "violation")


def test_a_policy_of_another_unit_fails_the_audit(ledger):
    train(ledger, 5)
    audit = audited(ledger, Terms(epsilon=4.0, delta=1e-5, unit="image"))
    assert audit.exit_code == 1
    assert "counted per patient, while the policy protects one image" in whats(audit, "violation")


def test_a_reservation_without_end_counts_and_is_noted(ledger):
    ledger.reserve(gaussian(60), **WORK)
    audit = audited(ledger)
    assert audit.exit_code == 0
    assert "reserved and never ended" in whats(audit, "note")
    assert audit.sites[0].lifetime.epsilons == epsilons([gaussian(60)], 1e-5)
    assert audit.sites[0].open == 1


def test_a_clock_that_went_back_is_noted(tmp_path, monkeypatch):
    times = iter([datetime(2030, 1, 1, tzinfo=UTC), datetime(2029, 12, 31, 23, tzinfo=UTC)])
    monkeypatch.setattr("chainward_shared.privacy.ledger.now", lambda: next(times))
    ledger = Ledger.create(tmp_path / "ledger.jsonl", "oak", KEY)
    ledger.reserve(gaussian(1), **WORK)
    assert "the clock went back by 3600 s" in whats(audited(ledger), "note")


def test_a_torn_line_is_noted(ledger):
    train(ledger, 5)
    ledger.path.write_bytes(ledger.path.read_bytes() + b'{"torn')
    audit = audited(ledger)
    assert audit.exit_code == 0
    assert "6 bytes at the end are an entry that was cut" in whats(audit, "note")


def test_another_delta_than_it_was_spent_under_is_noted_and_all_is_recomputed(ledger):
    train(ledger, 5)
    audit = audited(ledger, Terms(epsilon=4.0, delta=1e-6))
    assert "spent under delta 1e-05, now 1e-06" in whats(audit, "note")
    assert audit.sites[0].lifetime.epsilons == epsilons([gaussian(5)], 1e-6)


def test_without_a_policy_the_audit_says_that_it_compared_with_nothing(ledger):
    train(ledger, 5)
    audit = audited(ledger, None)
    assert audit.exit_code == 0
    assert "no policy was given" in whats(audit, "note")
    assert audit.sites[0].lifetime.epsilons == epsilons([gaussian(5)], 1e-5)


def test_a_damaged_ledger_ends_with_2_and_the_bad_entry(ledger):
    train(ledger, 5)
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"steps":5', b'"steps":1'))
    audit = audited(ledger)
    assert audit.exit_code == 2
    assert "entry 2 is damaged" in whats(audit, "damage")
    assert audit.sites == ()


# --- what the coordinator was told ---


def test_what_was_told_is_what_the_ledger_says(ledger):
    told = (train(ledger, 20, hop="one").to_json(), train(ledger, 20, hop="two").to_json())
    train(ledger, 7, run="later")
    assert audited(ledger, told=told).findings == ()


def test_a_site_that_told_less_than_it_spent_is_found(ledger):
    statement = train(ledger, 40)
    less = statement.to_json()["of_run"][0] | {"steps": 4}
    smaller = epsilons([gaussian(4)], 1e-5).enforced
    told = forged(statement, of_run=[less], of_lifetime=[less], epsilon_run=smaller, epsilon_lifetime=smaller)
    audit = audited(ledger, told=(told,))
    assert audit.exit_code == 1
    assert re.search(r"was told epsilon 0\.\d+ for the run; the ledger makes 1\.\d+", whats(audit, "violation"))


def test_a_site_that_hid_seeded_noise_is_found(ledger):
    statement = train(ledger, 5, seeded=True)
    audit = audited(ledger, told=(forged(statement, seeded=False),))
    assert "told otherwise whether noise came from a seed" in whats(audit, "violation")


def test_a_ledger_that_lacks_what_was_told_is_an_older_copy(ledger):
    train(ledger, 5)
    backup = {path: path.read_bytes() for path in ledger.path.parent.glob("ledger.jsonl*")}
    told = train(ledger, 50).to_json()
    for path, content in backup.items():
        path.write_bytes(content)
    audit = audited(ledger, told=(told,))
    assert audit.exit_code == 1
    assert "an older copy was put back" in whats(audit, "violation")


def test_statements_of_other_sites_are_left_out(ledger, tmp_path):
    other = Ledger.create(tmp_path / "elm.jsonl", "elm", KEY)
    assert audited(ledger, told=(train(other, 5).to_json(),)).exit_code == 0


# --- the statements of a run ---


def test_signed_statements_that_agree_are_fine(ledger):
    told = [train(ledger, 20, hop="one").to_json(), train(ledger, 20, hop="two").to_json()]
    audit = audit_statements("r", told, ["oak"])
    assert (audit.exit_code, audit.findings) == (0, ())
    assert audit.sites[0].runs[0].epsilons == epsilons([gaussian(40)], 1e-5)


def test_a_site_without_a_statement_is_named(ledger):
    audit = audit_statements("r", [train(ledger, 20).to_json()], ["oak", "elm"])
    assert audit.exit_code == 0
    assert [(site.site, site.private) for site in audit.sites] == [("oak", True), ("elm", False)]
    assert "nothing bounds what left it" in whats(audit, "note")


def test_a_changed_statement_ends_with_2(ledger):
    audit = audit_statements("r", [train(ledger, 20).to_json() | {"epsilon_run": 0.1}])
    assert audit.exit_code == 2
    assert "does not match its signature" in whats(audit, "damage")


def test_a_statement_of_another_run_ends_with_2(ledger):
    assert audit_statements("other", [train(ledger, 20).to_json()]).exit_code == 2


def test_a_signed_lie_about_epsilon_ends_with_1(ledger):
    audit = audit_statements("r", [forged(train(ledger, 20), epsilon_run=0.1)])
    assert audit.exit_code == 1
    assert "says epsilon 0.1000 for the run" in whats(audit, "violation")


def test_heads_that_go_backwards_end_with_1(ledger):
    one, two = train(ledger, 20, hop="one").to_json(), train(ledger, 20, hop="two").to_json()
    audit = audit_statements("r", [two, one])
    assert audit.exit_code == 1
    assert "an older copy of the ledger was put back" in whats(audit, "violation")


def test_a_stated_budget_that_is_exceeded_ends_with_1(ledger):
    audit = audit_statements("r", [train(ledger, 400).to_json()])
    assert audit.exit_code == 1
    assert whats(audit, "violation").count("is over the budget of") == 2


def test_stated_seeded_noise_ends_with_1(ledger):
    assert audit_statements("r", [train(ledger, 5, seeded=True).to_json()]).exit_code == 1


# --- for scripts and for people ---


def test_the_json_holds_all_figures_and_is_json_even_without_a_bound(ledger):
    ledger.reserve(Mechanism("dp-sgd", 0.0, 1.0, 5), **WORK)
    content = json.loads(json.dumps(audited(ledger).to_json(), allow_nan=False))
    assert content["exit_code"] == 1
    assert content["sites"][0]["lifetime"]["pld"] == "inf"
    assert [entry["state"] for entry in content["sites"][0]["entries"]] == ["created", "reserved"]


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.split("</style>")[1]).split())


def test_the_page_says_what_was_protected_spent_and_left_out(ledger):
    train(ledger, 40)
    text = text_of(render_audit(audited(ledger)))
    epsilon = epsilons([gaussian(40)], 1e-5)
    assert f"kept within its budget: epsilon {epsilon.pld:.3f} of 4 spent in its lifetime" in text
    assert f"{epsilon.prv:.3f} {epsilon.rdp:.3f} 1e-05 4 {4 - epsilon.pld:.3f}" in text
    assert "one patient, with all images" in text
    assert "none left the hospital" in text
    assert "A hospital's own computers and staff" in text.replace("&#39;", "'")
    assert "Nothing: every entry follows the one before and is signed" in text


def test_the_page_names_exact_metrics_images_and_sites_without_privacy_as_outside(tmp_path):
    ledger = Ledger.create(tmp_path / "ledger.jsonl", "oak", KEY)
    reservation = ledger.reserve(gaussian(5), run="r", hop="h", phase="chain", unit="image", delta=1e-5)
    reservation.begin()
    ledger.commit(reservation, 5)
    terms = Terms(epsilon=4.0, delta=1e-5, unit="image", metrics="exact")
    told = sign_statement(ledger, KEY, "r", "h", terms).to_json()
    outside = text_of(render_audit(audit_statements("r", [told], ["oak", "elm"]))).partition("What is outside")[2]
    assert "Everything of elm" in outside
    assert "Scores and counts of oak" in outside
    assert "A patient with several images at oak" in outside


@pytest.mark.parametrize(
    ("content", "verdict"), [("damaged", "can't be trusted or read"), ("over", "does not hold as it was promised")]
)
def test_the_page_of_a_failed_audit_says_so_first(ledger, content, verdict):
    train(ledger, 300)
    if content == "damaged":
        ledger.path.write_bytes(ledger.path.read_bytes()[:-10])
    page = render_audit(audited(ledger))
    assert verdict in text_of(page).partition("What was protected")[0].replace("&#39;", "'")


def test_the_page_loads_nothing_and_escapes_names(ledger):
    reserved = ledger.reserve(gaussian(5), **{**WORK, "run": "<script>alert(1)</script>"})
    reserved.begin()
    ledger.commit(reserved, 5)
    page = render_audit(audited(ledger))
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=|url\(|@import", page)
    assert "default-src 'none'" in page


def test_the_page_of_an_audit_without_private_sites_says_that_nothing_was_protected():
    text = text_of(render_audit(audit_statements("r", [], ["oak"])))
    assert "No hospital trained with differential privacy: nothing bounds" in text


def test_the_page_is_written_where_asked(ledger, tmp_path):
    from chainward_shared.errors import PrivacyError
    from chainward_shared.privacy.console import write_page

    write_page(audited(ledger), tmp_path / "audit.html")
    assert (tmp_path / "audit.html").read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(PrivacyError, match="can't be written"):
        write_page(audited(ledger), Path(tmp_path / "missing" / "audit.html"))
