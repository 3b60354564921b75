"""The residual networks with group norm: how they are built, and selected, against plain loops over indices."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch.func import functional_call, grad, vmap

from chainward_shared.errors import ModelError
from chainward_shared.models import (
    Architecture,
    Selection,
    build_model,
    compact_architecture,
    count_parameters,
    resolve_architecture,
    select_weights,
)
from chainward_shared.models.architecture import require_family

GROUPS = 32


def resolve(name: str = "resnetv2_18", image_size: int = 32) -> Architecture:
    return resolve_architecture(name, num_classes=3, in_chans=1, image_size=image_size)


def sized(channels: list[int], layers: list[int], name: str = "resnetv2_18", **options) -> Architecture:
    options = {"channels": channels, "layers": layers, "norm_layer": "groupnorm"} | options
    return Architecture(name=name, num_classes=3, in_chans=1, image_size=32, options=options)


def scrambled(model: Architecture) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 7
        for name, tensor in build_model(model, seed=0).state_dict().items()
    }


# --- what is built ---


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [32, 64, 224])
@pytest.mark.parametrize("name", ["resnetv2_18", "resnetv2_18d", "resnetv2_50t"])
def test_the_chain_builds_them_with_group_norm_for_any_usual_image(name, image_size):
    architecture = resolve(name, image_size)
    model = build_model(architecture, 0).eval()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    with torch.no_grad():
        assert model(torch.randn(2, 1, image_size, image_size)).isfinite().all()


def test_a_model_with_group_norm_of_its_own_is_left_as_it_is():
    assert resolve("resnetv2_50d_gn").options == {}


def test_plain_timm_rebuilds_one_and_its_student_from_the_metadata():
    large = resolve()
    for architecture in (large, compact_architecture(large, width=0.5, depth=0.67)):
        metadata = architecture.to_metadata()
        model = timm.create_model(metadata["timm.model"], pretrained=False, **json.loads(metadata["timm.kwargs"]))
        model.load_state_dict(build_model(architecture, 1).state_dict(), strict=True)


def in_training_mode(architecture: Architecture, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return build_model(architecture, 0).train()(images)


@pytest.mark.slow
def test_every_image_is_treated_on_its_own_as_private_training_needs():
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    together = in_training_mode(resolve(), images)
    alone = torch.cat([in_training_mode(resolve(), image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    with_batch_norm = Architecture(name="resnetv2_18", num_classes=3, in_chans=1, image_size=64)
    images = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    together = in_training_mode(with_batch_norm, images)
    alone = torch.cat([in_training_mode(with_batch_norm, images[i : i + 2]) for i in (0, 2)])
    assert not torch.allclose(together, alone, rtol=1e-2, atol=1e-3)


def test_gradients_of_single_examples_are_those_of_one_image_batches():
    model = build_model(sized([32, 32, 64, 64], [1, 1, 1, 1], stem_chs=32), 0)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def loss(values, image):
        return functional_call(model, values, (image[None],)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(per_sample[name][i], value.grad, rtol=1e-3, atol=1e-4)


# --- the student's sizes ---


def test_a_student_with_the_default_sizes_has_less_than_a_quarter_of_the_parameters():
    large = resolve()
    small = compact_architecture(large, width=0.5, depth=0.67)
    counts = [count_parameters(build_model(architecture, 0)) for architecture in (large, small)]
    assert 1e6 < counts[0] < 12e6
    assert counts[1] < counts[0] / 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnetv2_18", "resnetv2_18d", "resnetv2_50", "resnetv2_50t", "resnetv2_50d_gn"])
@pytest.mark.parametrize("width", [0.75, 0.5, 0.33, 0.05])
def test_any_width_consists_of_whole_groups_and_can_be_selected(name, width):
    large = resolve(name)
    small = compact_architecture(large, width=width, depth=0.5)
    selected = select_weights(build_model(large, 0).state_dict(), large, small)
    model = build_model(small, 0)
    model.load_state_dict(selected)
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 1, 32, 32)).isfinite().all()


def test_a_width_that_is_not_made_of_whole_groups_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"num_channels \(40\) must be divisible by num_groups \(32\)"):
        build_model(sized([40, 64, 64, 64], [1, 1, 1, 1]), 0)


@pytest.mark.parametrize(
    ("large", "small", "problem"),
    [
        (
            sized([64, 64, 64, 128], [1, 1, 1, 1]),
            sized([32, 32, 32, 64], [1, 1, 1, 1], norm_layer="groupnorm1", stem_chs=32),
            "1 groups of channels in the norms instead of 32",
        ),
        (
            sized([128, 128, 128, 128], [1, 1, 1, 1]),
            sized([64, 64, 64, 64], [1, 1, 1, 1]),
            "only one of them changes the width between the stem and the first stage",
        ),
        (sized([64, 64, 64, 64], [1, 1, 1, 1]), sized([64, 64, 64], [1, 1, 1]), "3 stages instead of 4"),
        (
            sized([256, 256, 256, 256], [1, 1, 1, 1], "resnetv2_50"),
            sized([64, 64, 64, 64], [1, 1, 1, 1]),
            r"only one of them has 'stages\.\*\.blocks\.\*\.conv3\.weight'",
        ),
    ],
)
def test_a_student_that_is_built_differently_is_refused_with_the_difference(large, small, problem):
    with pytest.raises(ModelError, match=problem):
        select_weights(scrambled(large), large, small)


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50x1_bit", "resnetv2_50d_evos", "regnety_002"])
def test_what_the_rules_do_not_cover_is_refused_with_what_they_do(name):
    with pytest.raises(ModelError, match=f"'{name}' can't be selected.*supported are convnext .*resnetv2 .*vit "):
        require_family(name)


# --- selection, element by element ---


def within_groups(teacher: int, student: int, variant: str, groups: int = GROUPS) -> list[int]:
    """Out of each group the same channels: the even or the odd ones of twice as many."""
    wide, narrow = teacher // groups, student // groups
    assert wide in (narrow, 2 * narrow, 4 * narrow)
    chosen = []
    for group in range(groups):
        for i in range(narrow):
            step = wide // narrow
            chosen.append(group * wide + i * step + (1 if variant == "B" and step > 1 else 0))
    return chosen


def take(tensor: torch.Tensor, *axes: list[int] | None) -> torch.Tensor:
    for dim, axis in enumerate(axes):
        if axis is not None:
            tensor = torch.stack([tensor.select(dim, i) for i in axis], dim)
    return tensor


def slow_resnetv2_18(state, teacher: list[int], student: list[int], layers: list[int], variant: str, norm: list[str]):
    """Select a network of basic blocks whose stem is as wide as its first stage."""
    widths = [within_groups(t, s, variant) for t, s in zip(teacher, student, strict=True)]
    taken = {"stem.conv.weight": take(state["stem.conv.weight"], widths[0])}
    for stage, width in enumerate(widths):
        before = widths[max(stage - 1, 0)]
        for block in range(layers[stage]):
            place = f"stages.{stage}.blocks.{block}"
            into = before if block == 0 else width
            if block == 0 and stage > 0:
                name = f"{place}.downsample.conv.weight"
                taken[name] = take(state[name], width, before)
            for layer, axes in (("conv1.weight", (width, into)), ("conv2.weight", (width, width))):
                taken[f"{place}.{layer}"] = take(state[f"{place}.{layer}"], *axes)
            for layer, axis in (("norm1", into), ("norm2", width)):
                for part in norm:
                    taken[f"{place}.{layer}.{part}"] = take(state[f"{place}.{layer}.{part}"], axis)
                if "running_mean" in norm:
                    name = f"{place}.{layer}.num_batches_tracked"
                    taken[name] = state[name]
    for part in norm:
        taken[f"norm.{part}"] = take(state[f"norm.{part}"], widths[-1])
    if "running_mean" in norm:
        taken["norm.num_batches_tracked"] = state["norm.num_batches_tracked"]
    taken["head.fc.weight"] = take(state["head.fc.weight"], None, widths[-1])
    taken["head.fc.bias"] = state["head.fc.bias"]
    return taken


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize(
    ("norm_layer", "parts"),
    [("groupnorm", ["weight", "bias"]), ("batchnorm", ["weight", "bias", "running_mean", "running_var"])],
)
def test_a_network_is_selected_as_by_plain_loops(norm_layer, parts, variant):
    wide, narrow = [64, 128, 128, 256], [32, 64, 128, 64]
    large = sized(wide, [2, 1, 2, 1], norm_layer=norm_layer)
    small = sized(narrow, [1, 1, 2, 1], norm_layer=norm_layer, stem_chs=32)
    state = scrambled(large)
    selected = select_weights(state, large, small, variant)
    expected = slow_resnetv2_18(state, wide, narrow, [1, 1, 2, 1], variant, parts)
    assert selected.keys() == expected.keys()
    for name, tensor in selected.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnetv2_50", "resnetv2_50d_gn", "resnetv2_50t"])
@pytest.mark.parametrize("channels", ["strided", "consecutive", "random"])
def test_bottlenecks_and_deep_stems_are_selected_whole_and_the_two_students_share_nothing(name, channels):
    large = resolve(name).model_copy(update={"options": {"layers": [1, 2, 1, 1], **resolve(name).options}})
    small = compact_architecture(large, width=0.5)
    shapes = {key: tensor.shape for key, tensor in build_model(large, 0).state_dict().items()}
    marks = {key: torch.arange(shape.numel(), dtype=torch.float64).reshape(shape) for key, shape in shapes.items()}
    taken = {v: select_weights(marks, large, small, v, selection=Selection(channels)) for v in "AB"}
    expected = build_model(small, 0).state_dict()
    for key in expected:
        assert taken["A"][key].shape == expected[key].shape
        shared = set(taken["A"][key].flatten().tolist()) & set(taken["B"][key].flatten().tolist())
        narrower = shapes[key] != expected[key].shape
        assert not shared or not narrower, key


@pytest.mark.parametrize("channels", ["strided", "consecutive", "random"])
def test_every_group_of_the_student_is_taken_out_of_the_same_group_of_the_teacher(channels):
    large = sized([128, 128, 256, 512], [1, 1, 1, 1], stem_chs=128)
    small = sized([64, 64, 128, 256], [1, 1, 1, 1])
    state = scrambled(large)
    state["norm.weight"] = torch.arange(512.0) // (512 // GROUPS)
    for variant in ("A", "B"):
        found = select_weights(state, large, small, variant, selection=Selection(channels))["norm.weight"]
        assert torch.equal(found, torch.arange(256.0) // (256 // GROUPS))
