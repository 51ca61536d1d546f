"""What the public functions refuse, and how they say it."""

import re

import numpy as np
import pytest
import torch

import singer_kernels
from singer_kernels import FusedLosses, fused_losses

B, T, D, R = 2, 5, 6, 2

TENSORS = {  # function: its tensor arguments, the one that sets the device first
    "fused_losses": {
        "teacher": (B, T, D),
        "student": (B, T, D),
        "down": (D, R),
        "up": (R, D),
        "gram_target": (B, T, D),
    },
    "refine": {"teacher": (B, T, D), "down": (D, R), "up": (R, D)},
    "token_norms": {"tokens": (B, T, D)},
    "outlier_loss": {"norms": (B, T)},
    "gram_loss": {"tokens": (B, T, D), "target": (B, T, D)},
    "kd_loss": {"student": (B, T, D), "tokens": (B, T, D)},
}
DIMS = {(B, T, D): "[B, T, D]", (D, R): "[D, r]", (R, D): "[r, D]", (B, T): "[B, P]"}
ARGUMENTS = [(f, name) for f, shapes in TENSORS.items() for name in shapes]
WITH_PREFIX = ["fused_losses", "refine", "token_norms", "gram_loss"]
WITH_QUANTILE = ["fused_losses", "outlier_loss"]
FLOATS = "float64, float32, bfloat16 or float16"


def inputs(function):
    return {name: torch.randn(shape) for name, shape in TENSORS[function].items()}


def call(function, **changes):
    return getattr(singer_kernels, function)(**{**inputs(function), **changes})


def refuses(function, error, name, came, expected, **changes):
    """The message reads ``name: got <came>, expected <expected>``."""
    pattern = f"^{re.escape(name)}: got .*{re.escape(came)}.*expected .*{re.escape(expected)}"
    with pytest.raises(error, match=pattern):
        call(function, **changes)


@pytest.mark.parametrize("function", TENSORS)
def test_the_unchanged_inputs_are_accepted(function):
    call(function)


# --- tensors --------------------------------------------------------------------------------------

NO_TENSORS = {
    "a list": ([[1.0]], "[[1.0]] of type list"),
    "a number": (1.5, "1.5 of type float"),
    "an array": (np.zeros((B, T, D)), "of type ndarray"),
}


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
@pytest.mark.parametrize("kind", NO_TENSORS)
def test_not_a_tensor(function, name, kind):
    value, came = NO_TENSORS[kind]
    dims = DIMS[TENSORS[function][name]]
    with pytest.raises(TypeError) as caught:
        call(function, **{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: got ")
    assert came in message
    assert message.endswith(f"expected a tensor {dims}")


@pytest.mark.parametrize(
    ("function", "name"), [pair for pair in ARGUMENTS if pair[1] != "gram_target"]
)
def test_none_is_no_tensor(function, name):
    refuses(function, TypeError, name, "None of type NoneType", "a tensor", **{name: None})


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_wrong_dtype(function, name, dtype):
    bad = torch.zeros(TENSORS[function][name]).to(dtype)
    refuses(function, TypeError, name, f"dtype {dtype}", FLOATS, **{name: bad})


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
def test_sparse(function, name):
    bad = torch.ones(TENSORS[function][name]).to_sparse()
    refuses(function, TypeError, name, "layout torch.sparse_coo", "dense", **{name: bad})


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(function, name, layout):
    parts = list(torch.ones(TENSORS[function][name]))
    bad = torch.nested.nested_tensor(parts, layout=layout)
    refuses(function, TypeError, name, "a nested tensor", "dense", **{name: bad})


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
@pytest.mark.parametrize("change", ["fewer", "more", "none"])
def test_wrong_number_of_dimensions(function, name, change):
    shape = TENSORS[function][name]
    bad_shape = {"fewer": shape[1:], "more": (1, *shape), "none": ()}[change]
    came = f"shape {tuple(bad_shape)}"
    bad = torch.ones(bad_shape)
    refuses(function, ValueError, name, came, DIMS[shape], **{name: bad})


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_empty(function, name, dim):
    shape = list(TENSORS[function][name])
    if dim == len(shape):
        dim = 0
    shape[dim] = 0
    came = f"empty shape {tuple(shape)}"
    refuses(function, ValueError, name, came, "no size 0", **{name: torch.ones(shape)})


# the argument that is blamed, and the one whose device is expected
DEVICE_PAIRS = [
    ("fused_losses", "student", "teacher"),
    ("fused_losses", "down", "teacher"),
    ("fused_losses", "up", "teacher"),
    ("fused_losses", "gram_target", "teacher"),
    ("refine", "down", "teacher"),
    ("refine", "up", "teacher"),
    ("gram_loss", "target", "tokens"),
    ("kd_loss", "tokens", "student"),
]


@pytest.mark.parametrize(("function", "name", "anchor"), DEVICE_PAIRS)
def test_wrong_device(function, name, anchor):
    bad = torch.ones(TENSORS[function][name], device="meta")
    expected = f"cpu, that of {anchor}"
    refuses(function, ValueError, name, "device meta", expected, **{name: bad})


@pytest.mark.parametrize("function", ["fused_losses", "refine", "gram_loss", "kd_loss"])
def test_all_other_tensors_on_another_device(function):
    name = next(n for f, n, _ in DEVICE_PAIRS if f == function)
    anchor = next(a for f, _, a in DEVICE_PAIRS if f == function)
    bad = torch.ones(TENSORS[function][anchor], device="meta")
    refuses(function, ValueError, name, "device cpu", "meta", **{anchor: bad})


SHAPES = [
    ("fused_losses", "student", (B, T, D + 1), f"{(B, T, D)}, that of teacher"),
    ("fused_losses", "student", (B, T + 1, D), f"{(B, T, D)}, that of teacher"),
    ("fused_losses", "student", (1, T, D), f"{(B, T, D)}, that of teacher"),
    ("fused_losses", "student", (B, T, 1), f"{(B, T, D)}, that of teacher"),
    ("fused_losses", "gram_target", (B, T - 1, D), f"{(B, T, D)}, that of teacher"),
    ("fused_losses", "gram_target", (B, T, 1), f"{(B, T, D)}, that of teacher"),
    ("fused_losses", "down", (D + 1, R), f"[D, r] with D = {D}"),
    ("fused_losses", "down", (R, D), f"[D, r] with D = {D}"),
    ("fused_losses", "up", (R, D - 1), f"{(R, D)}: [r, D]"),
    ("fused_losses", "up", (R + 1, D), f"{(R, D)}: [r, D]"),
    ("fused_losses", "up", (D, R), f"{(R, D)}: [r, D]"),
    ("refine", "down", (1, R), f"[D, r] with D = {D}"),
    ("refine", "up", (1, D), f"{(R, D)}: [r, D]"),
    ("refine", "up", (R, 1), f"{(R, D)}: [r, D]"),
    ("gram_loss", "target", (B, T + 1, D), f"{(B, T, D)}, that of tokens"),
    ("gram_loss", "target", (B, T, D + 1), f"{(B, T, D)}, that of tokens"),
    ("kd_loss", "tokens", (1, T, D), f"{(B, T, D)}, that of student"),
    ("kd_loss", "tokens", (B, T, 1), f"{(B, T, D)}, that of student"),
]


@pytest.mark.parametrize(("function", "name", "shape", "expected"), SHAPES)
def test_wrong_shape(function, name, shape, expected):
    bad = torch.ones(shape)
    refuses(function, ValueError, name, f"shape {shape}", expected, **{name: bad})


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", WITH_PREFIX)
@pytest.mark.parametrize("prefix", [-1, T, T + 3])
def test_no_patch_left_or_a_negative_prefix(function, prefix):
    expected = f"0 to {T - 1}"
    refuses(
        function,
        ValueError,
        "num_prefix_tokens",
        str(prefix),
        expected,
        num_prefix_tokens=prefix,
    )


@pytest.mark.parametrize("function", WITH_PREFIX)
@pytest.mark.parametrize("prefix", [True, 1.0, "1", None])
def test_the_prefix_is_an_int(function, prefix):
    came = f"{prefix!r} of type {type(prefix).__name__}"
    refuses(function, TypeError, "num_prefix_tokens", came, "an int", num_prefix_tokens=prefix)


@pytest.mark.parametrize("function", WITH_PREFIX)
@pytest.mark.parametrize("prefix", [0, T - 1, np.int64(1)])
def test_the_whole_range_of_prefixes_is_accepted(function, prefix):
    call(function, num_prefix_tokens=prefix)


@pytest.mark.parametrize("function", WITH_QUANTILE)
@pytest.mark.parametrize("quantile", [-1e-9, 1.0000001, 97, float("nan"), float("inf")])
def test_quantile_outside_0_to_1(function, quantile):
    refuses(
        function, ValueError, "quantile", str(quantile), "a number in [0, 1]", quantile=quantile
    )


@pytest.mark.parametrize("function", WITH_QUANTILE)
@pytest.mark.parametrize("quantile", ["0.97", True, None, torch.tensor(0.97), 0.5j])
def test_quantile_is_a_number(function, quantile):
    refuses(function, TypeError, "quantile", "", "a number in [0, 1]", quantile=quantile)


@pytest.mark.parametrize("function", WITH_QUANTILE)
@pytest.mark.parametrize("quantile", [0, 1, 0.0, 1.0, np.float32(0.5)])
def test_the_whole_range_of_quantiles_is_accepted(function, quantile):
    call(function, quantile=quantile)


@pytest.mark.parametrize("function", ["fused_losses", "refine"])
def test_a_teacher_that_requires_grad(function):
    teacher = torch.ones(B, T, D, requires_grad=True)
    refuses(function, ValueError, "teacher", "requires grad", "frozen features", teacher=teacher)
    refuses(function, ValueError, "teacher", "requires grad", "detach()", teacher=teacher * 2)


def test_a_gram_target_without_gram():
    refuses("fused_losses", ValueError, "gram_target", "gram=False", "None", gram=False)


@pytest.mark.parametrize("name", ["gram", "return_refined"])
@pytest.mark.parametrize("value", [1, 0, "yes", None, torch.tensor(True)])
def test_flags_are_bools(name, value):
    came = "" if isinstance(value, torch.Tensor) else repr(value)
    refuses("fused_losses", TypeError, name, came, "True or False", **{name: value})


@pytest.mark.parametrize("function", TENSORS)
@pytest.mark.parametrize("backend", ["nope", "Reference", " "])
def test_an_unknown_backend(function, backend):
    refuses(function, ValueError, "backend", repr(backend), "one of", backend=backend)
    refuses(function, ValueError, "backend", repr(backend), "reference", backend=backend)


@pytest.mark.parametrize("function", TENSORS)
def test_an_unknown_backend_in_the_environment(function, monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", "nope")
    refuses(function, ValueError, "SINGER_BACKEND", "'nope'", "reference")


@pytest.mark.parametrize(
    ("function", "last"),
    [
        ("fused_losses", (None,)),
        ("refine", (1, "reference")),
        ("token_norms", (1, "reference")),
        ("outlier_loss", (0.97, "reference")),
        ("gram_loss", (1, "reference")),
        ("kd_loss", ("reference",)),
    ],
)
def test_options_are_keyword_only(function, last):
    names = [name for name in TENSORS[function] if name != "gram_target"]
    if function == "fused_losses":
        names[:2] = ["student", "teacher"]
    tensors = [inputs(function)[name] for name in names]
    getattr(singer_kernels, function)(*tensors)
    with pytest.raises(TypeError, match="positional argument"):
        getattr(singer_kernels, function)(*tensors, *last)


def test_an_unknown_option():
    with pytest.raises(TypeError, match="gamma"):
        fused_losses(**inputs("fused_losses"), gamma=0.5)


# --- the module form ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "name", "came", "expected", "arguments"),
    [
        (ValueError, "dim", "0", "at least 1", {"dim": 0}),
        (TypeError, "dim", "6.0", "an int", {"dim": 6.0}),
        (TypeError, "dim", "True", "an int", {"dim": True, "rank": 1}),
        (ValueError, "rank", "7", "1 to 6", {"rank": 7}),
        (ValueError, "rank", "64", "1 to 6", {}),
        (ValueError, "rank", "0", "1 to 6", {"rank": 0}),
        (ValueError, "rank", "-2", "1 to 6", {"rank": -2}),
        (TypeError, "rank", "True", "an int", {"rank": True}),
        (TypeError, "rank", "2.0", "an int", {"rank": 2.0}),
        (TypeError, "gram", "1", "True or False", {"rank": 2, "gram": 1}),
        (TypeError, "return_refined", "'no'", "True", {"rank": 2, "return_refined": "no"}),
        (ValueError, "quantile", "1.5", "[0, 1]", {"rank": 2, "quantile": 1.5}),
        (ValueError, "quantile", "nan", "[0, 1]", {"rank": 2, "quantile": float("nan")}),
        (TypeError, "quantile", "'x'", "[0, 1]", {"rank": 2, "quantile": "x"}),
        (ValueError, "num_prefix_tokens", "-1", "", {"rank": 2, "num_prefix_tokens": -1}),
        (TypeError, "num_prefix_tokens", "1.5", "", {"rank": 2, "num_prefix_tokens": 1.5}),
        (TypeError, "num_prefix_tokens", "True", "", {"rank": 2, "num_prefix_tokens": True}),
    ],
)
def test_the_module_refuses_an_option_when_it_is_built(error, name, came, expected, arguments):
    pattern = f"^{name}: got .*{re.escape(came)}.*expected .*{re.escape(expected)}"
    with pytest.raises(error, match=pattern):
        FusedLosses(**{"dim": D, **arguments})


def test_module_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional argument"):
        FusedLosses(D, R, True)


@pytest.mark.parametrize(
    ("error", "basis", "came", "expected"),
    [
        (ValueError, torch.ones(R, D), str((R, D)), str((D, R))),
        (ValueError, torch.ones(D, 1), str((D, 1)), str((D, R))),
        (ValueError, torch.ones(D), str((D,)), "[dim, rank]"),
        (TypeError, torch.ones(D, R, dtype=torch.int64), "torch.int64", "float32"),
        (TypeError, np.ones((D, R)), "ndarray", "a tensor"),
    ],
)
def test_set_basis_refuses(error, basis, came, expected):
    layer = FusedLosses(D, R)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    pattern = f"^basis: got .*{re.escape(came)}.*expected .*{re.escape(expected)}"
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        layer.set_basis(basis)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_module_refuses_what_the_function_refuses():
    layer = FusedLosses(D, R, num_prefix_tokens=T)
    tokens = torch.ones(B, T, D)
    with pytest.raises(ValueError, match=r"^num_prefix_tokens: got 5, expected 0 to 4"):
        layer(tokens, tokens)
    with pytest.raises(ValueError, match=r"^teacher: got a tensor that requires grad"):
        layer(tokens, tokens.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"^student: got shape"):
        layer(tokens[:, :3], tokens)
    with pytest.raises(ValueError, match=r"^backend: got 'nope'"):
        FusedLosses(D, R, backend="nope")(tokens, tokens)
    with pytest.raises(ValueError, match=r"^gram_target: got a tensor with gram=False"):
        FusedLosses(D, R, gram=False)(tokens, tokens, tokens)
