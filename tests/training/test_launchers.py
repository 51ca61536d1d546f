"""Real processes under real launchers, with gloo."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import singer
from singer.errors import EXIT_PEER_LOST

PACKAGE_ROOT = Path(singer.__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
CLI = ["-m", "singer.cli"]

DYING = """
import os, signal, sys
from singer.engine import peer_monitor, trainer
from singer.cli import main

original = trainer.Trainer._step
init = peer_monitor.PeerMonitor.__init__

def step(self, number, batches):
    dying = os.environ.get("DYING_RANK", "1")
    is_first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if number == 6 and os.environ["RANK"] == dying and is_first_life:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return original(self, number, batches)

def impatient(self, *arguments, **options):
    init(self, *arguments, **{**options, "interval": 0.2, "timeout": 3.0})

trainer.Trainer._step = step
peer_monitor.PeerMonitor.__init__ = impatient
sys.exit(main(sys.argv[2:]))
"""


def _environment(**extra):
    # A script's own folder is where Python looks first, not the one that the tests run in.
    path = os.pathsep.join([str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **extra}


def _run(command, **options):
    options = {"capture_output": True, "text": True, "check": False, "timeout": 300, **options}
    # Python looks where it is started: there, too, lies the package that is tested.
    return subprocess.run(command, env=_environment(), cwd=PACKAGE_ROOT, **options)


def _metrics(folder):
    with open(Path(folder, "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def distill(tmp_path, values):
    """The arguments of ``singer distill`` with the tiny configuration, and changes to it."""
    path = tmp_path / "config.yaml"
    values["train"] = {"steps": 9, "batch_size": 4, "log_every": 2, "save_every": 2, "ema": 0.9}
    values["method"]["quantile"] = 0.8

    def arguments(output, *overrides, **changes):
        path.write_text(OmegaConf.to_yaml(OmegaConf.create({**values, **changes})))
        return ["distill", "--config", str(path), f"output={tmp_path / output}", *overrides]

    return arguments


def _assert_close(folder, expected):
    found, wanted = _metrics(folder), _metrics(expected)
    for one, other in zip(found, wanted, strict=True):
        # Sums of float32 in another order; AdamW's first steps make 1e-7 in a gradient near 0
        # a difference of the order of the learning rate in its weight, but not in a loss.
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        ([*TORCHRUN, "--nproc-per-node", "2", *CLI], ["train.grad_accum_steps=2"]),
        ([*ACCELERATE, "--num_processes", "4", *CLI], ["data.num_workers=1"]),
    ],
    ids=["torchrun-2", "accelerate-4"],
)
def test_several_processes_train_as_one(distill, tmp_path, launcher, overrides):
    photographs = {"data": {"source": "photos", "num_workers": 0, "epoch_size": 24}}
    alone = _run([sys.executable, *CLI, *distill("alone", **photographs)])
    assert alone.returncode == 0, alone.stderr
    done = _run([*launcher, *distill("several", *overrides, **photographs)])
    assert done.returncode == 0, done.stderr
    _assert_close(tmp_path / "several", tmp_path / "alone")
    assert done.stdout.count("images per second") == 1


@pytest.mark.slow
def test_a_restart_by_the_launcher_goes_on_exactly(distill, tmp_path):
    two = [*TORCHRUN, "--nproc-per-node", "2"]
    whole = _run([*two, *CLI, *distill("whole")])
    assert whole.returncode == 0, whole.stderr
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    killed = _run([*two, "--max-restarts", "1", str(script), "SIGKILL", *distill("killed")])
    assert killed.returncode == 0, killed.stderr
    assert "local_rank: 1" in killed.stderr  # the launcher's report
    for name in ("student", "student_ema", "projections", "adapters"):
        found, expected = (
            load_file(tmp_path / run / f"{name}.safetensors") for run in ("killed", "whole")
        )
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert _metrics(tmp_path / "killed") == _metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_restart_leaves_a_folder_alone_that_it_did_not_make(distill, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.yaml").write_text("mine")
    command = [*TORCHRUN, "--nproc-per-node", "1", "--max-restarts", "1", *CLI, *distill("old")]
    done = _run(command)
    assert done.stderr.count("exists already and is left untouched") == 2
    assert [path.name for path in old.iterdir()] == ["config.yaml"]
    assert (old / "config.yaml").read_text() == "mine"


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "dead", "expected"),
    [
        ("SIGKILL", 1, "rank 1 of 2 ({host}, process {pid}) has shown no sign of life for 3 s"),
        ("SIGSTOP", 1, "rank 1 of 2 ({host}, process {pid}) has shown no sign of life for 3 s"),
        ("SIGSTOP", 0, "rank 0 of 2 has not answered for 3 s"),  # it holds the store
    ],
)
def test_a_dead_process_is_named_and_ends_the_others(distill, tmp_path, name, dead, expected):
    # Without a launcher that watches them: as on another machine than the dead one's.
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    port = str(_free_port())
    arguments = [sys.executable, str(script), name, *distill("run")]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DYING_RANK": str(dead)}
        processes.append(
            subprocess.Popen(
                arguments,
                env=_environment(**place, **where),
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    try:
        _, errors = processes[1 - dead].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - dead].returncode == EXIT_PEER_LOST
    message = expected.format(host=socket.gethostname(), pid=processes[dead].pid)
    assert f"singer: error: {message}; rank {1 - dead} ends" in errors
    assert len(_metrics(tmp_path / "run")) >= 4


def test_a_mistake_is_told_once(distill, tmp_path):
    command = [*TORCHRUN, "--nproc-per-node", "2", *CLI, *distill("run", "train.batch_size=5")]
    done = _run(command)
    lines = [line for line in done.stderr.splitlines() if line.startswith("singer: error: ")]
    assert len(lines) == 1
    assert "train.batch_size: got 5" in lines[0]
    assert re.search(r"exitcode *: 2", done.stderr)
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_process_stops_all_at_one_step(distill, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    two = [*TORCHRUN, "--nproc-per-node", "2"]
    done = _run([*two, str(script), "SIGUSR1", *distill("run")])
    assert "stopped by SIGUSR1 after step 6 of 9" in done.stderr
    assert done.stderr.count("singer: stopped") == 1
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert folders[-1].name == "step-000000006"
