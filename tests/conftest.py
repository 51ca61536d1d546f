"""Settings that all tests share."""

import collections
import collections.abc
import os
import signal

import pytest
import torch

# The tensors here are small, and threads would only wait.
torch.set_num_threads(1)

# Before any test's module imports Triton, as torch does in places: without a GPU its interpreter
# runs the kernels, and what is imported before that is set does not take part.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# nohup and a shell's background jobs ignore them, and a run leaves ignored ones so.
for _name in ("SIGHUP", "SIGINT"):
    if signal.getsignal(_number := getattr(signal, _name)) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)


def _values(cases):
    """Return the values of each axis of a grid."""
    found = collections.defaultdict(dict)
    for case in cases:
        for axis, value in case.callspec.params.items():
            key = value if isinstance(value, collections.abc.Hashable) else repr(value)
            found[axis][type(value), key] = value
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    # The tests take one thread each, so plain `pytest` shares them out to two processes. Not where
    # the command names tests, says how to share, or asks for what one process alone can do.
    option = config.option
    for_one = ("collectonly", "usepdb", "trace", "setupplan", "setuponly", "setupshow")
    for_one += ("showfixtures", "show_fixtures_per_test", "tx")
    given = config.invocation_params.args
    if (
        config.args_source == config.ArgsSource.TESTPATHS
        and getattr(option, "numprocesses", 0) is None  # pytest-xdist is there; no -n was given
        and not hasattr(config, "workerinput")  # this is no such process itself
        and not any(str(argument).startswith("--dist") for argument in given)
        and not any(getattr(option, name, None) for name in for_one)
        and option.capture != "no"
        and not torch.cuda.is_available()  # its memory and clocks are one test's at a time
    ):
        option.numprocesses = 2
        option.dist = "worksteal"  # neighbours, which share fixtures, stay together


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name):
    # @pytest.mark.sample(n): every n-th case of a grid belongs to the ordinary run, the others are
    # slow. The sample must meet every value of every axis: an n that has no divisor in common with
    # the lengths of the grid's last axes does, if it leaves enough cases. Where each case starts
    # processes, sample(n, partial="reason") need not.
    #
    # Here the grid is whole, also when the command names some of its cases.
    items = yield
    if not isinstance(items, list):
        return items
    cases = [
        x for x in items if x.get_closest_marker("sample") and not x.get_closest_marker("slow")
    ]
    if not cases:
        return items
    marker = cases[0].get_closest_marker("sample")
    (n,) = marker.args
    for index, case in enumerate(cases):
        if index % n:
            case.add_marker(pytest.mark.slow)
    if not marker.kwargs.get("partial"):
        sampled = _values(cases[::n])
        for axis, values in _values(cases).items():
            missed = [value for key, value in values.items() if key not in sampled[axis]]
            if missed:
                raise collector.CollectError(
                    f"{name}: sample({n}) misses {len(missed)} of {len(values)} values of "
                    f"{axis!r}: {missed}"
                )
    return items


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:  # they run compiled kernels on CUDA tensors, and nothing else
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
