"""What a deployed site's store of decoded images saves: time and memory of opening its data."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import yaml
from PIL import Image

from chainward_client.data.sources import local_site
from chainward_client.site import open_site
from chainward_client.site_key import site_key
from chainward_simulations.benchmark.figures import Table

SIDE = 224
"""Height and width of the generated images in pixels; one channel."""


@dataclass(frozen=True)
class Opening:
    """One opening of a site's data, in a process of its own.

    Attributes
    ----------
    what : which
    seconds : from site.yaml to the data, without importing libraries
    cpu : seconds of processor time, of all threads, that it took: what is left of `seconds` on a machine that others use, too
    growth : bytes by which the process's own memory grew at most, without pages of mapped files, which the system takes back
    with_files : the same with them
    """

    what: str
    seconds: float
    cpu: float
    growth: int
    with_files: int

    def to_json(self) -> dict[str, object]:
        """Return the measurement."""
        return asdict(self)


def measure_images(count: int, say: Callable[[str], None]) -> tuple[list[Opening], int]:
    """Return how long a site with `count` generated images takes to open its data, and the bytes of its store.

    In memory (as without a store), for the first time, again, and with a tenth of the files new or changed.
    """
    with TemporaryDirectory(prefix="chainward-images-") as made:
        folder = Path(made)
        say(f"writing {count} images of {SIDE} px")
        _write_site(folder, count)
        done = []
        for what in ("in memory, no store", "first time", "second time"):
            done.append(_measured(folder, what))
            say(f"{what}: {done[-1].seconds:.2f} s")
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda index: _write_image(folder, index, seed=1), range(0, count, 10)))
        for what in ("a tenth of the files changed", "again"):
            done.append(_measured(folder, what))
            say(f"{what}: {done[-1].seconds:.2f} s")
        stored = sum(file.stat().st_size for file in (folder / "state/images").rglob("*") if file.is_file())
    return done, stored


def images_table(openings: list[Opening], stored: int, count: int) -> Table:
    """Return the measurements as a table."""
    rows: list[tuple[str, ...]] = [
        (one.what, f"{one.seconds:.2f}", f"{one.cpu:.2f}", f"{one.growth / 1e6:.0f}", f"{one.with_files / 1e6:.0f}")
        for one in openings
    ]
    return Table(
        f"Opening a site's {count} images of {SIDE} px",
        ("data", "seconds", "CPU seconds", "own memory, MB", "with mapped files, MB"),
        rows=[*rows, ("the store", "", "", "", f"{stored / 1e6:.0f} on disk")],
    )


def _write_site(folder: Path, count: int) -> None:
    (folder / "pictures").mkdir()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda index: _write_image(folder, index, seed=0), range(count)))
    rows = [f"{index:06d}.png,{'ab'[index % 2]},p{index // 2}" for index in range(count)]
    (folder / "cases.csv").write_text("\n".join(["image,dx,who", *rows]) + "\n", encoding="utf-8")
    block = {
        "format": "csv",
        "manifest": "cases.csv",
        "images": "pictures",
        "classes": ["a", "b"],
        "columns": {"image": "image", "label": "dx", "patient": "who"},
        "image": {"size": SIDE, "channels": 1},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(block), encoding="utf-8")
    (folder / "site.yaml").write_text(
        yaml.safe_dump({"site": "north", "data": "data.yaml", "state": "state"}), encoding="utf-8"
    )


def _write_image(folder: Path, index: int, seed: int) -> None:
    small = np.random.default_rng([seed, index]).integers(0, 256, (14, 14), dtype=np.uint8)
    image = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    image.save(folder / "pictures" / f"{index:06d}.png", compress_level=1)


def _measured(folder: Path, what: str) -> Opening:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_open, args=(folder, what, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    finally:
        process.join()


def _open(folder: Path, what: str, sender: multiprocessing.connection.Connection) -> None:
    import pandas as pd  # noqa: F401 - imported before the clock starts

    process, stop = psutil.Process(), threading.Event()
    own, whole = [_own(process)], [process.memory_info().rss]

    def sample() -> None:
        while not stop.wait(0.02):
            own.append(_own(process))
            whole.append(process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    started, used = time.perf_counter(), time.process_time()
    if what.startswith("in memory"):
        data = local_site(folder / "data.yaml", "north", site_key(folder / "state"))
    else:
        data = open_site(folder / "site.yaml").data
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    stop.set()
    sampler.join()
    assert len(data.splits["train"])
    sender.send(Opening(what, seconds, cpu, max(own) - own[0], max(whole) - whole[0]))


def _own(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))
