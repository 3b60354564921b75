"""What is written beside the table: Structured Reports and heat maps, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from chainward_shared.errors import DataError
from chainward_simulations.predict.answers import Answer
from chainward_simulations.predict.heatmaps import HeatMaps
from chainward_simulations.predict.inputs import Batch, Problem
from chainward_simulations.predict.models import Predictor
from chainward_simulations.predict.run import EachBatch
from chainward_simulations.predict.structured_report import StructuredReports


@contextmanager
def writers(
    predictor: Predictor, sr: Path | None, heatmap: Path | None, problems: list[Problem]
) -> Iterator[EachBatch]:
    """Hand out what is to be called with every batch; the reports are written at the end of the block.

    Parameters
    ----------
    sr, heatmap : folders to write to; None: nothing is
    problems : where it is noted of which images nothing could be written

    Raises
    ------
    DataError
        A folder can't be made, highdicom is missing, or the model can't be looked into.
    """
    for folder in (sr, heatmap):
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(
                    f"{folder}: can't be made ({error.strerror}); name a folder you may write to"
                ) from error
    reports = None if sr is None else StructuredReports(predictor, sr)
    maps = None if heatmap is None else HeatMaps(predictor, heatmap)

    def each(batch: Batch, found: list[Answer], logits: np.ndarray) -> None:
        if reports is not None:
            reports.add(batch, found)
        if maps is not None:
            maps.write(batch, found, logits)

    yield each
    if reports is not None:
        reports.write()
    for wrote in (reports, maps):
        problems += [] if wrote is None else wrote.problems
