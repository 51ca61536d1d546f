"""The command line: its errors above all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml

import singer
from singer.cli import main


@pytest.fixture
def config_file(tmp_path, values):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_distill_runs_as_a_program(config_file, capsys):
    command = [sys.executable, "-m", "singer.cli", "distill", "--config", str(config_file)]
    done = subprocess.run(
        [*command, "train.steps=3"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(singer.__file__).parents[1],  # where Python looks first: the package tested
    )
    assert done.returncode == 0, done.stderr
    for text in ("step 3/3", "images per second", "student.safetensors"):
        assert text in done.stdout.replace("\n", "")
    assert main(command[3:]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["teacher.name=vit_tiny_patch16_225"], "did you mean 'vit_tiny_patch16_224'"),
        (["student.name=resnet18"], "student.name: 'resnet18' is no plain Vision Transformer"),
        (["student.name=swin_tiny_patch4_window7_224", "student.options=null"], "student"),
        (["image_size=33"], "patch of 8 px does not divide the image size 33"),
        (["student.options.patch_size=16"], "student.options.patch_size"),
        (["student.options.wings=2"], "wings"),
        (["method.layers=[4]"], "method.layers: got 4, expected -4 to 3"),
        (["method.layers=[3,-1]"], "names a block twice"),
        (["method.layers=[]"], "method.layers: got no layer"),
        (["method.layers=[0,1,2]"], "at most 2, the number of the student's blocks"),
        (["method.rank=33"], "method.rank: got 33, expected 1 to 32"),
        (["method.backend=warp"], "method.backend: got 'warp', expected one of"),
        (["trian.lr=1"], "unknown key 'trian'; did you mean 'train'"),
        (["data.source=absent"], "data.source: got 'absent', expected an existing folder"),
        (["train.batch_size=99"], "train.batch_size: got 99"),
        (["student.options.depth=0"], "it has no block"),
        (["student.options.num_heads=3"], "student: timm can't build"),
        (["teacher.name=vit_tiny_patch16_224.nonsense"], "has no weights tagged 'nonsense'"),
        ([f"output={'x' * 300}"], "can't be written: File name too long"),
        (["output=/dev/null/run"], "output: '/dev/null/run' can't be made"),
        (["teacher.weights=absent.pth"], "teacher.weights: got 'absent.pth'"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(config_file, values, capsys, overrides, expected):
    assert main(["distill", "--config", str(config_file), *overrides]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("singer: error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert out == ""
    assert not Path(values["output"]).exists()


def test_weights_that_do_not_fit_are_refused(config_file, values, capsys, tmp_path):
    import torch

    torch.save({"nonsense": torch.zeros(2)}, tmp_path / "bad.pth")
    override = f"teacher.weights={tmp_path / 'bad.pth'}"
    assert main(["distill", "--config", str(config_file), override]) == 2
    err = capsys.readouterr().err
    assert "teacher.weights" in err
    assert err.count("\n") == 1
    assert not Path(values["output"]).exists()


def test_unreadable_image_in_a_worker_is_one_line_too(config_file, image_folder, capsys):
    (image_folder / "class0" / "0.png").write_bytes(b"broken")
    assert main(["distill", "--config", str(config_file), "data.num_workers=1"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("singer: error: data.source: 1 of 12 images can't be read")
    assert "0.png" in err


def test_brackets_in_a_path_are_printed_as_they_are(config_file, tmp_path, capsys):
    output = tmp_path / "run[vit][/b]"
    assert main(["distill", "--config", str(config_file), f"output={output}"]) == 0
    printed = capsys.readouterr().out.replace("\n", "").replace("│", "").replace(" ", "")
    assert "run[vit][/b]" in printed


def test_ctrl_c_is_one_line_and_code_130(config_file, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("singer.engine.run.train", interrupt)
    assert main(["distill", "--config", str(config_file)]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_is_one_line(config_file, values, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["distill", "--config", str(config_file)]) == 2
    err = capsys.readouterr().err
    assert "config.yaml can't be written: No space left on device" in err
    assert err.count("\n") == 1
    assert not Path(values["output"]).exists()


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--config", "absent.yaml"], []])
def test_missing_requirements_are_one_line(arguments, capsys, monkeypatch):
    required = ["torch>=2.10", "no-such-one>=1", "no_such.two", "no-such-three; extra == 'demo'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: required)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("singer: error: not installed: no-such-one, no_such.two; pip install")
    assert err.count("\n") == 1
    assert out == ""


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("singer ")


def test_no_hub_is_one_line(config_file, capsys, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("the hub can't be reached")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    assert main(["distill", "--config", str(config_file), "teacher.weights=pretrained"]) == 2
    err = capsys.readouterr().err
    assert "the hub can't be reached" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["fly"], ["distill"], ["demo", "--steps", "x"]])
def test_wrong_usage_has_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: singer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "0"], "train.steps: got 0"),
        (["--seed", "-1"], "train.seed: got -1"),
        (["--teacher", "vit_smal_patch16_224"], "did you mean 'vit_small_patch16_224'"),
    ],
)
def test_mistakes_in_the_demos_options(arguments, expected, capsys, tmp_path):
    output = tmp_path / "demo"
    assert main(["demo", "--output", str(output), *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.lr=3e-4"], "--train.lr=3e-4; write train.lr=3e-4"),
        (["--train.lr", "3e-4"], "--train.lr; write train.lr=VALUE"),
        (["--output=b", "--fly"], "--output=b --fly; write output=b"),
        (["--lr=3e-4"], "--lr=3e-4"),
        (["-q"], "-q"),
        (["--resum"], "--resum"),
        (["--conf", "b.yaml"], "--conf"),
    ],
)
@pytest.mark.parametrize("before", [[], ["image_size=32", "--resume"]])
def test_only_wrong_arguments_are_named(config_file, capsys, arguments, expected, before):
    command = ["distill", *before, "--config", str(config_file), "train.steps=2", *arguments]
    with pytest.raises(SystemExit) as caught:
        main([*command, "output=a"])
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == f"singer: error: unrecognized arguments: {expected}"


def test_a_rank_that_is_no_number_is_one_line(config_file, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    assert main(["distill", "--config", str(config_file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("singer: error: RANK: got 'first', expected a whole number from 0")
    assert err.count("\n") == 1


def test_a_container_that_announces_one_process_trains_alone(config_file, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["distill", "--config", str(config_file), "train.steps=2"]) == 0
    assert "images per second" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_a_run_takes_the_prefix_that_it_is_told(config_file, values, capsys, tmp_path, key):
    import torch

    options = {**values[key]["options"], "img_size": 32, "num_classes": 0}
    state = timm.create_model(values[key]["name"], **options).state_dict()
    torch.save({"a": state, "b": state}, tmp_path / "two.pth")
    command = ["distill", "--config", str(config_file), "train.steps=2"]
    command.append(f"{key}.weights={tmp_path / 'two.pth'}")
    assert main(command) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"under 'a.' and 'b.'; set {key}.weights_prefix to one of them" in err
    assert not Path(values["output"]).exists()
    assert main([*command, f"{key}.weights_prefix=b."]) == 0
