"""The model card: what a model is, what it was trained on, how good, how private, and what it must not be used for.

Markdown with YAML front matter, as Hugging Face's model cards are. Text that comes from sites (names of sites and classes,
reasons) is escaped: a card is opened in browsers.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import tomli_w
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from chainward_server.measure import described
from chainward_server.report import class_rows, formats, tables
from chainward_server.results import Results, SiteScores
from chainward_server.run_folder import RunFolder
from chainward_shared import __version__
from chainward_shared.evaluation.scores import Scores
from chainward_shared.model_record import ModelRecord
from chainward_shared.models import Architecture
from chainward_shared.pixels import scaling
from chainward_shared.privacy.findings import Audit
from chainward_shared.privacy.record import PrivacyRecord
from chainward_shared.privacy.report import epsilon_text, outside

if TYPE_CHECKING:
    from chainward_server.export.onnx_model import OnnxCheck

MODEL_LABELS = {"chain": "The chain's model", "student": "The compact student"}
_SETTINGS_SHOWN = ("federation", "data", "chain", "privileged", "student", "privacy")
_SPECIAL = re.compile(r"([\\`*_\[\]#|~])")
_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")


@dataclass(frozen=True)
class CardFile:
    """One file of the export."""

    name: str
    bytes: int
    sha256: str


def model_card(
    folder: RunFolder,
    name: str,
    results: Results,
    *,
    architecture: Architecture,
    parameters: int,
    privacy: PrivacyRecord | None,
    audit: Audit | None,
    files: list[CardFile],
    onnx: OnnxCheck | None,
    onnx_input: str,
    record: ModelRecord,
) -> str:
    """Return the card of a run's model.

    Parameters
    ----------
    name : "chain" or "student"
    parameters : how many the model has
    privacy : content of privacy.json; None where the run has none (yet)
    audit : of the statements in it; None where there are none
    files : the other files of the export
    onnx : how ONNX compares with PyTorch; None without ONNX
    onnx_input : see `OnnxInput`
    record : what the model's file says of it
    """
    card = _environment().get_template("card.md.jinja")
    return card.render(
        front_matter=Markup(_front_matter(folder, name, results, onnx is not None)),
        label=MODEL_LABELS[name],
        name=name,
        run=folder.state,
        results=results,
        parameters=parameters,
        measured=results.models.get(name),
        **_about_architecture(architecture, tables.multilabel(results)),
        **_about_training(folder, results),
        **_about_scores(name, results),
        privacy=privacy,
        audit=audit,
        noised=[site.site for site in audit.sites if site.metrics == "noised"] if audit else [],
        outside=outside(audit) if audit else [],
        files=files,
        onnx=onnx,
        onnx_input=onnx_input,
        record=record,
        versions=_versions(folder, onnx),
        exported=__version__,
    )


def _about_architecture(architecture: Architecture, multilabel: bool) -> dict[str, object]:
    mean, scale = scaling(architecture.pixels)
    return {
        "architecture": architecture,
        "described": described(architecture),
        "multilabel": multilabel,
        "activation": "sigmoid" if multilabel else "softmax",
        "mean": _numbers(mean),
        "scale": _numbers(scale),
        "scaled": _scaling_code(architecture),
    }


def _about_training(folder: RunFolder, results: Results) -> dict[str, object]:
    return {
        "simulated": (folder.path / "simulated-sites").is_dir(),
        "sites": results.data.sites,
        "train_mix": next((mix for mix in tables.class_mixes(results) if mix.split == "train"), None),
        "without_training_mix": [site.site for site in results.data.sites if not site.class_counts.get("train")],
        "hops": [link.record for links in tables.strands(results) for link in links],
        "dropped": [link for link in results.links if not link.succeeded],
        "config": folder.config,
        "settings": Markup(_settings(folder)),
    }


def _about_scores(name: str, results: Results) -> dict[str, object]:
    scores = results.final.get(name)
    pooled, sites = _pooled(scores), tables.site_names(results)
    own = {} if scores is None else {site: scores.sites.get(site) for site in (*sites, *scores.sites)}
    missing = [site for site, of in own.items() if of is None]
    value, counts = pooled.balanced_accuracy if pooled else None, tables.test_counts(results)
    return {
        "scores": [*own.items(), ("All sites, pooled", pooled)],
        "pooled": pooled,
        "missing_sites": missing,
        "withheld": scores is not None and pooled is None,
        "others": _others(name, results),
        "chance": tables.chance(results),
        "margin": None if value is None or missing or not counts else tables.margin(value, counts),
        "looks": results.localization.get(name),
        "by_class": next((model for model in class_rows.models_by_class(results) if model.kind == name), None),
    }


def plain(value: object) -> object:
    """Return text with what Markdown and HTML would read as more than text escaped, on one line; anything else as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    one_line = _BREAKS.sub(" ", value)
    one_line = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(_SPECIAL.sub(r"\\\1", one_line))


def code(value: object) -> Markup:
    """Return a value as a code span."""
    return Markup(f"`{' '.join(str(value).replace('`', chr(39)).split()).replace('|', '/')}`")


def _front_matter(folder: RunFolder, name: str, results: Results, onnx: bool) -> str:
    pooled = _pooled(results.final.get(name))
    tags = ["chainward", "federated-learning", "medical-imaging", "timm", "safetensors"]
    tags += ["onnx"] if onnx else []
    tags += ["multi-label"] if tables.multilabel(results) else []
    tags += ["synthetic-data"] if results.data.synthetic else []
    front: dict[str, Any] = {
        "license": "unknown",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": tags,
    }
    measured = [
        {"type": kind, "name": label, "value": round(value, 4)}
        for kind, metric, label in (
            ("balanced_accuracy", "balanced_accuracy", "Balanced accuracy, pooled over the sites"),
            ("roc_auc", "macro_auc", "Macro AUC, pooled over the sites"),
            ("accuracy", "accuracy", "Accuracy, pooled over the sites"),
            ("ece", "ece", "Expected calibration error, 15 bins"),
        )
        if pooled and (value := getattr(pooled, metric)) is not None
    ]
    if measured:
        dataset = "Synthetic phantoms" if results.data.synthetic else "Test images of the training sites"
        front["model-index"] = [
            {
                "name": f"chainward-{folder.state.run_id}-{name}",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"type": "private", "name": dataset, "split": "test"},
                        "metrics": measured,
                    }
                ],
            }
        ]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _settings(folder: RunFolder) -> str:
    """Return what decides the training as TOML; without paths of the coordinator's machine."""
    given = folder.config.tables()
    shown = {"seed": given["seed"], **{table: dict(given[table]) for table in _SETTINGS_SHOWN if table in given}}
    shown.get("data", {}).pop("source", None)
    return tomli_w.dumps(shown)


def _numbers(values: float | list[float]) -> str:
    """Return numbers as words."""
    return " / ".join(f"{value:g}" for value in values) if isinstance(values, list) else f"{values:g}"


def _scaling_code(architecture: Architecture) -> dict[str, str]:
    """Return what follows ``pixels / 255`` in code, for PyTorch and for NumPy."""
    mean, std = scaling(architecture.pixels)
    if architecture.pixels is None:
        return dict.fromkeys(("torch", "numpy"), f"- {mean}) / {std}")
    return {
        "torch": f"- torch.tensor({mean})[:, None, None]) / torch.tensor({std})[:, None, None]",
        "numpy": f'- np.array({mean}, "float32")[:, None, None]) / np.array({std}, "float32")[:, None, None]',
    }


def _pooled(scores: SiteScores | None) -> Scores | None:
    """Return the scores on the images of all sites together; None where no site let any out."""
    pooled = scores.pooled if scores else None
    return pooled if pooled and pooled.n else None


def _others(name: str, results: Results) -> list[tuple[str, float | None, float | None]]:
    """Return what the model is compared with: what it is called, its balanced accuracy and macro AUC on the same test images."""
    found = []
    for other, label in MODEL_LABELS.items():
        if other != name and (pooled := _pooled(results.final.get(other))):
            found.append((label, pooled.balanced_accuracy, pooled.macro_auc))
    if accuracy := tables.alone_summary(results):
        auc = tables.alone_summary(results, "macro_auc")
        found.append((f"A site alone, mean of {accuracy.sites}", accuracy.mean, auc.mean if auc else None))
        found.append((f"The best site alone ({accuracy.best_site})", accuracy.best, auc.best if auc else None))
    return found


def _versions(folder: RunFolder, onnx: OnnxCheck | None) -> dict[str, str]:
    names = ["torch", "timm", "flwr", "safetensors"] + (["onnx", "onnxruntime", "onnxscript"] if onnx else [])
    return {
        "chainward (run)": folder.state.version,
        "chainward (export)": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("chainward_server.export", "."),
        autoescape=False,  # Markdown: `plain` escapes for both
        finalize=plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update({function.__name__: function for function in (*formats.FILTERS, code)})
    environment.filters["epsilon"] = epsilon_text
    return environment
