"""Reading and checking a run's configuration."""

import os
import pickle
import tempfile
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from singer.config.loading import load_config, to_yaml
from singer.config.schema import _TAKEN_OPTIONS, method_config, parse_config
from singer.config.yaml_text import _Loader, dump_yaml, load_yaml, parse_override, resolve
from singer.errors import SingerError
from singer.methods import METHODS


def _write(tmp_path, values):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
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


def test_a_list_of_sources_reads_back_equal(tmp_path, values):
    override = 'data.source=[~/a, 1e3, "b-{0..3}.tar"]'
    config = load_config(_write(tmp_path, values), [override])
    assert config.data.source == [os.path.expanduser("~/a"), "1e3", "b-{0..3}.tar"]
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    again = load_config(tmp_path / "resolved.yaml", ["data.source=b-{0..3}.tar"])
    assert again.data.source == "b-{0..3}.tar"


def test_resolved_configuration_reads_back_equal(tmp_path, make_config):
    config = make_config(method={"layers": [0, -1], "variant": "official"})
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


TEXTS = [
    "runs/exp #3",
    "name: value",
    "${oc.env:X}",
    "[a",
    "[a]",
    "{a: 1}",
    "1e3",
    "007",
    "2024-01-01",
    "null",
    "yes",
    "  blanks ",
    "é日本🙂",
    "a=b=c",
    "'quoted'",
    "#",
    "- a[1]",
    "&a *b !c %d @e",
    "2024-02-30",
    "0x_",
    "=",
    "<<",
    "2001-01-01 00:00:00 +99:00",
    "1" * 5000,
    ":".join(["1"] * 300) + ".5",
    "!!int x",
    "!!bool x",
    "!!timestamp x",
    "[" * 400,
    "!!python/name:os.system",
    "a\tb\nc",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_written(tmp_path, values, text):
    overrides = [f"output={text}", f"data.image_key={text}", f"train.trackers.0={text}"]
    config = load_config(_write(tmp_path, values), overrides)
    assert (config.output, config.data.image_key, config.train.trackers) == (text, text, [text])
    if text != "[a]":  # a list of sources
        assert load_config(_write(tmp_path, values), [f"data.source={text}"]).data.source == text


@pytest.mark.parametrize("text", ["1e3", "007", "null", "yes", "2024-01-01", "1:30", "a#b"])
def test_text_without_quotes_is_taken_as_written_in_files_and_lists(tmp_path, values, text):
    path = tmp_path / "config.yaml"
    rest = yaml.safe_dump({key: value for key, value in values.items() if key != "output"})
    path.write_text(f"output: {text}\n{rest}")
    config = load_config(path, [f"train.trackers=[{text}, 'a b']"])
    assert (config.output, config.train.trackers) == (text, [text, "a b"])


_GRAMMARS = {each[1] for of in _Loader.yaml_implicit_resolvers.values() for each in of}
_scalars = st.sampled_from(sorted(_GRAMMARS, key=str)).flatmap(
    lambda grammar: st.from_regex(grammar, fullmatch=True)
)


@settings(max_examples=200, deadline=None)
@given(
    _scalars.map(lambda text: " ".join(text.split())).filter(
        lambda text: text not in ("", "!", "&", "*")
    )
)
def test_any_number_date_or_word_of_yaml_is_a_text_as_well(text):
    written = load_yaml(f"a: {text}\nb: &x {text}\nc: *x")
    assert resolve(written, dict[str, str]) == dict.fromkeys("abc", text)
    assert resolve(load_yaml(f"[{text}, x]"), list[str]) == [text, "x"]
    assert resolve(parse_override(text), str) == text
    assert resolve(load_yaml(dump_yaml([text])), list[str]) == [text]


@pytest.mark.parametrize("text", ["2024-02-30", "0x_", "=", "<<", "1" * 5000, "!!int x"])
def test_a_text_where_a_number_is_expected_is_named(tmp_path, values, text):
    with pytest.raises(
        SingerError, match=r"^configuration: train\.steps: got '.*: (Input should|Unable to)"
    ):
        load_config(_write(tmp_path, values), [f"train.steps={text}"])


def test_what_is_no_text_is_read_as_yaml(tmp_path, values):
    values["students"] = [{**values.pop("student"), "folder": "a", "weights": "random"}]
    overrides = {
        "train.steps": "null",
        "train.compile": "yes",
        "train.lr": " 1e-3 ",
        "train.max_grad_norm": "2",
        "train.ema": "",
        "teacher.cache": "null",
        "data.crop_scale.0": "1e-1",
        "students.0.weights": "a b #c",
        "students.0.options.drop_path_rate": "1e-1",
        "students.0.options.global_pool": "avg #1",
        "teacher.options": "{qkv_bias: false, depth: 3}",
    }
    config = load_config(_write(tmp_path, values), [f"{k}={v}" for k, v in overrides.items()])
    assert (config.train.steps, config.train.compile, config.train.ema) == (None, True, None)
    assert (config.train.lr, config.train.max_grad_norm) == (1e-3, 2.0)
    assert config.data.crop_scale == (0.1, 1.0)
    assert config.teacher.cache is None
    assert config.teacher.options == {**values["teacher"]["options"], "qkv_bias": False, "depth": 3}
    (student,) = config.students
    assert (student.weights, student.folder) == ("a b #c", "a")
    assert student.options["drop_path_rate"] == 0.1
    assert student.options["global_pool"] == "avg #1"


def test_a_plugins_texts_are_taken_as_written(tmp_path, values, monkeypatch):
    class Named(METHODS["fitnet"]):
        def __init__(
            self, *args, tag: str, ways: list[str], mode: Literal["yes", "no"] = "no", **kwargs
        ):
            super().__init__(*args, **kwargs)

    monkeypatch.setitem(METHODS, "named", Named)
    values["method"] = {"name": "named"}
    overrides = ["method.tag=1e3", "method.ways=[no, 2]", "method.mode=yes", "method.kd_weight=2"]
    method = load_config(_write(tmp_path, values), overrides).method
    assert (method.tag, method.ways, method.mode) == ("1e3", ["no", "2"], "yes")
    assert method.kd_weight == 2


def test_an_alias_is_not_changed_with_its_anchor(tmp_path, values):
    values["student"] = {"name": "vit_tiny_patch16_224", "options": values["teacher"]["options"]}
    path = _write(tmp_path, values)
    assert "*id001" in path.read_text()
    config = load_config(path, ["student.options.depth=2"])
    assert (config.student.options["depth"], config.teacher.options["depth"]) == (2, 4)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text() | st.none(), st.lists(st.text()), st.dictionaries(st.text(), anything))
def test_any_text_reads_back_equal(text, optional, texts, options):
    options = {key: value for key, value in options.items() if key not in _TAKEN_OPTIONS}
    config = parse_config(
        {
            "teacher": {"name": text, "weights": text, "cache": optional, "options": options},
            "student": {"name": text},
            "method": {"name": "singer"},
            "data": {"source": text, "image_key": text, "crops": "center"},
            "train": {"trackers": texts},
            "output": text,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(config), encoding="utf-8", newline="")
        assert load_config(path) == config
        if "\0" not in text and text:
            assert load_config(path, [f"data.split={text}"]).data.split == text


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
        ("data.background=[0,0,256]", ["data.background.2", "256"]),
        ("data.background=[0,0]", ["data.background.2"]),
        ("data.interpolation=nearest", ["data.interpolation", "'bicubic' or 'bilinear'"]),
        ("data.normalization=none", ["data.normalization", "'model' or 'imagenet'"]),
        ("data.source=[]", ["data.source: got []: expected a path, a pattern"]),
        ("train.seed=-1", ["train.seed", "got -1"]),
        ("train.betas=[2,0.9]", ["train.betas", "got 2", "less than 1"]),
        ("teacher=null", ["teacher", "got None"]),
        ("train.lr=inf", ["train.lr", "got 'inf'", "finite"]),
        ("method.info_weight=.nan", ["method.info_weight", "got nan", "finite"]),
        (
            "method.name=vitkdd",
            ["method.name", "'fitnet', 'vitkd', 'vitkd_same_layers'; did you mean 'vitkd'"],
        ),
        ("method.name=null", ["method.name: got 'null'", "'singer', 'fitnet'"]),
        ("method=3", ["method: got 3"]),
        ("method.name=vitkd", ["unknown key 'method.rank' of method 'vitkd'"]),
        ("method.name=fitnet", ["unknown key 'method.rank' of method 'fitnet'"]),
        ("train.lr=[1", ["train.lr: got '[1'"]),
        ("train.precision=no", ["train.precision", "'fp32', 'bf16' or 'fp16'"]),
        ("student.options.num_classes=10", ["student.options", "num_classes can't be set here"]),
        ("teacher.options.pretrained=true", ["teacher.options", "pretrained can't be set here"]),
        ("teacher.weights=", ["teacher.weights", "got None"]),
        ("output=", ["output", "got None"]),
        ("train.steps.x=1", ["train.steps", "got {'x': 1}"]),
        ("train..lr=1", ["got 'train..lr=1'", "expected key=value"]),
        ("train.betas.2=0.5", ["train.betas: got '2', expected an index from 0 to 1"]),
        ("train.trackers.x=a", ["train.trackers: got 'x', expected an index from 0 to 0"]),
        ("students.0.weights=a", ["students: got '0', expected no index: it is empty"]),
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
    [
        ("a: [1", "config.yaml"),
        ("- 1\n- 2\n", "config.yaml"),
        ("a: 1\na: 2\n", "config.yaml.*'a' twice"),
        ("x: &a [*a]", "config.yaml.*recursive"),
        ("x: !!int a", "config.yaml: ValueError"),
        ("x: !!bool a", "config.yaml: KeyError"),
        ("x: !!timestamp a", "config.yaml: AttributeError"),
        ("x: !unknown a", "config.yaml.*!unknown"),
        ("x: " + "[" * 400 + "]" * 400, "config.yaml: RecursionError"),
    ],
    ids=[
        "broken YAML",
        "a list",
        "a key twice",
        "a recursive alias",
        "a tagged number",
        "a tagged word",
        "a tagged date",
        "an unknown tag",
        "too deep",
    ],
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
        "random_vectors": None,
        "detach_kd": False,
        "projection_init": "random",
        "backend": None,
    },
    "fitnet": {
        "layers": None,
        "kd_weight": 1.0,
        "layer_weights": None,
        "projection_init": "random",
        "backend": None,
    },
    "vitkd": {
        "layers": None,
        "mimic_layers": (0, 1),
        "kd_weight": 1.0,
        "generation_weight": 0.1,
        "mask_ratio": 0.5,
        "projection_init": "random",
        "backend": None,
    },
    "vitkd_same_layers": {
        "layers": None,
        "kd_weight": 1.0,
        "generation_weight": 1.0,
        "mask_ratio": 0.5,
        "projection_init": "random",
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
        ("singer", "random_vectors", "other"),
        ("singer", "detach_kd", "often"),
        ("singer", "projection_init", "other"),
        ("fitnet", "kd_weight", -1),
        ("fitnet", "layer_weights", [1, -1]),
        ("fitnet", "projection_init", "other"),
        ("vitkd", "kd_weight", -1),
        ("vitkd", "generation_weight", -1),
        ("vitkd", "mask_ratio", 0),
        ("vitkd", "mask_ratio", 1),
        ("vitkd", "mimic_layers", [-1]),
        ("vitkd_same_layers", "generation_weight", -1),
        ("vitkd_same_layers", "mimic_layers", [0]),
    ],
)
def test_bounds_of_the_built_in_methods(name, key, value):
    with pytest.raises(ValidationError, match=key):
        method_config(name).model_validate({"name": name, key: value})
