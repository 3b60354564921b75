"""Widths and depths of timm's EfficientNets and MobileNets between those that have a name.

timm makes each of them by one function for the whole kind, `_gen_efficientnet_lite` for example, whose channel and depth
multipliers the function with the model's name fixes; the name takes no others. Here the same function is called with others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from types import FunctionType
from typing import Any, Final

from torch import nn

from chainward_shared.errors import ModelError

WIDTH: Final = "channel_multiplier"
DEPTH: Final = "depth_multiplier"
MULTIPLIERS: Final = frozenset({WIDTH, DEPTH})


@dataclass(frozen=True)
class Generator:
    """The function of timm that makes a model, and the arguments that the model's name stands for."""

    function: Callable[..., nn.Module]
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Where plain timm has it, e.g. ``"timm.models.efficientnet:_gen_efficientnet_lite"``."""
        return f"{self.function.__module__}:{self.function.__name__}"


def generator_of(name: str, **arguments: Any) -> Generator:
    """Return what timm would call to make the model `name` with `arguments`, which may hold multipliers.

    Raises
    ------
    ModelError
        timm makes this model otherwise.
    """
    from timm.models import model_entrypoint  # seconds of CPU: see `architecture`

    entry: Any = model_entrypoint(name)
    known = [found for found in entry.__code__.co_names if found.startswith("_gen_")]
    function = entry.__globals__.get(known[0]) if known else None
    if function is None or not signature(function).parameters.keys() >= MULTIPLIERS:
        raise _only_named(name)
    called: dict[str, Any] = {}

    def note(*positional: Any, **named: Any) -> None:
        bound = signature(function).bind(*positional, **named)
        bound.apply_defaults()
        called.update({key: value for key, value in bound.arguments.items() if key != "kwargs"})
        called.update(bound.arguments.get("kwargs", {}))

    # the function with the model's name, as it is, but for what it calls
    noting: Any = FunctionType(entry.__code__, {**entry.__globals__, known[0]: note}, name, entry.__defaults__)
    noting.__kwdefaults__ = entry.__kwdefaults__
    noting(pretrained=False, **{key: value for key, value in arguments.items() if key not in MULTIPLIERS})
    if called.get("pruned"):  # its widths are those of a list
        raise _only_named(name)
    return Generator(function, called | {key: arguments[key] for key in MULTIPLIERS & arguments.keys()})


def _only_named(name: str) -> ModelError:
    return ModelError(
        f"'{name}' comes in the sizes that timm has names for, and in no others: name a smaller one, as in "
        "student.model, instead of factors"
    )


def create_multiplied(name: str, **arguments: Any) -> nn.Module:
    """Return the model `name` of timm with other multipliers than its own: what `timm.create_model` would, if it took them."""
    generator = generator_of(name, **arguments)
    return generator.function(**generator.arguments)


@cache
def multipliers_of(name: str) -> dict[str, float]:
    """Return the channel and the depth multiplier that the model's name stands for.

    Raises
    ------
    ModelError
        timm makes this model otherwise.
    """
    arguments = generator_of(name).arguments
    return {key: float(arguments[key]) for key in MULTIPLIERS}
