#!/usr/bin/env bash
# Builds the extension, and tests and times on a GPU what needs one. The log, the compiled kernels'
# registers and the times go to the folder $OUT (default gpu_results/). PYTEST_ARGS is handed on to
# the pytest of the kernels.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_results}
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

step() {
    local limit=$1
    shift
    echo "+ $*"
    local begin=$SECONDS
    timeout "$limit" "$@" || failed=$?
    echo "  $((SECONDS - begin)) s, failed: $failed"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
# For the GPU at hand alone.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
step 60 env PYTHONPATH=build_backend SINGER_BUILD_EXT=cuda "TORCH_CUDA_ARCH_LIST=$capability" \
    python3 -m singer_build
step 20 python3 -m singer_kernels.info
# shellcheck disable=SC2086
step 210 python3 -m pytest tests/kernels -m gpu -q --durations=10 --maxfail=30 ${PYTEST_ARGS:-}
step 80 python3 benchmarks/losses.py --device cuda --json "$out/losses.json"
if python3 -c "import singer.training"; then
    step 60 python3 -m pytest tests/training/test_gpu_training.py -m gpu -q
    step 50 python3 benchmarks/steps.py --device cuda --rounds 10 --json "$out/steps.json"
else
    echo "left out: tests and timing of whole training steps need the package's dependencies"
fi
exit "$failed"
