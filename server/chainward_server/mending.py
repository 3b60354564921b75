"""What a resumed run does again: the pieces of work that are missing because a site could not be reached.

A hop after which nothing else was trained is done again in its own place. One that others have followed is made up for at
the end of the chain, by a further hop at its site. Then the last head from statistics is computed anew; so is one that nothing
was trained from since, where a site was not reached for it. Students that came out of a chain that changes, or a round of which
a site was not reached, are trained anew, and so is their own head from statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

from chainward_server.completeness import last_head, made_up_for
from chainward_server.results import Results
from chainward_shared.hops import END_HEAD, STUDENT_HEAD


@dataclass(frozen=True)
class Mending:
    """What is to be done again.

    Attributes
    ----------
    again : names of pieces of work that count as not done
    make_up : names of hops for each of which a further one follows at the end of the chain
    """

    again: frozenset[str] = frozenset()
    make_up: tuple[str, ...] = ()


def mending(results: Results, *, private: bool) -> Mending:
    """Return what to do again of a run that ended early or incomplete.

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
