"""The Flower `ServerApp` of a simulation: the coordinator's, and pictures of where the models look.

Only here, where the hospitals' images lie on the same machine, can a report show any.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from chainward_server.app import fail_if_incomplete, run_app
from chainward_server.report.page import write_report
from chainward_server.run_folder import RunFolder
from chainward_shared.errors import ChainwardError, DataError
from chainward_simulations.data_notes import notes_of_simulation
from chainward_simulations.run_examples import draw_examples
from chainward_simulations.workers import quiet_deaths, replace_dead_workers

logger = logging.getLogger("chainward")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a simulated consortium from rendezvous to report."""
    quiet_deaths()
    replace_dead_workers()
    fail_if_incomplete(run_app(grid, context, notes_of_simulation, report_with_examples))


def report_with_examples(folder: RunFolder) -> Path:
    """Draw examples into a run folder, and write the report that shows them; without, where they can't be drawn."""
    try:
        draw_examples(folder)
    except DataError:
        pass  # there is no test image
    except (ChainwardError, OSError) as error:  # the run itself is finished: a picture must not make it fail
        logger.warning("the report shows no examples: %s", error)
    return write_report(folder)
