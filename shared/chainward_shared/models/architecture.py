"""Name, check and build a timm backbone with fresh weights, never from the network; pretrained ones are put in by
`chainward_shared.pretrained`.

timm takes seconds of CPU to import, with torchvision and PyTorch's compiler, which it brings: it is imported where a model is
built or looked at, so that a command or a message that needs no model does not wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import (
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
from chainward_shared.models.families import Family, describe_families, find_family
from chainward_shared.models.multipliers import MULTIPLIERS, create_multiplied, generator_of
from chainward_shared.models.options import MOST_OPTIONS, OptionName, check_options
from chainward_shared.models.parts import trained_names
from chainward_shared.outside import Name, Record
from chainward_shared.pixels import Pixels
from chainward_shared.words import first_line, first_problem

METADATA_KEY: Final = "chainward.architecture"


class Start(Record):
    """Pretrained weights that a model starts from, and which part of it is trained further.

    Attributes
    ----------
    name : of the weights, as timm has it, e.g. ``"vit_small_patch14_dinov2.lvd142m"``.
    file : SHA-256 of the weights file.
    digest : of the tensors that the model takes from it, as they travel; see `chainward_shared.weights.digest`.
    part : "all", "head", "norms-and-biases" or "last-N"; see `models.parts`.
    """

    name: Name = Field(min_length=1)
    file: Sha256
    digest: Sha256
    part: Part = "all"


class Architecture(Record):
    """Everything that decides a model's shapes, so that plain timm can rebuild it, and what it starts from.

    Attributes
    ----------
    name : the timm model, without the tag of a pretrained version, e.g. ``"vit_tiny_patch16_224"``.
    num_classes : outputs of the classifier.
    in_chans : channels of an image, 1 for grey.
    image_size : side of the square image, pixels.
    options : further arguments of `timm.create_model`, e.g. ``{"img_size": 64, "embed_dim": 96}``. Default
        none.
    pixels : how its images are scaled; None: as of models that start at random.
    start : the pretrained weights it starts from; None: none.

    Raises
    ------
    ModelError
        The name is unknown to timm or asks for a download, or an option would load weights.
    pydantic.ValidationError
        A field is missing, unknown, of another type, or a size is below 1.
    """

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
        check_name(name)
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
        Chainward.

        A model of a size that timm has no name for has ``timm.function``, which is called with ``timm.kwargs``; any other
        ``timm.model``, which `timm.create_model` is called with.
        """
        built = {"timm.model": self.name, "timm.kwargs": json.dumps(self.timm_kwargs())}
        if self.multiplied:
            generator = generator_of(self.name, **self.timm_kwargs())
            built = {"timm.function": generator.name, "timm.kwargs": json.dumps(generator.arguments)}
        return {METADATA_KEY: self.model_dump_json(), "chainward.image_size": str(self.image_size), **built}

    @property
    def multiplied(self) -> bool:
        """Whether it has multipliers of its own, so that timm has no name for it."""
        return bool(MULTIPLIERS & self.options.keys())

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], file: Path | str = "the file") -> Architecture:
        """Return the architecture that `to_metadata` wrote.

        Parameters
        ----------
        file : whose metadata they are, for messages

        Raises
        ------
        ModelError
            The entry is missing or damaged, or timm does not know the model.
        """
        if METADATA_KEY not in metadata:
            raise ModelError(f"{file}: its metadata have no '{METADATA_KEY}': it was not written by Chainward")
        try:
            return cls.model_validate_json(metadata[METADATA_KEY])
        except ValidationError as error:
            raise ModelError(f"{file}: its '{METADATA_KEY}' is damaged: {first_problem(error)}") from error


def build_model(architecture: Architecture, seed: int | None = None) -> nn.Module:
    """Return the model on the CPU in training mode, with fresh weights; trainable is the part that its start says.

    `architecture_of` and `chainward_shared.preprocessing.scaled_for` know it again.

    Parameters
    ----------
    seed : decides every initial weight, and leaves the global generators untouched. None, the default,
        draws from torch's global generator.

    Raises
    ------
    ModelError
        Timm can't build it.
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
    """Return the architecture of a model that `build_model` built; None of any other."""
    found = getattr(model, "chainward_architecture", None)
    return found if isinstance(found, Architecture) else None


def skeleton(architecture: Architecture) -> nn.Module:
    """Return the model on the meta device: shapes without weights. Callers share it, so never change it.

    Raises
    ------
    ModelError
        Timm can't build it.
    """
    return _skeleton(architecture.model_dump_json())


def output_shape(architecture: Architecture) -> tuple[int, ...]:
    """Return the shape of what the model makes of two images, without computing it.

    Whatever the model's layers raise of images of that size is raised here. What was found is remembered: even without any
    data a pass takes longer than a small hospital's scores, and in a simulation one process answers for many hospitals.
    """
    return _output_shape(architecture.model_dump_json())


def require_family(architecture: Architecture | str) -> Family:
    """Return the family by whose rules weights of this backbone are selected.

    Raises
    ------
    ModelError
        No family covers the backbone (it can be built and trained, not selected from), or it is
        unknown.
    """
    if isinstance(architecture, str):
        check_name(architecture)
        architecture = Architecture(name=architecture, num_classes=2, in_chans=3, image_size=224)
    family = find_family(skeleton(architecture))
    if family is None:
        raise ModelError(
            f"weights of '{architecture.name}' can't be selected: no rules for its family; "
            f"supported are {describe_families()}"
        )
    return family


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trainable or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_name(name: str) -> None:
    """Raise a `ModelError` unless `name` is that of a timm model, without weights."""
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
        # a device as context costs a call of Python for every operation, which the CPU, the default, need not pay
        with torch.device(device) if device != "cpu" else nullcontext():
            if architecture.multiplied:
                return create_multiplied(architecture.name, **architecture.timm_kwargs())
            return timm.create_model(architecture.name, pretrained=False, **architecture.timm_kwargs())
    except ModelError:
        raise
    except Exception as error:  # timm answers a bad argument with whatever its layers raise
        raise ModelError(
            f"timm can't build '{architecture.name}' with {architecture.timm_kwargs()}: {first_line(error)}"
        ) from error


@lru_cache(maxsize=64)
def _skeleton(architecture_json: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return _create(Architecture.model_validate_json(architecture_json), "meta").eval()


@lru_cache(maxsize=64)
def _output_shape(architecture_json: str) -> tuple[int, ...]:
    architecture = Architecture.model_validate_json(architecture_json)
    side = architecture.image_size
    with torch.no_grad():
        return tuple(skeleton(architecture)(torch.empty((2, architecture.in_chans, side, side), device="meta")).shape)
