"""Bytes and operations of each provider, counted, not timed: a guard that needs no clock.

    cd benchmarks && python -m harness.counting [--write]

Prints what a forward and backward pass of every provider hands its operators, as JSON;
``--write`` puts it into ``benchmarks/expected/counts.json``, which a test compares with the code.

What is counted, on a small workload:

- of eager code and of the backend ``"torch"``: torch's operators, each reading its operands and
  writing its results once; what only looks at memory in another way (views) is free;
- of ``"cuda"``: the same of what stands between its kernels, and the kernels;
- of ``"cpu"``: its operators, from outside: what they read and write, and not what they do inside;
- of ``"triton"``: its kernels' launches, each reading or writing every tensor it is handed once.

An operation is one of a matrix product's (a multiply-add is two); those of compiled kernels are not
counted. ``held`` is the memory kept for the backward.
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

from harness.memory import held_for_backward
from harness.oracle import upstream_of
from harness.providers import build, unavailable_reason
from harness.workloads import PRECISIONS, Workload, make_inputs

WORKLOAD = Workload("small", 2, 48, 128, 16)
EXPECTED = Path(__file__).parents[1] / "expected" / "counts.json"
Count = dict[str, int]


def _moved(tensor: Tensor) -> int:
    # What an expanded dimension repeats is in memory once.
    sizes = [s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    count = 1
    for size in sizes:
        count *= size
    return count * tensor.element_size()


class Counter(TorchDispatchMode):
    """Counts operators, the bytes they read and write, and the operations of their products.

    Attributes:
        total: ``operators``, ``bytes`` and ``operations``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total: Count = {"operators": 0, "bytes": 0, "operations": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        kwargs = kwargs or {}
        # Without data, there is nothing for a compiled kernel to do.
        is_kernel = func.namespace == "singer_kernels" and args[0].device.type == "meta"
        out = None if is_kernel else func(*args, **kwargs)
        if func.is_view or func in _FREE:
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        # A tensor that is written in place is read and written.
        self.total["operators"] += 1
        self.total["bytes"] += sum(map(_moved, tensors))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total["operations"] += formula(*args, **kwargs, out_val=out)
        return out


_aten = torch.ops.aten
_FREE = {  # they neither read nor write what they are handed
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
    """Return what a provider's forward and backward count, on CPU tensors.

    Args:
        name: ``eager``, ``eager-masked``, ``torch`` or ``cpu``.
        precision: ``fp32`` or ``bf16``.

    Returns:
        For ``forward`` and ``backward``: operators, bytes and operations; ``held`` with the former.
    """
    inputs = make_inputs(WORKLOAD, PRECISIONS[precision], torch.device("cpu"))
    loss = build(name)
    loss(inputs)  # what a first call does once is not counted
    with Counter() as forward:
        losses = loss(inputs)
    held = held_for_backward(losses, inputs)
    upstream = upstream_of(losses)
    with Counter() as backward:
        torch.autograd.grad(losses, inputs.trained, upstream)
    return {"forward": {**forward.total, "held": held}, "backward": backward.total}


def count_cuda() -> Count:
    """Return what a step of the backend ``"cuda"`` counts in float32."""
    from singer_kernels import resources  # it imports Triton, for good as it is then set up
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
    """Return the launches of a step of the backend ``"triton"`` on Hopper, with their bytes."""
    from singer_kernels import resources

    operand = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    return resources.traffic(
        90, operand, WORKLOAD.rank, WORKLOAD.patches, images=WORKLOAD.images, width=WORKLOAD.width
    )


def counts() -> dict[str, Any]:
    """Return all counts that can be taken here: provider, precision, what was counted."""
    found: dict[str, Any] = {}
    for name in ("eager", "eager-masked", "torch", "cpu"):
        if unavailable_reason(name, torch.device("cpu")) is None:
            found[name] = {precision: count_pass(name, precision) for precision in ("fp32", "bf16")}
    found["cuda"] = {"fp32": count_cuda()}
    found["triton"] = {precision: count_triton(precision) for precision in ("fp32", "bf16")}
    # As it is read from a file: tuples are lists there.
    return json.loads(json.dumps(found))


def main() -> None:
    """Print or write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {EXPECTED.name}")
    text = json.dumps(counts(), indent=1)
    if parser.parse_args().write:
        EXPECTED.parent.mkdir(exist_ok=True)
        EXPECTED.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
