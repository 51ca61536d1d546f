"""The backends "triton" and "cuda" on a device: ``pytest -m gpu``.

Truth is the reference in float64 on the device; the yardstick is the reference in the same dtype
there, as in ``test_oracle.py``. Equal bits are asked only of repeats of the same kernel: compilers
fuse multiply and add, so that even q may differ from ``torch.quantile`` in its last bit.
"""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from bounds import cancellation, unit
from cases import WEIGHTS, Shape, outlier_case, random_case, tied_case, total
from torch.utils.checkpoint import checkpoint

from singer_kernels import FusedLosses, extension, fused_losses, gram_loss

pytestmark = pytest.mark.gpu

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
BACKENDS = [
    "triton",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not extension.has_kernels("cuda_refine", "cuda"),
            reason="the extension is built without CUDA",
        ),
    ),
]
OUTPUTS = ("kd", "outlier", "info", "refined", "norms", "threshold")
GRADIENTS = ("student", "down", "up", "gram_target")

# A shape, and why. The first two meet every kind and mix; the others the first mixes.
SHAPES = {
    "ViT-L/16 at 224 px": Shape(2, 1, 196, 1024, 64),
    "no size a multiple of a tile, rows not aligned": Shape(3, 1, 97, 1000, 17),
    "DINOv2-L/14 at 518 px: pairs of tiles": Shape(1, 1, 1369, 1024, 64),
    "the most patches, registers": Shape(1, 5, 4096, 384, 64),
    "the least of everything": Shape(1, 0, 1, 32, 1),
    "the widest": Shape(2, 1, 50, 4096, 256),
    "ViT-g, one patch past a tile": Shape(2, 4, 65, 1408, 100),
    "ViT-Tiny: no identity": Shape(2, 1, 196, 192, 64),
    "an odd width": Shape(2, 1, 49, 127, 3),
}
# Student, teacher and adapter; the dtype of autocast; the products' dtype.
MIXES = {
    "bfloat16": ((BF16, BF16, BF16), None, BF16),
    "float32": ((F32, F32, F32), None, F32),
    "float16": ((F16, F16, F16), None, F16),
    "bfloat16 features, float32 adapter": ((BF16, BF16, F32), None, F32),
    "autocast": ((F32, F32, F32), BF16, BF16),
    "autocast, bfloat16 features": ((BF16, BF16, F32), BF16, BF16),
    "autocast to float16": ((F32, F32, F32), F16, F16),
}
# The roundings of the products' operands; a float32 one is three TF32 products, good to 22 bits.
UNITS = {BF16: unit(BF16), F16: unit(F16), F32: 2**-22}
KINDS = ("random", "target", "outlier", "tied")
COMBINATIONS = [
    pytest.param(kind, SHAPES[shape], *MIXES[mix], id=f"{kind}, {shape}, {mix}")
    for number, shape in enumerate(SHAPES)
    for kind in (KINDS if number < 2 else KINDS[:2])
    for mix in (MIXES if number < 2 else list(MIXES)[:3])
    if mix != "float16" or SHAPES[shape].rank <= 128  # left to the backend torch
]


class Losses(torch.nn.Module):
    """The losses of ``FusedLosses`` as a tuple of tensors."""

    def __init__(self, backend):
        super().__init__()
        self.adapter = FusedLosses(200, 20, backend=backend, device="cuda", dtype=BF16)

    def forward(self, student, teacher):
        out = self.adapter(student, teacher)
        return out.kd, out.outlier, out.info


# First of all: no other test has compiled or loaded these kernels.
@pytest.mark.parametrize("backend", BACKENDS)
def test_graphed_callables_need_no_call_before(backend):
    torch.manual_seed(0)
    losses = Losses(backend)

    def step(function, seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        student, teacher = torch.randn(
            2, 2, 50, 200, generator=generator, device="cuda", dtype=BF16
        )
        out = function(student.requires_grad_(), teacher)
        leaves = [student, *losses.parameters()]
        return [*out, *torch.autograd.grad(total_of(out), leaves)]

    def total_of(out):
        return sum(weight * loss for weight, loss in zip(WEIGHTS, out, strict=True))

    sample = torch.randn(2, 50, 200, device="cuda", dtype=BF16)
    eager = losses.forward
    graphed = torch.cuda.make_graphed_callables(losses, (sample.clone().requires_grad_(), sample))
    for seed in range(2):
        for found, expected in zip(step(graphed, seed), step(eager, seed), strict=True):
            assert torch.equal(found, expected)


def results(case, dtypes, backend, autocast=None, exact=False):
    tensors = case.tensors(*dtypes, device="cuda")
    if exact:
        tensors = {
            name: None if x is None else x.detach().double().requires_grad_(name != "teacher")
            for name, x in tensors.items()
        }
    with torch.autocast("cuda", autocast or BF16, enabled=autocast is not None):
        out = case.run(tensors, return_refined=True, backend=backend)
    # A random upstream gradient for every output.
    generator = torch.Generator("cuda").manual_seed(1)
    back = torch.randn(out.refined.shape, generator=generator, device="cuda", dtype=F32)
    loss = total(out) + (out.refined * back.to(out.refined.dtype)).sum() / back.numel()
    loss.backward()
    found = {name: getattr(out, name).detach().double() for name in OUTPUTS}
    for name in GRADIENTS:
        if tensors[name] is not None:
            found[f"d_{name}"] = tensors[name].grad.double()
    return found


def make(kind, shape):
    if kind == "target":
        return random_case(shape, 0.9, with_target=True)
    return {"random": random_case, "outlier": outlier_case, "tied": tied_case}[kind](shape, 0.9)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("kind", "shape", "dtypes", "autocast", "product"), COMBINATIONS)
def test_no_less_accurate_than_the_reference(kind, shape, dtypes, autocast, product, name):
    case = make(kind, shape).rounded(*dtypes)
    exact = results(case, dtypes, "reference", exact=True)
    reference = results(case, dtypes, "reference", autocast)
    found = results(case, dtypes, name, autocast)
    longest = max(shape.width, shape.patches, shape.images * (shape.prefix + shape.patches))
    slack = 4 * math.sqrt(longest) * (UNITS[product] + cancellation(case) * unit(F32))
    assert found.keys() == exact.keys()
    for output, wanted in exact.items():
        # With one patch E is 0; it lies within the slack of that, and what depends on it too.
        is_zero = shape.patches == 1 and output in ("info", "d_gram_target")
        floor = slack if is_zero else 1e-300
        scale = wanted.abs().max().clamp_min(floor)
        error, allowed = ((x[output] - wanted).abs().max() / scale for x in (found, reference))
        assert error <= allowed + slack, output


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_gram_loss_alone(dtype, name):
    generator = torch.Generator().manual_seed(0)
    tokens, target = (
        torch.randn(2, 200, 384, generator=generator).to("cuda", dtype).requires_grad_()
        for _ in range(2)
    )
    errors = {}
    exact = gram_loss(tokens.double(), target.double(), backend="reference")
    wanted = torch.autograd.grad(exact, [tokens, target])
    for backend in ("reference", name):
        loss = gram_loss(tokens, target, backend=backend)
        grads = torch.autograd.grad(loss, [tokens, target])
        pairs = [(loss, exact), *zip(grads, wanted, strict=True)]
        errors[backend] = [
            ((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in pairs
        ]
    slack = 4 * math.sqrt(384) * UNITS[dtype]
    for error, allowed in zip(errors[name], errors["reference"], strict=True):
        assert error <= allowed + slack


# --- the same bits, whatever happens around -------------------------------------------------------

STEP = (Shape(4, 1, 196, 384, 64), (BF16, BF16, F32))


def one_step(case, dtypes, backend="triton", **options):
    found = results(case, dtypes, backend, **options)
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["random", "target"])
def test_twenty_repeats_give_the_same_bits(kind, backend):
    case = make(kind, STEP[0])
    first = one_step(case, STEP[1], backend, autocast=BF16)
    for _ in range(20):
        again = one_step(case, STEP[1], backend, autocast=BF16)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_stream(backend):
    case = make("random", STEP[0])
    expected = one_step(case, STEP[1], backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = results(case, STEP[1], backend)
    torch.cuda.current_stream().wait_stream(stream)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes a second CUDA device")
def test_tensors_on_another_device_than_the_current_one():
    case = make("random", STEP[0])
    inputs = {
        name: None if x is None else x.detach().to("cuda:1")
        for name, x in case.tensors(F32, F32, F32).items()
    }
    expected = case.run(case.tensors(F32, F32, F32, device="cuda"), backend="triton")
    found = case.run(inputs, backend="triton")
    assert torch.cuda.current_device() == 0
    assert torch.equal(found.kd.cpu(), expected.kd.cpu())


def flat_step(case, student, teacher, down, up):
    out = fused_losses(student, teacher, down, up, quantile=case.gamma, backend="triton")
    return total(out)


def training_inputs(case):
    tensors = case.tensors(BF16, BF16, F32, device="cuda")
    return [tensors[name] for name in ("student", "teacher", "down", "up")]


def test_cuda_graph_capture():
    case = make("random", STEP[0])
    static = training_inputs(case)
    leaves = [static[0], *static[2:]]

    def step():
        for leaf in leaves:
            leaf.grad = None
        flat_step(case, *static).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for leaf in leaves:
        leaf.grad = None
    with torch.cuda.graph(graph):
        flat_step(case, *static).backward()
    with torch.no_grad():
        static[1].mul_(1.5)
    graph.replay()
    replayed = [leaf.grad.clone() for leaf in leaves]
    step()
    for leaf, grad in zip(leaves, replayed, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("wrap", ["compiled", "checkpointed"])
def test_wrapped_gives_the_same(wrap):
    case = make("random", STEP[0])
    gradients = []
    for wrapped in (False, True):
        inputs = training_inputs(case)

        def function(*given):
            return flat_step(case, *given)

        if wrapped and wrap == "compiled":
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True)
        with torch.autocast("cuda", BF16):
            if wrapped and wrap == "checkpointed":
                loss = checkpoint(function, *inputs, use_reentrant=False)
            else:
                loss = function(*inputs)
        loss.backward()
        gradients.append([inputs[index].grad for index in (0, 2, 3)])
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def test_no_synchronisation():
    case = make("random", STEP[0])
    inputs = training_inputs(case)
    flat_step(case, *inputs).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        flat_step(case, *inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [196, 600])  # rows, then pairs of tiles
def test_more_than_2_to_the_31_elements(patches):
    width, rank = 1024, 16
    images = 2**31 // ((patches + 1) * width) + 2
    if torch.cuda.get_device_properties(0).total_memory < 48 * 2**30:
        pytest.skip("features of 2^31 entries and their gradients take 48 GiB of device memory")
    shape = (images, patches + 1, width)
    generator = torch.Generator("cuda").manual_seed(0)
    teacher = torch.randn(shape, generator=generator, device="cuda", dtype=BF16)
    student = torch.randn(shape, generator=generator, device="cuda", dtype=BF16)
    down, up = (
        torch.randn(size, generator=generator, device="cuda") / 32
        for size in ((width, rank), (rank, width))
    )
    down, up = down.requires_grad_(), up.requires_grad_()
    student.requires_grad_()

    def step(part):
        leaf = student[part].detach().requires_grad_()
        with torch.autocast("cuda", BF16):
            out = fused_losses(leaf, teacher[part], down, up, backend="triton")
        grads = torch.autograd.grad(out.kd + 100 * out.info, [leaf, down, up])
        return out, grads

    out, (d_student, d_down, d_up) = step(slice(None))
    # Means over images: the whole is the mean of its parts, weighted by their sizes.
    parts = [slice(0, images // 2), slice(images // 2, images)]
    halves = [step(part) for part in parts]
    shares = [(part.stop - part.start) / images for part in parts]
    assert torch.equal(out.norms, torch.cat([half.norms for half, _ in halves]))
    assert torch.equal(out.threshold, torch.cat([half.threshold for half, _ in halves]))
    for part, share, (_, grads) in zip(parts, shares, halves, strict=True):
        scaled = grads[0][-1].double() * share
        torch.testing.assert_close(d_student[part][-1].double(), scaled, rtol=2**-7, atol=0)
    for index, whole in ((1, d_down), (2, d_up)):
        mean = sum(share * grads[index] for share, (_, grads) in zip(shares, halves, strict=True))
        assert (whole - mean).abs().max() <= 2**-9 * mean.abs().max()
    losses = [
        sum(share * half[index] for share, (half, _) in zip(shares, halves, strict=True))
        for index in (0, 2)
    ]
    # The parts of a loss are summed in 1,024 chains; here of up to 200 parts, 2⁻²⁴ each at worst.
    whole = torch.stack([out.kd, out.info])
    torch.testing.assert_close(whole, torch.stack(losses), rtol=200 * 2**-24, atol=0)


def test_memory_held_for_the_backward():
    # Of eager's, which keeps F̂, both normalised rows and both Gram matrices: at most a tenth.
    case = make("random", Shape(16, 1, 196, 1024, 64))
    held = {}
    for backend in ("reference", "triton"):
        inputs = training_inputs(case)
        before = torch.cuda.memory_allocated()
        out = fused_losses(*inputs, backend=backend)
        held[backend] = torch.cuda.memory_allocated() - before
        total(out).backward()
        del out, inputs
    assert held["triton"] <= 0.1 * held["reference"]


# --- the sanitizer --------------------------------------------------------------------------------

SANITIZED = """
import torch
from singer_kernels import fused_losses
torch.manual_seed(0)
for patches, target, dtype in ((20, False, torch.bfloat16), (20, True, torch.float32),
                               (520, False, torch.bfloat16)):
    x, y, z = (torch.randn(2, patches + 1, 200, device="cuda", dtype=dtype) for _ in range(3))
    down = torch.randn(200, 20, device="cuda", dtype=dtype) / 14
    up = torch.randn(20, 200, device="cuda", dtype=dtype) / 14
    inputs = [t.requires_grad_() for t in (x, down, up, z)]
    out = fused_losses(x, y, down, up, gram_target=z if target else None, return_refined=True,
                       backend="triton")
    (out.kd + out.outlier + out.info + out.refined.float().mean()).backward()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None,
    reason="compute-sanitizer, of the CUDA toolkit, is not installed",
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-regex",
        "kernel_substring=_kernel",
        sys.executable,
        "-c",
        SANITIZED,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout


def test_the_automatic_choice_on_a_device():
    x = torch.randn(1, 5, 64, device="cuda")
    down, up = torch.randn(64, 4, device="cuda"), torch.randn(4, 64, device="cuda")
    automatic, explicit = (fused_losses(x, x, down, up, backend=name) for name in (None, "triton"))
    assert torch.equal(automatic.info, explicit.info)
    # float64 is left to the backend that computes in it.
    wide = fused_losses(x.double(), x.double(), down.double(), up.double())
    assert wide.info.dtype == F64
