"""Comparison of providers: accuracy check, interleaved timing, roofline and input sets."""

import gc
import math

import pytest
import torch
from harness import comparison, oracle, providers, timing
from harness.comparison import Budget, compare
from harness.oracle import OUTPUTS, Oracle
from harness.providers import Losses, build, unavailable_reason
from harness.timing import TimedPass, interleave, ratio, rounds_within, time_stats
from harness.workloads import PHASES, PRECISIONS, Case, Workload, make_inputs

CPU = torch.device("cpu")
SMALL = Workload("small", 2, 30, 48, 8)
AVAILABLE = [
    name for name in providers.NAMES if name != "compiled" and unavailable_reason(name, CPU) is None
]


def case(precision="fp32"):
    return Case("workloads", SMALL, PRECISIONS[precision])


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("name", AVAILABLE)
def test_every_provider_is_accurate(name, precision):
    inputs = make_inputs(SMALL, PRECISIONS[precision], CPU)
    accuracy = Oracle(inputs, PRECISIONS[precision]).check(name, build(name))
    assert accuracy.is_correct, accuracy.reason
    assert list(accuracy.errors) == list(OUTPUTS)


def with_error(which, how):
    """Return the provider ``torch`` with an error in the loss `which`."""

    def loss(inputs):
        losses = build("torch")(inputs)._asdict()
        losses[which] = how(losses[which])
        return Losses(**losses)

    return loss


@pytest.mark.parametrize("which", Losses._fields)
@pytest.mark.parametrize(
    "how",
    [
        lambda loss: 1.001 * loss,
        lambda loss: loss * math.nan,
        # Correct loss, wrong gradient.
        lambda loss: loss.detach() + 0.999 * (loss - loss.detach()),
    ],
)
def test_a_wrong_loss_or_gradient_is_found(which, how):
    inputs = make_inputs(SMALL, PRECISIONS["fp32"], CPU)
    accuracy = Oracle(inputs, PRECISIONS["fp32"]).check("torch", with_error(which, how))
    assert not accuracy.is_correct
    assert "allowed" in accuracy.reason


def test_wrong_eager_code_is_found(monkeypatch):
    monkeypatch.setattr(providers, "QUANTILE", 0.9)
    inputs = make_inputs(SMALL, PRECISIONS["fp32"], CPU)
    reference = build("reference")
    monkeypatch.setattr(
        oracle, "build", lambda name: reference if name == "reference" else providers.eager
    )
    monkeypatch.setattr(providers, "outlier_loss", lambda refined, quantile: refined.sum())
    with pytest.raises(AssertionError, match="wrong in float64"):
        Oracle(inputs, PRECISIONS["fp32"])


def test_wrong_or_failing_providers_are_not_timed(monkeypatch):
    def failing(inputs):
        raise RuntimeError("no such kernel")

    def full(inputs):
        raise torch.cuda.OutOfMemoryError("full")

    others = {
        "cpu": failing,
        "triton": full,
        "torch": with_error("info", lambda loss: 1.01 * loss),
    }
    monkeypatch.setattr(comparison, "build", lambda name: others.get(name) or build(name))
    names = ["eager", "eager-masked", "torch", "cpu", "triton"]
    record, seconds = compare(case(), names, CPU, Budget(0.0, min_rounds=3))
    entries = record["providers"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "eager": "timed",
        "eager-masked": "timed",
        "torch": "wrong",
        "cpu": "failed",
        "triton": "out of memory",
    }
    assert "info" in entries["torch"]["reason"]
    assert entries["cpu"]["reason"] == "RuntimeError: no such kernel"
    assert list(seconds) == ["eager", "eager-masked"]
    for name, entry in entries.items():
        assert ("milliseconds" in entry) == (name in seconds)


def test_a_record_is_complete_and_consistent():
    record, seconds = compare(case("autocast"), AVAILABLE, CPU, Budget(0.0, min_rounds=4))
    assert record["rounds"] == 4
    assert record["sets"] >= 2
    for name, entry in record["providers"].items():
        assert len(seconds[name]) == 4
        assert entry["status"] == "timed"
        for phase in PHASES:
            times = entry["milliseconds"][phase]
            assert 0 < times["fastest"] <= times["low"] <= times["median"] <= times["high"]
            fraction = record["roofline_milliseconds"][phase] / times["median"]
            assert entry["fraction_of_roofline"][phase] == pytest.approx(fraction)
        assert entry["ratio"].keys() == {"eager"}
        assert entry["saved_MiB"] > 0
    assert record["providers"]["eager"]["ratio"]["eager"]["both"] == 1.0
    roofline, rates, costs = (
        record[k] for k in ("roofline_milliseconds", "peak_rates", "roofline_cost")
    )
    for phase in PHASES[:2]:
        moving = costs[phase]["bytes"] / rates["bytes_per_second"]
        computing = costs[phase]["operations"] / rates["operations_per_second"]
        assert roofline[phase] == pytest.approx(1e3 * max(moving, computing))
    assert roofline["both"] == pytest.approx(roofline["forward"] + roofline["backward"])


def test_sets_of_inputs_exceed_the_cache(monkeypatch):
    one = make_inputs(SMALL, PRECISIONS["fp32"], CPU).nbytes
    for cache, expected in (
        (0, 2),
        (one, 3),
        (2 * one, 5),
        (1000 * one, comparison.MAX_INPUT_SETS),
    ):
        monkeypatch.setattr(comparison, "cache_bytes", lambda device, cache=cache: cache)
        sets = comparison.input_sets(case(), CPU)
        assert len(sets) == expected
        assert len({x.student.data_ptr() for x in sets}) == expected
        # The other sets, read before this one is read again, do not fit into the cache.
        assert (expected - 1) * one >= min(2 * cache, (comparison.MAX_INPUT_SETS - 1) * one)


def test_runs_are_interleaved_and_their_order_rotates():
    order = []

    def run_of(name):
        def run(number):
            order.append((number, name))
            assert not gc.isenabled()
            return {"both": float(number)}

        return run

    times = interleave({name: run_of(name) for name in "abc"}, 3, warm_up=1)
    assert gc.isenabled()
    assert [number for number, _ in order] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert ["".join(name for n, name in order if n == k) for k in range(4)] == [
        "abc",
        "bca",
        "cab",
        "abc",
    ]
    assert times == {name: [{"both": 1.0}, {"both": 2.0}, {"both": 3.0}] for name in "abc"}


def test_rounds_fill_the_time_within_their_bounds(monkeypatch):
    clock = iter([0.0, 0.5, 10.0, 10.5, 20.0, 20.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert rounds_within({}, 4.0, 2, 100) == 8
    assert rounds_within({}, 4.0, 10, 100) == 10
    assert rounds_within({}, 4.0, 2, 5) == 5


def test_a_timed_pass_runs_forward_and_backward_on_the_next_set():
    inputs = [make_inputs(SMALL, PRECISIONS["fp32"], CPU, seed) for seed in range(2)]
    used = []

    def loss(given):
        used.append(next(i for i, x in enumerate(inputs) if x is given))
        return [(given.student * given.up.sum() * given.down.sum()).sum()]

    timed = TimedPass(loss, inputs, PRECISIONS["fp32"], [torch.tensor(1.0)])
    taken = [timed(number) for number in range(3)]
    assert used == [0, 1, 0]
    for times in taken:
        assert times["both"] == pytest.approx(times["forward"] + times["backward"])
        assert times["backward"] > 0
    assert all(tensor.grad is None for tensor in inputs[0])


def test_gpu_times_are_stream_times(monkeypatch):
    """Order of launches and events, with a list as the stream: no GPU is needed."""
    stream = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.place = len(stream)

        def synchronize(self):
            stream.append("synchronize")

        def elapsed_time(self, other):
            return 1000.0 * len([x for x in stream[self.place : other.place] if x == "work"])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: stream.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.append("queue"))

    class Work(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            stream.append("work")
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            stream.extend(["work", "work"])
            return grad.expand(3)

    x = torch.ones(3, requires_grad=True)
    inputs = make_inputs(SMALL, PRECISIONS["fp32"], CPU)._replace(student=x, down=x, up=x)
    timed = TimedPass(
        lambda given: [Work.apply(given.student)], [inputs], PRECISIONS["fp32"], [x[0]]
    )
    timed.device = torch.device("cuda")
    taken = timed(0)
    assert taken.pop("host") > 0
    assert taken == {"forward": 1.0, "backward": 2.0, "both": 3.0}
    one = ["work"] * 3
    assert stream == ["synchronize", *one, "queue", *one, "synchronize"]


def test_time_stats_and_ratio():
    stats = time_stats([1.0, 2.0, 3.0, 4.0, 5.0])
    assert stats == {"median": 3e3, "low": 1.5e3, "high": 4.5e3, "fastest": 1e3}
    assert ratio([2.0, 9.0, 4.0], [1.0, 1.0, 1.0]) == 4.0
    assert ratio([2.0, 2.0, 8.0], [1.0, 2.0, 2.0]) == 2.0


def test_unavailable_providers_have_a_reason():
    assert unavailable_reason("triton", CPU) == "it needs a CUDA device"
    assert unavailable_reason("compiled-max", CPU) is not None
    assert unavailable_reason("eager", CPU) is None
    assert unavailable_reason("compiled-max", torch.device("cuda")) is None
    large = case()._replace(workload=SMALL._replace(name="large"))
    assert "tuning" in unavailable_reason("compiled-max", torch.device("cuda"), large)


def test_compiled_needs_a_cpp_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert unavailable_reason("compiled", CPU) == "torch.compile finds no no-such-compiler"
    assert unavailable_reason("compiled", torch.device("cuda")) is None
