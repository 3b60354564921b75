"""The architecture that a backbone's name means, for images of a size."""

from __future__ import annotations

from pydantic import ValidationError

from chainward_shared.errors import ModelError
from chainward_shared.models.architecture import Architecture, check_name, skeleton
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
