"""The backend's operators, and those of its kernels, which write into their arguments."""

from __future__ import annotations

from singer_kernels.backends import operators
from singer_kernels.backends.cuda import stages
from singer_kernels.backends.operators import (
    BackwardInputs,
    BackwardOutput,
    ForwardInputs,
    ForwardOutput,
    GramLossInputs,
    GramLossOutput,
    or_empty,
)
from singer_kernels.backends.precision import MatmulPrecision, full_float32

_KERNELS = (
    "cuda_refine(Tensor teacher, Tensor student, Tensor delta, int num_prefix_tokens, "
    "Tensor(a!) norms, Tensor(b!) kd_partials, Tensor(c!)? refined, Tensor(d!)? rows, "
    "Tensor(e!)? kd_difference) -> ()",
    "cuda_normalize(Tensor tokens, int num_prefix_tokens, Tensor(a!) norms, Tensor(b!) rows) -> ()",
    "cuda_outlier(Tensor norms, float quantile, Tensor(a!) threshold, Tensor(b!) squares, "
    "Tensor(c!) counts) -> ()",
    "cuda_gram_difference(Tensor gram, Tensor target_gram, Tensor(a!)? difference, "
    "Tensor(b!) squares, Tensor(c!) row_dots, Tensor(d!) target_row_dots) -> ()",
    "cuda_gram_scale(Tensor factor, Tensor norms, Tensor(a!) out) -> ()",
    "cuda_gram_gradient(Tensor product, Tensor factor, Tensor norms, Tensor row_dots, float scale, "
    "Tensor(a!) out, int num_prefix_tokens) -> ()",
    "cuda_backward_rows(Tensor hz, Tensor? grad_hz, Tensor? residual, "
    "Tensor? grad_refined_up, Tensor? norms, Tensor? threshold, Tensor? outlier_weight, "
    "Tensor? grad_kd, Tensor? grad_outlier, Tensor? grad_info, Tensor(a!)? grad_h, "
    "Tensor(b!)? v, int tokens, int width) -> ()",
    "cuda_backward_tokens(Tensor teacher, Tensor? student, Tensor delta, Tensor? grad_refined, "
    "Tensor? grad_kd, Tensor(a!)? grad_student, Tensor(b!)? refined, Tensor(c!)? grad_delta, "
    "int num_prefix_tokens) -> ()",
)

for _schema in _KERNELS:
    operators.LIBRARY.define(_schema)
operators.define("cuda")


@operators.implement("cuda", "losses_forward")
def losses_forward(x: ForwardInputs) -> ForwardOutput:
    """Run the stages ``refine``, ``outlier`` and ``gram``."""
    x = x._replace(student=x.student.contiguous(), teacher=x.teacher.contiguous())
    precision = MatmulPrecision(x.product, x.acc)
    gram_precision = MatmulPrecision(x.gram_product, x.acc)
    rows_dtype = gram_precision.storage_dtype if x.gram else None
    with full_float32(precision):
        refined = stages.run_refine(x, precision, rows_dtype)
    outlier, threshold, outlier_weight = stages.run_outlier(refined.norms, x.quantile)
    info = refined.kd.new_empty(0)
    grad_hz = grad_target = None
    if refined.rows is not None:
        target = x.teacher if x.gram_target is None else x.gram_target.contiguous()
        with full_float32(gram_precision):
            info, grad_hz, grad_target = stages.run_gram(
                refined.rows,
                refined.norms,
                target,
                x.num_prefix_tokens,
                gram_precision,
                factor=refined.hz if x.has_grad_hz else None,
                factor_is_tokens=False,
                grad_factor_dtype=gram_precision.storage_dtype,
                grad_target_dtype=gram_precision.storage_dtype if x.has_grad_target else None,
            )
    return ForwardOutput(
        kd=refined.kd,
        outlier=outlier,
        info=info,
        refined=or_empty(refined.refined, x.teacher),
        norms=refined.norms,
        threshold=threshold,
        outlier_weight=outlier_weight,
        hz=refined.hz,
        residual=or_empty(refined.residual, info, precision.storage_dtype),
        grad_hz=or_empty(grad_hz, info, gram_precision.storage_dtype),
        grad_target=or_empty(grad_target, info, gram_precision.storage_dtype),
    )


@operators.implement("cuda", "losses_backward")
def losses_backward(x: BackwardInputs) -> BackwardOutput:
    """Run the stage ``backward``."""
    x = x._replace(
        student=None if x.student is None else x.student.contiguous(),
        teacher=x.teacher.contiguous(),
        grad_refined=None if x.grad_refined is None else x.grad_refined.contiguous(),
    )
    precision = MatmulPrecision(x.product, x.acc)
    with full_float32(precision):
        grads = stages.run_backward(x, precision)
    return BackwardOutput(*(or_empty(grad, x.hz) for grad in grads))


@operators.implement("cuda", "gram_loss")
def gram_loss(x: GramLossInputs) -> GramLossOutput:
    """Run the stage ``gram`` on two tensors of tokens."""
    precision, tokens = MatmulPrecision(x.product, x.acc), x.tokens.contiguous()
    norms, rows = stages.normalized(tokens, x.num_prefix_tokens, precision)
    with full_float32(precision):
        loss, grad_tokens, grad_target = stages.run_gram(
            rows,
            norms,
            x.target.contiguous(),
            x.num_prefix_tokens,
            precision,
            factor=tokens if x.has_grad_tokens else None,
            factor_is_tokens=True,
            grad_factor_dtype=x.acc,
            grad_target_dtype=x.acc if x.has_grad_target else None,
        )
    return GramLossOutput(loss, or_empty(grad_tokens, loss), or_empty(grad_target, loss))
