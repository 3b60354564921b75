"""Measure how hard the phantoms are, and how much room there is between one hospital alone and all of them.

Prints balanced accuracies on the test images of six hospitals, pooled. About ten minutes on two cores:

    python -m chainward_simulations.phantoms.difficulty --help
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chainward_client.data.site_data import Cases, SiteData, SplitName
from chainward_shared.seeds import torch_generator
from chainward_simulations.phantoms.cases import PHANTOM_CLASSES, TABLE_COLUMNS, phantom_site

BATCH_SIZE = 32


def pixels_and_labels(sites: Sequence[SiteData], split: SplitName) -> tuple[np.ndarray, np.ndarray]:
    """Return the pooled pixels, float32 (n, channels * H * W) in 0 to 1, and labels (n,) of one split."""
    pixels = np.concatenate([site.splits[split].images.flatten(1).numpy() for site in sites])
    labels = np.concatenate([site.splits[split].labels.numpy() for site in sites])
    return pixels.astype(np.float32) / 255, labels


def linear_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the balanced test accuracy of a logistic regression on standardised features."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, class_weight="balanced"))
    model.fit(*train)
    return float(balanced_accuracy_score(test[1], model.predict(test[0])))


def table_features(sites: Sequence[SiteData], split: SplitName) -> tuple[np.ndarray, np.ndarray]:
    """Return the pooled table, float64 (n, features), and labels (n,).

    Numbers are scaled by their declared range, categories one-hot; each column has a flag for missing cells.
    """
    blocks = []
    for site in sites:
        table = site.splits[split].privileged.table or {}
        columns = []
        for name, declared in TABLE_COLUMNS.items():
            cells = table[name]
            columns.append([float(cell is None) for cell in cells])
            if declared["kind"] == "number":
                # the laboratory values span decades
                low, high = math.log1p(declared["min"]), math.log1p(declared["max"])
                columns.append(
                    [0.5 if cell is None else (math.log1p(float(cell)) - low) / (high - low) for cell in cells]
                )
            else:
                columns.extend([float(cell == value) for cell in cells] for value in declared["values"])
        blocks.append(np.array(columns).T)
    return np.concatenate(blocks), pixels_and_labels(sites, split)[1]


def text_accuracy(sites: Sequence[SiteData]) -> float:
    """Return the balanced test accuracy of a logistic regression on hashed words and bigrams."""
    vectorizer = HashingVectorizer(n_features=4096, ngram_range=(1, 2))
    texts: dict[SplitName, list[str]] = {
        split: [text or "" for site in sites for text in site.splits[split].privileged.texts or ()]
        for split in ("train", "test")
    }
    model = LogisticRegression(max_iter=200, C=10.0, class_weight="balanced")
    model.fit(vectorizer.transform(texts["train"]), pixels_and_labels(sites, "train")[1])
    predicted = model.predict(vectorizer.transform(texts["test"]))
    return float(balanced_accuracy_score(pixels_and_labels(sites, "test")[1], predicted))


def train_convnet(cases: Sequence[Cases], steps: int, seed: int) -> torch.nn.Module:
    """Train a convnext_atto on the pooled `cases`, balanced softmax loss (Ren et al. 2020)."""
    torch.manual_seed(seed)
    generator = torch_generator(seed, "phantom-difficulty")
    images = torch.cat([part.images for part in cases])
    labels = torch.cat([part.labels for part in cases])
    counts = torch.bincount(labels, minlength=len(PHANTOM_CLASSES)) + 1.0
    log_prior = (counts / counts.sum()).log()

    model = timm.create_model("convnext_atto", num_classes=len(PHANTOM_CLASSES), in_chans=images.shape[1])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-3, total_steps=steps)
    model.train()
    while schedule.last_epoch < steps:
        order = torch.randperm(len(images), generator=generator)
        for batch in _batches(order)[: steps - schedule.last_epoch]:
            augmented = _augment(_normalise(images[batch]), generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(augmented)
            loss = F.cross_entropy(logits.float() + log_prior, labels[batch])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def convnet_accuracy(model: torch.nn.Module, cases: Sequence[Cases]) -> float:
    """Return the balanced accuracy on the pooled `cases`."""
    predicted = [model(_normalise(images)).argmax(1) for part in cases for images in _batches(part.images)]
    labels = torch.cat([part.labels for part in cases])
    return float(balanced_accuracy_score(labels.numpy(), torch.cat(predicted).numpy()))


def _batches(rows: torch.Tensor) -> list[torch.Tensor]:
    return [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]


def _normalise(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - 0.5) / 0.25


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 6 %, turn by up to 8 degrees, and vary contrast and brightness by up to 15 %."""
    count = len(images)
    angle = torch.deg2rad(16 * torch.rand(count, generator=generator) - 8)
    shift = 0.12 * torch.rand(count, 2, generator=generator) - 0.06
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], dim=1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    jitter = 0.3 * torch.rand(count, 2, 1, 1, 1, generator=generator) - 0.15
    return moved * (1 + jitter[:, 0]) + jitter[:, 1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per measurement."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    # with more pixels than images the linear model fits its training images long before it converges
    warnings.filterwarnings("ignore", category=ConvergenceWarning)

    sites = [phantom_site(options.seed, index) for index in range(options.sites)]
    train, test = ([site.splits[split] for site in sites] for split in ("train", "test"))
    print(f"{sum(map(len, train))} train and {sum(map(len, test))} test images; chance is 0.200")
    print("balanced accuracy on the test images of all sites")
    pixels = linear_accuracy(pixels_and_labels(sites, "train"), pixels_and_labels(sites, "test"))
    _show("linear on pixels, all sites", pixels)
    table = linear_accuracy(table_features(sites, "train"), table_features(sites, "test"))
    _show("linear on table, all sites", table)
    _show("linear on reports, all sites", text_accuracy(sites))
    if not options.no_convnets:
        _show_convnets(sites, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Balanced test accuracy of simple models on the phantoms.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the phantoms and of training")
    parser.add_argument("--sites", type=int, default=6, help="number of hospitals")
    parser.add_argument(
        "--epochs",
        type=int,
        default=15,
        help="epochs over the images of all sites; sets the optimiser steps of every convnet",
    )
    parser.add_argument(
        "--same-epochs",
        action="store_true",
        help="train at one site for as many epochs, not for as many steps, as at all sites",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--no-convnets", action="store_true", help="only the linear models (seconds)")
    return parser


def _show_convnets(sites: Sequence[SiteData], options: argparse.Namespace) -> None:
    train, test = ([site.splits[split] for site in sites] for split in ("train", "test"))
    # alone and together get equally many steps by default: the data should differ, not the training
    steps = options.epochs * math.ceil(sum(map(len, train)) / BATCH_SIZE)
    alone = []
    for site in sites:
        cases = site.splits["train"]
        own_steps = options.epochs * math.ceil(len(cases) / BATCH_SIZE) if options.same_epochs else steps
        model = train_convnet([cases], own_steps, options.seed)
        alone.append(convnet_accuracy(model, test))
        _show(f"convnext_atto, {site.site} alone ({len(cases)} images)", alone[-1])
    _show("convnext_atto, one site alone, mean", float(np.mean(alone)))
    _show("convnext_atto, one site alone, best", max(alone))
    _show("convnext_atto, all sites", convnet_accuracy(train_convnet(train, steps, options.seed), test))


def _show(name: str, value: float) -> None:
    print(f"{name:<44}{value:.3f}", flush=True)


if __name__ == "__main__":
    main()
