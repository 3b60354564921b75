"""The output of a frozen trunk, computed once for each image and view, and kept at the site.

Features tell nearly as much of an image as the image does: they stay in the site's state folder, for its own user only, and no
message has a name for them. A file is found by the digest of all that decides it: the images, the weights of the trunk, where
it ends, how pixels are scaled, and the views. So it is never out of date; it may only lie there unused, until others need room.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.kept_files import Making, mapped
from chainward_client.precision import best_device, training_environment
from chainward_client.training.augmentation import FIXED_VIEWS, fixed_view
from chainward_shared.models.architecture import architecture_of
from chainward_shared.models.trunk import Trunk, trunk_of
from chainward_shared.preprocessing import pixels_of, resized
from chainward_shared.settings import Augmentation

logger = logging.getLogger("chainward.client")

Compute = Callable[[Tensor], Tensor]
"""From at most `BLOCK` images to their features, (n, views, ...)."""

ENDINGS = {torch.float16: ".f16", torch.float32: ".f32"}

BLOCK = 64
"""Images that go through the trunk together, and are written together."""


class Features:
    """The features of one site.

    Parameters
    ----------
    folder : where they are kept; None: in memory, as long as this object
    limit : bytes that they may take; default 4 GB. Features that would take more are not kept, nor used
    declared : of a site with a privacy policy: how many images it says it has. They decide whether features are used; no image
        does, as in each of the others features are rounded, and have other views than images. None: of other sites
    """

    def __init__(self, folder: Path | None, limit: int = 4_000_000_000, *, declared: int | None = None) -> None:
        self.folder, self.limit, self.declared = folder, limit, declared
        self._held: dict[str, Tensor] = {}

    def of(
        self, model: nn.Module, images: Tensor, augmentation: Augmentation, threads: int
    ) -> tuple[Tensor, Trunk] | None:
        """Return the features of `images` by the trunk of `model`, and the trunk; None where there are none.

        Parameters
        ----------
        model : as `build_model` builds it; its weights before the cut are those of its start
        images : uint8 (n, c, h, w)
        augmentation : decides the views: "none" has one, the image as it is
        threads : of the computation

        Returns
        -------
        (n, views, ...), see `chainward_client.training.augmentation.fixed_view`: float16, but with "none" float32, as scores are
        to be those of the model that others get
        """
        if not len(images) or (trunk := trunk_of(model)) is None:
            return None
        architecture = architecture_of(model)
        assert architecture is not None and architecture.start is not None
        views, pixels, size = FIXED_VIEWS[augmentation], pixels_of(model), architecture.image_size
        kind = torch.float32 if augmentation == "none" else torch.float16
        largest = torch.finfo(kind).max

        def compute(some: Tensor) -> Tensor:
            block = resized(some, size).to(best_device())
            seen = [trunk(fixed_view(block, augmentation, view, pixels)) for view in range(views)]
            found = torch.stack(seen, dim=1).cpu()
            return found if self.declared is None else found.clamp(-largest, largest)

        device = best_device()
        training = model.training
        model.to(device).eval()
        try:
            with training_environment(threads, seed=0), torch.inference_mode():
                shape = (len(images), *compute(images[:1]).shape[1:])
                if self._are_too_many(shape, kind):
                    return None
                what = f"{architecture.model_dump_json()} {augmentation} {torch.__version__}"
                what += "" if self.declared is None else " saturated"
                found = self._get(what, images, shape, kind, compute)
        finally:
            model.to("cpu").train(training)
        if self.declared is None and not bool(found.isfinite().all()):
            logger.info("features of this trunk are too large for half precision: computed anew each time")
            return None
        return found, trunk

    def _are_too_many(self, shape: tuple[int, ...], kind: torch.dtype) -> bool:
        images = shape[0] if self.declared is None else self.declared
        size = kind.itemsize * images * math.prod(shape[1:])
        if size > self.limit:
            logger.info(
                "features of %d images and %d views would take %.1f GB, the site allows %.1f: computed anew each time",
                images,
                shape[1],
                size / 1e9,
                self.limit / 1e9,
            )
        return size > self.limit

    def _get(self, what: str, images: Tensor, shape: tuple[int, ...], kind: torch.dtype, compute: Compute) -> Tensor:
        """Return the features of all images, of this shape and kind; `what`: all that decides them but the images."""
        key = digest_of_images(images, what)
        if self.folder is None:
            if key not in self._held:
                self._held[key] = torch.cat([compute(some).to(kind) for some in images.split(BLOCK)])
            found = self._held[key]
        else:
            path = self.folder / f"{key}{ENDINGS[kind]}"
            whole = kind.itemsize * math.prod(shape)
            if not path.exists() or path.stat().st_size != whole:
                self._write(path, images, shape, kind, compute)
                self._make_room(path)
            os.utime(path)
            found = mapped(path, number_type(kind), shape)
        return found

    def _write(self, path: Path, images: Tensor, shape: tuple[int, ...], kind: torch.dtype, compute: Compute) -> None:
        """Compute and write what is missing; an earlier try that was interrupted is gone on from its last whole block."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_suffix(".part")
        part.touch(mode=0o600)
        of_block = kind.itemsize * BLOCK * math.prod(shape[1:])
        done = part.stat().st_size // of_block
        with part.open("r+b") as file, Making("features", shape[0], done * BLOCK) as making:
            file.truncate(done * of_block)
            file.seek(0, os.SEEK_END)
            for start in range(done * BLOCK, shape[0], BLOCK):
                file.write(compute(images[start : start + BLOCK]).to(kind).contiguous().numpy().tobytes())
                making.done(min(start + BLOCK, shape[0]))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def _make_room(self, newest: Path) -> None:
        """Remove what was used longest ago until the rest is within the limit."""
        kept = [file for file in self.folder.iterdir() if file.suffix in ENDINGS.values()] if self.folder else []
        files = sorted(kept, key=lambda file: file.stat().st_mtime, reverse=True)
        total = newest.stat().st_size
        for file in files:
            if file != newest:
                total += file.stat().st_size
                if total > self.limit:
                    file.unlink(missing_ok=True)


def digest_of_images(images: Tensor, what: str = "") -> str:
    """Return the SHA-256 of `what`, and of all pixels."""
    digest = hashlib.sha256(what.encode())
    for part in images.split(4096):
        digest.update(part.contiguous().numpy())
    return digest.hexdigest()


def number_type(kind: torch.dtype) -> type[np.floating]:
    """Return NumPy's name of what features are kept as."""
    return np.float32 if kind == torch.float32 else np.float16


def is_features(images: Tensor) -> bool:
    """Tell whether a tensor holds features, (n, views, ...), in the place of images."""
    return images.dtype in ENDINGS


def one_view(features: Tensor, generator: torch.Generator) -> Tensor:
    """Return of each row of features (n, views, ...) those of one view, drawn at random, float32 (n, ...)."""
    drawn = torch.randint(features.shape[1], (len(features),), generator=generator)
    return features[torch.arange(len(features)), drawn.to(features.device)].float()
