# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels are right in any order of threads, and each planted fault is found in one of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
SEEDS = (1, 2, 3, 4, 5)

# file, what stands there, what stands there instead, and what the fault is
FAULTS = (
    ("prepare_prior", "exponent > 126 ? 126 : exponent", "exponent > 126 ? 126 : exponent & ~1", "of no row its power"),
    ("prepare_prior", "sqrt(lost) * inverse", "lost * inverse", "a residual that is none"),
    ("prepare_prior", "broken |= !(size < INFINITE)", "broken |= size == INFINITE", "NaN taken for a number"),
    ("knn_graph", "tied + count_bits(equal & before) < room", "tied + count_bits(equal) <= room", "tie rule"),
    ("knn_graph", "if (j < nodes) {", "if (true) {", "missing mask"),
    ("knn_graph", "+ row) * nodes);", "+ row) * how.k);", "wrong stride"),
    ("knn_graph", "border + margin : key[n] > threshold", "border + margin : key[n] >= threshold", "strict threshold"),
    ("knn_graph", "m == n ? ordered_bits(value) : key[m]", "m == n ? key[n] : key[m]", "nothing computed again"),
    ("knn_graph", "how.rounded && own != 0", "how.rounded && own == 0", "no bound"),
    ("knn_graph", "lost + loss * (1 + lost)", "0.05f * lost", "residual of one row only"),
    ("knn_graph", "margin = 2 *", "margin = 60 *", "a bound that is too loose"),
    (
        "knn_graph",
        "rows.get(j * how.channels + d), total",
        "rows.get(j * how.channels + lane), total",
        "a row read in part",
    ),
    (
        "knn_graph",
        "is_number(inverse) && is_number(value);",
        "is_number(inverse);",
        "a neighbour beyond the radius",
    ),
    ("knn_graph", "x -= how.width;\n      ++y;", "x -= how.width;", "wrong place on the grid"),
    ("edge_sums", "copies_wait<1>();", "copies_wait<2>();", "too loose a wait"),
    ("edge_sums", "copies_wait<0>();\n    }\n    sync_block();", "copies_wait<0>();\n    }", "removed barrier"),
    ("edge_sums", "sync_block();\n    if (how.stages == 1)", "if (how.stages == 1)", "removed barrier after"),
    ("edge_sums", "sync_warp();\n  return sums;", "return sums;", "removed barrier of a warp"),
    ("edge_sums", "inside = channel < how.width;", "inside = true;", "missing mask"),
    ("edge_sums", "edge.place = node * CHANNELS", "edge.place = node * PER", "wrong stride"),
    ("edge_sums", "mask = GROUP / 2; mask > 0", "mask = GROUP / 2; mask > 1", "lanes left out of a sum"),
    ("warp", "node >= nodes ? nodes - 1 : node;", "node;", "an index not clamped"),
    ("edge_gradients", "copies_wait<0>();\n  sync_block();", "copies_wait<0>();", "removed barrier"),
    ("edge_gradients", "// what was there has been read\n      sync_warp();", "", "removed barrier of a warp"),
    ("edge_gradients", "to_bias = warp_total(to_bias);", "", "lanes left out of a sum"),
    (
        "edge_gradients",
        "of each warp its channels of both, and the bias\n    sync_block();",
        "",
        "removed barrier before",
    ),
    ("edge_gradients", "if (!(hidden <= 0)) active", "if (!(hidden < 0)) active", "a unit at zero"),
    ("edge_gradients", "if (ROWS && is_edge) to_vector", "if (ROWS) to_vector", "a slot that is none"),
    ("edge_gradients", "narrow<T>(value * norm)", "narrow<T>(value)", "the norm of a row"),
    ("edge_gradients", "how.normed ? norms.get(link.place) : 1.0f", "1.0f", "the norm of a far end"),
    ("edge_gradients", "warp < WARPS; ++warp", "warp + 1 < WARPS; ++warp", "a warp left out of a sum"),
    (
        "edge_gradients",
        "is_bias ? slice > 0 : c >= how.width",
        "is_bias ? slice < 1 : c >= how.width",
        "another block's bias",
    ),
    ("edge_gradients", "Link{node % nodes,", "Link{edge % nodes,", "an edge from another node"),
    ("edge_gradients", "n < parts; ++n) sum", "n + 1 < parts; ++n) sum", "a block left out of a sum"),
    ("graph_layer", "copies_wait<0>();\n  sync_block();", "copies_wait<0>();", "removed barrier"),
    ("graph_layer", "copies_end_group();\n  copies_wait<0>();", "copies_end_group();", "removed wait"),
    ("graph_layer", "// what was there has been read\n      sync_warp();", "", "removed barrier of a warp"),
    ("graph_layer", "row < how.nodes && channel < how.channels);", "channel < how.channels);", "no row of zeros"),
    ("graph_layer", "Term term{how.nodes, 0.0f};", "Term term{0, 0.0f};", "what is no edge takes the first row"),
    ("graph_layer", "done += ROOM) {", "done += how.slots) {", "edges beyond the room of a warp"),
    ("graph_layer", "mask = GROUP; mask < LANES", "mask = 2 * GROUP; mask < LANES", "lanes left out of a sum"),
    (
        "graph_layer",
        "if (how.scaled) term.factor *= scale",
        "if (false) term.factor *= scale",
        "the scale of a far end",
    ),
    ("graph_layer", "how.scaled ? scales.get(row) : 1.0f;", "1.0f;", "the scale of a row"),
    ("graph_layer", "/ slices * how.rows;", "/ slices * (how.rows - 1);", "rows twice, and some never"),
    ("graph_layer", "Term term{node % nodes,", "Term term{edge % nodes,", "an edge from another node"),
    ("graph_layer", "reciprocal_root(variance + eps)", "reciprocal_root(variance)", "no eps"),
    ("graph_layer", "(value - middle) * (value - middle)", "value * value - middle", "a variance that is none"),
    ("graph_layer", "adds ? value + added", "adds && slot > 0 ? value + added", "what is added"),
    ("graph_layer", "if (scaled) value *= scale.get(node) *", "if (scaled) value *=", "the scale of one end only"),
    ("edge_coefficient", "if (how.masked) value", "if (how.masked && slot > 0) value", "missing mask of slots"),
    ("edge_coefficient", "degree += value;", "degree += slot < LANES / 4 ? value : 0;", "slots left out of a degree"),
)

# the part of check.cpp that has a file's kernels
PARTS = {"graph_layer": "-DDRSEG_LAYER", "edge_gradients": "-DDRSEG_GRADIENTS"}
PARTS |= dict.fromkeys(("edge_coefficient", "edge_sums", "warp"), "-DDRSEG_EDGES")


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


# compiling takes longer than running
FLAGS = ("-std=c++20", "-O0", "-DDRSEG_EMULATE")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A folder with the emulator's header, compiled once for all; g++ finds it there before the header itself."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [compiler(), *FLAGS, "-x", "c++-header", str(HERE / "emulator.h"), "-o", str(folder / "emulator.h.gch")]
    subprocess.run(command, check=True)
    return folder


def build(program: Path, sources: Path, compiled: Path, *options: str) -> None:
    folders = [f"-I{folder}" for folder in (sources, compiled, HERE)]
    command = [compiler(), *FLAGS, *options, *folders, str(HERE / "check.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(program: Path, seed: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DRSEG_EMULATOR_SEED": str(seed)}
    return subprocess.run([str(program)], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.promise("C24")
def test_the_kernels_are_right_in_any_order(tmp_path, compiled):
    build(tmp_path / "check", SOURCES, compiled)
    for seed in SEEDS:
        done = run(tmp_path / "check", seed)
        assert done.returncode == 0 and done.stdout == "right\n", f"seed {seed}: {done.stdout}"


def survives(folder: Path, compiled: Path, fault: tuple[str, str, str, str]) -> str | None:
    """The fault, if no seed finds it."""
    name, old, new, what = fault
    shutil.copytree(SOURCES / "cuda", folder / "cuda")
    path = folder / "cuda" / f"{name}.cuh"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{name}.cuh has {text.count(old)} times: {old!r}; expected it once"
    path.write_text(text.replace(old, new), encoding="utf-8")
    build(folder / "check", folder, compiled, PARTS.get(name, "-DDRSEG_SELECTION"))
    for seed in SEEDS:
        done = run(folder / "check", seed)
        assert done.returncode in (0, 1), done
        if done.returncode:
            return None
    return f"{name}: {what}"


def faults() -> tuple[tuple[str, str, str, str], ...]:
    """All where the last commit changed the kernels, the emulator or this file; else every sixth, from where the commit
    says. DRSEG_DEEP=1 takes all, and so does a tree without a history."""
    told = ["git", "-C", str(HERE), "diff", "--name-only", "HEAD~1", "--", ":/csrc/cuda", ":/tests/emulator"]
    changed = subprocess.run(told, capture_output=True, text=True)
    if os.environ.get("DRSEG_DEEP") == "1" or changed.returncode != 0 or changed.stdout:
        return FAULTS
    told = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    head = subprocess.run(told, capture_output=True, text=True, check=True).stdout
    return FAULTS[int(head, 16) % 6 :: 6]


@pytest.mark.promise("C42")
def test_each_planted_fault_is_found(tmp_path, compiled):
    chosen = faults()
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        left = pool.map(lambda n: survives(tmp_path / str(n), compiled, chosen[n]), range(len(chosen)))
        assert [what for what in left if what is not None] == []
