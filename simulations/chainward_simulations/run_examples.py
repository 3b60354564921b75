"""Pictures of where the models of a finished run look, drawn from the images that the simulation reads on this machine."""

from __future__ import annotations

from chainward_server.report.page import EXAMPLES
from chainward_server.run_folder import RunFolder
from chainward_shared.errors import ConfigError, RunFolderError
from chainward_shared.files import write_atomically
from chainward_simulations.examples import example_figure
from chainward_simulations.runner import open_sites, stored_model

NAMES = {"chain": "chain's model", "student": "compact student"}


def draw_examples(folder: RunFolder, *, without: RunFolder | None = None, count: int = 6) -> None:
    """Write `examples.png` into a run folder: test images, their regions, and where the run's models look in them.

    Parameters
    ----------
    without : a run on the same data without privileged teachers; its chain is drawn above that of this run, instead of
        this run's student
    count : images to show

    Raises
    ------
    DataError
        The images are not on this machine, or there is no test image.
    ConfigError
        The two runs were made on different data.
    RunFolderError, WeightsError
        A run has no chain yet, or its model is damaged.
    """
    if without is None:
        models = {NAMES[name]: stored_model(folder, name) for name in NAMES if name in folder.state.models}
        if not models:
            raise RunFolderError(f"run {folder.state.run_id} has no finished chain yet; nothing can be drawn")
    else:
        _check_same_data(folder, without)
        models = {"without teachers": stored_model(without, "chain"), "with teachers": stored_model(folder, "chain")}
    sites = open_sites(folder.config, tests_only=True)
    picture = example_figure(models, sites, count=count, seed=folder.config.seed)
    write_atomically(folder.path / EXAMPLES, picture)


def _check_same_data(folder: RunFolder, without: RunFolder) -> None:
    mine, other = folder.config.to_flat(), without.config.to_flat()
    for key in ("data.source", "data.label-skew", "federation.num-sites", "federation.sites", "seed"):
        if mine[key] != other[key]:
            raise ConfigError(
                f"--without {without.state.run_id}: {key} is {other[key]!r} there and {mine[key]!r} in "
                f"{folder.state.run_id}; compare runs on the same data and seed"
            )
    if without.config.privileged.mode != "off":
        raise ConfigError(f"--without {without.state.run_id}: that run has privileged teachers too; name one without")
