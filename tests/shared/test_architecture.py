"""Naming, checking and building a backbone, and the sizes of a compact student."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError

from chainward_shared.errors import ModelError
from chainward_shared.models import (
    Architecture,
    build_model,
    compact_architecture,
    count_parameters,
    resolve_architecture,
    select_weights,
)
from chainward_shared.models.architecture import require_family


def resolve(name: str, image_size: int = 64, patch_size: int = 0) -> Architecture:
    return resolve_architecture(name, num_classes=3, in_chans=1, image_size=image_size, patch_size=patch_size)


def outputs(architecture: Architecture) -> torch.Tensor:
    images = torch.randn(2, architecture.in_chans, architecture.image_size, architecture.image_size)
    with torch.no_grad():
        return build_model(architecture, seed=0).eval()(images)


# --- naming and checking ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size", "patch_size"),
    [
        ("vit_tiny_patch16_224", 64, 0),
        ("vit_tiny_patch16_224", 28, 7),
        ("deit_tiny_distilled_patch16_224", 64, 0),
        ("convnext_atto", 64, 0),
        ("convnext_atto", 28, 1),
        ("resnet18", 28, 0),
    ],
)
def test_a_resolved_backbone_classifies_images_of_the_asked_size(name, image_size, patch_size):
    assert outputs(resolve(name, image_size, patch_size)).shape == (2, 3)


@pytest.mark.slow
def test_the_backbones_own_patch_size_is_kept_unless_another_is_asked_for():
    assert build_model(resolve("vit_tiny_patch16_224", 64)).patch_embed.patch_size == (16, 16)
    assert build_model(resolve("vit_tiny_patch16_224", 64, 8)).patch_embed.patch_size == (8, 8)


def test_only_backbones_that_take_an_image_size_are_given_one():
    assert resolve("vit_tiny_patch16_224", 64).options == {"img_size": 64}
    assert "img_size" not in resolve("convnext_atto", 64).options


def test_a_convnext_starts_with_its_blocks_switched_on():
    model = build_model(resolve("convnext_atto", 64), seed=0)
    assert float(model.stages[0].blocks[0].gamma.min()) == 1.0


def test_an_unknown_backbone_is_refused_with_the_nearest_known():
    with pytest.raises(ModelError, match="did you mean 'vit_tiny_patch16_224'"):
        resolve("vit_tyny_patch16_224")


@pytest.mark.parametrize("name", ["hf-hub:timm/vit_tiny_patch16_224", "hf_hub:x/y", "local-dir:/x", "timm/x"])
def test_a_name_that_would_load_from_elsewhere_is_refused(name):
    with pytest.raises(ModelError, match="names a place to load from"):
        resolve(name)
    with pytest.raises(ModelError, match="names a place to load from"):
        Architecture(name=name, num_classes=3, in_chans=1, image_size=64)


def test_the_tag_of_pretrained_weights_is_refused():
    with pytest.raises(ModelError, match=r"pretrained weights, 'augreg_in21k'.* use 'vit_tiny_patch16_224'"):
        resolve("vit_tiny_patch16_224.augreg_in21k")


@pytest.mark.parametrize(
    "option", ["pretrained", "checkpoint_path", "pretrained_cfg", "cache_dir", "num_classes", "in_chans"]
)
def test_an_option_that_loads_weights_or_contradicts_a_field_is_refused(option):
    with pytest.raises(ModelError, match=f"option '{option}'"):
        Architecture(name="resnet18", num_classes=3, in_chans=1, image_size=64, options={option: 1})


def test_an_image_that_patches_do_not_fill_is_refused():
    with pytest.raises(ModelError, match=r"images of 28 pixels .* 16-pixel patches .* e\.g\. 14"):
        resolve("vit_tiny_patch16_224", 28)


@pytest.mark.slow
def test_an_image_too_small_for_the_backbone_is_refused_with_what_fits():
    with pytest.raises(ModelError, match="28 pixels: choose images of at least 32 pixels or patch size 1"):
        resolve("convnext_atto", 28)
    assert outputs(resolve("convnext_atto", 32)).shape == (2, 3)
    assert outputs(resolve("convnext_atto", 28, 1)).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto_ols"])
def test_a_patch_size_that_the_backbone_would_ignore_is_refused(name):
    with pytest.raises(ModelError, match=f"'{name}' has no patch size"):
        resolve(name, 64, 4)


@pytest.mark.parametrize(
    "sizes", [{"num_classes": 0}, {"in_chans": 0}, {"image_size": 0}, {"image_size": -8}, {"patch_size": -1}]
)
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ModelError, match="vit_tiny_patch16_224"):
        resolve_architecture("vit_tiny_patch16_224", **{"num_classes": 3, "in_chans": 1, "image_size": 64} | sizes)


def test_an_architecture_is_frozen_and_takes_no_unknown_field():
    with pytest.raises(ValidationError):
        resolve("resnet18").name = "resnet34"
    with pytest.raises(ValidationError):
        Architecture(name="resnet18", num_classes=3, in_chans=1, image_size=64, extra=1)


def test_an_image_size_and_an_option_that_contradict_each_other_are_refused():
    with pytest.raises(ModelError, match="image_size 64 but the option img_size 32"):
        Architecture(name="vit_tiny_patch16_224", num_classes=3, in_chans=1, image_size=64, options={"img_size": 32})


# --- metadata ---


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_plain_timm_rebuilds_a_compact_model_from_the_metadata(name):
    compact = compact_architecture(resolve(name), width=0.5)
    metadata = compact.to_metadata()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items())
    state = build_model(compact, seed=1).state_dict()

    model = timm.create_model(metadata["timm.model"], pretrained=False, **json.loads(metadata["timm.kwargs"]))

    model.load_state_dict(state, strict=True)
    assert Architecture.from_metadata(metadata) == compact


def test_metadata_without_or_with_a_damaged_architecture_is_refused():
    with pytest.raises(ModelError, match=r"^here\.safetensors: its metadata have no 'chainward\.architecture'"):
        Architecture.from_metadata({"timm.model": "resnet18"}, Path("here.safetensors"))
    with pytest.raises(ModelError, match="is damaged: num_classes: field required"):
        Architecture.from_metadata({"chainward.architecture": '{"name": "resnet18", "in_chans": 1, "image_size": 8}'})
    with pytest.raises(ModelError, match=r"^here\.safetensors: .*is damaged"):
        Architecture.from_metadata({"chainward.architecture": "{"}, Path("here.safetensors"))


# --- building ---


def test_the_seed_decides_every_weight():
    architecture = resolve("vit_tiny_patch16_224")
    first, again, other = (build_model(architecture, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_a_seeded_model_neither_depends_on_nor_disturbs_the_global_generators():
    architecture = resolve("convnext_atto")
    torch.manual_seed(1)
    first = build_model(architecture, seed=5).state_dict()
    torch.manual_seed(2)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    again = build_model(architecture, seed=5).state_dict()
    compact_architecture(architecture)

    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(3)
    expected = timm.create_model("resnet18", num_classes=3, in_chans=1).state_dict()
    torch.manual_seed(3)
    built = build_model(resolve("resnet18")).state_dict()
    assert all(torch.equal(built[name], expected[name]) for name in expected)


def test_a_model_that_timm_cannot_build_is_named_with_the_reason_in_one_line():
    broken = Architecture(
        name="vit_tiny_patch16_224", num_classes=3, in_chans=1, image_size=64, options={"embed_dim": 100}
    )
    with pytest.raises(ModelError, match=r"can't build 'vit_tiny_patch16_224'.*divisible") as error:
        build_model(broken, seed=0)
    assert "\n" not in str(error.value)


def test_parameters_are_counted_whether_frozen_or_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))
    model[0].requires_grad_(False)
    assert count_parameters(model) == 3 * 4 + 4 + 4 * 2


# --- families ---


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("vit_tiny_patch16_224", "vit"),
        ("deit_small_patch16_224", "vit"),
        ("deit_tiny_distilled_patch16_224", "vit"),
        ("deit3_small_patch16_224", "vit"),
        ("convnext_atto_ols", "convnext"),
        ("convnextv2_atto", "convnext"),
        ("resnetv2_18", "resnetv2"),
        ("resnetv2_50d_gn", "resnetv2"),
    ],
)
def test_the_family_follows_from_what_timm_builds(name, family):
    assert require_family(name).name == family


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "regnetx_002",
        "swin_tiny_patch4_window7_224",
        "vit_tiny_r_s16_p8_224",
        "vit_small_patch16_rope_224",
        "vit_small_patch16_18x2_224",
        "vit_relpos_small_patch16_224",
    ],
)
def test_a_backbone_outside_the_families_is_refused_by_name(name):
    with pytest.raises(ModelError, match=f"'{name}'.*convnext.*vit"):
        require_family(name)


# --- compact students ---


def test_a_half_as_wide_vit_keeps_its_heads_and_depth():
    compact = compact_architecture(resolve("vit_tiny_patch16_224"))
    model = build_model(compact)
    assert (model.embed_dim, model.blocks[0].attn.num_heads, len(model.blocks)) == (96, 3, 12)
    assert outputs(compact).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("width", [0.9, 0.7, 0.33, 0.3, 0.1, 0.01])
def test_any_width_of_a_vit_is_a_multiple_of_8_and_of_its_heads(width):
    model = build_model(compact_architecture(resolve("vit_small_patch16_224"), width=width))
    assert model.embed_dim % 8 == 0
    assert model.embed_dim % model.blocks[0].attn.num_heads == 0
    assert model.embed_dim < 384


@pytest.mark.slow
def test_the_heads_of_a_vit_become_fewer_only_where_they_no_longer_fit():
    model = build_model(compact_architecture(resolve("vit_small_patch16_224"), width=0.02))
    assert (model.embed_dim, model.blocks[0].attn.num_heads) == (8, 4)


@pytest.mark.slow
def test_a_convnext_is_scaled_stage_by_stage():
    compact = compact_architecture(resolve("convnext_tiny"), width=0.5, depth=0.5)
    assert compact.options | {"dims": [48, 96, 192, 384], "depths": [2, 2, 5, 2]} == compact.options
    shallow = compact_architecture(resolve("convnext_atto"), width=0.5, depth=0.01)
    assert shallow.options | {"dims": [24, 40, 80, 160], "depths": [1, 1, 1, 1]} == shallow.options
    assert outputs(shallow).shape == (2, 3)


@pytest.mark.slow
def test_a_named_student_has_its_own_sizes_and_the_teachers_images_and_patches():
    large = resolve("vit_small_patch16_224", 28, 7)
    compact = compact_architecture(large, name="vit_tiny_patch16_224")
    assert compact == resolve("vit_tiny_patch16_224", 28, 7)


@pytest.mark.slow
def test_a_named_student_of_a_dinov2_has_its_layer_scale():
    """The case of weight selection's paper: a ViT-Ti, 192 wide with 3 heads, out of a ViT-S with 6, even and odd ones."""
    large = resolve("vit_small_patch14_dinov2", image_size=28)
    compact = compact_architecture(large, name="vit_tiny_patch16_224")
    teacher = build_model(large, seed=0).state_dict()
    student, auxiliary = (select_weights(teacher, large, compact, which) for which in ("A", "B"))
    assert build_model(compact).blocks[0].attn.num_heads == 3
    for name in ("blocks.11.ls1.gamma", "blocks.0.norm1.weight"):
        assert student[name].shape == (192,)
    weight = teacher["blocks.3.attn.qkv.weight"].reshape(3, 6, 64, 384)
    assert torch.equal(student["blocks.3.attn.qkv.weight"], weight[:, 0::2, :, 0::2].reshape(576, 192))
    assert torch.equal(auxiliary["blocks.3.attn.qkv.weight"], weight[:, 1::2, :, 1::2].reshape(576, 192))


@pytest.mark.slow
def test_a_named_student_of_a_compact_teacher_does_not_inherit_its_sizes():
    large = compact_architecture(resolve("vit_base_patch16_224"), width=0.5)
    compact = compact_architecture(large, name="vit_tiny_patch16_224")
    assert build_model(compact).embed_dim == 192


def test_a_student_as_large_as_its_teacher_is_refused():
    with pytest.raises(ModelError, match="as large as its teacher"):
        compact_architecture(resolve("convnext_atto"), width=1.0)
    with pytest.raises(ModelError, match="as large as its teacher"):
        compact_architecture(resolve("vit_tiny_patch16_224"), name="deit_tiny_patch16_224")


def test_a_student_larger_than_its_teacher_in_one_dimension_is_refused():
    with pytest.raises(ModelError, match="embedding width 384, at most 192"):
        compact_architecture(resolve("vit_tiny_patch16_224"), name="vit_small_patch16_224")
    with pytest.raises(ModelError, match="number of blocks 12, at most 6"):
        shallow = compact_architecture(resolve("vit_small_patch16_224"), width=1.0, depth=0.5)
        compact_architecture(shallow, name="vit_tiny_patch16_224")


def test_a_student_of_another_family_is_refused():
    with pytest.raises(ModelError, match=r"of the family convnext, its teacher .* is of vit"):
        compact_architecture(resolve("vit_small_patch16_224"), name="convnext_atto")
    with pytest.raises(ModelError, match="'resnet18' can't be selected"):
        compact_architecture(resolve("vit_small_patch16_224"), name="resnet18")
    with pytest.raises(ModelError, match="'resnet18' can't be selected"):
        compact_architecture(resolve("resnet18"))


def test_a_student_with_components_that_its_teacher_lacks_is_refused():
    with pytest.raises(ModelError, match=r"only one of them has .stages\.\*\.blocks\.\*\.mlp\.grn"):
        compact_architecture(resolve("convnext_tiny"), name="convnextv2_atto")


@pytest.mark.parametrize("factors", [{"width": 0.0}, {"width": 1.5}, {"depth": -1.0}, {"depth": 2.0}])
def test_factors_outside_0_to_1_are_refused(factors):
    with pytest.raises(ModelError, match=r"within \(0, 1\]"):
        compact_architecture(resolve("vit_tiny_patch16_224"), **factors)
