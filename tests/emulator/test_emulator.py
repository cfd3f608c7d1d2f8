# SPDX-License-Identifier: Apache-2.0
"""The emulator runs right kernels rightly, and finds the one fault in each of the others, in any order of threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SEEDS = (1, 2, 3, 4, 5)

RIGHT = (
    "reverse",
    "overwrite",
    "within_a_warp",
    "halves",
    "named",
    "produce",
    "atomic",
    "count",
    "staged",
    "product",
    "product_tf32",
    "cut_off",
)
UNORDERED = r"race on shared memory|shared memory is read before it is written"
WRONG = {
    "race": UNORDERED,
    "race_with_reads": r"race on shared memory, place \d: .* kernels.cpp:\d+ by thread \d+ at kernels.cpp:\d+",
    "race_within_a_warp": UNORDERED,
    "race_past_a_named_barrier": UNORDERED,
    "race_with_what_is_made": UNORDERED,
    "race_of_counts": "race on shared memory",
    "leaves": "divergent barrier: .* thread 5 has left|deadlock .* thread",
    "other_barrier": "threads diverge: sync_block, where others are in sync_block",
    "other_collective": "threads diverge: warp_(max|sum), where others are in warp_(max|sum)",
    "lane_is_missing": r"deadlock in block 0,0: 1 threads \(first 7\) has left; 31 threads \(first 0\) in warp_sum",
    "deadlock": r"32 threads \(first 0\) in sync_named",
    "unset": "shared memory is read before it is written",
    "outside_global": "global memory out of bounds: element 32 of 32 .* thread 31",
    "outside_shared": "shared memory out of bounds: element 31 of 31 .* thread 31",
    "too_much_shared": "shared memory out of bounds: 192 bytes of 128",
    "misaligned": "global memory is not aligned to 16 bytes: element 2 .* thread 3",
    "two_blocks_write": "race on global memory: written by two blocks",
    "wait_too_loose": "shared memory is used before a copy to it was waited for",
    "staged_without_barrier": f"{UNORDERED}|before a copy to it was waited for",
    "copied_over_what_is_read": "race on shared memory|before a copy to it was waited for",
    "unwaited": "a thread leaves before its copies were waited for",
    "too_many_threads": "a launch of 33 threads",
}


@pytest.fixture(scope="module", params=["", "-DDRSEG_EMULATOR_UCONTEXT"], ids=["stacks", "ucontext"])
def kernels(request, tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("emulator") / "kernels"
    command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    done = subprocess.run(
        [*command, *request.param.split(), "-o", str(program), str(HERE / "kernels.cpp")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.promise("C42")
@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_are_right_and_each_fault_is_found(seed, kernels):
    environment = {**os.environ, "DRSEG_EMULATOR_SEED": str(seed)}
    done = subprocess.run([str(kernels), *RIGHT, *WRONG], env=environment, capture_output=True, text=True, timeout=600)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert {name: said[name] for name in RIGHT} == dict.fromkeys(RIGHT, "right")
    for name, expected in WRONG.items():
        assert re.search(f"emulator: .*({expected})", said[name]), f"{name}: {said[name]}"
    assert set(said) == {*RIGHT, *WRONG}


def test_without_checks_a_race_goes_by(kernels):
    environment = {**os.environ, "DRSEG_EMULATOR_CHECK": "0"}
    done = subprocess.run(
        [str(kernels), "race_of_counts"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "race_of_counts: right\n"
