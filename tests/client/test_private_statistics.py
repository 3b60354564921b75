"""Private statistics: what one patient can change, what is paid and when, and what comes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from private_hospital import ARCHITECTURES, POLICY, answer, hospital, state_of, statistics

from chainward_client.answers import sums_over_embeddings
from chainward_client.bounded_sums import SumsRelease
from chainward_client.entropy import Entropy
from chainward_client.node import DeployedNode
from chainward_client.privacy_audit.released_sums import SUMS_CHECKS
from chainward_client.privacy_audit.sabotage import NoiselessSums, UnboundedSums, sums_by_image
from chainward_client.site_ledger import open_site_ledger
from chainward_client.training import passes as passes_module
from chainward_shared.errors import PolicyRefusal
from chainward_shared.privacy.accounting import epsilons
from chainward_shared.private_sums import GRAIN, LENGTH, Frame, NoisySums, SumsForm
from chainward_shared.protocol import Refusal, SharedNoise, StatisticsResult, kind_of, unpack
from chainward_shared.weights import to_arrays

FORMS = {
    "centre": SumsForm(dimension=4, labels=False, moments=False),
    "means": SumsForm(dimension=4, labels=True, moments=False),
    "moments": SumsForm(dimension=4, labels=True, moments=True),
}
HOSTILE = {
    "not numbers": torch.nan,
    "infinite": torch.inf,
    "huge": 1e30,
    "next to nothing": 1e-310,
    "nothing": 0.0,
    "of length one": 0.5,
}


def group(n: int, *, multilabel: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (n, 3) if multilabel else (n,), generator=generator)
    return values, labels, np.array([f"p{number % (n // 2)}" for number in range(n)])


def with_patient(others, value: float, images: int):
    values, labels, patients = others
    frame = Frame(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    own = frame.within(torch.full((images, 4), value))
    label = torch.ones((images, 3), dtype=labels.dtype) if labels.ndim == 2 else torch.full((images,), 2)
    return torch.cat([own, values]), torch.cat([label, labels]), np.concatenate([["new"] * images, patients])


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_patient_whatever_the_embeddings_and_however_many_images_changes_the_sums_by_one_at_most(form, multilabel):
    release, others = SumsRelease(form, "patient"), group(12, multilabel=multilabel)
    before = release.exact(*others, 3)
    for value in HOSTILE.values():
        for images in (1, 3, 1000):
            moved = release.exact(*with_patient(others, value, images), 3) - before
            assert float(moved.norm()) <= LENGTH
            alone = release.exact(*(part[:images] for part in with_patient(others, value, images)), 3)
            assert torch.equal(moved, alone), "what a patient adds does not depend on the others, to the last bit"


def test_sums_do_not_depend_on_the_order_of_the_images():
    values, labels, patients = group(40, multilabel=False)
    turned = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    release = SumsRelease(FORMS["moments"], "patient")
    again = release.exact(values[turned], labels[turned], patients[turned.numpy()], 3)
    assert float((release.exact(values, labels, patients, 3) - again).abs().max()) <= 40 * GRAIN
    by_image = SumsRelease(FORMS["moments"], "image")
    assert torch.equal(
        by_image.exact(values, labels, patients, 3), by_image.exact(values[turned], labels[turned], patients, 3)
    )


@pytest.mark.parametrize("multilabel", [False, True])
def test_without_noise_the_release_says_counts_means_and_second_moments(multilabel):
    form = FORMS["moments"]
    values, labels, _ = group(30, multilabel=multilabel)
    values = 0.4 * values / values.norm(dim=1, keepdim=True)
    exact = SumsRelease(form, "image").exact(values, labels, np.arange(30).astype(str), 3)
    found = NoisySums.of(exact.numpy(), 0.0, form, form.groups(3, multilabel=multilabel))
    if multilabel:
        members = torch.cat([torch.ones(30, 1), labels], dim=1).double() / 2
    else:
        members = torch.nn.functional.one_hot(labels, 3).double()
    assert np.allclose(found.members, members.sum(dim=0), atol=1e-6)
    assert np.allclose(found.sums, members.T @ values, atol=1e-6)
    assert np.allclose(found.moments, values.T @ values, atol=1e-6)
    if not multilabel:
        assert found.length == pytest.approx(0.4, rel=1e-4)


def test_the_audit_names_what_is_broken_in_a_release_and_nothing_in_the_one_installed():
    said = {
        SumsRelease: [],
        NoiselessSums: ["the noise on sums has 0.000", "an attack on releases"],
        UnboundedSums: ["changes the sums by", "an attack on releases"],
        sums_by_image: ["changes the sums by", "an attack on releases"],
    }
    for release, words in said.items():
        problems = [problem for check in SUMS_CHECKS if (problem := check(release))]
        assert len(problems) == len(words), (release, problems)
        assert all(word in problem for word, problem in zip(words, problems, strict=True))


# --- at a hospital ---


@pytest.fixture
def node(tmp_path) -> dict[str, str]:
    return hospital(tmp_path / "site")


def ledger_of(tmp_path):
    return open_site_ledger(tmp_path / "site" / "state", "ash")[0]


def asked(**changes):
    architecture = ARCHITECTURES["fitting"]
    kind, task, models = statistics(architecture, state_of(architecture, "as they come"))
    return kind, task.model_copy(update=changes), models


def test_a_release_is_one_entry_of_the_ledger_with_its_noise_and_all_accountants_agree(node, tmp_path):
    content = answer(node, *asked())
    result, arrays = unpack(content, StatisticsResult)
    (record,) = ledger_of(tmp_path).records()
    assert (record.kind, record.noise_multiplier, record.steps, record.clip_norm) == (
        "gaussian",
        result.noise,
        1,
        LENGTH,
    )
    assert result.statement is not None and result.statement.of_run == (record,)
    assert (result.images, result.validation) == (0, 0), "how many there are is not told"
    found = epsilons([record.mechanism], POLICY["delta"])
    assert found.problem is None
    assert set(arrays) == {"sums"}


def test_the_same_request_again_costs_nothing_and_brings_the_same_numbers(node, tmp_path):
    first, second = (unpack(answer(node, *asked()), StatisticsResult)[0] for _ in range(2))
    assert first.digest == second.digest
    assert len(ledger_of(tmp_path).spendings()) == 1
    other = unpack(answer(node, *asked(hop="another")), StatisticsResult)[0]
    assert other.digest != first.digest, "another request has noise of its own"


def test_no_image_is_looked_at_before_the_release_is_reserved(node, tmp_path, monkeypatch):
    seen, passes = [], passes_module.passes

    def watched(*arguments):
        seen.append([spending.end for spending in ledger_of(tmp_path).spendings()])
        return passes(*arguments)

    monkeypatch.setattr(passes_module, "passes", watched)
    answer(node, *asked())
    assert seen == [[None]], "one reservation, still open"


def test_a_round_that_fails_is_charged_and_says_the_same_whatever_went_wrong(node, tmp_path, monkeypatch):
    told = []
    for number, error in enumerate([IndexError("Target 2 is out of bounds."), MemoryError(), ValueError("image 7")]):

        def broken(*arguments, error=error):
            raise error

        monkeypatch.setattr(passes_module, "passes", broken)
        told.append(unpack(answer(node, *asked(hop=f"head-{number}")), Refusal)[0].model_dump())
    assert all(one == told[0] for one in told)
    spendings = ledger_of(tmp_path).spendings()
    assert len(spendings) == 3
    assert all(spending.counted == spending.reserved.mechanism for spending in spendings)


def test_more_rounds_than_the_run_planned_are_refused_and_cost_nothing(node, tmp_path):
    _, task, _ = asked()
    once = {"privacy": task.privacy.model_copy(update={"statistics": 1})}
    answer(node, *asked(**once, hop="one"))
    content = answer(node, *asked(**once, hop="two"))
    assert "planned 1 private statistics rounds and has had 1" in unpack(content, Refusal)[0].reason
    assert len(ledger_of(tmp_path).spendings()) == 1


def test_a_round_without_privacy_and_a_frame_that_is_none_are_refused(node, tmp_path):
    exact = answer(node, *asked(privacy=None, form=None, frame_digest=None))
    assert "would leave it without noise" in unpack(exact, Refusal)[0].reason
    kind, task, models = asked()
    for frame in (
        {"centre": torch.zeros(24).double(), "axes": torch.zeros(5, 24).double()},
        {"centre": torch.full((24,), torch.nan).double(), "axes": torch.zeros(6, 24).double()},
        {"centre": torch.zeros(24).double()},
    ):
        assert kind_of(answer(node, kind, task, models | {"frame": frame})) == Refusal.KIND
    assert kind_of(answer(node, kind, task, {"model": models["model"]})) == Refusal.KIND
    assert ledger_of(tmp_path).spendings() == []


def summed_with_others(node, *, together: int, shared: SharedNoise):
    """Return what the hospital adds to a secure sum in which it relies on the noise of so many."""
    _, task, models = asked(shared_noise=shared)
    with DeployedNode(node).at_work_on(task, 60.0) as site:
        arrays = {name: to_arrays(state) for name, state in models.items()}
        return sums_over_embeddings(task, arrays, site, together=together)


def test_a_share_of_the_noise_leaves_nobody_in_the_open_and_costs_nothing(node, tmp_path):
    content = answer(node, *asked(shared_noise=SharedNoise(sites=2, each=1e6)))
    assert "relies on 1 here" in unpack(content, Refusal)[0].reason
    with pytest.raises(PolicyRefusal, match="relies on 2 here"):
        summed_with_others(node, together=2, shared=SharedNoise(sites=3, each=1e6))
    assert ledger_of(tmp_path).spendings() == []


def test_shares_that_are_too_little_together_are_refused_before_anything_is_spent(node, tmp_path):
    enough = unpack(answer(node, *asked(hop="all of it")), StatisticsResult)[0].noise
    with pytest.raises(PolicyRefusal, match="are less than"):
        summed_with_others(node, together=3, shared=SharedNoise.of(0.999 * enough, 3))
    assert len(ledger_of(tmp_path).spendings()) == 1


def test_a_share_that_is_enough_with_those_of_others_is_charged_as_all_of_the_noise(node, tmp_path):
    enough = unpack(answer(node, *asked(hop="all of it")), StatisticsResult)[0].noise
    result, _ = summed_with_others(node, together=4, shared=SharedNoise.of(enough, 4))
    assert result.noise == pytest.approx(enough / 2)
    first, second = ledger_of(tmp_path).spendings()
    assert first.counted == second.counted
    assert second.reserved.phase == "statistics, with noise of 4 sites"


def test_so_many_shares_make_the_noise_that_one_site_would_add():
    shared, entropy = SharedNoise.of(3.0, 4), Entropy()
    zeros = torch.zeros(40_000, dtype=torch.float64)
    release = SumsRelease(FORMS["means"], "patient")
    total = sum(release.noised(zeros, shared.each, entropy) for _ in range(4))
    assert float(total.std()) == pytest.approx(3.0, rel=0.03)
    assert shared.is_enough(3.0) and not shared.is_enough(3.001)


def test_noise_of_a_release_is_as_wide_as_asked_and_independent():
    zeros = torch.zeros(50_000, dtype=torch.float64)
    noise = SumsRelease(FORMS["means"], "patient").noised(zeros, 2.0, Entropy())
    assert float(noise.std()) == pytest.approx(2.0, rel=0.03)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.1
