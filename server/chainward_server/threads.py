"""How many processor threads a training takes where the configuration leaves it open.

The number decides the last bits of a model. So it depends on the model alone, not on the machine or on what else that has to do:
the same run gives the same model everywhere. `run.json` has it, and a resumed run keeps it.
"""

from __future__ import annotations

import logging

import torch
from torch.utils.flop_counter import FlopCounterMode

from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.models import Architecture, skeleton
from chainward_shared.settings import USUAL_THREADS

logger = logging.getLogger("chainward")

SMALL = 10e6
"""Multiplications of one image below which a second thread costs more than it gains (measured: docs/benchmarks.md)."""


def multiplications(architecture: Architecture) -> float:
    """Return the multiplications (and additions) of one image on its way through a model."""
    shape = (1, architecture.in_chans, architecture.image_size, architecture.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        skeleton(architecture)(torch.empty(shape, device="meta"))
    return float(counter.get_total_flops()) / 2


def settle_threads(folder: RunFolder, architecture: Architecture) -> RunConfig:
    """Return the run's configuration with the number of threads, which the run folder keeps from now on.

    Parameters
    ----------
    architecture : of the chain's model
    """
    if not folder.config.federation.threads:
        threads = USUAL_THREADS if multiplications(architecture) >= SMALL else 1
        logger.info("each training takes %d thread%s, by the size of the model", threads, "s" if threads > 1 else "")
        folder.state.threads, folder.config = threads, folder.config.with_threads(threads)
    return folder.config
