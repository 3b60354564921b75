"""The report of a run: everything of `metrics.json` on one page that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from chainward_server.report import class_rows, colours, formats, plots, tables, verdict
from chainward_server.report import privacy as privacy_page
from chainward_server.results import Results, largest_influence
from chainward_server.run_folder import RunFolder
from chainward_shared.errors import RunFolderError, StatementError
from chainward_shared.evaluation.operating import MIN_CASES
from chainward_shared.local_page.page import environment
from chainward_shared.privacy.record import PrivacyRecord, privacy_record, read_privacy_record
from chainward_shared.privacy.statements import Statements

EXAMPLES = "examples.png"
"""Picture of test images and where the models look in them: in a run folder only where the images are on this machine."""

_PNG = b"\x89PNG\r\n\x1a\n"


def write_report(folder: RunFolder) -> Path:
    """Render `report.html` from what the run folder holds, and return its path.

    Raises
    ------
    RunFolderError
        Nothing has been measured yet, a file is damaged, or the page can't be written.
    """
    results = folder.load_results()
    if results is None:
        raise RunFolderError(f"{folder.path}: nothing has been measured yet (no metrics.json)")
    privacy_file = folder.path / "privacy.json"
    try:
        privacy = (
            read_privacy_record(privacy_file)
            if privacy_file.exists()
            else privacy_record(Statements(), [site.site for site in results.data.sites])
        )
    except StatementError as error:
        raise RunFolderError(str(error)) from error
    examples = folder.path / EXAMPLES
    try:
        picture = examples.read_bytes() if examples.exists() else None
    except OSError as error:
        raise RunFolderError(f"{examples}: can't be read ({error.strerror})") from error
    if picture is not None and not picture.startswith(_PNG):
        raise RunFolderError(f"{examples}: damaged (not a PNG); remove it, or draw it anew with `chainward examples`")
    page = render_report(
        results,
        status=folder.state.status,
        reason=folder.state.reason,
        config={
            name: table if isinstance(table, dict) else {name: table} for name, table in folder.config.tables().items()
        },
        privacy=privacy,
        examples=None if picture is None else base64.b64encode(picture).decode(),
        started=folder.state.started,
        finished=folder.state.updated if folder.state.status != "running" else None,
    )
    return folder.write_text("report.html", page)


def render_report(
    results: Results,
    *,
    status: str,
    reason: str | None,
    config: Mapping[str, Mapping[str, object]],
    privacy: PrivacyRecord,
    started: str,
    finished: str | None,
    examples: str | None = None,
) -> str:
    """Return the page as HTML: pictures inside, no script, nothing loaded from elsewhere.

    Parameters
    ----------
    results : what the run measured so far; any part may be missing
    status : "running", "finished" or "failed"
    reason : why the run failed
    config : tables of the effective configuration, ``{"chain": {"laps": 1, ...}, ...}``
    privacy : how each site trained
    started, finished : ISO 8601 times
    examples : base64 of a PNG with test images and where the models look in them
    """
    page = environment("chainward_server.report", *formats.FILTERS).get_template("template.html.jinja")
    return page.render(
        results=results,
        status=status,
        config=config,
        started=started,
        finished=finished,
        elapsed=formats.elapsed(started, finished),
        verdict=verdict.verdict(results, status, config),
        remarks=verdict.remarks(results),
        cards=verdict.cards(results),
        banners=verdict.banners(results, status, reason),
        **_privacy(privacy, results),
        **_by_class(results),
        **_comparison(results),
        **_chains(results),
        models=tables.model_rows(results),
        metrics=tables.METRICS,
        incidents=tables.incidents(results),
        influence=largest_influence(results.student_rounds),
        mixes=tables.class_mixes(results),
        looks=tables.looks_rows(results),
        examples=examples,
        multilabel=tables.multilabel(results),
    )


def _privacy(privacy: PrivacyRecord, results: Results) -> dict[str, object]:
    """Return what the part on privacy shows."""
    rows = privacy_page.privacy_rows(privacy)
    return {
        "privacy": privacy,
        "privacy_rows": rows,
        "private": [row for row in rows if row.private],
        "outside": privacy_page.outside_the_guarantee(rows, results),
        "privacy_notes": privacy_page.notes(results),
    }


def _chains(results: Results) -> dict[str, object]:
    """Return what the part on the chain, link by link, shows."""
    chains, sites = tables.strands(results), tables.site_names(results)
    alone = tables.alone_summary(results)
    return {
        "sites": sites,
        "alone": alone,
        "strands": chains,
        "laps": max((link.lap for links in chains for link in links), default=1),
        "heat": tables.heat_map(results),
        "scale": [colours.shade(step / 8) for step in range(9)],
        "upright_heads": len(sites) > 7 or max(map(len, sites), default=0) > 14,
        "curve_plot": plots.curve_plot(chains, alone, tables.alone_summary(results, "macro_auc")),
    }


def _comparison(results: Results) -> dict[str, object]:
    """Return the rows of the comparison, each with the interval of the chain's figure, and their picture."""
    sites = [*tables.site_names(results), None]
    rows = [
        replace(row, interval=class_rows.interval_of(results, "chain", site))
        for row, site in zip(tables.comparison_rows(results), sites, strict=True)
    ]
    scored = [
        place for place in range(3) if any(row.scores[name][place] is not None for row in rows for name in row.scores)
    ]
    plot = plots.comparison_plot(rows, tables.chance(results))
    return {"comparison": rows, "compared": scored, "comparison_plot": plot}


def _by_class(results: Results) -> dict[str, object]:
    """Return what the class-by-class part shows."""
    models = class_rows.models_by_class(results)
    pictures = {
        model.kind: [*filter(None, [plots.reliability_plot(model)]), *plots.decision_plots(model)] for model in models
    }
    return {"by_class": models, "class_plots": pictures, "gaps": class_rows.gaps(results), "min_cases": MIN_CASES}
