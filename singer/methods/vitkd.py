"""ViTKD: mimic shallow layers, generate the masked patches of the last one; a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from singer.errors import SingerError
from singer.methods.base import Distiller, ProjectionInit, Weight
from singer.models.backbones import Backbone, BlockTokens
from singer.models.layer_matching import resolve_layers
from singer.seeding import cpu_seed
from singer_kernels import kd_loss


def count_masked(mask_ratio: float, num_patches: int) -> int:
    """Return how many of an image's patches are masked: ``mask_ratio`` of them, rounded.

    Args:
        mask_ratio: fraction of the patches, between 0 and 1.
        num_patches: P.

    Raises:
        SingerError: no patch would be masked, or none left.
    """
    count = round(mask_ratio * num_patches)
    if not 0 < count < num_patches:
        raise SingerError(
            f"method.mask_ratio: got {mask_ratio}, which masks {count} of an image's {num_patches} "
            f"patches; expected to mask at least one and to leave one"
        )
    return count


class Generator(nn.Module):
    """Completes masked patches: a mask token in their place, then Conv3x3, ReLU, Conv3x3.

    Args:
        dim: D, the width of the tokens.
        grid: (rows, columns) of patches.

    Attributes:
        mask_token: ``[D]``, learned; it starts at zero.
        layers: the convolutions, D to D channels, padded to keep the grid.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.layers = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, kernel_size=3, padding=1),
        )

    def forward(self, patches: Tensor, masked: Tensor) -> Tensor:
        """Return the completed patches, ``[B, P, D]``.

        Args:
            patches: ``[B, P, D]``.
            masked: ``[B, P, 1]`` of the patches' dtype: 1 where a patch is masked, else 0.
        """
        # Products, not a choice: 0 times NaN is NaN, so that no mask hides one.
        visible = patches * (1 - masked) + self.mask_token.to(patches.dtype) * masked
        images = visible.unflatten(1, self.grid).permute(0, 3, 1, 2)  # [B, D, rows, columns]
        return self.layers(images).flatten(2).transpose(1, 2)


class _MaskedGeneration(Distiller):
    """The generation loss on the last distilled layer, which both forms of ViTKD share."""

    def __init__(
        self,
        teacher: Backbone,
        student: Backbone,
        layers: Sequence[int] | None = None,
        *,
        kd_weight: Weight = 1.0,
        generation_weight: Weight = 1.0,
        mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        backend: str | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, student, layers, seed=seed, **kwargs)
        self.weights = {"kd": kd_weight, "generation": generation_weight}
        self.num_masked = count_masked(mask_ratio, teacher.num_patches)
        self.backend = backend
        with cpu_seed(seed + 1):  # the projections have used the seed itself
            self.generator = Generator(teacher.dim, teacher.grid)

    @classmethod
    def check(cls, teacher: Backbone, student: Backbone, options: Mapping[str, Any]) -> None:
        """See :meth:`Distiller.check`: some patches must be masked, and some left."""
        super().check(teacher, student, options)
        count_masked(options["mask_ratio"], teacher.num_patches)

    def _weighted(self, kd: list[Tensor], generation: Tensor) -> dict[str, Tensor]:
        terms = {
            "kd": torch.stack(kd).sum() if kd else generation.new_zeros(()),
            "generation": generation,
        }
        return {"loss": sum(self.weights[name] * value for name, value in terms.items()), **terms}

    def _generation(self, patches: Tensor, expected: Tensor) -> Tensor:
        """Return the masked patches' mean squared error, given ``[B, P, D]`` twice."""
        images, count, _ = patches.shape
        noise = torch.rand(images, count, device=patches.device)
        ranks = noise.argsort(dim=1).argsort(dim=1)
        masked = (ranks < self.num_masked).unsqueeze(-1)  # [B, P, 1]
        generated = self.generator(patches, masked.to(patches.dtype))
        # The mean over all entries, those of visible patches being 0, made one over the masked.
        over_all = kd_loss(generated * masked, expected * masked, backend=self.backend)
        return over_all * (count / self.num_masked)

    def exports(self) -> Mapping[str, dict[str, Any]]:
        """See :meth:`Distiller.exports`: the generator, too."""
        return {**super().exports(), "generator": self.generator.state_dict()}


def _check_mimic_layers(
    mimic_layers: Sequence[int], layers: Sequence[int], teacher: Backbone, student: Backbone
) -> list[int]:
    """Return the mimicked blocks, ascending, given the generated one."""
    resolved = resolve_layers(
        mimic_layers, min(teacher.depth, student.depth), "method.mimic_layers"
    )
    if resolved[-1] >= layers[-1]:
        raise SingerError(
            f"method.mimic_layers: got {list(mimic_layers)}, expected blocks before the generated "
            f"block {layers[-1]}"
        )
    return resolved


def _generated_layer(layers: Sequence[int] | None) -> Sequence[int]:
    if layers is None:
        return [-1]
    if len(layers) != 1:
        raise SingerError(
            f"method.layers: got {list(layers)}, expected one block, whose masked patches are "
            f"generated: set method.layers=[-1] (method.mimic_layers are those that are mimicked)"
        )
    return layers


class ViTKD(_MaskedGeneration):
    """ViTKD as published: mimic the first two blocks, generate masked patches of the last one.

    ``loss`` = ``kd_weight`` · ``kd`` + ``generation_weight`` · ``generation``, patches only:

    - ``kd``: at each mimicked block, the mean over ``B·P·D`` of the squared error between the
      projected student patches and the teacher's; summed over the blocks.
    - ``generation``: both models' last tokens go through their own final norm.
      ``round(mask_ratio · P)`` patches of each image, drawn anew at every call, are replaced by a
      learned mask token; a small convolutional generator completes them from the rest. The mean
      squared error over the masked patches' entries.

    The original sums squared errors over an image, times 3e-5 (mimicry) and 3e-6 / ``mask_ratio``
    (generation). In means, over P·D entries of a block and over ``mask_ratio``·P·D masked ones,
    that is 3e-5 P D for each block and 3e-6 P D, in any size 10 : 1: the weights' defaults.
    The original also trains on labels and logits. Here there are none, and no loss reads the last
    block's CLS token: evaluate the patches.

    The masks come from torch's global generator of the tokens' device, whose state checkpoints
    hold.

    Args:
        teacher: the frozen model.
        student: the model to train.
        layers: the one block whose patches are generated (negative: from the end); None: the last.
        mimic_layers: the blocks that are mimicked, the same ones of both models.
        kd_weight: weight of ``kd``.
        generation_weight: weight of ``generation``.
        mask_ratio: fraction of an image's patches that is masked, between 0 and 1.
        backend: which backend of ``singer_kernels`` computes the errors; None: the best.
        projection_init: see :class:`Distiller`.
        seed: of the projections' and the generator's initialisation.
        kwargs: see :class:`Distiller`.

    Attributes:
        layers: the mimicked blocks, then the generated one.
        generator: the :class:`Generator`, of the teacher's width.
        num_masked: masked patches of one image.

    Raises:
        SingerError: see :class:`Distiller` and :func:`count_masked`; or a mimicked block is missing
            in a model, or is the generated one.

    Source: ViTKD (arXiv 2209.02432), section 3; ``vitkd.py`` of github.com/yzd-v/cls_KD.
    """

    uses_final_norm = True

    def __init__(
        self,
        teacher: Backbone,
        student: Backbone,
        layers: Sequence[int] | None = None,
        *,
        mimic_layers: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1),
        generation_weight: Weight = 0.1,
        projection_init: ProjectionInit = "random",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            student,
            _generated_layer(layers),
            generation_weight=generation_weight,
            projection_init=projection_init,
            seed=seed,
            **kwargs,
        )
        mimicked = _check_mimic_layers(mimic_layers, self.layers, teacher, student)
        self._add_projections(mimicked, projection_init, seed + 2)  # seed + 1: the generator's
        self.layers = [*mimicked, *self.layers]
        self.student_layers = [*mimicked, *self.student_layers]
        self.teacher_layers = list(self.layers)

    @classmethod
    def check(cls, teacher: Backbone, student: Backbone, options: Mapping[str, Any]) -> None:
        """See :meth:`Distiller.check`: both models must have the mimicked blocks."""
        layers = _generated_layer(options["layers"])
        super().check(teacher, student, {**options, "layers": layers})
        resolved = resolve_layers(layers, teacher.depth, "method.layers")
        _check_mimic_layers(options["mimic_layers"], resolved, teacher, student)

    def aligned_teacher(self, layer: int, teacher: BlockTokens) -> Tensor:
        """See :meth:`Distiller.aligned_teacher`; the generated layer's are normed."""
        if layer == self.layers[-1]:
            return self._align(self.teacher.final_norm(teacher[layer]), self.teacher)
        return super().aligned_teacher(layer, teacher)

    def projected_student(self, layer: int, student: BlockTokens) -> Tensor:
        """See :meth:`Distiller.projected_student`; the generated layer's are normed first."""
        if layer == self.layers[-1]:
            tokens = self.student_backbone.final_norm(student[self.student_layers[-1]])
            return self.projections[str(layer)](self._align(tokens, self.student_backbone))
        return super().projected_student(layer, student)

    def losses(self, student: BlockTokens, teacher: BlockTokens) -> dict[str, Tensor]:
        """See :meth:`Distiller.losses`; the terms are ``kd`` and ``generation``."""
        pairs = [self.token_pair(layer, student, teacher) for layer in self.layers]
        patches = [[tokens[:, self.num_prefix_tokens :] for tokens in pair] for pair in pairs]
        kd = [kd_loss(*pair, backend=self.backend) for pair in patches[:-1]]
        return self._weighted(kd, self._generation(*patches[-1]))


class ViTKDSameLayers(_MaskedGeneration):
    """ViTKD's two losses at the layers of the other methods, with equal weights.

    Not the published method, which never mimics deep blocks (:class:`ViTKD`), but its two losses
    under the conditions of FitNet and SiNGER: the same layers, CLS included, raw block outputs.

    ``loss`` = ``kd_weight`` · ``kd`` + ``generation_weight`` · ``generation``:

    - ``kd``: at each distilled layer but the last what FitNet takes, the mean squared error of the
      projected student over all tokens; summed over the layers. At the last layer it takes the
      prefix tokens alone, with the weight they have in FitNet (squared errors over B·T·D): the
      generator works on patches.
    - ``generation``: as in :class:`ViTKD`, at the last layer, without its norm.

    Args:
        teacher: the frozen model.
        student: the model to train.
        layers: see :class:`Distiller`; with one layer, nothing but prefix tokens is mimicked.
        kd_weight: weight of ``kd``.
        generation_weight: weight of ``generation``.
        mask_ratio: fraction of an image's patches that is masked, between 0 and 1.
        backend: which backend of ``singer_kernels`` computes the errors; None: the best.
        seed: of the projections' and the generator's initialisation.
        kwargs: see :class:`Distiller`.

    Attributes:
        generator: the :class:`Generator` of the last layer, of the teacher's width.
        num_masked: masked patches of one image.

    Raises:
        SingerError: see :class:`Distiller` and :func:`count_masked`.
    """

    def losses(self, student: BlockTokens, teacher: BlockTokens) -> dict[str, Tensor]:
        """See :meth:`Distiller.losses`; the terms are ``kd`` and ``generation``."""
        *earlier, last = self.layers
        kd = [
            kd_loss(*self.token_pair(layer, student, teacher), backend=self.backend)
            for layer in earlier
        ]
        projected, target = self.token_pair(last, student, teacher)
        prefix = self.num_prefix_tokens
        if prefix:
            prefix_fraction = prefix / projected.shape[1]
            prefix_loss = kd_loss(projected[:, :prefix], target[:, :prefix], backend=self.backend)
            kd.append(prefix_fraction * prefix_loss)
        return self._weighted(kd, self._generation(projected[:, prefix:], target[:, prefix:]))
