"""The errors that a person is meant to read: one line that says what, found what, expected what, do what."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from chainward_shared.outside import LONGEST, visible


class ChainwardError(Exception):
    """Base of all errors with a message for the user; shown as one line, never as a traceback.

    What is quoted from a file or a message may be long and hold line breaks and escape sequences; the message never does.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(" ".join(str(message).splitlines()), LONGEST))


class ConfigError(ChainwardError):
    """A key of the run configuration is unknown, out of range, or contradicts another key."""


class DataError(ChainwardError):
    """A data file, manifest or image can't be used as it is."""


class ModelError(ChainwardError):
    """A backbone is unknown, or its family is not supported for what was asked."""


class WeightsError(ChainwardError):
    """Weights that arrived or were stored are not those that were expected."""


class ProtocolError(ChainwardError):
    """A message lacks something, carries something it must not, or speaks another version."""


class StoreError(ChainwardError):
    """What a site keeps between messages can't be written, or is damaged."""


class RunFolderError(ChainwardError):
    """A run folder can't be written, or is damaged."""


class StartAnewError(RunFolderError):
    """A run can't go on, and resuming it would not help."""


class ExportError(ChainwardError):
    """A model can't be exported, or what was exported does not compute what the model does."""


class StudyError(ChainwardError):
    """A study's arms, settings or folder can't be used as they are."""


class PrivacyError(ChainwardError):
    """A privacy budget, plan, policy or ledger does not allow what is asked, or can't be used as it is."""


class LedgerError(PrivacyError):
    """A privacy ledger can't be written, or is not, entry for entry, what the site once wrote and signed."""


class StatementError(PrivacyError):
    """A privacy statement is not signed by its site, contradicts itself, or contradicts an earlier one."""


class SpentError(PrivacyError):
    """Private work failed after privacy was reserved for it; all of that stays spent. Why it failed may follow from single
    records, so the words stay at the site."""


class PolicyRefusal(PrivacyError):
    """A site's own policy forbids what a run asks. The message holds numbers and names of settings only: it may be sent."""


class ApprovalNeeded(ChainwardError):
    """A person at the site has not approved the run yet, or not any more. The message names runs and commands only."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'X'?)"`` for the known word closest to `word`, or an empty string; case differs least."""
    by_plain = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(word.casefold(), list(by_plain), n=1, cutoff=0.6)
    return f" (did you mean '{by_plain[close[0]]}'?)" if close else ""
