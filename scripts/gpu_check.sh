#!/usr/bin/env bash
# Builds the extension, and tests and times on a GPU what needs one, in less than 8 minutes. The
# log, the results of the benchmarks and a summary of them go to the folder $OUT (default
# gpu_results/). PYTEST_ARGS is handed on to the pytest of the kernels.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
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
step 50 env PYTHONPATH=build_backend SINGER_BUILD_EXT=cuda "TORCH_CUDA_ARCH_LIST=$capability" \
    python3 -m singer_build
step 20 python3 -m singer_kernels.info
# shellcheck disable=SC2086
step 170 python3 -m pytest tests/kernels -m gpu -q --durations=10 --maxfail=30 ${PYTEST_ARGS:-}
if python3 -c "import singer.engine.run"; then
    step 40 python3 -m pytest tests/training/test_gpu_training.py -m gpu -q
else
    echo "left out: whole training steps need the package's dependencies"
fi
# What is measured is written as it comes: a run that is cut off leaves what it had. The most
# telling comes first, and nothing begins after the time limit.
rest=$((470 - SECONDS))
step "$rest" python3 -m pytest benchmarks/ --benchmark-only --time-limit "$((rest - 40))" \
    -q --results "$out/results.json" --benchmark-json "$out/pytest_benchmark.json"
step 10 env "PYTHONPATH=benchmarks:$PYTHONPATH" python3 -m harness.report --summary "$out/results.json" --output "$out/summary.md"
exit "$failed"
