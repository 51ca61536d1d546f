"""Several processes as one run: what each of them does for it."""

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

from singer.engine.distributed import (
    PatientBarrier,
    PeerWatch,
    StopRequest,
    agree_on_group,
    create_accelerator,
    global_means,
    together,
)
from singer.errors import SharedError, SingerError
from singer.methods import SiNGER


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


def _gradients(rank, size, variant, results, path):
    """Put the losses and gradients of a process's share of six images, half of them uniform."""
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


class _Lone:
    num_processes = 1


def test_alone_an_error_is_raised_as_it_is():
    def fail():
        raise SingerError("x")

    with pytest.raises(SingerError) as caught:
        together(_Lone(), fail)
    assert not isinstance(caught.value, SharedError)


def test_means_of_one_process_stay_as_they_are():
    means = [torch.tensor(2.0), torch.tensor(0.0)]
    assert global_means(means, [torch.tensor(3), torch.tensor(0)]) == means


def _share(rank, store, counts, results):
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
            target=lambda rank=rank: _share(rank, dist.FileStore(path, 2), counts, results)
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


class _Watched:
    """A watch that notes how it would end its process."""

    def __init__(self, store, rank, size=2, **options):
        self.messages = []
        self.ended = threading.Event()
        options = {"interval": 0.02, "patience": 0.5, **options}
        self.watch = PeerWatch(store, rank, size, end=self._end, **options)
        self.watch.start()

    def _end(self, message):
        self.messages.append(message)
        self.ended.set()


def test_a_process_that_goes_silent_is_named_to_all():
    store = dist.HashStore()
    watched = [_Watched(store, rank, size=4) for rank in range(4)]
    time.sleep(0.1)
    watched[2].watch._closing.set()  # it says nothing any more, not even that it is done
    for other in (0, 1, 3):
        assert watched[other].ended.wait(30)
        assert watched[other].messages[0].startswith("rank 2 of 4 (")
    for one in watched:
        one.watch.close()


def test_a_process_that_fails_tells_why():
    store = dist.HashStore()
    first, second = _Watched(store, 0), _Watched(store, 1)
    first.watch.fail(RuntimeError("out of\nmemory"))
    assert second.ended.wait(30)
    assert "rank 0 of 2" in second.messages[0]
    assert second.messages[0].endswith("failed: RuntimeError: out of memory")
    second.watch.close()


def test_a_process_that_is_done_is_not_missed():
    store = dist.HashStore()
    first, second = _Watched(store, 0), _Watched(store, 1)
    time.sleep(0.1)
    first.watch.close()
    assert not second.ended.wait(1.0)  # twice its patience
    second.watch.close()


class _OddStore(dist.HashStore):
    """One that takes some time for an answer, or has none, from a call on."""

    def __init__(self, error=None, delay=0.0):
        super().__init__()
        self.error, self.delay, self.calls = error, delay, 0

    def check(self, keys):
        self.calls += 1
        if self.calls > 3:
            time.sleep(self.delay)
            if self.error is not None:
                raise self.error
        return super().check(keys)


def test_a_store_that_is_gone_ends_the_process():
    watched = _Watched(_OddStore(dist.DistNetworkError("Broken pipe")), 1)
    assert watched.ended.wait(30)
    assert watched.messages == ["rank 0 of 2 is gone (Broken pipe)"]


def test_a_store_that_does_not_answer_ends_the_process():
    watched = _Watched(_OddStore(delay=3.0), 1)
    assert watched.ended.wait(30)
    assert watched.messages == ["rank 0 of 2 has not answered for 0 s"]


def test_a_process_that_slept_does_not_blame_the_others(monkeypatch):
    # As after SIGSTOP and SIGCONT to both: no thread ran, the clock did.
    store, skipped = dist.HashStore(), [0.0]
    clock = time.monotonic
    monkeypatch.setattr("singer.engine.distributed.time.monotonic", lambda: clock() + skipped[0])
    waits = []

    class Sleepy(threading.Event):
        def wait(self, timeout=None):
            waits.append(1)
            if len(waits) == 20:
                skipped[0] += 100.0
            return super().wait(timeout)

    store.set("life/0", "0 rank 0 of 2 (host, process 1)")  # which stays asleep a little longer
    watch = PeerWatch(store, 1, 2, interval=0.02, patience=2.0, end=waits.append)
    watch._closing = Sleepy()
    watch.start()
    time.sleep(1.0)
    watch.close()
    assert len(waits) > 20
    assert set(waits) == {1}


def test_a_failure_without_a_store_stays_the_failure():
    watch = PeerWatch(_OddStore(), 0, 2, end=print)

    class Gone:
        def set(self, *_):
            raise dist.DistNetworkError("Broken pipe")

    watch.store = Gone()
    watch.fail(SingerError("x"))


def test_a_barrier_waits_for_as_long_as_it_takes(monkeypatch):
    store, passed = dist.HashStore(), []
    monkeypatch.setattr("singer.engine.distributed._run_store", lambda: store)

    def process(rank):
        barrier = PatientBarrier(SimpleNamespace(num_processes=2))
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
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGUSR1"
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGUSR1) == former


def test_in_another_thread_signals_are_left_alone():
    former, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [former]
