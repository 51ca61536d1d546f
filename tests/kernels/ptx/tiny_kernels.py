"""Kernels of a few instructions, for the tests of the emulator."""

import torch

from ptx.emulator import Launch
from ptx.parser import parse


def run(body, *arrays, threads=32, grid=1, shared=0):
    """Run a kernel: %a0, %a1, ... are the addresses of the arrays, %t the thread, %b the block."""
    params = ", ".join(f".param .u64 p{k}" for k in range(len(arrays)))
    loads = "".join(f"ld.param.u64 %a{k}, [p{k}];" for k in range(len(arrays)))
    text = f"""
    .version 8.0
    .target sm_90a
    .extern .shared .align 16 .b8 memory[];
    .visible .entry kernel({params})
    {{
      .reg .pred %p<9>; .reg .b16 %h<99>; .reg .b32 %r<199>; .reg .b64 %d<99>, %a<9>;
      .reg .b32 %t, %b, %at, %m;
      {loads}
      mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x; mov.u32 %m, memory;
      {body}
      ret;
    }}"""
    tensors = [torch.from_numpy(x) for x in arrays]
    arguments = [(f"array {k}", x) for k, x in enumerate(tensors)]
    Launch(parse(text)["kernel"], (grid, 1, 1), threads, arguments, shared).run()
