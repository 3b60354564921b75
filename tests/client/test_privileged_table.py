"""Rows of a privileged table become vectors by what is declared, not by what other patients have."""

from __future__ import annotations

import pytest

from chainward_client.data.columns import CategoryColumn, NumberColumn
from chainward_client.privileged.vectors import column_vectors, table_vectors

AGE = NumberColumn(kind="number", min=20, max=100)
SEX = CategoryColumn(kind="category", values=("female", "male", "unknown"))


def test_a_number_is_scaled_by_its_declared_range():
    found = column_vectors((20.0, 100.0, 40.0, None), AGE)
    assert found.tolist() == [[0, 0], [1, 0], [0.25, 0], [0, 1]]


def test_a_category_is_one_of_its_declared_values():
    found = column_vectors(("male", "female", None, "unknown"), SEX)
    assert found.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize(("value", "declared"), [(19.9, AGE), (100.1, AGE), (float("nan"), AGE), ("m", SEX)])
def test_what_is_not_declared_counts_as_missing(value, declared):
    row = column_vectors((value,), declared)[0]
    assert row[-1] == 1
    assert row.sum() == 1


def test_a_row_without_any_value_is_not_available():
    table = {"sex": ("male", None, None), "age": (60.0, None, 20.0), "other": (1.0, 1.0, 1.0)}
    vectors, available = table_vectors(table, {"age": AGE, "sex": SEX})
    assert available.tolist() == [True, False, True]
    assert vectors.tolist() == [[0.5, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]]
