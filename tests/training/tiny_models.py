"""Tiny, randomly initialised timm models, one for each family that the package handles."""

from dataclasses import dataclass, field

import timm
import torch
from torch import nn

from singer.models.backbones import Backbone

torch.set_num_threads(1)  # models this small are slower on several

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

GRID = 2


@dataclass(frozen=True)
class Family:
    """What is known of a timm model, written down independently of timm."""

    name: str
    patch: int = 16
    prefix: int = 1
    has_class_token: bool = True
    normalisation: tuple = IMAGENET
    takes_mask: bool = True
    options: dict = field(default_factory=dict)

    def __str__(self):
        return self.name


FAMILIES = {
    family.name: family
    for family in (
        Family("vit_tiny_patch16_224", normalisation=HALF),
        Family("deit3_small_patch16_224"),
        Family("vit_small_patch14_dinov2", patch=14),
        Family("vit_small_patch14_reg4_dinov2", patch=14, prefix=5),
        Family("vit_base_patch16_clip_224", normalisation=CLIP),
        Family("vit_base_patch16_siglip_224", prefix=0, has_class_token=False, normalisation=HALF),
        Family("vit_small_patch16_dinov3", prefix=5),
        Family("eva02_tiny_patch14_224", patch=14, normalisation=CLIP),
        Family("vit_base_patch16_rope_mixed_224"),
        Family("beit_base_patch16_224", normalisation=HALF, takes_mask=False),
        Family("deit_tiny_distilled_patch16_224", prefix=2),
        Family("vit_base_patch16_xp_224", normalisation=HALF),
    )
}
VIT, SIGLIP = "vit_tiny_patch16_224", "vit_base_patch16_siglip_224"
DEIT3, DINOV2 = "deit3_small_patch16_224", "vit_small_patch14_dinov2"
REG4, DINOV3 = "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"
EVA02, ROPE_MIXED = "eva02_tiny_patch14_224", "vit_base_patch16_rope_mixed_224"
BEIT, DISTILLED = "beit_base_patch16_224", "deit_tiny_distilled_patch16_224"
PARALLEL = "vit_base_patch16_xp_224"


def generator(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomize(model, seed=0):
    """Give every parameter a value that a test can see: none is left at 0, at 1 or tiny."""
    draw = generator(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw).to(parameter)
        if parameter.ndim == 2 and "table" not in name:  # a Linear's weight
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
        elif parameter.ndim == 4 and "proj" in name:  # the patch embedding
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        elif "gamma" in name:  # LayerScale
            parameter.copy_(0.4 + 0.2 * noise)
        elif name.endswith("weight"):  # a normalisation layer's
            parameter.copy_(1 + 0.3 * noise)
        else:  # biases, class and register tokens, position embeddings, rotary frequencies
            parameter.copy_(0.3 * noise)
    return model


def model_options(name, *, depth=3, dim=32, heads=2, grid=GRID, patch_size=None):
    patch = patch_size or FAMILIES[name].patch
    options = {"img_size": grid * patch, "depth": depth, "embed_dim": dim, "num_heads": heads}
    return options | ({"patch_size": patch} if patch_size else {})


def tiny_model(name, *, depth=3, dim=32, heads=2, grid=GRID, patch_size=None, seed=0, **options):
    sizes = model_options(name, depth=depth, dim=dim, heads=heads, grid=grid, patch_size=patch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what is no parameter (a buffer, say) is seeded as well
        model = timm.create_model(name, pretrained=False, num_classes=0, **sizes, **options)
    return randomize(model.eval(), seed)


def tiny_backbone(name, **options) -> Backbone:
    return Backbone(tiny_model(name, **options), name)


def random_images(backbone, batch=2, seed=0, dtype=torch.float32):
    return torch.rand(batch, 3, *backbone.image_size, generator=generator(seed), dtype=dtype)


def timm_tokens(model, images, **forward_options):
    """Return every block's output ``[B, T, D]``, as timm's own feature extraction gives it."""
    intermediates = model.forward_intermediates(
        images,
        norm=False,
        output_fmt="NLC",
        return_prefix_tokens=True,
        intermediates_only=True,
        **forward_options,
    )
    return [  # a model without prefix tokens gives the patches alone
        pair if isinstance(pair, torch.Tensor) else torch.cat([pair[1], pair[0]], dim=1)
        for pair in intermediates
    ]


class ShiftedLinearBlock(nn.Module):
    """``x + x A``, token by token: a block whose Jacobian is known."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x, attn_mask=None, is_causal=False):
        return x + x @ self.matrix
