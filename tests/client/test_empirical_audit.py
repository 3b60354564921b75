"""`audit --empirical`: the installed training passes, every broken one is found out, and the reader sees both."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from chainward_client import cli
from chainward_client.privacy_audit import one_run, sabotage, trial
from chainward_client.privacy_audit.checks import CHECKS, accounting_problem, mechanism_problems
from chainward_client.privacy_audit.sabotage import SABOTAGES
from chainward_client.privacy_audit.trial import attacked_epsilon, try_training
from chainward_client.private_training import PrivateTraining
from chainward_client.site_ledger import create_site_ledger, ledger_path
from chainward_shared.errors import PrivacyError
from chainward_shared.privacy.findings import Audit
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.policy import Terms
from chainward_shared.privacy.report import render_audit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tried():
    return try_training(1.0, 1e-5, "a test", canaries=400, sabotage=True)


def test_the_installed_training_passes_and_every_sabotage_is_found_out(tried):
    honest, *broken = tried.trials
    assert (honest.honest, honest.problems, honest.attack.problem) == (True, (), None)
    assert [one.name for one in broken] == [one.name for one in SABOTAGES]
    assert all(one.caught and not one.honest for one in broken)
    assert tried.problems == [] and tried.remarks == []


SAID = {
    "without noise": "times the specified standard deviation",
    "without clipping": "can move the sum of gradients",
    "with half the noise": r"0\.(49|50)\d times the specified standard deviation",
    "with one number as the noise of all weights": "times the specified|depend on one another",
    "with noise from a seed": "two trainings with one seed draw the same noise",
    "with noise from PyTorch's own generator": "two trainings with one seed draw the same noise",
    "without noise where nobody was sampled": "empty leaves the weights as they were",
    "with a sample of fixed size": "the number of patients in a step varies by 0.00",
    "with patients sampled twice as often": "more or less often than specified",
    "with each image counted as a patient": "a step holds two images of one patient",
    "with the sum divided by the sample's own size": "not divided by the expected batch",
    "that stops at an image without a loss": "it tells that the image is there",
    "that loses others with an image without a loss": "changes what the others add",
    "with teachers trained without privacy": "a privileged teacher that was trained without privacy is let in",
    "with an accountant that is reset each round": "10 rounds are accounted as epsilon 2.85; together they cost 7.05",
    "with sums without noise": "an attack on releases of sums guesses 400 of 400 coins",
    "with sums without bounds": "changes the sums by 39.6; at most 1 is accounted for",
    "with sums bounded for each image, not each patient": "changes the sums by 39.6; at most 1 is accounted for",
}


@pytest.mark.parametrize("broken", SABOTAGES, ids=lambda one: one.name)
def test_the_checks_name_what_is_broken(broken, tried):
    (found,) = (one.problems for one in tried.trials if one.name == broken.name)
    assert any(re.search(SAID[broken.name], problem) for problem in found), found


def test_each_check_fails_for_some_sabotage_or_is_held_by_those_of_test_private(tried):
    """The honest trial counts as many checks as there are; none of them is left out of `mechanism_problems`."""
    assert tried.checks == CHECKS == 15


def test_the_attack_sees_missing_noise_and_missing_clipping_and_not_what_it_can_not_see(tried):
    measured = {one.name: one.attack.measured for one in tried.trials if one.attack}
    assert list(measured) == ["as installed", *(one.name for one in SABOTAGES if one.attacked)]
    assert measured["without noise"] > 3 and measured["without clipping"] > 3
    assert measured["with noise from a seed"] < 1, "who does not know the seed sees honest noise: the checks must tell"


def test_a_teacher_that_slips_through_the_check_of_the_recipe_is_noticed(monkeypatch):
    monkeypatch.setattr(PrivateTraining, "check", lambda self, recipe, unlabelled: None)
    assert mechanism_problems() == ["a privileged teacher that was trained without privacy is let in"]


def test_an_accountant_that_forgets_is_noticed(monkeypatch):
    assert accounting_problem() == ""
    monkeypatch.setattr(Ledger, "records", sabotage.ForgetfulLedger.records)
    assert accounting_problem() == "10 rounds are accounted as epsilon 2.85; together they cost 7.05"


# --- what the audit makes of it ---


def test_a_training_that_betrays_too_much_is_a_violation(tried):
    without_noise = next(one for one in tried.trials if one.name == "without noise")
    bad = replace(tried, trials=(replace(without_noise, name="as installed", honest=True),))
    audit = Audit("ledger", "oak", (), ()).with_empirical(bad)
    assert audit.exit_code == 1
    assert any("guesses 200 of 200 coins" in finding.what for finding in audit.findings)
    assert {finding.where for finding in audit.findings} == {"private training, tried here"}


def test_a_sabotage_that_goes_unnoticed_is_a_violation(tried):
    honest = tried.trials[0]
    audit = Audit("ledger", "oak", (), ()).with_empirical(
        replace(tried, trials=(honest, replace(honest, name="without noise", honest=False)))
    )
    assert audit.exit_code == 1
    assert "training without noise was not found out" in audit.findings[0].what


def test_an_attack_that_could_not_have_failed_is_noted(tried):
    honest = replace(tried.trials[0], attack=replace(tried.trials[0].attack, claimed=8.0))
    audit = Audit("ledger", "oak", (), ()).with_empirical(replace(tried, trials=(honest,)))
    assert audit.exit_code == 0
    assert "no attack can show an epsilon above" in audit.findings[0].what


def test_json_and_page_tell_what_was_tried(tried):
    audit = Audit("ledger", "oak", (), ()).with_empirical(tried)
    content = json.loads(json.dumps(audit.to_json(), allow_nan=False))["empirical"]
    assert [one["caught"] for one in content["trials"]] == [False] + [True] * len(SABOTAGES)
    assert content["trials"][0]["attack"]["canaries"] == 400
    text = " ".join(re.sub(r"<[^>]*>", " ", render_audit(audit)).split())
    assert f"broken on purpose in {len(SABOTAGES)} ways" in text
    assert text.count("found out ") >= len(SABOTAGES) and "NOT found out" not in text


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (None, (1.0, 1e-5, "no policy is known: a default")),
        (Terms(epsilon=3, delta=1e-6), (3, 1e-6, "what the policy allows in its lifetime")),
        (Terms(epsilon=8, delta=1e-6, epsilon_per_run=2), (2, 1e-6, "what the policy allows for one run")),
        (Terms(epsilon=8, delta=1e-6), (4, 1e-6, "the policy allows 8 in its lifetime; above 4 attacks tell little")),
    ],
)
def test_the_attacked_epsilon_is_the_policys(terms, expected):
    assert attacked_epsilon(terms) == expected


def test_more_canaries_than_memory_is_meant_for_are_refused():
    with pytest.raises(PrivacyError, match="20001 canaries are more than 20000"):
        try_training(1.0, 1e-5, "a test", canaries=20_001)


# --- the command ---


@pytest.fixture
def typed(monkeypatch, capsys):
    def type_(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["chainward-site", *map(str, words)])
        monkeypatch.setattr("chainward_client.cli.console", cli.PlainConsole(width=200))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return type_


@pytest.fixture
def site_yaml(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(f"site: oak\ndata: data.yaml\nstate: {tmp_path / 'state'}\nprivacy: {{epsilon: 2, delta: 1e-6}}\n")
    create_site_ledger(tmp_path / "state", "oak")
    return path


def test_the_command_tries_the_training_and_says_so_everywhere(site_yaml, typed, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "SABOTAGES", SABOTAGES[1:3])
    code, out, err = typed("audit", site_yaml, "--empirical", "--canaries", 400, "--html", tmp_path / "audit.html")
    assert code == 0
    assert "as installed" in out and "ledger oak: fine" in out
    assert "at epsilon 2, delta 1e-06 (what the policy allows in its lifetime)" in err
    assert "The program, tried by attack" in (tmp_path / "audit.html").read_text()
    code, out, _ = typed("audit", site_yaml, "--empirical", "--canaries", 400, "--sabotage", "--epsilon", 1, "--json")
    content = json.loads(out)["empirical"]
    assert (code, content["source"], len(content["trials"])) == (0, "as asked", 3)


def test_a_bare_ledger_is_tried_at_a_default_that_is_said(site_yaml, typed, tmp_path):
    code, _, err = typed("audit", ledger_path(tmp_path / "state"), "--empirical", "--canaries", 400)
    assert code == 0
    assert "at epsilon 1, delta 1e-05 (no policy is known: a default)" in err


def test_the_command_ends_with_1_where_the_installed_training_is_broken(site_yaml, typed, monkeypatch):
    monkeypatch.setattr(trial, "audit_training", lambda dp_sgd, **how: one_run.audit_training(dp_sgd, **how | BROKEN))
    code, out, _ = typed("audit", site_yaml, "--empirical", "--canaries", 400)
    assert code == 1
    assert "violation: private training, tried here: an attack on the trained model guesses 200 of 200" in out


BROKEN = {"training": sabotage.without_noise}


@pytest.mark.parametrize("option", [["--sabotage"], ["--epsilon", "1"], ["--canaries", "400"]])
def test_options_of_the_trial_without_it_are_refused(site_yaml, typed, option):
    code, out, err = typed("audit", site_yaml, *option)
    assert (code, out) == (2, "")
    assert "give --empirical too" in err
