"""The output directory: its files, each written atomically."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from singer.engine.run_dir import RunDir
from singer.errors import SingerError


def test_existing_directory_is_refused_and_untouched(tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(SingerError, match="exists already"):
        RunDir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_directory_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SingerError, match=r"output: .* can't be made"):
        RunDir(tmp_path / "file" / "run")


def test_tensors_json_and_metrics_read_back(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    tensors = {"a": torch.randn(3, 4).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    path = run_dir.write_tensors("t.safetensors", tensors, {"step": "3"})
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])
    assert json.loads(run_dir.write_json("x.json", {"a": [1, 2.5]}).read_text()) == {"a": [1, 2.5]}
    run_dir.append_metrics([{"step": 1, "loss": 0.5}])
    run_dir.append_metrics([{"step": 2, "loss": 0.25}])
    assert run_dir.read_metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_weights_can_be_read_by_whom_the_umask_allows(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    before = os.umask(0o022)
    try:
        path = run_dir.write_tensors("t.safetensors", {"a": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_json_refuses_what_is_no_number(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunDir(tmp_path / "run").write_json("x.json", {"a": float("nan")})
