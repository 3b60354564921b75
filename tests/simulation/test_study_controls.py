"""The controls of a study that need no training, the start that all its arms share, and when it refuses to rank."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from in_process_run import equal
from small_recipes import SMALL_LINK

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.training import features as features_module
from chainward_shared.console import PlainConsole
from chainward_shared.discriminant import HeadSums, discriminant
from chainward_shared.models import Start as Pretrained
from chainward_shared.models import build_model, resolve_architecture
from chainward_simulations.runner import open_sites
from chainward_simulations.study import results as results_module
from chainward_simulations.study.baselines import train_cyclic, train_federated
from chainward_simulations.study.configured_arms import configure_arms
from chainward_simulations.study.further.scaffold import train_scaffold
from chainward_simulations.study.further.union import train_union
from chainward_simulations.study.kept_features import ImageFeatures
from chainward_simulations.study.start import Start, refitted, start_of
from chainward_simulations.study.study import StudyRequest, run_study
from chainward_simulations.study.table import notes, study_table
from chainward_simulations.study.without_training import PERCENTILES, THUMBNAIL, linear_probe, picture_model, thumbnails

RECIPE = SMALL_LINK.model_copy(update={"class_balance": "site-prior", "distillation_weight": 0.0, "transfer": "full"})


def site_of(name, n, classes=3, *, multilabel=False):
    """Images whose brightness tells their class, and noise."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 40, (n, 1, 32, 32), generator=generator)
    images = (noise + 70 * labels[:, None, None, None]).to(torch.uint8)
    if multilabel:
        labels = torch.stack([(labels == k) | (labels == classes - 1) for k in range(classes)], dim=1).float()
    cases = Cases(images, labels, np.array([f"{name}-{i}" for i in range(n)]))
    task = "multilabel" if multilabel else "single"
    return SiteData(
        name, tuple("abcdefg"[:classes]), {"train": cases, "val": cases.take(range(n // 2)), "test": cases}, task=task
    )


SITES = {"oak": site_of("oak", 24), "elm": site_of("elm", 15)}


def frozen(part="last-1"):
    plain = resolve_architecture("test_vit", num_classes=3, in_chans=1, image_size=32, pretrained=True)
    architecture = plain.model_copy(
        update={"start": Pretrained(name="test_vit", file="0" * 64, digest="0" * 64, part=part)}
    )
    return architecture, dict(build_model(architecture, seed=7).state_dict())


@pytest.fixture
def computed(monkeypatch):
    """Count the images that go through a trunk to be kept, without the one that shows the shape."""
    seen = []
    real = features_module.fixed_view

    def counted(block, *rest):
        seen.append(len(block))
        return real(block, *rest)

    monkeypatch.setattr(features_module, "fixed_view", counted)
    return seen


def kept(folder, images):
    architecture, base = frozen()
    model = Start(architecture, base).model(0)
    return ImageFeatures(folder).of(model, images, "none", 1)[0]


def test_each_image_goes_through_a_frozen_trunk_once_whoever_asks_and_however_it_is_dealt(tmp_path, computed):
    images = SITES["oak"].splits["train"].images
    whole = kept(tmp_path, images)
    computed.clear()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    assert torch.equal(kept(tmp_path, images[order]), whole[order])
    assert computed == [1], "the one that shows the shape"
    twice = torch.cat([SITES["elm"].splits["train"].images[:3]] * 2)
    computed.clear()
    assert torch.equal(*kept(tmp_path, twice).split(3))
    assert computed == [1, 3], "a picture that is there twice is computed once"


@pytest.mark.parametrize("lost", ["rows", "ids", "part of both"])
def test_features_that_were_half_written_are_computed_again_and_not_mixed_up(tmp_path, lost):
    images = SITES["oak"].splits["train"].images
    right = kept(tmp_path / "whole", images)
    kept(tmp_path / "f", images[:10])
    (rows,), (ids,) = (list((tmp_path / "f").glob(f"*.{kind}")) for kind in ("f32", "ids"))
    size = rows.stat().st_size // 10
    for file, unit in ((rows, size), (ids, 32)):
        if lost == "part of both" or lost == {rows: "rows", ids: "ids"}[file]:
            with file.open("r+b") as opened:
                opened.truncate(7 * unit + unit // 2)
    torch.testing.assert_close(kept(tmp_path / "f", images), right, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_baselines_train_the_same_part_on_kept_features_as_on_images(tmp_path):
    architecture, base = frozen()
    with_features, without = (
        Start(architecture, base, features=features) for features in (ImageFeatures(tmp_path), None)
    )
    recipe = RECIPE.model_copy(update={"augmentation": "none", "epochs": 2})
    for train in (
        lambda start: train_union(SITES, start, recipe, print)[0],
        lambda start: train_cyclic(SITES, list(SITES), start, recipe, 1, print)[0],
        lambda start: train_federated(SITES, start, recipe, 2, print, mu=0.5)[0],
        lambda start: train_scaffold(SITES, start, recipe, print)[0],
    ):
        found, expected = train(with_features), train(without)
        moved = [name for name in found if not torch.allclose(found[name], base[name], rtol=1e-5, atol=1e-7)]
        assert moved and all("blocks.0" not in name and "patch_embed" not in name for name in moved)
        for name in moved:
            torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=2e-3)


def test_thumbnails_are_pixels_of_small_images_and_levels_of_each_channel():
    images = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    images[1, 2] = 255
    found = thumbnails(images)
    assert found.shape == (2, 3 * THUMBNAIL**2 + 3 * len(PERCENTILES))
    assert not found[0].any()
    assert found[1].sum() == pytest.approx(THUMBNAIL**2 + len(PERCENTILES))


@pytest.mark.parametrize("name", ["thumbnails", "linear-pixels"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_models_without_a_network_learn_what_brightness_tells(name, multilabel):
    sites = {"oak": site_of("oak", 24, multilabel=multilabel), "elm": site_of("elm", 15, multilabel=multilabel)}
    model = picture_model(name, sites, RECIPE)
    cases = sites["elm"].splits["test"]
    found = model.probabilities(cases)
    if multilabel:
        assert ((found > 0.5) == (cases.labels.numpy() > 0.5)).mean() > 0.95
    else:
        assert (found.argmax(axis=1) == cases.labels.numpy()).mean() > 0.95
        np.testing.assert_allclose(found.sum(axis=1), 1)
    assert model.probabilities(cases.take([])).shape == (0, 3)


def test_the_discriminant_on_thumbnails_is_that_of_all_sites_images_together():
    found = picture_model("thumbnails", SITES, RECIPE).head
    parts = [[site.splits[split] for site in SITES.values()] for split in ("train", "val")]
    sums = [
        HeadSums.of(
            torch.from_numpy(thumbnails(torch.cat([part.images for part in split]))),
            torch.cat([part.labels for part in split]),
            3,
        )
        for split in parts
    ]
    np.testing.assert_allclose(found.weight, discriminant(*sums).weight, rtol=1e-9)


def test_a_logistic_regression_gives_a_class_that_nobody_has_next_to_no_probability():
    four = {name: replace(site, classes=("a", "b", "c", "d")) for name, site in SITES.items()}
    found = picture_model("linear-pixels", four, RECIPE).probabilities(four["oak"].splits["test"])
    assert found.shape[1] == 4 and found[:, 3].max() < 1e-4
    one = {
        "oak": replace(SITES["oak"], splits={**SITES["oak"].splits, "train": SITES["oak"].splits["train"].take([0, 3])})
    }
    assert picture_model("linear-pixels", one, RECIPE).probabilities(one["oak"].splits["test"])[:, 0].min() > 0.99


def test_a_linear_probe_changes_the_head_of_the_start_only():
    architecture, base = frozen("head")
    start = Start(architecture, base)
    state = linear_probe(start, SITES, RECIPE)
    assert {name for name in state if not torch.equal(state[name], base[name])} == {"head.weight", "head.bias"}


@pytest.fixture
def base(small_consortium):
    return {
        "data.source": str(small_consortium),
        "federation.sites": "ash,birch",
        "chain.backbone": "test_convnext",
        "chain.epochs": 1,
        "chain.batch-size": 16,
        "student.rounds": 1,
        "student.finetune-rounds": 1,
        "student.epochs": 2,
        "federation.precision": "fp32",
        "federation.threads": 1,
    }


def test_every_arm_of_a_study_starts_with_the_head_that_the_chain_starts_with(base):
    chain, union = configure_arms(["chain", "union"], [], {**base, "chain.head": "statistics"}, 0)
    sites = open_sites(chain.config)
    start = start_of(union.config, sites, None)
    assert start.state is not None and equal(start.state, start_of(chain.config, sites, None).state)
    (plain,) = configure_arms(["union"], [], base, 0)
    assert start_of(plain.config, sites, None).state is None
    assert plain.digest() != union.digest()


def test_a_refitted_model_differs_in_its_head_only(base):
    (union,) = configure_arms(["union-refit"], [], base, 0)
    sites = open_sites(union.config)
    model = dict(build_model(start_of(union.config, sites, None).architecture, seed=3).state_dict())
    found = refitted(union.config, sites, model, None)
    changed = {name for name in model if not torch.allclose(found[name], model[name], rtol=2e-3, atol=1e-4)}
    assert changed and all(name.startswith("head.fc.") for name in changed)


@pytest.mark.slow
def test_the_controls_of_a_critic_are_arms_and_an_interval_is_told_against_the_best_site(base, tmp_path):
    arms = "alone,thumbnails,linear-pixels,linear-probe,statistics,alone-statistics,fedavg-long,union-refit,scaffold"
    request = StudyRequest(base, arms.split(","), (), (0,), "statistics", folder=tmp_path / "study", jobs=1)
    report = run_study(request, PlainConsole(file=StringIO()))
    assert not report.result.failures
    arms_of = {arm.name: arm for arm in report.result.arms}
    for name in ("thumbnails", "linear-pixels", "linear-probe", "statistics"):
        assert arms_of[name].records[0].steps == 0
        assert {"balanced_accuracy", "macro_auc"} <= set(arms_of[name].over_best)
        assert arms_of[name].pooled["balanced_accuracy"].mean > 0
    assert arms_of["alone-statistics"].records[0].models == 2 and arms_of["alone-statistics"].records[0].best
    long, union = arms_of["fedavg-long"].records[0], arms_of["union-refit"].records[0]
    assert long.images == (1 + 2 * (1 + 1)) * union.images, "the chain's passes, and its student's"
    alone = arms_of["alone"].records[0]
    best = arms_of["statistics"].over_best["balanced_accuracy"]
    assert best.mean == pytest.approx(
        arms_of["statistics"].records[0].pooled.balanced_accuracy - alone.best.pooled.balanced_accuracy
    )


@pytest.mark.slow
def test_arms_are_not_ranked_where_a_class_has_too_few_test_images(base, tmp_path, monkeypatch):
    request = StudyRequest(base, ["alone-statistics", "statistics"], (), (0,), folder=tmp_path / "study", jobs=1)
    result = run_study(request, PlainConsole(file=StringIO())).result
    counted = result.rarest.cases
    shown = {}
    for fewest in (counted, counted + 1):
        monkeypatch.setattr(results_module, "FEWEST_CASES", fewest)
        headers = [str(column.header) for column in study_table(result).columns]
        assert f"macro AUC (rarest class: {counted} images)" in headers
        shown[fewest] = [header for header in headers if "minus" in header], notes(result)
    assert len(shown[counted][0]) == 3 and not any("no ranking" in line for line in shown[counted][1])
    assert not shown[counted + 1][0] and not any("Differences" in line for line in shown[counted + 1][1])
    (said,) = [line for line in shown[counted + 1][1] if line.startswith("no ranking")]
    assert f"'{result.rarest.name}' has {counted} test images" in said
