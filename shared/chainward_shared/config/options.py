"""The flat keys of the run configuration, for error messages and documentation: derived from the tables."""

from __future__ import annotations

import types
from inspect import get_annotations
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from chainward_shared.bounds import ZeroOrAtLeast
from chainward_shared.config.tables import kebab

ConfigScalar = bool | int | float | str


class Option(BaseModel):
    """One key of the configuration, for documentation and for error messages."""

    key: str
    kind: str
    allowed: str
    default: ConfigScalar
    description: str


def options_of(config: type[BaseModel]) -> list[Option]:
    """Return every key of a configuration: table after table, in each first its own, then those that it inherits."""
    found: list[Option] = []
    for name, field in config.model_fields.items():
        table = field.annotation
        if isinstance(table, type) and issubclass(table, BaseModel):
            own_first = sorted(table.model_fields, key=lambda key: key not in get_annotations(table))
            found += [_option(f"{name}.{kebab(key)}", table.model_fields[key]) for key in own_first]
        else:
            found.append(_option(kebab(name), field))
    return found


_KINDS = {bool: "true or false", int: "integer", float: "number", str: "text"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _option(key: str, field: FieldInfo) -> Option:
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        kind, allowed = "choice", ", ".join(str(value) for value in get_args(annotation))
    else:
        assert get_origin(annotation) not in (Union, types.UnionType), f"{key}: a key has one type"
        kind = _KINDS[annotation] if annotation in _KINDS else str(annotation)
        bounds = [words for constraint in field.metadata for words in _bounds(constraint)]
        allowed = f"{kind} {', '.join(bounds)}".strip()
    return Option(key=key, kind=kind, allowed=allowed, default=field.default, description=field.description or "")


def _bounds(constraint: Any) -> list[str]:
    if isinstance(constraint, ZeroOrAtLeast):
        return [f"that is 0 or at least {_plain(constraint.least)}"]
    return [
        f"{words} {_plain(getattr(constraint, name))}"
        for name, words in _BOUNDS.items()
        if getattr(constraint, name, None) is not None
    ]


def _plain(value: float) -> str:
    if value == 2**63:
        return "2^63"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:g}"
