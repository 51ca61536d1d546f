"""Faults planted in compiled kernels are reported: by an error, or by another result."""

import re

import pytest
import torch
from cases import Shape

pytest.importorskip("triton")

from ptx.compiled_cases import TIMEOUT, Step, record, workers
from ptx.memory import PtxError
from ptx.parser import parse

# A pattern of the PTX, and what replaces it.
FAULTS = {
    "a barrier removed": (r"^\s*bar\.sync\s.*$", ""),
    "a wait for copies dropped": (r"^.*cp\.async\.wait_group.*$", ""),
    "a wait for products dropped": (r"^.*wgmma\.wait_group.*$", ""),
    "a fence before products dropped": (r"^.*fence\.proxy.*$", ""),
    "a mask dropped": (r"@!?%p\d+ (?=ld|st|cp)", ""),
    "a global offset moved by one word": (r"((?:ld|st)\.global\S*\s.*\[\s*%rd\d+) \+ 0", r"\1 + 4"),
    "a shared offset moved": (r"((?:ld|st)\.shared\S*\s[^\[]*\[\s*%r\d+)", r"\1+16"),
}
STEPS = {
    architecture: Step(architecture, "bfloat16", Shape(1, 1, 70, 72, 11))
    for architecture in (80, 90)
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Return the PTX and the launches of a step; of both Gram modes, the one with an image."""
    with workers(str(tmp_path_factory.mktemp("compiled")), 2) as pool:
        futures = {key: pool.submit(record, step) for key, step in STEPS.items()}
        found = {key: future.result(timeout=TIMEOUT) for key, future in futures.items()}
    return {
        key: {launch.kernel.name: (ptx, launch) for ptx, launch in reversed(recorded)}
        for key, recorded in found.items()
    }


def run(ptx, launch):
    """Return the tensors after a launch."""
    arguments = [
        (name, value.clone() if isinstance(value, torch.Tensor) else value)
        for name, value in launch.arguments
    ]
    (kernel,) = parse(ptx).values()
    launch._replace(kernel=kernel, arguments=arguments).run()
    return [value.nan_to_num(7.5) for _, value in arguments if isinstance(value, torch.Tensor)]


def is_reported(ptx, launch, expected):
    try:
        found = run(ptx, launch)
    except PtxError:
        return True
    return not all(map(torch.equal, found, expected))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("architecture", STEPS)
def test_faults_are_reported(architecture, fault, launches):
    pattern, replacement = FAULTS[fault]
    planted = 0
    for name, (ptx, launch) in launches[architecture].items():
        changed, count = re.subn(pattern, replacement, ptx, flags=re.MULTILINE)
        if count:
            planted += 1
            assert is_reported(changed, launch, run(ptx, launch)), name
    on_hopper_alone = fault in ("a wait for products dropped", "a fence before products dropped")
    assert planted >= (0 if architecture == 80 and on_hopper_alone else 2)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", STEPS)
def test_nearly_every_single_barrier_is_missed(architecture, launches):
    """Some are redundant: another follows before anything is read."""
    pattern, _ = FAULTS["a barrier removed"]
    missed = []
    for ptx, launch in launches[architecture].values():
        expected = run(ptx, launch)
        for match in re.finditer(pattern, ptx, re.MULTILINE):
            changed = ptx[: match.start()] + ptx[match.end() :]
            missed.append(is_reported(changed, launch, expected))
    assert len(missed) > 40
    assert sum(missed) >= 0.8 * len(missed)
