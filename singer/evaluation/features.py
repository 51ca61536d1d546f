"""Features of trained models, and statistics of their patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from singer.methods import Distiller
from singer.models.backbones import Backbone


@dataclass(frozen=True)
class Patches:
    """The last distilled layer's patches of some images.

    Attributes:
        teacher: ``[B, P, D]``.
        refined: the refined teacher's, ``[B, P, D]``; None if the method refines nothing.
        student: the student's own, ``[B, P, d]``.
        projected: the student's after its projection, ``[B, P, D]``.
    """

    teacher: Tensor
    refined: Tensor | None
    student: Tensor
    projected: Tensor

    def named(self, *, in_teacher_space: bool = False) -> dict[str, Tensor]:
        """Return the patches by model, each of its own width or all of the teacher's."""
        named = {"teacher": self.teacher}
        if self.refined is not None:
            named["refined teacher"] = self.refined
        if in_teacher_space:
            return {**named, "student, projected": self.projected}
        return {**named, "student": self.student}


_BATCH = 16


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block, without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def extract_patches(method: Distiller, images: Tensor) -> Patches:
    """Run teacher and student on images, in evaluation mode.

    Args:
        method: a trained method.
        images: ``[B, 3, H, W]``, uint8 or in [0, 1].

    Returns:
        The patches, float32, on the CPU.
    """
    layer, shared = method.layers[-1], method.num_prefix_tokens
    own_prefix = method.student_backbone.num_prefix_tokens
    device = next(method.parameters()).device
    batches: list[list[Tensor | None]] = []
    with _evaluating(method):
        for batch in images.split(_BATCH):
            teacher = method.teacher_tokens(batch.to(device))
            student = method.student_tokens(batch.to(device))
            refined = method.refined_teacher(layer, teacher)
            patches = [
                method.aligned_teacher(layer, teacher)[:, shared:],
                None if refined is None else refined[:, shared:],
                student[method.student_layers[-1]][:, own_prefix:],
                method.projected_student(layer, student)[:, shared:],
            ]
            batches.append([None if p is None else p.float().cpu() for p in patches])
    fields = zip(*batches, strict=True)
    return Patches(*(None if field[0] is None else torch.cat(field) for field in fields))


def patch_cosine(a: Tensor, b: Tensor) -> float:
    """Return the mean cosine similarity of corresponding patches, ``[B, P, D]`` each."""
    return nn.functional.cosine_similarity(a, b, dim=-1).mean().item()


def outlier_ratios(patches: Tensor) -> dict[str, float]:
    """Return the ratios of the highest patch norms to the median.

    Args:
        patches: ``[B, P, D]``.

    Returns:
        ``max_over_median`` and ``p99_over_p50`` of an image's patch norms, averaged over images.
    """
    norms = torch.linalg.vector_norm(patches.double(), dim=-1)  # [B, P]
    median = norms.quantile(0.5, dim=1)
    high = {"max_over_median": norms.amax(dim=1), "p99_over_p50": norms.quantile(0.99, dim=1)}
    return {name: (norm / median).mean().item() for name, norm in high.items()}


def pooled_features(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the mean of the patches after the model's final norm.

    Args:
        backbone: the model.
        images: ``[N, 3, H, W]``, uint8 or in [0, 1].

    Returns:
        ``[N, D]``, float32, on the CPU.
    """
    model = backbone.model
    device = next(model.parameters()).device
    pooled = []
    with _evaluating(model):
        for batch in images.split(_BATCH):
            tokens = model.forward_features(backbone.normalize(batch.to(device)))
            patches = tokens[:, backbone.num_prefix_tokens :]
            pooled.append(patches.mean(dim=1).float().cpu())
    return torch.cat(pooled)
