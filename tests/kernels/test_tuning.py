"""Opt-in autotuning: candidates, choice, cache file."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from cases import WEIGHTS, Shape, assert_gradients, random_case, total
from conftest import BACKENDS

pytest.importorskip("triton")

from singer_kernels.backends.triton import configs, tuning
from singer_kernels.backends.triton.configs import Config

FIRST, BEST = Config(64, 48, 8, 3), Config(32, 128, 4, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "autotune.json"
    monkeypatch.setenv(tuning.CACHE, str(path))
    monkeypatch.delenv(tuning.SECONDS, raising=False)
    monkeypatch.setattr(tuning, "_cached", {})
    return path


def out_of_resources():
    from triton.runtime.errors import OutOfResources

    return OutOfResources(1, 0, "shared memory")


class Kernel:
    """Records the configurations it is launched with; the fastest is BEST."""

    def __init__(self):
        self.tried = []

    def launch(self, config):
        self.tried.append(config)
        if config.rows == 128:
            raise out_of_resources()
        return config

    def measure(self, run):
        return 1.0 if run() == BEST else 2.0


def run(kernel, key=("device", 1)):
    return tuning.run_tuned("refine", FIRST, kernel.launch, key, kernel.measure)


def test_the_fastest_that_fits_is_kept(cache):
    kernel = Kernel()
    assert run(kernel) == BEST
    assert kernel.tried[0] == FIRST
    assert {config.rows for config in kernel.tried} >= set(tuning.ROWS)
    assert len(set(kernel.tried)) == len(list(tuning.candidates(FIRST)))
    before = len(kernel.tried)
    assert run(kernel) == BEST
    assert kernel.tried[before:] == [BEST]
    assert json.loads(cache.read_text()) == {"refine device 1": list(BEST)}


def test_another_process_finds_the_file(cache):
    run(Kernel())
    tuning._cached.clear()
    kernel = Kernel()
    assert run(kernel) == BEST
    assert kernel.tried == [BEST]


def test_each_key_is_measured_and_none_is_lost(cache):
    run(Kernel())
    tuning._cached.clear()
    kernel = Kernel()
    run(kernel, ("device", 2))
    assert len(kernel.tried) > 2
    assert set(json.loads(cache.read_text())) == {"refine device 1", "refine device 2"}


@pytest.mark.parametrize("content", ["", "[1]", '{"refine device 1": 3}', '{"a": [1]}', "no"])
def test_a_file_that_is_none_is_written_anew(cache, content, caplog):
    cache.parent.mkdir()
    cache.write_text(content)
    with caplog.at_level(logging.WARNING, "singer_kernels"):
        assert run(Kernel()) == BEST
    assert "is no file of tuned configurations" in caplog.text
    assert json.loads(cache.read_text()) == {"refine device 1": list(BEST)}


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, ValueError, IndexError])
@pytest.mark.parametrize("is_table_broken", [False, True])
def test_candidates_that_can_not_be_compiled_are_left_out(error, is_table_broken):
    class Broken(Kernel):
        def launch(self, config):
            if config.rows == 64 or (config == FIRST and is_table_broken):
                raise error("PassManager::run failed")
            return super().launch(config)

    kernel = Broken()
    assert run(kernel) == BEST
    assert {config.rows for config in kernel.tried} == {16, 32, 128}


def test_where_nothing_can_run_the_table_s_error_is_raised():
    class Broken(Kernel):
        def launch(self, config):
            raise ValueError(f"broken: {config}")

    with pytest.raises(ValueError, match=re.escape(f"broken: {FIRST}")):
        run(Broken())


@pytest.mark.parametrize(("limit", "measured"), [("0", 1), ("35", 4), ("1e9", None)])
def test_the_time_limit(limit, measured, monkeypatch, cache):
    now = 0.0

    class Slow(Kernel):
        def measure(self, run):
            nonlocal now
            now += 10
            config = run()
            return float(config.rows)

    monkeypatch.setenv(tuning.SECONDS, limit)
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: now))
    kernel = Slow()
    chosen = run(kernel)
    tried = kernel.tried[:-1]  # the last is the call's own launch
    assert len(tried) == (measured or len(list(tuning.candidates(FIRST))))
    fits = [config for config in tried if config.rows < 128]
    assert chosen == min(fits, key=lambda config: config.rows)
    assert json.loads(cache.read_text()) == {"refine device 1": list(chosen)}


def test_the_time_limit_waits_for_one_that_can_run(monkeypatch):
    class Broken(Kernel):
        def launch(self, config):
            if config == FIRST:
                raise RuntimeError("PassManager::run failed")
            return super().launch(config)

    monkeypatch.setenv(tuning.SECONDS, "0")
    kernel = Broken()
    assert run(kernel) == kernel.tried[0] != FIRST


@pytest.mark.parametrize("text", ["a minute", "-1", "nan"])
def test_a_time_limit_that_is_none(text, monkeypatch):
    monkeypatch.setenv(tuning.SECONDS, text)
    message = f"SINGER_AUTOTUNE_SECONDS: got '{text}', expected a number of seconds, 0 or more"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(Kernel())


def test_no_two_candidates_are_the_same_and_the_similar_come_first():
    found = list(tuning.candidates(Config(16, 32, 4, 2)))
    assert len(found) == len(set(found)) == 4 * 3 * 2 * 3
    assert found[0] == Config(16, 32, 4, 2)
    assert Config(16, 32, 4, 3) in found[:5]
    assert found[-1] == Config(128, 128, 8, 4)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False)])
def test_the_switch(monkeypatch, value, expected):
    monkeypatch.setenv(tuning.SWITCH, value)
    assert tuning.is_on() == expected


def test_it_is_off_by_default(monkeypatch):
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    assert not tuning.is_on()


@pytest.mark.skipif("triton" not in BACKENDS, reason="kernels are compiled where there is a GPU")
@pytest.mark.parametrize("with_target", [False, True])
def test_every_stage_gives_the_same_whatever_is_tried(with_target, monkeypatch):
    from singer_kernels.backends.triton import launch

    monkeypatch.setenv("SINGER_BACKEND", "triton")
    monkeypatch.setenv(tuning.SWITCH, "1")
    monkeypatch.setattr(launch, "architecture", lambda: 90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(configs, "lookup", lambda *_: Config(32, 32, 1, 1))
    tried = [Config(16, 64, 1, 1), Config(32, 32, 1, 1)]
    monkeypatch.setattr(tuning, "candidates", lambda first: tried)
    fastest = []

    def fastest_is_the_first(first, launch, measure):
        for config in tried:
            launch(config)
        fastest.append(tried[0])
        return tried[0]

    monkeypatch.setattr(tuning, "_fastest", fastest_is_the_first)
    case = random_case(Shape(2, 1, 20, 40, 5), 0.8, with_target=with_target)
    tensors = case.tensors()
    total(case.run(tensors)).backward()
    assert_gradients(tensors, case.gradients(WEIGHTS))
    assert len(fastest) == (6 if with_target else 4)
