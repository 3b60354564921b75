"""Pre-activation residual networks with plain convolutions: timm's ResNetV2, with group norm unless told otherwise."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pydantic import JsonValue
from timm.layers import StdConv2d
from timm.models.resnetv2 import Bottleneck, PreActBasic, ResNetV2
from torch import nn

from chainward_shared.models.families import Family, register, scaled_depth, scaled_width
from chainward_shared.models.indices import Axis, Picker

_FIRST = r"stages\.(\d+)\.blocks\.0\."
_LATER = r"stages\.(\d+)\.blocks\.[1-9]\d*\."
_ANY = r"stages\.(\d+)\.blocks\.\d+\."
_NORM = r"\.(?:weight|bias|running_mean|running_var|num_batches_tracked)"
_GROUPS = 32
"""Groups of timm's "groupnorm"."""


@register
class ResNetV2s(Family):
    """ResNetV2 with basic or bottleneck blocks, plain, deep or tiered stem, group norm or batch norm.

    Axes: the stem (and the layers inside a deep one), the width of each stage, and the middle of its blocks. The
    stem is the first stage's axis where nothing lies between them but a sum.

    Group norm has as many groups in the student as in the teacher, so its groups get narrower, never fewer. The same
    channels are taken out of each group: each group of the student then is a sample of one group of the teacher, and its
    mean and variance estimate that group's. Channels taken across groups would be normalised with others than those
    the teacher was trained with. Widths of a student are therefore multiples of the groups.

    The chain builds the models of this family that have batch norm with group norm: private training needs every
    image to be treated on its own, and there are no running statistics to be averaged over sites. A
    model with batch norm (`Architecture` without options) is selected by the same rules, running statistics included.
    Weight-standardised convolutions (``*_bit``) are not covered: they rescale weights by all their inputs, of which
    the student has fewer, and have no per-sample gradients.
    """

    name = "resnetv2"
    examples = "resnetv2_18, resnetv2_34"
    size_options = frozenset({"channels", "layers", "stem_chs", "width_factor"})
    classifier = re.compile(r"head\.fc\..*")
    layer = re.compile(r"(stages\.\d+\.blocks)\.(\d+)")
    rules = (
        (re.compile(r"stem\.conv\.weight"), ("stem",)),
        (re.compile(r"stem\.conv1\.weight"), ("stem_1",)),
        (re.compile(rf"stem\.norm1{_NORM}"), ("stem_1",)),
        (re.compile(r"stem\.conv2\.weight"), ("stem_2", "stem_1")),
        (re.compile(rf"stem\.norm2{_NORM}"), ("stem_2",)),
        (re.compile(r"stem\.conv3\.weight"), ("stem", "stem_2")),
        (re.compile(rf"stem\.norm3?{_NORM}"), ("stem",)),
        (re.compile(rf"{_ANY}downsample\.conv\.weight"), ("stage{0}", "before{0}")),
        (re.compile(rf"{_ANY}downsample\.norm{_NORM}"), ("stage{0}",)),
        (re.compile(rf"{_FIRST}norm1{_NORM}"), ("norm1_of_first{0}",)),
        (re.compile(rf"{_LATER}norm1{_NORM}"), ("norm1{0}",)),
        (re.compile(rf"{_FIRST}conv1\.weight"), ("middle{0}", "before{0}")),
        (re.compile(rf"{_LATER}conv1\.weight"), ("middle{0}", "stage{0}")),
        (re.compile(rf"{_ANY}norm2{_NORM}"), ("middle{0}",)),
        (re.compile(rf"{_ANY}conv2\.weight"), ("conv2{0}", "middle{0}")),
        (re.compile(rf"{_ANY}norm3{_NORM}"), ("norm3{0}",)),
        (re.compile(rf"{_ANY}conv3\.weight"), ("stage{0}", "middle{0}")),
        (re.compile(rf"norm{_NORM}"), ("last",)),
        (re.compile(r"head\.fc\.(?:weight|bias)"), (None, "last")),
    )

    def matches(self, model: Any) -> bool:
        return (
            isinstance(model, ResNetV2)
            and all(_depth(stage) > 0 for stage in model.stages)
            and not any(isinstance(module, StdConv2d) for module in model.modules())
            and all(isinstance(norm, nn.GroupNorm | nn.BatchNorm2d) for norm in _norms(model))
        )

    def sizes(self, model: Any) -> dict[str, int]:
        sizes = {f"width of stem layer {i}": width for i, width in enumerate(_stem_widths(model), start=1)}
        for i, stage in enumerate(model.stages):
            sizes[f"width of stage {i}"] = _width(stage)
            sizes[f"width inside the blocks of stage {i}"] = _middle(stage)
            sizes[f"number of blocks of stage {i}"] = _depth(stage)
        return sizes

    def default_options(self, model: Any) -> dict[str, JsonValue]:
        if not any(isinstance(norm, nn.BatchNorm2d) for norm in _norms(model)):
            return {}
        divisible = all(norm.num_features % _GROUPS == 0 for norm in _norms(model))
        # the stem of a "tiered" model has 24 channels: one group then, in the whole model
        return {"norm_layer": "groupnorm" if divisible else "groupnorm1"}

    def scaled_options(self, model: Any, width: float, depth: float) -> dict[str, JsonValue]:
        # every width that is normalised must be a multiple of the groups, also the fraction of it inside a block or stem
        groups = _groups(model)
        inside = [_multiple(groups, _middle(stage), _width(stage)) for stage in model.stages]
        of_stem = [_multiple(groups, layer, _stem_widths(model)[-1]) for layer in _stem_widths(model)]
        stem_multiple = math.lcm(*of_stem)
        if not _has_downsample(model):  # the stem is the first stage's axis
            stem_multiple = inside[0] = math.lcm(stem_multiple, inside[0])
        return {
            "stem_chs": min(scaled_width(_stem_widths(model)[-1], width, stem_multiple), _stem_widths(model)[-1]),
            "channels": [
                min(scaled_width(_width(stage), width, multiple), _width(stage))
                for stage, multiple in zip(model.stages, inside, strict=True)
            ],
            "layers": [scaled_depth(_depth(stage), depth) for stage in model.stages],
            "width_factor": 1,
        }

    def difference(self, teacher: Any, student: Any) -> str:
        if type(_block(teacher)) is not type(_block(student)):
            return f"blocks {type(_block(student)).__name__} instead of {type(_block(teacher)).__name__}"
        if len(teacher.stages) != len(student.stages):
            return f"{len(student.stages)} stages instead of {len(teacher.stages)}"
        if _groups(teacher) != _groups(student):
            return f"{_groups(student)} groups of channels in the norms instead of {_groups(teacher)}"
        if _has_downsample(teacher) != _has_downsample(student):
            return "only one of them changes the width between the stem and the first stage"
        return ""

    def channels(self, teacher: Any, student: Any, picker: Picker) -> Mapping[str, Axis]:
        groups = _groups(teacher)
        axes = {}
        for i, (large, small) in enumerate(zip(teacher.stages, student.stages, strict=True)):
            axes[f"stage{i}"] = picker.axis(f"stage{i}", _width(large), _width(small), groups)
            axes[f"middle{i}"] = picker.axis(f"middle{i}", _middle(large), _middle(small), groups)
        widths = list(zip(_stem_widths(teacher), _stem_widths(student), strict=True))
        for i, (wide, narrow) in enumerate(widths[:-1], start=1):
            axes[f"stem_{i}"] = picker.axis(f"stem_{i}", wide, narrow, groups)
        axes["stem"] = picker.axis("stem", *widths[-1], groups) if _has_downsample(teacher) else axes["stage0"]
        axes["last"] = axes[f"stage{len(teacher.stages) - 1}"]
        # what the first norm and the last layers of a block work on depends on the kind of block
        block = _block(teacher)
        basic, post = isinstance(block, PreActBasic), isinstance(block, Bottleneck)
        for i in range(len(teacher.stages)):
            stage, middle = axes[f"stage{i}"], axes[f"middle{i}"]
            before = axes[f"stage{i - 1}"] if i else axes["stem"]
            axes[f"before{i}"] = before
            axes[f"norm1_of_first{i}"] = middle if post else before
            axes[f"norm1{i}"] = middle if post else stage
            axes[f"conv2{i}"] = stage if basic else middle
            axes[f"norm3{i}"] = stage if post else middle
        return axes


def _norms(model: Any) -> list[Any]:
    """Return the layers of `model` that normalise."""
    named = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    return [module for name, module in named if re.fullmatch(r"norm\d?", name) and not isinstance(module, nn.Identity)]


def _block(model: Any) -> Any:
    return model.stages[0].blocks[0]


def _groups(model: Any) -> int:
    """Return into how many groups the norms of `model` divide channels; 1 for batch norm."""
    return int(getattr(_block(model).norm2, "num_groups", 1))


def _width(stage: Any) -> int:
    block = stage.blocks[0]
    return int((block.conv2 if isinstance(block, PreActBasic) else block.conv3).out_channels)


def _depth(stage: Any) -> int:
    return len(stage.blocks)


def _middle(stage: Any) -> int:
    return int(stage.blocks[0].conv1.out_channels)


def _stem_widths(model: Any) -> list[int]:
    """Return the output channels of each convolution of the stem; the last is the width of the stem."""
    return [layer.out_channels for layer in model.stem.children() if isinstance(layer, nn.Conv2d)]


def _has_downsample(model: Any) -> bool:
    """Tell whether a convolution lies between the stem and the sum at the end of the first block."""
    return _block(model).downsample is not None


def _multiple(groups: int, part: int, whole: int) -> int:
    """Return of what a width must be a multiple so that it and its fraction ``part / whole`` consist of whole groups."""
    fraction = Fraction(part, whole)
    return math.lcm(8, groups, fraction.denominator * groups // math.gcd(groups, fraction.numerator))
