"""Secure sums over a grid: they are the plain ones, whoever drops out, and no site's own are ever seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from chainward_server.privacy import RunPrivacy
from chainward_server.private_heads import private_head
from chainward_server.rendezvous import meet
from chainward_server.results import HeadRecord
from chainward_server.scoring import Scorer
from chainward_server.secure_rounds import card_of_all
from chainward_server.sites import Failure, Summed, TooFewSitesError, Trained, Work
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError
from chainward_shared.models import build_model, skeleton
from chainward_shared.models.of_run import student_architecture
from chainward_shared.noisy_discriminant import public_frame
from chainward_shared.pretrained.begin import begin
from chainward_shared.privacy.dp_sgd import statistics_mechanisms
from chainward_shared.private_sums import SumsForm
from chainward_shared.protocol import (
    EvaluateTask,
    MaskedSum,
    SharedNoise,
    StatisticsResult,
    StatisticsTask,
    StudentTask,
    SumKeysTask,
    SumSharesTask,
    SumTask,
    SumUnmasking,
    SumUnmaskTask,
    kind_of,
    unpack,
)
from chainward_shared.secure_sums import flat, from_tensor, real_numbers
from chainward_shared.summands import counts_in, student_mean, summand_template
from chainward_shared.weights import digest, from_arrays
from chainward_simulations.runner import in_process, open_sites

SITES = ["ash", "birch", "cedar", "dogwood"]
STEPS = [SumKeysTask, SumSharesTask, SumTask, SumUnmaskTask]


@pytest.fixture
def waiting(settings):
    """Settings under which nobody waits long for a site that is silent."""
    return settings | {"federation.deadline": 0.5, "federation.hop-deadline": 0.3, "federation.patience": 0.0}


@pytest.fixture
def consortium(waiting, loopback, tmp_path):
    """Meet the sites over a grid with some interference; return the sites and the same work for each of some."""

    def of(interference=None, asked=SITES):
        config = RunConfig.from_flat(waiting)
        sites = meet(loopback(2, interference), config, tmp_path)
        architecture = begin(config, classes=3, channels=1, image_size=32).architecture
        state = build_model(architecture, seed=0).state_dict()
        task = StatisticsTask(
            run_id="r",
            hop="head",
            architecture=architecture,
            label_fraction=1.0,
            seed=0,
            threads=1,
            digest=digest(state),
        )
        return sites, {site: Work(task, {"model": state}) for site in asked}

    return of


@pytest.fixture
def student_work(waiting):
    """Return a round of the student, as all sites get it, and the weights of the sites in its mean."""
    changes = {"student.epochs": 2, "student.rounds": 1, "federation.transfer": "full"}
    config = RunConfig.from_flat(waiting | changes)
    large = begin(config, classes=3, channels=1, image_size=32).architecture
    small = student_architecture(config.student, large)
    student, auxiliary = (build_model(small, seed).state_dict() for seed in (1, 2))
    task = StudentTask(
        run_id="r",
        round=1,
        architecture=small,
        recipe=config.student_recipe("distil"),
        student_digest=digest(student),
        auxiliary_digest=digest(auxiliary),
    )
    work = Work(task, {"student": student, "auxiliary": auxiliary})
    return dict.fromkeys(SITES, work), dict(zip(SITES, (0.3, 0.3, 0.2, 0.2), strict=True))


@pytest.fixture
def shared_noise(waiting, loopback, tmp_path):
    """Let private hospitals add up a release to which each adds a share of the noise, that of `together` enough; return the sum,
    and the noise of a whole release."""

    def of(together, interference):
        private = {"privacy.mode": "dp-sgd", "privacy.delta": 1e-3, "chain.head": "statistics", "chain.laps": 0}
        private |= {"student.rounds": 0, "chain.compare-alone": False, "privacy.simulated-metrics": "exact"}
        config = RunConfig.from_flat(waiting | private)
        sites = meet(loopback(2, interference), config, tmp_path)
        architecture = begin(config, classes=3, channels=1, image_size=32).architecture
        state, recipe = build_model(architecture, seed=0).state_dict(), config.privacy_recipe()
        frame = public_frame(torch.randn(50, skeleton(architecture).num_features, dtype=torch.float64), 4)
        noise = statistics_mechanisms(recipe)[-1].noise_multiplier
        task = StatisticsTask(
            run_id="r",
            hop="head",
            architecture=architecture,
            label_fraction=1.0,
            seed=0,
            threads=1,
            digest=digest(state),
            privacy=recipe,
            form=SumsForm(dimension=4, labels=True, moments=False),
            frame_digest=digest(frame.state()),
            shared_noise=SharedNoise.of(noise, together),
        )
        return sites.summed(dict.fromkeys(SITES, Work(task, {"model": state, "frame": frame.state()}))), noise

    return of


@pytest.fixture
def scores_work(consortium):
    """Return the scoring of a model at all sites."""
    _, work = consortium()
    of_sums = work["ash"]
    task = EvaluateTask(
        run_id="r",
        architecture=of_sums.task.architecture,
        splits=["val", "test"],
        threads=1,
        digest=of_sums.task.digest,
    )
    return dict.fromkeys(SITES, Work(task, of_sums.models))


@pytest.mark.slow
@pytest.mark.parametrize("away", [None, "birch"])
def test_the_mean_of_students_is_the_plain_one_of_those_that_answered(consortium, student_work, away):
    work, weights = student_work
    sites, _ = consortium(silent_at(SumTask, away))
    mine = sites.summed(work, weights=weights)
    answered = [site for site in SITES if site != away]
    assert mine.sites == answered
    start, total = work["ash"].models["student"], sum(weights[site] for site in answered)
    mean, kept = student_mean(mine.state, start, total)
    answers = dict(consortium()[0].train_students(work))
    assert 0 < kept < 1
    assert kept == pytest.approx(sum(weights[s] / total * answers[s].result.auxiliary_kept for s in answered))
    for name, tensor in mean.items():
        expected = sum(weights[site] / total * answers[site].model[name].double() for site in answered)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        assert tensor.dtype == start[name].dtype


@pytest.mark.slow
def test_counts_of_predictions_add_up_exactly(consortium, scores_work):
    summed = consortium()[0].summed(scores_work)
    found = counts_in(summed.state, scores_work["ash"].task)
    answers = consortium()[0].evaluate(scores_work)
    for split, counts in found.items():
        for name in ("confusion", "histograms"):
            assert np.array_equal(
                getattr(counts, name), sum(getattr(one.counts[split], name) for one in answers.values())
            )
        expected = sum(one.counts[split].calibration for one in answers.values())
        assert np.allclose(counts.calibration, expected, rtol=0, atol=len(SITES) * 2.0**-24)


def test_scores_that_are_added_up_in_secret_are_those_of_all_images_of_all_sites(consortium, scores_work):
    """Also of splits of which the sites have more together than any of them."""
    (sites, _), work = consortium(), scores_work["ash"]
    scorer = Scorer(sites, RunPrivacy(on=False, run_id="r", cards=sites.cards), "r", threads=1)
    found = scorer.in_secret(work.task.architecture, work.models["model"], work.task.splits)
    for split, counted in found.items():
        assert counted.together == SITES
        assert counted.total is not None
        assert int(counted.total.confusion.sum()) == sum(getattr(card, split) for card in sites.cards.values())


@pytest.mark.parametrize("silent", [(), ("val",), ("val", "test")])
def test_the_card_of_all_sites_has_as_many_images_as_their_cards_together(consortium, silent):
    cards = list(consortium()[0].cards.values())
    cards[1] = cards[1].model_copy(update=dict.fromkeys(silent))
    together = card_of_all(cards)
    for split in ("train", "val", "test"):
        expected = None if split in silent else sum(getattr(card, split) for card in cards)
        assert getattr(together, split) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["students", "scores"])
def test_nothing_of_a_single_sites_student_or_scores_reaches_the_coordinator(
    consortium, student_work, scores_work, kind
):
    work, weights = student_work if kind == "students" else (scores_work, None)
    replies = []

    def noted(message, answer):
        replies.append(answer().content)
        return Message(replies[-1], reply_to=message)

    sites, _ = consortium(noted)
    sites.summed(work, weights=weights)
    masked = [reply for reply in replies if kind_of(reply) == MaskedSum.KIND]
    assert len(masked) == len(SITES)
    sums_of = {kind_of(reply) for reply in replies if reply.array_records}
    assert sums_of == {MaskedSum.KIND}, "no other answer carries numbers"
    numbers = sum(tensor.numel() for tensor in summand_template(work["ash"].task, "single").values())
    for reply in masked:
        body, arrays = unpack(reply, MaskedSum)
        assert body == MaskedSum(site=body.site)
        sent = from_tensor(from_arrays(arrays["sum"], {"sum": torch.empty(numbers, dtype=torch.int64)})["sum"])
        ones = np.unpackbits(sent.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 5 / (2 * (64 * numbers) ** 0.5), "counts are mostly zero, masked ones are random bits"


@pytest.fixture
def plain(consortium):
    """What each site answers to a round of statistics that is not secure."""
    sites, work = consortium()
    answers = dict(sites.statistics(work))
    assert all(isinstance(answer, Trained) for answer in answers.values())
    return {site: answer.model for site, answer in answers.items()}


def site_of(message):
    return SITES[
        unpack(message.content, next(step for step in STEPS if kind_of(message.content) == step.KIND))[
            0
        ].simulated.index
    ]


def silent_at(step, site):
    """Return an interference by which a site does not answer one step."""

    def interfere(message, answer):
        return None if kind_of(message.content) == step.KIND and site_of(message) == site else answer()

    return interfere


def is_sum_of(state, plain, sites):
    return all(
        torch.allclose(values, sum(plain[site][name] for site in sites), rtol=1e-9, atol=1e-6)
        for name, values in state.items()
    )


def test_a_secure_sum_is_the_plain_one(consortium, plain):
    sites, work = consortium()
    summed = sites.summed(work)
    assert summed.sites == SITES
    assert not summed.failed
    assert is_sum_of(summed.state, plain, SITES)
    assert int(summed.state["train.images"]) == 99


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.KIND)
def test_a_site_that_drops_out_at_any_step_costs_its_own_numbers_alone(consortium, plain, step):
    sites, work = consortium(silent_at(step, "birch"))
    summed = sites.summed(work)
    answered = SITES if step is SumUnmaskTask else ["ash", "cedar", "dogwood"]
    assert summed.sites == answered
    assert list(summed.failed) == ["birch"]
    assert is_sum_of(summed.state, plain, answered)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.KIND)
def test_shared_noise_is_enough_whoever_drops_out_as_long_as_so_many_are_left(shared_noise, step):
    summed, noise = shared_noise(3, silent_at(step, "birch"))
    assert summed.sites == (SITES if step is SumUnmaskTask else ["ash", "cedar", "dogwood"])
    assert summed.noise == pytest.approx(noise * (len(summed.sites) / 3) ** 0.5)
    assert summed.noise >= noise * (1 - 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.KIND)
def test_what_has_too_few_shares_of_noise_is_not_released(shared_noise, step):
    """Whoever is missing, nobody gives the shares that take the masks off; at the last step they are too few to do so."""
    unmasked, silent = [], silent_at(step, "birch")

    def interfere(message, answer):
        reply = silent(message, answer)
        if reply is not None and kind_of(reply.content) == SumUnmasking.KIND:
            unmasked.append(reply)
        return reply

    with pytest.raises(TooFewSitesError, match=r"3 of 4 sites .*; a secure sum takes 4 here") as error:
        shared_noise(4, interfere)
    assert list(error.value.failed) == ["birch"]
    assert len(unmasked) == (3 if step is SumUnmaskTask else 0), "of four that it takes"


@pytest.mark.slow
def test_the_coordinator_is_sent_nothing_from_which_fewer_than_all_sites_can_be_told(consortium, plain):
    replies = []

    def noted(message, answer):
        replies.append(answer())
        return replies[-1]

    sites, work = consortium(noted)
    sites.summed(work)
    assert StatisticsResult.KIND not in {kind_of(reply.content) for reply in replies}
    single = {site: flat(state) for site, state in plain.items()}
    expected = {"sum": torch.empty(len(single["ash"]), dtype=torch.int64)}
    sent = [unpack(reply.content, MaskedSum) for reply in replies if kind_of(reply.content) == MaskedSum.KIND]
    found = {body.site: from_tensor(from_arrays(arrays["sum"], expected)["sum"]) for body, arrays in sent}
    assert set(found) == set(SITES)
    for some in (["ash"], ["ash", "birch"], ["ash", "birch", "cedar"], SITES):
        total = real_numbers(sum(found[site] for site in some))
        assert not np.isclose(total, sum(single[site] for site in some), rtol=0.01).any()


def test_a_sum_over_two_is_refused_in_words(consortium):
    sites, work = consortium(asked=SITES[:2])
    with pytest.raises(TooFewSitesError, match="takes 3 sites"):
        sites.summed(work)


@pytest.mark.slow
def test_two_of_four_that_drop_out_are_too_many(consortium):
    def interfere(message, answer):
        return None if kind_of(message.content) == SumTask.KIND and site_of(message) in SITES[:2] else answer()

    sites, work = consortium(interfere)
    with pytest.raises(TooFewSitesError, match="2 of 4 sites have answered") as error:
        sites.summed(work)
    assert set(error.value.failed) == set(SITES[:2])


@pytest.mark.slow
def test_a_site_that_sends_nonsense_is_left_out(consortium, plain):
    def interfere(message, answer):
        reply = answer()
        if kind_of(message.content) == SumTask.KIND and site_of(message) == "birch":
            del reply.content.array_records["sum"]
        return reply

    sites, work = consortium(interfere)
    summed = sites.summed(work)
    assert "no arrays" in summed.failed["birch"].reason
    assert is_sum_of(summed.state, plain, ["ash", "cedar", "dogwood"])


def test_a_site_masks_no_other_task_than_the_one_that_was_agreed_on(consortium):
    refusals = []

    def interfere(message, answer):
        if kind_of(message.content) == SumTask.KIND:
            task, _ = unpack(message.content, SumTask)
            other = task.model_copy(update={"statistics": task.statistics.model_copy(update={"label_fraction": 0.5})})
            message.content.config_records["chainward"]["body"] = other.model_dump_json()
        reply = answer()
        refusals.append(str(reply.content.config_records["chainward"]["body"]))
        return reply

    sites, work = consortium(interfere)
    with pytest.raises(TooFewSitesError):
        sites.summed(work)
    assert sum("another sum" in refusal for refusal in refusals) == len(SITES)


@pytest.mark.slow
def test_sites_that_add_their_noise_together_add_less_of_it_each(settings):
    private = settings | {
        "chain.head": "statistics",
        "chain.laps": 0,
        "chain.compare-alone": False,
        "student.rounds": 0,
        "privacy.mode": "dp-sgd",
        "privacy.delta": 1e-3,
        "privacy.simulated-metrics": "exact",
        "federation.secure-sums": "on",
    }
    added = {}
    for together in (1, 3, 5):
        config = RunConfig.from_flat(private | {"federation.secure-noise-from": together})
        with in_process(config, open_sites(config)) as (run, _):
            if together > len(SITES):
                with pytest.raises(ChainwardError, match="there was no secure sum"):
                    private_head(run, "head", run.initial(), run.architecture, prior_strength=1.0)
                continue
            noises, summed = [], run.sites.summed

            def watched(*arguments, summed=summed, noises=noises, **more):
                found = summed(*arguments, **more)
                noises.append(found.noise)
                return found

            run.sites.summed = watched
            private_head(run, "head", run.initial(), run.architecture, prior_strength=1.0)
            added[together] = noises
    assert added[3] == pytest.approx([noise / 3**0.5 for noise in added[1]])


@pytest.mark.slow
def test_a_run_with_secure_sums_ends_with_the_head_of_plain_ones(settings, coordinated):
    flat_settings = settings | {
        "chain.head": "statistics",
        "chain.epochs": 1,
        "chain.compare-alone": False,
        "student.rounds": 1,
        "student.epochs": 1,
        "student.finetune-rounds": 0,
        "student.head": "statistics",
        "federation.transfer": "full",
    }

    def heads(**changes):
        folder, results = coordinated(flat_settings | changes)
        state = load_file(folder.path / "models" / "head-start.safetensors")
        return {name: values for name, values in state.items() if "head.fc" in name}, results

    expected, _ = heads()
    found, results = heads(**{"federation.secure-sums": "on"})
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)
    assert [(head.secure, head.sites, head.images) for head in results.heads] == [(True, SITES, 99)] * 3


@pytest.mark.slow
def test_private_sums_are_added_up_in_secret_each_with_the_noise_that_its_own_ledger_pays_for(
    settings, coordinated, loopback
):
    replies = []

    def noted(message, answer):
        reply = answer()
        replies.append(reply.content)
        return reply

    changes = {
        "chain.laps": 0,
        "chain.head": "statistics",
        "chain.compare-alone": False,
        "student.rounds": 0,
        "privacy.mode": "dp-sgd",
        "privacy.delta": 1e-3,
        "federation.secure-sums": "on",
    }
    _, results = coordinated(settings | changes, loopback(2, noted))
    (head,) = results.heads
    assert (head.secure, head.sites) == (True, SITES)
    kinds = {kind_of(reply) for reply in replies}
    assert StatisticsResult.KIND not in kinds
    masked = [unpack(reply, MaskedSum)[0] for reply in replies if kind_of(reply) == MaskedSum.KIND]
    private = [one for one in masked if one.noise]
    assert sorted(one.site for one in private) == sorted(2 * SITES), "a centre and the classes of each"
    for one in private:
        paid = [spent.noise_multiplier for spent in one.statement.of_run if spent.kind == "gaussian"]
        assert one.noise in paid


@pytest.mark.parametrize(("why", "unreached"), [("waiting", ["b"]), ("lost", ["b"]), ("refused", [])])
def test_a_site_is_made_up_for_that_was_not_reached_or_waits_for_a_person_and_not_one_that_refuses(why, unreached):
    failed = {"b": Failure("why", 0.0, **{why: True})}
    account = Summed({}, ["a"], ["a", "b"], 0.0, failed, 1.0).account
    record = HeadRecord(key="head", images=3, validation=0, seconds=1.0, **account)
    assert (record.sites, record.failed, record.unreached) == (["a"], {"b": "why"}, unreached)
