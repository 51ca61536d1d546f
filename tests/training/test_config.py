"""Reading and checking a run's configuration."""

import pickle
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from singer.config.schema import (
    load_config,
    method_config,
    parse_config,
    to_yaml,
)
from singer.errors import SingerError


def _write(tmp_path, values):
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return path


def test_overrides_take_the_place_of_the_files_values(tmp_path, values):
    path = _write(tmp_path, values)
    config = load_config(
        path, ["train.lr=3e-4", "method.layers=[1,3]", "train.betas=[0.8,0.9]", "data.hflip=0"]
    )
    assert config.train.lr == 3e-4
    assert config.method.layers == [1, 3]
    assert config.train.betas == (0.8, 0.9)
    assert config.data.hflip == 0
    assert config.train.batch_size == values["train"]["batch_size"]


def test_resolved_configuration_reads_back_equal(tmp_path, make_config):
    config = make_config(method={"layers": [0, -1], "variant": "official"})
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_method_is_singer_unless_named(values):
    del values["method"]["name"]
    assert isinstance(parse_config(values).method, method_config("singer"))


def test_configuration_is_immutable(make_config):
    with pytest.raises(ValidationError):
        make_config().train.lr = 1.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=1", ["unknown key 'train.learning_rate'"]),
        ("train.batchsize=1", ["unknown key 'train.batchsize'", "did you mean 'batch_size'"]),
        ("method.rnk=4", ["unknown key 'method.rnk'", "did you mean 'rank'"]),
        ("outptu=x", ["unknown key 'outptu'", "did you mean 'output'"]),
        ("method.rank=0", ["method.rank", "got 0", "greater than or equal to 1"]),
        ("method.quantile=1.5", ["method.quantile", "got 1.5", "less than or equal to 1"]),
        ("method.variant=papper", ["method.variant", "got 'papper'", "'paper' or 'official'"]),
        ("method.name=sniger", ["method", "'sniger'", "'singer'", "'fitnet'"]),
        ("train.steps=many", ["train.steps", "got 'many'"]),
        ("train.precision=fp8", ["train.precision", "got 'fp8'"]),
        ("data.crop_scale=[0.5,0.1]", ["crop_scale", "[0.5, 0.1]"]),
        ("train.seed=-1", ["train.seed", "got -1"]),
        ("train.betas=[2,0.9]", ["train.betas", "got 2", "less than 1"]),
        ("teacher=null", ["teacher", "got None"]),
        ("train.lr=inf", ["train.lr", "got 'inf'", "finite"]),
        ("method.info_weight=.nan", ["method.info_weight", "got nan", "finite"]),
        (
            "method.name=vitkdd",
            ["method.name", "'singer', 'fitnet', 'vitkd'; did you mean 'vitkd'"],
        ),
        ("method.name=null", ["method.name", "got None"]),
        ("method=3", ["method: got 3"]),
        ("method.name=vitkd", ["unknown key 'method.rank' of method 'vitkd'"]),
        ("method.name=fitnet", ["unknown key 'method.rank' of method 'fitnet'"]),
        ("train.lr=[1", ["'train.lr=[1'"]),
        ("train.precision=no", ["train.precision", "'fp32', 'bf16' or 'fp16'"]),
        ("student.options.num_classes=10", ["student.options", "num_classes can't be set here"]),
        ("teacher.options.pretrained=true", ["teacher.options", "pretrained can't be set here"]),
        ("teacher.weights=null", ["teacher.weights", "got None"]),
        ("nonsense", ["got 'nonsense'", "expected key=value"]),
    ],
)
def test_mistakes_are_named(tmp_path, values, override, expected):
    with pytest.raises(SingerError) as caught:
        load_config(_write(tmp_path, values), [override])
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert text in message


def test_missing_keys_and_several_mistakes_are_all_named(values):
    del values["output"]
    del values["data"]["source"]
    values["train"]["stepz"] = 1
    with pytest.raises(SingerError) as caught:
        parse_config(values)
    for text in ("output: missing", "data.source: missing", "'train.stepz'; did you mean 'steps'"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a: [1", "config.yaml"), ("- 1\n- 2\n", "config.yaml"), ("x: ${y}\n", "config.yaml")],
    ids=["broken YAML", "a list", "unknown interpolation"],
)
def test_unreadable_files_are_named(tmp_path, content, expected):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(SingerError, match=expected) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [None, [1, 2], "x"])
def test_what_is_no_mapping_is_refused(values):
    with pytest.raises(SingerError, match="expected keys and values"):
        parse_config(values)


def test_a_teacher_must_have_its_weights_named(values):
    del values["teacher"]["weights"]
    with pytest.raises(SingerError, match=r"teacher\.weights: missing"):
        parse_config(values)


def test_paths_may_be_paths_and_start_at_home(values, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    values["output"] = Path("~/run")
    values["data"]["source"] = "~/images"
    values["teacher"]["weights"] = "~/teacher.safetensors"
    config = parse_config(values)
    assert config.output == f"{tmp_path}/run"
    assert config.data.source == f"{tmp_path}/images"
    assert config.teacher.weights == f"{tmp_path}/teacher.safetensors"


def test_missing_file_is_named(tmp_path):
    with pytest.raises(SingerError, match="No such file"):
        load_config(tmp_path / "absent.yaml")


DEFAULTS = {
    "singer": {
        "layers": None,
        "variant": "paper",
        "rank": 64,
        "quantile": 0.97,
        "kd_weight": 1.0,
        "outlier_weight": 0.01,
        "info_weight": 1.0,
        "linearization": "mlp",
        "selection": None,
        "threshold": 0.05,
        "backend": None,
    },
    "fitnet": {"layers": None, "kd_weight": 1.0, "backend": None},
    "vitkd": {
        "layers": None,
        "kd_weight": 1.0,
        "generation_weight": 1.0,
        "mask_ratio": 0.5,
        "backend": None,
    },
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_the_built_in_methods(name):
    fields = dict(method_config(name).model_fields)
    assert fields.pop("name").default == name
    assert {key: field.default for key, field in fields.items()} == DEFAULTS[name]


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_configuration_can_be_sent_to_another_process(values, name):
    config = parse_config({**values, "method": {"name": name, "kd_weight": 2.0}})
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("singer", "rank", 0),
        ("singer", "quantile", -0.1),
        ("singer", "quantile", 1.1),
        ("singer", "kd_weight", -1),
        ("singer", "outlier_weight", -1),
        ("singer", "info_weight", -1),
        ("singer", "threshold", 0),
        ("singer", "variant", "other"),
        ("singer", "linearization", "other"),
        ("singer", "selection", "other"),
        ("fitnet", "kd_weight", -1),
        ("vitkd", "kd_weight", -1),
        ("vitkd", "generation_weight", -1),
        ("vitkd", "mask_ratio", 0),
        ("vitkd", "mask_ratio", 1),
    ],
)
def test_bounds_of_the_built_in_methods(name, key, value):
    with pytest.raises(ValidationError, match=key):
        method_config(name).model_validate({"name": name, key: value})
