"""A run at this moment as a page in a browser: what `chainward watch --web` serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from chainward_server.report import formats
from chainward_server.results import LinkRecord, StudentRound
from chainward_server.run_folder import RunFolder
from chainward_server.watch.curve import curve_of
from chainward_server.watch.display import approval, end_in_words, headline, silence
from chainward_server.watch.snapshot import Snapshot, look, validation
from chainward_shared.local_page import LocalPage, Look, environment
from chainward_shared.words import listed

WIDE, NARROW = 1_000, 360
"""Units of the curve's width on a desk and on a telephone, so that its letters are as large as the page's."""
MOST_HOPS = 60
LINGER = 60.0
"""Seconds for which the page of a run that has ended is still there."""


@dataclass(frozen=True)
class HopShown:
    """One hop of the chain: done, under way, or to come. `status`: also the colour."""

    number: int
    site: str
    status: str
    detail: str


@dataclass(frozen=True)
class SiteShown:
    """One hospital. `state`: what it is doing; `kind`: the colour of that."""

    site: str
    train: int | None
    links: str
    state: str
    kind: str
    epsilon: float | None


@dataclass(frozen=True)
class Load:
    """How busy the machine is on which somebody watches: of a simulation the one that trains, else the coordinator's.

    Attributes
    ----------
    processor : percent of all cores since the last look
    memory : percent of the memory that is taken
    free : bytes free on the disk of the run folder
    words : the same for a person, a line each
    warns : whether memory or disk are about to run out
    """

    processor: float
    memory: float
    free: int
    words: tuple[str, ...]
    warns: bool


def load_of(run: Path) -> Load:
    """Return how busy this machine is; `run`: the folder whose disk counts."""
    processor, memory, disk = psutil.cpu_percent(), psutil.virtual_memory(), psutil.disk_usage(str(run))
    cores = psutil.cpu_count() or 1
    words = (
        f"of {cores} {'core' if cores == 1 else 'cores'} busy",
        f"memory: {formats.bytes_size(memory.available)} free of {formats.bytes_size(memory.total)}",
        f"disk: {formats.bytes_size(disk.free)} free",
    )
    return Load(processor, memory.percent, disk.free, words, memory.percent > 95 or disk.free < 10**9)


def live_look(path: Path) -> Look:
    """Return what the page of the run in a folder shows now.

    Raises
    ------
    RunFolderError
        The folder is gone, or a file of it is damaged.
    """
    run = look(path)
    return Look(render_live(run, load_of(path)), run.ended)


def render_live(run: Snapshot, load: Load) -> str:
    """Return the part of the page that changes."""
    hops = hops_of(run)
    done = sum(hop.status not in ("now", "next") for hop in hops)
    template = environment("chainward_server.watch", *formats.FILTERS).get_template("live.html.jinja")
    return template.render(
        run=run,
        headline=headline(run),
        verdict=verdict(run),
        end=None if run.ended else end_in_words(run),
        approval=approval(run),
        silence=silence(run),
        hops=hops[-MOST_HOPS:],
        hops_left_out=max(0, len(hops) - MOST_HOPS),
        hops_done=done,
        progress=_progress(run, done, len(hops)),
        planned=_planned(run),
        private=run.config.privacy.mode != "off",
        sites=sites_of(run),
        accuracy=_accuracy(run),
        epsilon=max(run.epsilon.values(), default=None),
        load=load,
        curves=(("wide", curve_of(run, WIDE)), ("narrow", curve_of(run, NARROW))),
        report=(run.path / "report.html") if run.ended and (run.path / "report.html").is_file() else None,
    )


def verdict(run: Snapshot) -> str:
    """Return where the run is, in one sentence."""
    if run.ended:
        words = {
            "finished": "The run has finished.",
            "incomplete": "The run has ended incomplete.",
            "stopped": "The run was stopped.",
            "gone": "The run is gone: its process has ended without a word.",
        }
        return words.get(run.status, "The run has failed.")
    place = run.place
    phases = {
        "rendezvous": "The hospitals are gathering.",
        "evaluation": "The final models are being scored at every hospital.",
        "report": "The report is being written.",
    }
    if place is None:
        return phases.get(run.phase, f"{run.phase}.")
    if run.phase == "chain" and run.turns and not place.sites:
        return "All hops of the chain are done; its model is being completed."
    what = f"{place.what.capitalize()} {place.number}" + (f" of {place.total}" if place.total else "")
    if place.sites and all(site in run.waiting for site in place.sites):
        return f"{what} waits until somebody at {listed(place.sites)} has approved the run."
    return f"{what} is being trained" + (f", at {listed(place.sites)}." if place.sites else ".")


def hops_of(run: Snapshot) -> list[HopShown]:
    """Return the hops that are done, in their order, and those that are planned after them."""
    found = []
    for number, link in enumerate(run.links, 1):
        figure = validation(link)
        detail = formats.duration(link.seconds) + ("" if figure is None else f" · {figure:.3f}")
        found.append(HopShown(number, link.site, link.status, detail))
    if run.ended:
        return found
    done, place = {link.key for link in run.links}, run.place
    now = set(place.sites) if place is not None and run.phase == "chain" else set()
    for turn in run.turns or []:
        for hop in turn:
            if hop.key not in done:
                first = hop.site in now
                now.discard(hop.site)
                words = "to come" if not first else "waits for approval" if hop.site in run.waiting else "at work"
                found.append(HopShown(len(found) + 1, hop.site, "now" if first else "next", words))
    return found


def sites_of(run: Snapshot) -> list[SiteShown]:
    """Return what each hospital has done and is doing."""
    if run.results is None:
        return [SiteShown(site, None, "", "expected", "next", None) for site in run.config.expected_sites]
    found, place = [], run.place
    busy = set(place.sites) if place is not None else set()
    for site in run.results.data.sites:
        links = [link for link in run.links if link.site == site.site]
        done = sum(link.succeeded for link in links)
        state, kind = _state(run, site.site, site.site in busy)
        count = f"{done} of {len(links)}" if links else "none yet"
        found.append(SiteShown(site.site, site.train, count, state, kind, run.epsilon.get(site.site)))
    return found


def _state(run: Snapshot, site: str, busy: bool) -> tuple[str, str]:
    if site in run.waiting:
        return "waits for a person there to approve the run", "waiting"
    if busy:
        return "at work", "now"
    last = next((link for link in reversed(run.links) if link.site == site), None)
    for round_ in run.rounds[-1:]:
        if site in round_.failed:
            return ("away in the last round" if site in round_.unreached else "failed in the last round"), "away"
        return ("done" if run.ended else "here"), "done"
    if last is None:
        return "its turn is to come" if not run.ended else "no part in it", "next"
    if last.succeeded:
        again = not run.ended and last.lap + 1 < run.config.chain.laps
        return ("done, until its next turn" if again else "done"), "done"
    return ("away when its turn came" if last.unreached else last.status), "away"


def _progress(run: Snapshot, done: int, total: int) -> tuple[int, int] | None:
    """Return how many pieces of work are done, of how many that are planned; None where that is not known."""
    if run.results is None or not total:
        return None
    sites = len(run.results.data.sites)
    alone = sites - len(run.private) if run.config.chain.compare_alone else 0
    whole = total + alone + run.total_rounds
    return min(whole, done + min(alone, len(run.alone)) + len(run.rounds)), whole


def _planned(run: Snapshot) -> list[str]:
    """Return the kinds of work that `_progress` counts."""
    kinds = {
        "hops": run.config.chain.laps,
        "hospitals alone": run.config.chain.compare_alone,
        "student rounds": run.total_rounds,
    }
    return [kind for kind, there in kinds.items() if there]


def _accuracy(run: Snapshot) -> tuple[str, str, str] | None:
    """Return title, figure and detail of the newest score: of the final model where there is one."""
    if run.final:
        name, scores = list(run.final.items())[-1]
        auc = formats.score(scores.macro_auc)
        return f"Final {name}", formats.score(scores.balanced_accuracy), f"macro AUC {auc}, {scores.n} test images"
    scored: list[tuple[StudentRound | LinkRecord, str]]
    scored = [(round_, f"student, round {round_.round}") for round_ in run.rounds]
    if not scored:
        scored = [(link, f"chain, after {link.site}") for link in run.links if validation(link) is not None]
    if not scored or (value := validation(scored[-1][0])) is None:
        return None
    first = next((validation(link) for link in run.links if validation(link) is not None), None)
    change = "" if first is None or len(scored) < 2 else f"; {formats.score(first)} after the first hop"
    return "Balanced accuracy", formats.score(value), f"validation, {scored[-1][1]}{change}"


@contextmanager
def live_page(path: Path, port: int, say: Callable[..., None], *, linger: float | None = None) -> Iterator[LocalPage]:
    """Serve the page of the run in a folder while this lasts, and after its end for so long that open pages hear of it.

    Parameters
    ----------
    say : is told the address
    linger : seconds after the end, default `LINGER`; Ctrl-C ends them
    """
    title = f"Chainward · run {RunFolder.open(path).state.run_id}"
    load_of(path)  # a processor's load is counted from one look to the next
    with LocalPage(title, lambda form: live_look(path), port=port) as page:
        say(f"page: {page.address} (on this machine only)")
        yield page
        with suppress(KeyboardInterrupt):
            time.sleep(LINGER if linger is None else linger)
