"""A whole run over a loopback grid in which sites train privately: what is spent, signed, refused and withheld."""

from __future__ import annotations

import errno
import json
from functools import cache
from pathlib import Path

import pytest
import yaml
from whole_run import CHAIN_ONLY, whole_run

from chainward_client import private_site
from chainward_client.node import SHAREABLE
from chainward_client.policy import reserve
from chainward_client.private_training import PrivateTraining
from chainward_client.site_ledger import key_path, ledger_path
from chainward_server.report.page import write_report
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError, DataError, LedgerError, PolicyRefusal, StoreError
from chainward_shared.privacy import ledger_file as ledger_module
from chainward_shared.privacy.accounting import epsilons, spent
from chainward_shared.privacy.audit import audit_ledger, audit_statements
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.signing import load_public_key, public_key_path
from chainward_shared.protocol import (
    EvaluateResult,
    EvaluateTask,
    LinkResult,
    LinkTask,
    StudentTask,
    kind_of,
    pack,
    unpack,
)
from chainward_shared.weights import digest, load_file

SITES = ["ash", "birch", "cedar", "dogwood"]
PRIVATE = {
    "privacy.mode": "dp-sgd",
    "privacy.epsilon": 8.0,
    "privacy.delta": 1e-3,
    "privacy.batch-size": 64,  # every patient in every step: accounting for samples would take most of the time
    "chain.epochs": 1,
    "student.rounds": 1,
    "student.finetune-rounds": 0,
}
WITHHOLDING = {"privacy.simulated-metrics": "withhold"}
TWO = ["ash", "birch"]
ALL_KINDS = PRIVATE | {
    "federation.sites": ",".join(TWO),
    "chain.head": "statistics",
    "privacy.split": 0.6,
    "student.head": "statistics",
    "privacy.simulated-metrics": "noised",
}
"""Links, students, a head of the start, of the chain and of the student, and noised scores."""
POLICY = RunConfig.from_flat(ALL_KINDS).privacy.simulated_policy("ash")
KINDS = ("gaussian", "dp-sgd", "laplace")
ONE_PRIVATE = PRIVATE | CHAIN_ONLY | {"privacy.mode": "by-policy", "privacy.simulated-sites": "birch"}


@pytest.fixture
def private(settings):
    """Settings of a private run that takes seconds."""
    return settings | PRIVATE


@pytest.fixture
def one_private(settings):
    """The same with one private site among others, and without students."""
    return settings | ONE_PRIVATE


@pytest.fixture
def two_sites(one_private):
    """The same with the private site and one before it that is not."""
    return one_private | {"federation.sites": "ash,birch"}


@pytest.fixture(scope="module")
def undisturbed(small_consortium, tmp_path_factory, coordinated):
    """Runs of such settings for all tests, which only read what they leave: private everywhere, at one site, withholding."""

    @cache
    def run(name):
        settings = {
            "private": PRIVATE,
            "one": ONE_PRIVATE,
            "withholding": PRIVATE | WITHHOLDING,
            "all kinds": ALL_KINDS,
        }
        changes = settings[name]
        return coordinated(whole_run(small_consortium, tmp_path_factory.mktemp(name)) | changes)

    return run


def record_of(folder: RunFolder) -> dict:
    return json.loads((folder.path / "privacy.json").read_text())


def ledger_of(folder: RunFolder, site: str) -> Ledger:
    state = folder.path / "simulated-sites" / site
    return Ledger.open(ledger_path(state), load_public_key(public_key_path(key_path(state))), site)


def asks(message, kind, site=None):
    """Whether a message is a task of this kind, for this site if one is named."""
    if kind_of(message.content) != kind.KIND:
        return False
    task, _ = unpack(message.content, kind)
    return site is None or (task.simulated is not None and SITES[task.simulated.index] == site)


# -- what is spent, and what is said of it


@pytest.mark.slow
def test_every_site_spends_what_the_run_asks_for_and_no_more_and_signs_it(undisturbed):
    folder, results = undisturbed("private")
    record = record_of(folder)
    assert record["mode"] == "dp-sgd"
    for site in SITES:
        assert 7.9 < record["sites"][site]["epsilon"] <= 8.0
        spent = [(one.reserved.phase, one.end.state) for one in ledger_of(folder, site).spendings()]
        assert spent == [("link", "committed"), ("student", "committed")]
    audit = audit_statements(folder.state.run_id, record["statements"], SITES)
    assert audit.exit_code == 0
    assert all(link.training.privacy is not None and link.training.loss == [] for link in results.links)


@pytest.mark.slow
def test_the_sites_own_audit_agrees_with_what_the_coordinator_was_told(undisturbed):
    folder, _ = undisturbed("private")
    told = record_of(folder)["statements"]
    for site in SITES:
        state = folder.path / "simulated-sites" / site
        key = load_public_key(public_key_path(key_path(state)))
        terms = RunConfig.from_flat(PRIVATE).privacy.simulated_policy(site).terms
        assert audit_ledger(ledger_path(state), key, site, terms=terms, told=told).exit_code == 0


@pytest.mark.slow
def test_links_students_three_heads_and_scores_together_are_what_the_run_promised_and_each_is_on_the_ledger(
    undisturbed,
):
    folder, results = undisturbed("all kinds")
    record, delta = record_of(folder), ALL_KINDS["privacy.delta"]
    assert [(head.key, head.sites) for head in results.heads] == [
        (key, TWO) for key in ("head-start", "head", "head-student")
    ]
    for site in TWO:
        spendings = ledger_of(folder, site).spendings()
        assert all(one.end.state == "committed" and one.counted == one.reserved.mechanism for one in spendings)
        work = [(one.reserved.phase, one.reserved.hop) for one in spendings if one.reserved.phase != "scores"]
        assert [hop for phase, hop in work if phase == "statistics"] == [
            f"{head}{release}" for head in ("head-start", "head", "head-student") for release in ("-centre", "")
        ]
        assert [phase for phase, _ in work if phase != "statistics"] == ["link", "student"]
        by_kind = {kind: [one.counted for one in spendings if one.counted.kind == kind] for kind in KINDS}
        assert 1 <= len(by_kind["laplace"]) <= 4
        scores = spent([POLICY.metrics_mechanism(4)], delta)
        statistics = [POLICY.metrics_mechanism(4), *by_kind["gaussian"]]
        split = scores + ALL_KINDS["privacy.split"] * (8.0 - scores)
        assert 0.995 * split < spent(statistics, delta) <= split
        assert 7.9 < spent([*statistics, *by_kind["dp-sgd"]], delta) <= 8.0
        assert record["sites"][site]["epsilon"] == pytest.approx(
            spent([one.counted for one in spendings], delta), rel=1e-6
        )
        found = epsilons(by_kind["gaussian"], delta)
        assert found.problem is None, "three accountants agree on the releases"


@pytest.mark.slow
def test_both_audits_agree_with_a_run_of_all_kinds_of_private_work(undisturbed):
    folder, _ = undisturbed("all kinds")
    told = record_of(folder)["statements"]
    assert audit_statements(folder.state.run_id, told, TWO).exit_code == 0
    assert all(one["epsilon_run"] <= 8.0 for one in told)
    for site in TWO:
        state = folder.path / "simulated-sites" / site
        key = load_public_key(public_key_path(key_path(state)))
        terms = RunConfig.from_flat(ALL_KINDS).privacy.simulated_policy(site).terms
        assert audit_ledger(ledger_path(state), key, site, terms=terms, told=told).exit_code == 0


def test_a_private_site_is_not_trained_alone_for_that_would_cost_it_too(private, coordinated):
    _, results = coordinated(private | {"privacy.mode": "by-policy", "privacy.simulated-sites": "ash,birch"})
    assert [record.site for record in results.alone] == ["cedar", "dogwood"]


@pytest.mark.slow
def test_some_sites_are_private_and_others_not_in_one_chain(undisturbed):
    folder, results = undisturbed("one")
    assert [link.training.privacy is not None for link in results.links] == [False, True, False, False]
    record = record_of(folder)
    assert record["mode"] == "dp-sgd at some sites"
    assert {site: facts["mode"] for site, facts in record["sites"].items()} == {
        "ash": "off",
        "birch": "dp-sgd",
        "cedar": "off",
        "dogwood": "off",
    }
    page = (folder.path / "report.html").read_text()
    assert "ash, cedar and dogwood: these hospitals trained without differential privacy" in page


@pytest.mark.slow
def test_class_balance_by_private_counts_is_switched_off_and_the_report_says_so(undisturbed):
    folder, results = undisturbed("one")
    assert "counts of this site&#39;s labels are private" in (folder.path / "report.html").read_text()
    assert [len(link.training.notes) for link in results.links] == [0, 1, 0, 0]


def test_two_private_runs_with_one_seed_yield_two_models(two_sites, coordinated):
    folders = [coordinated(two_sites)[0] for _ in range(2)]

    def digests(link):
        return {digest(load_file(folder.model_path(link))[0]) for folder in folders}

    assert len(digests("strand-0-lap-0-step-0")) == 1, "without noise, the same"
    assert len(digests("strand-0-lap-0-step-1")) == 2


def test_a_strand_that_comes_back_composes_with_its_first_visit(two_sites, coordinated):
    folder, _ = coordinated(two_sites | {"chain.laps": 2})
    hops = [one.reserved.hop for one in ledger_of(folder, "birch").spendings()]
    assert hops == ["strand-0-lap-0-step-1", "strand-0-lap-1-step-1"]
    assert 7.9 < record_of(folder)["sites"]["birch"]["epsilon"] <= 8.0


def test_images_without_labels_and_all_teachers_of_a_link_stay_within_the_same_epsilon(two_sites, coordinated):
    folder, results = coordinated(
        two_sites
        | {
            "privacy.batch-size": 16,
            "chain.label-fraction": 0.5,
            "chain.unlabelled-weight": 1.0,
            "chain.attention-weight": 1.0,
            "chain.epochs": 2,
        }
    )
    plan = results.links[1].training.privacy
    assert plan.sample_rate == 16 / 20, "of all patients, with and without labels"
    assert 7.9 < record_of(folder)["sites"]["birch"]["epsilon"] <= 8.0


# -- weights and counts


@pytest.mark.slow
def test_a_private_site_weighs_by_the_patients_that_it_declares_and_by_no_exact_number(undisturbed):
    _, results = undisturbed("withholding")
    declared = [site.train for site in results.data.sites]
    assert declared == [20, 20, 20, 25]  # rounded down to a digit and a half, of 24, 24, 24 and 27
    shares = [results.student_rounds[0].influence[site.site].share for site in results.data.sites]
    assert shares == pytest.approx([units / sum(declared) for units in declared])


# -- scores


@pytest.mark.slow
def test_scores_are_withheld_where_the_policies_say_so_and_the_run_ends_well(undisturbed):
    folder, results = undisturbed("withholding")
    assert results.final["chain"].sites == {}
    assert results.final["chain"].pooled.n == 0
    assert next((site.train, site.test, site.class_counts) for site in results.data.sites) == (20, None, {})
    page = (folder.path / "report.html").read_text()
    assert "withhold all scores" in page


def test_noised_scores_are_charged_and_hold_nothing_but_a_noisy_confusion_matrix(one_private, coordinated, loopback):
    released = []

    def watch(message, answer):
        reply = answer()
        if asks(message, EvaluateTask, "birch"):
            released.append(unpack(reply.content, EvaluateResult))
        return reply

    # full: of a link of two steps half precision may leave nothing, and a model that was scored before costs nothing
    noised_scores = {
        "privacy.simulated-metrics": "noised",
        "federation.transfer": "full",
    }
    folder, results = coordinated(one_private | noised_scores, loopback(2, watch))
    noised = [(body, arrays) for body, arrays in released if body.release == "noised"]
    charged = [one for one in ledger_of(folder, "birch").spendings() if one.reserved.phase == "scores"]
    assert len(noised) == len(charged) == 4, "one for each link"
    for body, arrays in noised:
        assert all(scores.macro_auc is None and scores.ece is None for scores in body.scores.values())
        assert all((arrays[name]["histograms"].numpy() == 0).all() for name in arrays)
    record = record_of(folder)
    assert audit_statements(folder.state.run_id, record["statements"], SITES).exit_code == 0
    assert 7.5 < record["sites"]["birch"]["epsilon"] <= 8.0, "trainings and scores together are what the run asked for"
    assert results.final["chain"].sites["birch"].macro_auc is None


def test_scores_that_the_budget_does_not_hold_any_more_are_withheld(one_private, coordinated):
    """Without the training, which is refused for lack of budget, some of the scores fit."""
    few = {"privacy.simulated-metrics": "noised", "privacy.simulated-budget": "1.2", "federation.transfer": "full"}
    folder, results = coordinated(one_private | few)
    assert 1 <= sum("birch" in link.metrics.test.sites for link in results.links if link.metrics) <= 2
    charged = ledger_of(folder, "birch").spendings()
    assert {one.reserved.phase for one in charged} == {"scores"}


# -- budgets and refusals


def test_a_site_out_of_budget_refuses_is_skipped_and_reported_and_the_run_ends_well(private, coordinated):
    folder, results = coordinated(private | {"privacy.simulated-budget": "8, cedar=0.5"})
    status = {link.site: link.status for link in results.links}
    assert status == {"ash": "done", "birch": "done", "cedar": "refused", "dogwood": "done"}
    reason = next(link.reason for link in results.links if link.site == "cedar")
    assert "over budget: epsilon 7.99" in reason
    assert "0 of 0.5 spent in the site's lifetime, 0.5 left" in reason
    assert "The longest training that fits" in reason or "Not one step" in reason
    assert next(link.attempts for link in results.links if link.site == "cedar") == 1, "a policy is not asked twice"
    assert list(results.student_rounds[0].failed) == ["cedar"]
    assert ledger_of(folder, "cedar").spendings() == []
    record = record_of(folder)
    assert record["sites"]["cedar"]["mode"] == "no model"
    assert "No model came from cedar." in record["statement"]
    assert folder.state.status == "finished"


def test_a_run_without_privacy_is_refused_where_the_policy_requires_it(two_sites, coordinated, loopback):
    policy = RunConfig.from_flat(two_sites).privacy.simulated_policy("birch")

    def require(message, answer):
        """Give birch its policy although the run is not private."""
        if asks(message, LinkTask, "birch"):
            task, arrays = unpack(message.content, LinkTask)
            simulated = task.simulated.model_copy(update={"policy": policy})
            message.content = pack(task.model_copy(update={"simulated": simulated}), arrays)
        return answer()

    plain = {key: value for key, value in two_sites.items() if not key.startswith("privacy.")}
    _, results = coordinated(plain, loopback(2, require))
    refused = next(link for link in results.links if link.site == "birch")
    assert refused.status == "refused"
    assert "requires differential privacy and the run has none" in refused.reason


def test_a_run_that_is_private_everywhere_is_refused_where_there_is_no_policy(private, coordinated):
    _, results = coordinated(private | {"privacy.simulated-sites": "ash,birch,cedar", "student.rounds": 0})
    refused = next(link for link in results.links if link.site == "dogwood")
    assert refused.status == "refused"
    assert "site.yaml lacks the 'privacy' block" in refused.reason


def test_a_delta_above_one_over_the_patients_is_refused_before_anything_is_spent(private, coordinated):
    with pytest.raises(ChainwardError, match=r"no link of the chain succeeded: .*delta 0\.2 is not below"):
        coordinated(private | {"privacy.delta": 0.2})


def test_a_backbone_with_batch_norm_is_refused_at_the_start_with_one_that_can(private, coordinated):
    with pytest.raises(ChainwardError, match=r"'test_resnet' can't be trained privately: .*; use a backbone that can"):
        coordinated(private | {"chain.backbone": "test_resnet", "student.rounds": 0})


def test_nothing_is_trained_while_the_ledger_cant_be_written(two_sites, coordinated, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def reserve_on_a_full_disk(*args, **kwargs):
        monkeypatch.setattr(ledger_module.os, "fsync", full)
        try:
            return reserve(*args, **kwargs)
        finally:
            monkeypatch.undo()

    trained = []
    monkeypatch.setattr(private_site, "reserve", reserve_on_a_full_disk)
    monkeypatch.setattr(PrivateTraining, "start", lambda self, *args: trained.append(self))
    _, results = coordinated(two_sites | {"chain.retries": 0})
    assert results.links[1].status == "refused"
    assert (
        "the privacy ledger can't be written (No space left on device); nothing is trained" in results.links[1].reason
    )
    assert trained == []


def test_patients_that_cant_be_told_apart_are_refused_and_images_are_not(
    two_sites, coordinated, small_consortium, tmp_path
):
    data = yaml.safe_load(small_consortium.read_text())
    del data["columns"]["patient"]
    data |= {name: str(small_consortium.parent / data[name]) for name in ("manifest", "images")}
    path = tmp_path / "without.yaml"
    path.write_text(yaml.safe_dump(data))
    _, results = coordinated(two_sites | {"data.source": str(path)})
    assert "the data have no patient ids" in results.links[1].reason
    _, results = coordinated(two_sites | {"data.source": str(path), "privacy.unit": "image"})
    assert results.links[1].status == "done"


# -- retries, repeats and crashes


def test_a_repeated_request_is_answered_from_the_store_and_costs_nothing(two_sites, coordinated, loopback):
    answers = []

    def lose_the_first(message, answer):
        reply = answer()
        if asks(message, LinkTask, "birch"):
            answers.append(unpack(reply.content, LinkResult)[0])
            return None if len(answers) == 1 else reply
        return reply

    folder, results = coordinated(two_sites | {"federation.hop-deadline": 3.0}, loopback(2, lose_the_first))
    assert [link.status for link in results.links] == ["done", "retried"]
    assert answers[0].digest == answers[1].digest
    assert len(ledger_of(folder, "birch").spendings()) == 1


def test_a_training_that_fails_halfway_stays_spent_and_its_retry_is_refused_beyond_the_run(
    two_sites, coordinated, monkeypatch
):
    steps = []
    real = PrivateTraining.finish_step

    def fail_once(self):
        steps.append(1)
        if len(steps) == 2:
            raise RuntimeError("the power failed")
        real(self)

    monkeypatch.setattr(PrivateTraining, "finish_step", fail_once)
    folder, results = coordinated(two_sites | {"chain.epochs": 4})
    birch = next(link for link in results.links if link.site == "birch")
    assert birch.status == "refused"
    assert "over what the run asks for" in birch.reason
    (failed,) = ledger_of(folder, "birch").spendings()
    assert failed.counted == failed.reserved.mechanism, "charged in full, whenever it failed"


def test_a_site_that_drops_in_a_private_round_is_left_out_of_the_average(private, coordinated, loopback):
    def drop(message, answer):
        return None if asks(message, StudentTask, "cedar") else answer()

    folder, results = coordinated(private | {"federation.hop-deadline": 1.0}, loopback(2, drop))
    assert results.student_rounds[0].sites == ["ash", "birch", "dogwood"]
    assert folder.state.status == "incomplete"
    assert "cedar" not in results.student_rounds[0].sites and results.student_rounds[0].unreached == ["cedar"]


# -- statements that can't be right


def forged(change):
    def interfere(message, answer):
        reply = answer()
        if asks(message, LinkTask, "birch"):
            body, arrays = unpack(reply.content, LinkResult)
            reply.content = pack(body.model_copy(update={"statement": change(body.statement)}), arrays)
        return reply

    return interfere


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda statement: None, "sent no privacy statement"),
        (lambda statement: statement.model_copy(update={"epsilon_run": 0.1}), "does not match its signature"),
        (lambda statement: statement.model_copy(update={"hop": "another"}), "was made for 'another'"),
        (lambda statement: statement.model_copy(update={"run": "another"}), "is about run 'another'"),
        (lambda statement: statement.model_copy(update={"site": "ash"}), "came from site 'birch'"),
    ],
)
def test_a_model_without_a_right_statement_is_not_used(two_sites, coordinated, loopback, change, words):
    _, results = coordinated(two_sites, loopback(2, forged(change)))
    birch = next(link for link in results.links if link.site == "birch")
    assert birch.status == "skipped"
    assert words in birch.reason


def test_a_ledger_that_was_put_back_is_noticed_by_what_the_coordinator_has_seen(two_sites, coordinated, loopback):
    """birch's ledger, head and all, is replaced by an older copy between its two links."""
    kept = {}

    def put_back(message, answer):
        if asks(message, LinkTask):
            task, _ = unpack(message.content, LinkTask)
            folder = Path(task.simulated.state_dir) / "birch" / "privacy"
            if (task.simulated.index, task.lap) == (0, 0):
                kept.update({path: path.read_bytes() for path in folder.glob("ledger.jsonl*") if path.is_file()})
            if (task.simulated.index, task.lap) == (1, 1):
                for path, content in kept.items():
                    path.write_bytes(content)
        return answer()

    _, results = coordinated(two_sites | {"chain.laps": 2}, loopback(2, put_back))
    second = next(link for link in results.links if link.site == "birch" and link.lap == 1)
    assert second.status == "refused"
    assert "an older copy was put back" in second.reason


def test_statements_survive_a_coordinator_that_stops_and_goes_on(one_private, coordinated, loopback):
    one_private |= {"federation.sites": "ash,birch,dogwood"}
    calls = []

    def stop(message, answer):
        if asks(message, LinkTask, "dogwood"):
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
        return answer()

    with pytest.raises(KeyboardInterrupt):
        coordinated(one_private, loopback(2, stop))
    (path,) = Path(one_private["output.dir"]).iterdir()
    folder, _ = coordinated(one_private | {"output.resume": path.name}, loopback(2))
    statements = record_of(folder)["statements"]
    assert [statement["hop"] for statement in statements] == ["strand-0-lap-0-step-1"]


# -- deployed sites


def test_what_is_private_about_a_ledger_stays_in_the_sites_own_log():
    assert issubclass(PolicyRefusal, SHAREABLE)
    assert not any(issubclass(kind, SHAREABLE) for kind in (LedgerError, DataError, StoreError))


@pytest.mark.slow
def test_the_report_is_made_again_from_the_files_alone(undisturbed):
    folder, _ = undisturbed("one")
    before = (folder.path / "report.html").read_text()
    write_report(RunFolder.open(folder.path))
    assert (folder.path / "report.html").read_text() == before
