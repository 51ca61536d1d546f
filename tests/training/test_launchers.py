"""Real processes under real launchers, with gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from interrupted_runs import fail_at
from programs import PACKAGE_ROOT, Program, killed_at_exit
from safetensors.torch import load_file

from singer.cli import main
from singer.engine.peer_monitor import PeerMonitor
from singer.engine.run_dir import RunDir
from singer.engine.trainer import Trainer
from singer.errors import EXIT_PEER_LOST, EXIT_STOPPED, SingerError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
CLI = ["-m", "singer.cli"]

SIGNALLED_RUN = """
import sys
from test_launchers import main_with_signal

sys.exit(main_with_signal(sys.argv[1], sys.argv[2:]))
"""


def main_with_signal(name, arguments):
    """Run in a process of its own, of which one, before any restart, signals itself at step 6."""
    original, init = Trainer._step, PeerMonitor.__init__

    def step(self, number, batches):
        signalled = os.environ.get("SIGNALLED_RANK", "1")
        is_first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if number == 6 and os.environ["RANK"] == signalled and is_first_attempt:
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, number, batches)

    def init_with_short_timeout(self, *arguments, **options):
        init(self, *arguments, **{**options, "interval": 0.2, "timeout": 3.0})

    Trainer._step = step
    PeerMonitor.__init__ = init_with_short_timeout
    return main(arguments)


def main_with_full_disk(arguments):
    """Run in a process of its own; the main rank can't write the second log, of step 4."""
    fail_at(pytest.MonkeyPatch(), RunDir, "append_metrics", 2, SingerError("disk full"))
    return main(arguments)


def _environment(**extra):
    # A script's own folder is where Python looks first, not the one that the tests run in.
    paths = [str(PACKAGE_ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(paths)
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
        path.write_text(yaml.safe_dump({**values, **changes}))
        return ["distill", "--config", str(path), f"output={tmp_path / output}", *overrides]

    return arguments


def _assert_close(folder, expected):
    found, wanted = _metrics(folder), _metrics(expected)
    for one, other in zip(found, wanted, strict=True):
        # Sums of float32 in another order; AdamW's first steps make 1e-7 in a gradient near 0
        # a difference of the order of the learning rate in its weight, but not in a loss.
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
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
    assert main(distill("alone", **photographs)) == 0
    done = _run([*launcher, *distill("several", *overrides, **photographs)])
    assert done.returncode == 0, done.stderr
    _assert_close(tmp_path / "several", tmp_path / "alone")
    assert done.stdout.count("images per second") == 1


@pytest.mark.slow
def test_a_restart_by_the_launcher_goes_on_exactly(distill, tmp_path):
    two = [*TORCHRUN, "--nproc-per-node", "2"]
    whole = _run([*two, *CLI, *distill("whole")])
    assert whole.returncode == 0, whole.stderr
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED_RUN)
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


def _without_launcher(folder, function, *arguments, **environment):
    """Start two ranks that no launcher watches: as on different machines."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [
        Program(
            folder,
            function,
            *arguments,
            **place,
            **environment,
            OMP_NUM_THREADS="1",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]


@pytest.mark.sample(3, partial="each case starts several processes")
@pytest.mark.parametrize(
    ("name", "dead", "expected"),
    [
        ("SIGKILL", 1, "rank 1 of 2 ({host}, process {pid}) has shown no sign of life for 3 s"),
        ("SIGSTOP", 1, "rank 1 of 2 ({host}, process {pid}) has shown no sign of life for 3 s"),
        ("SIGSTOP", 0, "rank 0 of 2 has not answered for 3 s"),  # it holds the store
    ],
)
def test_a_dead_process_is_named_and_ends_the_others(distill, tmp_path, name, dead, expected):
    ranks = _without_launcher(
        tmp_path, main_with_signal, name, distill("run"), SIGNALLED_RANK=str(dead)
    )
    with killed_at_exit(ranks):
        assert ranks[1 - dead].wait(120) == EXIT_PEER_LOST
    message = expected.format(host=socket.gethostname(), pid=ranks[dead].pid)
    assert f"singer: error: {message}; rank {1 - dead} ends" in ranks[1 - dead].stderr
    assert len(_metrics(tmp_path / "run")) >= 4


def _assert_told_once(errors):
    lines = [line for line in errors.splitlines() if line.startswith("singer: error: ")]
    assert len(lines) == 1
    assert "train.batch_size: got 5" in lines[0]


def test_a_mistake_is_told_once(distill, tmp_path):
    ranks = _without_launcher(tmp_path, main, distill("run", "train.batch_size=5"))
    with killed_at_exit(ranks):
        assert [rank.wait(120) for rank in ranks] == [2, 2]
    _assert_told_once("".join(rank.stderr for rank in ranks))
    assert not (tmp_path / "run").exists()


def test_an_error_that_all_ranks_share_saves_the_completed_steps(distill, tmp_path):
    ranks = _without_launcher(tmp_path, main_with_full_disk, distill("run", "train.save_every=99"))
    with killed_at_exit(ranks):
        assert [rank.wait(120) for rank in ranks] == [2, 2]
    assert "".join(rank.stderr for rank in ranks).count("disk full") == 1
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000000004"]


@pytest.mark.slow
def test_a_mistake_is_told_once_under_a_launcher(distill, tmp_path):
    command = [*TORCHRUN, "--nproc-per-node", "2", *CLI, *distill("run", "train.batch_size=5")]
    done = _run(command)
    _assert_told_once(done.stderr)
    assert re.search(r"exitcode *: 2", done.stderr)
    assert not (tmp_path / "run").exists()


def _assert_stopped_at_one_step(errors, folder):
    assert "stopped by SIGUSR1 after step 6 of 9" in errors
    assert errors.count("singer: stopped") == 1
    folders = sorted((folder / "checkpoints").iterdir())
    assert folders[-1].name == "step-000000006"


def test_a_signal_to_one_process_stops_all_at_one_step(distill, tmp_path):
    ranks = _without_launcher(tmp_path, main_with_signal, "SIGUSR1", distill("run"))
    with killed_at_exit(ranks):
        assert [rank.wait(120) for rank in ranks] == [EXIT_STOPPED, EXIT_STOPPED]
    _assert_stopped_at_one_step("".join(rank.stderr for rank in ranks), tmp_path / "run")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_under_a_launcher(distill, tmp_path):
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED_RUN)
    two = [*TORCHRUN, "--nproc-per-node", "2"]
    done = _run([*two, str(script), "SIGUSR1", *distill("run")])
    _assert_stopped_at_one_step(done.stderr, tmp_path / "run")
