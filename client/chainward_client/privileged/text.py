"""Reports become vectors: hashed n-grams, or the output of a local encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize as normalized

from chainward_client.precision import best_device
from chainward_shared.errors import DataError

TOKEN = r"(?u)\b\w+\b"
"""A word, of one letter too: L and R are sides of the body."""

ENCODER_BATCH = 16
ENCODER_TOKENS = 512


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


def blanked(text: str, words: Sequence[str]) -> str:
    """Return `text` without `words`, found as by `label_pattern`; all else stays."""
    pattern = label_pattern(words)
    return text if pattern is None else pattern.sub(" ", text)


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


def encoded(texts: Sequence[str], folder: Path) -> np.ndarray:
    """Return the mean over the tokens of an encoder's last layer, float32 (n, width), every row scaled to mean square 1.

    The encoder is frozen. It is read from `folder` and nowhere else, and only as safetensors: code in the folder is never
    run, a pickle never opened.

    Raises
    ------
    DataError
        The extra `text` isn't installed, or `folder` holds no encoder.
    """
    tokenizer, model = _open_encoder(folder)
    device = best_device()
    model.to(device).eval()
    width = int(model.config.hidden_size)
    limit = min(ENCODER_TOKENS, tokenizer.model_max_length, _positions(model.config))
    parts = [np.zeros((0, width), dtype=np.float32)]
    with torch.inference_mode():
        for start in range(0, len(texts), ENCODER_BATCH):
            batch = tokenizer(
                list(texts[start : start + ENCODER_BATCH]),
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(device)
            hidden = model(**batch).last_hidden_state.float()
            pooled = mean_over_tokens(hidden, batch["attention_mask"])
            parts.append((normalized(pooled, dim=1) * width**0.5).cpu().numpy())
    return np.concatenate(parts)


def mean_over_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of `hidden` (n, tokens, width) over the tokens where `mask` (n, tokens) is 1: (n, width)."""
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _positions(config: Any) -> int:
    """Return how many tokens fit; RoBERTa and its kin count positions from the padding's index on."""
    positions = getattr(config, "max_position_embeddings", None) or ENCODER_TOKENS
    return int(positions) - 2 if positions > 4 else int(positions)


def _open_encoder(folder: Path) -> tuple[Any, Any]:
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
    except ImportError:
        raise DataError(
            "privileged.encoder needs the package transformers: pip install 'chainward[text]', or leave the encoder out "
            "for hashed n-grams"
        ) from None
    expected = (
        "expected a Hugging Face encoder (BERT, say) saved with save_pretrained: model, tokenizer and safetensors"
    )
    if not (folder / "config.json").is_file():
        raise DataError(f"privileged.encoder: {folder} has no config.json; {expected}")
    if not any(folder.glob("*.safetensors")):
        raise DataError(
            f"privileged.encoder: {folder} has no weights in safetensors, other kinds are never opened; {expected}"
        )
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
            raise DataError(f"privileged.encoder: {folder} holds a model of kind '{config.model_type}'; {expected}")
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model = AutoModel.from_pretrained(folder, config=config, use_safetensors=True, **local)
    except DataError:
        raise
    except Exception as error:  # damaged or incomplete files raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"privileged.encoder: {folder} can't be read ({reason}); {expected}") from None
    return tokenizer, model
