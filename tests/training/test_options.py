"""A method of the user's own: one class, one line that registers it, its options derived."""

import os
import subprocess
import sys
import textwrap
from typing import Annotated, Literal

import pytest
import torch
import yaml
from pydantic import Field
from tiny_models import VIT, random_images, tiny_backbone

import singer.methods
from singer.config.loading import load_config, to_yaml
from singer.config.schema import parse_config
from singer.errors import SingerError
from singer.methods import METHODS, Distiller, FitNet


class Scaled(Distiller):
    def __init__(
        self,
        *args,
        scale: Annotated[float, Field(gt=0)] = 0.5,
        kind: Literal["l1", "l2"] = "l2",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.scale, self.power = scale, {"l1": 1, "l2": 2}[kind]

    def losses(self, student, teacher):
        pairs = [
            (self.projected_student(layer, student), self.aligned_teacher(layer, teacher))
            for layer in self.layers
        ]
        kd = sum((a - self.scale * b).abs().pow(self.power).mean() for a, b in pairs)
        return {"loss": kd, "kd": kd}


class Heavier(FitNet):
    def __init__(self, *args, extra: float, kd_weight: float = 3.0, **kwargs):
        super().__init__(*args, kd_weight=kd_weight * extra, **kwargs)


class Bare(FitNet):
    pass


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, method in (("scaled", Scaled), ("heavier", Heavier), ("bare", Bare)):
        monkeypatch.setitem(METHODS, name, method)


def with_method(values, **method):
    return {**values, "method": method}


def test_options_are_those_of_the_constructor(values):
    method = parse_config(with_method(values, name="scaled", scale=2)).method
    assert method.model_dump() == {
        "name": "scaled",
        "layers": None,
        "scale": 2.0,
        "kind": "l2",
        "projection_init": "random",
    }
    method = parse_config(with_method(values, name="heavier", extra=2, layers=[1, 3])).method
    assert method.model_dump() == {
        "name": "heavier",
        "layers": [1, 3],
        "extra": 2.0,
        "kd_weight": 3.0,
        "layer_weights": None,
        "backend": None,
        "projection_init": "random",
    }
    method = parse_config(with_method(values, name="bare")).method
    assert method.model_dump() == {
        "name": "bare",
        "layers": None,
        "kd_weight": 1.0,
        "layer_weights": None,
        "backend": None,
        "projection_init": "random",
    }


def test_it_reads_back_equal_and_is_immutable(values, tmp_path):
    config = parse_config(with_method(values, name="scaled", kind="l1"))
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert "kind: l1" in path.read_text()
    with pytest.raises(ValueError, match="frozen"):
        config.method.scale = 1.0


def test_it_is_built_from_its_section(values):
    options = parse_config(with_method(values, name="scaled", scale=2, layers=[1, 3])).method
    teacher = tiny_backbone(VIT, depth=4)
    student = tiny_backbone(VIT, depth=2, dim=16)
    method = METHODS[options.name](
        teacher, student, images=None, seed=0, **options.model_dump(exclude={"name"})
    )
    images = random_images(teacher)
    of_student, of_teacher = method.student_tokens(images), method.teacher_tokens(images)
    expected = sum(
        (method.projected_student(layer, of_student) - 2 * of_teacher[layer]).square().mean()
        for layer in (1, 3)
    )
    torch.testing.assert_close(method(images)["loss"], expected)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "scaled", "scale": 0}, "method.scale: got 0: .*greater than 0"),
        ({"name": "scaled", "scale": float("nan")}, "method.scale: got nan: .*finite"),
        ({"name": "scaled", "kind": "l3"}, "method.kind: got 'l3': .*'l1' or 'l2'"),
        (
            {"name": "scaled", "scael": 1},
            "unknown key 'method.scael' of method 'scaled'; did you mean 'scale'",
        ),
        ({"name": "heavier"}, "method.extra: missing"),
        ({"name": "sclaed"}, r"method\.name: got 'sclaed'.*did you mean 'scaled'"),
        ({"name": "scaled", "layers": "all"}, "method.layers: got 'all'"),
    ],
)
def test_mistakes_are_named_as_for_the_other_methods(values, method, expected):
    with pytest.raises(SingerError, match=expected) as caught:
        parse_config(with_method(values, **method))
    assert "\n" not in str(caught.value)


class Untyped(Distiller):
    def __init__(self, *args, scale=1.0, **kwargs):
        super().__init__(*args, **kwargs)


class Closed(Distiller):
    def __init__(self, teacher, student, scale: float = 1.0):
        super().__init__(teacher, student)


class Named(Distiller):
    def __init__(self, *args, name: str = "x", **kwargs):
        super().__init__(*args, **kwargs)


class Unreadable(Distiller):
    def __init__(self, *args, scale: "Nowhere" = 1.0, **kwargs):  # noqa: F821
        super().__init__(*args, **kwargs)


class Odd(Distiller):
    def __init__(self, *args, images_before: torch.Tensor = None, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Untyped, "Untyped: its option 'scale' has no type hint"),
        (Closed, "Closed takes no 'layers'"),
        (Named, "Named: its option 'name' is taken"),
        (Unreadable, "Unreadable has a type hint that can't be read: .*Nowhere"),
        (Odd, "Odd: its options can't be checked: .*Tensor"),
        (torch.nn.Module, "Module is no subclass of singer.methods.Distiller"),
        (print, "print is no subclass"),
    ],
)
def test_a_class_that_is_no_method_is_named(values, monkeypatch, method, expected):
    monkeypatch.setitem(METHODS, "mine", method)
    with pytest.raises(SingerError, match=f"method 'mine': {expected}") as caught:
        parse_config(with_method(values, name="mine"))
    assert "\n" not in str(caught.value)


# --- plugins --------------------------------------------------------------------------------------


def documented_module():
    """Return the example of the package's documentation."""
    _, _, example = singer.methods.__doc__.partition("registers it::\n")
    return textwrap.dedent(example.partition("Saved as")[0])


def test_the_documented_example_is_found_by_the_program(tmp_path, values):
    (tmp_path / "scaled.py").write_text(documented_module())
    values = {**with_method(values, name="scaled", scale=0.3), "plugins": ["scaled"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    program = (
        "import sys; from singer.config.loading import load_config, to_yaml; "
        "print(to_yaml(load_config(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    for line in ("name: scaled", "scale: 0.3", "- scaled"):
        assert line in done.stdout


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "ModuleNotFoundError: No module named 'broken_plugin'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(
    tmp_path, values, monkeypatch, content, expected
):
    monkeypatch.syspath_prepend(tmp_path)
    if content is not None:
        (tmp_path / "broken_plugin.py").write_text(content)
    values = {**values, "plugins": ["broken_plugin"]}
    message = rf"plugins\.0: got 'broken_plugin': can't be imported: {expected}"
    with pytest.raises(SingerError, match=message) as caught:
        parse_config(values)
    assert "\n" not in str(caught.value)
