#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests and measures the kernels on a bare machine with an NVIDIA GPU: python3 with torch >= 2.10, triton and pytest,
# nvcc and cmake. No network, nothing is installed: it runs the source tree.
#
#     bench/gpu.sh FOLDER [SLICE...]
#
# Slices, each of at most nine minutes, all by default: environment, build, aot, test, tune, bench, model, sanitize
# (the kernels' contracts under compute-sanitizer). TUNE_OPS, TUNE_CASES and TUNE_OPTIONS, and the same of BENCH,
# say what is tuned and measured, TESTS and SANITIZED (a pytest -k expression) what is tested; tune writes the tables of
# the source tree, which bench then reads, and a copy to FOLDER.
# A slice that cannot run here is skipped and says why. In FOLDER: a log per slice, rows.jsonl and model.jsonl
# with the measurements, environment.json, summary.txt with one line per slice. PYTHON names another interpreter.
set -uo pipefail

if [ $# -lt 1 ]; then
    sed -n '3,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2
ROOT=$PWD
PYTHON=${PYTHON:-python3}
TESTS=${TESTS:-$(echo tests/kernels/contract_*.py) tests/nn/test_cuda.py}
SANITIZED=${SANITIZED:-test_agrees_with_the_oracle and tiny or test_gap_rule and tiny and float32}
TUNE_OPS=${TUNE_OPS:-knn_graph edge_weight degree_normalize edge_coefficient graph_propagate graph_layer}
TUNE_CASES=${TUNE_CASES:-paper_vitl_24x24 grid_64x64 grid_128x128}
BENCH_OPS=${BENCH_OPS:-pdgr $TUNE_OPS}
BENCH_CASES=${BENCH_CASES:-$TUNE_CASES paper_vitl_24x24_e256 grid_64x64_e256 vitl_128x128_e256 grid_256x256}
TUNE_OPTIONS=${TUNE_OPTIONS:-}
BENCH_OPTIONS=${BENCH_OPTIONS:-}
SECONDS_PER_SLICE=${SECONDS_PER_SLICE:-530}
export PYTHONPATH="$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
failed=0

report() { # slice, outcome, words
    printf '%-12s %-8s %s\n' "$1" "$2" "$3" | tee -a "$OUT/summary.txt"
}

run() { # slice, command...
    local slice=$1 code begin=$SECONDS
    shift
    timeout --kill-after=10 "$SECONDS_PER_SLICE" "$@" >"$OUT/$slice.log" 2>&1
    code=$?
    if [ $code -eq 0 ]; then
        report "$slice" passed "$((SECONDS - begin)) s: $(grep -v '^ *$' "$OUT/$slice.log" | tail -1 | cut -c1-150)"
    elif [ $code -eq 124 ] || [ $code -eq 137 ]; then
        report "$slice" failed "stopped after $SECONDS_PER_SLICE s, see $slice.log"
    else
        report "$slice" failed "exit code $code, see $slice.log: $(tail -1 "$OUT/$slice.log" | cut -c1-150)"
    fi
    [ $code -eq 0 ] || failed=1
}

no_card() { # why no CUDA kernel can run here; silent where one can
    "$PYTHON" - <<'CODE' 2>/dev/null || echo "$PYTHON has no torch"
import torch
if not torch.cuda.is_available():
    print(f"torch {torch.__version__} sees no CUDA device")
CODE
}

environment() {
    "$PYTHON" - "$OUT/environment.json" <<'CODE'
import importlib.util, json, platform, shutil, subprocess, sys

def output(*command):
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None

import torch

found = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "triton": __import__("triton").__version__ if importlib.util.find_spec("triton") else None,
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "gpu": output("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"),
    "nvcc": output("nvcc", "--version"),
    "cmake": output("cmake", "--version"),
    "commit": output("git", "describe", "--always", "--dirty"),
}
with open(sys.argv[1], "w") as file:
    json.dump(found, file, indent=1)
print(" ".join(f"{name}={found[name]}" for name in ("python", "torch", "triton", "device")))
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10) or found["triton"] is None:
    raise SystemExit("gpu.sh: environment is too old; expected torch >= 2.10 and triton, got " + str(found["torch"]))
CODE
}

build() {
    local torch
    torch=$("$PYTHON" -c 'import torch; print(torch.__path__[0])') &&
        cmake -S . -B "$OUT/build" -DCMAKE_BUILD_TYPE=Release -DDRSEG_TORCH_DIR="$torch" -DDRSEG_OUTPUT_DIR="$OUT/lib" &&
        cmake --build "$OUT/build" --parallel &&
        DRSEG_NATIVE_LIBRARY="$OUT/lib/libdrseg_native.so" "$PYTHON" -c '
from drseg_core.ops import _native
reason = _native.why_not("cpu")
print(reason or "the native library loads")
raise SystemExit(reason is not None)'
}

# "a b" to "--op a --op b"
each() { # option, words...
    local option=$1 word
    shift
    for word in "$@"; do printf '%s %s ' "$option" "$word"; done
}

contracts() {
    # the tests wait for the compiler and for oracles on the CPU: as many at a time as there are cores
    local workers
    # nproc counts the threads that OpenMP may take
    workers=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $(nproc)")
    export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
    "$PYTHON" -m pytest -q -p no:cacheprovider -p no:benchmark --gpu --tb=short $workers "$@"
}

measure() {
    "$PYTHON" -m bench run --device cuda $(each --op $BENCH_OPS) $(each --case $BENCH_CASES) $BENCH_OPTIONS \
        --out "$OUT/rows.jsonl"
}

model() {
    "$PYTHON" -m bench model --device cuda --backend triton --backend reference --out "$OUT/model.jsonl"
}

tune() {
    "$PYTHON" -m bench tune $(each --op $TUNE_OPS) $(each --case $TUNE_CASES) $TUNE_OPTIONS
}

sanitize() {
    local tool
    for tool in memcheck racecheck; do
        # every tensor its own allocation, so that a read beyond its end is seen
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$PYTHON" -m pytest -q -p no:cacheprovider --gpu --tb=short tests/kernels/contract_*.py -k "$SANITIZED" ||
            return 1
    done
}

for slice in "${@:-environment build aot test tune bench model sanitize}"; do
    for name in $slice; do
        reason=
        case $name in
        environment) ;;
        build) command -v cmake >/dev/null || reason="cmake is not on the path" ;;
        aot) "$PYTHON" -c 'import triton' 2>/dev/null || reason="$PYTHON has no triton" ;;
        test) "$PYTHON" -c 'import pytest' 2>/dev/null || reason="$PYTHON has no pytest" ;;
        tune | bench) ;;
        model) "$PYTHON" -c 'import open_clip' 2>/dev/null || reason="$PYTHON has no open_clip_torch" ;;
        sanitize) command -v compute-sanitizer >/dev/null || reason="compute-sanitizer is not on the path" ;;
        *)
            echo "gpu.sh: slice is unknown; expected one of environment, build, aot, test, tune, bench, model, sanitize," \
                "got $name" >&2
            exit 2
            ;;
        esac
        case $name in test | tune | bench | model | sanitize) [ -n "$reason" ] || reason=$(no_card) ;; esac
        if [ -n "$reason" ]; then
            report "$name" skipped "$reason"
            continue
        fi
        library="$OUT/lib/libdrseg_native.so"
        [ ! -f "$library" ] || export DRSEG_NATIVE_LIBRARY="$library"
        case $name in
        environment | build) export -f environment build && export OUT PYTHON && run "$name" bash -c "$name" ;;
        aot) run aot "$PYTHON" -m bench aot ;;
        test) export -f contracts && export PYTHON && run test bash -c "contracts $TESTS" ;;
        tune)
            export -f each tune && export OUT PYTHON TUNE_OPS TUNE_CASES TUNE_OPTIONS && run tune bash -c tune
            # what was found before the time was up counts
            [ ! -d kernels/drseg_kernels/tuned ] || cp -rT kernels/drseg_kernels/tuned "$OUT/tuned"
            ;;
        bench)
            export -f each measure && export OUT PYTHON BENCH_OPS BENCH_CASES BENCH_OPTIONS
            run bench bash -c measure
            ;;
        model) export -f model && export OUT PYTHON && run model bash -c model ;;
        sanitize) export -f sanitize && export PYTHON SANITIZED && run sanitize bash -c sanitize ;;
        esac
    done
done
exit $failed
