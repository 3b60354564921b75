"""What privileged teachers add to the loss of a link or a student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chainward_client.privileged.results import PrivilegedTargets
from chainward_shared.distillation.privileged import embedding_loss, logit_loss
from chainward_shared.recipes import PrivilegedRecipe


class PrivilegedTerm(nn.Module):
    """``l_kd T^2 KL(softmax(g/T) || softmax(z/T)) + l_emb (1 - cos(W h, h_g))`` of each example (see `distillation.privileged`).

    Holds the teachers' logits g and embeddings h_g of the site's training cases, and the projector W: linear, without
    bias, trained beside the model, and never sent. W is None where the embeddings don't count.

    Parameters
    ----------
    targets : what the site's teachers say of the training's cases
    recipe : weights and temperature
    embedding_size : width of the model's embedding h, the classifier's input
    seed : of W's initial values
    """

    logits: Tensor
    taught: Tensor
    embeddings: Tensor
    present: Tensor

    def __init__(self, targets: PrivilegedTargets, recipe: PrivilegedRecipe, embedding_size: int, seed: int) -> None:
        super().__init__()
        self.recipe, self.multilabel, self.private = recipe, targets.multilabel, targets.private
        for name in ("logits", "taught", "embeddings", "present"):
            self.register_buffer(name, getattr(targets, name), persistent=False)
        self.projector: nn.Linear | None = None
        if recipe.embedding_weight > 0:
            self.projector = nn.Linear(embedding_size, targets.embeddings.shape[1], bias=False)
            generator = torch.Generator().manual_seed(seed)
            nn.init.normal_(self.projector.weight, std=embedding_size**-0.5, generator=generator)

    def losses(self, logits: Tensor, embedding: Tensor, rows: Tensor) -> Tensor:
        """Return the term of each example, float32 (n,); 0 for a case without privileged data.

        Parameters
        ----------
        logits : the model's, (n, classes)
        embedding : the model's, (n, embedding size); any floating dtype
        rows : int64 (n,), which of the training's cases these are
        """
        total = torch.zeros(len(rows), device=logits.device)
        if self.recipe.logit_weight > 0:
            apart = logit_loss(
                logits.float(),
                self.logits[rows],
                self.taught[rows],
                self.recipe.temperature,
                multilabel=self.multilabel,
            )
            total = total + self.recipe.logit_weight * apart
        if self.projector is not None:
            projected = self.projector(embedding).float()
            apart = embedding_loss(projected, self.embeddings[rows], self.present[rows])
            total = total + self.recipe.embedding_weight * apart
        return total
