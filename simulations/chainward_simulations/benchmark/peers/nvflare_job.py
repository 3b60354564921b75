"""Six trainings as one round of NVFlare's cyclic workflow: the job, and, with ``--client``, the script of a site.

``python -m chainward_simulations.benchmark.peers.nvflare_job WORKSPACE``; NVFlare is installed by whoever compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

from chainward_simulations.benchmark.peers.work import SITES, initial, train, training_asked


def run_job(workspace: str) -> None:
    """Run the job in NVFlare's simulator."""
    from nvflare.app_opt.pt.recipes.cyclic import CyclicRecipe
    from nvflare.recipe.sim_env import SimEnv

    from chainward_shared.models import build_model

    architecture, recipe = training_asked()
    model = build_model(architecture, recipe.seed)
    model.load_state_dict(initial())
    job = CyclicRecipe(
        name="peers",
        model=model,
        num_rounds=1,
        min_clients=SITES,
        train_script=str(Path(__file__).resolve()),
        train_args="--client",
    )
    print(job.execute(SimEnv(num_clients=SITES, num_threads=1, workspace_root=workspace)).get_result(), flush=True)


def be_client() -> None:
    """Train whenever NVFlare sends a model."""
    import nvflare.client as flare

    flare.init()
    site = int(flare.get_site_name().rpartition("-")[2]) - 1
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        state, cases = train(site, received.params)
        flare.send(flare.FLModel(params=state, meta={"NUM_STEPS_CURRENT_ROUND": cases}))


if __name__ == "__main__":
    if "--client" in sys.argv:
        be_client()
    else:
        run_job(sys.argv[1])
