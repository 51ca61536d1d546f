"""Count bytes and operations of each provider: a regression check without timing.

    cd benchmarks && python -m harness.counting [--write]

Prints the counts of a forward and backward pass of every provider as JSON; ``--write`` writes them
to ``benchmarks/expected/counts.json``, which a test compares with the code.

What is counted, on a small workload:

- eager code and backend ``"torch"``: torch's operators; each reads its operands and writes its
  results once; views are free;
- ``"cuda"``: its kernels, and torch's operators between them;
- ``"cpu"``: arguments and results of its operators, not the memory traffic inside them;
- ``"triton"``: its kernel launches; each reads or writes every tensor argument once.

``operations`` are those of matrix products (a multiply-add is two); compiled kernels' are not
counted. ``saved`` is the memory saved for the backward.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from harness.memory import saved_for_backward
from harness.oracle import grad_outputs_for
from harness.providers import build, unavailable_reason
from harness.workloads import PRECISIONS, Workload, make_inputs

WORKLOAD = Workload("small", 2, 48, 128, 16)
EXPECTED = Path(__file__).parents[1] / "expected" / "counts.json"
Count = dict[str, int]


def _tensor_bytes(tensor: Tensor) -> int:
    # An expanded dimension (stride 0) is in memory once.
    sizes = [s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    count = 1
    for size in sizes:
        count *= size
    return count * tensor.element_size()


class Counter(TorchDispatchMode):
    """Counts operators, the bytes they read and write, and the operations of matrix products.

    Attributes:
        total: ``operators``, ``bytes`` and ``operations``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total: Count = {"operators": 0, "bytes": 0, "operations": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        kwargs = kwargs or {}
        # On meta tensors a compiled kernel has nothing to run: count its arguments alone.
        is_kernel = func.namespace == "singer_kernels" and args[0].device.type == "meta"
        out = None if is_kernel else func(*args, **kwargs)
        if func.is_view or func in _FREE:
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        # A tensor written in place is both argument and result: counted twice, read and written.
        self.total["operators"] += 1
        self.total["bytes"] += sum(map(_tensor_bytes, tensors))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total["operations"] += formula(*args, **kwargs, out_val=out)
        return out


_aten = torch.ops.aten
_FREE = {  # neither read nor write their tensors' data
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.empty_strided.default,
    _aten._unsafe_view.default,
    _aten.detach.default,
    _aten.is_same_size.default,
}


def count_pass(name: str, precision: str) -> dict[str, Count]:
    """Return the counts of a provider's forward and backward, on CPU tensors.

    Args:
        name: ``eager``, ``eager-masked``, ``torch`` or ``cpu``.
        precision: ``fp32`` or ``bf16``.

    Returns:
        ``operators``, ``bytes`` and ``operations`` of ``forward`` and ``backward``, and ``saved``
        with ``forward``.
    """
    inputs = make_inputs(WORKLOAD, PRECISIONS[precision], torch.device("cpu"))
    loss = build(name)
    loss(inputs)  # one-time work of a first call is not counted
    with Counter() as forward:
        losses = loss(inputs)
    saved = saved_for_backward(losses, inputs)
    grad_outputs = grad_outputs_for(losses)
    with Counter() as backward:
        torch.autograd.grad(losses, inputs.trained, grad_outputs)
    return {"forward": {**forward.total, "saved": saved}, "backward": backward.total}


def count_cuda() -> Count:
    """Return the counts of forward and backward of the backend ``"cuda"`` in float32."""
    from singer_kernels import (
        resources,
    )  # imported late: it imports Triton, which reads its environment once
    from singer_kernels.backends.cuda import ops

    with Counter() as counter:
        resources.training_step(
            ops,
            torch.float32,
            WORKLOAD.rank,
            WORKLOAD.patches,
            images=WORKLOAD.images,
            width=WORKLOAD.width,
        )
    return counter.total


def count_triton(precision: str) -> list[tuple[str, int]]:
    """Return the kernel launches of the backend ``"triton"`` on Hopper: name and bytes of each."""
    from singer_kernels import resources

    operand = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    return resources.traffic(
        90, operand, WORKLOAD.rank, WORKLOAD.patches, images=WORKLOAD.images, width=WORKLOAD.width
    )


def counts() -> dict[str, Any]:
    """Return the counts of all providers that can run here: provider to precision to counts."""
    counted: dict[str, Any] = {}
    for name in ("eager", "eager-masked", "torch", "cpu"):
        if unavailable_reason(name, torch.device("cpu")) is None:
            counted[name] = {
                precision: count_pass(name, precision) for precision in ("fp32", "bf16")
            }
    counted["cuda"] = {"fp32": count_cuda()}
    counted["triton"] = {precision: count_triton(precision) for precision in ("fp32", "bf16")}
    # Through JSON, so that they equal counts read from a file: tuples become lists.
    return json.loads(json.dumps(counted))


def main() -> None:
    """Print or write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help=f"into {EXPECTED.name}")
    text = json.dumps(counts(), indent=1)
    if parser.parse_args().write:
        EXPECTED.parent.mkdir(exist_ok=True)
        EXPECTED.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
