"""Free-text reports of phantoms, as uneven as real ones: negations, hedges, abbreviations, typos, errors."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from chainward_simulations.phantoms.anatomy import Finding, Lesion

Choice = TypeVar("Choice")

MISSING_SHARE = 0.10
NON_COMMITTAL_SHARE = 0.20
WRONG_SHARE = 0.07

_STATED: dict[Finding, tuple[str, ...]] = {
    "normal": (
        "Lungs are clear.",
        "No acute cardiopulmonary process.",
        "Heart size within normal limits, clear lung fields.",
        "Unremarkable study.",
        "Both lungs are well aerated. Mediastinal contours are normal.",
        "No active disease in the chest.",
        "Normal appearances for age.",
        "Cardiac and pulmonary outlines within normal limits.",
    ),
    "consolidation": (
        "Airspace opacity in the {place}.",
        "Patchy shadowing in the {place}, ?infective.",
        "Confluent density with air bronchograms, {place}.",
        "There is an infiltrate in the {place}.",
        "Consolidation in the {place}.",
        "Ill-defined opacity in the {place}, in keeping with pneumonia.",
        "Alveolar filling in the {place}; follow-up film in 6 weeks.",
    ),
    "nodule": (
        "{mm} mm rounded opacity in the {place}.",
        "Small well-defined density projected over the {place}.",
        "Coin lesion {place}, CT advised.",
        "Solitary nodule in the {place}, {mm} mm.",
        "Focal rounded opacity {place}; comparison with previous films needed.",
        "Circumscribed lesion of {mm} mm, {place}.",
        "Nodular density overlying a rib in the {place}.",
    ),
    "effusion": (
        "Blunting of the {side} costophrenic angle.",
        "Meniscus at the {side} base.",
        "{side} pleural effusion.",
        "Fluid in the {side} pleural space.",
        "The {side} hemidiaphragm is obscured, layering fluid.",
        "Basal opacity on the {side} tracking up the chest wall.",
        "The {side} angle is not sharp; ultrasound before drainage.",
    ),
    "cardiomegaly": (
        "Enlarged cardiac silhouette.",
        "CTR {ratio} %.",
        "The heart is enlarged.",
        "Heart shadow occupies more than half of the thoracic width.",
        "Cardiomegaly, no decompensation.",
        "Broadened heart, prominent left ventricular contour.",
        "Cardiac outline above the upper limit of normal.",
    ),
}

_NEGATED: dict[Finding, tuple[str, ...]] = {
    "normal": (),
    "consolidation": ("No focal consolidation.", "No infiltrate.", "No airspace disease."),
    "nodule": ("No suspicious nodule.", "No focal lesion.", "No mass seen."),
    "effusion": ("No pleural effusion.", "Costophrenic angles are sharp.", "No pleural fluid."),
    "cardiomegaly": ("Heart not enlarged.", "Heart size normal.", "No cardiomegaly."),
}

_NON_COMMITTAL = (
    "Subtle density at the {side} base, fluid or consolidation cannot be separated.",
    "Heart size difficult to assess on this AP film.",
    "Equivocal shadow in the {place}: nodule, vessel end-on or small infiltrate.",
    "No significant change since the previous examination.",
    "Findings as discussed with the ward.",
    "Limited by poor inspiration. Repeat film advised.",
    "Cannot exclude early disease in the {place}.",
    "Please correlate with clinical findings and laboratory values.",
    "Possible cardiomegaly or effusion, supine film.",
)

_INDICATION = (
    "Shortness of breath.",
    "Cough.",
    "Pre-operative.",
    "Chest pain.",
    "Follow-up.",
    "Fever of unknown origin.",
    "Routine check.",
)

_INCIDENTAL = (
    "Degenerative changes of the thoracic spine.",
    "Mild scoliosis.",
    "Rotated projection.",
    "No pneumothorax.",
    "Old rib fracture on the {side}.",
    "Aortic sclerosis.",
    "Bony thorax intact.",
    "Portable AP view.",
)

_ABBREVIATIONS = {
    "pleural effusion": "pl. eff.",
    "consolidation": "consol.",
    "costophrenic angle": "CPA",
    "right upper zone": "RUZ",
    "right mid zone": "RMZ",
    "right lower zone": "RLZ",
    "left upper zone": "LUZ",
    "left mid zone": "LMZ",
    "left lower zone": "LLZ",
    "within normal limits": "WNL",
    "no acute cardiopulmonary process": "NACPD",
    "opacity": "opac.",
    "previous": "prev.",
    "right": "R",
    "left": "L",
}


def write_report(rng: np.random.Generator, lesion: Lesion, classes: tuple[Finding, ...]) -> str | None:
    """Return the report of one case, or None where it is missing.

    Parameters
    ----------
    rng : source of the wording, and of what the radiologist misses or mistakes
    lesion : what the image shows
    classes : findings that may be negated, or stated by mistake
    """
    finding = lesion.finding
    certainty = rng.random()
    if certainty < MISSING_SHARE:
        return None
    stated: Finding | None = finding
    if certainty < MISSING_SHARE + NON_COMMITTAL_SHARE:
        stated = None
    elif certainty < MISSING_SHARE + NON_COMMITTAL_SHARE + WRONG_SHARE:
        stated = _one_of(rng, tuple(other for other in classes if other != finding))

    sentences = [_one_of(rng, _NON_COMMITTAL if stated is None else _STATED[stated])]
    for other in classes:
        # who commits to nothing does not rule out the actual finding either: drop negations at random
        if other not in (stated, finding) and _NEGATED[other] and rng.random() < 0.3:
            sentences.append(_one_of(rng, _NEGATED[other]))
    if rng.random() < 0.4:
        sentences.append(_one_of(rng, _INCIDENTAL))
    order = rng.permutation(len(sentences))
    text = " ".join(sentences[position] for position in order)
    if rng.random() < 0.4:
        text = f"Indication: {_one_of(rng, _INDICATION)} {text}"

    millimetres = round(150 * lesion.size) if finding == "nodule" else int(rng.integers(6, 16))
    ratio = round(100 * lesion.cardiothoracic_ratio) if finding == "cardiomegaly" else int(rng.integers(50, 56))
    place = f"{lesion.side} {lesion.zone} zone"
    text = text.format(place=place, side=lesion.side, mm=millimetres, ratio=ratio)
    if rng.random() < 0.35:
        text = _abbreviate(rng, text)
    if rng.random() < 0.25:
        text = _mistype(rng, text)
    return text[0].upper() + text[1:]


def _one_of(rng: np.random.Generator, choices: tuple[Choice, ...]) -> Choice:
    return choices[int(rng.integers(len(choices)))]


def _abbreviate(rng: np.random.Generator, text: str) -> str:
    for long, short in _ABBREVIATIONS.items():
        if rng.random() < 0.6:
            text = text.replace(long, short)
    return text


def _mistype(rng: np.random.Generator, text: str) -> str:
    """Swap two neighbouring letters, or lose one, in one or two places."""
    for _ in range(int(rng.integers(1, 3))):
        place = int(rng.integers(1, len(text) - 2))
        if not text[place : place + 2].isalpha():
            continue
        swapped = text[place + 1] + text[place] if rng.random() < 0.6 else text[place]
        text = text[:place] + swapped + text[place + 2 :]
    return text
