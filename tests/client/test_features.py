"""The kept output of a frozen trunk: that it is the trunk's, that it is computed once, and where it ends."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest
import torch
import yaml
from private_hospital import POLICY, hospital

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.evaluation import class_probabilities
from chainward_client.site import open_site
from chainward_client.training import features as module
from chainward_client.training.augmentation import FIXED_VIEWS, augmented, fixed_view
from chainward_client.training.features import BLOCK, Features, is_features, one_view
from chainward_client.training.link import train_link
from chainward_shared.config import RunConfig
from chainward_shared.models import Start, build_model, resolve_architecture
from chainward_shared.models.trunk import trunk_of
from chainward_shared.pixels import Pixels
from chainward_shared.preprocessing import scaled_for, to_float

PIXELS = Pixels(mean=(0.4,), std=(0.2,))


def architecture(backbone="test_vit", part="head"):
    plain = resolve_architecture(backbone, num_classes=3, in_chans=1, image_size=32, pretrained=True)
    start = Start(name=backbone, file="0" * 64, digest="0" * 64, part=part)
    return plain.model_copy(update={"start": start, "pixels": PIXELS})


def images(n=10, seed=0):
    return torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch):
    """Count the blocks of images that go through a trunk."""
    seen = []
    real = module.fixed_view
    monkeypatch.setattr(
        module,
        "fixed_view",
        lambda block, kind, view, pixels: seen.append(len(block)) or real(block, kind, view, pixels),
    )
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("part", ["head", "last-1", "last-2"])
@pytest.mark.parametrize(
    "backbone",
    [
        "test_vit",
        "test_convnext",
        "test_efficientnet",
        "test_resnet",
        "resnetv2_18",
        "mobilenetv3_small_050",
        "regnety_002",
        "densenet121",
    ],
)
def test_trunk_and_rest_are_the_model(backbone, part):
    model = build_model(architecture(backbone, part), seed=1).eval()
    trunk = trunk_of(model)
    x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(trunk.rest(trunk(x)), model(x))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    trunk.rest(trunk(x).detach()).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


TRANSFORMERS = [
    ({}, 5, 1),
    ({"init_values": 0.1, "qk_norm": True}, 5, 1),
    ({"reg_tokens": 4}, 9, 5),
    ({"class_token": False, "global_pool": "avg"}, 4, 4),
]
"""Options, tokens of four patches and others, and how many of them the classifier needs of the last block."""


def transformer(options):
    this = architecture(part="last-2").model_copy(update={"options": options})
    model = build_model(this, seed=1).eval()
    return model, trunk_of(model)


@pytest.mark.parametrize(("options", "tokens", "needed"), TRANSFORMERS)
def test_the_last_block_works_on_the_tokens_that_the_classifier_needs(options, tokens, needed):
    model, trunk = transformer(options)
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    trunk.rest(trunk(torch.randn(2, 1, 32, 32)))
    assert seen == [*[tokens] * (len(model.blocks) - 1), needed]


@pytest.mark.parametrize("options", [options for options, _, _ in TRANSFORMERS])
def test_the_rest_has_the_gradients_of_the_whole_model(options):
    model, trunk = transformer(options)
    model.double()
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), trained)
    found = torch.autograd.grad(trunk.rest(trunk(x)).square().sum(), trained)
    for mine, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, whole)


@pytest.mark.parametrize("part", ["all", "norms-and-biases"])
def test_a_model_that_is_trained_from_its_stem_on_has_no_trunk(part):
    assert trunk_of(build_model(architecture(part=part), seed=0)) is None


def test_a_model_without_a_start_has_no_trunk():
    assert trunk_of(build_model(architecture().model_copy(update={"start": None}), seed=0)) is None


def test_a_division_that_does_not_do_what_the_model_does_is_not_used(monkeypatch):
    model = build_model(architecture(), seed=0)
    right = model.forward_head
    monkeypatch.setattr(model, "forward_head", lambda x, pre_logits=False: right(x, pre_logits) + 0.1 * pre_logits)
    assert trunk_of(model) is None


@pytest.mark.parametrize("kind", ["none", "upright", "all-orientations"])
@pytest.mark.parametrize("folder", [True, False])
def test_features_are_what_the_trunk_says_of_each_view(kind, folder, tmp_path):
    model = build_model(architecture(part="last-1"), seed=0)
    found, trunk = Features(tmp_path / "f" if folder else None).of(model, images(), kind, threads=1)
    assert is_features(found) and found.shape[:2] == (10, FIXED_VIEWS[kind])
    for view in range(FIXED_VIEWS[kind]):
        with torch.no_grad():
            expected = torch.cat([trunk(fixed_view(image[None], kind, view, PIXELS)) for image in images()])
        torch.testing.assert_close(found[:, view].float(), expected, rtol=2e-3, atol=2e-3)


def test_features_are_computed_once_and_only_the_owner_may_read_them(tmp_path, calls):
    model = build_model(architecture(), seed=0)
    first, _ = Features(tmp_path / "f").of(model, images(), "upright", 1)
    before = len(calls)
    again, _ = Features(tmp_path / "f").of(build_model(architecture(), seed=0), images(), "upright", 1)
    assert len(calls) - before == FIXED_VIEWS["upright"], "a first block shows the shape; no more is computed"
    assert torch.equal(first, again)
    (file,) = (tmp_path / "f").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o700


@pytest.mark.parametrize("change", ["image", "start", "pixels", "part", "views"])
def test_other_images_weights_scaling_or_views_have_features_of_their_own(change, tmp_path):
    folder, this, of = tmp_path / "f", architecture(part="last-1"), images()
    Features(folder).of(build_model(this, 0), of, "none", 1)
    kind = "upright" if change == "views" else "none"
    if change == "image":
        of = of.clone()
        of[3, 0, 5, 5] ^= 1
    if change == "pixels":
        this = this.model_copy(update={"pixels": Pixels(mean=(0.1,), std=(0.2,))})
    if change == "start":
        this = this.model_copy(update={"start": this.start.model_copy(update={"digest": "1" * 64})})
    if change == "part":
        this = architecture(part="last-2")
    Features(folder).of(build_model(this, 0), of, kind, 1)
    assert len(list(folder.iterdir())) == 2


def test_a_computation_that_was_interrupted_goes_on_where_it_was(tmp_path, monkeypatch, calls):
    of, model = images(3 * BLOCK + 5), build_model(architecture(), seed=0)
    whole, _ = Features(tmp_path / "whole").of(model, of, "none", 1)
    calls.clear()
    real = module.fixed_view

    def stops(block, kind, view, pixels):
        if len(calls) == 4:  # one shows the shape
            raise KeyboardInterrupt
        return real(block, kind, view, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(module, "fixed_view", stops)
        with pytest.raises(KeyboardInterrupt):
            Features(tmp_path / "f").of(model, of, "none", 1)
    (part,) = (tmp_path / "f").iterdir()
    part.write_bytes(part.read_bytes()[:-7])  # killed in the middle of a write
    calls.clear()
    again, _ = Features(tmp_path / "f").of(model, of, "none", 1)
    assert torch.equal(again, whole) and len(calls) == 1 + 2, "two blocks were whole, two were computed"
    assert not list((tmp_path / "f").glob("*.part"))


def test_a_file_that_was_cut_is_computed_again(tmp_path):
    model = build_model(architecture(), seed=0)
    first, _ = Features(tmp_path / "f").of(model, images(), "none", 1)
    first = first.clone()
    (file,) = (tmp_path / "f").iterdir()
    os.truncate(file, file.stat().st_size - 2)
    again, _ = Features(tmp_path / "f").of(model, images(), "none", 1)
    assert torch.equal(first, again)


def test_features_that_would_take_more_than_the_site_allows_are_not_kept(tmp_path):
    model = build_model(architecture(), seed=0)
    assert Features(tmp_path / "f", limit=100).of(model, images(), "none", 1) is None
    assert not (tmp_path / "f").exists()


def test_what_was_used_longest_ago_makes_room(tmp_path):
    model = build_model(architecture(), seed=0)
    Features(tmp_path / "f").of(model, images(seed=0), "none", 1)
    (first,) = (tmp_path / "f").iterdir()
    os.utime(first, (1, 1))
    size = first.stat().st_size
    limited = Features(tmp_path / "f", limit=2 * size)
    limited.of(model, images(seed=1), "none", 1)
    assert first.exists()
    limited.of(model, images(seed=2), "none", 1)
    assert not first.exists() and len(list((tmp_path / "f").iterdir())) == 2


def test_features_beyond_half_precision_are_not_used(tmp_path):
    model = build_model(architecture(), seed=0)
    with torch.no_grad():
        model.norm.weight.mul_(1e7)
    assert Features(tmp_path / "f").of(model, images(), "upright", 1) is None
    assert Features(tmp_path / "f").of(model, images(), "none", 1) is not None, "scores need no half precision"


def beyond_half_for_one(pictures):
    """A model whose trunk says of one of the images alone what half precision can't hold, and which that is."""
    model = build_model(architecture(), seed=0).eval()
    with torch.no_grad():
        largest = trunk_of(model)(fixed_view(pictures, "none", 0, PIXELS)).abs().flatten(1).amax(dim=1)
        second, first = largest.sort().values[-2:]
        for parameter in (model.norm.weight, model.norm.bias):
            parameter.mul_(torch.finfo(torch.float16).max / ((first + second) / 2))
    return model, int(largest.argmax())


@pytest.mark.parametrize("folder", [True, False])
def test_under_privacy_an_image_that_half_precision_cant_hold_changes_nothing_of_the_others(folder, tmp_path):
    model, large = beyond_half_for_one(images())
    others = torch.arange(10) != large
    assert Features(None).of(model, images(), "upright", 1) is None
    whole, rest = (
        Features(tmp_path / name if folder else None, declared=10).of(model, pictures, "upright", 1)[0]
        for name, pictures in (("whole", images()), ("rest", images()[others]))
    )
    assert bool(whole.isfinite().all())
    assert torch.equal(whole[others], rest)


def test_under_privacy_the_declared_number_of_images_decides_whether_there_is_room():
    model = build_model(architecture(), seed=0)
    of_one = 4 * Features(None).of(model, images(), "none", 1)[0][0].numel()
    for declared, kept in ((3, True), (4, False)):
        for n in (1, 10):
            found = Features(None, limit=3 * of_one, declared=declared).of(model, images(n), "none", 1)
            assert (found is not None) == kept


def test_a_site_with_a_policy_decides_by_what_it_declares(tmp_path):
    for name, policy in (("open", {}), ("private", {"privacy": POLICY})):
        hospital(tmp_path / name)
        config = yaml.safe_load((tmp_path / name / "site.yaml").read_text())
        config = {key: value for key, value in config.items() if key != "privacy"} | policy
        (tmp_path / name / "site.yaml").write_text(yaml.safe_dump(config))
        declared = open_site(tmp_path / name / "site.yaml").features.declared
        assert declared == (POLICY["units"] if policy else None)


def test_one_view_of_each_row_is_drawn():
    kept = torch.arange(6 * 4, dtype=torch.float16).reshape(6, 4, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([one_view(kept, generator) for _ in range(200)])
    assert drawn.dtype == torch.float32 and drawn.shape == (200, 6, 1)
    for row in range(6):
        assert set(drawn[:, row, 0].tolist()) == set(kept[row, :, 0].tolist())


def test_fixed_views_are_those_of_each_image_alone():
    for kind, views in FIXED_VIEWS.items():
        for view in range(views):
            together = fixed_view(images(5), kind, view, PIXELS)
            alone = torch.cat([fixed_view(image[None], kind, view, PIXELS) for image in images(5)])
            torch.testing.assert_close(together, alone)
        assert torch.equal(fixed_view(images(5), kind, 0), to_float(images(5)))


def test_views_of_all_orientations_are_the_eight_of_a_square():
    image = images(1)
    found = {tuple(fixed_view(image, "all-orientations", view).flatten().tolist()) for view in range(8)}
    plain = to_float(image)
    expected = {
        tuple(torch.rot90(turned, k, dims=(2, 3)).flatten().tolist())
        for turned in (plain, plain.flip(2))
        for k in range(4)
    }
    assert len(found) == 8 and found == expected


def test_upright_views_differ_and_stay_near_the_image():
    views = torch.stack([fixed_view(images(3), "upright", view) for view in range(4)])
    for one in range(4):
        for other in range(one):
            assert not torch.allclose(views[one], views[other])
    assert torch.equal(augmented(images(3), "none", torch.Generator()), views[0])


def data(n=12):
    cases = Cases(images(n), torch.arange(n) % 3, np.array([f"p{i}" for i in range(n)]))
    return SiteData("north", ("a", "b", "c"), dict.fromkeys(("train", "val", "test"), cases))


def recipe(**changes):
    return RunConfig.from_flat(
        {"chain.epochs": 2, "chain.batch-size": 4, "data.augmentation": "none", **changes}
    ).link_recipe()


@pytest.mark.parametrize("part", ["head", "last-2"])
@pytest.mark.parametrize("predecessor", [False, True])
def test_a_link_on_features_is_the_link_on_images(part, predecessor):
    this = architecture(part=part)
    base = {name: t for name, t in build_model(this, 0).state_dict().items() if not name.startswith("head.")}
    before = dict(build_model(this, 5).state_dict()) | {n: base[n] for n in base} if predecessor else None
    settings = recipe(**{"chain.label-fraction": 0.5, "chain.unlabelled-weight": 0.5, "federation.precision": "fp32"})
    kept, plain = (
        train_link(data(), this, settings, before, strand=0, lap=0, base=base, features=features)
        for features in (Features(None), None)
    )
    for name, tensor in plain[0].items():
        torch.testing.assert_close(kept[0][name], tensor, rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.tensor(kept[1].loss), torch.tensor(plain[1].loss), rtol=0.02, atol=0.02)


def test_attention_transfer_looks_at_images(calls):
    this = architecture(part="last-2")
    base = {name: t for name, t in build_model(this, 0).state_dict().items() if not name.startswith("head.")}
    state = dict(build_model(this, 5).state_dict()) | base
    train_link(
        data(),
        this,
        recipe(**{"chain.attention-weight": 1.0}),
        state,
        strand=0,
        lap=0,
        base=base,
        features=Features(None),
    )
    assert calls == []


def test_scores_on_features_are_those_on_images(tmp_path, calls):
    model = build_model(architecture(part="last-1"), seed=0)
    cases = Cases(images(), torch.zeros(10, dtype=torch.int64), np.array([f"p{i}" for i in range(10)]))
    plain = class_probabilities(model, cases, 3, threads=1)
    for _ in range(2):
        found = class_probabilities(model, cases, 3, threads=1, features=Features(tmp_path / "f"))
        np.testing.assert_allclose(found, plain, atol=1e-6)
    assert len(calls) == 3, "the first block twice, to see the shape"
    assert scaled_for(model, images()).shape == (10, 1, 32, 32)
