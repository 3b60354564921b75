"""The variants of weight selection: other channels, heads and layers, and students for images of another size."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import checkpoint_filter_fn

from chainward_shared.errors import ModelError
from chainward_shared.models import Architecture, Selection, build_model, compact_architecture, select_weights
from chainward_shared.models.indices import select_indices, select_layers

State = dict[str, torch.Tensor]

CONSISTENT = ("strided", "consecutive", "random")
CHANNELS = (*CONSISTENT, "random-inconsistent")


def architecture(name: str, image_size: int = 32, **options) -> Architecture:
    return Architecture(name=name, num_classes=3, in_chans=1, image_size=image_size, options=options)


def vit(embed_dim: int, heads: int, depth: int = 2, image_size: int = 32, patch_size: int = 8, **options):
    sizes = {"embed_dim": embed_dim, "num_heads": heads, "depth": depth, "patch_size": patch_size}
    return architecture("vit_tiny_patch16_224", image_size, img_size=image_size, **sizes | options)


def convnext(dims: list[int], depths: list[int] | None = None, name: str = "convnext_atto", **options):
    return architecture(name, dims=dims, depths=depths or [1, 2, 1, 1], **options)


def resnet(channels: list[int], layers: list[int] | None = None, norm_layer: str = "groupnorm"):
    sizes = {"channels": channels, "layers": layers or [1, 2, 1, 1], "stem_chs": channels[0]}
    return architecture("resnetv2_18", norm_layer=norm_layer, **sizes)


def scrambled(model: Architecture) -> State:
    generator = torch.Generator().manual_seed(1)
    state = build_model(model, seed=0).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def outputs(model: Architecture, state: State) -> torch.Tensor:
    built = build_model(model, seed=9)
    built.load_state_dict(state)
    images = torch.randn(4, 1, model.image_size, model.image_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return built.eval()(images)


def positions(large: Architecture, small: Architecture, variant: str, selection: Selection) -> dict[str, torch.Tensor]:
    """Where in the teacher's tensors, laid out flat, the student's numbers come from."""
    shapes = {name: tensor.shape for name, tensor in build_model(large, 0).state_dict().items()}
    marks = {n: torch.arange(s.numel(), dtype=torch.float64).reshape(s) for n, s in shapes.items()}
    return {n: taken.long() for n, taken in select_weights(marks, large, small, variant, selection=selection).items()}


# --- indices ---

sizes = st.integers(1, 64).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t)))


def indices(teacher: int, student: int, variant: str, channels: str, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return select_indices(teacher, student, variant, channels, generator).tolist()


@given(sizes, st.sampled_from(CHANNELS), st.sampled_from("AB"), st.integers(0, 3))
def test_channels_are_ascending_distinct_and_within_the_teacher(size, channels, variant, seed):
    teacher, student = size
    found = indices(teacher, student, variant, channels, seed)
    assert found == sorted(set(found))
    assert len(found) == student
    assert 0 <= found[0] <= found[-1] < teacher


@given(sizes, st.sampled_from(CHANNELS), st.integers(0, 3))
def test_student_and_auxiliary_teacher_share_no_more_channels_than_they_must(size, channels, seed):
    teacher, student = size
    shared = set(indices(teacher, student, "A", channels, seed)) & set(indices(teacher, student, "B", channels, seed))
    assert len(shared) == max(0, 2 * student - teacher)


def test_consecutive_channels_are_the_first_and_those_that_follow():
    assert indices(8, 3, "A", "consecutive") == [0, 1, 2]
    assert indices(8, 3, "B", "consecutive") == [3, 4, 5]
    assert indices(5, 3, "B", "consecutive") == [2, 3, 4]


def test_random_channels_follow_from_the_seed():
    assert indices(64, 32, "A", "random", 1) == indices(64, 32, "A", "random", 1)
    assert indices(64, 32, "A", "random", 1) != indices(64, 32, "A", "random", 2)


def test_unknown_channels_and_layers_are_refused():
    with pytest.raises(ModelError, match="no channels 'best': choose strided, consecutive"):
        indices(4, 2, "A", "best")
    with pytest.raises(ModelError, match="no layers 'last': choose first or spread"):
        select_layers(4, 2, "last")


@given(sizes)
def test_spread_layers_are_distinct_and_hold_the_first_and_the_last(size):
    teacher, student = size
    found = select_layers(teacher, student, "spread")
    assert found == sorted(set(found))
    assert len(found) == student
    assert found[0] == 0
    assert student == 1 or found[-1] == teacher - 1
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1, "evenly"


# --- consistency ---

PAIRS = {
    "vit": (vit(48, 3, norm_layer="rmsnorm"), vit(24, 3, norm_layer="rmsnorm")),
    "convnext": (
        convnext([32, 48, 64, 80], name="convnext_atto_rms"),
        convnext([16, 24, 32, 40], name="convnext_atto_rms"),
    ),
    "convnext with two convolutions in the stem": (
        convnext([32, 48, 64, 80], name="convnext_atto_rms", stem_type="overlap"),
        convnext([16, 24, 32, 40], name="convnext_atto_rms", stem_type="overlap"),
    ),
}


def alive_where_selected(large: Architecture, small: Architecture, variant: str, selection: Selection) -> State:
    """A teacher all of whose weights are 0 but for those that are selected: nothing flows through other channels."""
    state = {name: tensor * 0.2 for name, tensor in scrambled(large).items()}
    for name, tensor in state.items():
        if "norm" in name or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.fill_(1.0)
    alive = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for name, taken in positions(large, small, variant, selection).items():
        alive[name].view(-1)[taken.flatten()] = state[name].view(-1)[taken.flatten()]
    return alive


def as_wide_as_before(selected: State, small: Architecture) -> State:
    """Correct the two constants that depend on the width: the mean in an RMS norm, the scale of the attention."""
    corrected = {name: tensor.clone() for name, tensor in selected.items()}
    for name, tensor in corrected.items():
        if "norm" in name or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.mul_(2**0.5)
        elif "qkv" in name:
            tensor[: small.options["embed_dim"]].mul_(0.5**0.5)
    return corrected


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("channels", CONSISTENT)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_teacher_whose_signal_is_in_the_selected_channels_only_is_reproduced(pair, channels, variant):
    """Every axis that two tensors share must be selected alike in both, or signal would be lost."""
    large, small = PAIRS[pair]
    selection = Selection(channels, seed=4)
    teacher = alive_where_selected(large, small, variant, selection)
    student = select_weights(teacher, large, small, variant, selection=selection)
    found = outputs(small, as_wide_as_before(student, small))
    assert outputs(large, teacher).std() > 1e-3
    torch.testing.assert_close(found, outputs(large, teacher), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_inconsistent_control_loses_the_signal(pair):
    large, small = PAIRS[pair]
    teacher = alive_where_selected(large, small, "A", Selection("random", seed=4))
    student = select_weights(teacher, large, small, "A", selection=Selection("random-inconsistent", seed=4))
    found = outputs(small, as_wide_as_before(student, small))
    assert not torch.allclose(found, outputs(large, teacher), rtol=0.1, atol=1e-2)


def with_every_channel_twice(state: State, large: Architecture) -> State:
    """The same function in twice the channels, each beside its copy: inputs are halved, as there are two of each."""
    twice = {}
    for name, tensor in build_model(large, 0).state_dict().items():
        source = state[name]
        for dim in range(source.ndim):
            if tensor.shape[dim] == 2 * source.shape[dim]:
                source = source.repeat_interleave(2, dim)
        twice[name] = source * input_factor(name, state[name], tensor)
        if "qkv" in name:  # twice the channels of a head double its products, and its scale is 1 / sqrt(2)
            twice[name][: len(source) // 3] *= 0.5**0.5
    return twice


def input_factor(name: str, small: torch.Tensor, large: torch.Tensor) -> float:
    reads = small.ndim >= 2 and name not in ("cls_token", "pos_embed")
    return 0.5 if reads and large.shape[1] == 2 * small.shape[1] else 1.0


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize(
    ("large", "small"),
    [
        pytest.param(vit(48, 3), vit(24, 3), id="vit"),
        pytest.param(convnext([16, 32, 48, 64]), convnext([8, 16, 24, 32]), id="convnext"),
        pytest.param(resnet([64, 128, 128, 256]), resnet([32, 64, 64, 128]), id="resnet with group norm"),
        pytest.param(
            resnet([64, 128, 128, 256], norm_layer="batchnorm"),
            resnet([32, 64, 64, 128], norm_layer="batchnorm"),
            id="resnet with batch norm",
        ),
    ],
)
def test_from_a_small_model_with_every_channel_twice_the_small_model_is_selected(large, small, variant):
    built = build_model(small, 7)
    generator = torch.Generator().manual_seed(3)
    state = {
        name: tensor + 0.1 * torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in built.state_dict().items()
    }
    twice = with_every_channel_twice(state, large)
    torch.testing.assert_close(outputs(large, twice), outputs(small, state), rtol=1e-3, atol=1e-4)
    for name, found in select_weights(twice, large, small, variant).items():
        expected = state[name] * input_factor(name, state[name], twice[name])
        if "qkv" in name:
            expected[: len(expected) // 3] *= 0.5**0.5
        assert torch.equal(found, expected), name


def test_a_random_axis_has_a_draw_of_its_own_and_the_same_one_wherever_it_occurs():
    large, small = vit(48, 3), vit(24, 3)
    state = scrambled(large)
    taken = positions(large, small, "A", Selection("random"))
    embedding = taken["norm.weight"]
    for name in ("cls_token", "patch_embed.proj.bias", "blocks.0.norm1.weight", "blocks.1.mlp.fc2.bias"):
        assert torch.equal(taken[name].flatten(), embedding), name
    assert taken["blocks.0.attn.qkv.weight"][0].remainder(48).tolist() == embedding.tolist()
    hidden = taken["blocks.0.mlp.fc1.bias"]
    assert hidden.tolist() == taken["blocks.1.mlp.fc1.bias"].tolist()
    assert embedding.tolist() != hidden[:24].tolist()
    other = select_weights(state, large, small, selection=Selection("random", seed=1))
    assert not torch.equal(other["norm.weight"], state["norm.weight"][embedding])


def test_the_inconsistent_control_draws_for_every_tensor_anew():
    large, small = vit(48, 3), vit(24, 3)
    taken = positions(large, small, "A", Selection("random-inconsistent"))
    assert taken["norm.weight"].tolist() != taken["norm.bias"].tolist()
    assert taken["blocks.0.norm1.weight"].tolist() != taken["blocks.1.norm1.weight"].tolist()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(
    ("large", "small"),
    [(vit(48, 4), vit(24, 2)), (convnext([16, 32, 48, 64]), convnext([8, 16, 24, 32]))],
)
def test_the_two_students_of_half_a_model_share_no_weight(large, small, channels):
    taken = {v: positions(large, small, v, Selection(channels, seed=2)) for v in "AB"}
    shared = {
        name
        for name in taken["A"]
        if set(taken["A"][name].flatten().tolist()) & set(taken["B"][name].flatten().tolist())
    }
    assert shared <= {"head.bias", "head.fc.bias"}


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_student_of_equal_size_is_the_teacher_however_it_is_selected(channels):
    for large in (vit(24, 3), convnext([8, 16, 24, 32])):
        state = scrambled(large)
        found = select_weights(state, large, large, "B", selection=Selection(channels, "whole", "spread"))
        assert all(torch.equal(found[name], state[name]) for name in state)


# --- heads ---


@pytest.mark.parametrize("variant", ["A", "B"])
def test_mixed_heads_are_strided_over_queries_keys_and_values_each(variant):
    large, small = vit(48, 3), vit(24, 2)
    taken = positions(large, small, variant, Selection(heads="mixed"))
    first = 0 if variant == "A" else 1
    within = list(range(first, 48, 2))
    assert taken["blocks.0.attn.qkv.bias"].tolist() == [part * 48 + i for part in range(3) for i in within]
    assert taken["blocks.1.attn.proj.weight"][0].remainder(48).tolist() == within


def test_mixed_heads_take_from_all_heads_where_whole_heads_take_from_some():
    large, small = vit(48, 4), vit(24, 2)
    mixed, whole = (
        positions(large, small, "A", Selection(heads=heads))["blocks.0.attn.qkv.bias"][:24] // 12
        for heads in ("mixed", "whole")
    )
    assert set(mixed.tolist()) == {0, 1, 2, 3}
    assert set(whole.tolist()) == {0, 2}


def test_norms_of_single_heads_can_not_be_mixed():
    large, small = vit(48, 3, qk_norm=True), vit(24, 3, qk_norm=True)
    with pytest.raises(ModelError, match=r"heads can't be mixed .* select whole heads"):
        select_weights(scrambled(large), large, small, selection=Selection(heads="mixed"))


# --- layers ---


def test_spread_layers_of_a_vit_are_evenly_spread():
    large, small = vit(24, 3, depth=5), vit(24, 3, depth=3)
    state = scrambled(large)
    found = select_weights(state, large, small, selection=Selection(layers="spread"))
    for mine, theirs in ((0, 0), (1, 2), (2, 4)):
        assert torch.equal(found[f"blocks.{mine}.mlp.fc1.weight"], state[f"blocks.{theirs}.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("large", "small"),
    [
        (convnext([8, 16, 24, 32], [2, 1, 6, 3]), convnext([8, 16, 24, 32], [1, 1, 3, 2])),
        (resnet([32, 32, 64, 64], [2, 1, 6, 3]), resnet([32, 32, 64, 64], [1, 1, 3, 2])),
    ],
)
def test_spread_layers_are_spread_over_each_stage(large, small):
    state = scrambled(large)
    found = select_weights(state, large, small, selection=Selection(layers="spread"))
    for stage, chosen in enumerate(([0], [0], [0, 2, 5], [0, 2])):
        for mine, theirs in enumerate(chosen):
            names = [name for name in found if name.startswith(f"stages.{stage}.blocks.{mine}.")]
            assert names
            for name in names:
                source = name.replace(f"blocks.{mine}.", f"blocks.{theirs}.")
                assert torch.equal(found[name], state[source]), name


# --- other images, other patches ---


def test_a_vit_student_for_other_images_gets_the_positions_that_timm_resamples():
    large = vit(24, 3)
    small = vit(24, 3, image_size=48)
    state = build_model(large, 4).state_dict()
    found = select_weights(state, large, small)
    expected = checkpoint_filter_fn(dict(state), build_model(small, 0))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert found["pos_embed"].shape == (1, 37, 24)


def test_a_vit_student_with_other_patches_gets_the_embedding_that_timm_resamples():
    large = vit(24, 3)
    small = vit(24, 3, image_size=48, patch_size=12)
    state = build_model(large, 4).state_dict()
    found = select_weights(state, large, small)
    assert torch.equal(found["pos_embed"], state["pos_embed"]), "the grid of patches is the same"
    expected = resample_patch_embed(state["patch_embed.proj.weight"], [12, 12])
    assert torch.equal(found["patch_embed.proj.weight"], expected)
    assert torch.equal(found["head.weight"], state["head.weight"])


@pytest.mark.parametrize("channels", CONSISTENT)
def test_resampling_goes_with_the_selection_of_channels(channels):
    large, small = vit(48, 3, depth=3), vit(24, 3, image_size=64, patch_size=4)
    state = build_model(large, 4).state_dict()
    selection = Selection(channels)
    found = select_weights(state, large, small, "B", selection=selection)
    unchanged = select_weights(state, large, vit(24, 3), "B", selection=selection)
    positions_of_small = resample_abs_pos_embed(unchanged["pos_embed"], [16, 16], [4, 4])
    torch.testing.assert_close(found["pos_embed"], positions_of_small)
    patches = resample_patch_embed(unchanged["patch_embed.proj.weight"], [4, 4])
    torch.testing.assert_close(found["patch_embed.proj.weight"], patches)
    for name in set(found) - {"pos_embed", "patch_embed.proj.weight"}:
        assert torch.equal(found[name], unchanged[name]), name
    assert outputs(small, found).isfinite().all()


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_tokens_that_are_no_patches_are_not_resampled(name):
    options = {"embed_dim": 24, "num_heads": 3, "depth": 1, "patch_size": 8}
    large = architecture(name, 32, img_size=32, **options)
    small = architecture(name, 48, img_size=48, **options)
    state = build_model(large, 4).state_dict()
    found = select_weights(state, large, small)
    expected = checkpoint_filter_fn(dict(state), build_model(small, 0))
    assert torch.equal(found["pos_embed"], expected["pos_embed"])
    assert outputs(small, found).shape == (4, 3)


@pytest.mark.parametrize("large", [convnext([8, 16, 24, 32]), resnet([32, 32, 64, 64])])
def test_a_convolutional_student_works_on_other_images_with_the_same_weights(large):
    small = compact_architecture(large, width=1.0, depth=0.5, image_size=64)
    as_before = compact_architecture(large, width=1.0, depth=0.5)
    assert (small.image_size, as_before.image_size) == (64, 32)
    state = build_model(large, 4).state_dict()
    found, expected = select_weights(state, large, small), select_weights(state, large, as_before)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert outputs(small, found).shape == (4, 3)
    assert small.to_metadata()["chainward.image_size"] == "64"


@pytest.mark.slow
def test_a_student_of_another_size_is_named_by_it_and_timm_is_told():
    small = compact_architecture(vit(48, 3), image_size=48, patch_size=12)
    assert (small.image_size, small.options["img_size"], small.options["patch_size"]) == (48, 48, 12)
    named = compact_architecture(vit(384, 6, depth=12), name="vit_tiny_patch16_224", image_size=48, patch_size=12)
    assert (named.image_size, named.options["img_size"], named.options["patch_size"]) == (48, 48, 12)


@pytest.mark.parametrize("large", [convnext([8, 16, 24, 32]), resnet([32, 32, 64, 64])])
def test_a_patch_size_for_a_convolutional_student_is_refused(large):
    with pytest.raises(ModelError, match=r"can't have a patch size of its own, 2: .* leave it at 0"):
        compact_architecture(large, width=1.0, depth=0.5, patch_size=2)


@pytest.mark.slow
def test_a_student_that_can_not_work_on_its_images_is_refused():
    with pytest.raises(ModelError, match="images of 30 pixels can't be cut into the 8-pixel patches"):
        compact_architecture(vit(48, 3), image_size=30)
    with pytest.raises(ModelError, match="'convnext_atto' can't work on images of 16 pixels"):
        compact_architecture(convnext([16, 16, 24, 32]), image_size=16)
