"""A ViT of Hugging Face Transformers teaches one of timm's, with SiNGER's losses.

It needs ``pip install transformers``, and runs offline, in seconds, on noise and a random teacher;
``--teacher`` takes the name or folder of a ViT, DeiT or DINOv2 with its weights::

    python examples/transformers_vit.py
    python examples/transformers_vit.py --teacher facebook/dinov2-base

``hidden_states[k + 1]`` is block k's raw output; ``last_hidden_state`` has gone through the final
norm, and is not what SiNGER distils. The last block is distilled.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, ViTConfig

from singer_kernels import FusedLosses

OUTLIER_WEIGHT, INFO_WEIGHT = 0.01, 1.0


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise images ``[B, 3, H, W]`` in [0, 1]."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def nullspace(block: nn.Module, rank: int) -> Tensor | None:
    """Return the left singular vectors, ``[D, rank]``, of an MLP's smallest singular values.

    None: the block has no fc1 → fc2 MLP.
    """
    mlp = getattr(block, "mlp", None)
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    if fc1 is None or fc2 is None:
        return None
    matrix = (fc2.weight.double() @ fc1.weight.double()).T
    return torch.linalg.svd(matrix).U[:, -rank:]


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and return every step's loss."""
    parser = argparse.ArgumentParser(
        description="SiNGER from a Transformers ViT", allow_abbrev=False
    )
    parser.add_argument("--teacher", help="a pretrained ViT, DeiT or DINOv2; without it: random")
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=96, help="of the random teacher")
    parser.add_argument("--width", type=int, default=384, help="of the random teacher")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    mean = std = (0.5, 0.5, 0.5)
    if args.teacher:
        teacher = AutoModel.from_pretrained(args.teacher)
        processor = AutoImageProcessor.from_pretrained(args.teacher)
        mean, std = processor.image_mean, processor.image_std
    else:
        size = {"hidden_size": args.width, "intermediate_size": 4 * args.width}
        config = ViTConfig(
            **size, num_hidden_layers=6, num_attention_heads=6, image_size=args.image_size
        )
        teacher = AutoModel.from_config(config)
    teacher = teacher.to(device).eval().requires_grad_(False)
    config = teacher.config
    size, patch, dim = config.image_size, config.patch_size, config.hidden_size
    # The student gets the teacher's patch grid.
    options = {"num_classes": 0, "img_size": size, "patch_size": patch}
    student = timm.create_model(args.student, **options).to(device).train()

    batches = torch.rand(4, args.batch_size, 3, size, size, device=device)  # replace by real images
    # Shared prefix tokens: all of them if both models have the same, else CLS if both have it.
    own = teacher(batches[0]).last_hidden_state.shape[1] - student.patch_embed.num_patches
    other = student.num_prefix_tokens
    shared = own if own == other else int(student.cls_token is not None)
    projection = nn.Linear(student.embed_dim, dim).to(device)
    adapter = FusedLosses(dim, args.rank, num_prefix_tokens=shared).to(device)
    blocks = next(module for module in teacher.modules() if isinstance(module, nn.ModuleList))
    basis = nullspace(blocks[-1], args.rank)
    if basis is not None:  # else it keeps its random orthonormal basis
        adapter.set_basis(basis)
    trained = nn.ModuleList([student, projection, adapter])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=1e-4)

    own_data = resolve_model_data_config(student)
    history = []
    for step in range(1, args.steps + 1):
        images = batches[step % len(batches)]
        with torch.no_grad():
            output = teacher(normalize(images, mean, std), output_hidden_states=True)
        target = output.hidden_states[-1]
        (tokens,) = student.forward_intermediates(
            normalize(images, own_data["mean"], own_data["std"]),
            indices=1,
            norm=False,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        tokens = torch.cat([tokens[1], tokens[0]], dim=1) if other else tokens
        out = adapter(
            projection(torch.cat([tokens[:, :shared], tokens[:, other:]], dim=1)),
            torch.cat([target[:, :shared], target[:, own:]], dim=1),
        )
        loss = out.kd + OUTLIER_WEIGHT * out.outlier + INFO_WEIGHT * out.info
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
        if step == 1 or step % 5 == 0:
            print(f"step {step}: kd {out.kd:.4f}, outlier {out.outlier:.4f}, info {out.info:.6f}")
    return torch.stack(history).tolist()


if __name__ == "__main__":
    main()
