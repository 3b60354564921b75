"""A frozen language encoder out of a local folder: looked over before it is opened, read offline, and only as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize as normalized

from chainward_client.precision import best_device
from chainward_shared.errors import DataError

BATCH = 16
TOKENS = 512
"""Longer reports are cut off here, or where the encoder's positions end."""

LARGEST = 2_000_000_000
"""Bytes of weights, on disk and in float32: an encoder reads every report on the hospital's CPU, in float32."""

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""A folder with none of these has no tokenizer. (transformers would make an empty one, which knows no word.)"""

_READ = (".json", ".safetensors", ".txt", ".model")
_EXPECTED = "expected a Hugging Face encoder (BERT, say) saved with save_pretrained: model, tokenizer and safetensors"


def check_encoder(folder: Path) -> None:
    """Check that a folder holds what an encoder consists of, by its files alone.

    Raises
    ------
    DataError
        It doesn't, or its weights are too large.
    """
    if not folder.is_dir():
        raise _refusal(folder, "is no folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refusal(folder, "has no config.json") from None
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from None
    if not isinstance(config, dict):
        raise _refusal(folder / "config.json", "is no JSON object")
    weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if not weights:
        raise _refusal(folder, "has no weights in safetensors, other kinds are never opened")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise _refusal(folder, f"has no tokenizer (none of {', '.join(TOKENIZERS)})")
    _check_size(folder, sum(path.stat().st_size for path in weights))


def encoder_digest(folder: Path) -> str:
    """Return the SHA-256 over names and contents of the files that decide what an encoder says.

    Raises
    ------
    DataError
        The folder holds no encoder.
    """
    check_encoder(folder)
    try:
        return _digest(
            folder, tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _files(folder))
        )
    except OSError as error:
        raise _unreadable(folder, error) from None


@lru_cache(maxsize=8)
def _digest(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """`stamps`: of the files, so that they are read again only where one has changed."""
    whole = hashlib.sha256()
    for path in _files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name}\n{content}\n".encode())
    return whole.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _READ)


def _check_size(folder: Path, found: int) -> None:
    if found > LARGEST:
        raise DataError(
            f"privileged.encoder: {folder} holds {found / 1e9:.1f} GB of weights, at most {LARGEST / 1e9:g} GB are opened; "
            "choose a smaller encoder"
        )


def _unreadable(folder: Path, error: Exception) -> DataError:
    return _refusal(folder, f"can't be read ({' '.join(str(error).split())[:200] or type(error).__name__})")


def _refusal(place: Path, problem: str) -> DataError:
    return DataError(f"privileged.encoder: {place} {problem}; {_EXPECTED}")


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
    limit = min(TOKENS, tokenizer.model_max_length, _positions(model.config))
    parts = [np.zeros((0, width), dtype=np.float32)]
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[start : start + BATCH]),
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
    positions = getattr(config, "max_position_embeddings", None) or TOKENS
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
    check_encoder(folder)
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
            raise _refusal(folder, f"holds a model of kind '{config.model_type}'")
        build: Any = AutoModel.from_config
        with torch.device("meta"):
            described = build(config)
        _check_size(folder, 4 * sum(parameter.numel() for parameter in described.parameters()))
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, loaded = AutoModel.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **local
        )
    except DataError:
        raise
    except Exception as error:  # damaged or incomplete files raise nearly anything
        raise _unreadable(folder, error) from None
    # the pooler belongs to another task, and has no part in the mean over the tokens
    missing = sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise DataError(
            f"privileged.encoder: the weights in {folder} lack '{missing[0]}' ({len(missing)} tensors in all), which would stay "
            f"random; {_EXPECTED}"
        )
    return tokenizer, model
