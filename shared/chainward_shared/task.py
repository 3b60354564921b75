"""What is asked about an image."""

from __future__ import annotations

from typing import Literal

Task = Literal["single", "multilabel"]
"""single: every image belongs to exactly one class. multilabel: every class is a finding of its own, which an image has or
has not; any number of them may be there, or none."""

Split = Literal["train", "val", "test"]
