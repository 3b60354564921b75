"""Statistics rounds in whole runs: the head is that of all images in one place, whichever way the sites are reached."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process_run import equal, run_in_process

from chainward_client.training.passes import BATCH
from chainward_server import chain as chain_module
from chainward_server.chain import run_chain
from chainward_server.heads import FURTHEST
from chainward_server.method import run_method
from chainward_server.report.page import write_report
from chainward_server.sites import Failure, Work
from chainward_shared.config import RunConfig
from chainward_shared.discriminant import HeadSums, class_weights, discriminant
from chainward_shared.errors import ChainwardError
from chainward_shared.hops import START_HEAD, STUDENT_HEAD, student_key
from chainward_shared.models import build_model, skeleton
from chainward_shared.models.of_run import student_architecture
from chainward_shared.preprocessing import resized, scaled_for
from chainward_shared.privacy.accounting import spent
from chainward_shared.privacy.audit import audit_statements
from chainward_shared.privacy.record import read_privacy_record
from chainward_shared.protocol import StatisticsTask, kind_of
from chainward_simulations import in_process_sites
from chainward_simulations.in_process_sites import InProcessSites
from chainward_simulations.runner import in_process, open_sites


@pytest.fixture
def refitted(settings):
    return settings | {
        "chain.head": "statistics",
        "chain.epochs": 1,
        "chain.compare-alone": False,
        "student.rounds": 0,
        "federation.transfer": "full",
    }


def trained(flat, **changes):
    """Run the chain of `flat` in this process and return the run and what came of it."""
    config = RunConfig.from_flat(flat | changes)
    with in_process(config, open_sites(config)) as (run, _):
        outcome = run_chain(run)
    return run, outcome


def pooled_head(run, state, sites, strength=1.0, architecture=None):
    """Return the head of the images of `sites`, laid together, embedded one by one."""
    model = build_model(architecture or run.architecture).eval()
    model.load_state_dict(state)
    seen = []
    model.get_classifier().register_forward_pre_hook(lambda _, given: seen.append(given[0].double()))

    counts = np.sum([card.class_counts["train"] for card in run.sites.cards.values()], axis=0)
    weights = class_weights(counts, strength)

    def sums(split):
        images = torch.cat([site.splits[split].images for site in sites])
        labels = torch.cat([site.splits[split].labels for site in sites])
        seen.clear()
        with torch.no_grad():
            for batch in images.split(BATCH):
                model(scaled_for(model, resized(batch, architecture.image_size if architecture else batch.shape[-1])))
        return HeadSums.of(torch.cat(seen), labels, run.architecture.num_classes, weights if split == "train" else None)

    return discriminant(sums("train"), sums("val"), prior_strength=strength)


def head_of(state):
    (weight,) = (name for name in state if name.endswith("head.fc.weight") or name == "head.weight")
    return state[weight].numpy(), state[weight.replace("weight", "bias")].numpy()


def same_head(state, head):
    weight, bias = head_of(state)
    return np.allclose(weight.reshape(head.weight.shape), head.weight, rtol=2e-4, atol=1e-5) and np.allclose(
        bias, head.bias, rtol=2e-4, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"chain.strands": 2}, {"chain.strands": 2, "chain.merge": "average"}])
def test_a_chain_begins_and_ends_with_the_head_of_all_images_in_one_place(refitted, changes):
    run, outcome = trained(refitted, **changes)
    sites = list(run.sites.data.values())
    start = run.checkpoints.load_model(START_HEAD, run.template)
    assert same_head(start, pooled_head(run, run.initial(), sites))
    assert same_head(outcome.model, pooled_head(run, outcome.model, sites))
    trunk = {name for name in start if not name.startswith("head.fc")}
    assert all(torch.equal(start[name], run.initial()[name]) for name in trunk)
    first = run.results.links[0]
    assert first.predecessor is None
    assert first.training.teacher_trust, "already the first link has a teacher"


@pytest.mark.slow
def test_heads_are_computed_at_both_ends_of_the_chain_whatever_its_laps_and_strands(refitted):
    run, _ = trained(refitted, **{"chain.laps": 2, "chain.strands": 2})
    assert [head.key for head in run.results.heads] == ["head-start", "head"]


@pytest.mark.slow
def test_after_every_link_the_next_one_starts_from_a_new_head_where_that_is_asked(refitted, monkeypatch):
    seen = []
    links = InProcessSites.train_links

    def watched(self, work):
        seen.extend(one.models["predecessor"] for one in work.values())
        return links(self, work)

    monkeypatch.setattr(InProcessSites, "train_links", watched)
    run, outcome = trained(refitted, **{"chain.refit": "links"})
    names = ["head-start", *(f"head-{link.key}" for link in run.results.links)]
    assert [head.key for head in run.results.heads] == names, "no further round at the end"
    models = [run.checkpoints.load_model(name, run.template) for name in names]
    assert all(equal(*pair) for pair in zip(seen, models[:-1], strict=True))
    assert equal(outcome.model, models[-1])
    assert same_head(outcome.model, pooled_head(run, outcome.model, list(run.sites.data.values())))
    assert run.results.released is None


@pytest.mark.slow
def test_only_the_start_has_a_head_from_statistics_where_that_is_asked(refitted):
    run, outcome = trained(refitted, **{"chain.refit": "no"})
    assert [head.key for head in run.results.heads] == ["head-start"]
    assert equal(outcome.model, run.checkpoints.load_model(run.results.links[-1].key, run.template))


def test_a_resumed_run_goes_on_from_the_head_after_its_last_link(refitted, coordinated, loopback):
    flat = refitted | {"chain.refit": "links", "federation.transfer": "half"}
    config = RunConfig.from_flat(flat)
    left = [3]

    def stopped(message, answer):
        if kind_of(message.content) == "link-task":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return answer()

    with pytest.raises(KeyboardInterrupt):
        coordinated(flat, loopback(2, stopped))
    (path,) = [path for path in Path(flat["output.dir"]).iterdir() if (path / "run.json").exists()]
    folder, _ = coordinated(flat | {"output.resume": path.name}, loopback(2))
    outcome = run_in_process(config, open_sites(config))
    assert equal(folder.load_model("chain", skeleton(outcome.architecture).state_dict()), outcome.chain)


@pytest.mark.slow
@pytest.mark.parametrize(("balance", "strength"), [("site-prior", 0.3), ("none", 0.0), ("weighted", 1.0)])
def test_the_priors_of_the_head_are_those_that_the_links_are_trained_to(refitted, balance, strength):
    given = {"chain.class-balance": balance} | ({"chain.prior-strength": 0.3} if balance == "site-prior" else {})
    run, outcome = trained(refitted, **given)
    assert same_head(outcome.model, pooled_head(run, outcome.model, list(run.sites.data.values()), strength))
    other = pooled_head(run, outcome.model, list(run.sites.data.values()), 0.7)
    assert not same_head(outcome.model, other)


@pytest.mark.slow
def test_a_site_that_does_not_answer_is_left_out_and_said_to_be(refitted, monkeypatch):
    statistics = InProcessSites.statistics

    def lost(self, work):
        for site, answer in statistics(self, work):
            yield site, Failure(f"site '{site}' is gone", 0.0, lost=True) if site == "birch" else answer

    monkeypatch.setattr(InProcessSites, "statistics", lost)
    run, outcome = trained(refitted)
    rest = [data for site, data in run.sites.data.items() if site != "birch"]
    assert same_head(outcome.model, pooled_head(run, outcome.model, rest))
    assert not same_head(outcome.model, pooled_head(run, outcome.model, list(run.sites.data.values())))
    last = run.results.heads[-1]
    assert (last.sites, last.unreached) == (["ash", "cedar", "dogwood"], ["birch"])
    assert last.images == sum(len(data.splits["train"]) for data in rest)


@pytest.mark.slow
def test_a_site_with_three_images_declines_in_words_and_the_round_goes_on(refitted):
    config = RunConfig.from_flat(refitted)
    sites = open_sites(config)
    few = sites["cedar"]
    sites["cedar"] = replace(few, splits=few.splits | {"train": few.splits["train"].take(np.arange(3))})
    with in_process(config, sites) as (run, _):
        run_chain(run)
    assert all("too few labelled training images" in head.failed["cedar"] for head in run.results.heads)
    assert "limits.statistics_images" in run.results.heads[0].failed["cedar"]


def test_where_no_site_takes_part_the_run_stops_and_says_so(refitted, monkeypatch):
    monkeypatch.setattr(
        InProcessSites, "statistics", lambda self, work: ((site, Failure("no", 0.0, final=True)) for site in work)
    )
    with pytest.raises(ChainwardError, match="no site took part"):
        trained(refitted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda sums: sums["train.images"].add_(1), "sums go over"),
        (lambda sums: sums["train.counts"].mul_(0), "don't come to"),
        (lambda sums: sums["train.counts"].add_(100), "counts that are none|of class"),
        (lambda sums: sums["train.sums"].add_(5), "don't come to"),
        (lambda sums: sums["train.moments"].mul_(0), "no .* images of 'train' have such"),
        (lambda sums: sums["val.moments"].neg_(), "no .* images of 'val' have such"),
        (lambda sums: sums["train.total"].mul_(1e3), "don't come to|such sums"),
    ],
)
def test_sums_that_no_images_have_are_refused(refitted, monkeypatch, damage, complaint):
    sums_of = in_process_sites.sums_of

    def damaged(task, data, *rest):
        result, sums = sums_of(task, data, *rest)
        if data.site == "ash":
            damage(sums)
            result = result.model_copy(update={"digest": in_process_sites.digest(sums)})
        return result, sums

    monkeypatch.setattr(in_process_sites, "sums_of", damaged)
    run, _ = trained(refitted, **{"chain.laps": 0})
    failed = run.results.heads[0].failed
    assert set(failed) == {"ash"}
    assert re.search(complaint, failed["ash"]), failed["ash"]


@pytest.mark.slow
def test_a_site_whose_embeddings_are_far_longer_than_all_others_does_not_decide_the_covariance(refitted, monkeypatch):
    sums_of = in_process_sites.sums_of

    def scaled(task, data, *rest):
        result, sums = sums_of(task, data, *rest)
        if data.site == "ash":
            factor = 3 * FURTHEST
            sums = {
                name: tensor * (factor**2 if "moments" in name else factor if "sums" in name or "total" in name else 1)
                for name, tensor in sums.items()
            }
            result = result.model_copy(update={"digest": in_process_sites.digest(sums)})
        return result, sums

    monkeypatch.setattr(in_process_sites, "sums_of", scaled)
    run, outcome = trained(refitted)
    assert "times as long as" in run.results.heads[-1].failed["ash"]
    rest = [data for site, data in run.sites.data.items() if site != "ash"]
    assert same_head(outcome.model, pooled_head(run, outcome.model, rest))


@pytest.mark.slow
def test_a_student_ends_with_the_head_of_all_images_in_one_place_over_its_own_features(refitted):
    given = {"chain.head": "trained", "student.rounds": 1, "student.finetune-rounds": 0, "student.epochs": 1}
    config = RunConfig.from_flat(refitted | given | {"student.head": "statistics", "student.image-size": 48})
    with in_process(config, open_sites(config)) as (run, _):
        student = run_method(run).student
    small = student_architecture(config.student, run.architecture)
    sites = list(run.sites.data.values())
    assert same_head(student, pooled_head(run, student, sites, architecture=small))
    trained_to = run.checkpoints.load_model(student_key(1), skeleton(small).state_dict())
    trunk = [name for name in student if not name.startswith("head.fc")]
    assert all(torch.equal(student[name], trained_to[name]) for name in trunk), "only the head is another one"
    assert not np.array_equal(head_of(student)[0], head_of(trained_to)[0])
    assert [head.key for head in run.results.heads] == [STUDENT_HEAD]
    assert run.results.released is None, "it is no model along the chain"


@pytest.mark.parametrize("changes", [{}, {"chain.laps": 2, "student.rounds": 1, "student.head": "statistics"}])
def test_over_flower_the_models_are_those_of_one_process(refitted, coordinated, loopback, changes):
    flat = refitted | {"federation.transfer": "half"} | changes
    grid = loopback(2)
    folder, results = coordinated(flat, grid)
    outcome = run_in_process(RunConfig.from_flat(flat), open_sites(RunConfig.from_flat(flat)))
    template = skeleton(outcome.architecture).state_dict()
    assert equal(folder.load_model("chain", template), outcome.chain)
    for key, state in outcome.links.items():
        assert equal(folder.load_model(key, template), state), key
    if outcome.student is not None:
        small = skeleton(outcome.student_architecture).state_dict()
        assert equal(folder.load_model("student", small), outcome.student)
    assert results.released == "head"
    assert all(head.bytes_up > 0 and head.metrics for head in results.heads)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Statistics rounds" in page and "head-start" in page
    assert json.loads((folder.path / "metrics.json").read_text())["heads"][0]["key"] == "head-start"


def test_a_resumed_run_takes_finished_statistics_rounds_as_they_are(refitted, coordinated, loopback, monkeypatch):
    asked = []

    class Counting(loopback):
        def push_messages(self, messages):
            messages = list(messages)
            asked.extend(
                message.metadata.message_type for message in messages if "statistics" in message.metadata.message_type
            )
            return super().push_messages(messages)

    def stop(run):
        raise ChainwardError("stopped here")

    merged = chain_module._merged
    monkeypatch.setattr(chain_module, "_merged", stop)
    with pytest.raises(ChainwardError, match="stopped here"):
        coordinated(refitted, Counting(2))
    assert len(asked) == 4
    monkeypatch.setattr(chain_module, "_merged", merged)
    (path,) = [path for path in Path(refitted["output.dir"]).iterdir() if (path / "run.json").exists()]
    folder, _ = coordinated(refitted | {"output.resume": path.name}, Counting(2))
    assert len(asked) == 8, "the round before the chain is not asked for again"
    outcome = run_in_process(RunConfig.from_flat(refitted), open_sites(RunConfig.from_flat(refitted)))
    assert equal(folder.load_model("chain", skeleton(outcome.architecture).state_dict()), outcome.chain)


def test_a_site_with_a_privacy_policy_declines_a_statistics_round(refitted):
    config = RunConfig.from_flat(refitted)
    policy = RunConfig.from_flat(
        refitted | {"chain.head": "trained", "privacy.mode": "dp-sgd"}
    ).privacy.simulated_policy("ash")
    sites = open_sites(config)
    with in_process(config, sites) as (run, here):
        here.private = {"ash": type("Private", (), {"policy": policy})()}
        task = StatisticsTask(
            run_id="r",
            hop="head",
            architecture=run.architecture,
            label_fraction=1.0,
            seed=0,
            threads=1,
            digest="0" * 64,
        )
        ((_, answer),) = here.statistics({"ash": Work(task, {"model": run.initial()})})
    assert isinstance(answer, Failure)
    assert answer.final and "without noise" in answer.reason


@pytest.mark.slow
def test_a_default_run_has_no_statistics_round(settings):
    config = RunConfig.from_flat(settings | {"student.rounds": 0, "chain.epochs": 1, "chain.compare-alone": False})
    with in_process(config, open_sites(config)) as (run, _):
        run_method(run)
    assert run.results.heads == [] and run.results.released is None


# --- private runs ---

PRIVATE = {"privacy.mode": "dp-sgd", "privacy.delta": 1e-4, "privacy.epsilon": 8.0, "chain.backbone": "test_vit"}
ONLY_STATISTICS = PRIVATE | {"chain.laps": 0, "chain.patch-size": 8}


def private_run(flat):
    """Return the run of `flat`, and what each private site's ledger holds after it."""
    config = RunConfig.from_flat(flat)
    with in_process(config, open_sites(config)) as (run, here):
        outcome = run_chain(run)
        ledgers = {site: private.ledger.mechanisms() for site, private in here.private.items()}
    return run, outcome, ledgers


@pytest.mark.slow
def test_a_private_run_without_links_spends_its_epsilon_on_one_round_of_two_releases(refitted):
    run, outcome, ledgers = private_run(refitted | ONLY_STATISTICS)
    assert run.results.links == []
    (record,) = run.results.heads
    assert (record.key, record.sites, run.results.released) == ("head", run.sites.ids, "head")
    for mechanisms in ledgers.values():
        assert [(one.kind, one.steps) for one in mechanisms] == [("gaussian", 1), ("gaussian", 1)]
        assert 7.95 < spent(mechanisms, 1e-4) <= 8.0
    weight, bias = head_of(outcome.model)
    assert np.isfinite(weight).all() and np.isfinite(bias).all() and np.abs(weight).max() > 0


@pytest.mark.slow
def test_links_and_statistics_of_a_private_run_stay_within_its_epsilon_together(refitted):
    flat = refitted | PRIVATE | {"chain.patch-size": 8, "privacy.split": 0.25}
    flat |= {"privacy.mode": "by-policy", "privacy.simulated-sites": "ash", "privacy.batch-size": 64}
    run, _, ledgers = private_run(flat)
    assert [head.key for head in run.results.heads] == ["head-start", "head"]
    for mechanisms in ledgers.values():
        statistics = [one for one in mechanisms if one.kind == "gaussian"]
        assert sum(one.steps for one in statistics) == 4
        assert 1.98 < spent(statistics, 1e-4) <= 2.0
        assert 7.9 < spent(mechanisms, 1e-4) <= 8.0


@pytest.mark.slow
def test_in_a_run_by_policy_only_sites_with_a_policy_add_noise(refitted, monkeypatch):
    noises, bounded = {}, in_process_sites.private_sums_of

    def watched(*arguments):
        result, sums = bounded(*arguments)
        noises.setdefault(result.site, set()).add(result.noise > 0)
        return result, sums

    monkeypatch.setattr(in_process_sites, "private_sums_of", watched)
    by_policy = {"privacy.mode": "by-policy", "privacy.simulated-sites": "ash"}
    run, _, ledgers = private_run(refitted | ONLY_STATISTICS | by_policy)
    assert set(ledgers) == {"ash"}
    assert noises == {"ash": {True}} | {site: {False} for site in run.sites.ids if site != "ash"}


@pytest.mark.slow
def test_a_release_that_can_not_be_true_or_is_not_paid_for_is_left_out(refitted, monkeypatch):
    bounded = in_process_sites.private_sums_of

    def wrong(*arguments):
        result, sums = bounded(*arguments)
        if result.site == "ash":
            result = result.model_copy(update={"noise": result.noise / 2})
        if result.site == "birch":
            sums = {"release": sums["release"] + 1e6}
            result = result.model_copy(update={"digest": in_process_sites.digest(sums)})
        return result, sums

    monkeypatch.setattr(in_process_sites, "private_sums_of", wrong)
    run, _, _ = private_run(refitted | ONLY_STATISTICS | {"chain.retries": 0})
    (record,) = run.results.heads
    assert "privacy statement doesn't account for" in record.failed["ash"]
    assert "its sums are longer than" in record.failed["birch"]
    assert record.sites == ["cedar", "dogwood"]


def test_over_flower_a_private_run_without_links_ends_with_a_head_and_an_audit_that_is_fine(
    refitted, coordinated, loopback
):
    folder, results = coordinated(refitted | ONLY_STATISTICS, loopback(2))
    assert results.released == "head" and results.heads[0].bytes_up > 0
    record = read_privacy_record(folder.path / "privacy.json")
    assert all(facts.epsilon is not None and 7.95 < facts.epsilon <= 8.0 for facts in record.sites.values())
    assert audit_statements(folder.run_id, record.statements, list(record.sites)).exit_code == 0
    assert record.mode == "dp-sgd"
