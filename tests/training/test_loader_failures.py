"""Workers of the loader that die or hang, and shared memory that is too small for them."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
from interrupted_runs import QUIET, assert_same, saved_steps

from singer.cli import main
from singer.config.loading import to_yaml
from singer.data import loader as loaders
from singer.data.loader import CropDataset, check_shared_memory, create_loader
from singer.engine import run as training
from singer.engine.student import StudentTrainer
from singer.engine.trainer import Trainer
from singer.errors import SingerError, StoppedError

HOURS = 10_000


def _in_worker(monkeypatch, call, action):
    """Do something in a worker, at its n-th batch."""
    original, calls = CropDataset.__getitems__, []

    def getitems(self, sample_ids):
        calls.append(1)
        if len(calls) == call:
            action()
        return original(self, sample_ids)

    monkeypatch.setattr(CropDataset, "__getitems__", getitems)
    return lambda: monkeypatch.setattr(CropDataset, "__getitems__", original)


@pytest.mark.parametrize("how", ["asleep", "suspended"])
def test_a_loader_that_hangs_is_an_error(make_config, monkeypatch, how):
    def hang():
        time.sleep(0.5)  # its first batch is on its way
        if how == "suspended":  # it ends only by SIGKILL
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(HOURS)

    monkeypatch.setattr(loaders, "LOADER_TIMEOUT", 1.0)
    _in_worker(monkeypatch, 2, hang)
    loader = create_loader(make_config(data={"num_workers": 1}))
    started, batches = time.monotonic(), iter(loader)
    next(batches)
    with pytest.raises(SingerError, match=r"data\.num_workers: no batch .* 1 s.*shared memory"):
        next(batches)
    del batches, loader
    assert time.monotonic() - started < 60
    assert multiprocessing.active_children() == []


def test_an_interrupt_leaves_no_worker(make_config, monkeypatch):
    _in_worker(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    loader = create_loader(make_config(data={"num_workers": 1}))

    def interrupt(_):
        raise KeyboardInterrupt

    loader.on_wait = interrupt
    others = multiprocessing.active_children()
    batches = iter(loader)
    (worker,) = set(multiprocessing.active_children()) - set(others)
    with pytest.raises(KeyboardInterrupt):
        list(batches)
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL


def test_several_ranks_leave_a_stuck_loader_at_once(monkeypatch):
    trainer = object.__new__(Trainer)
    trainer.preemption = SimpleNamespace(signal=None)
    trainer.accelerator = SimpleNamespace(num_processes=2)
    trainer.completed_steps, trainer.steps, trainer.saved_step = 3, 9, 2
    trainer._waited_before_signal = 0.0
    trainer._stop_while_waiting(20.0)
    trainer.preemption.signal = "SIGTERM"
    message = "stopped by SIGTERM in step 4 of 9, .*no batch came; the run is saved after step 2"
    for first, late in ((30.0, 36.0), (0.5, 16.0)):  # the batch that was waited for; the next one
        trainer._stop_while_waiting(first)
        with pytest.raises(StoppedError, match=message) as caught:
            trainer._stop_while_waiting(late)
        assert not caught.value.is_shared


def test_what_several_ranks_lose_by_the_error_of_one_is_said(caplog):
    trainer = object.__new__(Trainer)
    trainer.accelerator = SimpleNamespace(num_processes=2)
    trainer.completed_steps, trainer.saved_step = 3, 3
    trainer._save_after_error(SingerError("a worker was killed"))
    assert caplog.text == ""
    trainer.saved_step = 2
    trainer._save_after_error(SingerError("a worker was killed"))
    assert "are lost (the run is saved after step 2)" in caplog.text
    assert "train.save_every" in caplog.text


def test_a_request_to_stop_is_heard_while_a_batch_is_waited_for(whole, values, monkeypatch):
    values["data"]["num_workers"] = 1
    config, expected = whole()

    def hang():
        time.sleep(3)  # the trainer has come to wait by then
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(HOURS)

    undo = _in_worker(monkeypatch, 8, hang)  # step 4, its second part
    with pytest.raises(StoppedError, match="SIGTERM after step 3 of 9"):
        training.train(config, QUIET)
    assert saved_steps(config) == [2, 3]
    undo()
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


def test_a_worker_that_the_kernel_kills_loses_no_step(whole, values, monkeypatch, capsys):
    values["data"]["num_workers"] = 1
    values["train"]["save_every"] = 100
    config, expected = whole()
    path = f"{config.output}.yaml"
    with open(path, "w", encoding="utf-8") as file:
        file.write(to_yaml(config))
    undo = _in_worker(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert main(["distill", "--config", path]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("singer: error: data.num_workers: a worker of the loader was ended by ")
    assert "SIGKILL, as the kernel does when memory runs out" in line
    assert saved_steps(config) == [3]
    undo()
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


def test_a_worker_that_dies_interrupts_no_update(whole, values, monkeypatch):
    values["data"]["num_workers"] = 1
    values["train"]["save_every"] = 100
    config, expected = whole()
    original = StudentTrainer.step

    def step(self, number, epoch):
        if number == 3:
            for worker in multiprocessing.active_children():
                worker.kill()
            time.sleep(1)
        original(self, number, epoch)

    monkeypatch.setattr(StudentTrainer, "step", step)
    with pytest.raises(SingerError, match="ended by SIGKILL"):
        training.train(config, QUIET)
    assert saved_steps(config)[-1] >= 3
    monkeypatch.setattr(StudentTrainer, "step", original)
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


def test_an_error_in_a_worker_is_one_line(make_config, monkeypatch):
    def fail():
        raise MemoryError("no\nroom")

    _in_worker(monkeypatch, 1, fail)
    loader = create_loader(make_config(data={"num_workers": 1}))
    with pytest.raises(SingerError, match=r"^data: a worker of the loader failed: .*room$"):
        list(loader)


def test_shared_memory_must_hold_the_batches_of_the_workers(make_config, monkeypatch):
    docker = make_config(
        image_size=224, train={"batch_size": 64}, data={"num_workers": 4, "epoch_size": 64}
    )
    monkeypatch.setattr(loaders, "free_shared_memory", lambda: 64 * 2**20)
    with pytest.raises(
        SingerError, match=r"data\.num_workers: 4 workers .* 83 MiB .*shared memory.* 64 MiB free"
    ):
        create_loader(docker)
    check_shared_memory(docker, 2)  # on two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SingerError, match="shared memory"):
        check_shared_memory(docker, 2)
    for data, free in (({"num_workers": 0}, 0), ({"num_workers": 4}, None)):
        monkeypatch.setattr(loaders, "free_shared_memory", lambda free=free: free)
        create_loader(make_config(data=data))
