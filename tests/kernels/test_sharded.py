"""FusedLosses sharded by FSDP2: built on the meta device, initialised, trained, saved."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, warnings, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from singer_kernels import FusedLosses, fused_losses

warnings.simplefilter("ignore")
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
torch.manual_seed(rank)  # every rank would draw another basis
with torch.device("meta"):
    layer = FusedLosses(6, 3)
fully_shard(layer, mesh=mesh)
layer.to_empty(device="cpu")
layer.reset_parameters()
assert isinstance(layer.down, DTensor)
down, up = layer.down.full_tensor(), layer.up.full_tensor()
torch.testing.assert_close(down.mT @ down, torch.eye(3))
assert torch.equal(up, down.mT)
both = [torch.empty(6, 3) for _ in range(2)]
dist.all_gather(both, down.detach().contiguous())
assert torch.equal(*both)
basis = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(7))).Q
layer.set_basis(basis)
assert torch.equal(layer.down.full_tensor(), basis)
student, teacher = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(1))
out = layer(student, teacher)
expected = fused_losses(student, teacher, basis, basis.mT.contiguous())
torch.testing.assert_close(out[:3], expected[:3])
(out.kd + out.outlier + out.info).backward()
assert isinstance(layer.down.grad, DTensor)
layer.reshard()
try:
    fused_losses(student, teacher, layer.down, layer.up)
except TypeError as error:
    assert str(error).startswith("down: got a DTensor, expected a plain tensor [D, r]: ")
else:
    raise AssertionError("a DTensor was taken")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_draw_one_basis(tmp_path):
    torch_distributed = pytest.importorskip("torch.distributed")
    if not torch_distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    command = [sys.executable, "-c", SCRIPT]
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for run in runs:
        errors = run.communicate(timeout=120)[1]
        assert run.returncode == 0, errors
