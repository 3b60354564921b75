"""Name, check and build a timm backbone with fresh weights, never from the network; pretrained ones are put in by
`chainward_shared.pretrained`.

timm takes seconds of CPU to import, with torchvision and PyTorch's compiler, which it brings: it is imported where a model is
built or looked at, so that a command or a message that needs no model does not wait for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from inspect import signature
from typing import Any, Final

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from torch import nn

from chainward_shared.bounds import ImageSize, Part, Sha256
from chainward_shared.errors import ModelError, nearest
from chainward_shared.models.border import border_is_lost, unfilled_patches
from chainward_shared.models.families import Family, describe_families, find_family
from chainward_shared.models.options import MOST_OPTIONS, OptionName, check_options
from chainward_shared.models.parts import trained_names
from chainward_shared.outside import Name
from chainward_shared.preprocessing import Pixels
from chainward_shared.words import first_line, first_problem

METADATA_KEY: Final = "chainward.architecture"


LAYER_SCALE = 1.0
"""Initial layer scale of a ConvNeXt. timm's 1e-6 is made for 300 epochs of ImageNet; in the few hundred steps of a link it
leaves the blocks all but switched off (phantoms: chain 0.48 -> 0.55, a hospital alone 0.26 -> 0.35 balanced accuracy)."""


class Start(BaseModel):
    """Pretrained weights that a model starts from, and which part of it is trained further.

    Attributes:
        name: of the weights, as timm has it, e.g. ``"vit_small_patch14_dinov2.lvd142m"``.
        file: SHA-256 of the weights file.
        digest: of the tensors that the model takes from it, as they travel; see `chainward_shared.weights.digest`.
        part: "all", "head", "norms-and-biases" or "last-N"; see `models.parts`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = Field(min_length=1)
    file: Sha256
    digest: Sha256
    part: Part = "all"


class Architecture(BaseModel):
    """Everything that decides a model's shapes, so that plain timm can rebuild it, and what it starts from.

    Attributes:
        name: the timm model, without the tag of a pretrained version, e.g. ``"vit_tiny_patch16_224"``.
        num_classes: outputs of the classifier.
        in_chans: channels of an image, 1 for grey.
        image_size: side of the square image, pixels.
        options: further arguments of `timm.create_model`, e.g. ``{"img_size": 64, "embed_dim": 96}``. Default
            none.
        pixels: how its images are scaled; None: as of models that start at random.
        start: the pretrained weights it starts from; None: none.

    Raises:
        ModelError: the name is unknown to timm or asks for a download, or an option would load weights.
        pydantic.ValidationError: a field is missing, unknown, of another type, or a size is below 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=128)
    num_classes: int = Field(ge=1, le=10_000)
    in_chans: int = Field(ge=1, le=64)
    image_size: ImageSize
    options: dict[OptionName, JsonValue] = Field(default_factory=dict, max_length=MOST_OPTIONS)
    pixels: Pixels | None = None
    start: Start | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # files and digests of models that start at random stay what they were before there were others
        content: dict[str, Any] = serialise(self)
        return {key: value for key, value in content.items() if value is not None}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        _check_name(name)
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        check_options(self.name, self.options)
        if (img_size := self.options.get("img_size", self.image_size)) != self.image_size:
            raise ModelError(
                f"architecture '{self.name}' has image_size {self.image_size} but the option "
                f"img_size {img_size}: make them equal"
            )
        if self.pixels is not None and len(self.pixels.mean) != self.in_chans:
            raise ModelError(
                f"architecture '{self.name}' reads {self.in_chans} channels, its pixels have {len(self.pixels.mean)} means"
            )
        return self

    def timm_kwargs(self) -> dict[str, Any]:
        """Return the arguments with which ``timm.create_model(name, pretrained=False, **kwargs)`` rebuilds
        the model."""
        return {"num_classes": self.num_classes, "in_chans": self.in_chans, **self.options}

    def to_metadata(self) -> dict[str, str]:
        """Return the architecture as metadata of a safetensors file; the ``timm.*`` entries suffice without
        Chainward."""
        return {
            METADATA_KEY: self.model_dump_json(),
            "chainward.image_size": str(self.image_size),
            "timm.model": self.name,
            "timm.kwargs": json.dumps(self.timm_kwargs()),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Architecture:
        """Return the architecture that `to_metadata` wrote.

        Raises:
            ModelError: the entry is missing or damaged, or timm does not know the model.
        """
        if METADATA_KEY not in metadata:
            raise ModelError(f"the file's metadata has no '{METADATA_KEY}': it was not written by Chainward")
        try:
            return cls.model_validate_json(metadata[METADATA_KEY])
        except ValidationError as error:
            raise ModelError(f"the file's '{METADATA_KEY}' is damaged: {first_problem(error)}") from error


def resolve_architecture(
    name: str, *, num_classes: int, in_chans: int, image_size: int, patch_size: int = 0, pretrained: bool = False
) -> Architecture:
    """Return the architecture of the timm model `name` for square images of `image_size` pixels.

    A ConvNeXt gets another initial layer scale than timm's, a ResNetV2 with batch norm gets group norm, unless it is to take
    pretrained weights: see `LAYER_SCALE` and `families.resnetv2`. An `Architecture` without options is the model exactly as
    timm names it.

    Args:
        patch_size: side in pixels of the patches that the model cuts an image into; 0, the default, keeps the
            backbone's.
        pretrained: the model takes pretrained weights, so it is built as those were.

    Raises:
        ModelError: timm has no such model, the name is that of pretrained weights, a size is below 1, the
            model has no patch size to set, or it can't work on images of this size.
    """
    _check_name(name)
    try:
        plain = Architecture(name=name, num_classes=num_classes, in_chans=in_chans, image_size=image_size)
    except ValidationError as error:
        raise ModelError(f"backbone '{name}': {first_problem(error)}") from error
    if patch_size < 0:
        raise ModelError(f"patch size {patch_size} of '{name}' is negative: give pixels, or 0 for the backbone's own")
    # such a model checks and stores its image size; any other works on any size, and has no argument for it
    takes_image_size = _takes(skeleton(plain), "img_size")
    architecture = _with_sizes(plain, image_size, patch_size, takes_image_size)
    if patch_size:
        _check_patch_size_is_used(architecture, patch_size)
    _check_image_size(architecture, takes_image_size)
    if pretrained:
        return architecture
    if any(name.endswith(".gamma") for name in skeleton(architecture).state_dict()) and _takes(
        skeleton(architecture), "ls_init_value"
    ):
        options = {**architecture.options, "ls_init_value": LAYER_SCALE}
        architecture = architecture.model_copy(update={"options": options})
    if (family := find_family(skeleton(architecture))) and (own := family.default_options(skeleton(architecture))):
        architecture = architecture.model_copy(update={"options": {**architecture.options, **own}})
    return architecture


def build_model(architecture: Architecture, seed: int | None = None) -> nn.Module:
    """Return the model on the CPU in training mode, with fresh weights; trainable is the part that its start says.

    `architecture_of` and `chainward_shared.preprocessing.scaled_for` know it again.

    Args:
        seed: decides every initial weight, and leaves the global generators untouched. None, the default,
            draws from torch's global generator.

    Raises:
        ModelError: timm can't build it.
    """
    if seed is None:
        return _known(_create(architecture, "cpu"), architecture)
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that also reseeds every accelerator, which nothing here restores
        torch.default_generator.manual_seed(seed)
        return _known(_create(architecture, "cpu"), architecture)


def _known(model: nn.Module, architecture: Architecture) -> nn.Module:
    model.chainward_architecture = architecture  # type: ignore[assignment]
    model.chainward_pixels = architecture.pixels  # type: ignore[assignment]
    if architecture.start is not None:
        trained = trained_names(model, architecture.start.part)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    return model


def architecture_of(model: nn.Module) -> Architecture | None:
    """Return the architecture of a model that `build_model` built, also where Opacus wrapped it; None of any other."""
    inner = getattr(model, "_module", model)
    found = getattr(inner, "chainward_architecture", None)
    return found if isinstance(found, Architecture) else None


def skeleton(architecture: Architecture) -> nn.Module:
    """Return the model on the meta device: shapes without weights. Callers share it, so never change it.

    Raises:
        ModelError: timm can't build it.
    """
    return _skeleton(architecture.model_dump_json())


def family_of(architecture: Architecture | str) -> str:
    """Return the family, ``"vit"``, ``"convnext"`` or ``"resnetv2"``, by whose rules weights of this backbone are selected.

    Raises:
        ModelError: no family covers the backbone (it can be built and trained, not selected from), or it is
            unknown.
    """
    return require_family(architecture).name


def require_family(architecture: Architecture | str) -> Family:
    """Return the family itself; see `family_of`."""
    if isinstance(architecture, str):
        _check_name(architecture)
        architecture = Architecture(name=architecture, num_classes=2, in_chans=3, image_size=224)
    family = find_family(skeleton(architecture))
    if family is None:
        raise ModelError(
            f"weights of '{architecture.name}' can't be selected: no rules for its family; "
            f"supported are {describe_families()}"
        )
    return family


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

    Args:
        large: the teacher's architecture. The classes are kept, and the scaling of the pixels; what it started from is not.
        width: factor on the widths, within (0, 1].
        depth: factor on the depths, within (0, 1].
        name: a timm model of the same family to take the sizes of instead; then `width` and `depth` are not
            used.
        image_size: side in pixels of the images that the student sees. 0, the default: the teacher's.
        patch_size: side in pixels of a ViT student's patches. 0, the default: the teacher's.

    Raises:
        ModelError: no family covers `large` or `name`, the families differ, a factor is out of range, the
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
        takes_image_size = _takes(skeleton(student), "img_size")
        student = _with_sizes(student, image_size or large.image_size, patch_size, takes_image_size)
        _check_image_size(student, takes_image_size)
    check_selectable(large, student)
    if family.sizes(skeleton(student)) == family.sizes(skeleton(large)):
        raise ModelError(
            f"compact student '{student.name}' is as large as its teacher '{large.name}' in every dimension: "
            "lower the width or the depth factor, or name a smaller model"
        )
    return student.model_copy(update={"start": None})


def check_selectable(teacher: Architecture, student: Architecture) -> Family:
    """Check that weights of `student` can be selected out of `teacher`, and return their family.

    Raises:
        ModelError: the family has no rules or differs, the number of input channels differs, or the patch size where
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


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trainable or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def _check_name(name: str) -> None:
    if ":" in name or "/" in name:
        raise ModelError(f"backbone '{name}' names a place to load from: give the plain name of a timm model")
    import timm

    plain, _, tag = name.partition(".")
    if tag and timm.is_model(plain):
        raise ModelError(
            f"backbone '{name}' names pretrained weights, '{tag}': use '{plain}', and chain.start-from for the weights"
        )
    if not timm.is_model(name):
        raise ModelError(f"timm {timm.__version__} has no model '{name}'{nearest(name, timm.list_models())}")


def _create(architecture: Architecture, device: str) -> nn.Module:
    import timm

    try:
        with torch.device(device):
            return timm.create_model(architecture.name, pretrained=False, **architecture.timm_kwargs())
    except Exception as error:  # timm answers a bad argument with whatever its layers raise
        raise ModelError(
            f"timm can't build '{architecture.name}' with {architecture.timm_kwargs()}: {first_line(error)}"
        ) from error


@lru_cache(maxsize=64)
def _skeleton(architecture_json: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return _create(Architecture.model_validate_json(architecture_json), "meta").eval()


def _takes(model: nn.Module, argument: str) -> bool:
    """Tell whether the class of `model`, or one that it hands its arguments on to, has this argument."""
    own_inits = (vars(cls).get("__init__") for cls in type(model).__mro__)
    return any(argument in signature(init).parameters for init in own_inits if init)


def _with_sizes(plain: Architecture, image_size: int, patch_size: int, takes_image_size: bool) -> Architecture:
    options = dict(plain.options)
    if takes_image_size:
        options["img_size"] = image_size
    if patch_size:
        options["patch_size"] = patch_size
    return plain.model_copy(update={"image_size": image_size, "options": options})


def _check_patch_size_is_used(architecture: Architecture, patch_size: int) -> None:
    plain = architecture.model_copy(update={"options": {}})
    # timm's models pass unknown arguments on to a class that may not have them, or may not use them
    used = _takes(skeleton(plain), "patch_size")
    if used and (family := find_family(skeleton(architecture))):
        used = family.patch_size(skeleton(architecture)) == patch_size
    if not used:
        raise ModelError(f"backbone '{architecture.name}' has no patch size to set to {patch_size}: leave it at 0")


def _check_image_size(architecture: Architecture, takes_image_size: bool) -> None:
    name, image_size, model = architecture.name, architecture.image_size, skeleton(architecture)
    family = find_family(model)
    patch_size = family.patch_size(model) if family else 0
    # a ViT would silently drop the border that does not fill a patch
    if takes_image_size and patch_size and image_size % patch_size:
        fitting = [size for size in range(1, image_size + 1) if image_size % size == 0]
        closest = min(fitting, key=lambda size: abs(size - patch_size))
        raise ModelError(
            f"images of {image_size} pixels can't be cut into the {patch_size}-pixel patches of '{name}': "
            f"choose a patch size that divides {image_size}, e.g. {closest}"
        )
    if problem := _forward_problem(architecture):
        advice = _what_fits(architecture, takes_image_size) or problem
        raise ModelError(f"'{name}' can't work on images of {image_size} pixels: {advice}")
    _check_border(architecture)


def _check_border(architecture: Architecture) -> None:
    """Refuse a model that would see only the inner part of its images."""
    name, side = architecture.name, architecture.image_size
    try:
        patch = unfilled_patches(
            skeleton(architecture), torch.empty(1, architecture.in_chans, side, side, device="meta")
        )
    except NotImplementedError:
        return  # an operation that the meta device lacks says nothing about the size
    if patch and _loses_border(architecture.model_dump_json()):
        raise ModelError(
            f"'{name}' does not see the border of images of {side} pixels, which don't fill its patches of {patch}: choose "
            f"images of {side // patch * patch or patch} or {(side // patch + 1) * patch} pixels"
        )


@lru_cache(maxsize=64)
def _loses_border(architecture_json: str) -> bool:
    architecture = Architecture.model_validate_json(architecture_json)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return border_is_lost(_create(architecture, "cpu").eval(), architecture.in_chans, architecture.image_size)


def _what_fits(architecture: Architecture, takes_image_size: bool) -> str:
    """Return the smallest larger image, and the patch size, with which the model works, or an empty
    string."""

    def fits(image_size: int, patch_size: int) -> bool:
        try:
            return not _forward_problem(_with_sizes(architecture, image_size, patch_size, takes_image_size))
        except ModelError:
            return False

    ways = []
    side = architecture.image_size
    larger = range((side // 8 + 1) * 8, 513, 8)
    if image := next((size for size in larger if fits(size, 0)), 0):
        ways.append(f"choose images of at least {image} pixels")
    family = find_family(skeleton(architecture))
    own_patch = family.patch_size(skeleton(architecture)) if family else 0
    if patch := next((size for size in range(own_patch - 1, 0, -1) if side % size == 0 and fits(side, size)), 0):
        ways.append(f"patch size {patch}")
    return " or ".join(ways)


def _forward_problem(architecture: Architecture) -> str:
    """Return why the model can't do a forward pass at its image size, or an empty string if it can."""
    shape = (1, architecture.in_chans, architecture.image_size, architecture.image_size)
    try:
        with torch.no_grad():
            skeleton(architecture)(torch.empty(shape, device="meta"))
    except NotImplementedError:
        return ""  # an operation that the meta device lacks says nothing about the size
    except (RuntimeError, AssertionError, ValueError) as error:
        return first_line(error)
    return ""


def _named_student(large: Architecture, family: Family, name: str) -> Architecture:
    if family_of(name) != family.name:
        # refused by the caller's check; the teacher's options mean nothing to another family
        return Architecture(**large.model_dump(exclude={"name", "options"}), name=name)
    options = {key: value for key, value in large.options.items() if key not in family.size_options}
    student = large.model_copy(update={"name": name, "options": options})
    patch_size = family.patch_size(skeleton(large))
    if patch_size and family.patch_size(skeleton(student)) != patch_size:
        student = student.model_copy(update={"options": {**options, "patch_size": patch_size}})
    return student


def _components(model: nn.Module) -> set[str]:
    """Return the names of the parameters with the number of the layer left out."""
    return {re.sub(r"\.\d+\.", ".*.", name) for name in model.state_dict()}
