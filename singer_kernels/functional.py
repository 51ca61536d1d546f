"""The parts of :func:`singer_kernels.fused_losses` as functions of their own.

Shapes: ``T = num_prefix_tokens + P``; the prefix tokens (CLS, registers) come first, then the P
patches. Dtypes: float64, float32, bfloat16 and float16 in any mix; products follow the operands'
promoted dtype, or autocast; reductions and losses are float32 (float64 if an input is float64).
Strides may be any. The gradients can't be differentiated again.
"""

from __future__ import annotations

from torch import Tensor

from singer_kernels import backends
from singer_kernels.backends import CallSpec
from singer_kernels.backends.precision import MatmulPrecision
from singer_kernels.reference import accumulation_dtype
from singer_kernels.types import BackendName
from singer_kernels.validation import (
    check_adapter,
    check_frozen,
    check_num_prefix_tokens,
    check_quantile,
    check_same_shape,
    check_tensor,
)


def refine(
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    num_prefix_tokens: int = 1,
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """Add the adapter's low-rank perturbation to the patches: ``F̂ = F + (F Wd) Wu``.

    Prefix tokens pass unchanged.

    Args:
        teacher: F, ``[B, T, D]``, frozen.
        down: Wd, ``[D, r]``.
        up: Wu, ``[r, D]``.
        num_prefix_tokens: number of leading tokens that are not patches.
        backend: the backend's name; None: ``SINGER_BACKEND``, or the first that can run.

    Returns:
        F̂, ``[B, T, D]``, in the dtype of ``teacher``, differentiable in ``down`` and ``up``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device or number does not fit, or ``teacher`` requires grad.
        RuntimeError: the requested backend can't run here.

    Source: SiNGER (arXiv 2509.20986), section 3.1.
    """
    check_frozen("teacher", check_tensor("teacher", teacher, "[B, T, D]"))
    check_adapter(teacher, down, up)
    prefix = check_num_prefix_tokens(num_prefix_tokens, teacher.shape[1])
    return backends.resolve(backend, teacher.device).refine(teacher, down, up, prefix)


def token_norms(
    tokens: Tensor, num_prefix_tokens: int = 1, *, backend: BackendName | None = None
) -> Tensor:
    """Return the Euclidean norm of every patch.

    Args:
        tokens: ``[B, T, D]``.
        num_prefix_tokens: number of leading tokens that are not patches.
        backend: the backend's name; None: ``SINGER_BACKEND``, or the first that can run.

    Returns:
        n, ``[B, P]``, float32 (float64 for float64), differentiable in ``tokens``; a zero-norm
        patch has gradient 0.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape or number does not fit.
        RuntimeError: the requested backend can't run here.

    Source: SiNGER (arXiv 2509.20986), section 3.2.
    """
    check_tensor("tokens", tokens, "[B, T, D]")
    prefix = check_num_prefix_tokens(num_prefix_tokens, tokens.shape[1])
    return backends.resolve(backend, tokens.device).token_norms(tokens, prefix)


def outlier_loss(
    norms: Tensor, quantile: float = 0.97, *, backend: BackendName | None = None
) -> Tensor:
    """Pull the patch norms above an image's quantile down to it.

    ``mean (n − q_b)²`` over all patches of the batch with ``n > q_b``, and 0 if there are none.
    ``q_b`` is the linearly interpolated quantile of image b's norms (``torch.quantile``), a
    constant for the gradient. A NaN or Inf norm makes the loss non-finite.

    Args:
        norms: n, ``[B, P]``.
        quantile: γ in [0, 1].
        backend: the backend's name; None: ``SINGER_BACKEND``, or the first that can run.

    Returns:
        A scalar, float32 (float64 for float64), differentiable in ``norms``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: the shape is wrong, or the quantile lies outside [0, 1].
        RuntimeError: the requested backend can't run here.

    Source: SiNGER (arXiv 2509.20986), section 3.2.
    """
    check_tensor("norms", norms, "[B, P]")
    return backends.resolve(backend, norms.device).outlier_loss(norms, check_quantile(quantile))


def gram_loss(
    tokens: Tensor,
    target: Tensor,
    num_prefix_tokens: int = 1,
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """Match the cosine-similarity (Gram) matrix of the patches.

    The mean over all ``B·P·P`` entries of ``(G(tokens) − G(target))²``; the rows of G are
    normalised as ``x / max(‖x‖, 1e-12)``, and a zero-norm row has gradient 0.

    Args:
        tokens: ``[B, T, D]``.
        target: ``[B, T, D]``.
        num_prefix_tokens: number of leading tokens that are not patches.
        backend: the backend's name; None: ``SINGER_BACKEND``, or the first that can run.

    Returns:
        A scalar, float32 (float64 if an input is), differentiable in ``tokens`` and ``target``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device or number does not fit.
        RuntimeError: the requested backend can't run here.

    Source: SiNGER (arXiv 2509.20986), section 3.3.
    """
    check_tensor("tokens", tokens, "[B, T, D]")
    check_same_shape("target", check_tensor("target", target, "[B, T, D]"), "tokens", tokens)
    prefix = check_num_prefix_tokens(num_prefix_tokens, tokens.shape[1])
    precision = MatmulPrecision.of(accumulation_dtype(tokens, target), tokens, target)
    spec = CallSpec(tokens.shape[0], tokens.shape[1] - prefix, 0, precision)
    return backends.resolve(backend, tokens.device, spec).gram_loss(tokens, target, prefix)


def kd_loss(student: Tensor, tokens: Tensor, *, backend: BackendName | None = None) -> Tensor:
    """Match the features: the mean of ``(S − tokens)²`` over all entries, prefix tokens included.

    Args:
        student: S, ``[B, T, D]``.
        tokens: ``[B, T, D]``.
        backend: the backend's name; None: ``SINGER_BACKEND``, or the first that can run.

    Returns:
        A scalar, float32 (float64 if an input is), differentiable in ``student`` and ``tokens``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: the shapes or devices differ.
        RuntimeError: the requested backend can't run here.

    Source: SiNGER (arXiv 2509.20986), section 3.1; FitNets (arXiv 1412.6550), section 2.2.
    """
    check_tensor("student", student, "[B, T, D]")
    check_same_shape("tokens", check_tensor("tokens", tokens, "[B, T, D]"), "student", student)
    return backends.resolve(backend, student.device).kd_loss(student, tokens)
