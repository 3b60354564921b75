"""The picture of examples: which cases are shown, and that it is drawn."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from chainward_client.data.site_data import SiteData
from chainward_shared.models import build_model, resolve_architecture
from chainward_simulations.examples import Example, choose, example_figure
from chainward_simulations.phantoms.cases import phantom_site

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sites() -> dict[str, SiteData]:
    found = [phantom_site(0, index) for index in range(2)]
    few = [
        replace(data, splits={**data.splits, "test": data.splits["test"].take(range(0, len(data.splits["test"]), 4))})
        for data in found
    ]
    return {data.site: data for data in few}


def model(name: str = "test_convnext", size: int = 64, classes: int = 5):
    architecture = resolve_architecture(name, num_classes=classes, in_chans=1, image_size=size)
    return architecture, build_model(architecture, seed=1).state_dict()


def picture_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# --- which cases ---


def candidates(classes: int = 4, sites: int = 3, each: int = 6) -> list[Example]:
    return [
        Example(f"site-{s}", 10 * c + i, (c,), (True, i % 3 == 0))
        for s in range(sites)
        for c in range(classes)
        for i in range(each)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_cases_are_spread_over_classes_sites_hits_and_misses(seed):
    chosen = choose(candidates(), 12, seed)
    assert len(set(chosen)) == 12
    for trait, expected in (
        (lambda example: example.labels, 3),
        (lambda example: example.site, 4),
        (lambda example: example.hits[-1], 6),
    ):
        counts = Counter(map(trait, chosen))
        assert max(counts.values()) - min(counts.values()) <= 1
        assert max(counts.values()) in (expected, expected + 1)


def test_the_choice_replays_by_seed_whatever_else_differs():
    assert choose(candidates(), 6, seed=4) == choose(candidates(), 6, seed=4)
    assert choose(candidates(), 6, seed=4) != choose(candidates(), 6, seed=5)


def test_fewer_candidates_are_all_shown():
    assert len(choose(candidates(1, 1, 3), 6, seed=0)) == 3


# --- the picture ---


def test_the_picture_has_a_column_for_each_case_and_a_row_for_each_model(sites):
    one = picture_of(example_figure({"chain": model()}, sites, count=5))
    two = picture_of(example_figure({"without": model(), "with": model("test_vit")}, sites, count=5))
    more = picture_of(example_figure({"chain": model()}, sites, count=8))
    assert two.shape[0] > one.shape[0]
    assert two.shape[1] == one.shape[1] < more.shape[1]
    for picture in (one, two, more):
        assert picture.std() > 20
    outlined = np.all(np.abs(one.astype(int) - (0, 213, 255)) < 40, axis=2)
    assert outlined.sum() > 100
    assert outlined.any(axis=0)[one.shape[1] // 2 :].any()


def test_the_same_settings_draw_the_same_picture(sites):
    models = {"chain": model()}
    assert example_figure(models, sites, count=3) == example_figure(models, sites, count=3)
    assert example_figure(models, sites, count=3) != example_figure(models, sites, count=3, seed=1)


def test_a_model_of_smaller_images_stands_beside_a_larger_one(sites):
    assert picture_of(example_figure({"chain": model(), "student": model(size=32)}, sites, count=2)).std() > 20


def test_colour_images_and_several_findings_at_once(sites):
    data = next(iter(sites.values()))
    cases = data.splits["test"]
    findings = torch.zeros(len(cases), 5, dtype=torch.int64)
    findings[::2, 0] = findings[::3, 2] = 1
    colour = replace(cases, images=cases.images.repeat(1, 3, 1, 1), labels=findings)
    architecture = resolve_architecture("test_convnext", num_classes=5, in_chans=3, image_size=64)
    models = {"chain": (architecture, build_model(architecture, seed=1).state_dict())}
    several = {data.site: replace(data, splits={**data.splits, "test": colour})}
    assert picture_of(example_figure(models, several, count=4)).std() > 20


def test_images_are_shown_also_where_no_site_has_regions(sites):
    first, second = sites.values()
    blind = [
        replace(data, splits={**data.splits, "test": replace(cases, privileged=replace(cases.privileged, masks=None))})
        for data in (first, second)
        for cases in [data.splits["test"]]
    ]
    assert picture_of(example_figure({"chain": model()}, {"a": blind[0], second.site: second}, count=2)).std() > 20
    assert picture_of(example_figure({"chain": model()}, {data.site: data for data in blind})).std() > 20
