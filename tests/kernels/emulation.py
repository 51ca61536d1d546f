"""Compile the CUDA kernels as plain C++ with one lane per warp, for tests without a GPU.

The computation of a lane, the launches and the operators are those of the device; the reductions
and the division of a row among the lanes of a warp are not tested here, but in
``ptx/test_compiled_cuda.py``. ``python emulation.py LIBRARY
[OPTION ...]`` compiles with further compiler options; the tests then load the library that
``SINGER_EMULATED_LIBRARY`` names.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

VARIABLE = "SINGER_EMULATED_LIBRARY"
SOURCES = Path(__file__).parents[2] / "csrc"
FOLDER = tempfile.TemporaryDirectory()  # deleted when the process exits


def build(target, extra=()):
    """Compile the kernels into a library; ``extra``: further options of g++, which is needed."""
    torch_folder = Path(torch.__file__).parent
    options = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
    options += ["-DSINGER_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    options += [f"-I{SOURCES}", "-isystem", str(torch_folder / "include"), *extra]
    objects = [Path(FOLDER.name, f"{path.stem}.o") for path in sorted(SOURCES.glob("cuda/*.cu"))]

    def compile_one(compiled):
        source = SOURCES / "cuda" / f"{compiled.stem}.cu"
        command = ["g++", "-x", "c++", *options, "-c", str(source), "-o", str(compiled)]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, objects))
    link = ["g++", "-shared", *extra, *map(str, objects), f"-L{torch_folder / 'lib'}"]
    subprocess.run([*link, "-ltorch_cpu", "-o", str(target)], check=True)


def library():
    """Return the path of the library; :func:`load` compiles it if it does not exist."""
    return Path(os.environ.get(VARIABLE) or Path(FOLDER.name, "emulated.so"))


def load():
    """Load the kernels, compiling them first if necessary; return None, or the reason why not."""
    if not library().is_file():
        if shutil.which("g++") is None:
            return "there is no g++"
        build(library())
    torch.ops.load_library(str(library()))
    return None


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2:])
