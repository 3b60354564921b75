"""What a site checks of a request before any work: model, policy, and the weights that came with it.

Whether the model fits the data is checked by their description alone, before any image, label or budget is touched. What came to
light later would come to light because of single records: an architecture with too few outputs fails when a certain label is
sampled, one for other images when any image is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ArrayRecord

from chainward_client.data.description import DataDescription
from chainward_client.data.site_data import SiteData
from chainward_client.policy import check_run
from chainward_client.private_site import PrivateSite, PrivateWork
from chainward_shared.errors import ModelError, PolicyRefusal, ProtocolError, WeightsError
from chainward_shared.models import Architecture
from chainward_shared.models.architecture import output_shape
from chainward_shared.models.heads import check_head
from chainward_shared.models.start import travelling_template, whole
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.private_sums import Frame, frame_template
from chainward_shared.protocol import LinkTask, StatisticsTask, StudentTask
from chainward_shared.weights import StateDict, digest, from_arrays
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


def admitted(
    policy: PrivacyPolicy | None,
    open_privacy: Callable[[], PrivateSite | None],
    task: LinkTask | StudentTask | StatisticsTask,
) -> PrivateWork | None:
    """Return what a training or a statistics round spends through; None where it goes without privacy.

    Parameters
    ----------
    policy : the site's own; None where it has none
    open_privacy : opens what the site's private work needs

    Raises
    ------
    PolicyRefusal
        The policy doesn't allow such a run here, or sums would leave a site that has one without noise.
    LedgerError
        The ledger is damaged, or an older one than the coordinator has seen.
    """
    if isinstance(task, StatisticsTask):
        asked, privileged = task.privacy, False
        if policy is not None and asked is None:
            raise PolicyRefusal(
                "this site has a privacy policy, and the sums of a statistics round without privacy would leave it without "
                "noise; set privacy.mode = 'dp-sgd' or 'by-policy', or chain.head = 'trained'"
            )
    else:
        asked, privileged = task.recipe.privacy, task.recipe.privileged is not None
    if asked is not None and asked.sites == "by-policy" and policy is None:
        return None
    unit = None if asked is None else asked.unit
    check_run(policy, private=asked is not None, unit=unit, privileged=privileged)
    privacy = open_privacy() if asked is not None else None
    if privacy is None:
        return None
    if task.seen_head is not None:
        privacy.ledger.require(task.seen_head)
    return privacy.work(task.run_id, task.hop)


def incoming_state(
    arrays: ArrayRecord | None,
    name: str,
    architecture: Architecture,
    expected: str | None,
    base: StateDict | None = None,
) -> StateDict:
    """Return the whole model of which the weights called `name` in a message are, or are a part.

    Parameters
    ----------
    architecture : names, shapes and dtypes that they must have
    expected : digest of the whole model that the message states
    base : the weights that the architecture starts from; None where it starts from none

    Raises
    ------
    ProtocolError
        They are not there.
    WeightsError
        They are not those of the architecture, or have another digest.
    """
    if arrays is None:
        raise ProtocolError(f"the message lacks the arrays '{name}'")
    state = whole(from_arrays(arrays, travelling_template(architecture)), architecture, base)
    if digest(state) != expected:
        raise WeightsError(f"the arrays '{name}' don't have the digest that the message states; sent again?")
    return state


def incoming_frame(arrays: ArrayRecord | None, task: StatisticsTask) -> Frame:
    """Return the frame in which a private statistics round looks at embeddings, as it came with the task.

    Raises
    ------
    ProtocolError
        It isn't there, or the task has no private sums.
    WeightsError
        It has other shapes than the task says, numbers that are none, or another digest.
    """
    if arrays is None or task.form is None:
        raise ProtocolError("the message lacks the arrays 'frame'")
    state = from_arrays(arrays, frame_template(task.form.dimension, check_head(task.architecture)))
    if digest(state) != task.frame_digest:
        raise WeightsError("the arrays 'frame' don't have the digest that the message states; sent again?")
    return Frame.from_state(state)
