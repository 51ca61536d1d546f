"""The list of the extension's CUDA kernels, and their resources on a device."""

import re
from pathlib import Path

import emulation
import pytest
import torch

from singer_kernels import extension, info

SOURCES = emulation.SOURCES
needs_emulation = pytest.mark.skipif(
    not extension.has_kernels("cuda_refine", "cpu"), reason="there is no g++ to emulate with"
)
needs_cuda_kernels = pytest.mark.skipif(
    not extension.has_kernels("cuda_refine", "cuda"),
    reason="the extension is built without CUDA",
)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(extension, "LIBRARY", emulation.library())


@needs_emulation
def test_every_kernel_of_the_sources_is_listed_once(emulated):
    text = "".join(path.read_text() for path in SOURCES.glob("cuda/*.cu"))
    names = re.findall(r"__global__ void (\w+)\(", text)
    assert len(names) == 8
    expected = {f"{name}<{dtype}>" for name in names for dtype in ("float", "double")}
    assert sorted(extension.cuda_kernels()) == sorted(expected)


def test_kernels_are_launched_in_one_place():
    # `launch`, which registers each kernel in the list.
    text = "".join(path.read_text() for path in SOURCES.rglob("*") if path.is_file())
    assert text.count("<<<") == 1


@needs_emulation
def test_emulated_kernels_have_no_resources(emulated):
    assert extension.cuda_usages(0) == ([], "CUDA answers: the kernels are compiled as plain C++")
    lines = info._kernels(0)
    assert lines == ["cuda kernels    16; CUDA answers: the kernels are compiled as plain C++"]


@needs_cuda_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_reason_is_reported():
    usages, reason = extension.cuda_usages(0)
    assert usages == []
    assert reason.startswith("CUDA answers: ")
    assert info.report().splitlines()[-1] == f"cuda kernels    16; {reason}"


def test_an_extension_without_cuda_has_no_kernels(monkeypatch):
    # Any library without kernels.
    other = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    monkeypatch.setattr(extension, "LIBRARY", other)
    monkeypatch.setattr(extension, "load", lambda: None)
    assert extension.cuda_kernels() == []
    assert extension.cuda_usages(0) == ([], "the extension is built without CUDA")
    assert info._kernels(0) == ["cuda kernels    none; the extension is built without CUDA"]


def test_an_extension_that_is_off_has_no_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_ops.so")
    assert extension.cuda_kernels() == []
    assert extension.cuda_usages(0) == ([], "the extension is off")


def test_the_usages_are_a_table(monkeypatch):
    usages = [
        extension.KernelUsage("refine_kernel<float>", 72, 0, 0, 7, 28, 64),
        extension.KernelUsage("outlier_kernel<double>", 121, 32, 49152, 16, 64, 64),
    ]
    monkeypatch.setattr(extension, "cuda_usages", lambda device: (usages, ""))
    assert info._kernels(0) == [
        "cuda kernels              registers  local bytes  shared bytes  blocks  occupancy",
        "  outlier_kernel<double>        121           32         49152      16       100%",
        "  refine_kernel<float>           72            0             0       7        44%",
    ]


@needs_cuda_kernels
@pytest.mark.gpu
def test_the_resources_of_the_kernels_on_a_device():
    before = torch.cuda.current_device()
    for device in range(torch.cuda.device_count()):
        usages, reason = extension.cuda_usages(device)
        assert reason == ""
        assert [usage.kernel for usage in usages] == extension.cuda_kernels()
        properties = torch.cuda.get_device_properties(device)
        for usage in usages:
            assert 16 <= usage.registers <= 255
            assert (usage.local, usage.shared) == (0, 0)  # no spills
            assert usage.max_warps * 32 == properties.max_threads_per_multi_processor
            assert usage.warps == 4 * usage.blocks
            assert 0 < usage.occupancy <= 1
    assert torch.cuda.current_device() == before
    assert any(line.startswith("  refine_kernel<float> ") for line in info.report().splitlines())


@needs_cuda_kernels
@pytest.mark.gpu
def test_a_missing_device_breaks_no_later_launch():
    usages, reason = extension.cuda_usages(torch.cuda.device_count())
    assert usages == []
    assert reason.startswith("CUDA answers: ")
    norms, (threshold, squares, counts) = torch.ones(2, 3, device="cuda"), torch.empty(3, 2).cuda()
    torch.ops.singer_kernels.cuda_outlier(norms, 0.5, threshold, squares, counts)
    assert threshold.tolist() == [1, 1]
