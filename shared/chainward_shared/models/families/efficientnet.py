"""Networks of inverted residual blocks with batch norm: timm's EfficientNet, MobileNetV2 and V3, MNASNet, TinyNet and kin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import JsonValue
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

from chainward_shared.models.families import Family, register
from chainward_shared.models.indices import Axis, Picker, select_layers
from chainward_shared.models.multipliers import DEPTH, WIDTH, multipliers_of

_BLOCK = r"blocks\.(\d+)\.(\d+)\."
_NORM = r"\.(?:weight|bias|running_mean|running_var|num_batches_tracked)"
_PARAMS = r"\.(?:weight|bias)"


@register
class EfficientNets(Family):
    """EfficientNet and MobileNet with batch norm, with or without squeeze-and-excitation.

    Axes: the stem, the width of each stage, and of each block by itself the expanded width that its depthwise convolution and its
    squeeze-and-excitation work on, and the squeezed width; blocks of one stage differ in both. A depthwise convolution has
    the expanded axis first, and no other. The statistics of batch norm go with the channels that they are of.

    Layers of one name do different things in blocks of different kinds, so the rules name what a layer works on, and `channels`
    says which axis that is in each block: in one without expansion the depthwise convolution works on the block's input.

    A block adds its input to its output where both are equally wide, so rounded widths may add or take away such a sum.

    Kernels that are mixed or conditional, grouped other than depthwise, attention and the universal blocks of MobileNetV4 are not
    covered.
    """

    name = "efficientnet"
    examples = "tf_efficientnet_lite0, efficientnet_b0, mobilenetv2_100, mobilenetv3_large_100"
    size_options = frozenset({WIDTH, DEPTH})
    classifier = re.compile(r"classifier\..*")
    layer = re.compile(r"(blocks\.\d+)\.(\d+)")
    rules = (
        (re.compile(r"conv_stem\.weight"), ("stem",)),
        (re.compile(rf"bn1{_NORM}"), ("stem",)),
        # the first convolution with channels: to the expanded width, or, without expansion, to the stage's
        (re.compile(rf"{_BLOCK}conv_pw\.weight"), ("pointwise{0}.{1}", "input{0}.{1}")),
        (re.compile(rf"{_BLOCK}conv_exp\.weight"), ("wide{0}.{1}", "input{0}.{1}")),
        (re.compile(rf"{_BLOCK}conv\.weight"), ("stage{0}", "input{0}.{1}")),
        (re.compile(rf"{_BLOCK}conv_dw\.weight"), ("wide{0}.{1}",)),
        (re.compile(rf"{_BLOCK}se\.conv_reduce{_PARAMS}"), ("squeezed{0}.{1}", "wide{0}.{1}")),
        (re.compile(rf"{_BLOCK}se\.conv_expand{_PARAMS}"), ("wide{0}.{1}", "squeezed{0}.{1}")),
        (re.compile(rf"{_BLOCK}conv_pwl\.weight"), ("stage{0}", "wide{0}.{1}")),
        (re.compile(rf"{_BLOCK}bn1{_NORM}"), ("bn1{0}.{1}",)),
        (re.compile(rf"{_BLOCK}bn2{_NORM}"), ("bn2{0}.{1}",)),
        (re.compile(rf"{_BLOCK}bn3{_NORM}"), ("stage{0}",)),
        (re.compile(rf"conv_head{_PARAMS}"), ("features", "last")),
        (re.compile(rf"(?:bn2|norm_head){_NORM}"), ("features",)),
        (re.compile(rf"classifier{_PARAMS}"), (None, "features")),
    )

    def matches(self, model: Any) -> bool:
        if not isinstance(model, EfficientNet | MobileNetV3):
            return False
        stages: Any = model.blocks
        return all(len(stage) > 0 and all(_known(block) for block in stage) for stage in stages) and any(
            isinstance(module, nn.BatchNorm2d) for module in model.modules()
        )

    def sizes(self, model: Any) -> dict[str, int]:
        sizes = {"width of the stem": model.conv_stem.out_channels, "width of the features": _features(model)}
        for i, stage in enumerate(model.blocks):
            sizes[f"width of stage {i}"] = _out(stage[0])
            sizes[f"number of blocks of stage {i}"] = len(stage)
        for i, j, block in _blocks(model):
            sizes[f"expanded width of block {j} of stage {i}"] = _wide(block)
            sizes[f"squeezed width of block {j} of stage {i}"] = _squeezed(block)
        return sizes

    def scaled_options(self, model: Any, width: float, depth: float) -> dict[str, JsonValue]:
        # timm rounds widths to multiples of 8, never down by more than a tenth, and depths up
        of_name = multipliers_of(model.pretrained_cfg["architecture"])
        return {WIDTH: round(of_name[WIDTH] * width, 6), DEPTH: round(of_name[DEPTH] * depth, 6)}

    def difference(self, teacher: Any, student: Any) -> str:
        if len(teacher.blocks) != len(student.blocks):
            return f"{len(student.blocks)} stages instead of {len(teacher.blocks)}"
        if type(teacher.conv_stem) is not type(student.conv_stem):
            return "they pad their images differently"
        large = {(i, j): _kind(block) for i, j, block in _blocks(teacher)}
        for i, j, block in _blocks(student):
            for what, found in _kind(block).items():
                if found != (expected := large[i, j][what]):
                    return f"block {j} of stage {i} has {what} {found} instead of {expected}"
        return ""

    def channels(self, teacher: Any, student: Any, picker: Picker) -> Mapping[str, Axis]:
        axis = picker.axis
        stem = axis("stem", teacher.conv_stem.out_channels, student.conv_stem.out_channels)
        axes, before = {"stem": stem}, stem
        for i, (large_stage, small_stage) in enumerate(zip(teacher.blocks, student.blocks, strict=True)):
            stage = axes[f"stage{i}"] = axis(f"stage{i}", _out(large_stage[0]), _out(small_stage[0]))
            taken = select_layers(len(large_stage), len(small_stage), picker.selection.layers)
            for j, (block, of) in enumerate(zip(small_stage, taken, strict=True)):
                large, place = large_stage[of], f"{i}.{j}"
                entering = before if j == 0 else stage
                expands = isinstance(block, InvertedResidual | EdgeResidual)
                wide = axis(f"wide{place}", _wide(large), _wide(block)) if expands else entering
                axes[f"input{place}"], axes[f"wide{place}"] = entering, wide
                axes[f"pointwise{place}"] = wide if expands else stage
                axes[f"bn1{place}"] = stage if isinstance(block, ConvBnAct) else wide
                axes[f"bn2{place}"] = wide if isinstance(block, InvertedResidual) else stage
                if _squeezed(large):
                    axes[f"squeezed{place}"] = axis(f"squeezed{place}", _squeezed(large), _squeezed(block))
            before = stage
        axes["last"] = before
        has_head = isinstance(teacher.conv_head, nn.Conv2d)
        axes["features"] = axis("features", _features(teacher), _features(student)) if has_head else before
        return axes


def _known(block: Any) -> bool:
    """Tell whether the rules cover a block: one of four kinds, depthwise where it is grouped, with a usual excitation."""
    if type(block) not in (ConvBnAct, DepthwiseSeparableConv, InvertedResidual, EdgeResidual):
        return False
    if getattr(block, "conv_s2d", None) is not None:
        return False
    convolutions = [module for name, module in block.named_children() if name.startswith("conv")]
    if not all(isinstance(module, nn.Conv2d) for module in convolutions):
        return False
    depthwise = [getattr(block, "conv_dw", None)]
    grouped = [module for module in convolutions if module.groups > 1]
    if any(module not in depthwise or module.groups != module.in_channels for module in grouped):
        return False
    excitation = getattr(block, "se", None)
    plain = excitation is None or isinstance(excitation, nn.Identity)
    return plain or (hasattr(excitation, "conv_reduce") and hasattr(excitation, "conv_expand"))


def _blocks(model: Any) -> Iterator[tuple[int, int, Any]]:
    for i, stage in enumerate(model.blocks):
        for j, block in enumerate(stage):
            yield i, j, block


def _kind(block: Any) -> dict[str, str]:
    """Return what of a block, sizes aside, decides what it does, by a word for messages."""
    convolutions = {name: module for name, module in block.named_children() if isinstance(module, nn.Conv2d)}
    return {
        "the kind": type(block).__name__,
        "kernels of": "/".join(f"{module.kernel_size[0]}" for module in convolutions.values()),
        "strides of": "/".join(f"{module.stride[0]}" for module in convolutions.values()),
        "the activation": type(block.bn1.act).__name__,
    }


def _out(block: Any) -> int:
    """Return the width of a block's output."""
    last = next(layer for name in ("conv_pwl", "conv", "conv_pw") if (layer := getattr(block, name, None)) is not None)
    return int(last.out_channels)


def _wide(block: Any) -> int:
    """Return the width inside a block; of one without expansion, that of its input."""
    inside = next(
        layer for name in ("conv_pwl", "conv_dw", "conv") if (layer := getattr(block, name, None)) is not None
    )
    return int(inside.in_channels)


def _squeezed(block: Any) -> int:
    """Return the width inside a block's squeeze-and-excitation; 0 where there is none."""
    reduce = getattr(getattr(block, "se", None), "conv_reduce", None)
    return 0 if reduce is None else int(reduce.out_channels)


def _features(model: Any) -> int:
    return int(model.head_hidden_size)
