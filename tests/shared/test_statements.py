"""Privacy statements: signed by the site, recomputable by the coordinator, and never older than the one before."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledgers import KEY, OTHER_KEY, gaussian, new_ledger, spend

from chainward_shared.errors import StatementError
from chainward_shared.privacy.accounting import Mechanism, spent
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.policy import Terms
from chainward_shared.privacy.record import privacy_record
from chainward_shared.privacy.signing import sign
from chainward_shared.privacy.statements import (
    Statement,
    Statements,
    check_order,
    check_statement,
    parse_statement,
    sign_statement,
)

TERMS = Terms(epsilon=4.0, delta=1e-5)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return new_ledger(tmp_path)


def said(
    ledger: Ledger, steps: int, done: int | None = None, run: str = "r", hop: str = "h", **more: bool
) -> Statement:
    """Train, and make the statement that goes with the result."""
    spend(ledger, gaussian(steps), done, run=run, hop=hop, **more)
    return sign_statement(ledger, KEY, run, hop, TERMS)


def forged(statement: Statement, key: Ed25519PrivateKey = KEY, **changes: object) -> Statement:
    """A statement with changes that somebody with a key signed."""
    content = statement.to_json() | changes
    unsigned = Statement.model_validate(content)
    return unsigned.model_copy(update={"signature": sign(key, "privacy statement", unsigned.message)})


def test_a_statement_says_what_run_and_lifetime_have_spent(ledger):
    said(ledger, 30, 30, run="first")
    statement = said(ledger, 50, 40, run="second")
    assert statement.epsilon_run == pytest.approx(spent([gaussian(40)], 1e-5))
    assert statement.epsilon_lifetime == pytest.approx(spent([gaussian(70)], 1e-5))
    assert statement.left == pytest.approx(4 - statement.epsilon_lifetime)
    assert statement.head == ledger.head
    check_statement(statement, site="oak", run="second", hop="h")


def test_what_is_reserved_and_not_committed_is_stated_in_full(ledger):
    assert said(ledger, 50).epsilon_run == pytest.approx(spent([gaussian(50)], 1e-5))


def test_a_statement_survives_the_wire(ledger):
    statement = said(ledger, 50, 40)
    arrived = parse_statement(json.loads(json.dumps(statement.to_json())))
    assert arrived == statement
    check_statement(arrived)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epsilon_run", 0.1), ("epsilon_lifetime", 0.1), ("seeded", True), ("of_run", []), ("hop", "other")],
)
def test_a_changed_statement_does_not_match_its_signature(ledger, field, value):
    changed = parse_statement(said(ledger, 50, 40).to_json() | {field: value})
    with pytest.raises(StatementError, match="does not match its signature"):
        check_statement(changed)


def test_a_signature_for_something_else_is_none_for_a_statement(ledger):
    statement = said(ledger, 50, 40)
    other = statement.model_copy(update={"signature": sign(KEY, "ledger entry", statement.message)})
    with pytest.raises(StatementError, match="does not match its signature"):
        check_statement(other)


@pytest.mark.parametrize("field", ["epsilon_run", "epsilon_lifetime"])
def test_a_signed_epsilon_that_is_too_low_is_found_by_recomputing(ledger, field):
    statement = said(ledger, 50, 40)
    lie = forged(statement, **{field: getattr(statement, field) * 0.9})
    with pytest.raises(StatementError, match=r"says epsilon .*; what it lists makes"):
        check_statement(lie)


def test_the_runs_steps_must_be_among_those_of_the_lifetime(ledger):
    statement = said(ledger, 50, 40)
    fewer = [statement.to_json()["of_run"][0] | {"steps": 39}]
    with pytest.raises(StatementError, match="lists 1 steps for the run that its lifetime lacks"):
        check_statement(forged(statement, of_lifetime=fewer))


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"site": "elm"}, "came from site 'elm'"),
        ({"run": "other"}, "is about run 'r', expected 'other'"),
        ({"hop": "other"}, "was made for 'h', not for 'other'"),
        ({"public_key": "0" * 64}, "is signed with the key SHA256:"),
    ],
)
def test_a_statement_of_another_site_run_work_or_key_is_refused(ledger, expected, message):
    with pytest.raises(StatementError, match=message):
        check_statement(said(ledger, 50, 40), **expected)


def test_a_ledger_that_went_back_is_noticed(ledger):
    first, second = said(ledger, 10, 10), said(ledger, 10, 10)
    check_order(first, second)
    with pytest.raises(StatementError, match="an older copy of the ledger was put back"):
        check_order(second, first)


def test_a_ledger_that_was_rewritten_is_noticed(ledger):
    first = said(ledger, 10, 10)
    other = forged(first, head={"sequence": first.head.sequence, "hash": "a" * 64})
    with pytest.raises(StatementError, match="the ledger was rewritten"):
        check_order(first, other)


def test_the_coordinator_keeps_what_it_accepts_and_a_repeated_answer_once(ledger):
    statements = Statements()
    first = said(ledger, 10, 10, hop="one")
    statements.accept(first, site="oak", run="r", hop="one")
    second = said(ledger, 10, 10, hop="two")
    statements.accept(second, site="oak", run="r", hop="two")
    statements.accept(first, site="oak", run="r", hop="one")
    assert statements.of("oak") == (first, second)
    assert statements.last("oak") == second


def test_an_old_statement_is_not_accepted_for_new_work(ledger):
    statements = Statements()
    first = said(ledger, 10, 10, hop="one")
    statements.accept(first, site="oak", run="r", hop="one")
    with pytest.raises(StatementError, match="was made for 'one', not for 'two'"):
        statements.accept(first, site="oak", run="r", hop="two")


def test_a_site_keeps_its_key(ledger, tmp_path):
    statements = Statements()
    statements.accept(said(ledger, 10, 10), site="oak", run="r", hop="h")
    impostor = Ledger.create(tmp_path / "other.jsonl", "oak", OTHER_KEY)
    for _ in range(5):
        impostor.reserve(gaussian(1), run="r", phase="chain", hop="h", unit="patient", delta=1e-5)
    with pytest.raises(StatementError, match="is signed with the key SHA256:"):
        statements.accept(sign_statement(impostor, OTHER_KEY, "r", "h", TERMS), site="oak", run="r", hop="h")
    assert len(statements.of("oak")) == 1


def test_a_statement_of_a_newer_version_is_refused_as_such(ledger):
    with pytest.raises(StatementError, match=r"schema 2, expected 1; a newer Chainward wrote it"):
        parse_statement(said(ledger, 10, 10).to_json() | {"schema": 2})


@pytest.mark.parametrize("content", ["", "{", "{}", b"\xff", [], None, {"site": "oak"}])
def test_what_is_no_statement_is_refused_in_one_line(content):
    with pytest.raises(StatementError) as caught:
        parse_statement(content)
    assert "\n" not in str(caught.value)


def test_training_without_noise_can_not_be_stated(ledger):
    ledger.reserve(Mechanism("dp-sgd", 0.0, 1.0, 5), run="r", phase="chain", hop="h", unit="patient", delta=1e-5)
    with pytest.raises(StatementError, match="no finite epsilon"):
        sign_statement(ledger, KEY, "r", "h", TERMS)


def test_a_ledger_of_another_unit_can_not_be_stated(ledger):
    said(ledger, 5, 5)
    with pytest.raises(StatementError, match="counts per patient, the policy per image"):
        sign_statement(ledger, KEY, "r", "h", Terms(epsilon=4.0, delta=1e-5, unit="image"))


def test_seeded_noise_is_stated(ledger):
    assert not said(ledger, 5, 5).seeded
    assert said(ledger, 5, 5, seeded=True).seeded


def test_the_record_of_a_run_names_who_was_private_and_what_is_outside(ledger):
    statement = said(ledger, 10, 10)
    record = privacy_record(Statements([statement]), ["oak", "elm"])
    assert record.sites["oak"].epsilon == statement.epsilon_run
    assert record.to_json()["sites"]["elm"] == {"mode": "off", "epsilon": None, "delta": None}
    assert (record.private, record.trained, record.absent) == (["oak"], ["oak", "elm"], [])
    assert record.statement == "1 of 2 sites trained with differential privacy. Nothing bounds what left elm."
    assert [parse_statement(content) for content in record.statements] == [statement]
