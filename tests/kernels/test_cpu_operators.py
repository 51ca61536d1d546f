"""The compiled CPU operators: fuzzing, instruction sets, threads, groups of images, precision.

No input from Python may crash the process: a call raises, or returns the shapes and dtypes of the
fake implementation.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from singer_kernels import backends

REASON = backends.unavailable_reason("cpu", torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACC = [torch.float32, torch.float64]
ODD_DTYPES = [*DTYPES, torch.int64, torch.bool, torch.complex64]

# An argument is invalid if a draw from ODD is 0, so that most calls are valid.
SIZES = st.integers(1, 6)
ODD = st.integers(0, 19)


@st.composite
def tensors(draw, shape):
    """Draw a tensor of any dtype and strides; its shape and dtype are seldom invalid."""
    shape = list(shape)
    wrong = draw(ODD)
    if wrong == 0 and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 7))
    elif wrong == 1:
        shape = shape[:-1] if draw(st.booleans()) else [*shape, 1]
    dtype = draw(st.sampled_from(ODD_DTYPES if draw(ODD) == 0 else DTYPES))
    layout = draw(st.integers(0, 4))
    if layout == 1 and len(shape) > 1:  # transposed
        return torch.ones(shape[::-1], dtype=dtype).permute(*range(len(shape) - 1, -1, -1))
    if layout == 2:  # every second entry
        return torch.ones([2 * size for size in shape], dtype=dtype)[
            (slice(None, None, 2),) * len(shape)
        ]
    if layout == 3:  # all strides 0
        return torch.ones([1] * len(shape), dtype=dtype).expand(shape)
    odd = draw(ODD) if layout == 4 else None
    if odd == 0:
        return torch.ones(shape, dtype=torch.float32).to_sparse()
    if odd in (1, 2) and 0 not in shape:  # unaligned
        data = bytearray(math.prod(shape) * dtype.itemsize + 1)
        return torch.frombuffer(data, dtype=dtype, offset=1).view(shape)
    tensor = torch.ones(shape, dtype=dtype)
    if tensor.is_floating_point() and tensor.numel() and draw(ODD) < 3:
        tensor.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), 0.0, 1e30]))
    return tensor


def saved(draw, shape, acc):
    """Draw a tensor saved by the forward: seldom of another dtype or shape, or None."""
    wrong = draw(ODD)
    if wrong == 0:
        return draw(tensors(shape))
    return None if wrong == 1 else torch.ones(shape, dtype=acc)


def or_none(draw, strategy):
    return draw(strategy) if draw(st.booleans()) else None


@st.composite
def calls(draw):
    """Draw an operator's name and its arguments."""
    images, prefix, patches = draw(SIZES), draw(st.integers(0, 2)), draw(SIZES)
    if draw(ODD) == 0:
        patches = 50  # more than a block of rows
    width, rank, acc = draw(SIZES), draw(SIZES), draw(st.sampled_from(ACC))
    if draw(ODD) == 0:
        # More than a panel width or a K block, and not a multiple of either.
        width, rank = draw(st.sampled_from([(67, 35), (300, 20)]))
    shape = (images, prefix + patches, width)
    if draw(ODD) == 0:
        prefix = draw(st.sampled_from([-1, prefix + patches, 2**40]))
    if draw(ODD) == 0:
        acc = draw(st.sampled_from(ODD_DTYPES))
    product = draw(st.sampled_from(DTYPES if draw(ODD) else ODD_DTYPES))
    some_acc = acc if acc in ACC else torch.float32
    name = draw(st.sampled_from(["losses_forward", "losses_backward", "gram_loss"]))
    flags = [draw(st.booleans()) for _ in range(4)]
    if name == "gram_loss":
        return name, (draw(tensors(shape)), draw(tensors(shape)), prefix, *flags[:2], acc, product)
    if name == "losses_forward":
        gram = draw(st.booleans())
        quantile = draw(st.sampled_from([0.0, 0.5, 0.97, 1.0, -1.0, float("nan")]))
        target = or_none(draw, tensors(shape)) if gram or draw(ODD) == 0 else None
        if draw(ODD):  # the combinations that the backend requests
            flags[2] &= gram
            flags[3] = flags[3] and target is not None
        return name, (
            draw(tensors(shape)),
            draw(tensors(shape)),
            draw(tensors((width, rank))),
            draw(tensors((rank, width))),
            target,
            gram,
            quantile,
            prefix,
            *flags,
            acc,
            product,
            draw(st.sampled_from(DTYPES)),
        )
    pairs = (images, patches)
    dtypes = [or_none(draw, st.sampled_from(DTYPES)) for _ in range(3)]
    return name, (
        draw(tensors(shape)) if draw(ODD) else None,
        draw(tensors(shape)),
        draw(tensors((rank, width))),
        saved(draw, (*pairs, 2 * rank), some_acc),
        saved(draw, (*pairs, 2 * rank), some_acc),
        saved(draw, (*pairs, rank), some_acc),
        saved(draw, pairs, some_acc),
        saved(draw, (images,), some_acc),
        saved(draw, (), some_acc),
        *(or_none(draw, tensors(())) for _ in range(3)),
        or_none(draw, tensors(shape)),
        prefix,
        acc,
        product,
        *dtypes,
    )


def shapes_of(outputs):
    return [(tuple(out.shape), out.dtype) for out in outputs]


OUTCOMES = {"returned": 0, "raised": 0}


@settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(calls())
def check_one(call):
    name, arguments = call
    operator = getattr(torch.ops.singer_kernels, f"cpu_{name}")
    try:
        outputs = operator(*arguments)
    except (RuntimeError, TypeError, NotImplementedError):
        OUTCOMES["raised"] += 1
        return
    OUTCOMES["returned"] += 1
    with FakeTensorMode() as mode:
        expected = operator(
            *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments)
        )
    assert shapes_of(outputs) == shapes_of(expected)


@pytest.mark.slow
def test_two_thousand_calls_raise_or_return():
    OUTCOMES.update(returned=0, raised=0)
    check_one()
    # Both outcomes are frequent, so that both are tested.
    assert min(OUTCOMES.values()) >= 400, OUTCOMES


CAPABILITY_SCRIPT = """
import torch
from singer_kernels import extension
from singer_kernels import fused_losses, reference

assert extension.load() is None
assert extension.cpu_capability() == {capability!r}, extension.cpu_capability()
generator = torch.Generator().manual_seed(0)
for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
    # No size is a multiple of a vector, panel or tile.
    student, teacher, target = (
        torch.randn(3, 1 + 61, 131, generator=generator, dtype=dtype) for _ in range(3)
    )
    down = torch.randn(131, 37, generator=generator, dtype=dtype) / 131**0.5
    up = 0.1 * torch.randn(37, 131, generator=generator, dtype=dtype)
    found = []
    for backend in ("reference", "cpu"):
        leaves = [x.clone().requires_grad_() for x in (student, down, up, target)]
        out = fused_losses(
            leaves[0], teacher, *leaves[1:3], gram_target=leaves[3], return_refined=True,
            backend=backend,
        )
        loss = out.kd + out.outlier + out.info + (out.refined * target).mean()
        found.append([out.kd, out.outlier, out.info, *torch.autograd.grad(loss, leaves)])
    for expected, actual in zip(*found, strict=True):
        assert (expected - actual).abs().max() <= limit * expected.abs().max()
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_cpu_capability(capability):
    from singer_kernels import extension

    order = ["baseline", "avx2", "avx512"]
    if order.index(capability) > order.index(extension.cpu_capability()):
        pytest.skip(f"the processor has no {capability}")
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY_SCRIPT.format(capability=capability)],
        env={"SINGER_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2", "PATH": ""},
        cwd=Path(extension.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_cpu_capability_is_named(monkeypatch):
    from singer_kernels import extension

    monkeypatch.setattr(extension, "_outcomes", {})
    monkeypatch.setenv("SINGER_CPU_CAPABILITY", "wide")
    assert "SINGER_CPU_CAPABILITY: got 'wide', expected one of baseline" in str(extension.load())


def test_a_library_of_another_version_is_not_chosen(monkeypatch):
    from singer_kernels import extension

    other = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    monkeypatch.setattr(extension, "LIBRARY", other)
    monkeypatch.setattr(extension, "_outcomes", {other: None})
    assert extension.cpu_capability() is None
    reason = backends.load("cpu").unavailable_reason(torch.device("cpu"), explicit=False)
    assert reason == "the compiled extension is the build of another version: build it again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("patches", [5, 300])
@pytest.mark.parametrize("prefix", [0, 1])
def test_the_number_of_threads_changes_no_bit(patches, prefix, dtype):
    from singer_kernels import fused_losses

    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(5, prefix + patches, 41, generator=generator, dtype=dtype) for _ in range(2)
    )
    down, up = (0.3 * torch.randn(s, generator=generator, dtype=dtype) for s in ((41, 6), (6, 41)))
    leaves = [x.requires_grad_() for x in (student, down, up)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = fused_losses(student, teacher, down, up, num_prefix_tokens=prefix, backend="cpu")
            losses = (out.kd, out.outlier, out.info)
            found.append([*losses, *torch.autograd.grad(sum(losses), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def agrees_with_the_reference(call, leaves):
    """Return whether losses and gradients equal the reference's; for float64 leaves."""
    found = []
    for backend in ("reference", "cpu"):
        losses = call(backend)
        grads = torch.autograd.grad(sum(losses), leaves, allow_unused=True)
        found.append([*losses, *(grad for grad in grads if grad is not None)])
    pairs = list(zip(*found, strict=True))
    return len(pairs) > 3 and all(
        (expected - actual).abs().max() <= 1e-12 * expected.abs().max()
        for expected, actual in pairs
    )


SIZES_OF_GROUPS = [
    pytest.param(70, 7, id="several images per block of rows, several groups of images"),
    pytest.param(3, 33, id="an image is one row longer than a block"),
    pytest.param(5, 300, id="groups of three images and of two"),
    pytest.param(1, 1100, id="an image larger than a group"),
]


@pytest.fixture
def two_threads():
    """Fix the number of threads, on which the size of a group of images depends."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("images", "patches"), SIZES_OF_GROUPS)
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.usefixtures("two_threads")
def test_blocks_and_groups(images, patches, with_target):
    from singer_kernels import fused_losses

    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    student, teacher, target = (torch.randn(images, 2 + patches, 21, **options) for _ in range(3))
    down, up = (0.3 * torch.randn(size, **options) for size in ((21, 5), (5, 21)))
    leaves = [x.requires_grad_() for x in (student, down, up, target)]

    def call(backend):
        out = fused_losses(
            student,
            teacher,
            down,
            up,
            gram_target=target if with_target else None,
            num_prefix_tokens=2,
            backend=backend,
        )
        return out.kd, out.outlier, out.info

    assert agrees_with_the_reference(call, leaves)


@pytest.mark.parametrize(("images", "patches"), SIZES_OF_GROUPS)
@pytest.mark.usefixtures("two_threads")
def test_blocks_and_groups_of_the_gram_loss(images, patches):
    from singer_kernels import functional

    generator = torch.Generator().manual_seed(0)
    tokens, target = (
        torch.randn(
            images, 1 + patches, 13, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for _ in range(2)
    )

    def call(backend):
        loss = functional.gram_loss(tokens, target, num_prefix_tokens=1, backend=backend)
        return loss, 2 * loss

    assert agrees_with_the_reference(call, [tokens, target])


def test_one_image_of_a_group_is_amplified():
    # That one computes F Fᵀ directly, the other by the Gram identity.
    from singer_kernels import fused_losses

    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    down = torch.linalg.qr(torch.randn(40, 4, **options)).Q
    up = 20 * down.T
    teacher = torch.randn(2, 1 + 45, 40, **options)
    teacher[0] -= teacher[0] @ down @ down.T  # F Wd = 0 up to the noise below
    teacher[0] += 0.01 * torch.randn(46, 40, **options)
    student = torch.randn(2, 1 + 45, 40, **options)
    leaves = [x.requires_grad_() for x in (student, down, up)]
    refined = teacher + teacher @ down @ up
    growth = (refined.norm(dim=-1) / teacher.norm(dim=-1)).amax(dim=1)
    assert growth[0] < 4 < growth[1]

    def call(backend):
        out = fused_losses(student, teacher, down, up, backend=backend)
        return out.kd, out.outlier, out.info

    assert agrees_with_the_reference(call, leaves)


@pytest.mark.parametrize("gain", [3, 10, 1000])
def test_an_adapter_that_amplifies(gain):
    # F Fᵀ computed from a much larger F̂ F̂ᵀ would cancel: gain² times the reference's float32 error
    # of about 1e-6.
    from singer_kernels import fused_losses

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 51, 200, generator=generator) for _ in range(2))
    down = torch.randn(200, 16, generator=generator) / 200**0.5
    up = gain * torch.randn(16, 200, generator=generator) / 16**0.5
    found = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (down, up)]
        out = fused_losses(student.to(dtype), teacher.to(dtype), *leaves, backend=backend)
        found.append([out.info, *torch.autograd.grad(out.info, leaves)])
    for actual, exact in zip(*found, strict=True):
        assert (actual - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_both_gram_matrices_are_of_equally_exact_features():
    # Rounding only one of them would give a loss above 0 to an adapter that changes nothing.
    from singer_kernels import fused_losses

    teacher = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    down, up = torch.ones(24, 3), torch.zeros(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        for target in (None, teacher.clone()):
            out = fused_losses(teacher, teacher, down, up, gram_target=target, backend="cpu")
            assert out.info.item() <= 1e-14
