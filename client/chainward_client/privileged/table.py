"""Rows of a privileged table become vectors, by the declared ranges and values alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chainward_client.data.columns import CategoryColumn, TabularColumn

Value = float | str | None


def column_vectors(values: Sequence[Value], declared: TabularColumn) -> np.ndarray:
    """Return one column as float32 (n, d), its last dimension 1 where the value is missing, and all others 0 there.

    A number is scaled so that the declared range becomes 0 to 1; a category becomes one 1 among its declared values. A
    value that is not declared counts as missing.
    """
    width = len(declared.values) if isinstance(declared, CategoryColumn) else 1
    vectors = np.zeros((len(values), width + 1), dtype=np.float32)
    for row, value in zip(vectors, values, strict=True):
        if isinstance(declared, CategoryColumn):
            row[declared.values.index(str(value)) if value in declared.values else -1] = 1
        elif isinstance(value, int | float) and declared.min <= value <= declared.max:
            row[0] = (value - declared.min) / (declared.max - declared.min)
        else:
            row[-1] = 1
    return vectors


def table_vectors(
    table: Mapping[str, Sequence[Value]], columns: Mapping[str, TabularColumn]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of a table's rows, float32 (n, d), and which have a value at all, bool (n,).

    Parameters
    ----------
    table : values of each column
    columns : the columns to read, in this order; at least one
    """
    parts = [column_vectors(table[name], declared) for name, declared in columns.items()]
    available = np.any([part[:, -1] == 0 for part in parts], axis=0)
    return np.concatenate(parts, axis=1), available
