"""Teachers that see the image beside a report or a table: what they see, whom it serves, and that it is found again."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from small_recipes import SMALL_LINK, SMALL_TRAINING

from chainward_client.data.site_data import SiteData
from chainward_client.privileged import targets
from chainward_client.privileged.targets import privileged_targets
from chainward_client.training.features import Features
from chainward_client.training.link import train_link
from chainward_client.training.passes import StartImages
from chainward_shared.errors import ModelError
from chainward_shared.models import Start, build_model, resolve_architecture
from chainward_shared.models.start import initial_model
from chainward_shared.preprocessing import Pixels, to_float
from chainward_shared.recipes import PrivilegedRecipe
from chainward_simulations.phantoms.cases import phantom_site

PIXELS = Pixels(mean=(0.4,), std=(0.2,))
RECIPE = PrivilegedRecipe(use="text", epochs=10, text_features=16, hidden=8, image=True)
PLAIN = resolve_architecture("test_vit", num_classes=5, in_chans=1, image_size=32, pretrained=True)
START = PLAIN.model_copy(
    update={"start": Start(name="test_vit", file="0" * 64, digest="1" * 64, part="head"), "pixels": PIXELS}
)


def base(seed: int = 3) -> dict[str, torch.Tensor]:
    state = build_model(PLAIN, seed).state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def seen(images: torch.Tensor, **changes: object) -> StartImages:
    return replace(StartImages(START, base(), images, 1), **changes)


@pytest.fixture(scope="module")
def phantoms() -> SiteData:
    return phantom_site(0, 5, image_size=32)


@pytest.fixture
def train_teacher(monkeypatch: pytest.MonkeyPatch) -> Mock:
    spy = Mock(wraps=targets.train_teacher)
    monkeypatch.setattr(targets, "train_teacher", spy)
    return spy


def answered(data: SiteData, image: StartImages | None, cache=None, recipe=RECIPE):
    return privileged_targets(data, data.splits["train"], recipe, SMALL_TRAINING, cache, image=image)


@pytest.mark.parametrize("kept", [None, Features(None)])
def test_a_teacher_sees_the_frozen_starts_embedding_of_the_image_beside_the_report(phantoms, train_teacher, kept):
    images = phantoms.splits["train"].images
    answered(phantoms, seen(images, features=kept))
    rows = train_teacher.call_args.args[0]  # of the teacher of all cases that have a report
    images = images[[bool(text) for text in phantoms.splits["train"].privileged.texts]]
    model = initial_model(START, 0, base()).eval()
    width = model.get_classifier().in_features
    with torch.no_grad():
        for row, image in zip(rows[:5], images[:5], strict=True):
            embedding = model.forward_head(model.forward_features(to_float(image[None], PIXELS)), pre_logits=True)[0]
            expected = embedding / embedding.square().mean().sqrt()
            torch.testing.assert_close(row[:width], expected, atol=2e-2 if kept else 1e-4, rtol=1e-3)
    assert rows.shape[1] == width + RECIPE.text_features


@pytest.mark.slow
def test_what_the_image_shows_is_known_to_the_teacher_where_the_report_says_nothing():
    data = phantom_site(0, 5, image_size=32)
    train = data.splits["train"]
    labels = torch.arange(len(train)) % 2
    images = train.images.clone() // 4 + 160 * labels[:, None, None, None].to(torch.uint8)
    silent = replace(train.privileged, texts=tuple("heart" for _ in range(len(train))))
    train = replace(train, images=images, labels=labels, privileged=silent)
    data = replace(data, splits={**data.splits, "train": train})
    recipe = RECIPE.model_copy(update={"epochs": 30})
    assert answered(data, seen(images), recipe=recipe).report["text"].balanced_accuracy > 0.9
    blind = answered(data, None, recipe=recipe.model_copy(update={"image": False}))
    assert blind.report["text"].balanced_accuracy < 0.7


def test_a_case_without_report_has_no_teacher_though_there_is_an_image(phantoms):
    train = phantoms.splits["train"]
    texts = (None, *train.privileged.texts[1:])
    data = replace(
        phantoms,
        splits={**phantoms.splits, "train": replace(train, privileged=replace(train.privileged, texts=texts))},
    )
    found = answered(data, seen(train.images))
    assert not found.available[0] and not found.taught[0].any()
    assert found.available.tolist() == [bool(text) for text in texts]
    assert found.available.any()


@pytest.mark.slow
def test_answers_are_found_again_for_the_same_images_and_start_alone(phantoms, train_teacher, tmp_path):
    images = phantoms.splits["train"].images
    first = answered(phantoms, seen(images), tmp_path)
    trained = train_teacher.call_count
    again = answered(phantoms, seen(images.clone(), threads=2), tmp_path)
    assert train_teacher.call_count == trained
    assert torch.equal(first.logits, again.logits)
    other = START.model_copy(update={"start": START.start.model_copy(update={"digest": "2" * 64})})
    changed = images.clone()
    changed[0, 0, 0, 0] ^= 1
    for image in (seen(changed), seen(images, architecture=other, base=base(4))):
        before = train_teacher.call_count
        answered(phantoms, image, tmp_path)
        assert train_teacher.call_count == before + trained
    blind = RECIPE.model_copy(update={"image": False})
    before = train_teacher.call_count
    assert not torch.equal(answered(phantoms, None, tmp_path, blind).logits, first.logits)
    assert train_teacher.call_count == before + trained


def test_teachers_are_the_same_beside_every_link_whatever_its_predecessor(phantoms, train_teacher, tmp_path):
    recipe = SMALL_LINK.model_copy(update={"epochs": 1, "privileged": RECIPE})
    features = Features(None)
    first, log = train_link(
        phantoms, START, recipe, None, strand=0, lap=0, base=base(), features=features, state_dir=tmp_path
    )
    trained = train_teacher.call_count
    assert trained > 0 and log.privileged
    train_link(phantoms, START, recipe, first, strand=0, lap=1, base=base(), features=features, state_dir=tmp_path)
    assert train_teacher.call_count == trained


def test_without_pretrained_weights_a_site_refuses_teachers_that_see_through_them(phantoms):
    with pytest.raises(ModelError, match=r"found none here; set chain\.start-from"):
        train_link(phantoms, PLAIN, SMALL_LINK.model_copy(update={"privileged": RECIPE}), None, strand=0, lap=0)


def test_an_image_is_seen_by_itself(phantoms):
    images = phantoms.splits["train"].images[:6]
    together = seen(images).vectors()
    others = seen(torch.cat([images[:1], images[1:].flip(0)])).vectors()
    np.testing.assert_allclose(together[0], others[0], atol=1e-5)
    assert not np.allclose(together[1], others[1], atol=1e-3)
