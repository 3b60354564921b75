"""What the taps read out of a forward pass, against slow references, and that they leave the pass alone."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from chainward_shared.errors import ModelError
from chainward_shared.models.taps import Taps, embedding_size

BACKBONES = {
    "test_convnext": {},
    "test_resnet": {},
    "resnetv2_18": {},
    "test_vit": {"img_size": 64},
    "test_vit3": {"img_size": 64},  # attention pooling, no class token
    "test_vit2": {"img_size": 64},  # register token, average pooling
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 2},
}
CONVOLUTIONAL = [
    "test_convnext",
    "test_resnet",
    "resnetv2_18",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "densenet121",
]
STAGES = {
    "test_resnet": lambda model: [model.layer1, model.layer2, model.layer3, model.layer4],
    "test_efficientnet": lambda model: model.blocks,
    "mobilenetv3_small_050": lambda model: model.blocks,
    "densenet121": lambda model: [getattr(model.features, f"denseblock{number}") for number in range(1, 5)],
}


def build(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **{**BACKBONES.get(name, {}), **options})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# --- the pass itself ---


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_outputs_and_gradients_stay_the_same_bit_for_bit(name, training, bf16, images):
    def forward_and_backward(model):
        torch.manual_seed(5)  # dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(images)
        logits.float().square().sum().backward()
        return logits, [p.grad for p in model.parameters()]

    plain, plain_gradients = forward_and_backward(build(name, drop_rate=0.3).train(training))
    model = build(name, drop_rate=0.3).train(training)
    with Taps(model, attention=True, embedding=True):
        logits, gradients = forward_and_backward(model)
    assert torch.equal(logits, plain)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_closing_takes_every_hook_off(name, images):
    model = build(name)
    with Taps(model, attention=True, embedding=True) as taps:
        model(images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert taps.attention == []


@pytest.mark.parametrize("name", BACKBONES)
def test_everything_is_float32_and_finite_under_bf16(name, images):
    model = build(name)
    with Taps(model, attention=True, embedding=True) as taps, torch.autocast("cpu", torch.bfloat16):
        model(images)
        for tensor in (*taps.attention, taps.embedding):
            assert tensor.dtype == torch.float32
            assert tensor.isfinite().all()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_frozen_model_is_read_without_a_graph(name, images):
    model = build(name).eval().requires_grad_(False)
    with Taps(model, attention=True, embedding=True) as taps, torch.no_grad():
        model(images)
        assert not any(tensor.requires_grad for tensor in (*taps.attention, taps.embedding))


@pytest.mark.parametrize("name", BACKBONES)
def test_each_pass_replaces_the_one_before(name, images):
    model = build(name).eval()
    with Taps(model, attention=True, embedding=True) as taps:
        model(images)
        first = [map_.clone() for map_ in taps.attention]
        model(2 * images[:1])
        again = taps.attention
    assert len(again) == len(first)
    assert all(len(map_) == 1 for map_ in again)


# --- attention ---


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_conv_attention_is_the_mean_squared_activation_of_each_stage(name, images):
    model = build(name).eval()
    outputs = []
    stages = STAGES.get(name, lambda model: model.stages)(model)
    for stage in stages:
        stage.register_forward_hook(lambda module, args, output: outputs.append(output))
    with Taps(model, attention=True) as taps:
        model(images)
        found = taps.attention
    assert len(found) == len(outputs) >= 4
    for map_, output in zip(found, outputs, strict=True):
        values = output.detach().double().numpy()
        expected = (values**2).mean(axis=1).reshape(len(values), -1)
        torch.testing.assert_close(map_.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-8)


def slow_vit_attention(model: nn.Module, images: torch.Tensor, from_class_token: bool) -> list[torch.Tensor]:
    """Attention of the middle and the last block, one head and one query at a time, in float64."""
    model = model.double()
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images.double())))
    found, prefix = [], model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        if index in (max(0, len(model.blocks) // 2 - 1), len(model.blocks) - 1):
            layer, x = block.attn, block.norm1(tokens)
            n, count, _ = x.shape
            q, k, _ = layer.qkv(x).reshape(n, count, 3, layer.num_heads, -1).unbind(2)
            q, k = layer.q_norm(q), layer.k_norm(k)
            heads = []
            for head in range(layer.num_heads):
                for query in [0] if from_class_token else range(prefix, count):
                    scores = torch.stack([(q[:, query, head] * k[:, j, head]).sum(-1) for j in range(count)], dim=1)
                    heads.append((scores / math.sqrt(q.shape[-1])).softmax(dim=1)[:, prefix:])
            found.append(torch.stack(heads).mean(dim=0))
        tokens = block(tokens)
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "from_class_token"),
    [
        ("test_vit", {}, True),
        ("test_vit", {"qk_norm": True, "depth": 3}, True),
        ("test_vit", {"depth": 1}, True),
        ("test_vit", {"global_pool": "avg"}, False),
        ("test_vit3", {}, False),
        ("test_vit2", {}, False),
        ("deit_tiny_distilled_patch16_224", {}, True),
    ],
)
def test_vit_attention_equals_the_slow_one(name, options, from_class_token, fused, images):
    model = build(name, **options).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
        if "qk_norm" in options:  # norms that do something
            nn.init.uniform_(block.attn.q_norm.weight, 0.5, 3.0)
            nn.init.uniform_(block.attn.k_norm.weight, 0.5, 3.0)
        nn.init.normal_(block.attn.qkv.weight, std=0.3)  # else attention is all but uniform
    with Taps(model, attention=True) as taps:
        model(images)
        found = taps.attention
    expected = slow_vit_attention(model, images, from_class_token)
    assert len(found) == len(expected)
    for map_, slow in zip(found, expected, strict=True):
        assert map_.std(dim=1).min() > 1e-3
        torch.testing.assert_close(map_.double(), slow, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_attention_teaches_the_model(name, images):
    model = build(name)
    with Taps(model, attention=True) as taps:
        model(images)
        taps.attention[-1].square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0


# --- embedding ---


@pytest.mark.parametrize("name", BACKBONES)
def test_the_classifier_maps_the_embedding_to_the_logits(name, images):
    model = build(name).eval()
    with Taps(model, embedding=True) as taps:
        logits = model(images)
        found = taps.embedding
    assert found.shape == (3, embedding_size(model))
    classifier = model.get_classifier()
    if isinstance(classifier, tuple):  # of the class token, of the distillation token
        features = model.forward_features(images)
        assert torch.allclose(found, features[:, 0], atol=1e-6)
        return
    weight = classifier.weight.flatten(1)
    assert torch.allclose(found @ weight.T + classifier.bias, logits, atol=1e-5)


def test_attention_is_not_computed_unless_asked_for(images):
    model = build("test_convnext")
    with Taps(model, embedding=True) as taps:
        model(images)
        assert taps.attention == []
    with Taps(model, attention=True) as taps:
        model(images)
        with pytest.raises(RuntimeError, match="embedding=True"):
            _ = taps.embedding


# --- what can't be tapped ---


@pytest.mark.parametrize("name", ["vgg11", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_an_unknown_family_is_named_with_those_that_are_supported(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ModelError, match=r"convnext_\*, resnet\*") as error:
        Taps(model, attention=True)
    assert type(model).__name__ in str(error.value)
    assert "\n" not in str(error.value)


def test_blocks_with_another_attention_are_refused():
    with torch.device("meta"):
        model = timm.create_model("test_vit", attn_layer="diff")
    with pytest.raises(ModelError, match="standard attention"):
        Taps(model, attention=True)


def test_stages_that_yield_tokens_are_refused():
    model = build("test_convnext").eval()
    model.stages[0] = nn.Flatten()
    with Taps(model, attention=True), pytest.raises(ModelError, match="no feature map"):
        model.forward_features(torch.randn(1, 3, 64, 64))


def test_a_model_without_a_classifier_has_no_embedding():
    model = timm.create_model("test_convnext", num_classes=0)
    with pytest.raises(ModelError, match="no linear layer"):
        Taps(model, embedding=True)
    with pytest.raises(ModelError, match="no linear layer"):
        embedding_size(nn.Linear(2, 3))


def test_features_that_are_not_pooled_are_refused(images):
    model = timm.create_model("resnetv2_18", num_classes=3, global_pool="").eval()
    with Taps(model, embedding=True), pytest.raises(ModelError, match="pools its features"):
        model(images)
