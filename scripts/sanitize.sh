#!/usr/bin/env bash
# Build the CPU operators, and the CUDA kernels as plain C++, with AddressSanitizer and
# UndefinedBehaviorSanitizer, and run their fuzz tests; those of the CPU with every instruction set
# that this processor has. Needs g++ and the packages of ".[test]" in the environment of `python`.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
torch=$(python -c 'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])')
sanitizers=(-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined)
cp -r singer_kernels tests pyproject.toml "$scratch"
g++ -std=c++17 -O1 -fPIC -shared -fopenmp-simd -fno-math-errno -fvisibility=hidden \
  "${sanitizers[@]}" \
  -DTORCH_TARGET_VERSION=0x020a000000000000 -Icsrc "-I$torch/include" csrc/cpu/*.cpp \
  "-L$torch/lib" -ltorch_cpu -o "$scratch/singer_kernels/_ops.so"
export SINGER_EMULATED_LIBRARY=$scratch/emulated.so
python tests/kernels/emulation.py "$SINGER_EMULATED_LIBRARY" -O1 "${sanitizers[@]}"
cd "$scratch"
report="
from singer_kernels import extension
reason = extension.load()
assert reason is None, reason
print(extension.cpu_capability())"

sanitized() { # without leak detection: Python and torch do not free everything at exit
  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$scratch \
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" "$@"
}

fuzz() { sanitized python -m pytest -q -m "" -p no:cacheprovider "$@"; }

for capability in baseline avx2 avx512; do
  export SINGER_CPU_CAPABILITY=$capability
  echo "== $capability"
  if [ "$(sanitized python -c "$report")" != "$capability" ]; then
    echo "skipped: this processor does not have it"
    continue
  fi
  fuzz tests/kernels/test_cpu_operators.py -k "raise or bit or group"
done
unset SINGER_CPU_CAPABILITY
echo "== CUDA kernels"
fuzz tests/kernels/test_cuda_fuzz.py -k "raise"
