"""The CUDA kernels compiled by nvcc (no spills, loads of 16 bytes), and the backend ``"cuda"``.

The tests of every backend run the kernels as plain C++ (``emulation.py``), ``test_gpu.py`` runs
them on a device.
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import emulation
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from singer_kernels import backends, extension, fused_losses
from singer_kernels.backends.cuda import ops
from singer_kernels.backends.precision import MatmulPrecision, full_float32

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))
from singer_build.toolchain import find_nvcc

NVCC = find_nvcc()
TRITON = importlib.util.find_spec("triton")  # its package includes cuobjdump
FOLDERS = [str(Path(NVCC).parent)] if NVCC else []
if TRITON is not None and TRITON.origin is not None:
    FOLDERS.append(str(Path(TRITON.origin).parent / "backends" / "nvidia" / "bin"))
CUOBJDUMP = shutil.which("cuobjdump", path=":".join(FOLDERS))
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture(scope="module", params=["80", "90"])
def compiled(request, tmp_path_factory):
    """Return the output of ptxas for each cubin, of one architecture."""
    if NVCC is None:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    include = Path(torch.__file__).parent / "include"
    running = {}
    for source in SOURCES:
        cubin = folder / f"{source.stem}.cubin"
        options = ["-std=c++17", "-O3", f"-arch=sm_{request.param}", "-cubin", "-Xptxas", "-v"]
        options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
        command = [NVCC, *options, "-isystem", str(include), str(source), "-o", str(cubin)]
        running[cubin] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    printed = {cubin: process.communicate()[0] for cubin, process in running.items()}
    for cubin, process in running.items():
        assert process.returncode == 0, printed[cubin]
    return printed


@pytest.mark.slow
def test_no_kernel_spills(compiled):
    kernels = 0
    for text in compiled.values():
        # A stack frame would be local memory, spilled or not.
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", text)
        kernels += len(used)
        assert set(used) <= {("0", "0", "0")}, text
    assert kernels == 16  # eight, in float and double


@pytest.mark.slow
@pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump")
@pytest.mark.parametrize("stage", ["refine", "gram", "backward"])
def test_rows_are_read_and_written_by_16_bytes(compiled, stage):
    (cubin,) = (path for path in compiled if path.stem == stage)
    sass = subprocess.run(
        [CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    kernels = [text for text in sass.split("Function : ")[1:] if "backward_rows" not in text]
    for kernel in kernels:
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z]\S*)", kernel)
        assert sum(name.startswith("LDG.E.128") for name in instructions) >= 7
        assert sum(name.startswith("STG.E.128") for name in instructions) >= 7
        # Chunks that are taken apart byte by byte made these more than half of all instructions.
        of_bits = sum(name.split(".")[0] in ("LOP3", "PRMT", "SHF") for name in instructions)
        assert of_bits < 0.15 * len(instructions)


needs_emulation = pytest.mark.skipif(
    not extension.has_kernels("cuda_refine", "cpu"), reason="there is no g++ to emulate with"
)
needs_cuda_library = pytest.mark.skipif(
    torch.version.cuda is None or not extension.has_kernels("cuda_refine", "cuda"),
    reason="torch or the extension is built without CUDA",
)


def names_of(symbols):
    """Return the kernels' C++ names from their mangled ones, sorted."""
    types = {"f": "float", "d": "double"}
    found = [re.search(r"\d([a-z_]+)I([fd])E", symbol) for symbol in symbols]
    return sorted(f"{match[1]}<{types[match[2]]}>" for match in found)


@needs_emulation
@pytest.mark.slow
def test_each_compiled_kernel_is_listed_once(compiled, monkeypatch):
    monkeypatch.setattr(extension, "LIBRARY", emulation.library())
    symbols = re.findall(r"Compiling entry function '(\S+)'", "".join(compiled.values()))
    assert sorted(extension.cuda_kernels()) == names_of(symbols)


@pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump")
@needs_cuda_library
def test_the_library_lists_each_of_its_kernels_once():
    printed = subprocess.run(
        [CUOBJDUMP, "-res-usage", str(extension.LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = set(re.findall(r"Function (\S+):", printed))  # repeated for each architecture
    assert sorted(extension.cuda_kernels()) == names_of(symbols)
    assert set(re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)) == {("0", "0")}


@needs_cuda_library
def test_the_library_reaches_the_streams_of_torch():
    # A weak symbol of torch's CUDA library, which a CPU build of torch lacks.
    found = ctypes.CDLL(str(extension.LIBRARY)).singer_has_cuda_stream
    found.restype = ctypes.c_bool
    assert found()


@needs_emulation
def test_a_student_close_to_the_refined_teacher():
    # Rounding F̂ and S to bfloat16 before subtracting them would leave no significant digit.
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 20, 32, generator=generator)
    student = teacher + 1e-3 * torch.randn(2, 20, 32, generator=generator)
    down = 0.1 * torch.randn(32, 4, generator=generator)
    up = torch.zeros(4, 32) + 1e-4
    found = []
    for name, width in (("cuda", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(width).requires_grad_() for x in (down, up)]
        given = [x.to(width) for x in (student, teacher)]
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "cuda"):
            out = fused_losses(*given, *leaves, gram=False, backend=name)
        found.append(torch.autograd.grad(out.kd, leaves[0])[0])
    assert (found[0] - found[1]).abs().max() <= 0.05 * found[1].abs().max()


@needs_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 8])  # in elements: 0 and 8 are 16-byte aligned
def test_the_gram_difference_of_any_number_of_patches(offset, dtype):
    kernel = torch.ops.singer_kernels.cuda_gram_difference
    for patches in range(1, 42):
        generator = torch.Generator().manual_seed(patches)
        count = 2 * patches**2
        gram, target, difference = (
            torch.randn(offset + count, generator=generator)
            .to(kind)[offset:]
            .view(2, patches, patches)
            for kind in (torch.float32, torch.float32, dtype)
        )
        sums = [torch.empty(2, patches) for _ in range(3)]
        kernel(gram, target, difference, *sums)
        expected = gram - target
        assert torch.equal(difference, expected.to(dtype))
        for found, factor in zip(sums, (expected, gram, target), strict=True):
            terms = expected.double() * factor
            bound = patches * 2**-23 * terms.abs().sum(dim=2)
            assert ((found - terms.sum(dim=2)).abs() <= bound).all()


class Products(TorchDispatchMode):
    """Notes the setting for TF32 at each product of float32; skips our kernels."""

    def __init__(self):
        super().__init__()
        self.settings = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "singer_kernels":
            return None
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            assert args[-1].dtype == torch.float32
            self.settings.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def tf32_settings():
    """Return the settings as each of torch's interfaces reads them."""
    matmul, found = torch.backends.cuda.matmul, []
    for read in (
        lambda: matmul.fp32_precision,
        lambda: matmul.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
    ):
        try:
            found.append(read())
        except RuntimeError as error:  # torch's interfaces contradict each other
            found.append(type(error))
    return found


TURN_ON = {
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "fp32_precision": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "medium on CUDA alone": lambda: (
        torch.set_float32_matmul_precision("medium"),
        setattr(torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),
    ),
}


@pytest.fixture(params=TURN_ON)
def tf32(request):
    TURN_ON[request.param]()
    yield tf32_settings()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tf32_is_for_products_of_float32_features(dtype, tf32):
    resources = pytest.importorskip("singer_kernels.resources")
    assert tf32[0] == "tf32"
    with Products() as products:
        resources.training_step(
            ops, dtype, 16, 48, images=2, width=128, target=True, trains_target=True
        )
    assert len(products.settings) == 13
    assert set(products.settings) == {"tf32" if dtype == torch.float32 else "ieee"}
    assert tf32_settings() == tf32


def test_the_setting_is_restored_by_the_last_of_several_threads(tf32):
    narrow = MatmulPrecision(torch.bfloat16, torch.float32)
    both_are_in, first_is_out = threading.Barrier(2), threading.Event()
    found = []

    def first():
        with full_float32(narrow):
            both_are_in.wait(60)
        first_is_out.set()

    def last():
        with full_float32(narrow):
            both_are_in.wait(60)
            first_is_out.wait(60)
            found.append(torch.backends.cuda.matmul.fp32_precision)

    threads = [threading.Thread(target=target) for target in (first, last)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["ieee"]
    assert tf32_settings() == tf32


@needs_emulation
def test_it_is_not_chosen_before_it_has_run_on_a_gpu():
    cuda, cpu = backends.load("cuda"), torch.device("cpu")
    assert cuda.unavailable_reason(cpu, explicit=True) is None  # emulated
    reason = cuda.unavailable_reason(cpu, explicit=False)
    assert reason == "it has not been run on a GPU yet: only if asked for"


def test_the_reason_of_a_build_without_cuda(monkeypatch):
    monkeypatch.setattr(extension, "has_kernels", lambda name, device_type: False)
    monkeypatch.setattr(extension, "load", lambda: None)
    reason = backends.load("cuda").unavailable_reason(torch.device("cuda"), explicit=True)
    assert reason == "the compiled extension is built without CUDA"


@needs_emulation
def test_raw_kernels_check_their_arguments():
    norms, out = torch.ones(2, 3), torch.empty(2)
    outlier = torch.ops.singer_kernels.cuda_outlier
    with pytest.raises(RuntimeError, match="quantile: got 2, expected 0 to 1"):
        outlier(norms, 2.0, out, out, out)
    with pytest.raises(RuntimeError, match=r"counts: got shape \(3\), expected \(2\)"):
        outlier(norms, 0.5, out, out, torch.empty(3))
    with pytest.raises(RuntimeError, match="threshold: expected a contiguous tensor"):
        outlier(norms, 0.5, torch.empty(4)[::2], out, out)
    with pytest.raises(RuntimeError, match="squares: expected the accumulation dtype"):
        outlier(norms, 0.5, out, out.double(), out)
