"""Execute compiled GPU kernels on a CPU: an emulator of PTX in NumPy, as a test tool.

- ``parser``: PTX text to kernels and instructions;
- ``memory``: global memory, a range of addresses for each tensor; shared memory with its checks;
- ``arithmetic``, ``instructions``, ``tensor_cores``: each instruction as a function on all lanes;
- ``emulator``: a launch: control flow, barriers, predicates;
- ``triton_driver``, ``cuda_driver``: run the backends ``"triton"`` and ``"cuda"`` on CPU tensors,
  compiled as for a GPU.

What it checks: the code that Triton and nvcc generate, instruction by instruction (layouts,
conversions, predicates, addresses); each access lies within one tensor and is aligned; no read of
shared memory that nobody wrote; no two accesses of one shared word by different warps without a
barrier in between, one of them a write; no result of an asynchronous copy or of ``wgmma`` is used
before the wait for it: both take place as late as their wait allows.

What it does not: ptxas and the machine code, memory order between blocks (blocks run in any order
and never communicate), timing, tcgen05 (sm_100), the driver, streams and capture. Lanes of a warp
run in lockstep: races within a warp are not found.
"""
