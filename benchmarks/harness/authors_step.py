"""The authors' training step of SiNGER, reimplemented in eager torch: the baseline of ``steps.py``.

It computes their ``official`` variant with the same work as their code:

- every block of the teacher runs, and all block outputs are kept;
- the teacher is not frozen: the weights of the block after an intermediate layer get gradients,
  which no optimiser uses and nothing clears;
- that block runs again on the plain teacher tokens, although its output is known already;
- outliers are selected by boolean indexing, which synchronises the host;
- autograd saves both Gram matrices and all other intermediate results of the losses;
- the host reads every loss at every step.

Left out, in the authors' favour: gathering all-zero logits and computing accuracy on them, DDP with
unused parameters, and printing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.eager import gram_loss, outlier_loss, refine
from singer.methods import SiNGER
from singer.models.backbones import BlockTokens

Match = Callable[[Tensor, Tensor], Tensor]


class AuthorsStep(nn.Module):
    """Modules and losses of the authors' step: student, teacher, projections and adapters.

    Args:
        method: source of weights, layers and variant; it is copied. The variant ``paper``, which
            the authors' code does not have, is computed in the same way.

    Raises:
        ValueError: there is only one layer, or CLS is not the only prefix token; the authors' code
            supports neither.

    Source: ``SiNGER.forward_train`` and ``BaseTrainer.train_iter`` of the authors' code.
    """

    def __init__(self, method: SiNGER) -> None:
        super().__init__()
        if len(method.layers) < 2:
            raise ValueError(f"method.layers: got {method.layers}, expected two or more")
        if {method.num_prefix_tokens, method.teacher.num_prefix_tokens} != {1}:
            raise ValueError("method: the models have other prefix tokens than CLS")
        own = copy.deepcopy(method)
        self.layers, self.student_layers = own.layers, own.student_layers
        self.variant, self.weights = own.variant, own.weights
        self.teacher_backbone, self.student_backbone = own.teacher, own.student_backbone
        self.teacher = own.teacher.model.requires_grad_(True)
        self.student = own.student.requires_grad_(True)
        self.projections, self.adapters = own.projections, own.adapters

    def learnable(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the optimiser: all but the teacher's."""
        for module in (self.student, self.projections, self.adapters):
            yield from module.parameters()

    @torch.no_grad()
    def teacher_tokens(self, images: Tensor) -> BlockTokens:
        """Return the tokens after every block of the teacher.

        Args:
            images: ``[B, 3, H, W]``, uint8 in 0 to 255 or floating in [0, 1].
        """
        return self.teacher_backbone.tokens(images, range(self.teacher_backbone.depth))

    def student_tokens(self, images: Tensor) -> BlockTokens:
        """Return the tokens after every block of the student.

        Args:
            images: ``[B, 3, H, W]``, uint8 in 0 to 255 or floating in [0, 1].
        """
        return self.student_backbone.tokens(images, range(self.student_backbone.depth))

    def losses(self, student: BlockTokens, teacher: BlockTokens) -> dict[str, Tensor]:
        """Return ``loss`` and its terms ``kd``, ``outlier`` and ``info``, scalars.

        Args:
            student: tokens after every block.
            teacher: likewise, without gradient.
        """
        kd = outlier = info = 0.0
        match: Match = F.mse_loss if self.variant == "official" else gram_loss
        before: Tensor | None = None  # F̂ of the last intermediate layer
        for layer, student_layer in zip(self.layers, self.student_layers, strict=True):
            adapter = self.adapters[str(layer)]
            plain = teacher[layer]
            refined = refine(plain, adapter.down, adapter.up)
            kd = kd + F.mse_loss(self.projections[str(layer)](student[student_layer]), refined)
            outlier = outlier + outlier_loss(refined, adapter.quantile)
            if layer == self.layers[-1]:
                info = info + gram_loss(refined, before if self.variant == "official" else plain)
            else:
                following = self.teacher_backbone.block(layer + 1)
                with torch.no_grad():
                    plain_next = following(plain)
                info = info + match(following(refined), plain_next)
                before = refined
        scale = 1 / len(self.layers) if self.variant == "official" else 1.0
        terms = {"kd": scale * kd, "outlier": scale * outlier, "info": scale * info}
        return {"loss": sum(self.weights[name] * term for name, term in terms.items()), **terms}
