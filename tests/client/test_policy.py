"""The site's policy: nothing that would overspend is reserved, and a refusal says why in numbers."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from ledgers import KEY, gaussian, new_ledger

from chainward_client.policy import PrivacyPolicy, check_request, check_run, check_units, reserve
from chainward_client.site_config import load_site_config
from chainward_shared.errors import DataError, PolicyRefusal
from chainward_shared.privacy.accounting import Mechanism, spent
from chainward_shared.privacy.ledger import Ledger, Reservation

DELTA = 1e-5
POLICY = PrivacyPolicy(epsilon=2.0, delta=DELTA)


def reserve_training(
    policy: PrivacyPolicy, ledger: Ledger, mechanism: Mechanism, run: str, hop: str = "hop"
) -> Reservation:
    return reserve(policy, ledger, mechanism, run=run, phase="chain", hop=hop, clip_norm=1.0)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return new_ledger(tmp_path)


def refusal_of(policy: PrivacyPolicy, ledger: Ledger, asked: Mechanism, run: str = "r") -> str:
    before = ledger.head
    with pytest.raises(PolicyRefusal) as caught:
        reserve_training(policy, ledger, asked, run)
    assert ledger.head == before, "a refusal reserves nothing"
    message = str(caught.value)
    assert "\n" not in message
    return message


def numbers_after(message: str, pattern: str) -> list[float]:
    return [float(text) for text in re.search(pattern, message).groups()]


# --- the budget ---


def test_what_fits_is_reserved_with_unit_and_delta_of_the_policy(ledger):
    reservation = reserve_training(POLICY, ledger, gaussian(50), "r")
    assert reservation.mechanism == gaussian(50)
    assert (reservation.entry.unit, reservation.entry.delta) == ("patient", DELTA)
    assert reservation.entry.mechanism.clip_norm == 1.0
    assert ledger.mechanisms() == [gaussian(50)]


@pytest.mark.slow
def test_a_refusal_says_asked_spent_left_and_the_longest_training_that_fits(ledger):
    reserve_training(POLICY, ledger, gaussian(50), "r")
    message = refusal_of(POLICY, ledger, gaussian(100))
    asked, already, budget, left, together, steps = numbers_after(
        message,
        r"epsilon (\S+) asked, (\S+) of (\S+) spent .*, (\S+) left; together (\S+) at .*: (\d+) of the 100 steps",
    )
    assert asked == pytest.approx(spent([gaussian(100)], DELTA), rel=1e-3)
    assert already == pytest.approx(spent([gaussian(50)], DELTA), rel=1e-3)
    assert (budget, left) == (2.0, pytest.approx(2 - already, abs=2e-3))
    assert together == pytest.approx(spent([gaussian(150)], DELTA), rel=1e-3)
    assert spent([gaussian(50 + int(steps))], DELTA) <= 2.0 < spent([gaussian(51 + int(steps))], DELTA)
    reserve_training(POLICY, ledger, gaussian(int(steps)), "r")
    assert "Not one step at noise multiplier 20" in refusal_of(POLICY, ledger, gaussian(100))


@pytest.mark.slow
def test_all_runs_share_the_lifetime(ledger):
    reserve_training(POLICY, ledger, gaussian(80), "first")
    assert "spent in the site's lifetime" in refusal_of(POLICY, ledger, gaussian(80), run="second")


@pytest.mark.slow
def test_a_cap_on_a_run_binds_that_run_only(ledger):
    policy = POLICY.model_copy(update={"epsilon_per_run": 1.0})
    reserve_training(policy, ledger, gaussian(25), "first")
    assert "of 1 spent in this run" in refusal_of(policy, ledger, gaussian(25), run="first")
    reserve_training(policy, ledger, gaussian(25), "second")


@pytest.mark.slow
def test_the_parts_of_a_plan_are_counted_together(ledger):
    """A teacher and a link, each of which would fit alone."""
    check_request(POLICY, ledger, [gaussian(60)], "r")
    check_request(POLICY, ledger, [gaussian(60, noise=19.0)], "r")
    with pytest.raises(PolicyRefusal, match="over budget"):
        check_request(POLICY, ledger, [gaussian(60), gaussian(60, noise=19.0)], "r")
    assert ledger.mechanisms() == []


def test_what_was_reserved_and_never_ended_still_counts(ledger):
    reserve_training(POLICY, ledger, gaussian(80), "r")
    again = Ledger.open(ledger.path, KEY, "oak")
    assert "over budget" in refusal_of(POLICY, again, gaussian(80))


def test_a_training_without_noise_never_fits(ledger):
    assert "epsilon inf asked" in refusal_of(POLICY, ledger, gaussian(1, noise=0.0))


def test_a_release_that_does_not_fit_is_refused(ledger):
    assert "No such release fits" in refusal_of(POLICY, ledger, Mechanism("laplace", 0.1, 1.0, 1))


def test_a_ledger_of_another_unit_is_refused(ledger):
    reserve_training(POLICY, ledger, gaussian(5), "r")
    images = POLICY.model_copy(update={"unit": "image"})
    assert "ledger of this site counts per patient, its policy per image" in refusal_of(images, ledger, gaussian(5))


def test_a_refusal_names_no_file_and_no_count_of_patients(ledger, tmp_path):
    message = refusal_of(POLICY, ledger, gaussian(1000))
    assert str(tmp_path) not in message
    with pytest.raises(PolicyRefusal) as caught:
        check_units(PrivacyPolicy(epsilon=1, delta=0.01), 1234, has_patient_ids=True)
    assert "1234" not in str(caught.value)


def test_a_request_is_checked_against_the_ledger_as_it_is_now(ledger):
    other = Ledger.open(ledger.path, KEY, "oak")
    reserve_training(POLICY, other, gaussian(80), "r")
    with pytest.raises(PolicyRefusal):
        check_request(POLICY, ledger, [gaussian(80)], "r")


@pytest.mark.slow
def test_processes_that_reserve_at_the_same_time_never_overspend_and_use_the_budget(ledger):
    piece = gaussian(10)
    fits = max(count for count in range(1, 40) if spent([gaussian(10 * count)], DELTA) <= POLICY.epsilon)
    assert fits >= 5
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            mine = Ledger.open(ledger.path, KEY, "oak")
            for turn in range(fits):
                try:
                    reserve_training(POLICY, mine, piece, "r", f"{number}-{turn}")
                except PolicyRefusal:
                    os._exit(7)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 7} and 7 in codes
    after = Ledger.open(ledger.path, KEY, "oak").mechanisms()
    assert sum(mechanism.steps for mechanism in after) == 10 * fits
    assert spent(after, DELTA) <= POLICY.epsilon


# --- what a run may ask ---


def test_a_policy_that_requires_privacy_refuses_a_run_without():
    with pytest.raises(PolicyRefusal, match=r"requires differential privacy and the run has none"):
        check_run(POLICY, private=False)
    check_run(POLICY.model_copy(update={"required": False}), private=False)
    check_run(None, private=False)


def test_a_site_without_a_policy_has_no_budget_for_a_private_run():
    with pytest.raises(PolicyRefusal, match=r"site\.yaml lacks the 'privacy' block"):
        check_run(None, private=True)


def test_units_of_run_and_policy_must_agree():
    check_run(POLICY, private=True, unit="patient")
    with pytest.raises(PolicyRefusal, match="the run protects one image, the policy of this site one patient"):
        check_run(POLICY, private=True, unit="image")


def test_privileged_teachers_train_only_where_the_policy_lets_them():
    with pytest.raises(PolicyRefusal, match="privileged_teachers: false"):
        check_run(POLICY, private=True, privileged=True)
    check_run(POLICY.model_copy(update={"privileged_teachers": True}), private=True, privileged=True)


# --- what the data must allow ---


@pytest.mark.parametrize(
    ("delta", "units", "fine"), [(0.01, 99, True), (0.01, 100, False), (0.01, 101, False), (1e-5, 0, False)]
)
def test_delta_must_be_below_one_over_the_number_of_units(delta, units, fine):
    policy = PrivacyPolicy(epsilon=1, delta=delta)
    if fine:
        check_units(policy, units, has_patient_ids=True)
        return
    with pytest.raises(PolicyRefusal, match="is not below 1 over the number of patients"):
        check_units(policy, units, has_patient_ids=True)


def test_patients_without_ids_can_not_be_protected():
    with pytest.raises(PolicyRefusal, match="the data have no patient ids"):
        check_units(POLICY, 100, has_patient_ids=False)
    check_units(POLICY.model_copy(update={"unit": "image"}), 100, has_patient_ids=False)


# --- the block in site.yaml ---


def site_yaml(tmp_path: Path, privacy: str) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(f"site: oak\ndata: data.yaml\nprivacy: {privacy}\n")
    return path


def test_a_policy_is_read_with_cautious_defaults(tmp_path):
    policy = load_site_config(site_yaml(tmp_path, "{epsilon: 8, delta: 1e-5}")).privacy
    assert policy == PrivacyPolicy(
        epsilon=8.0,
        delta=1e-5,
        required=True,
        epsilon_per_run=None,
        unit="patient",
        metrics="withhold",
        metrics_epsilon=None,
        privileged_teachers=False,
    )
    assert policy.metrics_mechanism() is None


def test_a_noised_release_costs_what_the_policy_says(tmp_path):
    text = "{epsilon: 8, delta: 1e-5, metrics: noised, metrics_epsilon: 0.05}"
    mechanism = load_site_config(site_yaml(tmp_path, text)).privacy.metrics_mechanism()
    assert mechanism == Mechanism("laplace", 20.0, 1.0, 1)
    assert spent([mechanism], 1e-9) == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{epsilon: 0, delta: 1e-5}", "privacy.epsilon: input should be greater than 0, found 0"),
        ("{epsilon: -1, delta: 1e-5}", "privacy.epsilon: input should be greater than 0, found -1"),
        ("{epsilon: .inf, delta: 1e-5}", "privacy.epsilon: input should be a finite number, found inf"),
        ("{epsilon: 8, delta: 0}", "privacy.delta: input should be greater than 0, found 0"),
        ("{epsilon: 8, delta: 1}", "privacy.delta: input should be less than 1, found 1"),
        ("{epsilon: 8}", "privacy.delta: field required"),
        ("{epsilon: 8, delta: 0.1, unit: person}", "privacy.unit: input should be 'patient' or 'image'"),
        ("{epsilon: 8, delta: 0.1, metric: exact}", "there is no key 'privacy.metric' (did you mean 'metrics'?)"),
        ("{epsilon: 8, delta: 0.1, metrics: noised}", "privacy: metrics_epsilon says what a release"),
        ("{epsilon: 8, delta: 0.1, metrics_epsilon: 1}", "privacy: metrics_epsilon says what a release"),
        ("{epsilon: 8, delta: 0.1, epsilon_per_run: 9}", "privacy: epsilon_per_run 9 is above epsilon 8"),
        ("{epsilon: 8, delta: 0.1, epsilon_per_day: 9}", "privacy: epsilon_per_day 9 is above epsilon 8"),
    ],
)
def test_a_policy_that_can_not_be_is_refused_in_one_line(tmp_path, text, expected):
    path = site_yaml(tmp_path, text)
    with pytest.raises(DataError) as caught:
        load_site_config(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)
