"""The backend ``"reference"``: the specification itself, differentiated by autograd."""

from __future__ import annotations

from singer_kernels import reference
from singer_kernels.backends import Backend
from singer_kernels.backends.gradients import once_differentiable
from singer_kernels.types import FusedLossesInputs, FusedLossesOutput


class ReferenceBackend(Backend):
    """Runs wherever torch runs."""

    def fused_losses(self, inputs: FusedLossesInputs) -> FusedLossesOutput:
        """See :func:`singer_kernels.reference.fused_losses`."""
        target = inputs.gram_target
        return reference.fused_losses(
            once_differentiable(inputs.student),
            inputs.teacher,
            once_differentiable(inputs.down),
            once_differentiable(inputs.up),
            gram_target=None if target is None else once_differentiable(target),
            gram=inputs.gram,
            quantile=inputs.quantile,
            num_prefix_tokens=inputs.num_prefix_tokens,
            return_refined=inputs.return_refined,
        )


backend = ReferenceBackend()
