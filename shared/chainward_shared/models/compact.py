"""The architecture of a compact student, and whether its weights can be selected out of its teacher."""

from __future__ import annotations

import re

from torch import nn

from chainward_shared.errors import ModelError
from chainward_shared.models.architecture import Architecture, require_family, skeleton
from chainward_shared.models.families import Family
from chainward_shared.models.sizes import check_image_size, with_sizes


def compact_architecture(
    large: Architecture,
    *,
    width: float = 0.5,
    depth: float = 1.0,
    name: str = "",
    image_size: int = 0,
    patch_size: int = 0,
) -> Architecture:
    """Return the architecture of a compact student whose weights can be selected out of `large`.

    Widths become ``width`` times as large, rounded to multiples of 8, for a ViT of its heads and with group norm of
    the groups too; the number of heads is kept, unless the embedding gets too small for it. Depths (of each stage for
    a convolutional model) become ``depth`` times as large, rounded, at least 1.

    Parameters
    ----------
    large : the teacher's architecture. The classes are kept, and the scaling of the pixels; what it started from is not.
    width : factor on the widths, within (0, 1].
    depth : factor on the depths, within (0, 1].
    name : a timm model of the same family to take the sizes of instead; then `width` and `depth` are not
        used.
    image_size : side in pixels of the images that the student sees. 0, the default: the teacher's.
    patch_size : side in pixels of a ViT student's patches. 0, the default: the teacher's.

    Raises
    ------
    ModelError
        No family covers `large` or `name`, the families differ, a factor is out of range, the
        student is not smaller than the teacher in any dimension, or is larger in one, it can't work on images of
        `image_size`, or the family has no patches that can be resampled.
    """
    family = require_family(large)
    if patch_size and not family.resamples_patches:
        raise ModelError(
            f"a student of '{large.name}' can't have a patch size of its own, {patch_size}: the family {family.name} has "
            "no patches that can be resampled; leave it at 0"
        )
    if name:
        student = _named_student(large, family, name)
    else:
        for key, factor in (("width", width), ("depth", depth)):
            if not 0 < factor <= 1:
                raise ModelError(f"{key} factor {factor} of the compact student of '{large.name}' is not within (0, 1]")
        scaled = family.scaled_options(skeleton(large), width, depth)
        student = large.model_copy(update={"options": {**large.options, **scaled}})
    if image_size or patch_size:
        student = with_sizes(student, image_size or large.image_size, patch_size)
        check_image_size(student)
    check_selectable(large, student)
    if family.sizes(skeleton(student)) == family.sizes(skeleton(large)):
        raise ModelError(
            f"compact student '{student.name}' is as large as its teacher '{large.name}' in every dimension: "
            "lower the width or the depth factor, or name a smaller model"
        )
    return student.model_copy(update={"start": None})


def check_selectable(teacher: Architecture, student: Architecture) -> Family:
    """Check that weights of `student` can be selected out of `teacher`, and return their family.

    Raises
    ------
    ModelError
        The family has no rules or differs, the number of input channels differs, or the patch size where
        patches can't be resampled, the student is larger in a dimension, or one has a component that the other
        lacks. Names both sides.
    """
    family, other = require_family(teacher), require_family(student)
    if other is not family:
        raise ModelError(
            f"student '{student.name}' is of the family {other.name}, its teacher '{teacher.name}' is of "
            f"{family.name}: weights can be selected inside one family only, e.g. {family.examples}"
        )
    large, small = skeleton(teacher), skeleton(student)
    equal = [("number of input channels", teacher.in_chans, student.in_chans)]
    if not family.resamples_patches:
        equal.append(("patch size", family.patch_size(large), family.patch_size(small)))
    for what, expected, found in equal:
        if found != expected:
            raise ModelError(
                f"{what} {found} of student '{student.name}' differs from {expected} of its teacher "
                f"'{teacher.name}': weights can only be selected where they are equal"
            )
    limits = family.sizes(large)
    for what, found in family.sizes(small).items():
        if found > limits.get(what, found):  # what the teacher lacks altogether is named below
            raise ModelError(
                f"student '{student.name}' is larger than its teacher '{teacher.name}': {what} {found}, "
                f"at most {limits[what]} can be selected"
            )
    if differing := sorted(_components(large) ^ _components(small)):
        raise ModelError(
            f"student '{student.name}' and its teacher '{teacher.name}' are built of different components: "
            f"only one of them has '{differing[0]}'"
        )
    if difference := family.difference(large, small):
        raise ModelError(
            f"weights of student '{student.name}' can't be selected out of '{teacher.name}', they are built differently: "
            f"{difference}"
        )
    return family


def _named_student(large: Architecture, family: Family, name: str) -> Architecture:
    if require_family(name) is not family:
        # refused by the caller's check; the teacher's options mean nothing to another family
        return Architecture(**large.model_dump(exclude={"name", "options"}), name=name)
    options = family.kept_options(skeleton(large)) | {
        key: value for key, value in large.options.items() if key not in family.size_options
    }
    student = large.model_copy(update={"name": name, "options": options})
    patch_size = family.patch_size(skeleton(large))
    if patch_size and family.patch_size(skeleton(student)) != patch_size:
        student = student.model_copy(update={"options": {**options, "patch_size": patch_size}})
    return student


def _components(model: nn.Module) -> set[str]:
    """Return the names of the parameters with the number of the layer left out."""
    return {re.sub(r"\.\d+(?=\.)", ".*", name) for name in model.state_dict()}
