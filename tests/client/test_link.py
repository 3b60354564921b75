"""What a link minimises beyond cross-entropy and distillation: attention, unlabelled images, privileged teachers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_recipes import SMALL_LINK

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.training.link import LinkObjective, labelled_cases, train_link, unlabelled_cases
from chainward_client.training.loop import train
from chainward_client.training.objective import Batch, Objective
from chainward_shared.distillation.attention import attention_transfer
from chainward_shared.distillation.losses import distillation_loss
from chainward_shared.models import Architecture, build_model, resolve_architecture
from chainward_shared.models.taps import Taps
from chainward_shared.preprocessing import to_float
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict, digest

RECIPE = SMALL_LINK.model_copy(
    update={
        "teacher_trust": "none",
    }
)


@pytest.fixture(params=["test_convnext", "test_vit"])
def architecture(request) -> Architecture:
    return resolve_architecture(request.param, num_classes=3, in_chans=1, image_size=32)


def cases_of(n: int, seed: int = 0) -> Cases:
    images = torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 1, 2, 0, 0, 1] * n)[:n]
    return Cases(images, labels, np.array([f"patient-{i}" for i in range(n)]))


def site(n: int = 24) -> SiteData:
    cases = cases_of(n)
    return SiteData("oak", ("a", "b", "c"), {"train": cases, "val": cases, "test": cases})


def batch(cases: Cases, unlabelled: torch.Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(cases.images, cases.labels, torch.arange(len(cases)), unlabelled, "none", generator)


def losses(recipe: LinkRecipe, model, predecessor, given: Batch) -> torch.Tensor:
    objective = LinkObjective(recipe, model, predecessor, torch.tensor([4, 3, 1]))
    objective.start(torch.device("cpu"), 1)
    objective.start_epoch(0)
    return objective.losses(model, given)


def state(architecture: Architecture, seed: int) -> StateDict:
    return {name: tensor.detach().clone() for name, tensor in build_model(architecture, seed).state_dict().items()}


def test_attention_transfer_is_added_with_its_weight(architecture):
    cases, model, predecessor = cases_of(8), build_model(architecture, 1).eval(), build_model(architecture, 2).eval()
    without = losses(RECIPE, model, predecessor, batch(cases))
    found = losses(RECIPE.model_copy(update={"attention_weight": 3.0}), model, predecessor, batch(cases))
    view = to_float(cases.images)
    with Taps(model, attention=True) as mine, Taps(predecessor, attention=True) as theirs:
        model(view), predecessor(view)
        expected = attention_transfer(mine.attention, theirs.attention)
    assert expected.min() > 0
    torch.testing.assert_close(found, without + 3.0 * expected)


@pytest.mark.slow
def test_attention_alone_can_teach_without_distillation_of_logits(architecture):
    recipe = RECIPE.model_copy(
        update={"distillation_weight": 0.0, "attention_weight": 1.0, "learning_rate": 3e-3, "epochs": 8}
    )
    data, predecessor = site(), state(architecture, 9)
    _, log = train_link(data, architecture, recipe.model_copy(update={"start": "fresh"}), predecessor, strand=0, lap=0)
    assert log.attention[-1] < log.attention[0]


def test_an_unlabelled_image_has_the_distillation_alone_and_no_cross_entropy(architecture):
    recipe = RECIPE.model_copy(update={"unlabelled_weight": 2.0})
    model, predecessor = build_model(architecture, 1).eval(), build_model(architecture, 2).eval()
    labelled, others = cases_of(6), cases_of(4, seed=5).images
    found = losses(recipe, model, predecessor, batch(labelled, others))
    torch.testing.assert_close(found[:6], losses(recipe, model, predecessor, batch(labelled)), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = 2.0 * distillation_loss(model(to_float(others)), predecessor(to_float(others)), 4.0)
    torch.testing.assert_close(found[6:], expected, rtol=1e-4, atol=1e-5)


def test_unlabelled_images_are_used_where_they_have_a_weight_and_only_there(architecture):
    recipe = RECIPE.model_copy(update={"label_fraction": 0.25, "unlabelled_weight": 1.0})
    data, predecessor = site(), state(architecture, 9)
    one, log = train_link(data, architecture, recipe, predecessor, strand=0, lap=0)
    assert log.unlabelled == len(unlabelled_cases(data, recipe).images) == 18
    assert len(log.unlabelled_loss) == recipe.epochs
    without = recipe.model_copy(update={"unlabelled_weight": 0.0})
    two, log = train_link(data, architecture, without, predecessor, strand=0, lap=0)
    assert (log.unlabelled, log.unlabelled_loss) == (0, [])
    assert digest(one) != digest(two)
    few = labelled_cases(data, recipe)
    small = SiteData("oak", ("a", "b", "c"), {"train": few, "val": few, "test": few})
    three, _ = train_link(
        small, architecture, without.model_copy(update={"label_fraction": 1.0}), predecessor, strand=0, lap=0
    )
    assert digest(two) == digest(three), "without a weight the images without labels might as well not be there"


def test_labelled_and_unlabelled_images_are_all_the_training_images_and_none_is_both():
    data, recipe = site(), RECIPE.model_copy(update={"label_fraction": 0.5})
    parts = [labelled_cases(data, recipe).images, unlabelled_cases(data, recipe).images]
    together = sorted(image.numpy().tobytes() for part in parts for image in part)
    assert together == sorted(image.numpy().tobytes() for image in data.splits["train"].images)
    assert len(unlabelled_cases(data, RECIPE).images) == 0


def test_the_first_link_uses_no_unlabelled_images_for_nobody_could_label_them(architecture):
    recipe = RECIPE.model_copy(update={"label_fraction": 0.5, "unlabelled_weight": 1.0})
    _, log = train_link(site(), architecture, recipe, None, strand=0, lap=0)
    assert log.unlabelled == 0
    assert log.unlabelled_loss == []


class Watching(Objective):
    """Cross-entropy that remembers the unlabelled images and the learning rate's effect."""

    def __init__(self) -> None:
        self.unlabelled: list[torch.Tensor] = []

    def losses(self, model, batch: Batch) -> torch.Tensor:
        if batch.unlabelled is not None:
            self.unlabelled.append(batch.unlabelled)
        logits = model(batch.view())
        loss = torch.nn.functional.cross_entropy(logits[: len(batch.labels)], batch.labels, reduction="none")
        return loss if batch.unlabelled is None else torch.cat([loss, 0.0 * logits[len(batch.labels) :].sum(dim=1)])


def test_every_unlabelled_image_is_seen_once_before_any_is_seen_again():
    architecture = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)
    cases, others, watching = cases_of(24), cases_of(30, seed=5).images, Watching()
    train(
        build_model(architecture, 1), cases, RECIPE.model_copy(update={"epochs": 5}), watching, "oak", unlabelled=others
    )
    seen = [image.numpy().tobytes() for part in watching.unlabelled for image in part]
    assert len(seen) == 5 * 24
    for start in range(0, 120, 30):
        assert len(set(seen[start : start + 30])) == 30


@pytest.mark.slow
def test_parts_of_a_training_share_one_learning_rate_schedule(monkeypatch):
    architecture = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    model = build_model(architecture, 1)
    train(model, cases_of(24), RECIPE.model_copy(update={"epochs": 6}), Watching(), "whole")
    whole, rates[:] = list(rates), []
    for index in range(3):
        train(model, cases_of(24), RECIPE, Watching(), "part", index, part=(index, 3))
    assert rates == pytest.approx(whole)
    assert len(whole) == 18
