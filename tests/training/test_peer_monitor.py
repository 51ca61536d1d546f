"""Heartbeats: a dead rank ends the others, and a blocked one does not."""

import multiprocessing
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from interrupted_runs import QUIET
from programs import Program

from singer.engine import peer_monitor
from singer.engine import run as training
from singer.engine.distributed import COLLECTIVE_TIMEOUT, PreemptionHandler
from singer.engine.peer_monitor import HEARTBEAT_TIMEOUT, PeerMonitor, default_timeout
from singer.errors import EXIT_PEER_LOST, SingerError


class _Monitored:
    """A monitor that records how it would end its process."""

    def __init__(self, store, rank, size=2, **options):
        self.messages = []
        self.lost = threading.Event()
        options = {"interval": 0.02, "timeout": 0.5, **options}
        self.monitor = PeerMonitor(store, rank, size, on_lost=self._on_lost, **options)
        self.monitor.start()

    def _on_lost(self, message):
        self.messages.append(message)
        self.lost.set()


def test_a_rank_without_heartbeat_is_named_to_all():
    store = dist.HashStore()
    monitored = [_Monitored(store, rank, size=4) for rank in range(4)]
    time.sleep(0.1)
    monitored[2].monitor._closing.set()  # no heartbeat any more, nor that it is done
    for other in (0, 1, 3):
        assert monitored[other].lost.wait(30)
        assert monitored[other].messages[0].startswith("rank 2 of 4 (")
    for one in monitored:
        one.monitor.close()


def exit_with_worker(folder):
    """Start a worker that hangs; end as where another rank was lost."""
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(10_000,))
    worker.start()
    (folder / "worker").write_text(str(worker.pid))
    sys.stderr.close()  # nor can it tell
    PeerMonitor(dist.HashStore(), 0, 2)._exit_process("rank 1 of 2 is gone")


def test_no_worker_outlives_a_rank_that_ends_for_another(tmp_path):
    program = Program(tmp_path, exit_with_worker, tmp_path)
    assert program.wait(60) == EXIT_PEER_LOST
    status = Path("/proc", (tmp_path / "worker").read_text(), "stat")
    deadline = time.monotonic() + 30
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker is alive"
        time.sleep(0.05)


def test_a_rank_that_fails_tells_why():
    store = dist.HashStore()
    first, second = _Monitored(store, 0), _Monitored(store, 1)
    first.monitor.fail(RuntimeError("out of\nmemory"))
    assert second.lost.wait(30)
    assert "rank 0 of 2" in second.messages[0]
    assert second.messages[0].endswith("failed: RuntimeError: out of memory")
    second.monitor.close()


def test_a_rank_that_is_done_is_not_missed():
    store = dist.HashStore()
    first, second = _Monitored(store, 0), _Monitored(store, 1)
    time.sleep(0.1)
    first.monitor.close()
    assert not second.lost.wait(1.0)  # twice its timeout
    second.monitor.close()


class _OddStore(dist.HashStore):
    """A store that answers late, or fails, from its fourth check on."""

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
    monitored = _Monitored(_OddStore(dist.DistNetworkError("Broken pipe")), 1)
    assert monitored.lost.wait(30)
    assert monitored.messages == ["rank 0 of 2 is gone (Broken pipe)"]


def test_a_store_that_does_not_answer_ends_the_process():
    monitored = _Monitored(_OddStore(delay=3.0), 1)
    assert monitored.lost.wait(30)
    assert monitored.messages == ["rank 0 of 2 has not answered for 0 s"]


def test_a_process_that_slept_does_not_blame_the_others(monkeypatch):
    # As after SIGSTOP and SIGCONT to both: no thread ran, the clock did.
    store, skipped = dist.HashStore(), [0.0]
    clock = time.monotonic
    monkeypatch.setattr("singer.engine.peer_monitor.time.monotonic", lambda: clock() + skipped[0])
    waits = []

    class Sleepy(threading.Event):
        def wait(self, timeout=None):
            waits.append(1)
            if len(waits) == 20:
                skipped[0] += 100.0
            return super().wait(timeout)

    store.set("heartbeat/0", "0 rank 0 of 2 (host, process 1)")  # which sleeps a little longer
    monitor = PeerMonitor(store, 1, 2, interval=0.02, timeout=2.0, on_lost=waits.append)
    monitor._closing = Sleepy()
    monitor.start()
    time.sleep(1.0)
    monitor.close()
    assert len(waits) > 20
    assert set(waits) == {1}


def test_a_failure_without_a_store_stays_the_failure():
    monitor = PeerMonitor(_OddStore(), 0, 2, on_lost=print)

    class Gone:
        def set(self, *_):
            raise dist.DistNetworkError("Broken pipe")

    monitor.store = Gone()
    monitor.fail(SingerError("x"))


@pytest.fixture
def fast_clock(monkeypatch):
    """Let the monitor's seconds last a millisecond."""
    clock = time.monotonic
    monkeypatch.setattr(peer_monitor.time, "monotonic", lambda: 1000 * clock())

    class FastEvent(threading.Event):
        def wait(self, timeout=None):
            return super().wait(timeout and timeout / 1000)

    return FastEvent, lambda: 1000 * clock()


def _monitor_a_blocked_rank(fast_clock, messages):
    """Start rank 1's monitor, with the default limits, of a rank 0 that shows one heartbeat."""
    event, _ = fast_clock
    store = dist.HashStore()
    store.set("heartbeat/0", "0 rank 0 of 2 (host, process 1)")
    monitor = PeerMonitor(store, 1, 2, on_lost=messages.append)
    monitor._closing = event()
    monitor.start()
    return store, monitor


def test_a_rank_blocked_for_minutes_survives_and_a_dead_one_does_not(fast_clock):
    messages, now = [], fast_clock[1]
    store, monitor = _monitor_a_blocked_rank(fast_clock, messages)
    start = now()
    for beat in (1, 2):  # each after five minutes, far beyond the 45 s once allowed
        while now() < start + 300 * beat:
            time.sleep(0.01)
        store.set("heartbeat/0", f"{beat} rank 0 of 2 (host, process 1)")
    assert messages == []
    while not messages and now() < start + 10 * HEARTBEAT_TIMEOUT:
        time.sleep(0.01)
    assert messages == ["rank 0 of 2 (host, process 1) has shown no sign of life for 600 s"]
    assert now() - start > 600 + HEARTBEAT_TIMEOUT
    monitor.close()


def test_after_a_failed_collective_the_lost_rank_is_named_within_a_minute(fast_clock):
    messages, now = [], fast_clock[1]
    store, monitor = _monitor_a_blocked_rank(fast_clock, messages)
    start = now()
    store.set("collective failed", "")  # as any rank of the run does
    while not messages and now() < start + 500:
        time.sleep(0.01)
    assert messages == ["rank 0 of 2 (host, process 1) has shown no sign of life for 45 s"]
    monitor.close()


def test_a_failed_collective_is_told_to_all_ranks():
    store = dist.HashStore()
    first = _Monitored(store, 0)
    first.monitor.wait_for_lost_peer(PreemptionHandler())
    assert store.check(["collective failed"])
    first.monitor.close()


def test_under_nccl_torchs_watchdog_comes_first():
    assert default_timeout("gloo") == HEARTBEAT_TIMEOUT
    assert default_timeout("cuda:nccl") > COLLECTIVE_TIMEOUT.total_seconds()


def test_one_key_turns_it_off(make_config, monkeypatch):
    asked = []

    @contextmanager
    def record(accelerator, preemption, is_enabled):
        asked.append(is_enabled)
        yield

    monkeypatch.setattr(training, "monitor_peers", record)
    training.train(make_config(train={"steps": 1, "peer_monitor": False}), QUIET)
    assert asked == [False]
    several = SimpleNamespace(num_processes=2)
    with peer_monitor.monitor_peers(several, PreemptionHandler(), is_enabled=False):
        assert not [one for one in threading.enumerate() if one.name == "peer-monitor"]
