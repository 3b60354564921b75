"""What a hospital lets a coordinator ask of its machines: the `limits` block of site.yaml, checked before any work.

The types of a message keep out what makes no sense anywhere; these limits are the hospital's own. A task that is beyond one
is refused before data are read, privacy is reserved or a model is built. Nothing is trimmed to fit: another number of
epochs or threads would give another model than the one that the run asks for.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from chainward_client.site_config import SiteLimits
from chainward_shared.errors import PolicyRefusal
from chainward_shared.models import Architecture, count_parameters, skeleton
from chainward_shared.words import shown

_LIMIT_OF = {
    "epochs": "epochs",
    "frozen_epochs": "epochs",
    "rounds": "rounds",
    "round": "rounds",
    "laps": "laps",
    "lap": "laps",
    "batch_size": "batch_size",
    "image_size": "image_size",
    "threads": "threads",
    "times": "trainings",
}
"""The limit of a field, wherever in a task it stands."""


def check_limits(task: BaseModel, limits: SiteLimits) -> None:
    """Check a task, or a part of one, against the hospital's own limits.

    Raises
    ------
    PolicyRefusal
        Something asked is beyond one: the field, what was asked, what is allowed, and by whose word.
    ModelError
        timm can't build a model of the task.
    """
    models = [("model", task)] if isinstance(task, Architecture) else []
    for where, value in _fields(task):
        if isinstance(value, Architecture):
            models.append((where, value))
        elif (limit := _LIMIT_OF.get(where.rpartition(".")[2])) is not None:
            _refuse_above(where, value, limit, limits)
    for where, architecture in models:  # last: only now their sizes are known to be such that they may be laid out
        _refuse_above(f"{where}.parameters", count_parameters(skeleton(architecture)), "parameters", limits)


def enough(images: int, rarest: int, limits: SiteLimits) -> bool:
    """Return whether sums go over enough images for the hospital to let them out; see `check_enough`."""
    return images >= limits.statistics_images and rarest >= limits.statistics_class


def check_enough(images: int, rarest: int, limits: SiteLimits) -> None:
    """Check that sums go over enough images for the hospital to let them out.

    Parameters
    ----------
    images : labelled training images
    rarest : of them, those of the class with the fewest that the site has

    Raises
    ------
    PolicyRefusal
        They don't. Neither number is in the message.
    """
    for found, limit, of in (
        (images, "statistics_images", "labelled training images"),
        (rarest, "statistics_class", "images of some class"),
    ):
        least = getattr(limits, limit)
        if found < least:
            raise PolicyRefusal(
                f"the hospital has too few {of} for the sums over their embeddings to leave it: it wants at least {least} "
                f"(limits.{limit} in its site.yaml); go on without it, or set chain.head and student.head to 'trained'"
            )


def _fields(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value in a model, and in the models within it, with its place."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        yield f"{prefix}{name}", value
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, BaseModel):
                yield from _fields(part, f"{prefix}{name}.")


def _refuse_above(where: str, asked: object, limit: str, limits: SiteLimits) -> None:
    most = getattr(limits, limit)
    if not isinstance(asked, int) or asked <= most:
        return
    whose = "set in its site.yaml" if limit in limits.model_fields_set else "the default, as its site.yaml sets none"
    raise PolicyRefusal(
        f"{where} = {shown(asked)} is more than this hospital does at a coordinator's word: at most {most} "
        f"(limits.{limit}, {whose}); ask for less, or agree with the hospital on more"
    )
