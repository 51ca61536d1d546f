"""Nullspace initialisation of the adapters: token directions that a teacher's block ignores.

A block is linearised as ``W̃ [D, M]``, acting on row vectors: a change ``v [D]`` of a token changes
what the block adds by about ``v W̃``. The left singular vectors of W̃ with the smallest singular
values span (nearly) its left nullspace; r of them are the columns of ``N [D, r]``, and the adapter
starts as ``Wd = N``, ``Wu = Nᵀ``.

Source: SiNGER (arXiv 2509.20986), section 3.1; ``init_singer`` and ``SiNGERAdapter`` of the
authors' code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from singer.errors import SingerError
from singer.models.backbones import Backbone, largest_weight

_logger = logging.getLogger("singer")

Linearization = Literal["mlp", "mlp_folded", "block", "jacobian", "random"]
Selection = Literal["paper", "official"]
RandomVectors = Literal["orthonormal", "gaussian"]


@dataclass(frozen=True)
class NullspaceBasis:
    """The directions chosen for one layer's adapter.

    Attributes:
        vectors: N, ``[D, r]``, float32, unit columns.
        singular_values: all D singular values of W̃, descending, float64 on the CPU; empty for
            ``random``.
        selected: those of the chosen vectors, ascending, float64 on the CPU.
        linearization: the one that was used (a block without an fc1 → fc2 MLP takes ``jacobian``).
        block: index of the block that was linearised.
        num_random: how many of the r columns are random padding (``official`` only).
    """

    vectors: Tensor
    singular_values: Tensor
    selected: Tensor
    linearization: Linearization
    block: int
    num_random: int = 0


def _fold_norm(norm: nn.Module, dim: int, like: Tensor) -> Tensor:
    """Return the linear part of a normalisation layer, ``[D, D]``: centring, then its weight."""
    matrix = torch.eye(dim, dtype=torch.float64, device=like.device)
    if isinstance(norm, nn.LayerNorm):  # RMSNorm does not centre
        matrix = matrix - 1.0 / dim
    weight = getattr(norm, "weight", None)
    return matrix if weight is None else matrix * weight.double()


def _layer_scale(block: nn.Module, which: str) -> Tensor | float:
    gamma = getattr(getattr(block, f"ls{which}", None), "gamma", None)
    if gamma is None:  # EVA and BEiT keep it as a bare parameter
        gamma = getattr(block, f"gamma_{which}", None)
    return 1.0 if gamma is None else gamma.double()


def _has_plain_mlp(block: nn.Module) -> bool:
    mlp = getattr(block, "mlp", None)
    return (
        isinstance(mlp, Mlp)
        and isinstance(mlp.fc1, nn.Linear)
        and isinstance(mlp.norm, nn.Identity)
    )


def _is_pre_norm(block: nn.Module) -> bool:
    """Whether a block is ``x + s1·attn(norm1(x))``, then ``x + s2·mlp(norm2(x))``."""
    return _has_plain_mlp(block) and type(block).__name__ in ("Block", "EvaBlock")


def _value_weight(attention: nn.Module) -> Tensor | None:
    """Return the value projection's weight ``[D, D]``, or None if there is no plain one."""
    plain = (
        type(attention).__name__ in ("Attention", "EvaAttention", "AttentionRope")
        and isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity)
        and getattr(attention, "gate", None) is None
    )
    qkv, value = getattr(attention, "qkv", None), getattr(attention, "v_proj", None)
    width = attention.proj.in_features
    if plain and isinstance(qkv, nn.Linear) and qkv.out_features == 3 * width:
        return qkv.weight[2 * width :]
    if plain and isinstance(value, nn.Linear) and value.out_features == width:
        return value.weight
    return None


def _mlp(block: nn.Module) -> Tensor | None:
    if not _has_plain_mlp(block):
        return None
    return (block.mlp.fc2.weight.double() @ block.mlp.fc1.weight.double()).T


def _folded(product: Tensor, norm: nn.Module, scale: Tensor | float) -> Tensor:
    """Return a path with the normalisation before it and the LayerScale after it."""
    return _fold_norm(norm, product.shape[0], product) @ product * scale


def _mlp_folded(block: nn.Module) -> Tensor | None:
    if not _is_pre_norm(block):
        return None
    return _folded(_mlp(block), block.norm2, _layer_scale(block, "2"))


def _block(block: nn.Module) -> Tensor | None:
    value = _value_weight(block.attn) if _is_pre_norm(block) else None
    if value is None:
        return None
    path = (block.attn.proj.weight.double() @ value.double()).T
    # Side by side, not summed: attention adds its part to other tokens, so that a direction is in
    # the nullspace only if it is in that of each path.
    attention = _folded(path, block.norm1, _layer_scale(block, "1"))
    return torch.cat([attention, _mlp_folded(block)], dim=1)


_CLOSED_FORMS: dict[str, Callable[[nn.Module], Tensor | None]] = {
    "mlp": _mlp,
    "mlp_folded": _mlp_folded,
    "block": _block,
}
"""Linearisations computed from a block's weights; None where they do not describe the block."""


def measure_jacobian(backbone: Backbone, layer: int, images: Tensor, seed: int = 0) -> Tensor:
    """Measure how strongly each direction of the patches changes what a block adds to its input.

    For every basis vector ``e_k`` all patches are moved at once along ``ε e_k``, with one random
    sign ε per patch, the same for all k; forward-mode differentiation gives the exact change
    ``c_k`` of ``block(x) − x`` at all tokens. Over ε, ``c_k · c_l`` is an unbiased estimate of
    ``Σ_i (J_i e_k) · (J_i e_l)``, the sum over patches i of their Jacobians' products.

    Args:
        backbone: the model, in evaluation mode.
        layer: index of the block.
        images: the calibration batch, ``[B, 3, H, W]``, as for :meth:`Backbone.tokens`. It goes
            image by image; each takes memory for ``D·T·D`` numbers.
        seed: of the random signs.

    Returns:
        W̃, ``[D, D]``, float64, symmetric: the square root of the mean of that sum per patch.

    Raises:
        SingerError: that sum is not finite; the largest weight is named.
    """
    generator = torch.Generator().manual_seed(seed)
    energies = [_change_energy(backbone, layer, image, generator) for image in images.split(1)]
    energy = torch.stack(energies).sum(dim=0)
    if not energy.isfinite().all():
        raise SingerError(
            f"method.linearization: the Jacobian of block {layer} of {backbone.name} is not "
            f"finite; the largest weight is {largest_weight(backbone.model)}"
        )
    values, vectors = torch.linalg.eigh(energy / (len(energies) * backbone.num_patches))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _change_energy(
    backbone: Backbone, layer: int, image: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the inner products ``c_k · c_l`` for one image, ``[D, D]``, float64."""
    with torch.no_grad():
        tokens, call = backbone.block_input(image, layer)
    _, length, dim = tokens.shape
    signs = torch.randint(0, 2, (1, length, 1), generator=generator).to(tokens) * 2 - 1
    signs[:, : backbone.num_prefix_tokens] = 0

    def added(x: Tensor) -> Tensor:
        return backbone.run_block(layer, x, call) - x

    def change(direction: Tensor) -> Tensor:
        return torch.func.jvp(added, (tokens,), (signs * direction,))[1].flatten()

    # Fused attention kernels have no forward-mode derivative; the plain formula has.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        basis = torch.eye(dim, dtype=tokens.dtype, device=tokens.device)
        changes = torch.stack([change(direction) for direction in basis])  # [D, T·D]
    energy = torch.zeros(dim, dim, dtype=torch.float64, device=tokens.device)
    for part in changes.split(1 << 16, dim=1):  # in parts: a float64 copy of all would be large
        energy += part.double() @ part.double().T
    return energy


def linearize(
    backbone: Backbone,
    layer: int,
    linearization: Linearization,
    images: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Linearization]:
    """Linearise a block.

    - ``mlp``: ``(fc2 fc1)ᵀ``, as in the authors' code.
    - ``mlp_folded``: the same with the LayerNorm before it (centring and weight) and the LayerScale
      after it.
    - ``block``: that beside the attention's value path, folded likewise.
    - ``jacobian``: measured on a calibration batch, see :func:`measure_jacobian`.

    None is shown to distil better than ``mlp``: the paper's appendix finds a block's full Jacobian
    worse along the null directions.

    Args:
        backbone: the model, in evaluation mode.
        layer: index of the block.
        linearization: one of the above.
        images: the calibration batch ``[B, 3, H, W]`` of ``jacobian``.
        seed: of ``jacobian``'s random signs.

    Returns:
        W̃, ``[D, D]`` (``[D, 2D]`` for ``block``), float64, and the linearisation used: a block
        that the closed form asked for does not describe (SwiGLU, say) takes ``jacobian``.

    Raises:
        SingerError: ``jacobian`` is needed and there is no calibration batch; or see
            :func:`measure_jacobian`.
    """
    block = backbone.block(layer)
    if linearization in _CLOSED_FORMS:
        with torch.no_grad():
            matrix = _CLOSED_FORMS[linearization](block)
        if matrix is not None:
            return matrix, linearization
        _logger.warning(
            "block %d of %s is not what %r describes; its Jacobian is measured instead",
            layer,
            backbone.name,
            linearization,
        )
    if images is None:
        raise SingerError(
            f"method.linearization: block {layer} of {backbone.name} needs 'jacobian', "
            f"which needs a calibration batch of images"
        )
    return measure_jacobian(backbone, layer, images, seed), "jacobian"


def _random_unit_vectors(dim: int, count: int, generator: torch.Generator) -> Tensor:
    vectors = torch.randn(dim, count, dtype=torch.float64, generator=generator)
    return nn.functional.normalize(vectors, dim=0)


def select_vectors(
    matrix: Tensor,
    rank: int,
    selection: Selection,
    threshold: float,
    generator: torch.Generator,
    random_vectors: RandomVectors = "gaussian",
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Choose r left singular vectors of W̃.

    - ``paper``: those with the r smallest singular values.
    - ``official``: of those with a singular value below ``threshold``, the first r in descending
      order (the least null of them); random unit vectors make up what is missing.

    Args:
        matrix: W̃, ``[D, M]``, float64, ``M ≥ D``.
        rank: r, at most D.
        selection: see above.
        threshold: for ``official``; the authors' is 0.05.
        generator: draws the random vectors, on the CPU.
        random_vectors: ``gaussian``: normalised to length 1; ``orthonormal``: then made orthogonal
            to the chosen vectors and to each other.

    Returns:
        N ``[D, r]``, all singular values ``[D]`` descending, those of N's columns (ascending,
        without the random ones), and the number of random columns.
    """
    vectors, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    dim = matrix.shape[0]
    if selection == "paper":
        chosen = torch.arange(dim - rank, dim, device=values.device)
    else:
        chosen = torch.nonzero(values < threshold).flatten()[:rank]
    basis = vectors[:, chosen]
    num_random = rank - chosen.numel()
    if num_random:
        padding = _random_unit_vectors(dim, num_random, generator).to(basis)
        padded = torch.cat([basis, padding], dim=1)
        if random_vectors == "orthonormal":
            padding = torch.linalg.qr(padded).Q[:, chosen.numel() :]
            padded = torch.cat([basis, padding], dim=1)
        basis = padded
    return basis, values, values[chosen].flip(0), num_random


def check_rank(rank: int, dim: int) -> None:
    """Check an adapter's rank against the teacher's width.

    Raises:
        SingerError: it is below 1 or above ``dim``.
    """
    if not 1 <= rank <= dim:
        raise SingerError(f"method.rank: got {rank}, expected 1 to {dim}, the teacher's width")


def nullspace_basis(
    backbone: Backbone,
    layer: int,
    rank: int,
    linearization: Linearization = "mlp",
    selection: Selection = "paper",
    threshold: float = 0.05,
    images: Tensor | None = None,
    seed: int = 0,
    random_vectors: RandomVectors | None = None,
) -> NullspaceBasis:
    """Return a basis of a block's nullspace; the SVD is in float64, on the model's device.

    Args:
        backbone: the teacher.
        layer: index of the block to linearise.
        rank: r, 1 to D.
        linearization: ``mlp``, ``mlp_folded``, ``block``, ``jacobian`` (see :func:`linearize`), or
            ``random``: random vectors, the paper's ablation.
        selection: ``paper`` or ``official``, see :func:`select_vectors`.
        threshold: for ``official``.
        images: the calibration batch, see :func:`linearize`.
        seed: of everything random here.
        random_vectors: of the padding and of ``random``: ``orthonormal``, or ``gaussian`` (of
            length 1, not orthogonal); None: the latter, the authors', with ``official`` selection.

    Returns:
        The basis and the spectrum it was taken from.

    Raises:
        SingerError: ``rank`` is above the width, an option is unknown, or a calibration batch is
            missing.
    """
    if random_vectors is None:
        random_vectors = "gaussian" if selection == "official" else "orthonormal"
    for name, value, known in (
        ("linearization", linearization, get_args(Linearization)),
        ("selection", selection, get_args(Selection)),
        ("random_vectors", random_vectors, get_args(RandomVectors)),
    ):
        if value not in known:
            raise SingerError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    check_rank(rank, backbone.dim)
    generator = torch.Generator().manual_seed(seed)
    if linearization == "random":
        vectors = _random_unit_vectors(backbone.dim, rank, generator)
        if random_vectors == "orthonormal":
            vectors = torch.linalg.qr(vectors).Q
        empty = torch.empty(0, dtype=torch.float64)
        return NullspaceBasis(vectors.float(), empty, empty, "random", layer)
    matrix, used = linearize(backbone, layer, linearization, images, seed)
    vectors, values, chosen, num_random = select_vectors(
        matrix, rank, selection, threshold, generator, random_vectors
    )
    if num_random:
        _logger.warning(
            "block %d: %d singular values lie below %g, so %d of the %d directions are random",
            layer,
            rank - num_random,
            threshold,
            num_random,
            rank,
        )
    return NullspaceBasis(
        vectors.float(), values.cpu(), chosen.cpu(), used, layer, num_random=num_random
    )
