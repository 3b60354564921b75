"""The models that a run's configuration asks for: what a backbone's name means for images of a size, and its student."""

from __future__ import annotations

from pydantic import ValidationError

from chainward_shared.config import ChainConfig, RunConfig, StudentConfig
from chainward_shared.errors import ModelError
from chainward_shared.models.architecture import Architecture, check_name, skeleton
from chainward_shared.models.compact import compact_architecture
from chainward_shared.models.families import find_family
from chainward_shared.models.sizes import check_image_size, check_patch_size_is_used, takes_argument, with_sizes
from chainward_shared.words import first_problem

LAYER_SCALE = 1.0
"""Initial layer scale of a ConvNeXt. timm's 1e-6 is made for 300 epochs of ImageNet; in the few hundred steps of a link it
leaves the blocks all but switched off (phantoms: chain 0.48 -> 0.55, a hospital alone 0.26 -> 0.35 balanced accuracy)."""


def resolve_architecture(
    name: str, *, num_classes: int, in_chans: int, image_size: int, patch_size: int = 0, pretrained: bool = False
) -> Architecture:
    """Return the architecture of the timm model `name` for square images of `image_size` pixels.

    A ConvNeXt gets another initial layer scale than timm's, a ResNetV2 with batch norm gets group norm, unless it is to take
    pretrained weights: see `LAYER_SCALE` and `families.resnetv2`. An `Architecture` without options is the model exactly as
    timm names it.

    Parameters
    ----------
    patch_size : side in pixels of the patches that the model cuts an image into; 0, the default, keeps the
        backbone's.
    pretrained : the model takes pretrained weights, so it is built as those were.

    Raises
    ------
    ModelError
        Timm has no such model, the name is that of pretrained weights, a size is below 1, the
        model has no patch size to set, or it can't work on images of this size.
    """
    check_name(name)
    try:
        plain = Architecture(name=name, num_classes=num_classes, in_chans=in_chans, image_size=image_size)
    except ValidationError as error:
        raise ModelError(f"backbone '{name}': {first_problem(error)}") from error
    if patch_size < 0:
        raise ModelError(f"patch size {patch_size} of '{name}' is negative: give pixels, or 0 for the backbone's own")
    architecture = with_sizes(plain, image_size, patch_size)
    if patch_size:
        check_patch_size_is_used(architecture, patch_size)
    check_image_size(architecture)
    if pretrained:
        return architecture
    if any(name.endswith(".gamma") for name in skeleton(architecture).state_dict()) and takes_argument(
        skeleton(architecture), "ls_init_value"
    ):
        options = {**architecture.options, "ls_init_value": LAYER_SCALE}
        architecture = architecture.model_copy(update={"options": options})
    if (family := find_family(skeleton(architecture))) and (own := family.default_options(skeleton(architecture))):
        architecture = architecture.model_copy(update={"options": {**architecture.options, **own}})
    return architecture


def chain_architecture(config: ChainConfig, *, classes: int, channels: int, image_size: int) -> Architecture:
    """Return the architecture that travels along the chain, for square images of `image_size` pixels; see `pretrained.begin` for
    what it starts from.

    Raises
    ------
    ModelError
        The backbone is unknown, or doesn't suit such images.
    """
    return resolve_architecture(
        config.backbone,
        num_classes=classes,
        in_chans=channels,
        image_size=image_size,
        patch_size=config.patch_size,
        pretrained=bool(config.start_from),
    )


def student_architecture(config: StudentConfig, large: Architecture) -> Architecture:
    """Return the architecture of the compact student.

    Raises
    ------
    ModelError
        The backbone's family is not one from which weights can be selected, the student isn't smaller, or it can't work
        on images or patches of the size asked for.
    """
    return compact_architecture(
        large,
        width=config.width,
        depth=config.depth,
        name=config.model,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )


def run_architectures(config: RunConfig, large: Architecture) -> list[Architecture]:
    """Return the models of a run: the chain's, and the students' where there are any.

    Raises
    ------
    ModelError
        See `student_architecture`.
    """
    return [large, student_architecture(config.student, large)] if config.student.rounds else [large]
