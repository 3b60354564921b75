"""A ledger that can't be written: no private training starts, and whoever asked for it is told why in one line."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from small_recipes import SMALL_LINK

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.private_site import PrivateSite
from chainward_client.training import link as link_module
from chainward_client.training.link import train_link
from chainward_shared import files as files_module
from chainward_shared.errors import LedgerError
from chainward_shared.models import resolve_architecture
from chainward_shared.privacy import ledger_file as ledger_module
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.recipes import PlannedTraining, PrivacyRecipe

RECIPE = SMALL_LINK.model_copy(
    update={
        "epochs": 1,
        "weight_decay": 0.0,
        "temperature": 2.0,
        "privacy": PrivacyRecipe(
            sites="all", unit="patient", delta=1e-4, epsilon=4.0, run=(PlannedTraining(epochs=1, batch_size=8),)
        ),
    }
)


@pytest.fixture
def data() -> SiteData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 1, 32, 32), dtype=torch.uint8, generator=generator)
    cases = Cases(images, torch.arange(16) % 3, np.array([f"p{i}" for i in range(16)]))
    return SiteData("oak", ("a", "b", "c"), {"train": cases, "val": cases, "test": cases})


class FailingDisk:
    """Stands in for the ledger's module `os`; every write or sync fails."""

    def __init__(self, call: str, code: int) -> None:
        self.call, self.code = call, code

    def __getattr__(self, name: str):
        if name == self.call:
            return self._fail
        return getattr(os, name)

    def _fail(self, *args: object) -> None:
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("write", errno.ENOSPC),
        ("fsync", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("open", errno.EROFS),
        ("open", errno.EACCES),
    ],
)
def test_no_step_is_taken_when_the_ledger_can_not_be_written(data, tmp_path, monkeypatch, call, code):
    architecture = resolve_architecture("test_vit", num_classes=3, in_chans=1, image_size=32, patch_size=8)
    site = PrivateSite.open(PrivacyPolicy(epsilon=8.0, delta=1e-4), tmp_path, "oak", create=True)
    steps: list[int] = []
    honest = link_module.train
    monkeypatch.setattr(link_module, "train", lambda *args, **more: steps.append(1) or honest(*args, **more))
    with monkeypatch.context() as broken:
        for module in (ledger_module, files_module):
            broken.setattr(module, "os", FailingDisk(call, code))
        with pytest.raises(LedgerError) as caught:
            train_link(data, architecture, RECIPE, None, strand=0, lap=0, work=site.work("r", "h"))
    message = str(caught.value)
    assert f"can't be written ({os.strerror(code)}); nothing is trained" in message
    assert "\n" not in message
    assert steps == [], "the loop was never entered"
    train_link(data, architecture, RECIPE, None, strand=0, lap=0, work=site.work("again", "h"))
    assert steps == [1], "with a disk that works the same call trains"
