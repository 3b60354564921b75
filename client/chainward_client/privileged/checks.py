"""What a person should know of a site's privileged data before a teacher reads them: one line each, with the figure.

The lines go to the coordinator with the site's card. They name columns and classes and hold figures over all training
cases; no word of a report, no value of a cell and no patient is ever in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.data.splits import folds
from chainward_client.privileged.vectors import Value, column_vectors, label_pattern

MIN_CASES = 10
"""With fewer cases than this a modality has no teacher."""

SETTLES_LABEL = 0.8
"""A column is reported from this share of the way from chance to certainty on, in balanced accuracy."""

NAMES_LABEL = 1 / 3
"""Reports are reported from this share on that states the class."""

NUMBERS = 0.5
"""Reports are reported from this share of bare numbers on."""


def with_privileged_notes(data: SiteData) -> SiteData:
    """Return the site's data with a note on each thing that is odd about its reports and its table."""
    return replace(data, notes=data.notes + privileged_notes(data))


def privileged_notes(data: SiteData) -> tuple[str, ...]:
    """Return what is odd about the reports and the table of a site's training cases."""
    cases = data.splits["train"]
    notes: list[str] = []
    if len(cases) and cases.privileged.texts is not None:
        notes += _text_notes(cases.privileged.texts, data, cases)
    if len(cases) and cases.privileged.table is not None and data.privileged.columns:
        dealt = folds(cases.labels, cases.patients, seed=0) if len(cases) >= MIN_CASES else []
        for name in data.privileged.columns:
            notes += _column_notes(name, cases.privileged.table[name], data, dealt)
    return tuple(" ".join(note.split()) for note in notes)  # names may hold line breaks


def _text_notes(texts: Sequence[str | None], data: SiteData, cases: Cases) -> list[str]:
    there = [index for index, text in enumerate(texts) if text]
    present = [text for text in texts if text]
    if not present:
        return [f"reports: missing in all {len(texts)} training cases"]
    if len(present) > 1 and len(set(present)) == 1:
        return [f"reports: the same in all {len(present)} training cases that have one"]
    notes = []
    numbers = float(np.mean([_is_number(text) for text in present]))
    if numbers >= NUMBERS:
        notes.append(f"reports: {numbers:.0%} of {len(present)} are bare numbers; check columns.text")
    patterns = [label_pattern([name]) for name in data.classes]
    stated = [
        any(
            pattern.search(texts[index] or "")
            for pattern in (patterns[c] for c in _classes_of(cases, index))
            if pattern
        )
        for index in there
    ]
    share = float(np.mean(stated))
    if share >= NAMES_LABEL:
        notes.append(
            f"reports: {share:.0%} of {len(present)} name the class of their own case; "
            "privileged.blank-label-words=true takes class names out"
        )
    return notes


def _classes_of(cases: Cases, index: int) -> list[int]:
    label = cases.labels[index]
    return [int(label)] if label.ndim == 0 else torch.nonzero(label > 0.5).flatten().tolist()


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text.replace(",", "."))))
    except ValueError:
        return False


def _column_notes(name: str, values: Sequence[Value], data: SiteData, dealt: Sequence[np.ndarray]) -> list[str]:
    there = [value for value in values if value is not None]
    column = f"privileged column '{name}'"
    if not there:
        return [f"{column}: missing in all {len(values)} training cases"]
    if len(set(there)) == 1:
        return [f"{column}: the same value in all {len(there)} training cases that have one"]
    found = _best_guess(column_vectors(values, data.privileged.columns[name]), data, dealt)
    if found is None:
        return []
    accuracy, chance, what = found
    if accuracy - chance < SETTLES_LABEL * (1 - chance):
        return []
    return [
        f"{column} alone tells {what}: balanced accuracy {accuracy:.2f} on unseen patients (chance {chance:.2f}); "
        "if it encodes the label, name it in privileged.exclude"
    ]


def _best_guess(vectors: np.ndarray, data: SiteData, dealt: Sequence[np.ndarray]) -> tuple[float, float, str] | None:
    """Return balanced accuracy and chance of what a decision tree guesses best from a column, and what that is.

    `dealt`: the rows of each fold of the training cases; with less than two nothing is guessed.
    """
    if len(dealt) < 2:
        return None
    given = data.splits["train"].labels
    if given.ndim == 1:
        labels = given.numpy()
        return _accuracy(vectors, labels, dealt), 1 / len(np.unique(labels)), "the class"
    asked = (given > 0.5).numpy()
    guesses = [
        (_accuracy(vectors, asked[:, index], dealt), 0.5, f"the finding '{finding}'")
        for index, finding in enumerate(data.classes)
        if 0 < asked[:, index].sum() < len(asked)
    ]
    return max(guesses, default=None)


def _accuracy(vectors: np.ndarray, labels: np.ndarray, dealt: Sequence[np.ndarray]) -> float:
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(class_weight="balanced", max_leaf_nodes=64, random_state=0)
    rest_of = [np.setdiff1d(np.arange(len(labels)), held_out) for held_out in dealt]
    guessed = cross_val_predict(tree, vectors, labels, cv=list(zip(rest_of, dealt, strict=True)))
    return float(balanced_accuracy_score(labels, guessed))
