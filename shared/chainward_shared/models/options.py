"""Which arguments of timm an architecture may set, and how far: an architecture may arrive in a message or a file."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, JsonValue

from chainward_shared.errors import ModelError
from chainward_shared.models.families import size_options
from chainward_shared.models.multipliers import MULTIPLIERS
from chainward_shared.words import listed, shown

MOST_OPTIONS = 32
OptionName = Annotated[str, Field(max_length=64)]

_PLAIN = frozenset({"img_size", "patch_size", "ls_init_value", "norm_layer"})
_VARIANTS = frozenset(
    {
        "conv_mlp",
        "head_hidden_size",
        "init_values",
        "qk_norm",
        "qkv_bias",
        "scale_attn_norm",
        "scale_mlp_norm",
        "stem_type",
    }
)
"""What else tells the variants of a family apart that weights can be selected out of; none leaves out a layer."""
_DEPTHS = ("depth", "layers")
_MOST_BLOCKS = 128
"""In a stage; the deepest ones of timm have less than half."""
_LARGEST_MULTIPLIER = 8
"""Of widths and depths; the largest ones of timm are below 6."""
_WIDEST = 16_384
_LONGEST_LIST = 8
"""Stages of a model; timm's have four or five."""
_LONGEST_NAME = 64
_MOST = 1e4
_LEAST = 1e-9


def check_options(name: str, options: dict[str, JsonValue]) -> None:
    """Check the options of the architecture `name`.

    Those that would load weights, touch a path or contradict a field are unknown here, like all that Chainward never sets.

    Raises
    ------
    ModelError
        An option is none of those that Chainward sets, or its value is beyond what a model can be built with.
    """
    known = _PLAIN | _VARIANTS | size_options()
    for option, value in options.items():
        if option not in known:
            raise ModelError(
                f"architecture '{name}' has the option {shown(option)}, which it must not set: remove it; "
                f"known are {listed(sorted(known))}"
            )
        if problem := _problem(option, value):
            raise ModelError(f"architecture '{name}' has the option '{option}' = {shown(value)}: {problem}")


def _problem(option: str, value: JsonValue, *, within_list: bool = False) -> str:
    if option in MULTIPLIERS:
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
        return "" if _LEAST <= number <= _LARGEST_MULTIPLIER else f"expected {_LEAST:g} to {_LARGEST_MULTIPLIER}"
    match value:
        case None | bool():
            return ""
        case int():
            most = _MOST_BLOCKS if any(word in option for word in _DEPTHS) else _WIDEST
            return "" if 0 <= value <= most else f"expected 0 to {most}"
        case float():
            tiny = value != 0 and abs(value) < _LEAST
            return (
                ""
                if math.isfinite(value) and abs(value) <= _MOST and not tiny
                else f"expected 0, or {_LEAST:g} to {_MOST:g}"
            )
        case str():
            return "" if len(value) <= _LONGEST_NAME else f"expected at most {_LONGEST_NAME} characters"
        case list() if not within_list:
            if len(value) > _LONGEST_LIST:
                return f"expected at most {_LONGEST_LIST} values"
            return next(filter(None, (_problem(option, part, within_list=True) for part in value)), "")
        case _:
            return "expected a number, a name, or a list of them"
