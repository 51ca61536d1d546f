"""SiNGER in a plain PyTorch loop: timm's models and singer_kernels.

It runs offline, in seconds, on random weights and images. Then with real ones::

    python examples/plain_pytorch.py
    python examples/plain_pytorch.py --teacher vit_large_patch16_224 --pretrained \
        --student vit_small_patch16_224 --image-size 224 --data FOLDER --workers 8 --steps 10000

Two of the teacher's blocks are distilled: the last, and one at three quarters of its depth, whose
refined tokens go through the block after it. The teacher may be any ``vit_*`` or ``deit*`` model
(blocks of DINOv3 and EVA also need a rotary embedding, which ``singer`` passes on).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import timm
import torch
from timm.data import create_dataset, resolve_model_data_config
from torch import Tensor, cat, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from singer_kernels import FusedLosses, gram_loss

OUTLIER_WEIGHT, INFO_WEIGHT = 0.01, 1.0


def load_images(args: argparse.Namespace) -> Iterator[Tensor]:
    """Yield batches ``[B, 3, H, W]`` in [0, 1] endlessly, of a folder's images or of noise."""
    steps = [transforms.RandomResizedCrop(args.image_size), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*steps, transforms.ToTensor()])
    noise = torch.rand(4 * args.batch_size, 3, args.image_size, args.image_size)
    data = create_dataset("", args.data, transform=transform) if args.data else noise
    while True:
        for batch in DataLoader(data, args.batch_size, shuffle=True, num_workers=args.workers):
            yield batch[0] if args.data else batch  # labels are not needed


def block_tokens(model: nn.Module, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return the raw outputs of some blocks, ``[B, T, D]`` each, prefix tokens first."""
    config = resolve_model_data_config(model)  # each model's own mean and standard deviation
    mean, std = (images.new_tensor(config[key])[:, None, None] for key in ("mean", "std"))
    wanted = sorted(set(blocks))
    outputs = model.forward_intermediates(
        (images - mean) / std,
        indices=wanted,
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        return_prefix_tokens=True,
        intermediates_only=True,
    )
    if model.num_prefix_tokens:
        outputs = [cat([prefix, patches], dim=1) for patches, prefix in outputs]
    return dict(zip(wanted, outputs, strict=True))


def align(tokens: Tensor, own: int, shared: int) -> Tensor:
    """Keep the ``shared`` first of a model's ``own`` prefix tokens, and all patches."""
    return cat([tokens[:, :shared], tokens[:, own:]], dim=1)


def nullspace(block: nn.Module, rank: int) -> Tensor:
    """Return the left singular vectors, ``[D, rank]``, of an MLP's smallest singular values."""
    matrix = (block.mlp.fc2.weight.double() @ block.mlp.fc1.weight.double()).T
    return torch.linalg.svd(matrix).U[:, -rank:]


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and return every step's loss."""
    parser = argparse.ArgumentParser(
        description="SiNGER in a plain PyTorch loop", allow_abbrev=False
    )
    parser.add_argument("--teacher", default="vit_small_patch16_224")
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights for the teacher")
    parser.add_argument("--data", help="folder of images; without it: noise")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    options = {"num_classes": 0, "img_size": args.image_size}
    teacher = timm.create_model(args.teacher, pretrained=args.pretrained, **options).to(device)
    student = timm.create_model(args.student, **options).to(device)
    teacher.eval().requires_grad_(False)

    depth, last = len(teacher.blocks), len(teacher.blocks) - 1
    middle = depth * 3 // 4 - 1
    student_block = {b: len(student.blocks) * (b + 1) // depth - 1 for b in (middle, last)}
    # Shared prefix tokens: all of them if both models have the same, else CLS if both have it.
    teacher_prefix, student_prefix = teacher.num_prefix_tokens, student.num_prefix_tokens
    has_cls = [model.cls_token is not None for model in (teacher, student)]
    is_same = teacher_prefix == student_prefix and has_cls[0] == has_cls[1]
    shared = teacher_prefix if is_same else int(all(has_cls))

    projections, adapters = nn.ModuleDict(), nn.ModuleDict()
    for block in (middle, last):
        projections[str(block)] = nn.Linear(student.embed_dim, teacher.embed_dim)
        adapters[str(block)] = adapter = FusedLosses(
            teacher.embed_dim,
            args.rank,
            num_prefix_tokens=shared,
            gram=block == last,
            return_refined=block == middle,
        )
        linearized = teacher.blocks[middle + 1 if block == middle else last]
        adapter.set_basis(nullspace(linearized, args.rank))
    trained = nn.ModuleList([student, projections, adapters]).to(device).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=1e-4)

    history = []
    for step, images in zip(range(1, args.steps + 1), load_images(args), strict=False):
        images = images.to(device)
        with torch.no_grad():
            targets = block_tokens(teacher, images, [middle, middle + 1, last])
        tokens = block_tokens(student, images, list(student_block.values()))
        out = {}
        for block in (middle, last):
            aligned = align(tokens[student_block[block]], student_prefix, shared)
            target = align(targets[block], teacher_prefix, shared)
            out[block] = adapters[str(block)](projections[str(block)](aligned), target)
        prefix = targets[middle][:, :teacher_prefix]
        refined = cat([prefix, out[middle].refined[:, shared:]], dim=1)
        refined_next = teacher.blocks[middle + 1](refined)
        info = gram_loss(refined_next, targets[middle + 1], teacher_prefix) + out[last].info
        kd = out[middle].kd + out[last].kd
        outlier = out[middle].outlier + out[last].outlier
        loss = kd + OUTLIER_WEIGHT * outlier + INFO_WEIGHT * info
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
        if step == 1 or step % 5 == 0:
            print(f"step {step}: kd {kd:.4f}, outlier {outlier:.4f}, info {info:.6f}")
    return torch.stack(history).tolist()


if __name__ == "__main__":
    main()
