#!/usr/bin/env bash
# Build the extension, run the GPU tests and the benchmarks on a GPU, in less than 8 minutes. Log,
# benchmark results and their summary go to the folder $OUT (default gpu_results/). PYTEST_ARGS is
# passed to the pytest run of the kernels.
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

timeout 30 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
# Build for this GPU's architecture only.
capability=$(timeout 30 nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
step 50 env PYTHONPATH=build_backend SINGER_BUILD_EXT=cuda "TORCH_CUDA_ARCH_LIST=$capability" \
    python3 -m singer_build
step 20 python3 -m singer_kernels.info
# shellcheck disable=SC2086
step 170 python3 -m pytest tests/kernels -m gpu -q --durations=10 --maxfail=30 ${PYTEST_ARGS:-}
if python3 -c "import singer.engine.run"; then
    step 40 python3 -m pytest tests/training/test_gpu_training.py -m gpu -q
else
    echo "skipped: whole training steps need the dependencies of singer"
fi
# Results are written after each measurement, the most relevant first, so a run that is cut off
# keeps what it has. No measurement starts after the time limit.
rest=$((470 - SECONDS))
step "$rest" python3 -m pytest benchmarks/ --benchmark-only --time-limit "$((rest - 40))" \
    -q --results "$out/results.json" --benchmark-json "$out/pytest_benchmark.json"
step 10 env "PYTHONPATH=benchmarks:$PYTHONPATH" python3 -m harness.report --summary "$out/results.json" --output "$out/summary.md"
exit "$failed"
