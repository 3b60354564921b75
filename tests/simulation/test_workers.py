"""Workers of a simulation that die: Flower's pool gets a new one, and nobody else's command line gets into the log."""

from __future__ import annotations

import logging

import pytest
import ray
from flwr.simulation.ray_transport import ray_actor
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from chainward_simulations import workers
from chainward_simulations.workers import WorkerDiedError, quiet_deaths, replace_dead_workers

RAYS_WORDS = (
    "Task was killed due to the node running low on memory.\nTop 10 memory users:\nPID MEM COMMAND\n1 3.00 psql secret"
)


@pytest.fixture
def pool(monkeypatch):
    """Flower's pool with one idle worker, of which no Ray is started."""
    monkeypatch.setattr(
        ray_actor.BasicActorPool,
        "fetch_result_and_return_actor_to_pool",
        ray_actor.BasicActorPool.fetch_result_and_return_actor_to_pool,
    )
    assert replace_dead_workers()
    pool = object.__new__(ray_actor.BasicActorPool)
    pool.pool, pool._future_to_actor, pool.create_actor_fn = ["first"], {}, lambda: "new"
    return pool


def asked(pool, monkeypatch, outcome):
    """Give the pool's worker a request that ends in `outcome`, as Flower's backend does, and return what was raised."""

    def get(future):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(ray, "get", get)
    future = pool.submit(lambda *_: "future", (None, None, "0", None))
    try:
        pool.fetch_result_and_return_actor_to_pool(future)
    except Exception as error:
        pool.add_actor_back_to_pool(future)
        return error
    return None


@pytest.mark.parametrize("death", [ActorDiedError(), OutOfMemoryError(RAYS_WORDS)])
def test_a_dead_worker_is_replaced_and_nothing_is_told_of_other_programs(pool, monkeypatch, death):
    error = asked(pool, monkeypatch, death)
    assert isinstance(error, WorkerDiedError)
    assert "psql" not in str(error) and error.__suppress_context__
    assert pool.pool == ["new"]


def test_a_worker_whose_work_raised_an_exception_lives(pool, monkeypatch):
    error = asked(pool, monkeypatch, RayTaskError("run", "traceback", ValueError("bad image")))
    assert not isinstance(error, WorkerDiedError)
    assert pool.pool == ["first"]


def test_a_worker_that_answers_is_put_back(pool, monkeypatch):
    assert asked(pool, monkeypatch, ("0", "message", "context")) is None
    assert pool.pool == ["first"]


def test_with_a_pool_of_another_kind_nothing_is_changed_and_the_log_says_what_that_means(monkeypatch, caplog):
    class Pool:
        def __init__(self):
            pass

        def fetch_result_and_return_actor_to_pool(self, future):
            """Otherwise."""

    before = Pool.fetch_result_and_return_actor_to_pool
    monkeypatch.setattr(ray_actor, "BasicActorPool", Pool)
    assert not replace_dead_workers()
    assert Pool.fetch_result_and_return_actor_to_pool is before
    assert "a worker that dies can't be replaced with Flower" in caplog.text


def test_rays_words_about_a_death_are_not_logged_and_all_others_are(monkeypatch, caplog, capsys):
    from ray._private import worker

    monkeypatch.setattr(worker, "print_worker_logs", lambda data, file: print(data["lines"]))
    quiet_deaths()
    flower = logging.getLogger("flwr")
    try:
        with caplog.at_level(logging.INFO):
            monkeypatch.setattr(flower, "propagate", True)
            flower.error("Traceback\nray.exceptions.OutOfMemoryError: %s", RAYS_WORDS)
            flower.error("a site sent nothing")
        worker.print_worker_logs({"pid": "raylet", "lines": [f"OOM: {RAYS_WORDS}"]}, None)
        worker.print_worker_logs({"pid": 17, "lines": ["epoch 2"]}, None)
    finally:
        flower.removeFilter(workers._is_no_death)
    said = capsys.readouterr().out
    assert "psql" not in caplog.text + said
    assert "a site sent nothing" in caplog.text and "epoch 2" in said
