"""Which part of a model is trained, travels, and how a model that starts from pretrained weights is put together."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from chainward_shared.errors import ModelError, WeightsError
from chainward_shared.models import Architecture, Start, build_model, resolve_architecture, skeleton
from chainward_shared.models.parts import batch_norms, classifier_names, layer_groups, trained_names
from chainward_shared.models.start import (
    initial_model,
    mixes_images,
    train_mode,
    travelling,
    travelling_names,
    travelling_template,
    whole,
)
from chainward_shared.pixels import Pixels
from chainward_shared.preprocessing import pixels_of, scaled_for, to_float

DIGEST = "0" * 64


def architecture(backbone="test_vit", part="all", **changes):
    plain = resolve_architecture(backbone, num_classes=3, in_chans=3, image_size=64, pretrained=True)
    start = Start(name=backbone, file=DIGEST, digest=DIGEST, part=part)
    return plain.model_copy(update={"start": start, **changes})


def names(backbone, part):
    return trained_names(skeleton(architecture(backbone)), part)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    [
        "test_vit",
        "test_convnext",
        "test_efficientnet",
        "test_resnet",
        "resnet18",
        "densenet121",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_parts_grow_from_the_classifier_to_all(backbone):
    model = skeleton(architecture(backbone))
    blocks = len(layer_groups(model)) - 2
    parts = [names(backbone, part) for part in ["head", *(f"last-{n}" for n in range(1, blocks + 1)), "all"]]
    assert parts[0] == classifier_names(model) and parts[-1] == {name for name, _ in model.named_parameters()}
    for smaller, larger in itertools.pairwise(parts):
        assert smaller < larger
    stem = set(layer_groups(model)[0])
    assert stem and not stem & parts[-2], "all blocks are not the stem"


def test_the_last_blocks_of_a_vit_are_those_and_what_follows_them():
    assert {name.split(".")[0] for name in names("test_vit", "last-1")} == {"blocks", "norm", "head"} | (
        {"fc_norm"} if "fc_norm.weight" in names("test_vit", "all") else set()
    )
    assert {name.split(".")[1] for name in names("test_vit", "last-2") if name.startswith("blocks")} == {"4", "5"}


def test_norms_and_biases_are_all_vectors_and_the_classifier():
    model = skeleton(architecture("test_convnext"))
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    assert names("test_convnext", "norms-and-biases") == vectors | classifier_names(model)
    assert any(name.endswith("gamma") for name in vectors)


def test_more_blocks_than_there_are_is_refused_with_how_many_there_are():
    with pytest.raises(ModelError, match="the last 7 blocks of VisionTransformer are to be trained, it has 6"):
        names("test_vit", "last-7")


@pytest.mark.parametrize("part", ["", "last", "last-0", "last-", "last-1000", "Head", "head\n", "last--1", "norms"])
def test_a_part_of_another_name_is_refused(part):
    with pytest.raises(ValidationError, match=r"all, last-N \(N from 1\), norms-and-biases or head"):
        Start(name="x", file=DIGEST, digest=DIGEST, part=part)


@pytest.mark.parametrize("part", ["all", "head", "norms-and-biases", "last-1"])
@pytest.mark.parametrize("backbone", ["test_vit", "test_efficientnet"])
def test_a_built_model_trains_its_part_and_nothing_else(backbone, part):
    model = build_model(architecture(backbone, part), seed=0)
    train_mode(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad += 1.0  # what happens to have no gradient moves, too
    optimiser.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == names(backbone, part) == travelling_names(architecture(backbone, part))


def test_the_statistics_of_batch_norm_are_frozen_with_a_start_and_only_then():
    started, fresh = architecture("test_efficientnet"), architecture("test_efficientnet", start=None)
    for of, frozen in ((started, True), (fresh, False)):
        model = build_model(of, seed=0)
        train_mode(model)
        assert model.training and all(layer.training is not frozen for layer in batch_norms(model))
        assert mixes_images(model) is not frozen
        before = [buffer.clone() for buffer in model.buffers()]
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        together, alone = model(images), torch.cat([model(image[None]) for image in images]) if frozen else None
        if alone is not None:
            torch.testing.assert_close(together, alone)
        assert all(map(torch.equal, before, model.buffers())) is frozen


@pytest.mark.parametrize("part", ["all", "head", "last-2"])
def test_what_travelled_and_the_base_are_the_whole_model_again(part):
    this = architecture("test_efficientnet", part)
    state = dict(build_model(this, seed=1).state_dict())
    base = {name: tensor for name, tensor in state.items() if name not in classifier_names(skeleton(this))}
    sent = travelling(state, this)
    assert set(sent) == set(travelling_template(this)) == travelling_names(this)
    changed = {name: tensor + 1 for name, tensor in sent.items()}
    again = whole(changed, this, base)
    assert list(again) == list(state)
    assert all(torch.equal(again[name], changed.get(name, state[name])) for name in state)


def test_a_part_without_its_base_is_refused():
    this = architecture("test_vit", "head")
    with pytest.raises(WeightsError, match=r"lack .* missing in all.: the base they go on is another one"):
        whole(travelling(build_model(this, seed=0).state_dict(), this), this, None)


def test_a_model_without_a_start_travels_whole():
    this = architecture("test_efficientnet", start=None)
    assert travelling_names(this) == set(skeleton(this).state_dict())


def test_a_chain_begins_with_the_base_and_a_classifier_by_the_seed():
    this = architecture("test_vit", "head")
    head = classifier_names(skeleton(this))
    base = {name: torch.full_like(t, 0.5) for name, t in build_model(this, 0).state_dict().items() if name not in head}
    first, other = (initial_model(this, seed, base).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], base[name]) for name in base)
    assert torch.equal(first["head.weight"], build_model(this, 1).state_dict()["head.weight"])
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize(("start", "base", "words"), [(True, None, "lacks the weights"), (False, {}, "has no use for")])
def test_a_start_and_its_base_belong_together(start, base, words):
    this = architecture("test_vit") if start else architecture("test_vit", start=None)
    with pytest.raises(WeightsError, match=words):
        initial_model(this, 0, base)


def test_an_architecture_without_a_start_is_written_as_before_there_were_any():
    this = Architecture(name="test_vit", num_classes=2, in_chans=1, image_size=160)
    assert set(this.model_dump()) == {"name", "num_classes", "in_chans", "image_size", "options"}
    assert "start" not in this.model_dump_json() and "pixels" not in this.to_metadata()["chainward.architecture"]


def test_an_architecture_with_a_start_survives_its_metadata():
    this = architecture("test_vit", "last-2", pixels=Pixels(mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25)))
    assert Architecture.from_metadata(this.to_metadata()) == this


def test_pixels_of_other_channels_are_refused():
    pixels = Pixels(mean=(0.5,), std=(0.5,))
    with pytest.raises(ModelError, match="reads 3 channels, its pixels have 1 means"):
        Architecture(name="test_vit", num_classes=2, in_chans=3, image_size=160, pixels=pixels)


def test_a_model_sees_pixels_scaled_as_its_architecture_says():
    pixels = Pixels(mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = build_model(architecture("test_vit", pixels=pixels), seed=0)
    assert pixels_of(model) == pixels
    expected = torch.stack([(images[:, c] / 255 - pixels.mean[c]) / pixels.std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(scaled_for(model, images), expected)
    assert torch.equal(scaled_for(build_model(architecture("test_vit", start=None), 0), images), to_float(images))
