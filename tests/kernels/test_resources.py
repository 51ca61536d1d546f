"""The Triton kernels compiled ahead of time, without a GPU: registers, spills, shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import singer_kernels.resources as kernel_resources
from singer_kernels.backends.triton import configs
from singer_kernels.resources import DTYPES, RANKS, Usage, main

EXPECTED = Path(__file__).parents[2] / "benchmarks" / "expected"

PRODUCTS = ("refine", "gram_rows", "gram_pairs", "gram_gradient", "backward_tokens")


def resources(*arguments, **environment):
    # In a subprocess: this process runs the interpreter.
    given = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    command = [sys.executable, "-m", "singer_kernels.resources", *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


HOPPER = ("--arch", "90", "--operand", "bfloat16", "--rank", "64")
# float16 differs from float32 in the pointers' types alone.
EVERYTHING = ("--operand", "bfloat16", "float32")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(HOPPER, id="hopper"),
        pytest.param(EVERYTHING, id="everything", marks=pytest.mark.slow),
    ],
)
def arguments(request):
    return request.param


@pytest.fixture(scope="module")
def usages(arguments):
    done = resources("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return [Usage(**usage) for usage in json.loads(done.stdout)]


@pytest.fixture
def text(usages, monkeypatch, capsys):
    """What the command prints, without compiling everything again."""
    monkeypatch.setattr("singer_kernels.resources.usages", lambda *_: usages)
    main([])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "expected"),
    [("exec sleep 1000", "timed out after 0.2 seconds"), ("exit 3", "exit status 3")],
)
def test_a_tool_that_hangs_or_fails_is_one_line(tmp_path, monkeypatch, capsys, script, expected):
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(kernel_resources, "CUOBJDUMP_SECONDS", 0.2)
    monkeypatch.setattr(
        kernel_resources, "usages", lambda *_: kernel_resources._resource_usage(tool, b"")
    )
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m singer_kernels.resources: error: cuobjdump: ")
    assert expected in error
    assert error.count("\n") == 1


def test_they_are_the_committed_ones(text, arguments):
    """To accept a change, write the file anew with the command below."""
    release = ".".join(triton.__version__.split(".")[:2])
    path = EXPECTED / f"resources-triton-{release}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in EXPECTED.glob("resources-triton-*")))
        pytest.skip(f"of Triton {release} nothing is committed, only {known}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if arguments == EVERYTHING:
        # Compiled by now: read from Triton's cache.
        assert resources(*arguments, "--rank", "64").stdout.splitlines() == lines
    else:  # fewer rows, so columns of other widths
        found = [line.split() for line in text.splitlines()]
        committed = [line.split() for line in lines]
        arch, operand = (committed[0].index(column) for column in ("arch", "operand"))
        assert found == [
            row
            for row in committed
            if row == committed[0] or (row[arch], row[operand]) == ("90", "bfloat16")
        ]


def test_everything_is_compiled(usages, arguments):
    kernels = {usage.kernel for usage in usages}
    assert {kernel.removesuffix("_recompute") for kernel in configs.TABLE} <= kernels
    assert kernels >= {"outlier", "row_norms", "sum_partials", "sum_losses"}
    for usage in usages:
        assert usage.operand in DTYPES
        assert usage.rank in RANKS
    archs = {usage.arch for usage in usages}
    assert archs == ({90} if arguments == HOPPER else set(configs.ARCHITECTURES))
    for arch in archs:
        found = {usage.variant for usage in usages if usage.arch == arch}
        for mode in ("identity", "recompute", "materialized"):
            assert any(variant.startswith(mode) for variant in found)


def test_no_kernel_spills(usages):
    assert [usage for usage in usages if usage.spills > 0] == []


def test_shared_memory_is_within_the_limit(usages):
    assert [u for u in usages if u.shared > configs.SHARED_MEMORY[u.arch]] == []


def test_products_use_the_matrix_unit(usages):
    for usage in usages:
        is_product = usage.kernel in PRODUCTS
        # IEEE float32 products, where three TF32 ones do not fit.
        is_ieee = usage.operand != "bfloat16" and usage.rank > configs.MAX_MATRIX_RANK
        if is_product and not is_ieee:
            assert usage.matrix, usage
        # Fewer registers: the compiler removed the kernel's body.
        assert usage.registers >= 16, usage


def test_features_are_read_and_written_in_vectors(usages):
    # Except at rank 256, where a tile of features has one element per thread.
    assert [usage for usage in usages if usage.narrow > 0 and usage.rank <= 128] == []


def test_hopper_and_later_use_their_own_instruction(usages):
    archs = {usage.arch for usage in usages}
    for arch, instruction in ((90, "wgmma.mma_async"), (100, "tcgen05.mma")):
        if arch not in archs:
            continue
        chosen = [
            usage.matrix
            for usage in usages
            if (usage.arch, usage.operand, usage.rank) == (arch, "bfloat16", 64)
            and usage.kernel in PRODUCTS
        ]
        assert set(chosen) == {instruction}


def test_the_table_in_text(text):
    header, *rows = text.splitlines()
    assert header.split() == list(Usage._fields)
    assert any(row.split()[3] == "refine" for row in rows)


def test_interpreted_kernels_are_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("singer_kernels.resources.is_interpreted", lambda: True)
    with pytest.raises(SystemExit, match="1"):
        main([*HOPPER])
    assert capsys.readouterr().err == (
        "python -m singer_kernels.resources: error: TRITON_INTERPRET is set: interpreted kernels "
        "can't be compiled\n"
    )


@pytest.mark.slow
def test_the_interpreter_is_refused():
    done = resources(*HOPPER, TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr
