"""Patient details and laboratory values of a phantom: they hint at the finding and never settle it."""

from __future__ import annotations

from typing import Any

import numpy as np

from chainward_simulations.phantoms.anatomy import Finding

TABLE_COLUMNS: dict[str, dict[str, Any]] = {
    "age": {"kind": "number", "min": 18, "max": 95},  # years
    "sex": {"kind": "category", "values": ["female", "male"]},
    "smoking": {"kind": "category", "values": ["never", "former", "current"]},
    "crp": {"kind": "number", "min": 0, "max": 250},  # C-reactive protein, mg/L
    "nt_probnp": {"kind": "number", "min": 0, "max": 5000},  # NT-proBNP, ng/L
}

MISSING_SHARE = 0.08

_MEAN_AGE = {"normal": 48, "consolidation": 57, "nodule": 63, "effusion": 66, "cardiomegaly": 69}
_SMOKING = {"nodule": (0.25, 0.35, 0.40)}
_MEDIAN_CRP = {"normal": 5, "consolidation": 55, "nodule": 8, "effusion": 24, "cardiomegaly": 7}
_MEDIAN_NT_PROBNP = {"normal": 110, "consolidation": 220, "nodule": 140, "effusion": 480, "cardiomegaly": 950}


def draw_patient_details(rng: np.random.Generator, finding: Finding) -> dict[str, float | str | None]:
    """Draw what belongs to the patient, whatever the visit: age in years, sex, smoking."""
    age = float(np.clip(np.round(rng.normal(_MEAN_AGE[finding], 15)), 18, 95))
    return {
        "age": age,
        "sex": str(rng.choice(["female", "male"])),
        "smoking": str(rng.choice(["never", "former", "current"], p=_SMOKING.get(finding, (0.5, 0.3, 0.2)))),
    }


def draw_table_row(
    rng: np.random.Generator, finding: Finding, details: dict[str, float | str | None]
) -> dict[str, float | str | None]:
    """Return one case's cells in the order of `TABLE_COLUMNS`, None where missing; draw laboratory values."""
    row = {
        **details,
        "crp": _laboratory_value(rng, _MEDIAN_CRP[finding], 1.0, TABLE_COLUMNS["crp"]["max"]),
        "nt_probnp": _laboratory_value(rng, _MEDIAN_NT_PROBNP[finding], 1.0, TABLE_COLUMNS["nt_probnp"]["max"]),
    }
    missing = rng.random(len(row)) < MISSING_SHARE
    return {column: None if gone else cell for (column, cell), gone in zip(row.items(), missing, strict=True)}


def _laboratory_value(rng: np.random.Generator, median: float, spread: float, upper: float) -> float:
    return float(min(round(rng.lognormal(np.log(median), spread), 1), upper))
