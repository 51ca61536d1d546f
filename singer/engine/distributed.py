"""Several processes as one run: how they start, agree on errors, and notice that one has died."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor

from singer.errors import EXIT_PEER_LOST, SharedError, SingerError, StoppedError

_logger = logging.getLogger("singer")

Result = TypeVar("Result")

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""One process may load what the others wait for; :class:`PeerWatch` sees those that die."""

_STORE_TIMEOUT = timedelta(seconds=60)
_JOIN_TIMEOUT = timedelta(minutes=10)


def create_accelerator(precision: str) -> Accelerator:
    """Join the processes that a launcher started, if any.

    Args:
        precision: ``fp32``, or ``bf16`` or ``fp16`` autocast.

    Raises:
        SingerError: another precision was used in this process, or it needs a GPU; or Accelerate is
            configured for more than data parallelism.
    """
    _join_restarted()
    try:
        accelerator = Accelerator(
            # Without it, where there is no GPU, Accelerate takes each process for the only one.
            cpu=_is_for_cpu(),
            mixed_precision={"fp32": "no"}.get(precision, precision),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT),
            ],
        )
    except ValueError as error:  # Accelerate keeps one precision per process
        raise SingerError(
            f"train.precision: got {precision!r}, but a run with another precision came before in "
            f"this process; start a new one"
        ) from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise SingerError("train.precision: got 'fp16', which needs a GPU; take 'bf16' or 'fp32'")
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise SingerError(
            f"accelerate: it is configured for {kind}, expected plain data parallelism: students "
            f"are small"
        )
    if accelerator.gradient_accumulation_steps != 1:  # it would divide the losses once more
        raise SingerError(
            f"accelerate: gradient_accumulation_steps is "
            f"{accelerator.gradient_accumulation_steps}, expected 1; set train.grad_accum_steps"
        )
    return accelerator


def _is_for_cpu() -> bool:
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def _launchers_store() -> dist.Store | None:
    """Return a connection to the store that the launcher's address names; None: it names none."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        return None
    return dist.TCPStore(host, int(port), is_master=False, timeout=_STORE_TIMEOUT)


def _folder_key(folder: str) -> str:
    return f"singer/folder/{hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()}"


def note_folder(folder: str) -> None:
    """Tell the launcher's store, if it outlives these processes, that they took a folder."""
    if _launcher_holds_store():
        _launchers_store().set(_folder_key(folder), "")


def is_noted(folder: str) -> bool:
    """Whether processes that the same launcher started before these took a folder."""
    return _launcher_holds_store() and _launchers_store().check([_folder_key(folder)])


def _launcher_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _join_restarted() -> None:
    """Join the other processes in a corner of the launcher's store that none used before.

    torchrun's store outlives the processes that it restarts. In it a new process may find the
    address of a dead one, and torch then fails to connect (pytorch issue 135712).
    """
    backends = {"cpu": "gloo", "cuda": "nccl"}
    kind = "cpu" if _is_for_cpu() else torch.accelerator.current_accelerator().type
    if not _launcher_holds_store() or dist.is_initialized() or kind not in backends:
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return
    store = _launchers_store()
    name = agree_on_group(store, rank, size)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before NCCL takes the first one
    dist.init_process_group(
        backends[kind],
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=size,
        timeout=_COLLECTIVE_TIMEOUT,
    )


def agree_on_group(store: dist.Store, rank: int, size: int) -> str:
    """Return a name that the processes running now share, and no earlier ones had.

    Every process shows a token of its own. Rank 0 puts them together; the group is settled when
    each process has found its own token in it, not one that a process of its rank left behind.

    Args:
        store: may hold what earlier processes wrote.
        rank: of this process.
        size: number of processes.

    Raises:
        TimeoutError: the others did not come within ten minutes.
    """
    own = uuid.uuid4().hex
    store.set(f"singer/token/{rank}", own)
    keys = [f"singer/token/{other}" for other in range(size)]
    deadline = time.monotonic() + _JOIN_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0 and store.check(keys):
            store.set("singer/group", " ".join(store.get(key).decode() for key in keys))
        group = store.get("singer/group").decode() if store.check(["singer/group"]) else ""
        tokens = group.split()
        if len(tokens) == size and tokens[rank] == own:
            name = f"singer/{hashlib.sha256(group.encode()).hexdigest()[:16]}"
            store.set(f"{name}/seen/{rank}", "")
            if rank == 0 and store.check([f"{name}/seen/{other}" for other in range(size)]):
                store.set(f"{name}/settled", "")
            if store.check([f"{name}/settled"]):
                return name
        time.sleep(0.05)
    raise TimeoutError(f"rank {rank} of {size}: the other processes did not come")


def together(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Do something in every process; if it fails in one, all of them raise that error.

    Args:
        accelerator: of the run.
        action: must not wait for the other processes.

    Raises:
        SharedError: it failed somewhere; the message names the rank, unless it failed everywhere.
    """
    result: Result | None = None
    message = None
    try:
        result = action()
    except SingerError as error:
        if accelerator.num_processes == 1:
            raise
        message = str(error)
    messages = gather_object([message])
    failed = [rank for rank, text in enumerate(messages) if text is not None]
    if failed:
        where = "" if len(failed) == len(messages) else f"rank {failed[0]}: "
        raise SharedError(f"{where}{messages[failed[0]]}")
    return result


def on_main(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Do something in the main process alone, and give its result (small, plain) to all.

    Raises:
        SharedError: see :func:`together`.
    """
    result = together(accelerator, action if accelerator.is_main_process else lambda: None)
    return broadcast_object_list([result])[0]


def global_means(means: Sequence[Tensor], counts: Sequence[Tensor]) -> list[Tensor]:
    """Scale means over one process's entries so that their average over the processes is exact.

    With c entries here, C in all and W processes, a mean m becomes m · c · W / C: averaged over the
    processes, as gradients are, that is the sum over all entries divided by their number.

    Args:
        means: scalars, differentiable.
        counts: over how many entries each was taken, scalars; a mean over none must be 0.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return list(means)
    own = torch.stack(list(counts)).to(means[0].dtype)
    total = own.clone()
    dist.all_reduce(total)
    shares = own * dist.get_world_size() / total.clamp_min(1)
    return [mean * share for mean, share in zip(means, shares, strict=True)]


class StopRequest:
    """Notes SIGTERM and SIGUSR1, with which schedulers announce that a machine is taken away.

    Within the block, ``requested`` names the first of these signals that came, if any did, Ctrl-C
    (SIGINT) included; a second Ctrl-C interrupts at once. Only Python's main thread can hear
    signals; elsewhere nothing is noted.
    """

    _NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")

    def __init__(self) -> None:
        self.requested: str | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in self._NAMES:
                number = getattr(signal, name, None)  # Windows has no SIGUSR1
                if number is not None:
                    self._former[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.requested == "SIGINT":
                raise KeyboardInterrupt
            print("singer: saving; Ctrl-C again to end at once", file=sys.stderr)
        self.requested = self.requested or signal.Signals(number).name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)


class PeerWatch:
    """Ends this process when another one of the run has died or hangs, and names its rank.

    A collective operation would wait for the dead one: up to its timeout, or for ever. Every
    process writes a sign of life into a store, and watches that of the next rank. Two threads do
    it: one may wait for the store, the other notes when it waits too long.

    Args:
        store: shared by all processes, and by this run alone.
        rank: of this process.
        size: number of processes.
        interval: seconds between two signs of life.
        patience: seconds without one after which a process counts as lost.
        end: what to do with the message; None: print it, and end the process at once with
            ``EXIT_PEER_LOST``.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        interval: float = 2.0,
        patience: float = 45.0,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.interval = interval
        self.patience = patience
        self.end = end or self._end_process
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._rounds = 0
        self._threads: list[threading.Thread] = []
        self._where = f"rank {rank} of {size} ({socket.gethostname()}, process {os.getpid()})"

    def start(self) -> None:
        """Show the first sign of life, and begin to watch."""
        self.store.set(f"life/{self.rank}", f"0 {self._where}")
        for target in (self._watch_peer, self._watch_store):
            thread = threading.Thread(target=target, name="peer-watch", daemon=True)
            thread.start()
            self._threads.append(thread)

    @property
    def has_ended(self) -> bool:
        """Whether it found that another process is lost."""
        return self._ended.is_set()

    def _end(self, message: str) -> None:
        if not self._closing.is_set() and not self._ended.is_set():
            self._ended.set()
            self.end(message)

    def _end_process(self, message: str) -> None:
        print(f"singer: error: {message}; rank {self.rank} ends", file=sys.stderr, flush=True)
        os._exit(EXIT_PEER_LOST)  # the main thread may wait in a collective operation for ever

    def _ticks(self) -> Iterator[float]:
        """Yield, at every interval, for how long this process itself did not run before it."""
        last = time.monotonic()
        while not self._closing.wait(self.interval) and not self._ended.is_set():
            # Suspended, or kept from running: the others may have been, too.
            yield max(0.0, time.monotonic() - last - 2 * self.interval)
            last = time.monotonic()

    def _watch_peer(self) -> None:
        watched = (self.rank + 1) % self.size
        last, since, name = b"", time.monotonic(), f"rank {watched} of {self.size}"
        try:
            for stalled in self._ticks():
                since += stalled
                self._rounds += 1
                self.store.set(f"life/{self.rank}", f"{self._rounds} {self._where}")
                if self.store.check(["failed"]):
                    self._end(self.store.get("failed").decode())
                elif self.store.check([f"done/{watched}"]):
                    since = time.monotonic()
                elif self.store.check([f"life/{watched}"]):
                    sign = self.store.get(f"life/{watched}")
                    if sign != last:
                        last, since = sign, time.monotonic()
                        name = sign.decode().partition(" ")[2]
                if time.monotonic() - since > self.patience:
                    message = f"{name} has shown no sign of life for {self.patience:.0f} s"
                    self.store.set("failed", message)
                    self._end(message)
        except RuntimeError as error:  # torch's DistError: whoever holds the store is gone
            self._end(f"{_store_holder(self.size)} is gone ({_line(error)})")

    def _watch_store(self) -> None:
        rounds, since = 0, time.monotonic()
        for stalled in self._ticks():
            since += stalled
            if self._rounds != rounds:
                rounds, since = self._rounds, time.monotonic()
            elif time.monotonic() - since > self.patience:
                self._end(f"{_store_holder(self.size)} has not answered for {self.patience:.0f} s")

    def fail(self, error: BaseException) -> None:
        """Tell the other processes that this one ends; they then end, too."""
        message = f"{self._where} failed: {type(error).__name__}: {_line(error)}"
        self._close({"failed": message, f"done/{self.rank}": ""})

    def close(self) -> None:
        """Stop watching and being watched."""
        self._close({f"done/{self.rank}": ""})

    def _close(self, last_words: Mapping[str, str]) -> None:
        self._closing.set()
        # In a thread, for a store that does not answer; it is the last.
        last = threading.Thread(target=self._say, args=(last_words,), daemon=True)
        last.start()
        # A thread that still waits for the store when Python ends would abort the process.
        for thread in (last, *self._threads):
            thread.join(timeout=self.interval + 10.0)

    def _say(self, words: Mapping[str, str]) -> None:
        try:
            for key, value in words.items():
                self.store.set(key, value)
        except RuntimeError as error:
            _logger.debug("the run's store is gone already: %s", error)


def _store_holder(size: int) -> str:
    return "the launcher on the first machine" if _launcher_holds_store() else f"rank 0 of {size}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _run_store() -> dist.Store | None:
    """Return a store with keys of this run's own, shared by its processes; None: there is none."""
    (name,) = broadcast_object_list([uuid.uuid4().hex])
    store = _launchers_store()
    if store is None:
        _logger.warning("MASTER_ADDR is not set: that a process died can't be noticed by others")
        return None
    return dist.PrefixStore(f"singer/run/{name}", store)


class PatientBarrier:
    """Waits until every process has called it as often, for as long as it takes.

    A collective barrier would give up after its timeout, where one process works for hours more
    than another. That a process has died is :class:`PeerWatch`'s to see.

    Args:
        accelerator: of the run; every process makes the barrier at the same point.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.store = _run_store() if accelerator.num_processes > 1 else None
        self.calls = 0

    def __call__(self) -> None:
        """Wait for the others."""
        if self.store is None:
            self.accelerator.wait_for_everyone()
            return
        key = f"barrier/{self.calls}"
        self.calls += 1
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.accelerator.num_processes:
            time.sleep(0.1)


def _is_lost_connection(error: BaseException) -> bool:
    text = str(error).lower()
    known = isinstance(error, dist.DistError)
    return known or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))


@contextmanager
def watching_peers(accelerator: Accelerator, stop: StopRequest) -> Iterator[None]:
    """Within the block, no process outlives another one by more than a minute.

    Args:
        accelerator: of the run.
        stop: whether the launcher wants this process to end.
    """
    store = _run_store() if accelerator.num_processes > 1 else None
    if store is None:
        yield
        return
    watch = PeerWatch(store, accelerator.process_index, accelerator.num_processes)
    watch.start()
    try:
        yield
        accelerator.wait_for_everyone()
    except SharedError:  # every process raises it
        watch.close()
        raise
    except BaseException as error:
        if isinstance(error, StoppedError) and error.is_shared:
            watch.close()
            raise
        if _is_lost_connection(error):
            # The cause lies in another process: the watch will name it, and end this one.
            deadline = time.monotonic() + watch.patience + 5 * watch.interval
            while time.monotonic() < deadline and not watch.has_ended:
                if stop.requested is not None:  # by the launcher, which names the rank
                    watch.end(f"another process has died, and {stop.requested} came")
                time.sleep(0.1)
        watch.fail(error)
        raise
    watch.close()
