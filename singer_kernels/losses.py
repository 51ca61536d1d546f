"""``fused_losses``, the drop-in entry point, and its module form ``FusedLosses``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast, overload

import torch
from torch import Tensor, nn

from singer_kernels import backends
from singer_kernels.backends import CallSpec
from singer_kernels.backends.precision import MatmulPrecision
from singer_kernels.reference import accumulation_dtype
from singer_kernels.types import BackendName, FusedLossesInputs, FusedLossesOutput
from singer_kernels.validation import (
    FLOAT_DTYPES,
    check_adapter,
    check_flag,
    check_frozen,
    check_int,
    check_num_prefix_tokens,
    check_quantile,
    check_same_shape,
    check_tensor,
)

if TYPE_CHECKING:
    from singer_kernels.types import (
        OutputWithBoth,
        OutputWithInfo,
        OutputWithNeither,
        OutputWithRefined,
    )


@overload
def fused_losses(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    gram_target: Tensor | None = None,
    gram: Literal[True] = True,
    quantile: float = 0.97,
    num_prefix_tokens: int = 1,
    return_refined: Literal[False] = False,
    backend: BackendName | None = None,
) -> OutputWithInfo: ...


@overload
def fused_losses(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    gram_target: Tensor | None = None,
    gram: Literal[True] = True,
    quantile: float = 0.97,
    num_prefix_tokens: int = 1,
    return_refined: Literal[True],
    backend: BackendName | None = None,
) -> OutputWithBoth: ...


@overload
def fused_losses(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    gram_target: None = None,
    gram: Literal[False],
    quantile: float = 0.97,
    num_prefix_tokens: int = 1,
    return_refined: Literal[False] = False,
    backend: BackendName | None = None,
) -> OutputWithNeither: ...


@overload
def fused_losses(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    gram_target: None = None,
    gram: Literal[False],
    quantile: float = 0.97,
    num_prefix_tokens: int = 1,
    return_refined: Literal[True],
    backend: BackendName | None = None,
) -> OutputWithRefined: ...


@overload
def fused_losses(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    gram_target: Tensor | None = None,
    gram: bool = True,
    quantile: float = 0.97,
    num_prefix_tokens: int = 1,
    return_refined: bool = False,
    backend: BackendName | None = None,
) -> FusedLossesOutput: ...


def fused_losses(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    gram_target: Tensor | None = None,
    gram: bool = True,
    quantile: float = 0.97,
    num_prefix_tokens: int = 1,
    return_refined: bool = False,
    backend: BackendName | None = None,
) -> FusedLossesOutput:
    """Return SiNGER's three losses for one distilled layer.

    With ``F̂ = F + (F Wd) Wu`` on the patches and ``F̂ = F`` on the prefix tokens:

    - ``kd``: mean of ``(S − F̂)²`` over all ``B·T·D`` entries, prefix tokens included;
    - ``outlier``: mean of ``(n − q_b)²`` over all patches of the batch whose norm ``n = ‖F̂ᵢ‖``
      lies above ``q_b``, the interpolated quantile of image b's patch norms (a constant for the
      gradient); 0 if there are none;
    - ``info``: mean over ``B·P·P`` of ``(G(F̂) − G(R))²``, G the patches' cosine similarities.

    A NaN or Inf in a patch makes all three losses non-finite. A zero-norm patch has gradient 0
    from ``outlier`` and ``info``. Inputs are never changed. Differentiating twice raises.

    Args:
        student: S, ``[B, T, D]``: the student's tokens, projected to the teacher's width.
            ``T = num_prefix_tokens + P``, the prefix tokens (CLS, registers) first.
        teacher: F, ``[B, T, D]``: the teacher's tokens (a block's raw output), frozen.
        down: Wd, ``[D, r]``.
        up: Wu, ``[r, D]``.
        gram_target: R, ``[B, T, D]``; it may require grad. None: the teacher, as in the paper.
            (The authors' code passes the refined tokens of the layer before.)
        gram: False for an intermediate layer, whose information term is computed on the next
            block's output: ``info`` is then None.
        quantile: γ in [0, 1].
        num_prefix_tokens: number of leading tokens that are not patches; at least one patch must
            remain.
        return_refined: True: ``out.refined`` is F̂, differentiable, to feed the next block.
        backend: the backend's name; None: ``SINGER_BACKEND``, or the first that can run.

    The tensors may be float64, float32, bfloat16 and float16 in any mix, of any strides, on one
    device. Products take the operands' promoted dtype, or follow autocast; every reduction is
    float32 (float64 if an input is float64). Gradients have their input's dtype. Before the capture
    of a CUDA graph, forward and backward must have run once with these sizes and dtypes
    (``torch.cuda.make_graphed_callables`` sees to it): a kernel's first launch can't be captured.

    Returns:
        The scalars ``kd``, ``outlier``, ``info``; ``refined`` ``[B, T, D]``, ``norms`` ``[B, P]``,
        ``threshold`` ``[B]``: see :class:`FusedLossesOutput`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device or number does not fit; ``teacher`` requires grad; or
            ``gram_target`` is given with ``gram=False``.
        RuntimeError: the requested backend can't run here.

    Source: SiNGER (arXiv 2509.20986), section 3; ``SiNGER.forward_train`` of the authors' code.
    """
    check_frozen("teacher", check_tensor("teacher", teacher, "[B, T, D]"))
    check_same_shape("student", check_tensor("student", student, "[B, T, D]"), "teacher", teacher)
    check_adapter(teacher, down, up)
    check_flag("gram", gram)
    check_flag("return_refined", return_refined)
    if gram_target is not None:
        if not gram:
            raise ValueError("gram_target: got a tensor with gram=False, expected None")
        check_tensor("gram_target", gram_target, "[B, T, D]")
        check_same_shape("gram_target", gram_target, "teacher", teacher)
    prefix = check_num_prefix_tokens(num_prefix_tokens, teacher.shape[1])
    quantile = check_quantile(quantile)
    target = teacher if gram_target is None else gram_target
    acc = accumulation_dtype(student, teacher, down, up, target)
    precision = MatmulPrecision.of(acc, teacher, down, up, target)
    spec = CallSpec(teacher.shape[0], teacher.shape[1] - prefix, down.shape[1], precision)
    inputs = FusedLossesInputs(
        student, teacher, down, up, gram_target, gram, quantile, prefix, return_refined
    )
    return backends.resolve(backend, teacher.device, spec).fused_losses(inputs)


def _assign(parameter: nn.Parameter, value: Tensor) -> None:
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        mesh = cast("DTensor", parameter).device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)
    parameter.copy_(value)


class FusedLosses(nn.Module):
    """The adapter of one distilled layer, and its losses.

    Args:
        dim: D, the teacher's width.
        rank: r, at most ``dim``.
        gram: False for an intermediate layer.
        quantile: γ in [0, 1].
        num_prefix_tokens: number of leading tokens that are not patches.
        return_refined: True: ``out.refined`` holds the refined tokens.
        backend: the backend's name; None: ``SINGER_BACKEND``, or the first that can run.
        device: that of the parameters.
        dtype: that of the parameters.

    Attributes:
        down: Wd, ``[dim, rank]``, trainable.
        up: Wu, ``[rank, dim]``, trainable.

    The parameters start from a random orthonormal basis N, ``Wd = N`` and ``Wu = Nᵀ`` (the paper's
    ablation); :meth:`set_basis` sets a nullspace basis.

    Calls are typed :class:`FusedLossesOutput`: ``info`` and ``refined`` are optional whatever the
    options (the overloads of :func:`fused_losses` narrow them).

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: ``rank`` lies outside 1 to ``dim``, or an option does not fit.
    """

    def __init__(
        self,
        dim: int,
        rank: int = 64,
        *,
        gram: bool = True,
        quantile: float = 0.97,
        num_prefix_tokens: int = 1,
        return_refined: bool = False,
        backend: BackendName | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: got {dtype!r}, expected a floating dtype")
        self.dim = check_int("dim", dim, 1)
        self.rank = check_int("rank", rank, 1, dim, ", the width dim")
        self.gram = check_flag("gram", gram)
        self.quantile = check_quantile(quantile)
        self.num_prefix_tokens = check_int("num_prefix_tokens", num_prefix_tokens, 0)
        self.return_refined = check_flag("return_refined", return_refined)
        self.backend = backends.check_name(backend)
        self.down = nn.Parameter(torch.empty(self.dim, self.rank, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(self.rank, self.dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new random orthonormal basis."""
        basis = torch.empty(self.dim, self.rank, dtype=torch.float32)
        self.set_basis(nn.init.orthogonal_(basis))

    @torch.no_grad()
    def set_basis(self, basis: Tensor) -> None:
        """Set ``Wd = N`` and ``Wu = Nᵀ``.

        Sharded parameters (FSDP2's ``fully_shard``) get the first rank's basis on every rank.

        Args:
            basis: N, ``[dim, rank]``, any floating dtype and device.

        Raises:
            TypeError: it is no floating tensor.
            ValueError: its shape is wrong.
        """
        check_tensor("basis", basis, "[dim, rank]")
        if basis.shape != self.down.shape:
            raise ValueError(
                f"basis: got shape {tuple(basis.shape)}, expected {tuple(self.down.shape)}"
            )
        _assign(self.down, basis)
        _assign(self.up, basis.mT)

    def forward(
        self, student: Tensor, teacher: Tensor, gram_target: Tensor | None = None
    ) -> FusedLossesOutput:
        """Return the losses; see :func:`fused_losses`.

        Args:
            student: S, ``[B, T, dim]``.
            teacher: F, ``[B, T, dim]``, frozen.
            gram_target: R, ``[B, T, dim]``; None: the teacher.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: a shape, device or number does not fit, or ``teacher`` requires grad.
            RuntimeError: the requested backend can't run here.
        """
        return fused_losses(
            student,
            teacher,
            self.down,
            self.up,
            gram_target=gram_target,
            gram=self.gram,
            quantile=self.quantile,
            num_prefix_tokens=self.num_prefix_tokens,
            return_refined=self.return_refined,
            backend=self.backend,
        )

    if TYPE_CHECKING:  # nn.Module's is untyped

        def __call__(
            self, student: Tensor, teacher: Tensor, gram_target: Tensor | None = None
        ) -> FusedLossesOutput:
            """See :meth:`forward`."""

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return (
            f"dim={self.dim}, rank={self.rank}, gram={self.gram}, quantile={self.quantile}, "
            f"num_prefix_tokens={self.num_prefix_tokens}, backend={self.backend!r}"
        )
