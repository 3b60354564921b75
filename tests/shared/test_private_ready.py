"""Which backbones train privately is found by running them: right gradients, wrong ones, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chainward_shared.errors import ModelError
from chainward_shared.models import private_ready, resolve_architecture, skeleton
from chainward_shared.models.architecture import Architecture
from chainward_shared.models.private_ready import READY, PerExampleGradients, check_private_ready, right_modes


def architecture_of(name: str, size: int = 32) -> Architecture:
    return resolve_architecture(name, num_classes=3, in_chans=1, image_size=size)


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", 32), ("deit_tiny_patch16_224", 32), ("test_convnext", 32), ("convnext_atto", 64)],
)
def test_attention_and_convnext_train_privately_through_ghost_clipping_and_hooks(name, size):
    found = right_modes(architecture_of(name, size))
    assert isinstance(found["ghost"], float)
    assert isinstance(found["hooks"], float)
    assert isinstance(found["ew"], str)


def test_resnetv2_with_group_norm_trains_privately_in_every_mode():
    small = architecture_of("resnetv2_18").model_copy(
        update={
            "options": {"norm_layer": "groupnorm", "channels": [32, 32, 64, 64], "layers": [1, 1, 1, 1], "stem_chs": 32}
        }
    )
    assert all(isinstance(seconds, float) for seconds in right_modes(small).values())


def test_the_fastest_right_mode_is_chosen(monkeypatch):
    found = {"ghost": "wrong", "hooks": 0.3, "functorch": 0.2, "ew": "wrong"}
    monkeypatch.setattr(private_ready, "right_modes", lambda architecture, device: found)
    private_ready._checked.cache_clear()
    try:
        assert check_private_ready(architecture_of("test_vit")) == "functorch"
    finally:
        private_ready._checked.cache_clear()


@pytest.mark.parametrize("mode", ["ghost", "hooks"])
def test_as_many_images_are_computed_together_as_their_gradients_fit_into_memory(mode):
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 3, bias=False))  # 64 MiB
    per_example = PerExampleGradients(model, mode)
    assert per_example.most_together() == {"ghost": 64, "hooks": 7}[mode]
    per_example.close()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet18", "resnetv2_18"), ("test_resnet", "convnext_atto"), ("mobilenetv3_small_050", "convnext_atto")],
)
def test_batch_norm_is_refused_with_the_nearest_ready_backbone(name, nearest):
    with pytest.raises(ModelError, match=f"batch norm mixes .* '{nearest}'"):
        check_private_ready(architecture_of(name, 64))


def test_another_failure_is_said_and_an_attention_model_is_answered_with_one():
    with pytest.raises(ModelError, match=r"can't be trained privately: .*buffers.* '(vit|deit)_"):
        check_private_ready(architecture_of("swin_tiny_patch4_window7_224", 64))


def test_opacus_own_formula_for_convolutions_is_wrong_for_convnext_and_the_check_finds_it(monkeypatch):
    from opacus.grad_sample import GradSampleHooks

    monkeypatch.setattr(private_ready, "_hooks_class", lambda: GradSampleHooks)
    assert "downsample" in str(right_modes(architecture_of("convnext_atto", 64))["hooks"])


def test_gradients_that_are_off_by_a_factor_are_found(monkeypatch):
    honest = private_ready._convolution

    def halved(layer, activations, backprops):
        return {p: 0.5 * g for p, g in honest(layer, activations, backprops).items()}

    private_ready._hooks_class.cache_clear()
    monkeypatch.setattr(private_ready, "_convolution", halved)
    try:
        assert "wrong" in str(right_modes(architecture_of("test_convnext"))["hooks"])
    finally:
        private_ready._hooks_class.cache_clear()


def test_a_model_that_writes_into_its_buffers_is_refused(monkeypatch):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1024, 3)
            self.counter = nn.Module()
            self.counter.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.counter.seen += x.mean()
            return self.linear(x.flatten(1))

    monkeypatch.setattr(private_ready, "build_model", lambda architecture, seed: Counting())
    assert "buffers" in str(right_modes(architecture_of("test_vit"))["hooks"])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 8, 2, stride=2, bias=False),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 4, 5, padding="same", groups=4),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0), padding_mode="reflect"),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_convolutions_gradients_are_those_of_single_images(layer, memory):
    torch.manual_seed(0)
    images = torch.randn(3, 4, 9, 9).contiguous(memory_format=memory)
    model = nn.Sequential(nn.Identity(), layer)
    expected = []
    for image in images:
        model.zero_grad()
        model(image[None]).square().sum().backward()
        expected.append([p.grad.clone() for p in layer.parameters()])
    per_example = PerExampleGradients(model, "hooks")
    model.zero_grad()
    model(images).square().sum().backward()
    for found, of_each in zip(per_example.take(3), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(of_each), rtol=1e-4, atol=1e-4)
    per_example.close()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_ready_backbones_have_no_layer_that_mixes_images():
    for name in READY:
        model = skeleton(architecture_of(name, 64))
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()), name
