"""Predict: a model, some images, and what is written of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chainward_shared.errors import DataError
from chainward_shared.evaluation.classification import evaluate
from chainward_shared.model_record import ModelRecord
from chainward_shared.preparation import Fit, Preparation
from chainward_simulations.predict.answers import Abstain, Answer, Predictions, answers, probabilities
from chainward_simulations.predict.heatmaps import HeatMaps
from chainward_simulations.predict.inputs import Batch, Inputs, Problem
from chainward_simulations.predict.models import Predictor
from chainward_simulations.predict.structured_report import StructuredReports

EachBatch = Callable[[Batch, list[Answer], np.ndarray], None]
"""Called with every batch, its answers and its logits."""


def preparation_of(
    record: ModelRecord,
    site: str | None = None,
    fit: Fit | None = None,
    scale: tuple[float, float] | None = None,
) -> Preparation | None:
    """Return how images are prepared; None where the model's sites differ and nothing was said.

    Parameters
    ----------
    site : images are brought to their square as at this one of the sites that trained the model
    fit, scale : as in `Preparation`, instead of what the model's file says

    Raises
    ------
    DataError
        No such site trained the model, or the scale is none.
    """
    if site is not None and site not in record.preparations:
        known = ", ".join(record.preparations) or "it names none"
        raise DataError(f"--site {site}: not one of the sites that trained the model ({known})")
    found = record.preparation if site is None else record.preparations[site]
    if found is None and fit is not None:
        found = Preparation()
    if found is None:
        return None
    if scale is not None and not scale[0] < scale[1]:
        raise DataError(f"--scale {scale[0]:g} {scale[1]:g}: expected the lower value first")
    changes = {"fit": fit, "scale": scale}
    return found.model_copy(update={name: value for name, value in changes.items() if value is not None})


def predict(
    predictor: Predictor,
    inputs: Inputs,
    *,
    abstain: Abstain,
    each: EachBatch = lambda batch, found, logits: None,
    console: Console | None = None,
) -> Predictions:
    """Return the answers of a model to all images.

    Parameters
    ----------
    abstain : when the model does
    console : where progress is shown; None: nowhere
    """
    done, record = Predictions(predictor), predictor.record
    all_logits, truths = [], []
    for batch in _with_progress(inputs, console):
        done.problems += batch.problems
        if not batch.names:
            continue
        outputs = predictor.outputs(batch.images)
        found = answers(batch.names, outputs, record, abstain)
        done.answers += found
        each(batch, found, outputs.logits)
        if batch.truths is not None:
            all_logits.append(outputs.logits)
            truths.append(batch.truths)
    if truths:
        done.scores = evaluate(probabilities(np.concatenate(all_logits), record), np.concatenate(truths))
    return done


def _with_progress(inputs: Inputs, console: Console | None) -> Iterator[Batch]:
    if console is None:
        yield from inputs.batches()
        return
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=inputs.count)
        for batch in inputs.batches():
            yield batch
            progress.advance(task, len(batch.names) + len(batch.problems))


def check_writable(*places: Path | None) -> None:
    """Check that no place to write to is a folder, before minutes are spent.

    Raises
    ------
    DataError
        One is.
    """
    for place in places:
        if place is not None and place.is_dir():
            raise DataError(f"{place}: is a folder; name a file to write")


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
