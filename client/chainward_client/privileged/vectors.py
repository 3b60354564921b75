"""Privileged data become vectors, each of its own case alone.

Reports: hashed n-grams, or the output of a local encoder. Rows of a table: by the declared ranges and values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from chainward_client.data.columns import CategoryColumn, TabularColumn
from chainward_client.privileged.encoder import encoded

Value = float | str | None

TOKEN = r"(?u)\b\w+\b"
"""A word, of one letter too: L and R are sides of the body."""


def hashed_ngrams(texts: Sequence[str], features: int) -> np.ndarray:
    """Return hashed counts of words and pairs of words, float32 (n, features), rows of length 1.

    A count c enters as ``1 + ln c``. What a report becomes depends on this report alone: no vocabulary and no frequencies
    are taken from the data, so nothing of one patient is in another's vector.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.preprocessing import normalize

    if not len(texts):
        return np.zeros((0, features), dtype=np.float32)
    vectorizer = HashingVectorizer(
        n_features=features, ngram_range=(1, 2), token_pattern=TOKEN, alternate_sign=False, norm=None, dtype=np.float32
    )
    counts = vectorizer.transform(texts)
    counts.data = 1 + np.log(counts.data)
    return np.asarray(normalize(counts).toarray(), dtype=np.float32)


def label_pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    """Return what finds `words` in a report, or None if there is nothing to find.

    A word or phrase is found whole, whatever its case, also in the plural (-s, -es, -y to -ies) and with spaces, hyphens
    or underscores between its parts. Names without a letter ("0", "1") are left alone: reports are full of numbers.
    """
    alternatives = []
    for word in sorted({word.lower() for word in words}, key=lambda word: (-len(word), word)):
        parts = re.findall(r"\w+", word.replace("_", " "))
        if not any(character.isalpha() for part in parts for character in part):
            continue
        phrase = r"[\s_-]+".join(re.escape(part) for part in parts)
        alternatives.append(f"{phrase[:-1]}(?:y|ies)" if phrase.endswith("y") else f"{phrase}(?:e?s)?")
    if not alternatives:
        return None
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(alternatives)})(?![^\W_])", re.IGNORECASE)


def text_vectors(
    texts: Sequence[str | None], features: int, *, blank: Sequence[str] = (), encoder: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of reports, float32 (n, d), zeros where missing, and which are there, bool (n,).

    Parameters
    ----------
    texts : reports, None where missing. One without a word, or without any left after blanking, counts as missing
    features : length of a hashed vector; no role with an encoder
    blank : words to take out first
    encoder : folder of an encoder; None: hashed n-grams

    Raises
    ------
    DataError
        The encoder can't be used.
    """
    pattern = label_pattern(blank)
    read = [None if text is None else text if pattern is None else pattern.sub(" ", text) for text in texts]
    available = np.array([text is not None and re.search(r"\w", text) is not None for text in read], dtype=bool)
    present = [text for text, there in zip(read, available, strict=True) if there and text is not None]
    found = hashed_ngrams(present, features) if encoder is None else encoded(present, encoder)
    vectors = np.zeros((len(read), found.shape[1]), dtype=np.float32)
    vectors[available] = found
    return vectors, available


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
