"""Heartbeats between the ranks of a run: end this process when another one has died.

Every rank writes a heartbeat to the launcher's store and reads the next rank's. It is switched off
by ``train.peer_monitor: false`` (for a debugger, say). It must never end a healthy run:

- A rank whose Python is blocked (a compilation that holds the GIL, a full disk, a breakpoint) sends
  no heartbeat either, so the limit is :data:`HEARTBEAT_TIMEOUT`, ten minutes.
- Once a collective has failed, the run is lost and only the rank is to be named: on all ranks
  :data:`LOST_PEER_TIMEOUT`, 45 s, holds from then on.
- Under NCCL the limit is ten minutes above the timeout of collectives: torch's watchdog is first.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator

from singer.engine.distributed import (
    COLLECTIVE_TIMEOUT,
    PreemptionHandler,
    create_run_store,
    launcher_holds_store,
)
from singer.errors import (
    EXIT_PEER_LOST,
    SharedError,
    SingerError,
    StoppedError,
    one_line,
    typed_line,
)

_logger = logging.getLogger("singer")

HEARTBEAT_TIMEOUT = 600.0
"""Seconds without a heartbeat after which a rank counts as lost."""

LOST_PEER_TIMEOUT = 45.0
"""The same, once a collective has failed."""


class PeerMonitor:
    """Ends this process when another rank of the run has died or hangs, and names that rank.

    A collective would wait for a dead rank up to its timeout, or forever. Two daemon threads do the
    work: one exchanges heartbeats and may block in the store, the other notices if it does.

    Args:
        store: shared by all ranks of this run, and by them alone.
        rank: of this process.
        size: number of ranks.
        interval: seconds between two heartbeats.
        timeout: seconds without a heartbeat after which a rank counts as lost.
        on_lost: called with the message; None: print it, and end the process at once with
            ``EXIT_PEER_LOST``.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        interval: float = 2.0,
        timeout: float = HEARTBEAT_TIMEOUT,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.interval = interval
        self.timeout = timeout
        self.on_lost = on_lost or self._exit_process
        self._closing = threading.Event()
        self._peer_lost = threading.Event()
        self._collective_failed = False
        self._heartbeats = 0
        self._threads: list[threading.Thread] = []
        self._name = f"rank {rank} of {size} ({socket.gethostname()}, process {os.getpid()})"

    def start(self) -> None:
        """Send the first heartbeat, and start both threads."""
        self.store.set(f"heartbeat/{self.rank}", f"0 {self._name}")
        for target in (self._monitor_peer, self._monitor_store):
            thread = threading.Thread(target=target, name="peer-monitor", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _lost(self, message: str) -> None:
        if not self._closing.is_set() and not self._peer_lost.is_set():
            self._peer_lost.set()
            self.on_lost(message)

    def _exit_process(self, message: str) -> None:
        try:
            print(f"singer: error: {message}; rank {self.rank} ends", file=sys.stderr, flush=True)
        finally:
            try:
                for worker in multiprocessing.active_children():  # one that hangs would outlive us
                    worker.kill()
            finally:
                os._exit(EXIT_PEER_LOST)  # the main thread may be blocked in a collective forever

    def _ticks(self) -> Iterator[float]:
        """Yield, at every interval, how many seconds this process itself was not running."""
        last = time.monotonic()
        while not self._closing.wait(self.interval) and not self._peer_lost.is_set():
            # Suspended, or blocked: the others may have been, too.
            yield max(0.0, time.monotonic() - last - 2 * self.interval)
            last = time.monotonic()

    def _monitor_peer(self) -> None:
        peer = (self.rank + 1) % self.size
        last, since, name = b"", time.monotonic(), f"rank {peer} of {self.size}"
        try:
            for stalled in self._ticks():
                since += stalled
                self._heartbeats += 1
                self.store.set(f"heartbeat/{self.rank}", f"{self._heartbeats} {self._name}")
                if self._collective_failed:
                    self.store.set("collective failed", "")
                if self.store.check(["collective failed"]):
                    self.timeout = min(self.timeout, LOST_PEER_TIMEOUT)
                if self.store.check(["failed"]):
                    self._lost(self.store.get("failed").decode())
                elif self.store.check([f"done/{peer}"]):
                    since = time.monotonic()
                elif self.store.check([f"heartbeat/{peer}"]):
                    heartbeat = self.store.get(f"heartbeat/{peer}")
                    if heartbeat != last:
                        last, since = heartbeat, time.monotonic()
                        name = heartbeat.decode().partition(" ")[2]
                if time.monotonic() - since > self.timeout:
                    message = f"{name} has shown no sign of life for {self.timeout:.0f} s"
                    self.store.set("failed", message)
                    self._lost(message)
        except RuntimeError as error:  # torch's DistError: the process with the store is gone
            self._lost(f"{_store_owner(self.size)} is gone ({one_line(error)[:300]})")

    def _monitor_store(self) -> None:
        heartbeats, since = 0, time.monotonic()
        for stalled in self._ticks():
            since += stalled
            if self._heartbeats != heartbeats:
                heartbeats, since = self._heartbeats, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                self._lost(f"{_store_owner(self.size)} has not answered for {self.timeout:.0f} s")

    def wait_for_lost_peer(self, preemption: PreemptionHandler) -> None:
        """After a failed collective: wait until the rank that caused it is named.

        Args:
            preemption: its signal may come first, from a launcher that names the rank itself.
        """
        self._collective_failed = True
        deadline = time.monotonic() + min(self.timeout, LOST_PEER_TIMEOUT) + 5 * self.interval
        while time.monotonic() < deadline and not self._peer_lost.is_set():
            if preemption.signal is not None:
                self.on_lost(f"another process has died, and {preemption.signal} came")
            time.sleep(0.1)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends; they then end, too."""
        message = f"{self._name} failed: {typed_line(error)[:300]}"
        self._close({"failed": message, f"done/{self.rank}": ""})

    def close(self) -> None:
        """Stop monitoring and being monitored."""
        self._close({f"done/{self.rank}": ""})

    def _close(self, entries: Mapping[str, str]) -> None:
        self._closing.set()
        # In a thread: the store may not answer.
        last = threading.Thread(target=self._set_entries, args=(entries,), daemon=True)
        last.start()
        # A thread that is still blocked in the store at interpreter exit would abort the process.
        for thread in (last, *self._threads):
            thread.join(timeout=self.interval + 10.0)

    def _set_entries(self, entries: Mapping[str, str]) -> None:
        try:
            for key, value in entries.items():
                self.store.set(key, value)
        except RuntimeError as error:
            _logger.debug("the run's store is gone already: %s", error)


def _store_owner(size: int) -> str:
    return "the launcher on the first machine" if launcher_holds_store() else f"rank 0 of {size}"


def _is_failed_collective(error: BaseException) -> bool:
    if isinstance(error, SingerError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).lower()
    known = isinstance(error, dist.DistError)
    return known or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))


def default_timeout(backend: str) -> float:
    """Return the heartbeat timeout for a process group's backend, in seconds."""
    is_nccl = "nccl" in backend
    return HEARTBEAT_TIMEOUT + (COLLECTIVE_TIMEOUT.total_seconds() if is_nccl else 0.0)


@contextmanager
def monitor_peers(
    accelerator: Accelerator, preemption: PreemptionHandler, is_enabled: bool = True
) -> Iterator[None]:
    """Run a :class:`PeerMonitor` within the block, if there are several ranks.

    Args:
        accelerator: of the run.
        preemption: tells whether the launcher asked this process to end.
        is_enabled: ``train.peer_monitor``.
    """
    store = create_run_store() if is_enabled and accelerator.num_processes > 1 else None
    if store is None:
        yield
        return
    monitor = PeerMonitor(
        store,
        accelerator.process_index,
        accelerator.num_processes,
        timeout=default_timeout(dist.get_backend()),
    )
    monitor.start()
    try:
        yield
        accelerator.wait_for_everyone()
    except BaseException as error:
        if isinstance(error, SharedError) or (isinstance(error, StoppedError) and error.is_shared):
            monitor.close()
            raise
        if _is_failed_collective(error):
            monitor.wait_for_lost_peer(preemption)
        monitor.fail(error)
        raise
    monitor.close()
