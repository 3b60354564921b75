"""What a secure sum costs: bytes of each site, and CPU seconds, which hardly depend on what else the machine does."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from chainward_shared.protocol import Round
from chainward_shared.secure_sums import (
    Secrets,
    fewest_answers,
    fixed_point,
    masked,
    offered,
    opened,
    real_numbers,
    shares_for_others,
    unmasked,
)
from chainward_simulations.benchmark.figures import Options, Report, Table

SIZES = ((3, 1), (6, 1), (50, 1), (3, 20), (6, 20), (50, 20))
"""Sites, and millions of numbers."""


@dataclass(frozen=True)
class SecureSumCost:
    """One secure sum, without the messages' way.

    Attributes
    ----------
    dropped : sites that drop out after they have shared out their secrets
    site : CPU seconds of a site, median of three: keys, shares and masks
    coordinator : CPU seconds to unmask
    sent : bytes that a site sends, its masked numbers and its shares
    """

    sites: int
    numbers: int
    dropped: int
    site: float
    coordinator: float
    sent: int

    def row(self) -> tuple[str, ...]:
        """Return its row of the table."""
        seconds = (f"{self.site:.2f}", f"{self.coordinator:.2f}")
        return (str(self.sites), f"{self.numbers / 1e6:g} M", str(self.dropped), *seconds, f"{self.sent / 1e6:.2f}")


def measure(options: Options) -> Report:
    """Return what secure sums cost, of each size with nobody dropping out and with as many as may."""
    costs = []
    for sites, millions in ((4, 1),) if options.quick else SIZES:
        for dropped in sorted({0, sites - max(3, fewest_answers(sites, 0.5))}):
            costs.append(_measured(sites, 10**6 * millions, dropped))
            options.say(f"{sites} sites, {millions} M numbers, {dropped} dropped: {costs[-1].site:.2f} CPU s a site")
    table = Table(
        "Secure sums",
        (
            *("sites", "numbers", "drop out"),
            *("CPU seconds of a site", "CPU seconds of the coordinator", "MB sent by a site"),
        ),
        [cost.row() for cost in costs],
    )
    return [table], [asdict(cost) for cost in costs]


def _measured(sites: int, numbers: int, dropped: int) -> SecureSumCost:
    names = [f"site-{index:02d}" for index in range(sites)]
    round_ = Round(
        run_id="benchmark", hop="head", task="0" * 64, members=tuple(names), threshold=fewest_answers(sites, 0.5)
    )
    secrets = {name: Secrets.new() for name in names}
    offers = [offered(secrets[name], round_, name) for name in names]
    shares = {name: shares_for_others(secrets[name], round_, name, offers) for name in names}
    answered, gone = names[: sites - dropped], names[sites - dropped :]
    values = torch.linspace(-1, 1, numbers, dtype=torch.float64)
    total, seconds = np.zeros(numbers, dtype=np.uint64), []
    for place, name in enumerate(answered):
        started = time.process_time()
        if place < 3:
            shares_for_others(Secrets.new(), round_, name, offers)
        total += masked(fixed_point(values, sites), secrets[name], name, offers, names)
        seconds.append(time.process_time() - started)
    helping = answered[: round_.threshold]
    held = {
        name: opened(secrets[name], name, offers, {sender: shares[sender][name] for sender in names})
        for name in helping
    }
    started = time.process_time()
    found = real_numbers(
        unmasked(
            total,
            round_,
            offers,
            answered,
            gone,
            {name: [held[other][name].seed for other in helping] for name in answered},
            {name: [held[other][name].key for other in helping] for name in gone},
        )
    )
    coordinator = time.process_time() - started
    if not torch.allclose(found, len(answered) * values, rtol=0, atol=1e-4):
        raise AssertionError("the secure sum is wrong")
    sent = 8 * numbers + sum(len(share) for share in shares[names[0]].values())
    return SecureSumCost(sites, numbers, dropped, statistics.median(seconds[:3]), coordinator, sent)
