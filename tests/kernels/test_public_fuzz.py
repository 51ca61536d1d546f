"""Fuzz the public functions: no input may crash the process or give a silently wrong result.

A call is drawn that is valid, or has one argument made invalid. A valid one agrees with the
reference in float64; an invalid one raises one line that names the argument.
"""

import re
from random import Random

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import singer_kernels
from singer_kernels import reference

DIMS = {  # of the tensor arguments, the one that is checked first at the front
    "fused_losses": {
        "teacher": "BTD",
        "student": "BTD",
        "down": "DR",
        "up": "RD",
        "gram_target": "BTD",
    },
    "refine": {"teacher": "BTD", "down": "DR", "up": "RD"},
    "token_norms": {"tokens": "BTD"},
    "outlier_loss": {"norms": "BT"},
    "gram_loss": {"tokens": "BTD", "target": "BTD"},
    "kd_loss": {"student": "BTD", "tokens": "BTD"},
}
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")
FAST = [name for name in BACKENDS if name not in ("triton", "cuda")]  # those are interpreted here
WRONG_TENSORS = (None, 1.5, "teacher", [[1.0]], np.zeros((2, 3, 4)), object())
WRONG_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2, torch.uint8)
WRONG_OPTIONS = {
    "num_prefix_tokens": (-1, 10**30, 1.0, True, "1", None, torch.ones(()), float("nan")),
    "quantile": (-1e-9, 1.001, float("nan"), float("inf"), "0.5", None, True, 1j, [0.5]),
    "gram": (0, 1, None, "yes", torch.tensor(True)),
    "return_refined": (0, None, "", torch.tensor(False)),
    "backend": ("", "gpu", 0, b"torch", torch),
}


def lay_out(values, layout, rng):
    """Return a tensor of the same values in another layout."""
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "sliced":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), float("nan"))
        wide = wide.to(values.dtype)
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if layout == "offset":  # not aligned to more than its element
        flat = torch.empty(values.numel() + 1, dtype=values.dtype)[1:]
        return flat.view(values.shape).copy_(values)
    if layout == "expanded":
        return values[:1].expand(values.shape)
    return values


class Call:
    """A call of a public function, and what is wrong with it."""

    def __init__(self, rng: Random) -> None:
        self.function = rng.choice([*DIMS, *["fused_losses"] * 4])
        self.dtypes = DTYPES if rng.random() < 0.5 else (rng.choice(DTYPES),)
        low = 0 if rng.random() < 0.05 else 1
        self.sizes = {letter: rng.randint(low, 6) for letter in "BTDR"}
        self.sizes["T"] = rng.choice([self.sizes["T"], 17, 33]) if low else self.sizes["T"]
        self.is_meta = rng.random() < 0.1
        self.autocast = rng.random() < 0.1 and not self.is_meta
        self.special = rng.choice([None] * 6 + ["nan", "inf", "zeros", "large"])
        self.tensors = {name: self.tensor(rng, dims) for name, dims in DIMS[self.function].items()}
        if self.function == "fused_losses" and rng.random() < 0.5:
            self.tensors["gram_target"] = None
        self.options = self.draw_options(rng)
        self.wrong = None  # the argument that is invalid
        self.named = ()  # the arguments that the message may name
        if rng.random() < 0.35:
            self.make_invalid(rng)
        elif min(self.sizes[x] for dims in DIMS[self.function].values() for x in dims) == 0:
            self.wrong, self.named = "a size of 0", tuple(DIMS[self.function])
        elif self.options.get("num_prefix_tokens", 0) >= self.sizes["T"]:
            self.wrong, self.named = "no patch left", ("num_prefix_tokens",)

    def tensor(self, rng, dims):
        shape = [self.sizes[letter] for letter in dims]
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values *= 1.0 if dims in ("BTD", "BT") else 0.5
        if self.special == "zeros" and rng.random() < 0.5:
            values *= 0
        if self.special == "large" and dims == "BTD":
            values[..., :1] *= 100
        if dims == "BT":
            values = values.abs()
        values = values.to(rng.choice(self.dtypes))
        if self.special in ("nan", "inf") and values.numel() and dims != "DR" and dims != "RD":
            values.view(-1)[rng.randrange(values.numel())] = float(self.special)
        if 0 not in shape:
            values = lay_out(values, rng.choice(LAYOUTS), rng)
        return values.to("meta") if self.is_meta else values

    def draw_options(self, rng):
        options = {"backend": rng.choice([None, *FAST, *(["triton"] * (rng.random() < 0.1))])}
        if options["backend"] not in (None, *BACKENDS):
            options["backend"] = None
        if self.function in ("fused_losses", "refine", "token_norms", "gram_loss"):
            options["num_prefix_tokens"] = rng.choice([0, 1, 1, 1, 2, np.int64(1)])
        if self.function in ("fused_losses", "outlier_loss"):
            options["quantile"] = rng.choice([0, 0.5, 0.9, 0.97, 1, 1.0, rng.random()])
        if self.function == "fused_losses":
            options["return_refined"] = rng.random() < 0.5
            options["gram"] = rng.random() < 0.7 or self.tensors["gram_target"] is not None
        return options

    def make_invalid(self, rng):
        """Make one argument invalid, and the others valid."""
        self.sizes = {letter: max(1, size) for letter, size in self.sizes.items()}
        for name, dims in DIMS[self.function].items():
            if self.tensors[name] is not None:
                self.tensors[name] = self.tensor(rng, dims)
        if "num_prefix_tokens" in self.options:
            self.options["num_prefix_tokens"] = 0
        tensors = [name for name, value in self.tensors.items() if value is not None]
        kinds = ["type", "dtype", "dimensions", "size", "layout", "option"]
        kinds += ["device"] * (len(tensors) > 1) + ["grad"] * ("teacher" in tensors)
        self.wrong = rng.choice(kinds)
        if self.wrong == "option":
            name = rng.choice(sorted(self.options))
            self.options[name] = rng.choice(WRONG_OPTIONS[name])
            self.named = (name,)
            return
        name, self.named = rng.choice(tensors), tuple(tensors)
        value = self.tensors[name]
        if self.wrong == "type":
            changed = rng.choice(WRONG_TENSORS[name == "gram_target" :])
        elif self.wrong == "dtype":
            changed = torch.empty(value.shape, device=value.device).to(rng.choice(WRONG_DTYPES))
        elif self.wrong == "dimensions":
            changed = rng.choice([value[None], value[..., 0], value.flatten()[0]])
        elif self.wrong == "size":
            if len(tensors) == 1:
                changed = value[:0]
            else:  # a size that another tensor shares
                dims = DIMS[self.function]
                others = "".join(dims[other] for other in tensors if other != name)
                dim = rng.choice([d for d, letter in enumerate(dims[name]) if letter in others])
                changed = torch.cat([value, value], dim)
        elif self.wrong == "device":
            changed = torch.ones(value.shape, device="cpu" if self.is_meta else "meta")
        elif self.wrong == "layout":
            changed = torch.zeros(value.shape).to_sparse()
        else:
            name, changed = "teacher", self.tensors["teacher"].detach().requires_grad_()
        self.tensors[name] = changed

    def run(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return getattr(singer_kernels, self.function)(**self.tensors, **self.options)

    def refusal(self):
        """Return the message of a backend that was named and can't run the call, or None."""
        name = self.options["backend"]
        if self.is_meta and name in ("cpu", "triton", "cuda"):
            return f"^backend: '{name}' can't run on meta: "
        return None

    def in_float64(self):
        """Return the reference's arguments for the same values."""
        tensors = {name: None if x is None else x.double() for name, x in self.tensors.items()}
        return tensors, {name: x for name, x in self.options.items() if name != "backend"}

    def unit(self):
        """Return the coarsest relative rounding of the call."""
        dtypes = [x.dtype for x in self.tensors.values() if x is not None]
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
        return max(coarsest, torch.finfo(torch.bfloat16).eps) if self.autocast else coarsest

    def __repr__(self) -> str:
        tensors = {
            name: (tuple(x.shape), x.dtype, x.device.type) if isinstance(x, torch.Tensor) else x
            for name, x in self.tensors.items()
        }
        return f"{self.function}({tensors}, {self.options}) {self.special=} {self.wrong=}"


def close(found, exact, rtol, atol):
    """Compare, non-finite entries by being so."""
    found, exact = found.detach().double(), exact.detach().double()
    assert found.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(found.isfinite(), finite)
    scale = exact[finite].abs().max().item() if finite.any() else 0.0
    error = (found - exact)[finite].abs().max().item() if finite.any() else 0.0
    assert error <= rtol * scale + atol, (error, scale)


def check_fused(call, out, exact, rtol):
    close(out.norms, exact.norms, rtol, 1e-30)
    # An Inf may become a NaN on the way (0 · Inf in a padded product): no threshold then.
    good = exact.norms.isfinite().all(dim=1)
    close(out.threshold[good], exact.threshold[good], rtol, 1e-30)
    close(out.kd, exact.kd, rtol, 1e-30)
    # Whether a patch within rounding of the threshold is an outlier decides their count: by the
    # norms and thresholds that came back.
    of_norms = reference._outlier_excess_loss(out.norms.double(), out.threshold.double())
    scale = exact.norms.square().max().item() if exact.norms.isfinite().all() else 0.0
    close(out.outlier, of_norms, rtol, rtol * rtol * scale + 1e-30)
    assert (out.info is None) == (exact.info is None)
    if out.info is not None:
        bound = 4 * rtol  # of an entry of E
        root = exact.info.sqrt().item() if exact.info.isfinite() else 0.0
        close(out.info, exact.info, 0.0, 2 * root * bound + bound**2)
    assert (out.refined is None) == (exact.refined is None)
    if out.refined is not None:
        assert out.refined.dtype == call.tensors["teacher"].dtype
        close(out.refined, exact.refined, rtol, 1e-30)


def gradients(function, tensors, options):
    """Return the gradients of the losses, but of the outlier loss: its count is a step."""
    inputs = {
        name: x if x is None or name == "teacher" else x.detach().requires_grad_()
        for name, x in tensors.items()
    }
    out = function(**inputs, **options)
    loss = out.kd + sum(x.double().sum() for x in (out.info, out.refined) if x is not None)
    leaves = [x for x in inputs.values() if x is not None and x.requires_grad]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def check_gradients(call, out):
    found = gradients(singer_kernels.fused_losses, call.tensors, call.options)
    tensors, options = call.in_float64()
    exact = gradients(reference.fused_losses, tensors, options)
    # Where the gradient of G vanishes (D = 1, say) it is rounding, times the reciprocal of a norm.
    target = tensors["teacher"] if tensors["gram_target"] is None else tensors["gram_target"]
    norms = [out.norms, reference.token_norms(target, options["num_prefix_tokens"])]
    smallest = min(x.min().item() for x in norms)
    atol = 1e-5 + 400 * call.unit() / max(smallest, 1e-6)
    for one, other in zip(found, exact, strict=True):
        close(one, other, 4000 * call.unit(), atol)


def check(seed):
    call = Call(Random(seed))
    note(repr(call))
    if call.wrong is not None:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            call.run()
        message = str(caught.value)
        assert "\n" not in message
        names = "|".join([*call.named, *(["backend"] if call.is_meta else [])])
        assert re.match(rf"({names}): (got|'\w+' can't run)", message), message
        return
    refusal = call.refusal()
    if refusal is not None:
        with pytest.raises(RuntimeError, match=refusal):
            call.run()
        return
    out = call.run()
    if call.is_meta:
        return
    rtol = 40 * call.unit()
    if call.special == "large":  # one entry of a patch decides it: the others are rounding
        rtol *= 10
        if call.unit() > 1e-6:
            return
    tensors, options = call.in_float64()
    exact = getattr(reference, call.function)(**tensors, **options)
    if rtol > 1 or (call.special and call.unit() > 1e-6):
        rtol = max(rtol, 0.5)
    if call.function == "fused_losses":
        check_fused(call, out, exact, rtol)
        if call.special is None and call.unit() < 1e-6:
            check_gradients(call, out)
    elif call.function == "gram_loss":
        root = exact.sqrt().item() if exact.isfinite() else 0.0
        close(out, exact, 0.0, 8 * root * rtol + 16 * rtol**2)
    elif call.function == "outlier_loss":
        close(out, exact, rtol, rtol)
    else:
        close(out, exact, rtol, 1e-30)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.integers(0, 2**64 - 1))
def test_a_call_agrees_with_float64_or_names_its_argument(seed):
    check(seed)


@pytest.mark.slow
@settings(
    max_examples=10_000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.integers(0, 2**64 - 1))
def test_ten_thousand_calls(seed):
    check(seed)
