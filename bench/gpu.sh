#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures and tests PDGR in nine minutes of a bare machine with an NVIDIA GPU: python3 with torch >= 2.10, triton and
# pytest. No network, nothing is installed: it runs the source tree. The most valuable comes first. The whole model comes
# after the nine minutes, where its libraries are there.
#
#     bench/gpu.sh [--dry] [--from STEP] FOLDER [STEP...]
#
# Steps: place build profile probe contracts rows tune sanitize large compiled model. Each is a process of its own with a
# time-out and a log in FOLDER; summary.txt has a line for each. Beside the logs: environment.json,
# profile.jsonl, probe.jsonl, pdgr.jsonl, knn_graph.jsonl and edge_coefficient.jsonl (rows), tuned/ (the tables of launch sizes), large.jsonl,
# compiled.jsonl, model.jsonl.
# What cannot run here is skipped and says why. Where place or profile fails, nothing else is tried.
#
# --from STEP: that one and what follows it; rows are added to the files that are there. --dry: every step on a CPU at
# small sizes, so that its command, its files and its summary are seen before a card is.
#
# Kernels compiled elsewhere are taken from TRITON_CACHE_DIR, build/carried by default, which is filled by
#     python -m bench carry build/carried --arch 90 --tune 5
# with the version of Triton, for the version of Python, of the machine with the GPU; the rest is compiled there.
#
# Libraries of the model (timm, open_clip_torch and what they import) may come in a folder on PYTHONPATH.
#
# PYTHON names another interpreter. SECONDS_IN_ALL: 540, without the model. CASES, KNN_CASES, DTYPES: what is measured. TESTS and TESTS_K:
# which contracts (files, and a pytest -k expression), SANITIZED: which of them under compute-sanitizer. TUNE_CASES,
# TUNE_DTYPES, TUNE_OPTIONS: what is tuned.

# lists of words, and functions that the process of a step calls
# shellcheck disable=SC2046,SC2086,SC2329
set -uo pipefail

ORDER="place build profile probe contracts rows tune sanitize large compiled model"
# seconds that a step may take
declare -A MOST=([place]=20 [build]=60 [profile]=45 [probe]=60 [contracts]=90 [rows]=120 [tune]=90 [sanitize]=45 [large]=40
    [compiled]=60 [model]=240)

usage() {
    sed -n '3,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

DRY=
FIRST=
while [ $# -gt 0 ]; do
    case $1 in
    --dry) DRY=1 ;;
    --from)
        FIRST=${2:-}
        shift
        ;;
    -*) usage ;;
    *) break ;;
    esac
    shift
done
[ $# -ge 1 ] || usage
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2

STEPS="${*:-$ORDER}"
if [ -n "$FIRST" ]; then
    STEPS="$FIRST${ORDER#*"$FIRST"}"
fi
for step in ${FIRST:-} $STEPS; do
    if [ -z "${MOST[$step]:-}" ]; then
        echo "gpu.sh: step is unknown; expected one of $ORDER, got $step" >&2
        exit 2
    fi
done

PYTHON=${PYTHON:-python3}
DTYPES=${DTYPES:-float32 bfloat16 autocast}
TUNE_DTYPES=${TUNE_DTYPES:-float32 bfloat16}
TUNE_OPTIONS=${TUNE_OPTIONS:-}
if [ -z "$DRY" ]; then
    DEVICE=cuda
    CASES=${CASES:-paper_vitl_24x24_e256 grid_64x64_e256}
    KNN_CASES=${KNN_CASES:-paper_vitl_24x24 grid_64x64 grid_128x128}
    LARGE=vitl_256x256_e256
    TUNE_CASES=${TUNE_CASES:-paper_vitl_24x24 paper_vitl_24x24_e256 grid_64x64}
    TESTS=${TESTS:-$(echo tests/kernels/contract_*.py) tests/nn/test_cuda.py}
    ASKED="tiny or paper or prepare_prior or csc or cuda or halves or as_it_lies or handed_on or scales_are"
    # some rows of a graph, as processes share them
    ASKED="$ASKED or some_rows"
    # neighbours by rounded rows, what the library's products lose, and products of our own
    ASKED="$ASKED or left_to_a_layer or slack or computed_again or no_list or it_must_be or our_own or than_float32"
    # those of large images, in half precision too
    ASKED="$ASKED or choice_is_that or far_copy or no_launch or half_precision_needs"
    # linear maps by float16 parts: their error beside float32's, and what a tensor core cuts off
    ASKED="$ASKED or no_less_accurate or scales_and_parts or any_size or not_finite_keeps or pdgr_multiplies"
    # layers by a dense matrix, in bfloat16 too, and recorded
    ASKED="$ASKED or graph_layer_dense"
    TESTS_K=${TESTS_K:-$ASKED}
    SANITIZED=${SANITIZED:-test_agrees_with_the_oracle and tiny_3x4 and float32 or test_gap_rule and tiny and float32 or test_in_small_pieces or test_gradients_come_through}
    REPEATS=7
    PROBE_REPEATS=11
    SECONDS_IN_ALL=${SECONDS_IN_ALL:-540}
else
    DEVICE=cpu
    CASES=${CASES:-image_24x24}
    KNN_CASES=${KNN_CASES:-image_24x24}
    LARGE=image_24x24
    TUNE_CASES=${TUNE_CASES:-paper_vitl_24x24}
    TESTS=${TESTS:-tests/kernels/contract_prepare_prior.py tests/kernels/contract_cuda_knn_graph.py}
    TESTS_K=${TESTS_K:-layouts}
    SANITIZED=$TESTS_K
    REPEATS=1
    PROBE_REPEATS=1
    SECONDS_IN_ALL=${SECONDS_IN_ALL:-1800}
    for step in "${!MOST[@]}"; do MOST[$step]=$((5 * MOST[$step])); done
fi
export OUT PYTHON DTYPES TUNE_DTYPES TUNE_OPTIONS DRY DEVICE CASES KNN_CASES LARGE TUNE_CASES TESTS TESTS_K REPEATS
export SANITIZED PROBE_REPEATS PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PYTHONDONTWRITEBYTECODE=1 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/build/carried}"

bench() { "$PYTHON" -m bench "$@"; }

# "a b" to "--op a --op b"
each() { # option, words...
    local option=$1 word
    shift
    for word in "$@"; do printf '%s %s ' "$option" "$word"; done
}

step_place() { bench place --device $DEVICE --out "$OUT/environment.json"; }

step_build() {
    local how="-DDRSEG_CUDA=ON"
    [ -z "$DRY" ] || how="-DDRSEG_EMULATE=ON"
    if [ -z "$DRY" ] && "$PYTHON" -c "$CUDA_RUNS"; then
        echo "the library is there"
        return
    fi
    [ -n "$DRY" ] || how="$how -DCMAKE_CUDA_ARCHITECTURES=$("$PYTHON" -c "$ARCHITECTURE")"
    cmake -S . -B build/cuda -DCMAKE_BUILD_TYPE=Release -DDRSEG_OUTPUT_DIR="$PWD/build/cuda" $how \
        -DDRSEG_TORCH_DIR="$("$PYTHON" -c 'import torch; print(torch.__path__[0])')" &&
        cmake --build build/cuda --target drseg_native_cuda && echo "built in build/cuda"
}

step_profile() {
    bench profile --device $DEVICE $(each --case $CASES) $(each --dtype $DTYPES) --out "$OUT/profile.jsonl"
}

step_probe() { bench probe --device "$DEVICE" --repeats "$PROBE_REPEATS" --out "$OUT/probe.jsonl"; }

step_contracts() {
    # the tests wait for the compiler and for oracles on the CPU: as many at a time as there are cores
    local workers where=--gpu
    # nproc counts the threads that OpenMP may take
    workers=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $(nproc)")
    export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
    if [ -n "$DRY" ]; then
        where=
        export TRITON_INTERPRET=1
    fi
    ${CHECKER:-} "$PYTHON" -m pytest -q -p no:cacheprovider -p no:benchmark --tb=short $where $workers $TESTS -k "$TESTS_K"
}

step_rows() {
    local dtype backend op failed=0 how
    for dtype in $DTYPES; do
        how="--device $DEVICE --data dino --repeats $REPEATS --dtype $dtype"
        bench run --op pdgr $(each --case $CASES) --beside matmul_lower_bound $how --out "$OUT/pdgr.jsonl" || failed=1
        # autocast is a matter of the whole module
        [ "$dtype" = autocast ] || bench run --op knn_graph $(each --case $KNN_CASES) --beside matmul_lower_bound $how \
            --out "$OUT/knn_graph.jsonl" || failed=1
        # small graphs by CUDA C++, which goes first there, and by Triton
        [ "$dtype" = autocast ] || [ -n "$DRY" ] || for backend in cuda triton; do
            # of what has kernels for the backward, that too
            for op in knn_graph edge_coefficient graph_layer; do
                bench run --op $op --case ${KNN_CASES%% *} --mode fwd $([ $op = knn_graph ] || echo --mode fwd+bwd) \
                    --backend $backend --beside nothing ${how/dino/case} --out "$OUT/$op.jsonl" || failed=1
            done
        done
    done
    return $failed
}

step_tune() {
    local dtype case how="--out $OUT/tuned"
    [ -z "$DRY" ] || how="--dry-run"
    mkdir -p "$OUT/tuned" && cp -r kernels/drseg_kernels/tuned/. "$OUT/tuned"
    # one case after the other: what was found before the time is up counts
    for case in $TUNE_CASES; do
        for dtype in $TUNE_DTYPES; do
            bench tune --case $case --dtype $dtype $how $TUNE_OPTIONS || return
        done
    done
}

step_sanitize() {
    local tool
    # every tensor its own allocation, so that a read beyond its end is seen
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    TESTS_K=$SANITIZED
    for tool in memcheck racecheck synccheck; do
        # without a card the tests run as they are
        [ -n "$DRY" ] || CHECKER="compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all"
        step_contracts || return
    done
}

step_large() {
    bench run --device "$DEVICE" --op pdgr --case "$LARGE" --data dino --beside nothing --repeats 1 --slow-repeats 1 \
        --out "$OUT/large.jsonl"
}

step_compiled() {
    local dtype failed=0
    # on a CPU the compiler takes a minute for each
    [ -z "$DRY" ] || DTYPES=${DTYPES%% *}
    for dtype in $DTYPES; do
        bench run --device $DEVICE --op pdgr --case ${CASES%% *} --data dino --beside compiled --no-memory \
            --repeats $REPEATS --dtype "$dtype" --out "$OUT/compiled.jsonl" || failed=1
    done
    return $failed
}

step_model() {
    local how=
    # both precisions, one by one and compiled, in the order in which they are wanted; on a CPU what takes no compiler
    [ -z "$DRY" ] || how="--config tiny --precision float32 --precision autocast --compiled no --compiled yes --compiler eager"
    bench model --device $DEVICE --repeats $REPEATS $how --out "$OUT/model.jsonl"
}

# why a step cannot run here; silent where it can
why_not() { # step
    case $1 in
    build)
        [ -n "$(command -v cmake)" ] || echo "cmake is not on the path"
        [ -n "$DRY" ] || [ -n "$(command -v nvcc)" ] || echo "nvcc is not on the path"
        ;;
    contracts) "$PYTHON" -c 'import pytest' 2>/dev/null || echo "$PYTHON has no pytest" ;;
    sanitize)
        if [ -n "$DRY" ]; then
            "$PYTHON" -c 'import pytest' 2>/dev/null || echo "$PYTHON has no pytest"
        elif [ -z "$(command -v compute-sanitizer)" ]; then
            echo "compute-sanitizer is not on the path"
        fi
        ;;
    model)
        "$PYTHON" -c 'from drseg_core.extras import require; require("bench model", "model")' 2>&1 | tail -1 | sed 's/^[a-zA-Z_.]*Error: //'
        ;;
    esac
}

report() { # step, outcome, words
    printf '%-10s %-8s %s\n' "$1" "$2" "$3" | tee -a "$OUT/summary.txt"
}

export -f $(compgen -A function)
# what the step builds is what the others run, if the package has none of its own
CUDA_RUNS='from drseg_core.ops._cuda import why_not; raise SystemExit(why_not("cuda"))'
ARCHITECTURE='import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}{chr(97) * (major > 8)}-real")'
export CUDA_RUNS ARCHITECTURE
[ -f drseg_core/_lib/libdrseg_native_cuda.so ] && [ -z "$DRY" ] ||
    export DRSEG_NATIVE_CUDA_LIBRARY="$PWD/build/cuda/libdrseg_native_cuda.so"
failed=0
for step in $STEPS; do
    reason=$(why_not "$step" | head -1)
    left=$((SECONDS_IN_ALL - SECONDS))
    [ $step != model ] || left=${MOST[model]}
    [ $left -ge 10 ] || reason="the time is up; --from $step goes on"
    if [ -n "$reason" ]; then
        report "$step" skipped "$reason"
        continue
    fi
    limit=$((MOST[$step] < left ? MOST[$step] : left))
    begin=$SECONDS
    timeout --kill-after=5 "$limit" bash -c "step_$step" >"$OUT/$step.log" 2>&1
    code=$?
    last=$(grep -v '^ *$' "$OUT/$step.log" | tail -1 | cut -c1-150)
    case $code in
    0) report "$step" passed "$((SECONDS - begin)) s: $last" ;;
    124 | 137) report "$step" stopped "after $limit s, see $step.log: $last" ;;
    *) report "$step" failed "exit code $code, see $step.log: $last" ;;
    esac
    [ $code -eq 0 ] || failed=1
    case $step:$code in
    # what was profiled before the time was up counts
    *:0 | profile:124 | profile:137) ;;
    place:* | profile:*)
        report "$step" ended "nothing else is tried; --from $step goes on"
        break
        ;;
    esac
done
exit $failed
