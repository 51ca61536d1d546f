"""ViTKD: mimic the earlier layers, generate the masked patches of the last one; a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from singer.errors import SingerError
from singer.methods.base import Distiller, Weight
from singer.models.backbones import Backbone, BlockTokens
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


class ViTKD(Distiller):
    """Mimic the teacher at the earlier layers; at the last, generate patches the student lost.

    ``loss`` = ``kd_weight`` · ``kd`` + ``generation_weight`` · ``generation``:

    - ``kd``: at each distilled layer but the last what FitNet takes, the mean squared error of the
      projected student over all tokens; summed over the layers. At the last layer it takes the
      prefix tokens alone, with the weight they have in FitNet (squared errors over B·T·D): the
      generator works on patches.
    - ``generation``: at the last layer ``round(mask_ratio · P)`` patches of each image, drawn
      anew at every call, are replaced by a learned mask token; a small convolutional generator
      completes them from the rest. The mean squared error over the masked patches' entries.

    ViTKD mimics the first two blocks and generates the last; here the distilled layers are those
    of the other methods. It sums squared errors and weighs them by 3e-5 and 3e-6; these are means,
    so that a weight says the same as SiNGER's and FitNet's ``kd_weight``.

    The masks come from torch's global generator of the tokens' device, whose state checkpoints
    hold.

    Args:
        teacher: the frozen model.
        student: the model to train.
        layers: see :class:`Distiller`; with one layer, nothing but prefix tokens is mimicked.
        kd_weight: weight of ``kd``.
        generation_weight: weight of ``generation``.
        mask_ratio: fraction of an image's patches that is masked, between 0 and 1.
        backend: which backend of ``singer_kernels`` computes the errors; None: the best.
        images: unused.
        seed: of the projections' and the generator's initialisation.

    Attributes:
        generator: the :class:`Generator` of the last layer, of the teacher's width.
        num_masked: masked patches of one image.

    Raises:
        SingerError: see :class:`Distiller` and :func:`count_masked`.

    Source: ViTKD (arXiv 2209.02432), section 3.
    """

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
        images: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(teacher, student, layers, images=images, seed=seed)
        self.weights = {"kd": kd_weight, "generation": generation_weight}
        self.num_masked = count_masked(mask_ratio, teacher.num_patches)
        self.backend = backend
        with cpu_seed(seed + 1):  # the projections have used the seed itself
            self.generator = Generator(teacher.dim, teacher.grid)

    @classmethod
    def check(cls, teacher: Backbone, options: Mapping[str, Any]) -> None:
        """See :meth:`Distiller.check`: some patches must be masked, and some left."""
        count_masked(options["mask_ratio"], teacher.num_patches)

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
        generation = self._generation(projected[:, prefix:], target[:, prefix:])
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
