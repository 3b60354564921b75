"""ConvNeXt and ConvNeXt V2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue
from timm.models.convnext import ConvNeXt
from torch import nn

from chainward_shared.models.families import Family, register, scaled_depth, scaled_width
from chainward_shared.models.indices import Axis, Picker

_BLOCK = r"stages\.(\d+)\.blocks\.\d+\."
_PARAMS = r"\.(?:weight|bias)"


@register
class ConvNeXts(Family):
    """ConvNeXt V1 and V2 with patch or overlapping stem, linear or convolutional MLP, any of timm's norms.

    Axes: the width of each stage, the hidden layer of each stage's MLP, the middle of a stem of two
    convolutions, and the hidden layer of the classifier where there is one. A depthwise convolution has the
    stage on its first axis only. Works on images of any size; its patches are one convolution among others and are
    not resampled.
    """

    name = "convnext"
    examples = "convnext_atto, convnextv2_tiny"
    size_options = frozenset({"dims", "depths"})
    classifier = re.compile(r"head\.fc\..*")
    layer = re.compile(r"(stages\.\d+\.blocks)\.(\d+)")
    rules = (
        # "stem_first" is the first layer with channels: all of the stem, or its first of two convolutions
        (re.compile(rf"stem\.0{_PARAMS}"), ("stem_first",)),
        (re.compile(rf"stem\.[1-9]{_PARAMS}"), ("stage0", "stem_first")),
        (re.compile(rf"stages\.(\d+)\.downsample\.0{_PARAMS}"), ("before{0}",)),
        (re.compile(rf"stages\.(\d+)\.downsample\.1{_PARAMS}"), ("stage{0}", "before{0}")),
        (re.compile(rf"{_BLOCK}(?:conv_dw|norm){_PARAMS}"), ("stage{0}",)),
        (re.compile(rf"{_BLOCK}gamma"), ("stage{0}",)),
        (re.compile(rf"{_BLOCK}mlp\.fc1{_PARAMS}"), ("mlp{0}", "stage{0}")),
        (re.compile(rf"{_BLOCK}mlp\.grn{_PARAMS}"), ("mlp{0}",)),
        (re.compile(rf"{_BLOCK}mlp\.fc2{_PARAMS}"), ("stage{0}", "mlp{0}")),
        (re.compile(rf"(?:norm_pre|head\.norm){_PARAMS}"), ("stage3",)),
        (re.compile(rf"head\.pre_logits\.fc{_PARAMS}"), ("features", "stage3")),
        (re.compile(rf"head\.fc{_PARAMS}"), (None, "features")),
    )

    def matches(self, model: Any) -> bool:
        return isinstance(model, ConvNeXt) and all(_depth(stage) > 0 for stage in model.stages)

    def sizes(self, model: Any) -> dict[str, int]:
        sizes = {
            "width of the stem": model.stem[0].out_channels,
            "width of the features": model.head_hidden_size,
        }
        for i, stage in enumerate(model.stages):
            sizes[f"width of stage {i}"] = _width(stage)
            sizes[f"MLP width of stage {i}"] = _hidden(stage)
            sizes[f"number of blocks of stage {i}"] = _depth(stage)
        return sizes

    def patch_size(self, model: Any) -> int:
        stem = model.stem[0]
        return int(stem.stride[0]) if stem.kernel_size == stem.stride else 0

    def scaled_options(self, model: Any, width: float, depth: float) -> dict[str, JsonValue]:
        return {
            "dims": [scaled_width(_width(stage), width) for stage in model.stages],
            "depths": [scaled_depth(_depth(stage), depth) for stage in model.stages],
        }

    def channels(self, teacher: Any, student: Any, picker: Picker) -> Mapping[str, Axis]:
        axes = {}
        for i, (large, small) in enumerate(zip(teacher.stages, student.stages, strict=True)):
            axes[f"stage{i}"] = picker.axis(f"stage{i}", _width(large), _width(small))
            axes[f"before{i}"] = axes[f"stage{max(i - 1, 0)}"]
            axes[f"mlp{i}"] = picker.axis(f"mlp{i}", _hidden(large), _hidden(small))
        axes["stem_first"], axes["features"] = axes["stage0"], axes["stage3"]
        if sum(isinstance(layer, nn.Conv2d) for layer in teacher.stem) > 1:
            axes["stem_first"] = picker.axis("stem_first", teacher.stem[0].out_channels, student.stem[0].out_channels)
        if hasattr(getattr(teacher.head, "pre_logits", None), "fc"):
            axes["features"] = picker.axis("features", teacher.head_hidden_size, student.head_hidden_size)
        return axes


def _width(stage: Any) -> int:
    return int(stage.blocks[0].conv_dw.out_channels)


def _depth(stage: Any) -> int:
    return len(stage.blocks)


def _hidden(stage: Any) -> int:
    # a Linear layer and a 1x1 convolution both have (out, in, ...)
    return int(stage.blocks[0].mlp.fc2.weight.shape[1])
