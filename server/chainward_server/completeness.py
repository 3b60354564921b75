"""Whether a run that came to its end is what was asked for, and what a resumed one does again where it is not."""

from __future__ import annotations

import math
from typing import NamedTuple

from chainward_server.results import HeadRecord, Results
from chainward_shared.config import RunConfig
from chainward_shared.hops import END_HEAD, START_HEAD, STUDENT_HEAD, link_head_key


def shortfalls(results: Results, config: RunConfig, private: frozenset[str] = frozenset()) -> list[str]:
    """Return in words what keeps a run from being called finished; empty where nothing does.

    Two things do: of the hops, sites, hospitals alone, sites in statistics and student rounds or scored sites less than
    ``federation.min-complete`` succeeded; or anything at all is missing because a site, or the process that simulates one,
    could not be reached, which resuming the run may make up for.

    Parameters
    ----------
    private : the sites that train privately; they don't train alone
    """
    share = config.federation.min_complete
    asked = f"federation.min-complete asks for {share:.0%}"
    found = [
        f"{done} of {planned} {what} ({asked})"
        for what, done, planned in _counts(results, config, private)
        if done < math.ceil(share * planned - 1e-9)
    ]
    if unreached := unreached_work(results):
        found.append(f"not reached, and to be made up for: {', '.join(unreached)}")
    return found


def unreached_work(results: Results) -> list[str]:
    """Return the names of the pieces of work that are missing because a site could not be reached, and nothing made up for."""
    missing = [link.key for link in results.links if link.unreached and not made_up_for(results, link.key)]
    missing += [record.key for record in results.alone if record.unreached]
    head = last_head(results)
    missing += [head.key] if head is not None and head.unreached else []
    missing += [head.key for head in results.heads if head.unreached and head.key == STUDENT_HEAD]
    return missing + [round_.key for round_ in results.student_rounds if round_.unreached]


def last_head(results: Results) -> HeadRecord | None:
    """Return the statistics round whose head nothing was trained from since; None where there is none.

    It is the one at the end of the chain; or the one after the last link, or before the first, where no link followed it.
    """
    trained = [link.key for link in results.links if link.succeeded]
    last = {END_HEAD, link_head_key(trained[-1]) if trained else START_HEAD}
    return next((head for head in reversed(results.heads) if head.key in last), None)


def made_up_for(results: Results, key: str) -> bool:
    """Return whether a hop that failed was tried again at its site by a later hop of the same strand, and succeeded."""
    keys = [link.key for link in results.links]
    failed = results.links[keys.index(key)]
    later = results.links[keys.index(key) + 1 :]
    steps = len(results.data.sites)
    return any(
        (link.strand, link.site) == (failed.strand, failed.site) and link.step >= steps and link.succeeded
        for link in later
    )


class Mending(NamedTuple):
    """What a resumed run does again. `again`: names of pieces of work that count as not done; `make_up`: names of hops, for each
    of which a further one follows at the end of the chain."""

    again: frozenset[str] = frozenset()
    make_up: tuple[str, ...] = ()


def mending(results: Results, *, private: bool) -> Mending:
    """Return what to do again of a run that ended early or incomplete, because a site could not be reached for it.

    A hop after which nothing else was trained is done again in its own place. One that others have followed is made up for at
    the end of the chain, by a further hop at its site. Then the last head from statistics is computed anew; so is one that
    nothing was trained from since, where a site was not reached for it. Students that came out of a chain that changes, or a
    round of which a site was not reached, are trained anew, and so is their own head from statistics.

    Parameters
    ----------
    private : whether sites train privately; nothing that they have paid for is trained anew then
    """
    links = list(results.links)
    rounds = results.student_rounds
    again = {record.key for record in results.alone if record.unreached}
    if private and rounds:
        return Mending(frozenset(again))
    while links and links[-1].unreached:
        again.add(links.pop().key)
    steps = len(results.data.sites)
    make_up = tuple(
        link.key for link in links if link.unreached and link.step < steps and not made_up_for(results, link.key)
    )
    head = last_head(results)
    missed = {head.key} if head is not None and head.unreached else set()
    changes = len(links) < len(results.links) or bool(make_up) or bool(missed)
    if changes:
        again |= missed | {head.key for head in results.heads if head.key == END_HEAD}
    anew = changes or any(round_.unreached for round_ in rounds)
    if anew:
        again |= {round_.key for round_ in rounds}
    of_student = {head.key: bool(head.unreached) for head in results.heads if head.key == STUDENT_HEAD}
    if anew or any(of_student.values()):
        again |= set(of_student)
    return Mending(frozenset(again), make_up)


def _counts(results: Results, config: RunConfig, private: frozenset[str]) -> list[tuple[str, int, int]]:
    """Return (what, how many succeeded, how many were planned) for every kind of work."""
    sites = [site.site for site in results.data.sites]
    trained = [link for link in results.links if link.succeeded]
    hops = config.chain.laps * config.chain.strands * len(sites)
    counts = []
    if hops:
        counts.append(("hops of the chain succeeded", min(len(trained), hops), hops))
        counts.append(("sites trained a link of the chain", len({link.site for link in trained}), len(sites)))
    if config.chain.compare_alone:
        alone = [site for site in sites if site not in private]
        done = {record.site for record in results.alone if record.status in ("done", "retried")}
        counts.append(("hospitals trained alone", len(done & set(alone)), len(alone)))
    counts += [
        (f"sites took part in statistics round '{head.key}'", len(head.sites), len(sites)) for head in results.heads
    ]
    counts += [
        (f"sites took part in student round {round_.round}", len(round_.sites), len(sites))
        for round_ in results.student_rounds
    ]
    with_test = {site.site for site in results.data.sites if site.test}
    for name, scores in results.final.items():
        scored = with_test & {*scores.sites, *scores.together}
        counts.append((f"sites with test images scored the model of the {name}", len(scored), len(with_test)))
    return counts
