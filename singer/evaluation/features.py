"""How good a student is, measured without training anything more."""

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

    def own(self) -> dict[str, Tensor]:
        """Return each model's own patches, by name."""
        return self._named("student", self.student)

    def in_teacher_space(self) -> dict[str, Tensor]:
        """Return patches of the teacher's width, by name: the student's are the projected."""
        return self._named("student, projected", self.projected)

    def _named(self, name: str, student: Tensor) -> dict[str, Tensor]:
        refined = {} if self.refined is None else {"refined teacher": self.refined}
        return {"teacher": self.teacher, **refined, name: student}


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


def _patch_parts(method: Distiller, images: Tensor) -> Iterator[tuple[Tensor | None, ...]]:
    layer = method.layers[-1]
    device = next(method.parameters()).device
    for batch in images.split(_BATCH):
        teacher = method.teacher_tokens(batch.to(device))
        student = method.student_tokens(batch.to(device))
        shared = method.num_prefix_tokens
        refined = method.refined_teacher(layer, teacher)
        own = student[method.student_layers[-1]][:, method.student_backbone.num_prefix_tokens :]
        yield (
            method.aligned_teacher(layer, teacher)[:, shared:].float().cpu(),
            None if refined is None else refined[:, shared:].float().cpu(),
            own.float().cpu(),
            method.projected_student(layer, student)[:, shared:].float().cpu(),
        )


def extract_patches(method: Distiller, images: Tensor) -> Patches:
    """Run teacher and student on images, in evaluation mode.

    Args:
        method: a trained method.
        images: ``[B, 3, H, W]``, uint8 or in [0, 1].

    Returns:
        The patches, float32, on the CPU.
    """
    with _evaluating(method):
        parts = list(_patch_parts(method, images))
    joined = [
        None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
    ]
    return Patches(*joined)


def patch_cosine(a: Tensor, b: Tensor) -> float:
    """Return the mean cosine similarity of corresponding patches.

    Args:
        a: ``[B, P, D]``.
        b: ``[B, P, D]``.
    """
    return nn.functional.cosine_similarity(a, b, dim=-1).mean().item()


def outlier_ratios(patches: Tensor) -> tuple[float, float]:
    """Return how far the highest patch norms lie above the usual ones.

    Args:
        patches: ``[B, P, D]``.

    Returns:
        max / median and p99 / p50 of an image's patch norms, each averaged over the images.
    """
    norms = torch.linalg.vector_norm(patches.double(), dim=-1)  # [B, P]
    median = norms.quantile(0.5, dim=1)
    highest = norms.amax(dim=1) / median
    high = norms.quantile(0.99, dim=1) / median
    return highest.mean().item(), high.mean().item()


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
    with _evaluating(model):
        pooled = [
            model.forward_features(backbone.normalize(batch.to(device)))[
                :, backbone.num_prefix_tokens :
            ]
            .mean(dim=1)
            .float()
            .cpu()
            for batch in images.split(_BATCH)
        ]
    return torch.cat(pooled)


def digits(
    image_size: tuple[int, int], train: int, test: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's handwritten digits as images.

    Args:
        image_size: (height, width); the 8x8 digits are enlarged bilinearly.
        train: how many of the first digits to label by.
        test: how many of those after them to classify.

    Returns:
        train images ``[train, 3, H, W]`` in [0, 1], their labels, test images, their labels.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images[: train + test]).float()[:, None] / 16
    images = nn.functional.interpolate(images, image_size, mode="bilinear").clamp(0, 1)
    images = images.expand(-1, 3, -1, -1)
    labels = torch.from_numpy(data.target[: train + test])
    return images[:train], labels[:train], images[train:], labels[train:]


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    neighbors: int = 10,
) -> float:
    """Return the accuracy of a cosine k-nearest-neighbours classifier.

    Args:
        train_features: ``[N, D]``.
        train_labels: ``[N]``.
        test_features: ``[M, D]``.
        test_labels: ``[M]``.
        neighbors: k.
    """
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(neighbors, metric="cosine")
    classifier.fit(train_features.numpy(), train_labels.numpy())
    return float(classifier.score(test_features.numpy(), test_labels.numpy()))
