"""Attention maps against slow references, and on models whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from chainward_shared.errors import ModelError
from chainward_shared.evaluation.attention_maps import attention_maps

TRANSFORMERS = {
    "test_vit": {},
    "test_vit2": {},  # register token, average pooling
    "deit_tiny_distilled_patch16_224": {"depth": 3},
}
CONVOLUTIONAL = ["test_convnext", "test_resnet", "resnetv2_18", "test_efficientnet"]


def transformer(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, img_size=64, **TRANSFORMERS[name])
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.3)  # else attention is all but uniform
    return model


def convolutional(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    for module in model.modules():  # statistics as if trained, so that evaluation differs from training
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def drawn(grid: np.ndarray, side: int = 64) -> torch.Tensor:
    """A grid as the map that is expected of it."""
    maps = functional.interpolate(torch.as_tensor(grid).float()[:, None], size=(side, side), mode="bilinear")[:, 0]
    return torch.stack([(map_ - map_.min()) / (map_.max() - map_.min()) if map_.any() else map_ for map_ in maps])


def attention_of_every_block(model: nn.Module, images: torch.Tensor) -> list[np.ndarray]:
    """(n, heads, tokens, tokens) of each block, as timm's own unfused attention has them."""
    found = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: found.append(args[0].double().numpy()))
    with torch.no_grad():
        model.eval()(images)
    return found


# --- against slow references ---


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_attention_is_that_of_the_last_block(name, images):
    found = attention_maps(transformer(name), images)
    last = attention_of_every_block(model := transformer(name), images)[-1].mean(axis=1)
    prefix = model.num_prefix_tokens
    rows = last[:, prefix:].mean(axis=1) if name == "test_vit2" else last[:, 0]
    expected = drawn(rows[:, prefix:].reshape(5, 4, 4))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def stage_of(model: nn.Module, index: int) -> nn.Module:
    if hasattr(model, "blocks"):  # one stage more, of half the image's side, which is the one left for 8 pixels
        return model.blocks[index + (index > 0)]
    return model.stages[index] if hasattr(model, "stages") else getattr(model, f"layer{index + 1}")


SIZES = {64: 2, 128: 3, 32: 1, 8: 0}
"""Side of an image -> index of the last stage that has at least 4 x 4 positions; of the first if none has."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side"),
    [
        (name, side) for name in CONVOLUTIONAL for side in SIZES if (name, side) != ("test_convnext", 8)
    ],  # too small for it
)
@pytest.mark.parametrize("classes", [None, [2, 0, 1, 1, 0]])
def test_gradcam_equals_autograd_by_hand(name, classes, side):
    images = torch.randn(5, 3, side, side, generator=torch.Generator().manual_seed(3))
    found = attention_maps(convolutional(name), images, classes=classes)
    model = convolutional(name).eval()
    expected = []
    for row in range(len(images)):
        kept = []
        handle = stage_of(model, SIZES[side]).register_forward_hook(
            lambda module, args, output, kept=kept: kept.append(output)
        )
        logits = model(images[row : row + 1])[0]
        handle.remove()
        chosen = int(logits.argmax()) if classes is None else classes[row]
        features = kept[0]
        gradient = torch.autograd.grad(logits[chosen], features)[0][0].double().numpy()
        values = features[0].detach().double().numpy()
        map_ = np.zeros(values.shape[1:])
        for channel in range(len(values)):
            map_ += gradient[channel].mean() * values[channel]
        expected.append(np.maximum(map_, 0))
    assert sum(map_.any() for map_ in expected) >= 2  # else there is nothing to compare
    torch.testing.assert_close(found, drawn(np.stack(expected), side), rtol=0, atol=1e-4)


# --- where the answer is known ---


class TwoColours(nn.Module):
    """Class 0 is as likely as there is red, class 1 as there is blue."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
        self.stages[0].weight.data = torch.eye(3)[:, :, None, None]
        self.head = nn.Linear(3, 2, bias=False)
        self.head.weight.data = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(images).mean(dim=(2, 3)))


def test_gradcam_shows_the_colour_of_the_class():
    red, blue = torch.zeros(16, 16), torch.zeros(16, 16)
    red[2:6, 3:9] = 1
    blue[10:14, 10:12] = 1
    image = torch.stack([red, torch.zeros(16, 16), blue])
    maps = attention_maps(TwoColours(), torch.stack([image, image, image]), classes=[0, 1, 0])
    torch.testing.assert_close(maps, torch.stack([red, blue, red]))
    predicted = attention_maps(TwoColours(), image[None])[0]  # there is more red
    torch.testing.assert_close(predicted, red)


def test_gradcam_of_an_image_that_speaks_against_the_class_is_zeros():
    image = torch.zeros(1, 3, 16, 16)
    image[:, 2, 4:8, 4:8] = 1
    assert torch.all(attention_maps(TwoColours(), image, classes=[0]) == 0)


def bright_patch_transformer() -> nn.Module:
    """The class token attends to a patch the more, the brighter it is."""
    model = timm.create_model(
        "test_vit", img_size=64, patch_size=16, in_chans=1, depth=1, embed_dim=4, num_heads=1, num_classes=2
    )
    model.patch_embed.proj.weight.data.zero_()[0] = 1 / 256
    model.patch_embed.proj.bias.data.zero_()
    model.pos_embed.data.zero_()
    model.cls_token.data = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]])
    model.blocks[0].norm1 = nn.Identity()
    layer = model.blocks[0].attn
    layer.qkv.weight.data.zero_()
    layer.qkv.bias.data.zero_()
    layer.qkv.weight.data[0, 1] = 8.0  # query of the class token
    layer.qkv.weight.data[4, 0] = 1.0  # key: brightness of the patch
    return model


def test_attention_peaks_in_the_bright_patch():
    image = torch.zeros(2, 1, 64, 64)
    image[0, 0, 16:32, 48:64] = 1
    image[1, 0, 48:64, 0:16] = 1
    maps = attention_maps(bright_patch_transformer(), image)
    assert maps[0, 24, 56] > 0.95
    assert maps[1, 56, 8] > 0.95
    assert maps[0, 48:, :32].max() < 1e-4


def test_a_transformer_that_looks_nowhere_in_particular_gives_zeros():
    blank = torch.zeros(1, 1, 64, 64)
    assert torch.all(attention_maps(bright_patch_transformer(), blank) == 0)


def test_an_image_need_not_be_square():
    maps = attention_maps(convolutional("test_convnext"), torch.randn(2, 3, 64, 96))
    assert maps.shape == (2, 64, 96)
    model = timm.create_model("test_vit", img_size=(32, 64), num_classes=2)
    assert attention_maps(model, torch.randn(2, 3, 32, 64)).shape == (2, 32, 64)


def test_maps_can_have_the_size_of_a_larger_original():
    image = torch.zeros(1, 3, 16, 16)
    image[:, 0, 4:12, 4:12] = 1
    map_ = attention_maps(TwoColours(), image, size=(64, 32))[0]
    assert map_.shape == (64, 32)
    assert torch.all(map_[18:46, 9:23] == 1)
    assert torch.all(map_[:14] == 0)


# --- what is promised of all ---

MODELS = [*TRANSFORMERS, *CONVOLUTIONAL]


def model_of(name: str) -> nn.Module:
    return transformer(name) if name in TRANSFORMERS else convolutional(name)


@pytest.mark.parametrize("name", MODELS)
def test_maps_run_from_zero_to_one_whatever_the_batch(name, images):
    model = model_of(name)
    maps = attention_maps(model, images)
    assert maps.shape == (5, 64, 64)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert torch.all(maps.amin(dim=(1, 2)) == 0)
    assert torch.all(maps.amax(dim=(1, 2)) == 1)
    torch.testing.assert_close(attention_maps(model, images, batch_size=2), maps, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(name, frozen, training, images):
    model = model_of(name).train(training).requires_grad_(not frozen)
    part = next(model.children())
    part.train(not training)  # a part in another mode than the whole
    gradient = next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attention_maps(model, images)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad is not frozen for parameter in model.parameters())
    assert next(model.parameters()).grad is gradient
    assert torch.all(gradient == 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_it_works_under_inference_mode_and_autocast(name, images):
    model = model_of(name)
    expected = attention_maps(model, images)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention_maps(model, images.clone()), expected)


def test_the_model_is_restored_after_an_error():
    model = convolutional("test_convnext").train()
    with pytest.raises(RuntimeError):
        attention_maps(model, torch.randn(1, 7, 64, 64))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_images_give_no_maps():
    assert attention_maps(convolutional("test_convnext"), torch.zeros(0, 3, 64, 64)).shape == (0, 64, 64)


def test_a_class_for_each_image_is_needed(images):
    with pytest.raises(ModelError, match="2 classes were given for 5 images"):
        attention_maps(convolutional("test_convnext"), images, classes=[0, 1])


def test_an_unknown_family_is_refused(images):
    with pytest.raises(ModelError, match="supported are"):
        attention_maps(timm.create_model("vgg11", num_classes=2), images)
