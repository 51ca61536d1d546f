"""The CUDA kernels compiled as plain C++, one lane to a warp: for tests without a GPU.

What a lane computes, the launches and everything around them are as on a device; how the lanes of
a warp share a row is not, for there is one. ``python emulation.py LIBRARY [OPTION ...]`` compiles
them with further options; ``SINGER_EMULATED_LIBRARY`` then names that library to the tests.
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
FOLDER = tempfile.TemporaryDirectory()  # as long as the process lives


def build(target, extra=()):
    """Compile the kernels into a library, with further options. There must be a g++."""
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
    """Return where the library is, or will be once it is loaded."""
    return Path(os.environ.get(VARIABLE) or Path(FOLDER.name, "emulated.so"))


def load():
    """Load the kernels, compiled here unless there is a library; return why not, or None."""
    if not library().is_file():
        if shutil.which("g++") is None:
            return "there is no g++"
        build(library())
    torch.ops.load_library(str(library()))
    return None


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2:])
