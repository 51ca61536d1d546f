"""A user's script, from the snippets in README.md: ``mypy --strict`` accepts it."""

import torch
from torch import Tensor

from singer_kernels import FusedLosses, FusedLossesOutput, fused_losses


def step(student: Tensor, teacher: Tensor, down: Tensor, up: Tensor) -> Tensor:
    out = fused_losses(student, teacher, down, up)
    loss = out.kd + 0.01 * out.outlier + out.info
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]  # torch's
    inner = fused_losses(student, teacher, down, up, gram=False, return_refined=True)
    refined: Tensor = inner.refined
    missing: None = inner.info
    last = fused_losses(student, refined.detach(), down, up, gram_target=refined, backend="torch")
    absent: None = last.refined
    assert missing is absent
    return last.info


student, teacher = torch.randn(2, 5, 1024, requires_grad=True), torch.randn(2, 5, 1024)
adapter = FusedLosses(dim=1024, rank=64)
out = adapter(student, teacher)
typed: FusedLossesOutput = out
step(student, teacher, adapter.down, adapter.up)
