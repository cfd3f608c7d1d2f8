# SPDX-License-Identifier: Apache-2.0
"""The checks of ``bench/aot.py`` find what they are there for; ``make aot`` runs them on every kernel."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import triton
from triton._C import libtriton
from triton.backends.nvidia import compiler

from bench import aot, aot_build
from bench.sass import Bound
from bench.work import Work

ROOT = Path(__file__).parents[2]
FIGURES = {"shared": 256, "registers": 120, "stack": 0, "spill_stores": 0, "spill_loads": 0}
HOPPER = next(target for target in aot.TARGETS if target.arch == 90)


def test_figures_within_the_limits_pass():
    assert aot.limit_problems(FIGURES, HOPPER, 4, 256) == []
    assert aot.growth_problems(FIGURES, FIGURES) == []


@pytest.mark.promise("C26")
@pytest.mark.parametrize(
    "changes,warps,problem",
    [
        ({"shared": HOPPER.shared_bytes + 1}, 4, "shared memory: "),
        ({"shared": 257}, 4, "shared memory expected by the launcher: expected at most 256, got 257"),
        ({"registers": 256}, 4, "registers: expected at most 255"),
        ({"registers": 129}, 16, "registers of a block: expected at most 65536, got 69632"),
        ({"spill_stores": 4}, 4, "spill stores: expected at most 0, got 4"),
        ({"spill_loads": 4}, 4, "spill loads: expected at most 0, got 4"),
    ],
)
def test_what_is_over_a_limit_fails(changes, warps, problem):
    found = aot.limit_problems({**FIGURES, **changes}, HOPPER, warps, 256)
    assert any(line.startswith(problem) for line in found)


@pytest.mark.promise("C26")
def test_growth_by_more_than_a_tenth_fails():
    assert aot.growth_problems({**FIGURES, "registers": 132}, FIGURES) == []
    assert aot.growth_problems({**FIGURES, "registers": 133}, FIGURES) == [
        "registers grew: expected at most 1.1 x 120, got 133"
    ]
    assert aot.growth_problems({**FIGURES, "stack": 8}, FIGURES)


LOG = """ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    208 bytes stack frame, 348 bytes spill stores, 350 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 208 bytes cumulative stack size
"""


def test_the_assembler_s_log_is_read_or_refused():
    assert aot_build.read_log(LOG) == {"registers": 255, "stack": 208, "spill_stores": 348, "spill_loads": 350}
    for broken in ("", LOG + LOG, LOG.replace("spill loads", "loads")):
        with pytest.raises(RuntimeError, match="^aot: ptxas says"):
            aot_build.read_log(broken)


GOOD = """
\tmov.u32 \t%r1, %ctaid.x;
\tmul.wide.s32 \t%rd2, %r1, %r3;
\tmul.lo.s32 \t%r9, %r1, %r3;
\tsetp.lt.s32 \t%p1, %r9, %r3;
\tadd.s64 \t%rd4, %rd1, %rd2;
\t@%p1 ld.global.b32 { %r5 }, [ %rd4 + 0 ];
\tmul.rn.f32 \t%f2, %f1, %f1;
"""


@pytest.mark.promise("C4")
@pytest.mark.parametrize(
    "planted,problem",
    [
        ("\tcvt.s64.s32 \t%rd3, %r9;\n\tadd.s64 \t%rd5, %rd1, %rd3;\n\tst.global.b32 [ %rd5 + 4 ], { %r5 };", "32-bit"),
        ("\tadd.s64 \t%rd8, %rd1, %rd7;\n\tld.global.nc.v4.b32 {%r5,%r6,%r7,%r8}, [%rd8];\n"
         "\tcvt.u64.u32 \t%rd7, %r9;", "32-bit"),
        ("\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd9 + 0 ], 0x10;\n\tcvt.u64.u32 \t%rd9, %r9;", "32-bit"),
        ("\tmma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f1};", "TF32"),
        ("\t.local .align 4 .b8 \t__local_depot0[64];", "local memory"),
        ("\t@%p1 fma.rn.f32 \t%f3, %f1, %f2, %f3;", "fused"),
    ],
)  # fmt: skip
def test_rules_of_the_text(planted, problem):
    assert aot.ptx_problems(GOOD, fusion=False) == []
    found = aot.ptx_problems(GOOD + planted + "\n", fusion=False)
    assert len(found) == 1 and problem in found[0]


@pytest.mark.promise("C4")
def test_every_kernel_pins_the_fusion_and_is_compiled():
    names = set()
    for target in aot.TARGETS:
        for variant in aot.variants(target):
            names.add(variant.kernel.__name__)
            # a selection's scores keep their last bits in every version of Triton, or ties would fall otherwise
            selects = variant.kernel.__name__.startswith("_knn_graph_fwd_kernel")
            assert variant.options["enable_fp_fusion"] is not selects
    kernels = set()
    for path in (ROOT / "kernels" / "drseg_kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "_kernel" in node.name and node.decorator_list:
                kernels.add(node.name)
    assert kernels and names == kernels


@pytest.mark.promise("C26")
def test_the_baseline_has_a_row_for_every_variant():
    baseline = json.loads(aot.BASELINE.read_text(encoding="utf-8"))
    wanted = {f"sm_{target.arch} {variant.name}" for target in aot.TARGETS for variant in aot.variants(target)}
    assert baseline and all(set(rows) == wanted for rows in baseline.values())


def test_the_baseline_was_written_from_the_kernels_as_they_are():
    """Or every kernel with a stale key would be built anew wherever this is checked: all of them take nine minutes."""
    known = json.loads(aot.BASELINE.read_text(encoding="utf-8")).get(triton.__version__)
    if known is None:
        pytest.skip(f"the baseline has no figures of Triton {triton.__version__}")
    stale = [
        f"sm_{target.arch} {variant.name}"
        for target in aot.TARGETS
        for variant in aot.variants(target)
        if known[f"sm_{target.arch} {variant.name}"].get("key") != aot.key_of(variant, target)
    ]
    assert not stale, f"run python -m bench aot --update: {len(stale)} changed, such as {stale[0]}"


def test_a_word_that_names_no_kernel_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        aot.main(["--only", "nothing_matches"])
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert "--only nothing_matches names no kernel; expected part of one of prepare_prior, " in line
    assert "graph_propagate" in line and "=" not in line and len(line) < 1000


@pytest.mark.promise("C26")
def test_what_has_not_changed_is_held_to_the_limits_without_a_build(tmp_path, monkeypatch, capsys):
    variant = next(iter(aot.variants(HOPPER)))
    built = []

    def build(variant, target):
        built.append(variant)
        return "", dict(FIGURES)

    def check(changed, *words):
        built.clear()
        monkeypatch.setattr(aot, "_variants", lambda arch: {variant.name: changed})
        code = aot.main(["--arch", "90", *words])
        return code, len(built), capsys.readouterr().out.splitlines()[-1]

    monkeypatch.setattr(aot, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(aot, "build", build)
    variant = dataclasses.replace(variant, shared_bytes=256)
    assert check(variant, "--update")[:2] == (0, 1)
    assert check(variant) == (
        0,
        0,
        f"aot: 0 kernels built with Triton {triton.__version__}, 1 as in the baseline, 0 failed",
    )
    assert check(variant, "--all")[:2] == (0, 1)
    # the launcher expects less now
    assert check(dataclasses.replace(variant, shared_bytes=255))[:2] == (1, 0)
    facts = {"arg_names": variant.kernel.arg_names, "__name__": variant.kernel.__name__}
    kernel = types.SimpleNamespace(cache_key="of another source", **facts)
    name = next(iter(variant.types))
    for change in (
        {"kernel": kernel},
        {"types": {**variant.types, name: "*fp64"}},
        {"constants": {**variant.constants, "MORE": 1}},
        {"options": {**variant.options, "num_stages": 7}},
        {"even": ("rows",)},
        {"bounded": True},
    ):
        assert check(dataclasses.replace(variant, **change))[:2] == (0, 1), change
    for place, name, other in (
        (aot, "_checks", lambda: "of other rules"),
        (aot, "work_of", lambda *_: Work(1, (Bound(3.0, 1),))),
        (compiler, "get_ptxas_version", lambda arch: "another assembler"),
        (libtriton, "get_cache_invalidating_env_vars", lambda: {"DISABLE_PTXAS_OPT": "true"}),
        (aot.sass, "disassembler", lambda: None),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(place, name, other)
            assert check(variant)[:2] == (0, 1), name


@pytest.mark.promise("C26")
def test_the_source_of_what_a_kernel_calls_is_part_of_its_key(tmp_path):
    """Built in a package beside this one, whose other module changes."""
    (tmp_path / "parts.py").write_text(PARTS.format(factor=2), encoding="utf-8")
    (tmp_path / "kernel.py").write_text(CALLS, encoding="utf-8")

    def key():
        words = [sys.executable, "-c", "import kernel; print(kernel.run.cache_key)"]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # files of one size and second are one file to kept bytecode
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    before = key()
    assert key() == before
    (tmp_path / "parts.py").write_text(PARTS.format(factor=3), encoding="utf-8")
    assert key() != before


PARTS = """
import triton, triton.language as tl
FACTOR = tl.constexpr({factor})

@triton.jit
def scaled(value):
    return value * FACTOR
"""
CALLS = """
import triton, triton.language as tl
from parts import scaled

@triton.jit
def run(ptr):
    tl.store(ptr, scaled(tl.load(ptr)))
"""

ADDITIONS = """
import re
from bench import aot
target = aot.TARGETS[1]
variant = next(one for one in aot.variants(target) if one.name.startswith("linear_map product"))
ptx, _ = aot.build(variant, target)
print(len(re.findall(r"\\badd(?:\\.rn)?\\.f32\\b", ptx)), ptx.count("wgmma.mma_async"))
"""


@pytest.mark.promise("C4")
def test_sums_of_a_step_are_added_outside_of_the_tensor_core(tmp_path):
    """One for each of a thread's results, 64 x 128 over 128 threads. Folded into products they would be none."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", ADDITIONS], cwd=ROOT, env=environment, capture_output=True, text=True)
    # and three products of 64 terms, 16 at a time
    assert done.returncode == 0 and done.stdout.split() == ["64", "12"], done.stdout + done.stderr


@pytest.mark.promise("C4", "C26")
@pytest.mark.parametrize("name", ["prepare_prior", "knn_graph product"])
def test_kernels_are_really_compiled(name, tmp_path):
    script = (
        "from bench import aot\n"
        "target = aot.TARGETS[1]\n"
        f"variant = next(one for one in aot.variants(target) if one.name.startswith({name!r}))\n"
        "ptx, figures = aot.build(variant, target)\n"
        "assert '.global' in ptx and figures['registers'] > 8, figures\n"
        "assert not aot.ptx_problems(ptx, variant.options.get('enable_fp_fusion', True), variant.bounded)\n"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
