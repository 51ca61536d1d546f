"""The compiled Triton kernels, run in the emulator, on training steps of ``fused_losses``.

An error may be as large as the reference's in the same dtype plus ``bounds.oracle_slack``.
"""

import random

import pytest
from cases import Shape

pytest.importorskip("triton")

from ptx.compiled_cases import TIMEOUT, Step, check, workers

# Prefix 0, 1 and 5; patches, widths and ranks that fill no tile. 6 r <= D: with bfloat16 the Gram
# identity.
SHAPES = {
    "bfloat16": Shape(2, 1, 70, 72, 11),
    "float16": Shape(2, 5, 33, 40, 20),
    "float32": Shape(2, 0, 49, 33, 3),
}
KINDS = [
    ("random", False),
    ("random", True),
    ("cancelling", False),
    ("cancelling", True),
    ("target", True),
    ("mid", False),
]
MATRIX = [
    Step(architecture, dtype, shape, kind, pairs)
    for dtype, shape in SHAPES.items()
    for kind, pairs in KINDS
    if dtype == "bfloat16" or not (kind == "cancelling" and pairs)  # the others have no identity
    for architecture in (80, 90)
]
# Whole tiles and several blocks of D: copies of 16 bytes in a pipeline.
MATRIX += [
    Step(80, "float32", Shape(1, 0, 16, 64, 16)),
    Step(90, "bfloat16", Shape(1, 0, 64, 128, 16)),
]
FULL = Step(90, "bfloat16", Shape(1, 1, 196, 1024, 64))  # an image of ViT-L/16

FAMILIES = 20
PER_FAMILY = 25


def family(number):
    """Draw steps that share compiled kernels: these differ in divisibility and flags alone."""
    draw = random.Random(number)
    architecture, dtype = draw.choice([80, 90]), draw.choice(list(SHAPES))
    kind = draw.choice(["random", "cancelling", "target", "mid", "forward"])
    pairs = draw.random() < 0.5
    unit = draw.choice([1, 16])  # of the width; a multiple of 16 is another kernel
    prefix, least = draw.choice([0, 1, 5]), draw.choice([2, 9, 17, 33])  # of the ranks
    offset = draw.choice([0, 0, 1])
    for _ in range(PER_FAMILY):
        width, rank = draw.randrange(2, 200), draw.randrange(least, 2 * (least - 1) + 1)
        if (width % 16 == 0) != (unit == 16):
            width = 16 * (width // 16 + 1) + (unit == 1)
        rank += rank % 16 == 0
        shape = Shape(draw.randrange(2, 4), prefix, draw.randrange(2, 70), width, rank)
        gamma = draw.choice([0.0, 0.5, 0.9, 0.97, 1.0])
        yield Step(architecture, dtype, shape, kind, pairs, offset, gamma, draw.randrange(1000))


@pytest.fixture(scope="module")
def submit(request, tmp_path_factory):
    """Start the selected steps of this module, each architecture in a process; return a step's."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    pools = {architecture: workers(cache, 1) for architecture in (80, 90)}
    futures = {}

    def submit(step):
        if step not in futures:
            futures[step] = pools[step.architecture].submit(check, step)
        return futures[step]

    is_shared = hasattr(request.config, "workerinput")  # pytest-xdist: which are ours is not known
    for item in () if is_shared else request.session.items:
        if item.module is request.module:
            params = item.callspec.params
            for step in [params["step"]] if "step" in params else family(params["number"]):
                submit(step)
    yield submit
    for pool in pools.values():
        pool.shutdown(cancel_futures=True)


def assert_accurate(step, found):
    wrong = {name: pair for name, pair in found.items() if not pair[0] <= pair[1]}
    assert not wrong, step


@pytest.mark.parametrize(
    "step", [*MATRIX, pytest.param(FULL, marks=pytest.mark.slow)], ids=lambda step: step.name
)
def test_compiled_kernels_are_accurate(step, submit):
    assert_accurate(step, submit(step).result(timeout=TIMEOUT))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FAMILIES))
def test_random_steps(number, submit):
    for step, future in [(step, submit(step)) for step in family(number)]:
        assert_accurate(step, future.result(timeout=TIMEOUT))
