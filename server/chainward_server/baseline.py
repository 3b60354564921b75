"""Every hospital alone: what the chain is compared with."""

from __future__ import annotations

import logging

from chainward_server.chain import checked_model
from chainward_server.context import Run
from chainward_server.exchange import Failure, Reply, Request
from chainward_server.results import AloneRecord, LinkStatus
from chainward_server.scoring import link_metrics, shown
from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import LinkResult, LinkTask

logger = logging.getLogger("chainward")


def run_alone(run: Run) -> None:
    """Train every site without the others, with the budget of its links, to compare the chain with.

    A chain of one lap has trained its first site just so already: that link is taken as it is. A private site is not asked:
    it would pay for a comparison out of the budget that protects its patients.
    """
    laps = run.config.chain.laps
    missing = [site for site in run.consortium.sites if not run.folder.is_finished(f"alone-{site}")]
    if private := [site for site in missing if run.privacy.is_private(site)]:
        logger.info("not trained alone, which would cost them privacy: %s", ", ".join(private))
        missing = [site for site in missing if site not in private]
    for link in run.results.links:
        if laps == 1 and link.predecessor is None and link.metrics and link.site in missing:
            missing.remove(link.site)
            run.results.alone.append(
                AloneRecord(site=link.site, status="done", seconds=link.seconds, metrics=link.metrics)
            )
            run.folder.commit(run.results, f"alone-{link.site}")
            run.progress.add(run.alone_work(link.site))
    requests = {site: _alone_request(run, site) for site in missing}
    replies = run.consortium.exchange.stream(requests, LinkResult, run.config.federation.hop_deadline * len(missing))
    for site, reply in replies:
        _record_alone(run, site, reply)


def _alone_request(run: Run, site: str) -> Request:
    task = LinkTask(
        run_id=run.folder.state.run_id,
        hop=f"alone-{site}",
        strand=0,
        lap=0,
        trained_alone=True,
        architecture=run.architecture,
        recipe=run.config.link_recipe(laps=run.config.chain.laps),
        simulated=run.consortium.exchange.members[site].simulated,
    )
    return Request("train.link", task)


def _record_alone(run: Run, site: str, reply: Reply[LinkResult] | Failure) -> None:
    key = f"alone-{site}"
    run.progress.add(run.alone_work(site))
    metrics, reason = None, reply.reason if isinstance(reply, Failure) else None
    if not isinstance(reply, Failure):
        try:
            state = checked_model(run, reply, key, site, laps=run.config.chain.laps)
            metrics = link_metrics(run.score(run.architecture, state, ["val", "test"]))
        except ChainwardError as error:
            reason = f"site '{site}' alone: {error}"
    status: LinkStatus = "skipped" if reason else "done"
    run.results.alone.append(
        AloneRecord(site=site, status=status, seconds=reply.seconds, reason=reason, metrics=metrics)
    )
    run.folder.commit(run.results, key)
    if reason:
        logger.warning("%s alone: skipped. %s", site, reason)
    elif metrics:
        logger.info(
            "%s alone: validation balanced accuracy %s; %s",
            site,
            shown(metrics.validation.balanced_accuracy),
            run.progress.expected_end(),
        )
