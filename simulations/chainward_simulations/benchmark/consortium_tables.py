"""What was measured of a consortium, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from chainward_simulations.benchmark.consortium import CASES, IMAGE_SIZE, ConsortiumRun, growths
from chainward_simulations.benchmark.coordinator_memory import COORDINATOR, MIB, SAMPLE_SECONDS, memory_after_hops
from chainward_simulations.benchmark.figures import Measured, Table
from chainward_simulations.benchmark.flower_run import MB


def consortium_table(run: ConsortiumRun) -> Table:
    """Return the seconds and the bytes of a consortium."""
    workload = run.workload
    table = Table(f"Consortium of {workload.sites} sites", ("what", "measured"))
    seconds = {name: [getattr(hop, name) for hop in run.hops] for name in ("whole", "training", "exchange", "scoring")}
    overhead = Measured(tuple(hop.overhead for hop in run.hops))
    megabytes = [(link.bytes_down / MB, link.bytes_up / MB) for link in run.links]
    table.rows += [
        ("hops (laps)", f"{len(run.hops)} ({workload.laps})"),
        ("wall time of flwr run, s", f"{run.wall_seconds:.0f}"),
        ("rendezvous (start of Ray, data), s", f"{run.timings['rendezvous']:.1f}"),
        ("chain, s", f"{run.timings['chain']:.1f}"),
        ("a hop, s", Measured(tuple(seconds["whole"])).text(2)),
        ("of it training at the site, s", Measured(tuple(seconds["training"])).text(2)),
        ("of it message, opening the site, packing, s", Measured(tuple(seconds["exchange"])).text(2)),
        (
            f"of it checks, checkpoint, scoring at {workload.sites} sites, s",
            Measured(tuple(seconds["scoring"])).text(2),
        ),
        ("overhead of a hop: all but training, s", overhead.text(2)),
        ("overhead of a hop for each site, s", f"{overhead.median / workload.sites:.3f}"),
        ("a hop: MB down, up", _pairs(megabytes)),
        ("a hop: MB down to be scored everywhere", f"{workload.sites * run.model_bytes / MB:.2f}"),
        ("metrics.json at the end, MB", f"{run.metrics_bytes / MB:.2f}"),
        ("writing it then, s", f"{run.metrics_seconds:.2f}"),
        ("run folder, MB", f"{sum(run.folder_bytes.values()) / MB:.1f}"),
        *((f"of it {part}, MB", f"{size / MB:.1f}") for part, size in run.folder_bytes.items()),
    ]
    table.notes.append(
        f"{workload.backbone}, {CASES['train']} training images of {IMAGE_SIZE} pixels at a site, one epoch, no students. "
        "Median (smallest to largest) over the hops. Bytes are those of the arrays, without Flower's envelope; what is sent "
        "to be scored is the size of the model times the sites. 1 MB = 10^6 bytes."
    )
    return table


def _pairs(megabytes: Sequence[tuple[float, float]]) -> str:
    down, up = (statistics.median(values) for values in zip(*megabytes, strict=True))
    return f"{down:.2f}, {up:.2f}"


def coordinator_table(run: ConsortiumRun) -> Table:
    """Return the memory of the coordinator's process, and by how much it grows from hop to hop."""
    columns = ("hops", "MiB at the first", "at half", "at the last", "grows by, MiB per hop")
    table = Table("Memory of the coordinator (USS)", ("of", *columns))
    memory = memory_after_hops(run.samples)
    counts = {f"lap {lap + 1}": run.workload.sites for lap in range(run.workload.laps)}
    for name, found in growths(run.workload, memory).items():
        cells = (_shown(found.first, 1), _shown(found.half, 1), _shown(found.last, 1), _shown(found.per_hop, 3))
        table.rows.append((name, str(counts.get(name, len(run.hops))), *cells))
    model = run.model_bytes / MIB
    if before := [sample.uss / MIB for sample in run.samples if sample.phase == "chain" and not sample.hops]:
        table.notes.append(
            f"When the chain begins it holds {before[0]:.1f} MiB; the first hops load what all later ones use."
        )
    if run.samples:
        peak = max(run.samples, key=lambda sample: sample.uss)
        rss = max(sample.rss for sample in run.samples) / MIB
        pss = [sample.pss / MIB for sample in run.samples if sample.pss is not None]
        words = f", {max(pss):.0f} PSS" if pss else ""
        table.notes.append(
            f"Peak of the whole run, MiB: {peak.uss / MIB:.0f} USS (phase {peak.phase}, after {peak.hops} hops){words}, "
            f"{rss:.0f} RSS; {len(run.samples)} samples, one every {SAMPLE_SECONDS:g} s."
        )
    table.notes.append(
        f"The process is {COORDINATOR}: in a simulation the ServerApp is a thread of it, beside Flower's message store, the "
        "driver of Ray and what all of them import. USS is what only this process has. After each hop the median of the "
        f"samples until the next; the slope is that of least squares. One model kept per hop would be {model:.2f} MiB per hop."
    )
    return table


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
