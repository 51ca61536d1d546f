"""Process groups: shared errors, global means, signals, barriers, restarts."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from tiny_models import VIT, generator, random_images, tiny_backbone

from singer.engine import distributed
from singer.engine.distributed import (
    PreemptionHandler,
    StoreBarrier,
    agree_on_group,
    create_accelerator,
    is_output_registered,
    run_on_all_ranks,
    run_on_main,
)
from singer.errors import STOP_SIGNALS, SingerError, StoppedError
from singer.methods import SiNGER
from singer.methods.base import global_means


def test_accumulation_by_accelerates_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(
        SingerError, match=r"gradient_accumulation_steps is 2.*train\.grad_accum_steps"
    ):
        create_accelerator("fp32")


def test_sharded_models_are_refused(monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(SingerError, match="configured for FSDP, expected plain data parallelism"):
        create_accelerator("fp32")


_ANNOUNCED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of a launcher; no others are set."""

    def set_variables(**variables):
        for name in (*distributed._NUMBERS, "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (_ANNOUNCED, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "", "MASTER_ADDR": "", "LOCAL_RANK": "-1"},
            "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT, RANK are not set",
        ),
        ({**_ANNOUNCED, "MASTER_PORT": "http"}, "MASTER_PORT: got 'http', expected a whole"),
        ({**_ANNOUNCED, "MASTER_PORT": "70000"}, "MASTER_PORT: got '70000', .* from 0 to 65535"),
        ({**_ANNOUNCED, "WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two', expected a whole number"),
        ({**_ANNOUNCED, "WORLD_SIZE": "0"}, "WORLD_SIZE: got '0', expected a whole number from 1"),
        ({**_ANNOUNCED, "RANK": "2"}, r"RANK: got 2, expected less than 2.*\(WORLD_SIZE\)"),
        ({"LOCAL_RANK": "1"}, r"LOCAL_RANK: got 1, expected less than 1.*\(WORLD_SIZE\)"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        *[
            (
                {**variables, name: "4"},
                rf"WORLD_SIZE is {size}, but {name} is 4: each .* own, unset {name}$",
            )
            for variables, size, names in (
                ({"WORLD_SIZE": "1", "RANK": "0"}, "1", distributed._OTHER_SIZES),
                ({}, "not set", ["SLURM_STEP_NUM_TASKS"]),
            )
            for name in names
        ],
        ({"ACCELERATE_USE_CPU": "maybe"}, "accelerate: .*maybe"),
    ],
)
def test_a_launchers_variable_that_does_not_fit_is_named(
    environment, monkeypatch, variables, expected
):
    environment(**variables)
    if "ACCELERATE_USE_CPU" in variables:  # asked for where there is a GPU
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(SingerError, match=expected) as caught:
        create_accelerator("fp32")
    assert "\n" not in str(caught.value)
    assert "train.precision" not in str(caught.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""},
        {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"LOCAL_RANK": "-1", "PMI_SIZE": "", "OMPI_COMM_WORLD_RANK": ""},
        {"WORLD_SIZE": " 1 "},
        {"MASTER_PORT": "tcp://10.0.0.1:2222"},  # as in Kubernetes, of a service named master
        {**_ANNOUNCED, "WORLD_SIZE": "1", "MASTER_PORT": "tcp://10.0.0.1:2222"},
        {**_ANNOUNCED, "WORLD_SIZE": "1", "MASTER_PORT": "70000"},
        {"TORCHELASTIC_USE_AGENT_STORE": "True"},
    ],
)
def test_a_single_process_needs_no_group(environment, variables):
    environment(**variables)
    accelerator = create_accelerator("fp32")
    assert (accelerator.num_processes, dist.is_initialized()) == (1, False)
    assert not is_output_registered("run")


def test_a_gpu_for_each_of_several_processes_needs_the_local_rank(environment):
    environment(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    distributed.check_environment(uses_cpu=True)
    with pytest.raises(SingerError, match="WORLD_SIZE is 2, but LOCAL_RANK is not set"):
        distributed.check_environment(uses_cpu=False)


def _gradients(rank, size, variant, results, path):
    """Put the losses and gradients of a rank's local batch of six images, half of them uniform."""
    teacher = tiny_backbone(VIT, depth=4, grid=4)
    student = tiny_backbone(VIT, depth=2, dim=16, grid=4)
    with torch.no_grad():
        teacher.model.pos_embed.zero_()  # all patches of a uniform image are then the same
    method = SiNGER(teacher, student, rank=8, quantile=0.8, variant=variant).train()
    for adapter in method.adapters.values():
        torch.nn.init.normal_(adapter.up, std=0.1, generator=generator(3))
    images = random_images(teacher, batch=6)
    images[: 6 // 2] = images[: 6 // 2, :, :1, :1]
    model = method
    if size > 1:
        dist.init_process_group(
            "gloo", store=dist.FileStore(path, size), rank=rank, world_size=size
        )
        model = torch.nn.parallel.DistributedDataParallel(method)
    losses = model(images.chunk(size)[rank])
    losses["loss"].backward()
    values = torch.stack([loss.detach() for loss in losses.values()])
    if size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
        values /= size
        dist.destroy_process_group()
    named = {
        name: parameter.grad.tolist()
        for name, parameter in method.named_parameters()
        if parameter.grad is not None
    }
    results.put((values.tolist(), named))


def _in_processes(size, variant, path):
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_gradients, args=(rank, size, variant, results, path))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found, *_ = [results.get() for _ in processes]  # after the exchange all are alike
    for process in processes:
        process.join()
    return found


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_gradients_are_those_of_the_whole_batch(tmp_path, variant):
    # Uniform images have no outliers: all norms tie. So the first process has fewer than others.
    losses, gradients = _in_processes(1, variant, "")
    for size in (2, 3):
        found, named = _in_processes(size, variant, str(tmp_path / str(size)))
        assert found == pytest.approx(losses, rel=1e-5)
        assert named.keys() == gradients.keys()
        for name, expected in gradients.items():
            expected = torch.tensor(expected)
            # float32 sums of some hundred terms, in another order
            bound = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(torch.tensor(named[name]), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("decorator", [run_on_all_ranks, run_on_main])
def test_one_rank_alone_raises_the_error_as_it_is(decorator):
    create_accelerator("fp32")
    error = SingerError("x")

    @decorator
    def fail(value):
        raise value

    with pytest.raises(SingerError) as caught:
        fail(error)
    assert caught.value is error


def test_means_of_one_process_stay_as_they_are():
    means = [torch.tensor(2.0), torch.tensor(0.0)]
    assert global_means(means, [torch.tensor(3), torch.tensor(0)]) == means


def _scale_mean(rank, store, counts, results):
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    values = torch.arange(float(sum(counts)))
    own = values[: counts[0]] if rank == 0 else values[counts[0] :]
    mean = own.mean() if len(own) else torch.tensor(0.0)
    (scaled,) = global_means([mean], [torch.tensor(len(own))])
    results.put((rank, scaled.item()))
    dist.destroy_process_group()


@pytest.mark.parametrize("counts", [(1, 4), (0, 3), (2, 2), (0, 0)])
def test_means_over_unequal_counts_average_to_the_mean_over_all(tmp_path, counts):
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    path = str(tmp_path / "store")
    processes = [
        context.Process(
            target=lambda rank=rank: _scale_mean(rank, dist.FileStore(path, 2), counts, results)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get()[1] for _ in processes]
    for process in processes:
        process.join()
    expected = torch.arange(float(sum(counts))).mean().item() if sum(counts) else 0.0
    assert sum(found) / 2 == pytest.approx(expected, rel=1e-6)


def test_a_barrier_waits_for_all_ranks(monkeypatch):
    store, passed = dist.HashStore(), []
    monkeypatch.setattr("singer.engine.distributed.create_run_store", lambda: store)

    def process(rank):
        barrier = StoreBarrier(SimpleNamespace(num_processes=2))
        for turn in range(2):
            time.sleep(0.3 * (rank == turn))
            barrier()
            passed.append((turn, rank))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [turn for turn, _ in passed] == [0, 0, 1, 1]


def test_a_signal_ends_the_wait_at_a_barrier(monkeypatch):
    monkeypatch.setattr("singer.engine.distributed.create_run_store", dist.HashStore)
    barrier = StoreBarrier(SimpleNamespace(num_processes=2), SimpleNamespace(signal="SIGTERM"))
    with pytest.raises(StoppedError, match="SIGTERM while other processes were waited for"):
        barrier()


def test_a_barrier_has_a_limit(monkeypatch):
    monkeypatch.setattr("singer.engine.distributed.create_run_store", dist.HashStore)
    monkeypatch.setattr("singer.engine.distributed.BARRIER_TIMEOUT", 0.0)
    barrier = StoreBarrier(SimpleNamespace(num_processes=3))
    with pytest.raises(SingerError, match="2 of 3 processes have not come for 0 hours"):
        barrier()


def _agree(store, delays=(0, 0, 0)):
    names = {}

    def join(rank):
        time.sleep(delays[rank])
        names[rank] = agree_on_group(store, rank, 3)

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return names


@pytest.mark.parametrize("delays", [(0, 0, 0), (0.3, 0, 0), (0, 0.3, 0.1)])
def test_processes_started_anew_find_each_other_not_those_before(delays):
    store = dist.HashStore()
    first = _agree(store)
    second = _agree(store, delays)
    for names in (first, second):
        assert names.keys() == {0, 1, 2}
        assert len(set(names.values())) == 1
    assert first[0] != second[0]


def test_a_start_that_failed_half_way_is_forgotten():
    store = dist.HashStore()
    store.set("singer/token/2", "left behind")
    store.set("singer/token/1", "left behind, too")
    store.set("singer/group", "one left behind, left")
    names = _agree(store, (0, 0.2, 0.4))
    assert len(set(names.values())) == 1
    assert names.keys() == {0, 1, 2}


def test_signals_are_noted_within_the_block_alone():
    former = signal.getsignal(signal.SIGUSR1)
    with PreemptionHandler() as preemption:
        assert preemption.signal is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.signal == "SIGUSR1"
    for name in STOP_SIGNALS:
        with PreemptionHandler() as preemption:
            os.kill(os.getpid(), getattr(signal, name))
            assert preemption.signal == name
    with PreemptionHandler() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with PreemptionHandler():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGUSR1) == former


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("is_before", [False, True])
def test_where_nothing_is_to_be_saved_a_signal_ends_at_once(name, is_before):
    reached = []

    def set_up(preemption):
        with preemption.stopping_at_once("in the test"):
            reached.append("start")
            try:
                os.kill(os.getpid(), getattr(signal, name))
            except Exception:  # as in libraries
                reached.append("except")
            reached.append("end")

    with PreemptionHandler() as preemption:
        if is_before:
            os.kill(os.getpid(), getattr(signal, name))
        with pytest.raises(StoppedError, match=f"stopped by {name} in the test"):
            set_up(preemption)
    assert reached == ([] if is_before else ["start"])


def test_a_closed_terminal_disturbs_no_signal(monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=fail))
    with PreemptionHandler() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
    assert preemption.signal == "SIGINT"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_an_ignored_signal_stays_ignored(name):  # as SIGHUP under nohup
    number = getattr(signal, name)
    former = signal.signal(number, signal.SIG_IGN)
    try:
        with PreemptionHandler() as preemption:
            os.kill(os.getpid(), number)
            assert preemption.signal is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, former)


def test_in_another_thread_signals_are_left_alone():
    former, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with PreemptionHandler():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [former]
