"""Every hospital alone: what the chain is compared with."""

from __future__ import annotations

import logging

from chainward_server.chain import check_link
from chainward_server.context import Run
from chainward_server.results import AloneRecord, LinkStatus
from chainward_server.scoring import link_metrics, shown
from chainward_server.sites import Failure, Trained, Work
from chainward_shared.errors import ChainwardError
from chainward_shared.hops import alone_key
from chainward_shared.protocol import LinkResult, LinkTask

logger = logging.getLogger("chainward")


def run_alone(run: Run) -> None:
    """Train every site without the others, with the budget of its links, to compare the chain with.

    Without a teacher the first link of a chain of one lap has trained its site just so already: it is taken as it is. A
    private site is not asked: it would pay for a comparison out of the budget that protects its patients.
    """
    alone_already = run.config.chain.laps == 1 and run.config.chain.head == "trained"
    missing = [site for site in run.sites.ids if not run.checkpoints.is_finished(alone_key(site))]
    if private := [site for site in missing if run.privacy.is_private(site)]:
        logger.info("not trained alone, which would cost them privacy: %s", ", ".join(private))
        missing = [site for site in missing if site not in private]
    for link in run.results.links:
        if alone_already and link.predecessor is None and link.succeeded and link.site in missing:
            missing.remove(link.site)
            run.results.alone.append(
                AloneRecord(site=link.site, status="done", seconds=link.seconds, metrics=link.metrics)
            )
            run.checkpoints.commit(run.results, alone_key(link.site))

    for site, answer in run.sites.train_links({site: _alone_work(run, site) for site in missing}):
        _record_alone(run, site, answer)


def _alone_work(run: Run, site: str) -> Work[LinkTask]:
    task = LinkTask(
        run_id=run.checkpoints.run_id,
        hop=alone_key(site),
        strand=0,
        lap=0,
        trained_alone=True,
        architecture=run.architecture,
        recipe=run.config.link_recipe(laps=run.config.chain.laps),
    )
    return Work(task)


def _record_alone(run: Run, site: str, answer: Trained[LinkResult] | Failure) -> None:
    metrics, reason = None, answer.reason if isinstance(answer, Failure) else None
    if not isinstance(answer, Failure):
        try:
            check_link(run, answer, alone_key(site), site, laps=run.config.chain.laps)
            if run.score_all:
                metrics = link_metrics(run.score(run.architecture, answer.model, ["val", "test"]))
        except ChainwardError as error:
            reason = f"site '{site}' alone: {error}"
    status: LinkStatus = "skipped" if reason else "done"
    run.results.alone.append(
        AloneRecord(
            site=site,
            status=status,
            seconds=answer.seconds,
            reason=reason,
            unreached=isinstance(answer, Failure) and answer.unreached,
            metrics=metrics,
        )
    )
    run.checkpoints.commit(run.results, alone_key(site))
    if reason:
        logger.warning("%s alone: skipped. %s", site, reason)
    elif metrics:
        logger.info(
            "%s alone: validation balanced accuracy %s; %s",
            site,
            shown(metrics.validation.balanced_accuracy),
            run.expected_end("alone"),
        )
