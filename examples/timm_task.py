"""SiNGER as a training task of timm's: labels and the refined teacher train the student together.

It runs offline, in seconds, on noise and random weights; ``--pretrained`` takes timm's for the
teacher::

    python examples/timm_task.py
    python examples/timm_task.py --teacher vit_base_patch16_224 --pretrained --image-size 224

``SiNGERTask`` takes the place of timm's ``FeatureDistillationTask`` (of timm 1.0.31) in a training
script: ``prepare_distributed`` wraps one trainable module, without the frozen teacher; a
checkpoint's ``state_dict`` is the student's alone. The last block is distilled.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import FeatureDistillationTask
from timm.task.distillation import FeatureDistillationTrainableModule
from torch import Tensor, nn

from singer.models.backbones import Backbone
from singer.models.nullspace import nullspace_basis
from singer_kernels import FusedLosses, FusedLossesOutput


def last_block(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the model's features, after its final norm, and its last block's raw tokens."""
    features, (tokens,) = model.forward_intermediates(
        images, indices=1, norm=False, output_fmt="NLC", return_prefix_tokens=True
    )
    return features, torch.cat([tokens[1], tokens[0]], 1) if model.num_prefix_tokens else tokens


class SiNGERHead(nn.Module):
    """The student's projection and the adapter, in the place of timm's projection."""

    def __init__(self, student: nn.Module, teacher: nn.Module, rank: int) -> None:
        super().__init__()
        # Shared prefix tokens: all of them if both models have the same, else CLS if both have it.
        self.prefixes = own, other = student.num_prefix_tokens, teacher.num_prefix_tokens
        has_cls = [model.cls_token is not None for model in (student, teacher)]
        self.shared = own if own == other and has_cls[0] == has_cls[1] else int(all(has_cls))
        self.linear = nn.Linear(student.embed_dim, teacher.embed_dim)
        self.adapter = FusedLosses(teacher.embed_dim, rank, num_prefix_tokens=self.shared)
        basis = nullspace_basis(Backbone(teacher), len(teacher.blocks) - 1, rank)
        self.adapter.set_basis(basis.vectors)

    def forward(self, student: Tensor, teacher: Tensor) -> FusedLossesOutput:
        """Return the losses of both models' tokens, ``[B, T, D]``."""
        student, teacher = (
            torch.cat([tokens[:, : self.shared], tokens[:, prefix:]], dim=1)
            for tokens, prefix in zip((student, teacher), self.prefixes, strict=True)
        )
        return self.adapter(self.linear(student), teacher)


class SiNGERModule(FeatureDistillationTrainableModule):
    """The trainable part: the student and the head."""

    def forward(self, input: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits and the losses kd, outlier and info; ``teacher`` is ``[B, T, D]``."""
        features, tokens = last_block(self.student, input)
        out = self.projection(tokens, teacher)
        return self.student.forward_head(features), out.kd, out.outlier, out.info


class SiNGERTask(FeatureDistillationTask):
    """Classification and SiNGER; ``options`` are those of ``FeatureDistillationTask``."""

    def __init__(
        self, student_model: nn.Module, teacher_model: nn.Module, rank: int = 64, **options: Any
    ) -> None:
        super().__init__(student_model, teacher_model, **options)
        teacher = self.teacher.model.requires_grad_(False)
        head = SiNGERHead(student_model, teacher, rank).to(self.device)
        self.trainable_module = SiNGERModule(student_model, head)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the losses of a batch ``[B, 3, H, W]``, normalised for the student."""
        with torch.no_grad():
            images = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            tokens = last_block(self.teacher.model, images)[1]
        logits, kd, outlier, info = self.trainable_module(input, tokens)
        task_loss = self.criterion(logits, target)
        distill_loss = kd + 0.01 * outlier + info
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * distill_loss
        terms = {"task_loss": task_loss, "kd": kd, "outlier": outlier, "info": info}
        return {"loss": loss, "output": logits, **terms}


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and return every step's loss."""
    parser = argparse.ArgumentParser(
        description="SiNGER as a training task of timm's", allow_abbrev=False
    )
    parser.add_argument("--teacher", default="vit_small_patch16_224")
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights for the teacher")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    size = {"img_size": args.image_size}
    teacher = timm.create_model(args.teacher, args.pretrained, num_classes=0, **size).to(device)
    student = timm.create_model(args.student, num_classes=10, **size).to(device)
    task = SiNGERTask(student, teacher, args.rank, device=device, verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", 1e-3, weight_decay=1e-4)
    task.setup_ema(decay=0.99)
    task.train()
    history = []
    batches = torch.randn(4, 8, 3, args.image_size, args.image_size, device=device)
    labels = torch.randint(10, (4, 8), device=device)
    for step in range(1, args.steps + 1):
        result = task(batches[step % 4], labels[step % 4])
        optimizer.zero_grad()
        result["loss"].backward()
        nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
        optimizer.step()
        task.update_ema()
        history.append(result["loss"].detach())
        if step == 1 or step % 5 == 0:
            terms = ("task_loss", "kd", "outlier", "info")
            print(f"step {step}: " + ", ".join(f"{name} {result[name]:.4f}" for name in terms))
    return torch.stack(history).tolist()


if __name__ == "__main__":
    main()
