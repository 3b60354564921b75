"""What is known of a file of pretrained weights: the card that lies beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from chainward_shared.outside import Line, Name, Record
from chainward_shared.pixels import Pixels

UNKNOWN = "unknown"


class WeightsCard(Record):
    """The card of one file of weights.

    Attributes
    ----------
    backbone : timm model, without tag
    tag : which of timm's weights of this model they are; empty where that is not known
    sha256 : of the file in the store
    original_sha256 : of the file that was added, where that was converted; else None
    bytes : size of the file in the store
    licence, source : in words; `UNKNOWN` where nobody said
    mean, std : per channel of the images that the weights were trained on, pixels within 0 and 1
    input_size : channels, height and width of those images
    interpolation : how they were resized, as timm calls it
    num_classes : outputs of the file's classifier; 0: it has none
    parameters : values in the file, buffers left out
    precision : of the file's numbers, e.g. "float16"; computed is in float32
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    backbone: Name = Field(min_length=1)
    tag: Name = ""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    original_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    licence: Name = UNKNOWN
    source: Line = UNKNOWN
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    interpolation: Name = UNKNOWN
    num_classes: int = Field(ge=0)
    parameters: int = Field(ge=1)
    precision: Name

    @model_validator(mode="after")
    def _pixels_are_possible(self) -> WeightsCard:
        if (len(self.mean), len(self.std)) != (self.input_size[0],) * 2:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations of {self.input_size[0]} channels")
        Pixels(mean=self.mean, std=self.std)
        return self

    @property
    def name(self) -> str:
        """Name as timm writes it, ``backbone.tag``."""
        return f"{self.backbone}.{self.tag}" if self.tag else self.backbone

    def pixels(self, channels: int) -> Pixels:
        """Return how images of so many channels are scaled: where the file's images have others, by the mean of its channels,
        as timm does."""
        if channels == len(self.mean):
            return Pixels(mean=self.mean, std=self.std)
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return Pixels(mean=(mean,) * channels, std=(std,) * channels)
