"""Names of the pieces of work of a run: in messages, ledgers, `run.json` and model files."""

from __future__ import annotations

from collections.abc import Iterable

START_HEAD, END_HEAD, STUDENT_HEAD = "head-start", "head", "head-student"
"""Statistics rounds: before the first link, over what the chain leaves, and over the student."""


def link_key(strand: int, lap: int, step: int) -> str:
    """Return the name of one hop of the chain; all counts are 0-based, `step` within the lap."""
    return f"strand-{strand}-lap-{lap}-step-{step}"


def alone_key(site: str) -> str:
    """Return the name of a hospital's training without the others."""
    return f"alone-{site}"


def link_head_key(link: str) -> str:
    """Return the name of the statistics round after a hop."""
    return f"head-{link}"


def student_key(number: int) -> str:
    """Return the name of a round of the students, the first of which is 1."""
    return f"student-round-{number}"


def scores_key(splits: Iterable[str], digest: str) -> str:
    """Return the name of the scoring of a model with this digest; without splits it is asked where the model looks."""
    return f"scores-{'-'.join(splits) or 'looks'}-{digest[:16]}"
