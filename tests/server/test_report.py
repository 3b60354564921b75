"""The report of a run, rendered from fabricated results."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pictures
import pytest

from chainward_server.report.page import render_report
from chainward_server.results import (
    AloneRecord,
    DataSummary,
    LinkMetrics,
    LinkRecord,
    ModelSummary,
    Results,
    SiteLocalisation,
    SiteScores,
    SiteSummary,
    StudentRound,
)
from chainward_shared.evaluation.localisation import Interval, LocalisationScores
from chainward_shared.evaluation.scores import Scores
from chainward_shared.privacy.record import PrivacyRecord
from chainward_shared.protocol import TrainingLog

CLASSES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
SITES = ["rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias", "st_elsewhere_university", "nordklinik"]
TEST_IMAGES = {site: 40 + 13 * index for index, site in enumerate(SITES)}
SECTIONS = ["comparison", "classes", "chain", "size", "work", "incidents", "data", "privacy", "settings", "glossary"]
VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}
PRIVACY = {"mode": "off", "statement": "Weights and metrics left the hospitals; images did not.", "sites": {}}
CONFIG: dict[str, dict[str, Any]] = {
    "chain": {"laps": 1, "strands": 1, "backbone": "convnext_atto", "attention-weight": 0.5, "epochs": 15},
    "student": {"model": "convnext_zepto", "rounds": 2},
    "federation": {"sites": SITES, "deadline": 600},
    "privacy": {"mode": "off"},
}


def scores(balanced: float | None, n: int) -> Scores:
    if balanced is None:
        return Scores(n=n, accuracy=None, balanced_accuracy=None, macro_auc=None, ece=None)
    return Scores(
        n=n,
        accuracy=round(0.45 + balanced / 2, 4),
        balanced_accuracy=balanced,
        macro_auc=round(0.55 + 0.45 * balanced, 4),
        ece=round(0.22 - balanced / 5, 4),
    )


def site_scores(balanced: float, sites: list[str], home: str = "") -> SiteScores:
    """Scores around `balanced` that differ by site; better at `home`."""
    return SiteScores(
        sites={
            site: scores(round(balanced + 0.021 * ((index * 5) % 7 - 3) + 0.06 * (site == home), 4), 40 + 13 * index)
            for index, site in enumerate(sites)
        },
        pooled=scores(balanced, sum(40 + 13 * index for index in range(len(sites)))),
    )


def link_metrics(balanced: float, sites: list[str], home: str) -> LinkMetrics:
    return LinkMetrics(test=site_scores(balanced, sites, home), validation=scores(balanced, 300))


def link(balanced: float | None, sites: list[str], site: str, predecessor: str | None, **fields: Any) -> LinkRecord:
    """A link as it would be recorded; without `balanced` one that left no model."""
    training = TrainingLog(
        epochs=3,
        steps=120,
        images=1873,
        loss=[1.912, 1.41, 1.073],
        temperature=[4.0, 3.6, 3.24],
        seconds=8.728,
        precision="bf16",
    )
    record: dict[str, Any] = {
        "strand": 0,
        "lap": 0,
        "step": 0,
        "site": site,
        "predecessor": predecessor,
        "status": "done",
        "attempts": 1,
        "seconds": 73.4,
        "bytes_down": 13_482_112,
        "bytes_up": 13_485_001,
        "training": training if balanced is not None else None,
        "metrics": link_metrics(balanced, sites, site) if balanced is not None else None,
    }
    return LinkRecord(**record | fields)


def data(sites: list[str], synthetic: bool = False) -> DataSummary:
    def mix(n: int) -> list[int]:
        rare = [max(n * share // 100, 1) for share in (3, 5, 11, 1, 11, 1)]
        return [*rare[:5], n - sum(rare), rare[5]]

    return DataSummary(
        source="phantom" if synthetic else "HAM10000, four centres",
        synthetic=synthetic,
        classes=CLASSES,
        image_size=64,
        channels=3,
        sites=[
            SiteSummary(
                site=site,
                train=240 + 1130 * (index % 3),
                val=50,
                test=40 + 13 * index,
                class_counts={
                    "train": mix(240 + 1130 * (index % 3)),
                    "val": mix(50),
                    "test": mix(40 + 13 * index),
                },
                notes=["no training cases of: df"] if index == 2 else [],
            )
            for index, site in enumerate(sites)
        ],
    )


def finished_run(chain: float = 0.612, student: float = 0.588, **fields: Any) -> Results:
    """Six sites, one lap, one strand; link 2 retried, link 4 skipped; hospitals alone 0.401 to 0.451."""
    along: list[float | None] = [0.431, 0.497, 0.552, None, 0.581, chain]
    links: list[LinkRecord] = []
    for step, (site, balanced) in enumerate(zip(SITES, along, strict=True)):
        predecessor = next((before.site for before in reversed(links) if before.metrics), None)
        extra: dict[str, Any] = {}
        if step == 1:
            extra = {"status": "retried", "attempts": 2, "reason": "no answer within 600 s, then it answered"}
        if step == 3:
            extra = {"status": "skipped", "attempts": 3, "reason": "node offline for 30 min", "bytes_up": 0}
        links.append(link(balanced, SITES, site, predecessor, step=step, **extra))
    results: dict[str, Any] = {
        "run_id": "20260103-140501-7f3a",
        "seed": 7,
        "data": data(SITES),
        "links": links,
        "alone": [
            AloneRecord(
                site=site,
                status="done",
                seconds=71.0,
                metrics=link_metrics(0.401 + 0.01 * index, SITES, site),
            )
            for index, site in enumerate(SITES)
        ],
        "student_rounds": [
            StudentRound(
                round=1,
                stage="distil",
                sites=SITES[:5],
                failed={"nordklinik": "out of memory"},
                seconds=210.2,
                bytes_down=17_000_000,
                bytes_up=17_100_000,
                validation=scores(0.541, 300),
            ),
            StudentRound(
                round=2,
                stage="finetune",
                sites=SITES,
                seconds=118.8,
                bytes_down=20_400_000,
                bytes_up=20_500_000,
                validation=scores(0.577, 300),
            ),
        ],
        "models": {
            "chain": ModelSummary(
                architecture="convnext_atto", parameters=3_376_447, file_bytes=13_528_900, latency_ms=11.84
            ),
            "student": ModelSummary(
                architecture="convnext_zepto", parameters=812_407, file_bytes=3_270_100, latency_ms=4.12
            ),
        },
        "final": {"chain": site_scores(chain, SITES), "student": site_scores(student, SITES)},
        "timings": {"rendezvous": 4.2, "chain": 512.0, "alone": 430.1, "student": 329.0, "evaluation": 61.0},
    }
    return Results(**results | fields)


def two_strands_two_laps(sites: list[str], synthetic: bool = True) -> Results:
    """Two strands of two laps over `sites`."""
    links = [
        link(
            round(0.36 + 0.011 * (lap * len(sites) + step) + 0.017 * strand, 4),
            sites,
            sites[(step + strand) % len(sites)],
            sites[(step + strand - 1) % len(sites)] if lap or step else None,
            strand=strand,
            lap=lap,
            step=step,
        )
        for strand in range(2)
        for lap in range(2)
        for step in range(len(sites))
    ]
    best = site_scores(0.36 + 0.022 * len(sites), sites)
    return Results(run_id="strands", seed=0, data=data(sites, synthetic), links=links, final={"chain": best})


def failed_run() -> Results:
    """Two links, then the end."""
    links = [
        link(0.431, SITES, SITES[0], None, step=0),
        link(0.497, SITES, SITES[1], SITES[0], step=1),
    ]
    return Results(run_id="broken", seed=0, data=data(SITES), links=links)


def one_site() -> Results:
    links = [link(0.52, ["only"], "only", None)]
    return Results(
        run_id="tiny",
        seed=0,
        data=data(["only"]),
        links=links,
        alone=[AloneRecord(site="only", status="done", seconds=3.0, metrics=link_metrics(0.52, ["only"], "only"))],
        final={"chain": site_scores(0.52, ["only"])},
    )


def render(results: Results, status: str = "finished", reason: str | None = None, **fields: Any) -> str:
    return render_report(
        results,
        status=status,
        reason=reason,
        config=fields.get("config", CONFIG),
        privacy=PrivacyRecord.model_validate(fields.get("privacy", PRIVACY)),
        started="2026-01-03T14:05:01+00:00",
        finished=fields.get("finished", "2026-01-03T14:31:47+00:00"),
    )


class Page(HTMLParser):
    """Checks nesting, and gathers texts, ids and links."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.badly_closed: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.classes: dict[str, list[str]] = {}
        self._text: list[str] = []
        self._class_of_open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)
            self._class_of_open.append(dict(attrs).get("class") or "")
            self.classes.setdefault(self._class_of_open[-1], []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.badly_closed.append(tag)
            return
        self.open.pop()
        self._class_of_open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self._text.append(data)
            for name in self._class_of_open:
                self.classes[name][-1] += data

    def _note(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tags.append(tag)
        if identity := attributes.get("id"):
            self.ids.append(identity)
        self.links += [value for name in ("href", "xlink:href", "src") if (value := attributes.get(name)) is not None]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self._text))

    def of_class(self, name: str) -> list[str]:
        return [re.sub(r"\s+", " ", text).strip() for text in self.classes.get(name, [])]


EVERY_RUN = {
    "finished": (finished_run(), "finished", None),
    "two strands, two laps": (two_strands_two_laps(SITES), "finished", None),
    "twelve sites": (two_strands_two_laps([f"hospital_with_name_{i}" for i in range(12)]), "finished", None),
    "failed": (failed_run(), "failed", "site vidir_molemax: no answer within the deadline"),
    "one site": (one_site(), "finished", None),
    "nothing yet": (Results(run_id="new", seed=0, data=data(SITES)), "running", None),
    "no sites": (Results(run_id="empty", seed=0, data=data([])), "failed", "nobody came"),
}


@pytest.fixture(params=EVERY_RUN, scope="module")
def any_page(request: pytest.FixtureRequest) -> str:
    results, status, reason = EVERY_RUN[request.param]
    with pictures.drawn():
        return render(results, status, reason)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(finished_run()))


@pytest.mark.slow
def test_every_tag_is_closed_where_it_was_opened(any_page: str) -> None:
    parsed = Page(any_page)
    assert parsed.badly_closed == []
    assert parsed.open == []


def test_page_loads_nothing_from_elsewhere_and_runs_nothing(any_page: str) -> None:
    parsed = Page(any_page)
    assert not {"script", "img", "link", "iframe", "object", "image"} & set(parsed.tags)
    assert all(target.startswith("#") for target in parsed.links)
    assert "://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", any_page)
    assert "@import" not in any_page


def test_links_within_the_page_lead_somewhere_and_ids_are_unique(any_page: str) -> None:
    parsed = Page(any_page)
    assert {target.removeprefix("#") for target in parsed.links} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))


def test_every_section_is_there_in_order(any_page: str) -> None:
    assert [identity for identity in Page(any_page).ids if identity in SECTIONS] == SECTIONS


def test_every_page_says_that_it_is_not_for_clinical_use(any_page: str) -> None:
    assert "Not a medical device. Not for clinical use." in any_page


@pytest.mark.slow
def test_same_results_give_the_same_page(drawn: None) -> None:
    assert render(finished_run()) == render(finished_run())


def test_cards_show_the_figures_of_the_results(page: Page) -> None:
    results = finished_run()
    chain, alone, student, size = page.of_class("figure")[:4]
    assert chain == f"{results.final['chain'].pooled.balanced_accuracy:.3f}" == "0.612"
    assert alone == "0.426"  # mean of 0.401, 0.411, ..., 0.451
    assert student == "0.588"
    assert size == "24 %"  # 3.27 of 13.53 MB
    assert "best 0.451 (nordklinik)" in page.of_class("card alone")[0]
    assert f"macro AUC {results.final['chain'].pooled.macro_auc:.3f}" in page.of_class("card chain")[0]


def test_tables_hold_every_hospitals_figures(page: Page) -> None:
    results = finished_run()
    for model in results.final.values():
        for values in model.sites.values():
            assert f" {values.balanced_accuracy:.3f} " in page.text
            assert f" {values.ece:.3f} " in page.text
    for record in results.alone:
        assert record.metrics is not None
        assert f" {record.metrics.test.sites[record.site].macro_auc:.3f} " in page.text


def test_heat_map_holds_every_link_on_every_site_and_marks_where_it_was_trained(page: Page) -> None:
    here = [re.split(r"[+−±\s]", text)[0] for text in page.of_class("here ")]
    trained = [record for record in finished_run().links if record.metrics]
    assert here == [
        f"{record.metrics.test.sites[record.site].balanced_accuracy:.3f}" for record in trained if record.metrics
    ]


def test_heat_map_shows_the_change_against_the_last_link_that_left_a_model(page: Page) -> None:
    pooled = page.of_class("pooled ")
    assert pooled == ["0.431", "0.497+0.066", "0.552+0.055", "0.581+0.029", "0.612+0.031"]


def test_a_loss_along_the_chain_carries_a_minus_sign() -> None:
    assert "0.441−0.140" in Page(render(finished_run(chain=0.441))).of_class("pooled ")


def test_pictures_name_every_hospital_as_text(drawn: None) -> None:
    pictures = re.findall(r"<svg.*?</svg>", render(finished_run()), re.DOTALL)
    assert len(pictures) == 2
    for picture in pictures:
        assert all(f"{site}</text>" in picture for site in SITES)


def test_work_is_shown_in_units_people_read(page: Page) -> None:
    assert "1 min 13 s" in page.text
    assert "13.5 MB" in page.text
    assert "1.912 → 1.073" in page.text


@pytest.mark.parametrize("synthetic", [True, False])
def test_synthetic_banner_appears_exactly_where_data_are_synthetic(synthetic: bool) -> None:
    html = render(finished_run(data=data(SITES, synthetic)))
    assert ("No patients; nothing here speaks about real images" in html) == synthetic


def test_skipped_link_and_its_reason_are_shown_on_top_and_in_the_list(page: Page) -> None:
    (banner,) = page.of_class("banner incomplete")
    assert "1 of 6 links added nothing to the chain" in banner
    assert "vienna_dias skipped (node offline for 30 min)" in banner
    assert "vienna_dias, link 4" in page.text
    assert "nordklinik, student round 1 failed out of memory" in page.text
    assert "no training cases of: df" in page.text


@pytest.mark.slow
def test_undisturbed_run_says_that_nothing_failed() -> None:
    html = render(two_strands_two_laps(SITES))
    assert "Nothing failed or was skipped." in html
    assert 'class="banner incomplete"' not in html


def test_failed_run_shows_its_reason_and_how_far_it_came() -> None:
    parsed = Page(render(*EVERY_RUN["failed"]))
    assert parsed.of_class("banner failed") == ["This run failed. site vidir_molemax: no answer within the deadline"]
    (verdict,) = parsed.of_class("verdict")
    assert verdict.startswith("The run failed after 2 of 6 links; no final classifier came out.")
    assert "vidir_modern, reaches balanced accuracy 0.497 on 435 test images" in verdict


def test_running_run_is_not_called_finished() -> None:
    parsed = Page(render(failed_run(), "running", finished=None))
    assert "This run is not finished" in parsed.text
    assert parsed.of_class("verdict")[0].startswith("The run is under way: 2 of 6 links finished.")


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        (0.612, "the chain is better than every hospital alone"),
        (0.441, "the chain is better than the average hospital alone, but worse than the best one"),
        (0.446, "the chain is better than the average hospital alone, but about the same as the best one"),
        (0.430, "the chain is about the same as the average hospital alone, but worse than the best one"),
        (0.300, "the chain is worse than the average hospital alone and worse than the best one"),
    ],
)
def test_verdict_says_how_the_chain_compares_with_hospitals_alone(chain: float, said: str) -> None:
    (verdict,) = Page(render(finished_run(chain=chain))).of_class("verdict")
    assert verdict.startswith(f"Five of six hospitals trained one classifier: balanced accuracy {chain:.3f} on 435")
    assert said in verdict


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (0.500, "The compact student is worse than the chain: 0.500 (−0.112), with 24 % of its size."),
        (0.608, "The compact student is about the same as the chain: 0.608 (−0.004), with 24 % of its size."),
        (0.640, "The compact student is better than the chain: 0.640 (+0.028), with 24 % of its size."),
    ],
)
def test_verdict_says_how_the_student_compares_with_the_chain(student: float, said: str) -> None:
    assert said in Page(render(finished_run(student=student))).of_class("verdict")[0]


def test_remark_counts_hospitals_that_gain_and_lose() -> None:
    # apart from each site's own offset: alone at home 0.461, 0.471, ... 0.511; the chain 0.490 everywhere
    remarks = Page(render(finished_run(chain=0.49))).of_class("remarks")[0]
    assert "better than the hospital's own model at 2 of 6 hospitals, worse at 2." in remarks


@pytest.mark.parametrize(("chain", "within"), [(0.612, False), (0.49, True)])
def test_remark_says_when_the_test_images_are_too_few_to_tell_chain_and_best_hospital_apart(
    chain: float, within: bool
) -> None:
    remarks = Page(render(finished_run(chain=chain))).of_class("remarks")[0]
    assert "uncertain by about ±0.1" in remarks
    assert ("more than its distance to the best hospital alone" in remarks) == within


def test_strings_from_sites_are_escaped_in_text_and_pictures(drawn: None) -> None:
    evil = "<script>alert('x')</script> & $a_b$"
    run = finished_run().model_dump_json(by_alias=True).replace("vidir_molemax", "vidir & s_o's")
    run = run.replace('"nv"', f'"{evil}"')
    run = run.replace("node offline for 30 min", "<b onload=x>offline</b>").replace("no training cases of: df", "<i>df")
    html = render(Results.model_validate_json(run), reason="</title><script>")
    assert "<script" not in html
    assert "<b onload" not in html
    assert "<i>df" not in html
    parsed = Page(html)
    assert parsed.open == parsed.badly_closed == []
    assert "<script>alert('x')</script>" in parsed.text
    assert "$a_b$" in parsed.text
    assert "vidir & s_o's" in parsed.text


def test_missing_scores_are_en_dashes_not_zeros_or_none() -> None:
    results = finished_run()
    final = results.final["chain"].model_copy(
        update={
            "sites": results.final["chain"].sites | {"vienna_dias": scores(None, 0)},
            "pooled": scores(None, 0),
        }
    )
    parsed = Page(render(finished_run(final={"chain": final})))
    assert parsed.of_class("figure")[0] == "–"
    by_hospital = parsed.text.split("Hospital by hospital")[1]
    assert re.search(r" vienna_dias 79 – 0\.449 – 0\.", by_hospital), "of what was not trained there is no column"
    assert re.search(r" All hospitals 435 – 0\.426 – 0\.", by_hospital)
    assert "None" not in parsed.text
    assert "nan" not in parsed.text.split()
    assert "Without test images its balanced accuracy is unknown." in parsed.text


def test_missing_phases_are_named_as_missing(drawn: None) -> None:
    text = Page(render(*EVERY_RUN["nothing yet"])).text
    for said in (
        "no link has finished",
        "no hospital trained alone",
        "No link has run.",
        "No model was measured.",
        "Nothing to compare",
    ):
        assert said in text


def test_privacy_off_is_said_plainly_beside_the_statement(page: Page) -> None:
    (statement,) = page.of_class("statement")
    assert statement.startswith("Differential privacy is off.")
    assert "Weights and metrics left the hospitals; images did not." in statement


def test_what_each_site_spent_is_listed_with_its_budget() -> None:
    facts = {"mode": "dp-sgd", "epsilon": 2.5, "delta": 1e-05, "unit": "patient", "epsilon_lifetime": 5.25}
    privacy = {
        "mode": "dp-sgd at some sites",
        "statement": "Bounded.",
        "sites": {
            "rosendahl": {**facts, "budget": 8.0, "left": 2.75, "metrics": "withhold", "seeded": False},
            "vidir": {"mode": "off", "epsilon": None, "delta": None},
            "vienna": {"mode": "no model", "epsilon": None, "delta": None},
        },
    }
    text = Page(render(finished_run(), privacy=privacy)).text
    assert "Differential privacy: dp-sgd at some sites." in text
    assert "rosendahl private (DP-SGD) patient 2.50 5.25 8.00 2.75 1e-05 withheld" in text
    assert "vidir without privacy – – – – – – as they are" in text
    assert "vienna no model came from it" in text
    assert "All that left vidir: this hospital trained without differential privacy." in text


def test_settings_show_every_key_of_the_configuration(page: Page) -> None:
    for table, keys in CONFIG.items():
        assert table in page.text
        for key in keys:
            assert f" {key} " in page.text


def test_classes_are_counted_per_site_and_together(page: Page) -> None:
    mix = page.of_class("mix")[0]
    results = finished_run()
    together = sum(site.class_counts["train"][5] for site in results.data.sites)
    assert f"{together:,}".replace(",", " ") in mix.replace("\u202f", " ")


# --- where the models look ---


def looks(lift: float, n: int, left_out: int = 0, interval: bool = True) -> LocalisationScores:
    def around(value: float) -> Interval:
        return Interval(mean=value, low=value * 0.9 if interval else None, high=value * 1.1 if interval else None)

    return LocalisationScores(
        n=n, left_out=left_out, lift=around(lift), pointing=around(0.25), auprc=around(0.125), iou=around(0.0625)
    )


def looking(**models: float) -> Results:
    return finished_run(
        localization={
            name: SiteLocalisation(
                sites={SITES[0]: looks(lift - 0.3, 40), SITES[1]: looks(lift + 0.3, 1, interval=False)},
                pooled=looks(lift, 41, left_out=1_203),
            )
            for name, lift in models.items()
        }
    )


def test_where_the_models_look_is_told_with_lift_first():
    page = Page(render(looking(chain=2.0, student=1.43)))
    assert not page.badly_closed
    assert "looks" in page.ids
    assert "#looks" in page.links
    section = page.text.split("On the test images in which a region")[1].split("Size and speed")[0]
    assert "1 is chance, 2 is twice as much" in section
    columns = ["Lift", "95 % interval", "Pointing", "Pixel AUPRC", "IoU"]
    assert [section.index(name) for name in columns] == sorted(section.index(name) for name in columns)
    assert "Chain All hospitals 41 2.00× 1.80 to 2.20 0.250 0.125 0.062" in section
    assert f"{SITES[0]} 40 1.70× 1.53 to 1.87" in section
    assert f"{SITES[1]} 1 2.30× – 0.250" in section
    assert "Compact student All hospitals 41 1.43× 1.29 to 1.57" in section
    assert "1 203 test images without a region to score are left out" in section


def test_one_model_may_be_all_that_was_localised():
    page = Page(render(looking(chain=2.0)))
    assert not page.badly_closed
    assert page.text.count("All hospitals 41") == 1


@pytest.mark.parametrize("name", EVERY_RUN)
def test_without_regions_nothing_is_said_about_where_models_look(name):
    results, status, reason = EVERY_RUN[name]
    assert "models look" not in render(results, status, reason)


def test_where_no_hospital_trained_alone_no_column_is_left_for_it() -> None:
    text = Page(render(finished_run(alone=[]))).text
    comparison = text.split("Hospital by hospital")[1].split("Class by class")[0]
    assert " alone chain student " not in comparison and " chain student " in comparison
    assert "on its own images" not in text.split("Hospital by hospital")[0]
