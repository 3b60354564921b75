"""Weight selection against plain loops over indices that share no code with it."""

import json

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from chainward_shared.errors import ModelError, WeightsError
from chainward_shared.models import Architecture, build_model, compact_architecture, select_weights
from chainward_shared.models.indices import select_indices


def architecture(name: str, image_size: int = 32, **options) -> Architecture:
    if name.startswith(("vit", "deit")):
        options = {"img_size": image_size} | options
    return Architecture(name=name, num_classes=3, in_chans=1, image_size=image_size, options=options)


def vit(embed_dim: int, num_heads: int, depth: int = 2, **options) -> Architecture:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "depth": depth, "patch_size": 8}
    return architecture("vit_tiny_patch16_224", **sizes | options)


def scrambled(teacher: Architecture) -> dict[str, torch.Tensor]:
    """A state dict in which no two numbers are equal by initialisation, as with zero biases or unit norms."""
    generator = torch.Generator().manual_seed(1)
    state = build_model(teacher, seed=0).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def outputs(model: Architecture, state: dict[str, torch.Tensor]) -> torch.Tensor:
    built = build_model(model, seed=9)
    built.load_state_dict(state, strict=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return built.eval()(torch.randn(4, 1, model.image_size, model.image_size, generator=generator))


# --- indices ---


def uniform_indices(teacher: int, student: int, variant: str = "A") -> torch.Tensor:
    return select_indices(teacher, student, variant, "strided", torch.Generator())


def slow_a(teacher: int, student: int) -> list[int]:
    if teacher % student == 0:
        return [i * (teacher // student) for i in range(student)]
    return slow_linspace(teacher, student)


def slow_linspace(length: int, count: int) -> list[int]:
    """round(linspace(0, length - 1, count)) in whole numbers, halves to even."""
    picked = []
    for i in range(count):
        whole, rest = divmod(i * (length - 1), max(count - 1, 1))
        up = 2 * rest > count - 1 or (2 * rest == count - 1 and whole % 2 == 1)
        picked.append(whole + 1 if up else whole)
    return picked


def slow_b(teacher: int, student: int) -> list[int]:
    a = slow_a(teacher, student)
    if teacher == student:
        return a
    if teacher % student == 0:
        return [i + 1 for i in a]
    left = [i for i in range(teacher) if i not in a]
    if len(left) >= student:
        return [left[i] for i in slow_linspace(len(left), student)]
    return sorted(left + [a[i] for i in slow_linspace(len(a), student - len(left))])


SLOW = {"A": slow_a, "B": slow_b}

sizes = st.integers(1, 96).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t)))


@given(sizes, st.sampled_from(["A", "B"]))
def test_indices_are_those_of_a_slow_reference(size, variant):
    assert uniform_indices(*size, variant).tolist() == SLOW[variant](*size)


@given(sizes, st.sampled_from(["A", "B"]))
def test_indices_are_ascending_distinct_and_within_the_teacher(size, variant):
    teacher, student = size
    indices = uniform_indices(teacher, student, variant).tolist()
    assert indices == sorted(set(indices))
    assert len(indices) == student
    assert 0 <= indices[0] <= indices[-1] < teacher


@given(sizes)
def test_the_two_variants_overlap_only_as_far_as_the_sizes_force_them(size):
    teacher, student = size
    common = set(uniform_indices(teacher, student, "A").tolist()) & set(uniform_indices(teacher, student, "B").tolist())
    assert len(common) == max(0, 2 * student - teacher)


def test_indices_by_example():
    assert uniform_indices(8, 4, "A").tolist() == [0, 2, 4, 6]
    assert uniform_indices(8, 4, "B").tolist() == [1, 3, 5, 7]
    assert uniform_indices(10, 4, "A").tolist() == [0, 3, 6, 9]
    assert uniform_indices(10, 4, "B").tolist() == [1, 4, 5, 8]
    assert uniform_indices(5, 3, "A").tolist() == [0, 2, 4]
    assert uniform_indices(5, 3, "B").tolist() == [0, 1, 3]
    assert uniform_indices(4, 4, "B").tolist() == [0, 1, 2, 3]
    assert uniform_indices(6, 1, "B").tolist() == [1]
    assert uniform_indices(6, 4).dtype == torch.int64


@pytest.mark.parametrize(("teacher", "student"), [(4, 5), (4, 0), (0, 0)])
def test_more_channels_than_there_are_or_none_are_refused(teacher, student):
    with pytest.raises(ModelError, match=f"select {student} channels out of {teacher}"):
        uniform_indices(teacher, student)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ModelError, match="no variant 'C'"):
        uniform_indices(4, 2, "C")


# --- whole models, element by element ---


def take(values, *axes):
    """The elements of nested lists at the given indices, axis by axis; None takes all."""
    if not axes:
        return values
    indices = range(len(values)) if axes[0] is None else axes[0]
    return [take(values[i], *axes[1:]) for i in indices]


def slow_vit(state, teacher: tuple[int, int], student: tuple[int, int], depth: int, variant: str):
    """Select a ViT of (width, heads) `student` whose every head is within one head of the `teacher`."""
    pick = SLOW[variant]
    (wide, many), (narrow, few) = teacher, student
    embedding = pick(wide, narrow)
    hidden = pick(4 * wide, 4 * narrow)
    attention = []
    for head in pick(many, few):
        for channel in pick(wide // many, narrow // few):
            attention.append(head * (wide // many) + channel)
    queries_keys_values = [part * wide + i for part in range(3) for i in attention]

    values = {name: tensor.tolist() for name, tensor in state.items()}
    taken = {
        "cls_token": take(values["cls_token"], None, None, embedding),
        "pos_embed": take(values["pos_embed"], None, None, embedding),
        "patch_embed.proj.weight": take(values["patch_embed.proj.weight"], embedding),
        "patch_embed.proj.bias": take(values["patch_embed.proj.bias"], embedding),
        "norm.weight": take(values["norm.weight"], embedding),
        "norm.bias": take(values["norm.bias"], embedding),
        "head.weight": take(values["head.weight"], None, embedding),
        "head.bias": values["head.bias"],
    }
    for block in range(depth):
        for name, axes in {
            "norm1.weight": [embedding],
            "norm1.bias": [embedding],
            "attn.qkv.weight": [queries_keys_values, embedding],
            "attn.qkv.bias": [queries_keys_values],
            "attn.proj.weight": [embedding, attention],
            "attn.proj.bias": [embedding],
            "norm2.weight": [embedding],
            "norm2.bias": [embedding],
            "mlp.fc1.weight": [hidden, embedding],
            "mlp.fc1.bias": [hidden],
            "mlp.fc2.weight": [embedding, hidden],
            "mlp.fc2.bias": [embedding],
        }.items():
            taken[f"blocks.{block}.{name}"] = take(values[f"blocks.{block}.{name}"], *axes)
    return taken


def slow_convnext(state, teacher: list[int], student: list[int], depths: list[int], variant: str):
    """Select a ConvNeXt with a patch stem, stage widths `student` and `depths`, out of widths `teacher`."""
    pick = SLOW[variant]
    widths = [pick(large, small) for large, small in zip(teacher, student, strict=True)]
    hidden = [pick(4 * large, 4 * small) for large, small in zip(teacher, student, strict=True)]
    rules = {
        "stem.0.weight": [widths[0]],
        "stem.0.bias": [widths[0]],
        "stem.1.weight": [widths[0]],
        "stem.1.bias": [widths[0]],
        "head.norm.weight": [widths[3]],
        "head.norm.bias": [widths[3]],
        "head.fc.weight": [None, widths[3]],
        "head.fc.bias": [None],
    }
    for stage in range(4):
        if stage > 0:
            rules[f"stages.{stage}.downsample.0.weight"] = [widths[stage - 1]]
            rules[f"stages.{stage}.downsample.0.bias"] = [widths[stage - 1]]
            rules[f"stages.{stage}.downsample.1.weight"] = [widths[stage], widths[stage - 1]]
            rules[f"stages.{stage}.downsample.1.bias"] = [widths[stage]]
        for block in range(depths[stage]):
            place = f"stages.{stage}.blocks.{block}"
            rules[f"{place}.gamma"] = [widths[stage]]
            rules[f"{place}.conv_dw.weight"] = [widths[stage], None]
            rules[f"{place}.conv_dw.bias"] = [widths[stage]]
            rules[f"{place}.norm.weight"] = [widths[stage]]
            rules[f"{place}.norm.bias"] = [widths[stage]]
            rules[f"{place}.mlp.fc1.weight"] = [hidden[stage], widths[stage]]
            rules[f"{place}.mlp.fc1.bias"] = [hidden[stage]]
            rules[f"{place}.mlp.fc2.weight"] = [widths[stage], hidden[stage]]
            rules[f"{place}.mlp.fc2.bias"] = [widths[stage]]
    return {name: take(state[name].tolist(), *axes) for name, axes in rules.items()}


def assert_same_weights(selected, expected):
    assert selected.keys() == expected.keys()
    for name, tensor in selected.items():
        assert tensor.tolist() == expected[name], name


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        pytest.param((192, 3), (96, 3), id="vit_tiny to half its width"),
        pytest.param((48, 3), (36, 3), id="a width that does not divide"),
        pytest.param((48, 4), (24, 2), id="fewer heads of the same width"),
        pytest.param((48, 4), (16, 2), id="fewer and narrower heads"),
        pytest.param((40, 5), (12, 3), id="nothing divides"),
    ],
)
def test_a_vit_is_selected_as_by_plain_loops(teacher, student, variant):
    large, small = vit(*teacher, depth=3), vit(*student, depth=2)
    state = scrambled(large)
    selected = select_weights(state, large, small, variant)
    assert_same_weights(selected, slow_vit(state, teacher, student, 2, variant))
    assert outputs(small, selected).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["A", "B"])
def test_half_an_atto_with_fewer_blocks_is_selected_as_by_plain_loops(variant):
    large = architecture("convnext_atto", depths=[2, 1, 2, 1])
    small = compact_architecture(large, width=0.5, depth=0.5)
    assert small.options == {"dims": [24, 40, 80, 160], "depths": [1, 1, 1, 1]}
    state = scrambled(large)
    selected = select_weights(state, large, small, variant)
    expected = slow_convnext(state, [40, 80, 160, 320], small.options["dims"], [1, 1, 1, 1], variant)
    assert_same_weights(selected, expected)
    assert outputs(small, selected).isfinite().all()


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_linear_and_convolutional_mlps_are_selected_alike(conv_mlp):
    options = {"depths": [1, 1, 1, 1], "conv_mlp": conv_mlp}
    large = architecture("convnext_tiny", dims=[16, 24, 32, 40], **options)
    small = architecture("convnext_tiny", dims=[8, 16, 24, 24], **options)
    state = scrambled(large)
    selected = select_weights(state, large, small)
    expected = slow_convnext(state, [16, 24, 32, 40], [8, 16, 24, 24], [1, 1, 1, 1], "A")
    assert_same_weights(selected, expected)


def test_a_student_with_convolutional_mlps_is_selected_out_of_a_teacher_with_linear_ones():
    options = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    large = architecture("convnext_tiny", conv_mlp=False, **options)
    small = architecture("convnext_tiny", conv_mlp=True, **options)
    # random norms and scales make the numbers explode
    state = build_model(large, seed=3).state_dict()
    selected = select_weights(state, large, small)
    torch.testing.assert_close(outputs(small, selected), outputs(large, state))


# --- the axes ---


def test_queries_keys_and_values_are_each_selected_from_their_own_part():
    large, small = vit(96, 3), vit(48, 3)
    state = scrambled(large)
    for part, mark in enumerate((1.0, 2.0, 3.0)):
        state["blocks.0.attn.qkv.bias"][part * 96 : (part + 1) * 96] = mark
    selected = select_weights(state, large, small)["blocks.0.attn.qkv.bias"]
    assert selected.tolist() == [1.0] * 48 + [2.0] * 48 + [3.0] * 48


def test_selecting_across_the_fused_axis_would_misalign_queries_keys_and_values():
    large, small = vit(64, 2), vit(48, 2)
    state = scrambled(large)
    selected = select_weights(state, large, small)["blocks.0.attn.qkv.bias"]
    naive = state["blocks.0.attn.qkv.bias"][uniform_indices(3 * 64, 3 * 48)]
    assert naive.shape == selected.shape
    assert not torch.equal(naive, selected)
    # naively, the channels taken of the queries are not those taken of the keys
    across = uniform_indices(3 * 64, 3 * 48)
    assert across[:48].tolist() != (across[48:96] - 64).tolist()


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("narrow", [96, 72, 60])
def test_each_head_of_the_student_is_taken_out_of_the_same_head_of_the_teacher(narrow, variant):
    large, small = vit(144, 3), vit(narrow, 3)
    state = scrambled(large)
    heads = torch.arange(144.0) // 48
    for name in list(state):
        if name.endswith("attn.qkv.bias"):
            state[name] = heads.repeat(3)
        elif name.endswith("attn.proj.weight"):
            state[name] = heads.expand(144, 144).clone()
    selected = select_weights(state, large, small, variant)
    expected = (torch.arange(narrow) // (narrow // 3)).float()
    assert torch.equal(selected["blocks.1.attn.qkv.bias"], expected.repeat(3))
    assert torch.equal(selected["blocks.1.attn.proj.weight"][0], expected)


def test_more_heads_than_the_teacher_has_are_selected_uniformly():
    large, small = vit(48, 2, qkv_bias=True), vit(24, 4)
    state = scrambled(large)
    selected = select_weights(state, large, small)["blocks.0.attn.qkv.bias"]
    expected = [part * 48 + i for part in range(3) for i in slow_a(48, 24)]
    assert selected.tolist() == [state["blocks.0.attn.qkv.bias"][i].item() for i in expected]


def test_norms_of_single_heads_cannot_be_selected_where_heads_do_not_match():
    large, small = vit(48, 2, qk_norm=True), vit(24, 4, qk_norm=True)
    with pytest.raises(ModelError, match=r"don't cover axis 0 of 'blocks\.0\.attn\.q_norm\.weight'"):
        select_weights(scrambled(large), large, small)
    select_weights(scrambled(large), large, vit(24, 2, qk_norm=True))


def test_a_vit_whose_signal_is_in_the_selected_channels_only_is_reproduced():
    """Every axis that two tensors share must be selected alike in both, or signal would be lost.

    All that would write to an unselected channel is zero. Two constants depend on the width: the mean in an RMS
    norm, and the scale of the attention.
    """
    large = vit(48, 3, norm_layer="rmsnorm")
    small = vit(24, 3, norm_layer="rmsnorm")
    state = {name: tensor * 0.05 for name, tensor in scrambled(large).items()}
    for name, tensor in state.items():
        if "norm" in name:
            tensor.fill_(1.0)
        elif "head" in name:
            tensor.normal_(generator=torch.Generator().manual_seed(3))
        elif name.endswith("fc1.weight"):
            tensor[1::2] = 0.0
        elif name in ("cls_token", "pos_embed"):
            tensor[..., 1::2] = 0.0
        else:  # the patch embedding, the channels of heads, and what is added to the embedding
            tensor[1::2] = 0.0
        if name.endswith("fc1.bias"):
            tensor[1::2] = 0.0
    selected = select_weights(state, large, small)
    for name, tensor in selected.items():
        if "norm" in name:
            tensor.mul_(2**0.5)
        elif "qkv" in name:
            tensor[:24].mul_(0.5**0.5)
    torch.testing.assert_close(outputs(small, selected), outputs(large, state), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stem_type", ["patch", "overlap", "overlap_tiered", "overlap_act"])
def test_a_convnext_whose_signal_is_in_the_selected_channels_only_is_reproduced(stem_type):
    options = {"depths": [1, 2, 1, 1], "stem_type": stem_type}
    large = architecture("convnext_atto_rms", dims=[32, 48, 64, 80], **options)
    small = architecture("convnext_atto_rms", dims=[16, 24, 32, 40], **options)
    state = {name: tensor * 0.2 for name, tensor in scrambled(large).items()}
    for key, tensor in state.items():
        if tensor.ndim == 1 and key.endswith("weight"):  # a norm
            tensor.fill_(1.0)
        elif not key.startswith("head"):
            tensor[1::2] = 0.0
    selected = select_weights(state, large, small)
    for key, tensor in selected.items():
        if tensor.ndim == 1 and key.endswith("weight"):
            tensor.mul_(2**0.5)
    torch.testing.assert_close(outputs(small, selected), outputs(large, state), rtol=1e-3, atol=1e-4)


def test_the_two_convolutions_of_a_tiered_stem_share_the_channels_between_them():
    large = architecture("convnext_atto_ols", dims=[32, 32, 32, 32], depths=[1, 1, 1, 1])
    small = architecture("convnext_atto_ols", dims=[16, 16, 16, 16], depths=[1, 1, 1, 1])
    state = scrambled(large)
    selected = select_weights(state, large, small)
    assert state["stem.0.weight"].shape[0] == 16
    middle, width = slow_a(16, 8), slow_a(32, 16)
    assert selected["stem.0.weight"].tolist() == take(state["stem.0.weight"].tolist(), middle)
    assert selected["stem.1.weight"].tolist() == take(state["stem.1.weight"].tolist(), width, middle)


def test_the_two_variants_of_half_a_model_share_no_weight():
    large, small = vit(48, 3), vit(24, 3)
    state = scrambled(large)
    taken = {v: select_weights(state, large, small, v) for v in ("A", "B")}
    for name in taken["A"]:
        if name != "head.bias":
            assert not set(taken["A"][name].flatten().tolist()) & set(taken["B"][name].flatten().tolist()), name


# --- many kinds of one family ---

NARROW_VIT = {"embed_dim": 24, "num_heads": 3, "depth": 1}
WIDE_VIT = {"embed_dim": 48, "num_heads": 3, "depth": 2}
NARROW_CONVNEXT = {"dims": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
WIDE_CONVNEXT = {"dims": [16, 24, 32, 40], "depths": [1, 2, 2, 1]}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}),
        ("vit_giant_patch14_dinov2", {"patch_size": 8}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_medium_patch16_reg4_gap_256", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    ],
)
def test_every_kind_of_vit_is_selected_whole_and_works(name, options):
    assert_selected_whole(architecture(name, **WIDE_VIT | options), architecture(name, **NARROW_VIT | options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnext_atto", {}),
        ("convnext_atto", {"patch_size": 2}),
        ("convnext_atto_ols", {}),
        ("convnext_pico_ols", {}),
        ("convnext_atto_rms", {}),
        ("convnext_zepto_rms_ols", {}),
        ("convnext_tiny_hnf", {}),
        ("convnext_large_mlp", {"head_hidden_size": 48}),
        ("convnextv2_atto", {}),
        ("convnext_tiny", {"norm_layer": "simplenorm"}),
    ],
)
def test_every_kind_of_convnext_is_selected_whole_and_works(name, options):
    assert_selected_whole(
        architecture(name, **WIDE_CONVNEXT | options), architecture(name, **NARROW_CONVNEXT | options)
    )


def assert_selected_whole(large: Architecture, small: Architecture):
    state = scrambled(large)
    for variant in ("A", "B"):
        selected = select_weights(state, large, small, variant)
        expected = build_model(small).state_dict()
        assert list(selected) == list(expected)
        for name, tensor in selected.items():
            assert tensor.shape == expected[name].shape
            assert set(tensor.flatten().tolist()) <= set(state[name].flatten().tolist()), name
        assert outputs(small, selected).shape == (4, 3)


# --- what comes out ---


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("large", [vit(48, 3), architecture("convnext_atto", **WIDE_CONVNEXT)])
def test_a_student_of_equal_size_is_the_teacher(large, variant):
    state = build_model(large, seed=4).state_dict()
    selected = select_weights(state, large, large, variant)
    assert torch.equal(outputs(large, selected), outputs(large, state))


def test_fewer_layers_are_the_first_ones():
    large, small = vit(24, 3, depth=4), vit(24, 3, depth=2)
    state = scrambled(large)
    selected = select_weights(state, large, small)
    for block in (0, 1):
        name = f"blocks.{block}.mlp.fc1.weight"
        assert torch.equal(selected[name], state[name])
    assert not [name for name in selected if name.startswith("blocks.2")]


def test_selected_tensors_are_contiguous_copies_of_the_teachers_dtype():
    large = vit(48, 3)
    state = {name: tensor.double() for name, tensor in scrambled(large).items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    for small in (vit(24, 3), large):
        for tensor in select_weights(state, large, small).values():
            assert tensor.is_contiguous()
            assert tensor.dtype == torch.float64
            assert not tensor.requires_grad
            tensor.zero_()
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_plain_timm_loads_a_selected_student_by_its_metadata():
    large = vit(48, 3)
    small = compact_architecture(large, width=0.5)
    state = build_model(large, seed=4).state_dict()
    selected = select_weights(state, large, small)
    metadata = small.to_metadata()
    model = timm.create_model(metadata["timm.model"], pretrained=False, **json.loads(metadata["timm.kwargs"]))
    model.load_state_dict(selected, strict=True)
    model.eval()
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(model(images), outputs(small, selected))


# --- the classifier ---


def test_the_classifier_is_copied_where_the_classes_are_as_many():
    large, small = vit(48, 3), vit(24, 3)
    state = scrambled(large)
    selected = select_weights(state, large, small)
    assert torch.equal(selected["head.weight"], state["head.weight"][:, ::2])
    assert torch.equal(selected["head.bias"], state["head.bias"])


@pytest.mark.parametrize(
    ("large", "small", "classifier"),
    [
        (vit(48, 3), vit(24, 3), "head."),
        (
            architecture("convnext_atto", **WIDE_CONVNEXT),
            architecture("convnext_atto", **NARROW_CONVNEXT),
            "head.fc.",
        ),
    ],
)
def test_a_classifier_of_another_number_of_classes_is_fresh(large, small, classifier):
    state = scrambled(large)
    copied = select_weights(state, large, small)
    other = small.model_copy(update={"num_classes": 5})
    fresh = build_model(other, seed=0).state_dict()
    for name, found in select_weights(state, large, other).items():
        expected = fresh if name.startswith(classifier) else copied
        assert torch.equal(found, expected[name]), name


# --- what is refused ---


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "swin_tiny_patch4_window7_224"])
def test_a_family_without_rules_is_refused_by_name(name):
    large = architecture(name, 64)
    with pytest.raises(ModelError, match=f"'{name}'.*supported are convnext .*vit "):
        select_weights({}, large, large)


def test_a_larger_student_is_refused():
    large = vit(24, 3)
    for small in (vit(48, 3), vit(24, 3, depth=3), vit(24, 3, mlp_ratio=8.0)):
        with pytest.raises(ModelError, match="larger than its teacher"):
            select_weights(scrambled(large), large, small)


def test_another_number_of_input_channels_is_refused_with_both():
    large = vit(48, 3)
    with pytest.raises(ModelError, match=r"3 .* 1"):
        select_weights(scrambled(large), large, large.model_copy(update={"in_chans": 3}))


def test_another_patch_size_of_a_convnext_is_refused_with_both():
    large = architecture("convnext_atto", **WIDE_CONVNEXT)
    small = architecture("convnext_atto", patch_size=2, **NARROW_CONVNEXT)
    with pytest.raises(ModelError, match=r"patch size 2 .* 4"):
        select_weights(scrambled(large), large, small)


def test_a_student_of_another_family_is_refused():
    large, small = vit(48, 3), architecture("convnext_atto", **NARROW_CONVNEXT)
    with pytest.raises(ModelError, match=r"convnext_atto.* convnext, its teacher .* vit"):
        select_weights(scrambled(large), large, small)


def test_components_that_only_one_of_them_has_are_refused_rather_than_left_random_or_dropped():
    plain, scaled = vit(48, 3), vit(24, 3, init_values=0.1)
    with pytest.raises(ModelError, match=r"blocks\.\*\.ls1\.gamma"):
        select_weights(scrambled(plain), plain, scaled)
    plain, scaled = vit(24, 3), vit(48, 3, init_values=0.1)
    with pytest.raises(ModelError, match=r"blocks\.\*\.ls1\.gamma"):
        select_weights(scrambled(scaled), scaled, plain)


def test_a_parameter_without_a_rule_is_refused_by_name():
    large = architecture("vit_dwee_patch16_reg1_gap_256", **WIDE_VIT)
    small = architecture("vit_dwee_patch16_reg1_gap_256", **NARROW_VIT)
    with pytest.raises(ModelError, match=r"don't cover .*blocks\.0\.attn\."):
        select_weights(scrambled(large), large, small)


def test_weights_that_are_not_the_teachers_are_refused():
    large, small = vit(48, 3), vit(24, 3)
    state = scrambled(large)
    with pytest.raises(WeightsError, match=r"lack 'norm\.bias' \(1 missing"):
        select_weights({k: v for k, v in state.items() if k != "norm.bias"}, large, small)
    with pytest.raises(WeightsError, match=r"unexpected 'extra'"):
        select_weights(state | {"extra": torch.zeros(1)}, large, small)
    with pytest.raises(WeightsError, match=r"'norm\.bias' .* shape \(7,\), expected \(48,\)"):
        select_weights(state | {"norm.bias": torch.zeros(7)}, large, small)
