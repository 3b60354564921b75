"""A ledger of many rounds says what they cost together, and a site whose accountant starts anew each round is found out."""

from __future__ import annotations

import os
import resource
import signal

import pytest
from ledgers import KEY, WORK, new_ledger, spend

from chainward_shared.errors import LedgerError
from chainward_shared.privacy.accounting import Mechanism, epsilons
from chainward_shared.privacy.audit import audit_ledger
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.policy import Terms
from chainward_shared.privacy.statements import Statement, sign_statement

TERMS = Terms(epsilon=8.0, delta=1e-5)
ROUND = Mechanism("dp-sgd", 1.0, 0.1, 10)


@pytest.fixture
def path(tmp_path):
    return new_ledger(tmp_path).path


def ten_rounds(path, ledger: type[Ledger] = Ledger) -> list[Statement]:
    """Each round by a process of its own, as it were: nothing is remembered but the file."""
    told = []
    for turn in range(10):
        opened = ledger.open(path, KEY, "oak")
        spend(opened, ROUND, ROUND.steps, hop=f"round-{turn}")
        told.append(sign_statement(opened, KEY, "r", f"round-{turn}", TERMS))
    return told


class Forgetful(Ledger):
    """Its accountant starts anew with every reservation."""

    def records(self, run=None, upto=None):
        return tuple(spending.counted for spending in self.spendings(upto)[-1:] if spending.counted)


@pytest.mark.slow
def test_ten_rounds_cost_what_their_steps_cost_together_and_not_what_the_last_one_does(path):
    told = ten_rounds(path)
    found = epsilons(Ledger.open(path, KEY, "oak").mechanisms(), 1e-5)
    assert found.rdp == pytest.approx(7.90, abs=0.01), "3.44 is what an accountant says that is reset each round"
    assert found.enforced == pytest.approx(7.05, abs=0.01)
    assert epsilons([ROUND], 1e-5).rdp == pytest.approx(3.44, abs=0.01)
    assert told[-1].epsilon_lifetime == pytest.approx(found.enforced)
    assert [one.epsilon_lifetime for one in told] == sorted(one.epsilon_lifetime for one in told)
    audit = audit_ledger(path, KEY.public_key(), "oak", terms=TERMS, told=[one.to_json() for one in told])
    assert (audit.exit_code, audit.findings) == (0, ())


@pytest.mark.slow
def test_a_site_that_resets_its_accountant_each_round_is_found_by_its_own_audit(path):
    told = ten_rounds(path, Forgetful)
    assert told[-1].epsilon_lifetime == pytest.approx(2.85, abs=0.01)
    audit = audit_ledger(path, KEY.public_key(), "oak", terms=TERMS, told=[told[-1].to_json()])
    assert audit.exit_code == 1
    assert any(
        "the coordinator was told epsilon 2.8545 for the lifetime; the ledger makes 7.0466" in finding.what
        for finding in audit.findings
    )


# --- a disk and a folder that really refuse ---


def in_a_child(act) -> int:
    """The exit code of a process that does something irreversible to itself."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_that_the_kernel_lets_grow_no_further_stops_the_training(path):
    Ledger.open(path, KEY, "oak").reserve(ROUND, **WORK | {"hop": "before"})
    size = path.stat().st_size

    def act() -> None:
        ledger = Ledger.open(path, KEY, "oak")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
        try:
            ledger.reserve(ROUND, **WORK | {"hop": "too much"})
        except LedgerError as error:
            os._exit(7 if "can't be written (File too large); nothing is trained" in str(error) else 8)

    assert in_a_child(act) == 7
    again = Ledger.open(path, KEY, "oak")
    assert again.torn_bytes == 100, "the kernel took a part of the line"
    assert [mechanism.steps for mechanism in again.mechanisms()] == [10]
    again.reserve(ROUND, **WORK | {"hop": "after"})
    assert [mechanism.steps for mechanism in Ledger.open(path, KEY, "oak").mechanisms()] == [20]


@pytest.mark.skipif(os.getuid() == 0, reason="no permission stops the superuser; see test_ledger_faults.py")
def test_a_folder_that_may_only_be_read_stops_the_training(path):
    ledger = Ledger.open(path, KEY, "oak")
    path.parent.chmod(0o500)
    path.chmod(0o400)
    with pytest.raises(LedgerError, match=r"can't be written \(Permission denied\); nothing is trained"):
        ledger.reserve(ROUND, **WORK | {"hop": "x"})
