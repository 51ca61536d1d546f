"""Base class of the distillation methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from singer.errors import SingerError
from singer.models.backbones import Backbone, BlockTokens
from singer.models.layer_matching import match_layers, resolve_layers
from singer.seeding import cpu_seed

Weight = Annotated[float, Field(ge=0)]
"""The weight of a term of the loss."""

ProjectionInit = Literal["random", "identity"]
"""How the projections start: as ``nn.Linear`` draws them, or at the identity."""


def match_models(
    teacher: Backbone, student: Backbone, layers: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Check that a student can learn from a teacher, and match their blocks.

    Args:
        teacher: the frozen model; its structure is enough.
        student: the model to train; its structure is enough.
        layers: see :class:`Distiller`.

    Returns:
        The distilled teacher blocks, ascending, and the student block that each of them trains.

    Raises:
        SingerError: the patch grids differ, a layer is out of range, or there are too many.
    """
    if teacher.grid != student.grid:
        raise SingerError(
            f"student: it cuts an image into {student.grid[0]}x{student.grid[1]} patches, the "
            f"teacher into {teacher.grid[0]}x{teacher.grid[1]}; set student.options.patch_size "
            f"to the teacher's"
        )
    resolved = resolve_layers(layers, teacher.depth, "method.layers")
    return resolved, match_layers(resolved, teacher.depth, student.depth)


def _check_projection_init(init: ProjectionInit, teacher: Backbone, student: Backbone) -> None:
    if init == "identity" and student.dim != teacher.dim:
        raise SingerError(
            f"method.projection_init: got 'identity' for tokens of width {student.dim} (student) "
            f"and {teacher.dim} (teacher), expected equal widths, or 'random'"
        )


def global_means(means: Sequence[Tensor], counts: Sequence[Tensor]) -> list[Tensor]:
    """Weight each rank's means so that their average over the ranks is the mean over all entries.

    With c entries on this rank, C on all and W ranks, a mean m becomes m · c · W / C. Averaged over
    the ranks, as DDP averages gradients, that is the sum over all entries divided by C.

    Args:
        means: scalars, differentiable.
        counts: number of entries behind each, scalars; the mean of no entries must be 0.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return list(means)
    own = torch.stack(list(counts)).to(means[0].dtype)
    total = own.clone()
    dist.all_reduce(total)
    weights = own * dist.get_world_size() / total.clamp_min(1)
    return [mean * weight for mean, weight in zip(means, weights, strict=True)]


class Distiller(nn.Module):
    """A distillation method: it holds what trains, and computes the losses.

    Its parameters are the student, one linear projection per distilled layer, and those of the
    subclass. The teacher is frozen and no submodule: it is in no state dict, optimizer or gradient
    all-reduce, but moves between devices with the module.

    A subclass defines :meth:`losses`, may define :meth:`check`, and adds to :attr:`teacher_layers`
    the blocks it needs beside the distilled layers. One whose loss reads the student's tokens after
    its final norm sets ``uses_final_norm = True``; otherwise that norm is frozen.

    Args:
        teacher: the frozen model.
        student: the model to train.
        layers: the teacher's blocks to distil (negative ones count from the end); None: three
            quarters of its depth, and the last.
        projection_init: ``random``: the projections start as ``nn.Linear`` draws them;
            ``identity``: at the identity, where student and teacher are equally wide.
        images: a calibration batch ``[B, 3, H, W]``, for methods that measure the teacher.
        seed: of everything random in the method's own initialisation.

    Attributes:
        student: the student's model, as timm made it.
        projections: layer to ``Linear(student width, teacher width)``.
        layers: the distilled teacher blocks, ascending.
        student_layers: the student block that each of them trains.
        teacher_layers: the teacher blocks whose tokens :meth:`losses` reads.
        num_prefix_tokens: how many prefix tokens both models share.

    Raises:
        SingerError: the patch grids differ, a layer is out of range, or the widths differ with
            ``identity``.
    """

    uses_final_norm = False

    def __init__(
        self,
        teacher: Backbone,
        student: Backbone,
        layers: Sequence[int] | None = None,
        *,
        projection_init: ProjectionInit = "random",
        images: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layers, self.student_layers = match_models(teacher, student, layers)
        _check_projection_init(projection_init, teacher, student)
        self.teacher = teacher.freeze()
        self.student_backbone = student
        self.teacher_layers = list(self.layers)
        self.num_prefix_tokens = _shared_prefix(teacher, student)
        self.student = student.model
        _freeze_unused(student, self.student_layers[-1], self.uses_final_norm)
        self.projections = nn.ModuleDict()
        self._add_projections(self.layers, projection_init, seed)

    def _add_projections(self, layers: Sequence[int], init: ProjectionInit, seed: int) -> None:
        with cpu_seed(seed):
            for layer in layers:
                projection = nn.Linear(self.student_backbone.dim, self.teacher.dim)
                if init == "identity":
                    nn.init.eye_(projection.weight)
                    nn.init.zeros_(projection.bias)
                self.projections[str(layer)] = projection

    @classmethod
    def check(cls, teacher: Backbone, student: Backbone, options: Mapping[str, Any]) -> None:
        """Check the method's options against the models, before any weight is loaded.

        Args:
            teacher: its structure alone; it holds no values.
            student: likewise.
            options: the constructor's, by name.

        Raises:
            SingerError: one does not fit, or the models don't.
        """
        match_models(teacher, student, options["layers"])
        _check_projection_init(options.get("projection_init", "random"), teacher, student)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        # .to(device) moves the teacher too, although it is no submodule.
        self.teacher.model._apply(fn)
        return super()._apply(fn, recurse)

    def no_weight_decay(self) -> set[str]:
        """Return the student's parameters without weight decay (timm calls it)."""
        own = {name for name, _ in self.student.named_parameters()}
        names: set[str] = getattr(self.student, "no_weight_decay", set)()
        return {f"student.{name}" for name in names & own}

    @torch.no_grad()
    def teacher_tokens(self, images: Tensor) -> BlockTokens:
        """Run the teacher on images as for :meth:`forward`, up to the last block needed."""
        return self.teacher.tokens(images, self.teacher_layers)

    def student_tokens(self, images: Tensor) -> BlockTokens:
        """Run the student on images as for :meth:`forward`, up to its last distilled block."""
        return self.student_backbone.tokens(images, self.student_layers)

    def aligned_teacher(self, layer: int, teacher: BlockTokens) -> Tensor:
        """Return a teacher block's tokens with the shared prefix tokens only, ``[B, T, D]``."""
        return self._align(teacher[layer], self.teacher)

    def projected_student(self, layer: int, student: BlockTokens) -> Tensor:
        """Return the student's tokens for a teacher layer, in its width, ``[B, T, D]``."""
        tokens = student[self.student_layers[self.layers.index(layer)]]
        return self.projections[str(layer)](self._align(tokens, self.student_backbone))

    def token_pair(
        self, layer: int, student: BlockTokens, teacher: BlockTokens
    ) -> tuple[Tensor, Tensor]:
        """Return a layer's projected student tokens and its teacher tokens, ``[B, T, D]`` each."""
        return self.projected_student(layer, student), self.aligned_teacher(layer, teacher)

    def _align(self, tokens: Tensor, backbone: Backbone) -> Tensor:
        own, shared = backbone.num_prefix_tokens, self.num_prefix_tokens
        if own == shared:
            return tokens
        patches = tokens[:, own:]
        return torch.cat([tokens[:, :shared], patches], dim=1) if shared else patches

    def forward(self, images: Tensor, teacher: BlockTokens | None = None) -> dict[str, Tensor]:
        """Return the named losses of a batch.

        Args:
            images: ``[B, 3, H, W]``, uint8 in 0 to 255 or floating in [0, 1], not normalised: each
                model applies its own mean and standard deviation.
            teacher: the teacher's tokens of these images; None: computed here.

        Returns:
            ``loss``, the scalar to minimise, and the method's terms, scalars too.
        """
        if teacher is None:
            teacher = self.teacher_tokens(images)
        return self.losses(self.student_tokens(images), teacher)

    def losses(self, student: BlockTokens, teacher: BlockTokens) -> dict[str, Tensor]:
        """Return the named losses of a batch, given both models' tokens.

        Args:
            student: tokens of the blocks :attr:`student_layers`.
            teacher: tokens of the blocks :attr:`teacher_layers`.

        Returns:
            See :meth:`forward`.
        """
        raise NotImplementedError

    def refined_teacher(self, layer: int, teacher: BlockTokens) -> Tensor | None:
        """Return a distilled layer's refined tokens, ``[B, T, D]``; None: nothing is refined."""
        return None

    def reports(self) -> Mapping[str, Any]:
        """Return what is written before training: JSON file name (no ending) to its value."""
        return {}

    def exports(self) -> Mapping[str, dict[str, Any]]:
        """Return what is saved beside the student: file name (no ending) to named tensors."""
        return {"projections": self.projections.state_dict()}


def _shared_prefix(teacher: Backbone, student: Backbone) -> int:
    """Return how many leading tokens mean the same in both models."""
    if teacher.prefix_layout == student.prefix_layout:
        return teacher.num_prefix_tokens
    return int(teacher.has_class_token and student.has_class_token)


def _freeze_unused(student: Backbone, last_layer: int, uses_final_norm: bool) -> None:
    """Freeze parameters that do not affect the distilled tokens (pooling, final norm)."""
    model = student.model
    was_training = model.training
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    image = torch.zeros(1, 3, *student.image_size, device=parameters[0].device)
    tokens = student.tokens(image, [last_layer])[last_layer]
    if uses_final_norm:
        tokens = student.final_norm(tokens)
    gradients = torch.autograd.grad(tokens.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    model.train(was_training)
