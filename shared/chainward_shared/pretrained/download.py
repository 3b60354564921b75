"""Fetching one of timm's weights files from the Hugging Face hub, because a person asked for it; no run ever does."""

from __future__ import annotations

from pathlib import Path

from chainward_shared.errors import WeightsError
from chainward_shared.words import first_line

PREFIX = "timm:"
_FILES = ("model.safetensors", "pytorch_model.bin")


def fetched(what: str) -> tuple[Path, str, str]:
    """Return the file of ``timm:NAME.TAG`` in the Hugging Face cache, downloaded if it is not there, its name and its source.

    ``HF_HUB_OFFLINE`` and the other settings of the Hugging Face cache hold.

    Raises
    ------
    WeightsError
        timm has no such weights, or not on the hub; or they are not in the cache and the hub can't be reached.
    """
    from chainward_shared.pretrained.loading import split_name, timm_config  # PyTorch

    if not what.startswith(PREFIX):
        raise WeightsError(f"'{what}': expected {PREFIX}NAME.TAG, e.g. {PREFIX}vit_small_patch14_dinov2.lvd142m")
    name = what.removeprefix(PREFIX)
    plain, tag = split_name(name)
    config = timm_config(name)
    tag = tag or str(config.get("tag") or "")
    hub = config.get("hf_hub_id")
    if not hub:
        raise WeightsError(
            f"timm has no file of '{name}' on the Hugging Face hub; get it elsewhere and `weights add` it"
        )
    names = [str(config["hf_hub_filename"])] if config.get("hf_hub_filename") else list(_FILES)
    return _download(str(hub), names), f"{plain}.{tag}" if tag else plain, f"huggingface.co/{hub}"


def _download(hub: str, names: list[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

    for name in names:
        try:
            return Path(hf_hub_download(hub, name))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise WeightsError(
                f"{hub}: not in the Hugging Face cache, and the hub can't be reached (no network, or HF_HUB_OFFLINE is set); "
                "download it on another machine and `weights add` the file"
            ) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's client has no common base for what a network does
            raise WeightsError(f"{hub}: can't be downloaded ({first_line(error)[:200]})") from error
    raise WeightsError(f"{hub}: has no file {' or '.join(names)}; get it elsewhere and `weights add` it")
