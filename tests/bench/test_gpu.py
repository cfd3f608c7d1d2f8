# SPDX-License-Identifier: Apache-2.0
"""The script for a lent card goes through its steps in order, from any of them, and ends where nothing can work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import carry, model, place, probe, run, tune
from bench.precision import PRECISIONS

ROOT = Path(__file__).parents[2]
STEPS = ["place", "build", "profile", "probe", "contracts", "rows", "tune", "sanitize", "large", "compiled", "model"]

# writes down what it is asked, and fails at one word
STUB = """#!/bin/sh
echo "$@" >>"{log}"
case "$*" in *"{fails}"*) echo "it is not there" >&2; exit 3 ;; esac
"""

needs_bash = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="no bash")


class Script:
    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "asked"

    def run(self, *arguments: str, fails: str = "no such word", **variables: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        for name in ("python", "cmake"):
            program = self.folder / name
            program.write_text(STUB.format(log=self.log, fails=fails))
            program.chmod(0o755)
        return subprocess.run(
            ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments],
            env={
                **os.environ,
                "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}",
                "PYTHON": str(self.folder / "python"),
                **variables,
            },
            capture_output=True,
            text=True,
        )

    def asked(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("-m ")]

    def summary(self) -> list[list[str]]:
        lines = (self.folder / "out" / "summary.txt").read_text().splitlines()
        return [line.split()[:2] for line in lines if not line.startswith("gpu.sh")]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


@needs_bash
def test_every_step_in_its_order(script: Script):
    done = script.run("--dry", str(script.folder / "out"))
    assert done.returncode == 0, done.stderr
    assert script.summary() == [[step, "passed"] for step in STEPS]
    assert {path.stem for path in (script.folder / "out").glob("*.log")} == set(STEPS)
    commands = ["pytest" if line.startswith("-m pytest") else line.split()[2] for line in script.asked()]
    assert list(dict.fromkeys(commands)) == ["place", "profile", "probe", "pytest", "run", "tune", "model"]
    (line,) = (line for line in script.asked() if "bench profile" in line)
    dtypes = [part.split()[0] for part in line.split("--dtype ")[1:]]
    assert dtypes == ["float32", "bfloat16", "autocast"] and set(dtypes) == set(PRECISIONS)
    log = script.log.read_text()
    assert "-DDRSEG_EMULATE=ON" in log and "--build build/cuda --target drseg_native_cuda" in log


@needs_bash
def test_on_a_card_the_cuda_kernels_are_built_for_it_once(script: Script):
    # without nvcc it is skipped, so there is one
    (script.folder / "nvcc").write_text("#!/bin/sh\n")
    (script.folder / "nvcc").chmod(0o755)
    script.run(str(script.folder / "out"), "build")
    assert script.summary() == [["build", "passed"]]
    # the stub says that the library runs
    assert "the library is there" in (script.folder / "out" / "build.log").read_text()
    script.run(str(script.folder / "out"), "build", fails="why_not")
    assert "-DDRSEG_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=" in script.log.read_text()


@needs_bash
def test_the_commands_are_such_as_the_programs_take(script: Script, capsys: pytest.CaptureFixture[str]):
    # as on a card, where nothing but the lists of jobs is made
    script.run(str(script.folder / "out"), "rows", "large", "compiled", "tune", "model")
    for line in script.asked():
        command, *given = line.removeprefix("-m bench ").split()
        if command == "run":
            assert run.main([*given, "--dry-run"]) == 0, line
        elif command == "model":
            assert model.main([*given, "--dry-run"]) == 0, line
        else:
            assert tune.main([*given, "--dry-run", "--target", "90"]) == 0, line
    listed = capsys.readouterr().out
    assert "pdgr vitl_256x256_e256 fwd+bwd dino float32" in listed
    assert "pdgr paper_vitl_24x24_e256 fwd dino autocast" in listed and "knn_graph grid_128x128 fwd dino bf" in listed
    assert "knn_graph paper_vitl_24x24 fwd dino autocast" not in listed
    # what CUDA C++ has is timed beside Triton's
    for op in ("knn_graph", "edge_coefficient", "graph_layer"):
        more = "" if op == "knn_graph" else " --mode fwd+bwd"
        for backend in ("cuda", "triton"):
            assert f"--op {op} --case paper_vitl_24x24 --mode fwd{more} --backend {backend} " in script.log.read_text()


@needs_bash
def test_from_a_step_on_and_what_is_unknown(script: Script):
    out = str(script.folder / "out")
    assert script.run("--dry", "--from", "sanitize", out).returncode == 0
    assert script.summary() == [[step, "passed"] for step in STEPS[STEPS.index("sanitize") :]]
    for wrong in (["--from", "sanitise", out], [out, "nothing"], []):
        assert script.run(*wrong).returncode == 2


@needs_bash
@pytest.mark.parametrize("step", ["place", "profile"])
def test_where_the_first_steps_fail_nothing_else_is_tried(script: Script, step: str):
    done = script.run("--dry", str(script.folder / "out"), fails=f"bench {step}")
    assert done.returncode == 1
    assert script.summary()[-2:] == [[step, "failed"], [step, "ended"]]


@needs_bash
def test_a_step_that_fails_does_not_end_it_and_time_that_is_up_does(script: Script):
    assert script.run("--dry", str(script.folder / "out"), "probe", "large", fails="bench probe").returncode == 1
    assert script.summary() == [["probe", "failed"], ["large", "passed"]]
    script.run("--dry", str(script.folder / "out"), "compiled", "model", SECONDS_IN_ALL="5")
    # the model has a time of its own
    assert script.summary()[-2:] == [["compiled", "skipped"], ["model", "passed"]]


@needs_bash
def test_without_the_model_s_libraries_it_is_skipped(script: Script):
    assert script.run("--dry", str(script.folder / "out"), "model", fails="require").returncode == 0
    assert script.summary() == [["model", "skipped"]]
    assert "it is not there" in (script.folder / "out" / "summary.txt").read_text()


def test_probes_run_at_tiny_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "folder" / "probe.jsonl"
    assert probe.main(["--device", "cpu", "--repeats", "1", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = {row["probe"] for row in rows}
    assert {"product: scores", "copy: transposing", "gather and sum", "scatter to dense", "sort", "chain"} <= names
    assert {f"graph_layer: {kind}, {way}" for kind in ("relu", "layer_norm") for way in ("gathered", "dense")} <= names
    assert all(row["cold_us"] > 0 and "commit" in row for row in rows)
    assert "us per kernel" in capsys.readouterr().out.splitlines()[-1]


def test_gathered_sums_are_of_the_rows_that_are_named():
    made = {one.name: one for one in probe._moves(probe.SIZES["cpu"], "cpu") if one.dtype == torch.float32}
    index, x = made["gather and sum"].run.args  # type: ignore[attr-defined]
    weight = made["gather and sum"].run.keywords["per_sample_weights"]  # type: ignore[attr-defined]
    torch.testing.assert_close(made["gather and sum"].run(), (weight[..., None] * x[index]).sum(1))
    assert made["gather and sum"].amount == index.numel() * x.shape[1] * 4


CARRY = """
import sys, torch
from pathlib import Path
from bench import carry
from bench.aot_build import TARGETS
with carry.compiling(TARGETS[1]):
    from drseg_kernels import prepare_prior
    for rows in (16, 32):
        prepare_prior.prepare_prior(torch.randn(2, rows, 64))
print(carry.count(Path(sys.argv[1])))
"""


def test_what_a_launcher_launches_is_compiled_without_a_card(tmp_path: Path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", CARRY, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    # both sizes are one kernel
    assert done.returncode == 0 and done.stdout.split() == ["1"], done.stderr
    (ptx,) = tmp_path.glob("*/*.ptx")
    assert ".target sm_90" in ptx.read_text()


def test_what_was_brought_along_is_for_one_version_of_triton(tmp_path: Path):
    triton = pytest.importorskip("triton")
    assert "nothing was brought along" in place.carried(tmp_path, "cpu")["problem"]
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "kernel.cubin").write_bytes(b"")
    python = ".".join(map(str, sys.version_info[:3]))
    for version, fits in ((triton.__version__, True), ("2.0.0", False)):
        note = {"triton": version, "python": python, "arch": 90}
        (tmp_path / carry.NOTE).write_text(json.dumps(note))
        found = place.carried(tmp_path, "cpu")
        assert found["kernels"] == 1 and (found["problem"] is None) == fits


def test_a_place_without_a_card_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("triton")
    out = tmp_path / "environment.json"
    assert place.main(["--device", "cpu", "--out", str(out)]) == 0
    assert {"python", "torch", "triton", "carried", "compute_sanitizer"} <= json.loads(out.read_text()).keys()
    if not torch.cuda.is_available():
        assert place.main([]) == 1 and "no CUDA device" in capsys.readouterr().out
