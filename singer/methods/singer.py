"""SiNGER: distil from teacher features that a nullspace-guided adapter has refined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from singer.errors import SingerError
from singer.methods.base import Distiller, Weight, global_means
from singer.models.backbones import Backbone, BlockTokens
from singer.models.nullspace import (
    Linearization,
    NullspaceBasis,
    RandomVectors,
    Selection,
    check_rank,
    nullspace_basis,
)
from singer.seeding import cpu_seed
from singer_kernels import FusedLosses, gram_loss, kd_loss, refine

Variant = Literal["paper", "official"]


class SiNGER(Distiller):
    """Train the student on refined teacher features, and the adapters that refine them.

    Per layer: ``kd``, the student against the refined features; ``outlier``, the refined features'
    high norms; ``info``, what the refinement must keep. ``loss`` is their weighted sum.

    The variants, ``paper`` and ``official`` (the authors' code), differ in five points:

    - ``info`` of an intermediate layer compares what the next block makes of the refined and of
      the plain features: their Gram matrices (``paper``), or their MSE (``official``).
    - ``info`` of the last layer compares the Gram matrix of the refined features with that of the
      plain ones (``paper``), or of the refined ones of the layer before (``official``).
    - The terms are summed over the layers (``paper``), or averaged (``official``).
    - The adapter starts from the r smallest singular vectors (``paper``), or from the first r below
      the threshold (``official``).
    - Random vectors are orthonormal (``paper``; the paper does not say), or Gaussian, of length 1
      and not orthogonal (``official``).

    ``paper`` is the paper's formulas. No commit of the authors' repository computes its information
    term: their configurations behind the paper's tables name that of ``official``.

    Args:
        teacher: the frozen model.
        student: the model to train.
        layers: see :class:`Distiller`.
        variant: see above.
        rank: r, the adapters' rank.
        quantile: γ, the quantile of an image's patch norms above which a patch is an outlier.
        kd_weight: weight of ``kd``.
        outlier_weight: λ_outlier.
        info_weight: λ_info.
        linearization: how a block is linearised, see :func:`singer.models.nullspace.linearize`.
        selection: which singular vectors are taken; None: the variant's own.
        threshold: for ``official`` selection.
        random_vectors: see :func:`singer.models.nullspace.nullspace_basis`; None: the variant's
            own, or that of ``selection`` if it is set.
        detach_kd: ``kd`` trains the student and its projections alone: the adapters learn from
            ``outlier`` and ``info``. (By default they also move the refined features to where the
            student can follow.)
        backend: which backend of ``singer_kernels`` computes the losses; None: the best.
        images: calibration batch ``[B, 3, H, W]``, for ``jacobian``.
        seed: of everything random in the initialisation.
        kwargs: see :class:`Distiller`.

    Attributes:
        adapters: layer to :class:`singer_kernels.FusedLosses`, which holds ``down`` and ``up``.
        bases: layer to the nullspace basis the adapter started from, with its spectrum.

    Raises:
        SingerError: see :class:`Distiller` and :func:`singer.models.nullspace.nullspace_basis`.

    Source: SiNGER (arXiv 2509.20986), section 3; ``SiNGER.py`` of the authors' code.
    """

    def __init__(
        self,
        teacher: Backbone,
        student: Backbone,
        layers: Sequence[int] | None = None,
        *,
        variant: Variant = "paper",
        rank: Annotated[int, Field(ge=1)] = 64,
        quantile: Annotated[float, Field(ge=0, le=1)] = 0.97,
        kd_weight: Weight = 1.0,
        outlier_weight: Weight = 0.01,
        info_weight: Weight = 1.0,
        linearization: Linearization = "mlp",
        selection: Selection | None = None,
        threshold: Annotated[float, Field(gt=0)] = 0.05,
        random_vectors: RandomVectors | None = None,
        detach_kd: bool = False,
        backend: str | None = None,
        images: Tensor | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, student, layers, images=images, seed=seed, **kwargs)
        if variant not in get_args(Variant):
            raise SingerError(
                f"method.variant: got {variant!r}, expected {' or '.join(get_args(Variant))}"
            )
        self.variant = variant
        self.weights = {"kd": kd_weight, "outlier": outlier_weight, "info": info_weight}
        self.detach_kd = detach_kd
        self.backend = backend
        self.last_layer = self.layers[-1]
        following = [layer + 1 for layer in self.layers[:-1]]
        self.teacher_layers = sorted({*self.layers, *following})
        self.bases: dict[int, NullspaceBasis] = {}
        self.adapters = nn.ModuleDict()
        for layer in self.layers:
            is_last = layer == self.last_layer
            basis = nullspace_basis(
                teacher,
                layer if is_last else layer + 1,
                rank,
                linearization,
                selection or variant,
                threshold,
                images,
                seed * 4096 + layer,  # what is random must differ from layer to layer
                random_vectors,
            )
            with cpu_seed(seed):  # it draws a basis that is replaced at once
                adapter = FusedLosses(
                    teacher.dim,
                    rank,
                    gram=is_last,
                    quantile=quantile,
                    num_prefix_tokens=self.num_prefix_tokens,
                    return_refined=detach_kd or not is_last,
                    backend=backend,
                )
            adapter.set_basis(basis.vectors)
            self.bases[layer] = basis
            self.adapters[str(layer)] = adapter

    @classmethod
    def check(cls, teacher: Backbone, student: Backbone, options: Mapping[str, Any]) -> None:
        """See :meth:`Distiller.check`: the rank must fit into the teacher's width."""
        super().check(teacher, student, options)
        check_rank(options["rank"], teacher.dim)

    def losses(self, student: BlockTokens, teacher: BlockTokens) -> dict[str, Tensor]:
        """See :meth:`Distiller.losses`; the terms are ``kd``, ``outlier`` and ``info``.

        In training with several processes ``outlier`` is scaled so that its average over them is
        the mean over all outliers of the whole batch; the other terms' averages are exact as they
        are. Every process must call it then.
        """
        terms: dict[str, list[Tensor]] = {"kd": [], "outlier": [], "info": []}
        counts: list[Tensor] = []  # of the outliers that each mean is taken over
        refined_before: Tensor | None = None  # of the last intermediate layer
        for layer in self.layers:
            projected, plain = self.token_pair(layer, student, teacher)
            out = self.adapters[str(layer)](
                projected.detach() if self.detach_kd else projected,
                plain,
                refined_before if layer == self.last_layer and self.variant == "official" else None,
            )
            kd, info = out.kd, out.info
            if self.detach_kd:
                kd = kd_loss(projected, out.refined.detach(), backend=self.backend)
            if layer != self.last_layer:
                refined_before = out.refined
                info = self._next_block_loss(layer, out.refined, teacher)
            for name, value in (("kd", kd), ("outlier", out.outlier), ("info", info)):
                terms[name].append(value)
            counts.append((out.norms > out.threshold[:, None]).sum())
        if self.training:
            terms["outlier"] = global_means(terms["outlier"], counts)
        scale = 1.0 if self.variant == "paper" else 1.0 / len(self.layers)
        totals = {name: torch.stack(values).sum() * scale for name, values in terms.items()}
        loss = sum(self.weights[name] * value for name, value in totals.items())
        return {"loss": loss, **totals}

    def _next_block_loss(self, layer: int, refined: Tensor, teacher: BlockTokens) -> Tensor:
        """Compare the next block's output on the refined tokens with the teacher's own."""
        if self.num_prefix_tokens != self.teacher.num_prefix_tokens:
            prefix = teacher[layer][:, : self.teacher.num_prefix_tokens]
            refined = torch.cat([prefix, refined[:, self.num_prefix_tokens :]], dim=1)
        plain_next = teacher[layer + 1]
        refined_next = self.teacher.run_block(layer + 1, refined, teacher.calls[layer + 1])
        if self.variant == "official":
            return kd_loss(refined_next, plain_next, backend=self.backend)
        return gram_loss(
            refined_next, plain_next, self.teacher.num_prefix_tokens, backend=self.backend
        )

    def refined_teacher(self, layer: int, teacher: BlockTokens) -> Tensor:
        """See :meth:`Distiller.refined_teacher`; the prefix tokens are those that are shared."""
        adapter = self.adapters[str(layer)]
        tokens = self.aligned_teacher(layer, teacher)
        return refine(
            tokens, adapter.down, adapter.up, self.num_prefix_tokens, backend=self.backend
        )

    def reports(self) -> Mapping[str, Any]:
        """See :meth:`Distiller.reports`: the spectrum behind each adapter."""
        spectra = {
            str(layer): {
                "block": basis.block,
                "linearization": basis.linearization,
                "num_random": basis.num_random,
                "selected": basis.selected.tolist(),
                "singular_values": basis.singular_values.tolist(),
            }
            for layer, basis in self.bases.items()
        }
        return {"spectrum": spectra}

    def exports(self) -> Mapping[str, dict[str, Any]]:
        """See :meth:`Distiller.exports`: the adapters, too."""
        return {**super().exports(), "adapters": self.adapters.state_dict()}
