"""What is wrong with a data file, each problem as a clause that begins with its key."""

from __future__ import annotations

import math
from typing import Any


def clause_of(error: Any) -> str:
    """Return one pydantic error as a clause that starts with the key."""
    location = [str(part) for part in error["loc"]]
    if location[:2] == ["columns", "tabular"]:
        del location[3:4]  # pydantic puts the column's kind into the path
    if location[:2] == ["columns", "label"]:
        del location[2:3]  # and whether there are several
    key = ".".join(location)
    prefix = f"key '{key}'" if key else "the file"
    found = error.get("input")
    match error["type"]:
        case "missing":
            return f"{prefix} is missing"
        case "value_error":
            reason = str(error["ctx"]["error"])
            return f"{prefix}: {reason}" if key else reason
        case "union_tag_not_found":
            return f"{prefix}: 'kind' is missing; expected number or category"
        case "union_tag_invalid":
            return f"{prefix}: found kind {error['ctx']['tag']!r}; expected number or category"
        case "model_attributes_type":
            return f"{prefix}: found {_shown(found)}; expected a mapping, {{kind: number, min: 0, max: 100}} say"
    message = error["msg"][0].lower() + error["msg"][1:]
    hint = ""
    if isinstance(found, bool):
        hint = " (YAML reads a bare yes, no, on or off as true or false: put it in quotes)"
    return f"{prefix}: found {_shown(found)}; {message}{hint}"


def _shown(found: Any) -> str:
    if found is None:
        return "nothing"
    if isinstance(found, float) and math.isnan(found):
        return "nan"
    shown = repr(list(found) if isinstance(found, tuple) else found)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def yaml_problem(error: Exception) -> str:
    """Return a YAML error on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return " ".join(str(problem).split()) + where
