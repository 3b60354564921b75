"""Which backbones train privately is found by running them: right gradients, wrong ones, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chainward_shared.errors import ModelError
from chainward_shared.models import gradient_formulas, private_ready, resolve_architecture, skeleton
from chainward_shared.models.architecture import Architecture, Start
from chainward_shared.models.private_ready import READY, check_private_ready


def architecture_of(name: str, size: int = 32) -> Architecture:
    return resolve_architecture(name, num_classes=3, in_chans=1, image_size=size)


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    private_ready._problem_of.cache_clear()
    yield
    private_ready._problem_of.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", 32), ("deit_tiny_patch16_224", 32), ("test_convnext", 32), ("convnext_atto", 64)],
)
def test_attention_and_convnext_train_privately(name, size):
    check_private_ready(architecture_of(name, size))


def test_resnetv2_with_group_norm_trains_privately():
    options = {"norm_layer": "groupnorm", "channels": [32, 32, 64, 64], "layers": [1, 1, 1, 1], "stem_chs": 32}
    check_private_ready(architecture_of("resnetv2_18").model_copy(update={"options": options}))


def test_a_backbone_is_tried_once_in_a_process(monkeypatch):
    tried = []
    monkeypatch.setattr(private_ready, "_compare", lambda architecture, device: tried.append(architecture) or "")
    for _ in range(2):
        check_private_ready(architecture_of("test_vit"))
    assert len(tried) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet18", "resnetv2_18"), ("test_resnet", "convnext_atto"), ("mobilenetv3_small_050", "convnext_atto")],
)
def test_batch_norm_is_refused_with_the_nearest_ready_backbone(name, nearest):
    with pytest.raises(ModelError, match=f"batch norm mixes .* '{nearest}'"):
        check_private_ready(architecture_of(name, 64))


def started(name: str, part: str, size: int = 64) -> Architecture:
    plain = resolve_architecture(name, num_classes=3, in_chans=1, image_size=size, pretrained=True)
    return plain.model_copy(update={"start": Start(name=name, file="0" * 64, digest="0" * 64, part=part)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("test_efficientnet", "all"),
        ("test_efficientnet", "last-1"),
        ("test_efficientnet", "norms-and-biases"),
        ("test_efficientnet", "head"),
        ("tf_efficientnet_lite0", "all"),  # pads as TensorFlow does
        ("mobilenetv3_small_050", "all"),  # a linear layer of timm's own, and much that is tapped
        ("test_resnet", "all"),
        ("test_vit", "last-2"),
        ("test_vit", "norms-and-biases"),
        ("test_vit", "head"),
        ("test_convnext", "norms-and-biases"),
        ("test_convnext", "last-1"),
    ],
)
def test_a_part_of_a_pretrained_backbone_trains_privately_batch_norm_included(name, part):
    check_private_ready(started(name, part))


@pytest.mark.slow
def test_frozen_batch_norm_with_a_wrong_gradient_is_found_out(monkeypatch):
    right = gradient_formulas.frozen_batch_norm

    def wrong(layer, activation, backprops):
        return right(layer, activation + 0.1, backprops)

    monkeypatch.setattr("chainward_shared.models.ghost.frozen_batch_norm", wrong)
    with pytest.raises(ModelError, match="can't be trained privately"):
        check_private_ready(started("test_efficientnet", "norms-and-biases"))


def test_batch_norm_in_training_mode_is_refused_also_with_a_start(monkeypatch):
    monkeypatch.setattr(private_ready, "train_mode", lambda model: model.train())
    with pytest.raises(ModelError, match="can't be trained privately"):
        check_private_ready(started("test_efficientnet", "all"))


@pytest.mark.slow
def test_another_failure_is_said_and_an_attention_model_is_answered_with_one():
    with pytest.raises(ModelError, match=r"can't be trained privately: a layer has 27 .* of 3 examples.* '(vit|deit)_"):
        check_private_ready(architecture_of("swin_tiny_patch4_window7_224", 64))


def test_gradients_that_are_off_by_a_factor_are_found(monkeypatch):
    honest = gradient_formulas._depthwise
    monkeypatch.setattr(gradient_formulas, "_depthwise", lambda *args: 0.5 * honest(*args))
    with pytest.raises(ModelError, match=r"the sum of clipped gradients for '.*' is wrong"):
        check_private_ready(architecture_of("test_convnext"))


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
    with pytest.raises(ModelError, match="buffers"):
        check_private_ready(architecture_of("test_vit"))


@pytest.mark.slow
def test_ready_backbones_have_no_layer_that_mixes_images():
    for name in READY:
        model = skeleton(architecture_of(name, 64))
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()), name
