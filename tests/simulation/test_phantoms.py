"""What the phantoms promise: the same data everywhere, unlike hospitals, a task that needs looking."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from chainward_client.data.site_data import SPLITS, Cases, SiteData
from chainward_simulations.phantoms.cases import (
    PHANTOM_CLASSES,
    phantom_cases,
    phantom_site,
    phantom_site_ids,
    render_phantom,
)
from chainward_simulations.phantoms.hospitals import hospital
from chainward_simulations.phantoms.table import TABLE_COLUMNS

pytestmark = pytest.mark.slow  # all six hospitals are drawn


@pytest.fixture(scope="module")
def sites() -> list[SiteData]:
    return [phantom_site(0, index) for index in range(6)]


@pytest.fixture(scope="module")
def all_cases(sites: list[SiteData]) -> list[Cases]:
    return [site.splits[split] for site in sites for split in SPLITS]


def reports(cases: list[Cases]) -> list[str | None]:
    return [text for part in cases for text in part.privileged.texts or ()]


def test_the_same_seed_and_site_give_the_same_data(sites: list[SiteData]) -> None:
    again = phantom_site(0, 5)
    for split in SPLITS:
        first, second = sites[5].splits[split], again.splits[split]
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.privileged.masks, second.privileged.masks)
        assert first.privileged.texts == second.privileged.texts
        assert first.privileged.table == second.privileged.table


def test_another_seed_gives_other_images(sites: list[SiteData]) -> None:
    other = phantom_site(1, 5).splits["train"].images
    first = sites[5].splits["train"].images
    assert not torch.equal(first[:10], other[:10])


def test_an_image_can_be_rendered_alone(sites: list[SiteData]) -> None:
    case = next(case for case in phantom_cases(0, 2, 50)[::-1] if case.split == "train")
    position = sum(earlier.split == "train" for earlier in phantom_cases(0, 2, case.index))
    image, mask = render_phantom(0, 2, case)
    train = sites[2].splits["train"]
    assert np.array_equal(train.images[position, 0].numpy(), image)
    assert np.array_equal(train.privileged.masks[position].numpy(), mask)


def test_more_cases_leave_the_earlier_ones_unchanged() -> None:
    assert phantom_cases(3, 1, 200)[:37] == phantom_cases(3, 1, 37)


def test_no_patient_is_in_two_splits_and_some_have_several_images(sites: list[SiteData]) -> None:
    for site in sites:
        patients = {split: set(site.splits[split].patients) for split in SPLITS}
        assert all(not patients[one] & patients[other] for one, other in combinations(SPLITS, 2))
    _, images = np.unique(sites[0].splits["train"].patients, return_counts=True)
    assert set(images) == {1, 2, 3}


def test_patients_are_told_apart_across_hospitals(sites: list[SiteData]) -> None:
    assert not set(sites[0].splits["train"].patients) & set(sites[1].splits["train"].patients)


def test_hospitals_differ_in_size_and_hold_about_950_training_images(sites: list[SiteData]) -> None:
    train = [len(site.splits["train"]) for site in sites]
    assert len(set(train)) == 6
    assert 60 <= min(train) <= 90
    assert 230 <= max(train) <= 290
    assert 900 <= sum(train) <= 1000
    assert sum(len(site.splits["test"]) for site in sites) >= 350
    assert 0.15 < sum(len(site.splits["val"]) for site in sites) / sum(train) < 0.25


def test_case_mixes_are_strongly_unlike_and_a_class_is_missing_somewhere(sites: list[SiteData]) -> None:
    shares = [np.array(site.class_counts("train")) / len(site.splits["train"]) for site in sites]
    distances = [np.abs(one - other).sum() / 2 for one, other in combinations(shares, 2)]
    assert np.mean(distances) > 0.4  # total variation distance
    assert sites[1].class_counts("train")[PHANTOM_CLASSES.index("cardiomegaly")] == 0
    assert "no cases of cardiomegaly" in sites[1].notes


def test_every_class_is_in_the_pooled_test_images(sites: list[SiteData]) -> None:
    assert np.sum([site.class_counts("test") for site in sites], axis=0).min() >= 20


def test_every_hospital_has_its_own_scanner(sites: list[SiteData]) -> None:
    assert len({hospital(index).scanner for index in range(6)}) == 6
    assert len({hospital(index).scanner.marker for index in range(6)}) == 6
    noise = [site.splits["train"].images.float().diff(dim=-1).abs().mean().item() for site in sites]
    assert max(noise) > 1.3 * min(noise)


def test_the_burned_in_marker_tells_the_hospital_and_not_the_class(sites: list[SiteData]) -> None:
    for site in sites:
        images = torch.cat([site.splits[split].images for split in SPLITS])[:, 0]
        row, column = hospital(int(site.site.removeprefix("site-")) - 1).scanner.corner
        rows = slice(3, 8) if row == 0 else slice(-8, -3)
        columns = slice(3, 6) if column == 0 else slice(-6, -3)
        lit = (images == 247).all(0)[rows, columns]  # the same pixels in every image, whatever its label
        assert 6 <= lit.sum() <= 12


def test_later_hospitals_vary_the_first_six_and_do_not_depend_on_the_number_of_sites() -> None:
    assert hospital(6) == hospital(6)
    assert hospital(6) != hospital(0)
    assert hospital(6).scanner != hospital(12).scanner
    assert all(sum(hospital(index).mix) == pytest.approx(1) for index in range(64))
    assert phantom_site(0, 63).site == "site-64"


def test_every_case_has_a_region_of_interest_of_the_size_of_its_image(all_cases: list[Cases]) -> None:
    for cases in all_cases:
        masks = cases.privileged.masks
        assert masks is not None
        assert masks.dtype == torch.uint8
        assert masks.shape == (len(cases), *cases.images.shape[-2:])
        assert set(masks.unique().tolist()) == {0, 1}
        assert (masks.flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("finding", PHANTOM_CLASSES[1:])
def test_the_finding_changes_the_image_inside_its_region_and_hardly_outside(finding: str) -> None:
    cases = [case for case in phantom_cases(0, 0, 400) if case.finding == finding][:12]
    inside, outside = [], []
    for case in cases:
        image, mask = render_phantom(0, 0, case)
        healthy, _ = render_phantom(0, 0, case, healthy=True)
        change = np.abs(image.astype(float) - healthy)
        inside.append(change[mask == 1].mean())
        outside.append(change[mask == 0].mean())
    assert np.mean(inside) > 5 * np.mean(outside)


def test_the_region_of_a_normal_chest_is_both_lungs() -> None:
    case = next(case for case in phantom_cases(0, 4, 50) if case.finding == "normal")
    image, mask = render_phantom(0, 4, case)
    halves = mask[:, :32].sum(), mask[:, 32:].sum()
    assert min(halves) > 150
    assert image[mask == 1].mean() < image[mask == 0].mean()


def test_about_a_tenth_of_the_reports_is_missing(all_cases: list[Cases]) -> None:
    texts = reports(all_cases)
    assert 0.07 < np.mean([text is None for text in texts]) < 0.13


def test_reports_are_worded_differently(all_cases: list[Cases]) -> None:
    texts = [text for text in reports(all_cases) if text]
    assert len(set(texts)) > 0.9 * len(texts)


def test_reports_seldom_name_their_class_and_often_negate_another(sites: list[SiteData]) -> None:
    named, negated, total = 0, 0, 0
    for site in sites:
        train = site.splits["train"]
        for text, label in zip(train.privileged.texts or (), train.labels.tolist(), strict=True):
            if text is None or PHANTOM_CLASSES[label] == "normal":
                continue
            total += 1
            named += PHANTOM_CLASSES[label] in text.lower()
            negated += "no " in text.lower()
    assert 0.02 < named / total < 0.5
    assert negated / total > 0.3


def test_table_cells_lie_in_their_declared_ranges_and_some_are_missing(all_cases: list[Cases]) -> None:
    for name, declared in TABLE_COLUMNS.items():
        cells = [cell for cases in all_cases for cell in (cases.privileged.table or {})[name]]
        known = [cell for cell in cells if cell is not None]
        assert 0.05 < 1 - len(known) / len(cells) < 0.11
        if declared["kind"] == "number":
            assert declared["min"] <= min(known) < max(known) <= declared["max"]
        else:
            assert set(known) == set(declared["values"])


def test_the_table_hints_at_the_finding(sites: list[SiteData]) -> None:
    values: dict[str, list[float]] = {name: [] for name in PHANTOM_CLASSES}
    for site in sites:
        train = site.splits["train"]
        for label, crp in zip(train.labels.tolist(), (train.privileged.table or {})["crp"], strict=True):
            if crp is not None:
                values[PHANTOM_CLASSES[label]].append(float(crp))
    assert np.median(values["consolidation"]) > 3 * np.median(values["normal"])
    # yet the distributions overlap
    assert np.quantile(values["consolidation"], 0.1) < np.quantile(values["normal"], 0.9)


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_a_linear_model_on_pixels_does_not_solve_the_task(sites: list[SiteData]) -> None:
    def pooled(split: str) -> tuple[np.ndarray, np.ndarray]:
        images = torch.cat([site.splits[split].images for site in sites]).float()  # type: ignore[index]
        labels = torch.cat([site.splits[split].labels for site in sites])  # type: ignore[index]
        return torch.nn.functional.avg_pool2d(images, 2).flatten(1).numpy(), labels.numpy()

    (train, labels), (test, truth) = pooled("train"), pooled("test")
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=60, class_weight="balanced").fit(scaler.transform(train), labels)
    accuracy = balanced_accuracy_score(truth, model.predict(scaler.transform(test)))
    assert 0.30 < accuracy < 0.60


@pytest.mark.parametrize("image_size", [32, 96])
def test_image_size_is_honoured(image_size: int) -> None:
    site = phantom_site(0, 5, image_size)
    for split in SPLITS:
        cases = site.splits[split]
        assert cases.images.shape == (len(cases), 1, image_size, image_size)
        assert cases.images.dtype == torch.uint8
        assert cases.privileged.masks is not None
        assert (cases.privileged.masks.flatten(1).sum(1) > 0).all()


def test_phantoms_say_that_they_are_synthetic(sites: list[SiteData]) -> None:
    assert all(site.synthetic for site in sites)


def test_site_ids_name_the_sites_in_order(sites: list[SiteData]) -> None:
    assert phantom_site_ids(6) == tuple(site.site for site in sites)
    assert phantom_site_ids(64)[-1] == "site-64"


@pytest.mark.parametrize("num_sites", [0, 65])
def test_an_impossible_number_of_sites_is_refused(num_sites: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        phantom_site_ids(num_sites)
