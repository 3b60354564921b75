"""EfficientNets and MobileNets: what of them is selected, against plain loops, and how the student is built and rebuilt."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from pydantic import ValidationError

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

NORM = ("weight", "bias", "running_mean", "running_var")
Pair = tuple[int, int]


def resolve(name: str, image_size: int = 64) -> Architecture:
    return resolve_architecture(name, num_classes=3, in_chans=1, image_size=image_size, pretrained=True)


def scrambled(model: Architecture) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 7
        for name, tensor in build_model(model, seed=0).state_dict().items()
    }


# --- selection, element by element ---

NETWORKS: dict[str, tuple[Pair, Pair, list[tuple[Pair, list[tuple[str, Pair, Pair | None]]]]]] = {
    # stem, features, and of each stage its width and the kind, inner width and squeezed width of each of the student's blocks:
    # (teacher, student), as timm builds them and half as wide and deep
    "test_efficientnet": (
        (24, 16),
        (256, 128),
        [
            ((16, 8), [("plain", (24, 16), None)]),
            ((24, 16), [("edge", (64, 32), None)]),
            ((32, 16), [("edge", (96, 64), None)]),
            ((48, 24), [("inverted", (128, 64), (8, 4))]),
            ((64, 32), [("inverted", (192, 96), (12, 6))]),
        ],
    ),
    "tf_efficientnet_lite0": (
        (32, 32),
        (1280, 1280),
        [
            ((16, 8), [("separable", (32, 32), None)]),
            ((24, 16), [("inverted", (96, 48), None)]),
            ((40, 24), [("inverted", (144, 96), None)]),
            ((80, 40), [("inverted", (240, 144), None), ("inverted", (480, 240), None)]),
            ((112, 56), [("inverted", (480, 240), None), ("inverted", (672, 336), None)]),
            ((192, 96), [("inverted", (672, 336), None), ("inverted", (1152, 576), None)]),
            ((320, 160), [("inverted", (1152, 576), None)]),
        ],
    ),
    "mobilenetv3_small_100": (
        (16, 16),
        (1024, 1024),
        [
            ((16, 8), [("separable", (16, 16), (8, 8))]),
            ((24, 16), [("inverted", (72, 40), None), ("inverted", (88, 56), None)]),
            ((40, 24), [("inverted", (96, 64), (24, 16)), ("inverted", (240, 144), (64, 40))]),
            ((48, 24), [("inverted", (120, 72), (32, 24))]),
            ((96, 48), [("inverted", (288, 144), (72, 40)), ("inverted", (576, 288), (144, 72))]),
            ((576, 288), [("plain", (96, 48), None)]),
        ],
    ),
}


def spread(length: int, count: int) -> list[int]:
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


def picked(sizes: Pair, variant: str) -> list[int]:
    """Every k-th channel where that is whole, else evenly spread; for B the next ones, or evenly out of those left over."""
    wide, narrow = sizes
    if wide % narrow == 0:
        step = wide // narrow
        return [i * step + (1 if variant == "B" and step > 1 else 0) for i in range(narrow)]
    first = spread(wide, narrow)
    if variant == "A":
        return first
    left = [i for i in range(wide) if i not in first]
    if len(left) >= narrow:
        return [left[i] for i in spread(len(left), narrow)]
    return sorted(left + [first[i] for i in spread(len(first), narrow - len(left))])


def take(tensor: torch.Tensor, *axes: list[int] | None) -> torch.Tensor:
    for dim, axis in enumerate(axes):
        if axis is not None:
            tensor = torch.stack([tensor.select(dim, i) for i in axis], dim)
    return tensor


def slow_efficientnet(name: str, state: dict[str, torch.Tensor], variant: str) -> dict[str, torch.Tensor]:
    stem_sizes, feature_sizes, stages = NETWORKS[name]
    taken = {}

    def weight(layer: str, *axes: list[int] | None) -> None:
        taken[f"{layer}.weight"] = take(state[f"{layer}.weight"], *axes)
        if f"{layer}.bias" in state:
            taken[f"{layer}.bias"] = take(state[f"{layer}.bias"], axes[0])

    def norm(layer: str, axis: list[int]) -> None:
        for part in NORM:
            taken[f"{layer}.{part}"] = take(state[f"{layer}.{part}"], axis)
        taken[f"{layer}.num_batches_tracked"] = state[f"{layer}.num_batches_tracked"]

    into = picked(stem_sizes, variant)
    weight("conv_stem", into)
    norm("bn1", into)
    for i, (sizes, blocks) in enumerate(stages):
        out = picked(sizes, variant)
        for j, (kind, wide_sizes, squeezed) in enumerate(blocks):
            at = f"blocks.{i}.{j}"
            wide = into if kind in ("plain", "separable") else picked(wide_sizes, variant)
            if kind == "plain":
                weight(f"{at}.conv", out, into)
                norm(f"{at}.bn1", out)
            if kind == "separable":
                weight(f"{at}.conv_dw", into)
                norm(f"{at}.bn1", into)
                weight(f"{at}.conv_pw", out, into)
                norm(f"{at}.bn2", out)
            if kind == "inverted":
                weight(f"{at}.conv_pw", wide, into)
                norm(f"{at}.bn1", wide)
                weight(f"{at}.conv_dw", wide)
                norm(f"{at}.bn2", wide)
                weight(f"{at}.conv_pwl", out, wide)
                norm(f"{at}.bn3", out)
            if kind == "edge":
                weight(f"{at}.conv_exp", wide, into)
                norm(f"{at}.bn1", wide)
                weight(f"{at}.conv_pwl", out, wide)
                norm(f"{at}.bn2", out)
            if squeezed:
                narrow = picked(squeezed, variant)
                weight(f"{at}.se.conv_reduce", narrow, wide)
                weight(f"{at}.se.conv_expand", wide, narrow)
            into = out
    features = picked(feature_sizes, variant)
    weight("conv_head", features, into)
    if "bn2.weight" in state:
        norm("bn2", features)
    weight("classifier", None, features)
    return taken


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_selected_as_by_plain_loops(name, variant):
    large = resolve(name)
    small = compact_architecture(large, width=0.5, depth=0.5)
    state = scrambled(large)
    selected = select_weights(state, large, small, variant)
    expected = slow_efficientnet(name, state, variant)
    assert selected.keys() == expected.keys()
    for key, tensor in selected.items():
        assert torch.equal(tensor, expected[key]), key
    build_model(small, 0).load_state_dict(selected)


def test_spread_layers_take_their_widths_from_the_blocks_they_come_from():
    large, small = resolve("mobilenetv3_small_100"), resolve("mobilenetv3_small_100")
    small = compact_architecture(large, width=1.0, depth=0.5)
    state = scrambled(large)
    selected = select_weights(state, large, small, selection=Selection(layers="spread"))
    # the last of three blocks, of which the student has two
    assert torch.equal(selected["blocks.4.1.conv_dw.weight"], state["blocks.4.2.conv_dw.weight"])
    assert torch.equal(selected["blocks.4.1.se.conv_reduce.bias"], state["blocks.4.2.se.conv_reduce.bias"])


# --- the student's sizes ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "efficientnet_b0", "efficientnet_es", "mobilenetv2_100", "mobilenetv3_large_100"]
)
@pytest.mark.parametrize("width", [0.75, 0.35])
def test_any_width_can_be_selected_and_gives_finite_answers(name, width):
    large = resolve(name)
    small = compact_architecture(large, width=width, depth=0.5)
    model = build_model(small, 0)
    model.load_state_dict(select_weights(build_model(large, 0).state_dict(), large, small))
    assert count_parameters(model) < count_parameters(build_model(large, 0))
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 1, 64, 64)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("large", "small"),
    [("efficientnet_b0", "tinynet_e"), ("tf_efficientnet_lite4", "tf_efficientnet_lite0"), ("lcnet_100", "lcnet_050")],
)
def test_a_smaller_one_of_the_same_design_can_be_named(large, small):
    student = compact_architecture(resolve(large), name=small)
    selected = select_weights(scrambled(resolve(large)), resolve(large), student)
    build_model(student, 0).load_state_dict(selected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("large", "small", "problem"),
    [
        ("efficientnet_b0", "efficientnet_lite0", r"only one of them has 'blocks\.\*\.\*\.se\.conv_"),
        ("tf_efficientnet_lite4", "efficientnet_lite0", "they pad their images differently"),
        ("mobilenetv2_120d", "efficientnet_lite0", "stage 2 has kernels of 1/5/1 instead of 1/3/1"),
    ],
)
def test_another_design_is_refused_with_the_difference(large, small, problem):
    with pytest.raises(ModelError, match=problem):
        compact_architecture(resolve(large), name=small)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fbnetc_100", "efficientnet_b1_pruned"])
def test_one_that_timm_has_in_fixed_sizes_only_wants_a_smaller_name(name):
    with pytest.raises(ModelError, match=f"'{name}' comes in the sizes that timm has names for.*student.model"):
        compact_architecture(resolve(name), width=0.5)


@pytest.mark.parametrize("name", ["mixnet_s", "efficientnet_b0_gn", "mobilenetv4_conv_small", "efficientnet_cc_b0_4e"])
def test_what_the_rules_do_not_cover_is_refused(name):
    with pytest.raises(ModelError, match=f"'{name}' can't be selected.*supported are .*efficientnet "):
        require_family(name)


@pytest.mark.parametrize("multiplier", [0, -1.0, 9.0, 1e300, True, "0.5", None, [0.5]])
def test_an_architecture_with_an_absurd_multiplier_is_refused_before_it_is_built(multiplier):
    with pytest.raises((ModelError, ValidationError), match="expected 1e-09 to 8"):
        Architecture(
            name="tf_efficientnet_lite0",
            num_classes=3,
            in_chans=1,
            image_size=64,
            options={"depth_multiplier": multiplier},
        )


def test_multipliers_of_another_kind_of_backbone_are_refused():
    architecture = Architecture(
        name="convnext_atto", num_classes=3, in_chans=1, image_size=64, options={"channel_multiplier": 0.5}
    )
    with pytest.raises(ModelError, match="'convnext_atto' comes in the sizes that timm has names for"):
        build_model(architecture, 0)


# --- timm ---


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_100"])
def test_plain_timm_rebuilds_a_student_from_the_metadata(name):
    large = resolve(name)
    student = compact_architecture(large, width=0.5, depth=0.67)
    metadata = json.loads(json.dumps(student.to_metadata()))
    module, function = metadata["timm.function"].split(":")
    model = getattr(importlib.import_module(module), function)(**json.loads(metadata["timm.kwargs"]))
    built = build_model(student, 1)
    model.load_state_dict(built.state_dict(), strict=True)
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), built.eval()(images))
    assert Architecture.from_metadata(metadata) == student


@pytest.mark.slow
def test_with_the_multipliers_that_its_name_stands_for_a_model_is_the_one_of_that_name():
    plain = resolve("tf_efficientnet_lite4")
    same = plain.model_copy(update={"options": {"channel_multiplier": 1.4, "depth_multiplier": 1.8}})
    first, second = build_model(plain, 3), build_model(same, 3)
    assert str(first) == str(second)
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in second.state_dict().items())
