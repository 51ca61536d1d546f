"""The CUDA kernels compiled as plain C++, one lane to a warp: for tests without a GPU.

What a lane computes, the launches and everything around them are as on a device; how the lanes of a
warp share a row is not, for there is one.
"""

import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCES = Path(__file__).parents[2] / "csrc"
FOLDER = tempfile.TemporaryDirectory()  # as long as the process lives


def load():
    """Compile and load the kernels; return why that can't be done, or None."""
    compiler, torch_folder = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None:
        return "there is no g++"
    options = ["-std=c++17", "-O2", "-fPIC", "-fno-math-errno", "-DSINGER_EMULATED"]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{SOURCES}"]
    options += ["-isystem", str(torch_folder / "include")]
    objects = [Path(FOLDER.name, f"{path.stem}.o") for path in sorted(SOURCES.glob("cuda/*.cu"))]

    def compile_one(target):
        source = SOURCES / "cuda" / f"{target.stem}.cu"
        command = [compiler, "-x", "c++", *options, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, objects))
    library = Path(FOLDER.name, "emulated.so")
    link = [compiler, "-shared", *map(str, objects), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*link, "-o", str(library)], check=True)
    torch.ops.load_library(str(library))
    return None
