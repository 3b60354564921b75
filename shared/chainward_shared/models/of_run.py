"""The models that a run's configuration asks for."""

from __future__ import annotations

from chainward_shared.config import ChainConfig, RunConfig, StudentConfig
from chainward_shared.models.architecture import Architecture
from chainward_shared.models.compact import compact_architecture
from chainward_shared.models.resolve import resolve_architecture


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
