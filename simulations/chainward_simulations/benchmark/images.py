"""What a deployed site's store of decoded images saves: time and memory of opening its data."""

from __future__ import annotations

import time
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
from chainward_simulations.benchmark.figures import Options, Report, Table, in_fresh_process
from chainward_simulations.benchmark.memory import Sampler

SIDE = 224
"""Height and width of the generated images in pixels; one channel."""
SAMPLE_SECONDS = 0.02


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

    def row(self) -> tuple[str, ...]:
        """Return its row of the table."""
        memory = (f"{self.growth / 1e6:.0f}", f"{self.with_files / 1e6:.0f}")
        return (self.what, f"{self.seconds:.2f}", f"{self.cpu:.2f}", *memory)


def measure(options: Options) -> Report:
    """Return how long a site with generated images takes to open its data, and what its store takes.

    In memory (as without a store), for the first time, again, and with a tenth of the files new or changed.
    """
    count = options.images or (200 if options.quick else 50_000)
    with TemporaryDirectory(prefix="chainward-images-") as made:
        folder = Path(made)
        options.say(f"writing {count} images of {SIDE} px")
        _write_site(folder, count)
        done = [_measured(folder, what, options) for what in ("in memory, no store", "first time", "second time")]
        _write_images(folder, range(0, count, 10), seed=1)
        done += [_measured(folder, what, options) for what in ("a tenth of the files changed", "again")]
        stored = sum(file.stat().st_size for file in (folder / "state/images").rglob("*") if file.is_file())
    table = Table(
        f"Opening a site's {count} images of {SIDE} px",
        ("data", "seconds", "CPU seconds", "own memory, MB", "with mapped files, MB"),
        [*(one.row() for one in done), ("the store", "", "", "", f"{stored / 1e6:.0f} on disk")],
    )
    return [table], {"images": count, "store": stored, "openings": [asdict(one) for one in done]}


def _write_site(folder: Path, count: int) -> None:
    (folder / "pictures").mkdir()
    _write_images(folder, range(count), seed=0)
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
    site = {"site": "north", "data": "data.yaml", "state": "state"}
    for name, content in (("data.yaml", block), ("site.yaml", site)):
        (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")


def _write_images(folder: Path, indices: range, seed: int) -> None:
    def write(index: int) -> None:
        small = np.random.default_rng([seed, index]).integers(0, 256, (14, 14), dtype=np.uint8)
        image = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        image.save(folder / "pictures" / f"{index:06d}.png", compress_level=1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, indices))


def _measured(folder: Path, what: str, options: Options) -> Opening:
    opening = in_fresh_process(_open, folder, what)
    options.say(f"{what}: {opening.seconds:.2f} s")
    return opening


def _open(folder: Path, what: str) -> Opening:
    import pandas as pd  # noqa: F401 - imported before the clock starts

    process = psutil.Process()
    own, whole = list[int](), list[int]()

    def look() -> None:
        memory = process.memory_info()
        own.append(int(memory.rss - getattr(memory, "shared", 0)))
        whole.append(int(memory.rss))

    look()
    with Sampler(look, SAMPLE_SECONDS):
        started, used = time.perf_counter(), time.process_time()
        if what.startswith("in memory"):
            data = local_site(folder / "data.yaml", "north", site_key(folder / "state"))
        else:
            data = open_site(folder / "site.yaml").data
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
    assert len(data.splits["train"])
    return Opening(what, seconds, cpu, max(own) - own[0], max(whole) - whole[0])
