"""The output directory: its files, each written atomically."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from singer.engine.run_dir import RunDir, writing
from singer.errors import SingerError
from singer.io import atomic_write


def test_existing_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(SingerError, match="exists already"):
        RunDir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SingerError, match=r"output: .* can't be made"):
        RunDir(tmp_path / "file" / "run")


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way():
        with writing(path), atomic_write(path) as written:
            written.write_text("ne")
            raise OSError("no space left")

    with pytest.raises(SingerError, match="file can't be written: no space left"):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as written:
        written.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


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
