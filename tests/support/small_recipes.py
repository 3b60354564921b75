"""Recipes of trainings that take a moment; a test says in what its own differs."""

from __future__ import annotations

from chainward_shared.recipes import LinkRecipe, TrainingRecipe

SMALL_LINK = LinkRecipe(
    seed=3,
    epochs=2,
    batch_size=8,
    learning_rate=1e-3,
    weight_decay=0.05,
    augmentation="none",
    precision="fp32",
    threads=1,
    class_balance="none",
    label_fraction=1.0,
    start="warm",
    distillation_weight=0.4,
    temperature=4.0,
    temperature_decay=0.5,
    teacher_trust="label",
)
SMALL_TRAINING = TrainingRecipe(**SMALL_LINK.model_dump(include=set(TrainingRecipe.model_fields)))
