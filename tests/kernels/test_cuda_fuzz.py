"""Fuzz the raw CUDA operators, compiled as plain C++: no input from Python may crash the process.

``CONTRACTS`` states the valid arguments, independently of the C++ checks. A valid call returns,
writes all of its outputs and nothing else; an invalid one raises, names an invalid argument, and
writes nothing.
"""

import math
import re
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from singer_kernels import extension
from singer_kernels.backends.cuda import ops

pytestmark = pytest.mark.skipif(
    not extension.has_kernels("cuda_refine", "cpu"), reason="there is no g++ to emulate with"
)

CASES = 36  # for each argument: 2,052 in all
ACC = (torch.float32, torch.float64)
DTYPES = (*ACC, torch.bfloat16, torch.float16)
ODD_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2)
UNKNOWN_DTYPE = torch.float4_e2m1fn_x2  # not in torch's stable ABI


class Contract(NamedTuple):
    """The valid arguments of an operator."""

    shapes: dict[str, str]  # one letter per dimension; the first tensor's sizes define the letters
    acc: tuple[str, ...]  # the first is float32 or float64; the others have its dtype
    needs: tuple[tuple[str, str], ...] = ()  # (a, b): a is required if b is given
    is_filled: bool = False  # whether every size must be above 0


# N = T - prefix, Q = P + prefix, R = C / 2.
CONTRACTS = {
    "refine": Contract(
        {
            "teacher": "BTD",
            "student": "BTD",
            "delta": "BTD",
            "norms": "BN",
            "kd_partials": "BT",
            "refined": "BTD",
            "rows": "BND",
            "kd_difference": "BND",
        },
        ("delta", "norms", "kd_partials"),
        is_filled=True,
    ),
    "normalize": Contract(
        {"tokens": "BTD", "norms": "BN", "rows": "BND"}, ("norms",), is_filled=True
    ),
    "outlier": Contract(
        {"norms": "BP", "threshold": "B", "squares": "B", "counts": "B"},
        ("norms", "threshold", "squares", "counts"),
        is_filled=True,
    ),
    "gram_difference": Contract(
        {
            "gram": "BPP",
            "target_gram": "BPP",
            "difference": "BPP",
            "squares": "BP",
            "row_dots": "BP",
            "target_row_dots": "BP",
        },
        ("squares", "row_dots", "target_row_dots"),
    ),
    "gram_scale": Contract({"factor": "BPD", "norms": "BP", "out": "BPD"}, ("norms",)),
    "gram_gradient": Contract(
        {"product": "BPD", "factor": "BQD", "norms": "BP", "row_dots": "BP", "out": "BPD"},
        ("norms", "row_dots"),
    ),
    "backward_rows": Contract(
        {
            "hz": "BPC",
            "grad_hz": "BPC",
            "residual": "BPR",
            "grad_refined_up": "BPR",
            "norms": "BP",
            "threshold": "B",
            "outlier_weight": "",
            "grad_kd": "",
            "grad_outlier": "",
            "grad_info": "",
            "grad_h": "BPR",
            "v": "BPR",
        },
        ("hz", "norms", "threshold", "outlier_weight"),
        (
            ("grad_kd", "residual"),
            ("grad_hz", "grad_info"),
            ("norms", "grad_outlier"),
            ("threshold", "grad_outlier"),
            ("outlier_weight", "grad_outlier"),
        ),
    ),
    "backward_tokens": Contract(
        {
            "teacher": "BTD",
            "student": "BTD",
            "delta": "BTD",
            "grad_refined": "BTD",
            "grad_kd": "",
            "grad_student": "BTD",
            "refined": "BND",
            "grad_delta": "BND",
        },
        ("delta",),
        (("grad_kd", "grad_student"), ("student", "grad_kd")),
        is_filled=True,
    ),
}


def arguments_of(kernel):
    return operator_of(kernel).default._schema.arguments


def operator_of(kernel):
    return getattr(torch.ops.singer_kernels, f"cuda_{kernel}")


def outputs(kernel):
    given = arguments_of(kernel)
    return {x.name for x in given if x.alias_info is not None and x.alias_info.is_write}


def optionals(kernel):
    return {x.name for x in arguments_of(kernel) if str(x.type) == "Optional[Tensor]"}


def sizes_of(kernel, shape, prefix):
    """Return the size of each letter; None if the first tensor's shape does not match its own."""
    letters = next(iter(CONTRACTS[kernel].shapes.values()))
    sizes = dict(zip(letters, shape, strict=False))
    if len(shape) != len(letters) or any(
        sizes[letter] != size for letter, size in zip(letters, shape, strict=True)
    ):
        return None
    derived = {"N": sizes.get("T", 0) - prefix, "Q": sizes.get("P", 0) + prefix}
    return sizes | derived | {"R": sizes.get("C", 0) // 2}


def extent(tensor):
    """Return the addresses of a contiguous tensor."""
    start = tensor.data_ptr()
    return range(start, start + tensor.numel() * tensor.itemsize)


def overlap(a, b):
    return max(a.start, b.start) < min(a.stop, b.stop)


def is_foreign(value):
    """Return whether the dispatcher has no kernel for that tensor."""
    is_tensor = isinstance(value, torch.Tensor)
    return is_tensor and (value.layout != torch.strided or value.device.type != "cpu")


def faults(kernel, args):
    """Return the names of the arguments that break the contract."""
    contract, written = CONTRACTS[kernel], outputs(kernel)
    tensors = {name: args[name] for name in contract.shapes if args[name] is not None}
    found = {name for name in contract.shapes if args[name] is None} - optionals(kernel)
    found |= {x for x, with_ in contract.needs if with_ in tensors and x not in tensors}
    first, main = contract.acc[0], next(iter(contract.shapes))
    prefix = args.get("num_prefix_tokens", 0)
    if main not in tensors:
        return found
    sizes = sizes_of(kernel, tuple(tensors[main].shape), prefix)
    if sizes is None or (contract.is_filled and tensors[main].numel() == 0):
        return found | {main}
    if prefix < 0 or prefix >= sizes.get("T", 2**31):
        found.add("num_prefix_tokens")
    if sizes.get("C", 0) % 2:
        found.add(main)
    if not 0 <= args.get("quantile", 0) <= 1:
        found.add("quantile")
    if kernel == "backward_rows":
        found |= {"tokens"} if args["tokens"] < sizes["P"] else set()
        found |= {"width"} if args["width"] < 1 else set()
    for name, tensor in tensors.items():
        shape = tuple(sizes[letter] for letter in contract.shapes[name])
        dtypes = DTYPES
        if name in contract.acc:
            dtypes = ACC if name == first or first not in tensors else (tensors[first].dtype,)
        if (
            tuple(tensor.shape) != shape
            or tensor.dtype not in dtypes
            or not tensor.is_contiguous()
            or tensor.data_ptr() % tensor.itemsize
        ):
            found.add(name)
        others = {other: x for other, x in tensors.items() if other != name}
        if name in written and any(overlap(extent(tensor), extent(x)) for x in others.values()):
            found.add(name)
    return found


SIZES = [1, 1, 2, 2, 3, 4, 5, 6, 7, 0, 33]
WIDTHS = [1, 2, 3, 5, 8, 8, 16, 24, 0, 40]  # several are multiples of 8, for vector accesses
WAYS = (
    "shape",
    "dims",
    "dtype",
    "transposed",
    "strided",
    "expanded",
    "unaligned",
    "shared",
    "none",
    "foreign",
)


def dense(random, shape, dtype):
    """Return a contiguous tensor of ordinary numbers; some are slices of a larger one."""
    before, after = random.choice([(0, 0), (0, 0), (1, 2), (8, 8)])
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(random.randrange(100))
    numbers = 0.5 + torch.rand(before + count + after, generator=generator)
    if random.random() < 0.1:
        numbers = torch.zeros_like(numbers)
    return numbers.to(dtype)[before : before + count].view(shape)


def invalid_tensor(random, way, shape, dtype, others):
    """Return a tensor, or None, that usually breaks the contract in the given way."""
    shape = list(shape)
    if way == "none":
        return None
    if way == "shape" and shape:
        shape[random.randrange(len(shape))] = random.randrange(10)
    elif way == "dims":
        shape = shape[:-1] if random.random() < 0.5 else [*shape, 1]
    elif way == "dtype":
        dtype = random.choice((*DTYPES, *ODD_DTYPES, UNKNOWN_DTYPE))
        if dtype == UNKNOWN_DTYPE:
            return torch.zeros(shape, dtype=torch.uint8).view(dtype)
    elif way == "transposed":
        return dense(random, shape[::-1], dtype).permute(list(range(len(shape)))[::-1])
    elif way == "strided":
        whole = dense(random, [2 * size for size in shape], dtype)
        return whole[(slice(None, None, 2),) * len(shape)]
    elif way == "expanded":
        return dense(random, [1] * len(shape), dtype).expand(shape)
    elif way == "unaligned":
        count = math.prod(shape) * dtype.itemsize
        if count > 0:
            return torch.frombuffer(bytearray(count + 1), dtype=dtype, offset=1).view(shape)
    elif way == "shared" and others:
        other = random.choice(others)
        storage, start = other.untyped_storage(), own_bytes(other).start // dtype.itemsize
        if other.is_contiguous() and (start + math.prod(shape)) * dtype.itemsize <= len(storage):
            return torch.empty(0, dtype=dtype).set_(storage, start, shape)
    elif way == "foreign":
        tensor = dense(random, shape, dtype)
        return tensor.to("meta") if random.random() < 0.5 or not shape else tensor.to_sparse()
    return dense(random, shape, dtype)


def scalar(random, name, sizes, is_odd):
    """Return an argument that is not a tensor; `is_odd`: usually an invalid one."""
    if name == "quantile":
        return random.choice([math.nan, -0.1, 1.1] if is_odd else [0.3, 0.0, 0.97, 1.0])
    if name == "scale":
        return random.choice([math.nan, 1e300] if is_odd else [-0.5, 0.0, 2.0])
    if is_odd:
        around = [-1, 0, sizes["P"] - 1, sizes["T"], sizes["T"] + 1]
        return random.choice([*around, 2**40, 2**62, -(2**63), 2**63 - 1])
    if name == "num_prefix_tokens":
        return sizes["T"] - sizes["N"]
    least = sizes["P"] if name == "tokens" else 1
    return random.choice([least, least + 5, 2**62])


def call_of(random, kernel, invalid_name):
    """Return a call's arguments by name, and whether all their elements are ordinary numbers.

    In half of the calls the argument ``invalid_name`` is made invalid, in some another one as well.
    """
    contract, names = CONTRACTS[kernel], [x.name for x in arguments_of(kernel)]
    prefix, patches, rank = random.randrange(4), random.choice(SIZES), random.choice(WIDTHS)
    sizes = {"B": random.choice(SIZES), "P": patches, "D": random.choice(WIDTHS), "R": rank}
    sizes |= {"C": 2 * rank, "N": patches, "Q": patches + prefix, "T": patches + prefix}
    acc = random.choice(ACC)
    invalid_names = {invalid_name} if random.random() < 0.5 else set()
    if random.random() < 0.1:
        invalid_names.add(random.choice(names))
    plain = [name for name in names if name not in contract.shapes]
    args = {name: scalar(random, name, sizes, name in invalid_names) for name in plain}
    absent = {name for name in sorted(optionals(kernel)) if random.random() < 0.5}
    is_whole = random.random() < 0.9  # else a required tensor may be missing
    for name, with_ in contract.needs:
        absent -= {name} if is_whole and with_ not in absent else set()
    for name, letters in contract.shapes.items():
        shape = tuple(sizes[letter] for letter in letters)
        dtype = acc if name in contract.acc else random.choice(DTYPES)
        if name in invalid_names:
            others = [x for x in args.values() if isinstance(x, torch.Tensor)]
            others = [x for x in others if not is_foreign(x)]
            args[name] = invalid_tensor(random, random.choice(WAYS), shape, dtype, others)
        else:
            args[name] = None if name in absent else dense(random, shape, dtype)
    is_ordinary = not invalid_names
    if random.random() < 0.2:
        tensor = args[random.choice(list(contract.shapes))]
        usable = isinstance(tensor, torch.Tensor) and not is_foreign(tensor)
        usable = usable and tensor.dtype != UNKNOWN_DTYPE
        if usable and tensor.is_floating_point() and tensor.numel():
            is_ordinary = False
            odd = random.choice([math.nan, math.inf, -math.inf, -1.0, 1e-30, 6e4])
            tensor[(0,) * tensor.dim()] = odd
    return {name: args[name] for name in names}, is_ordinary


def memory(tensor):
    """Return all bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def own_bytes(tensor):
    start = tensor.storage_offset() * tensor.itemsize
    return slice(start, start + tensor.numel() * tensor.itemsize)


def message_of(kernel, args):
    """Call an operator; return the message of its error, or None."""
    try:
        operator_of(kernel)(*args.values())
    except RuntimeError as error:
        return str(error)
    return None


def check(kernel, args, is_ordinary):
    """Call an operator, twice if it returns; return ``"returned"`` or ``"raised"``."""
    tensors = {name: x for name, x in args.items() if isinstance(x, torch.Tensor)}
    if any(is_foreign(x) for x in tensors.values()):
        assert f"singer_kernels::cuda_{kernel}" in message_of(kernel, args)
        return "raised"
    found, filled = faults(kernel, args), []
    written = outputs(kernel) & tensors.keys()
    for byte in (0xFF, 0x55):
        for name in written:
            if tensors[name].is_contiguous():
                memory(tensors[name])[own_bytes(tensors[name])] = byte
        before = {name: memory(x).clone() for name, x in tensors.items()}
        message = message_of(kernel, args)
        if message is None:
            assert not found, found
            for name in written:
                own = own_bytes(tensors[name])
                before[name][own] = memory(tensors[name])[own]
        for name, x in tensors.items():
            assert torch.equal(memory(x), before[name]), name
        if message is not None:
            named = {x for x in args if re.search(rf"\b{x}: (got|expected|shares)", message)}
            assert named, message
            assert named <= found, (message, found)
            return "raised"
        filled.append({name: before[name] for name in written})
    for name in written:
        assert torch.equal(filled[0][name], filled[1][name]), name  # all of it was written
        if is_ordinary:
            assert tensors[name].isfinite().all(), name
    return "returned"


def described(args):
    """Return a description of the arguments; torch can't print a tensor of every dtype."""
    return ", ".join(
        f"{name}: {tuple(value.shape)} {value.dtype} {value.stride()}"
        if isinstance(value, torch.Tensor) and value.layout == torch.strided
        else f"{name}: {type(value).__name__} {getattr(value, 'layout', value)}"
        for name, value in args.items()
    )


def check_calls(kernel, invalid_name, outcomes):
    """Check some calls; in half of them that argument is invalid."""

    # Hypothesis draws only a seed: by drawing arguments it would vary few calls in detail, and miss
    # some of the hundreds of pairs of an argument and a fault.
    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def check_one(seed):
        call = call_of(Random(f"{kernel} {invalid_name} {seed}"), kernel, invalid_name)
        note(described(call[0]))
        outcomes[check(kernel, *call)] += 1

    check_one()


@pytest.mark.parametrize("kernel", list(CONTRACTS))
def test_calls_raise_or_fill_their_outputs(kernel):
    outcomes, names = {"returned": 0, "raised": 0}, [x.name for x in arguments_of(kernel)]
    for name in names:
        check_calls(kernel, name, outcomes)
    # Both outcomes are frequent, so that both are tested.
    assert min(outcomes.values()) >= CASES * len(names) / 5, outcomes


def test_every_kernel_has_its_contract():
    named = [schema.partition("(")[0].removeprefix("cuda_") for schema in ops._KERNELS]
    assert sorted(named) == sorted(CONTRACTS)
    for kernel, contract in CONTRACTS.items():
        tensors = [x.name for x in arguments_of(kernel) if "Tensor" in str(x.type)]
        assert tensors == list(contract.shapes)
    assert sum(CASES * len(arguments_of(kernel)) for kernel in CONTRACTS) >= 2000
