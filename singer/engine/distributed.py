"""Process groups: start-up, errors shared by all ranks, signals, barriers."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from singer.errors import STOP_SIGNALS, SharedError, SingerError, StoppedError, one_line

_logger = logging.getLogger("singer")

P = ParamSpec("P")
Result = TypeVar("Result")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""One rank may load what the others wait for; :mod:`.peer_monitor` finds ranks that have died."""

BARRIER_TIMEOUT = 24 * 3600.0
"""Seconds for which a rank waits while another one fills its part of ``teacher.cache``."""

_STORE_TIMEOUT = timedelta(seconds=60)
_JOIN_TIMEOUT = timedelta(minutes=10)


def run_on_all_ranks(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a function so that its ``SingerError`` on one rank is raised on all of them.

    Every rank must call it at the same point; the function itself must not wait for other ranks.

    Raises:
        SharedError: by the decorated function: it failed somewhere; the message names the rank,
            unless it failed on all.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        result: Result | None = None
        message = None
        try:
            result = function(*args, **kwargs)
        except SingerError as error:
            if PartialState().num_processes == 1:
                raise
            message = str(error)
        messages = gather_object([message])
        failed = [rank for rank, text in enumerate(messages) if text is not None]
        if failed:
            where = "" if len(failed) == len(messages) else f"rank {failed[0]}: "
            raise SharedError(f"{where}{messages[failed[0]]}")
        return result

    return run


def run_on_main(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a function to run on the main rank only, and return its (small) result on all.

    Raises:
        SharedError: by the decorated function, see :func:`run_on_all_ranks`.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        is_main = PartialState().is_main_process
        result = run_on_all_ranks(lambda: function(*args, **kwargs) if is_main else None)()
        return broadcast_object_list([result])[0]

    return run


_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_OTHER_SIZES = (*_SIZES[1:], "SLURM_STEP_NUM_TASKS")
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = {
    **dict.fromkeys((*_SIZES, *_OTHER_SIZES, "LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS"), 1),
    **dict.fromkeys(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0),
    **dict.fromkeys(("LOCAL_RANK", "MPI_LOCALRANKID", "MASTER_PORT"), 0),
}
"""Launchers' variables that are numbers, and the least value of each."""

_MAX_PORT = 65535


def check_environment(uses_cpu: bool) -> None:
    """Check the launchers' variables.

    Those that are empty or -1 are unset, as well as those that announce a single process but not
    where it could be reached: it needs no process group. A MASTER_PORT that is no port is then
    unset, too: Kubernetes sets ``tcp://...`` where a service is called ``master``.

    Args:
        uses_cpu: the run uses no GPU.

    Raises:
        SingerError: several processes are announced, but a variable is missing; or by one launcher
            and not by WORLD_SIZE; or a value does not fit.
    """
    for name in (*_NUMBERS, "MASTER_ADDR"):
        if os.environ.get(name, "unset").strip() in ("", "-1"):
            del os.environ[name]
    counter = next((name for name in _SIZES if name in os.environ), "WORLD_SIZE")
    is_single = os.environ.get(counter, "1").strip() == "1"
    for name, least in _NUMBERS.items():
        text, most = os.environ.get(name), _MAX_PORT if name == "MASTER_PORT" else sys.maxsize
        if text is None or (text.strip().isdecimal() and least <= int(text) <= most):
            continue
        if name == "MASTER_PORT" and is_single:
            del os.environ[name]
            continue
        upper = f" to {most}" if most < sys.maxsize else ""
        raise SingerError(
            f"{name}: got {text!r}, expected a whole number from {least}{upper}; the launcher sets "
            f"it"
        )
    size = int(os.environ.get(counter, "1"))
    for name in ("RANK", "LOCAL_RANK"):
        if int(os.environ.get(name, "0")) >= size:
            raise SingerError(
                f"{name}: got {os.environ[name]}, expected less than {size}, the number of "
                f"processes ({counter})"
            )
    if size > 1:
        # Accelerate knows MPI's ranks, and counts on CPUs without LOCAL_RANK.
        needed = ["MASTER_ADDR", *(["MASTER_PORT", "RANK"] if counter == "WORLD_SIZE" else [])]
        needed += [] if uses_cpu else ["LOCAL_RANK"]
        missing = [name for name in needed if name not in os.environ]
        if missing:
            raise SingerError(
                f"{counter} is {size}, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set; a launcher (torchrun, "
                f"accelerate launch) sets all of them"
            )
    elif any(name not in os.environ for name in _TORCH):
        other = next((name for name in _OTHER_SIZES if int(os.environ.get(name, "1")) > 1), None)
        if other is not None:
            raise SingerError(
                f"WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set')}, but {other} is "
                f"{os.environ[other]}: each process would train alone; a launcher (torchrun, "
                f"accelerate launch) sets WORLD_SIZE; if each is a run of its own, unset {other}"
            )
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)


def create_accelerator(precision: str) -> Accelerator:
    """Create the run's Accelerator, and with it the launcher's process group, if there is one.

    Args:
        precision: ``fp32``, or ``bf16`` or ``fp16`` autocast.

    Raises:
        SingerError: another precision was used in this process, or it needs a GPU; or Accelerate is
            configured for more than data parallelism; or see :func:`check_environment`.
    """
    try:
        check_environment(_uses_cpu())
        _join_restarted()
        accelerator = Accelerator(
            # Without a GPU, Accelerate ignores the launcher's world size unless cpu=True.
            cpu=_uses_cpu(),
            mixed_precision={"fp32": "no"}.get(precision, precision),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            ],
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise SingerError(f"accelerate: {one_line(error)}") from error
        # Accelerate keeps one precision per process.
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


def _uses_cpu() -> bool:
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def _launchers_store() -> dist.Store | None:
    """Connect to the TCP store at ``MASTER_ADDR``; None: that is not set."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        return None
    return dist.TCPStore(host, int(port), is_master=False, timeout=_STORE_TIMEOUT)


def _output_key(output: str) -> str:
    return f"singer/output/{hashlib.sha256(os.path.abspath(output).encode()).hexdigest()}"


def register_output(output: str) -> None:
    """Record in the launcher's store that this run created its output directory.

    Processes that the launcher restarts can then tell it from one that was there before.
    """
    if launcher_holds_store():
        _launchers_store().set(_output_key(output), "")


@run_on_main
def is_output_registered(output: str) -> bool:
    """Return whether processes that the same launcher started earlier created the directory."""
    return launcher_holds_store() and _launchers_store().check([_output_key(output)])


def launcher_holds_store() -> bool:
    """Return whether the store is the launcher's, and so outlives the processes (torchrun)."""
    is_announced = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return is_announced and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ


def _join_restarted() -> None:
    """Initialise the process group under a fresh store prefix: restarted ranks see no stale keys.

    torchrun's store outlives the processes that it restarts: a new one may find the address of a
    dead one, and torch then fails to connect (pytorch issue 135712).
    """
    backends = {"cpu": "gloo", "cuda": "nccl"}
    kind = "cpu" if _uses_cpu() else torch.accelerator.current_accelerator().type
    if not launcher_holds_store() or dist.is_initialized() or kind not in backends:
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return
    rank, store = int(os.environ["RANK"]), _launchers_store()
    name = agree_on_group(store, rank, size)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # or NCCL would use GPU 0
    dist.init_process_group(
        backends[kind],
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def agree_on_group(store: dist.Store, rank: int, size: int) -> str:
    """Return a store prefix that the current processes share and no earlier ones used.

    Every process writes a random token. Rank 0 joins them; the group is settled when each process
    has found its own token in it, not a stale one of an earlier process of its rank.

    Args:
        store: may hold what earlier processes wrote.
        rank: of this process.
        size: number of ranks.

    Raises:
        TimeoutError: the others did not join within ten minutes.
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


class PreemptionHandler:
    """Records the signals that ask a run to stop: :data:`singer.errors.STOP_SIGNALS`.

    A context manager. ``signal`` is the name of the first signal received, or None. A second Ctrl-C
    interrupts at once, and so does each signal within :meth:`stopping_at_once`. A signal that the
    process was started to ignore (SIGHUP under nohup) stays ignored. Outside Python's main thread
    no handler is installed.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._interrupts = 0
        self._stops_at_once = False

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                number = getattr(signal, name, None)  # Windows has no SIGUSR1 and no SIGHUP
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._record)
        return self

    def _record(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number).name
        if self._stops_at_once or (number == signal.SIGINT and self._interrupts > 1):
            raise KeyboardInterrupt  # no `except Exception` of a library takes it for its own
        if number == signal.SIGINT:
            # The terminal was closed, or the signal came within another print.
            with suppress(OSError, RuntimeError):
                print("singer: saving; Ctrl-C again to end at once", file=sys.stderr)

    @contextmanager
    def stopping_at_once(self, place: str) -> Iterator[None]:
        """End the block at the first signal, whatever it does: it leaves nothing to be saved.

        Args:
            place: where the run stopped, for the message.

        Raises:
            StoppedError: a signal came, within the block or before it.
        """
        self._stops_at_once = True
        try:
            if self.signal is not None:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            if self.signal is None:
                raise
            raise StoppedError(self.signal, place, is_shared=False) from None
        finally:
            self._stops_at_once = False

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


def create_run_store() -> dist.Store | None:
    """Return the launcher's store under a prefix of this run's own; None: there is none."""
    (name,) = broadcast_object_list([uuid.uuid4().hex])
    store = _launchers_store()
    if store is None:
        _logger.warning("MASTER_ADDR is not set: that a process died can't be noticed by others")
        return None
    return dist.PrefixStore(f"singer/run/{name}", store)


class StoreBarrier:
    """A barrier over the TCP store, with a limit of :data:`BARRIER_TIMEOUT`.

    A collective barrier would time out where one rank works for hours longer than another. Ranks
    that have died are found sooner, by :mod:`singer.engine.peer_monitor`.

    Args:
        accelerator: of the run; every rank creates the barrier at the same point.
        preemption: its signal ends the wait.
    """

    def __init__(
        self, accelerator: Accelerator, preemption: PreemptionHandler | None = None
    ) -> None:
        self.accelerator = accelerator
        self.preemption = preemption
        self.store = create_run_store() if accelerator.num_processes > 1 else None
        self.calls = 0

    def __call__(self) -> None:
        """Wait until every rank has called it as often.

        Raises:
            StoppedError: a signal came first.
            SingerError: the others did not come within :data:`BARRIER_TIMEOUT`.
        """
        if self.store is None:
            self.accelerator.wait_for_everyone()
            return
        key = f"barrier/{self.calls}"
        self.calls += 1
        self.store.add(key, 1)
        started = time.monotonic()
        while (arrived := self.store.add(key, 0)) < self.accelerator.num_processes:
            name = None if self.preemption is None else self.preemption.signal
            if name is not None:
                raise StoppedError(name, "while other processes were waited for", is_shared=False)
            if time.monotonic() - started > BARRIER_TIMEOUT:
                raise SingerError(
                    f"{self.accelerator.num_processes - arrived} of "
                    f"{self.accelerator.num_processes} processes have not come for "
                    f"{BARRIER_TIMEOUT / 3600:.0f} hours; see to them, or start anew"
                )
            time.sleep(0.1)
