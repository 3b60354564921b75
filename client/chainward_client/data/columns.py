"""Which column of a manifest plays which role, and what its cells may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, FiniteFloat, Tag, model_validator

from chainward_shared.errors import nearest

SEPARATOR = "|"
"""Between the findings of one image in the label column."""


class Block(BaseModel):
    """Base of every mapping in a data file: frozen, and unknown keys are refused."""

    # A class called 1 is a name here, though YAML reads a number.
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, block: Any) -> Any:
        if not isinstance(block, Mapping):
            raise ValueError("expected a mapping ('key: value' lines)")
        known = list(cls.model_fields)
        unknown = [str(key) for key in block if key not in known]
        if unknown:
            named = ", ".join(f"'{key}'{nearest(key, known)}" for key in unknown)
            raise ValueError(f"unknown key{'s' if len(unknown) > 1 else ''} {named}; known: {', '.join(known)}")
        return block


NOTHING_MEANS_DEFAULTS = BeforeValidator(lambda block: {} if block is None else block)
"""Of a mapping: the key with nothing behind it is like leaving it out."""


class NumberColumn(Block):
    """A privileged column of numbers within the declared range `min` to `max`, both included."""

    kind: Literal["number"]
    min: FiniteFloat
    max: FiniteFloat

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if not self.min < self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
        return self


class CategoryColumn(Block):
    """A privileged column that holds one of the declared `values`."""

    kind: Literal["category"]
    values: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _values_differ(self) -> Self:
        refuse_repeats(self.values, "value")
        return self


TabularColumn = Annotated[NumberColumn | CategoryColumn, Field(discriminator="kind")]


LabelColumns = Annotated[
    Annotated[str, Tag("one")] | Annotated[tuple[str, ...], Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list | tuple) else "one"),
]


class Columns(Block):
    """Which column of the manifest plays which role; only `image` and `label` are required.

    Attributes
    ----------
    image : file name of the image; extension and folders optional
    label : class name, or index into the classes; multi-label: the findings' names or indices with "|" between them,
        or a list of columns, one per class in the order of `classes`, that hold 1 or 0
    patient : what must stay together in one split and at one site; default: every image its own
    split : train, val or test; default: split by patient, seeded
    site : the hospital; the natural partition of a simulation
    text : free-text report; privileged
    mask : file name of the region of interest's mask; for scoring only
    box : the columns of x0, y0, x1, y1 in pixels of the original image; for scoring only
    tabular : privileged columns by name, with their declared ranges or values
    """

    image: str
    label: LabelColumns
    patient: str | None = None
    split: str | None = None
    site: str | None = None
    text: str | None = None
    mask: str | None = None
    box: tuple[str, str, str, str] | None = None
    tabular: dict[str, TabularColumn] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _roles_agree(self) -> Self:
        if self.mask is not None and self.box is not None:
            raise ValueError("both 'mask' and 'box' are given; keep one of them")
        if self.box is not None:
            refuse_repeats(self.box, "box column")
        refuse_repeats(self.label_columns, "label column")
        for label in self.label_columns:
            if label == self.text or label in self.tabular:
                raise ValueError(
                    f"column '{label}' is both label and privileged: the privileged teacher would only copy "
                    "the label; take it out of 'text' or 'tabular'"
                )
        return self

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Return the columns that hold the label."""
        return (self.label,) if isinstance(self.label, str) else self.label

    def by_key(self) -> dict[str, str]:
        """Return the column name of every key in use, e.g. ``{"label": "dx", "box[0]": "left", ...}``."""
        single = ("image", "label", "patient", "split", "site", "text", "mask")
        named = {key: name for key in single if isinstance(name := getattr(self, key), str)}
        if not isinstance(self.label, str):
            named |= {f"label[{position}]": name for position, name in enumerate(self.label)}
        named |= {f"box[{position}]": name for position, name in enumerate(self.box or ())}
        return named | {f"tabular.{name}": name for name in self.tabular}


def refuse_repeats(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Return `names` if they differ from each other."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} '{repeated[0]}' is given more than once")
    return names
