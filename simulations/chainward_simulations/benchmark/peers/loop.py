"""Six trainings one after the other in one process: ``python -m chainward_simulations.benchmark.peers.loop``."""

from __future__ import annotations

from chainward_simulations.benchmark.peers.work import SITES, initial, train

if __name__ == "__main__":
    state = initial()
    for site in range(SITES):
        state, _ = train(site, state)
    print(f"trained at {SITES} sites", flush=True)
