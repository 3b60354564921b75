"""Whether a model that a request names fits the site's data, by their description alone.

Everything is checked here before any image, label or budget is touched. What came to light later would come to light because
of single records: an architecture with too few outputs fails when a certain label is sampled, one for other images when any
image is.
"""

from __future__ import annotations

from dataclasses import dataclass

from chainward_client.data.description import DataDescription
from chainward_client.data.site_data import SiteData
from chainward_shared.errors import DataError, ModelError
from chainward_shared.models import Architecture
from chainward_shared.models.architecture import output_shape
from chainward_shared.words import first_line


@dataclass(frozen=True)
class Described:
    """What a data file says of its images, without a look at its rows.

    Attributes
    ----------
    classes : number of classes, or of findings; None where the file leaves it to the labels
    channels : 1 or 3
    image_size : side of the images that a model of full size sees, pixels
    """

    classes: int | None
    channels: int
    image_size: int

    @classmethod
    def by(cls, description: DataDescription) -> Described:
        """Return what a parsed data file says."""
        classes = None if description.classes is None else len(description.classes)
        return cls(classes, description.image.channels, description.image.size)

    @classmethod
    def of(cls, data: SiteData) -> Described:
        """Return what opened data are; for simulations, which have nothing to hide from themselves."""
        images = data.splits["train"].images
        return cls(len(data.classes), images.shape[1], images.shape[-1])


def require_class_names(description: DataDescription) -> None:
    """Refuse a data file that leaves the number of classes to the labels; for sites with a privacy policy.

    Raises
    ------
    DataError
        The largest label, and so one patient, would decide what the site says of itself.
    """
    if description.classes is None:
        raise DataError(
            f"{description.table_file}: a site with a privacy policy must name its classes; without 'classes' in the data file "
            "the largest label decides how many there are, and so a single patient might"
        )


def check_architecture(architecture: Architecture, described: Described, *, any_size: bool = False) -> None:
    """Check that a model takes the site's images and has an output for each of its classes.

    Parameters
    ----------
    any_size : the images are brought to the model's size, as for a student; else the sizes must agree

    Raises
    ------
    ModelError
        It doesn't. Names what was asked and what the site has.
    """
    asked = (architecture.num_classes, architecture.in_chans, architecture.image_size)
    has = (described.classes or architecture.num_classes, described.channels, described.image_size)
    for what, one, other in zip(("classes", "channels", "pixels a side"), asked, has, strict=True):
        if one != other and not (any_size and what == "pixels a side"):
            raise ModelError(f"the model is for {one} {what}, this site's data have {other}; agree on one architecture")
    try:
        shape = output_shape(architecture)
    except Exception as error:  # whatever its options do: better here, without any data, than later
        raise ModelError(
            f"'{architecture.name}' with these options can't work on images of {architecture.image_size} pixels: "
            f"{first_line(error)}"
        ) from error
    if shape != (2, architecture.num_classes):
        raise ModelError(
            f"'{architecture.name}' with these options has an output of shape {shape[1:]}; expected ({architecture.num_classes},)"
        )
