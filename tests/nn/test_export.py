# SPDX-License-Identifier: Apache-2.0
"""PDGR and the selection as programs: ``torch.export``, ``make_fx``, AOTInductor; and who is refused in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from drseg_core import ops
from drseg_core.nn import PDGR

ROOT = Path(__file__).parents[2]
C, D = 6, 5
# some with fewer cells than neighbours, some with more
SIZES = [(2, 9, 11), (1, 2, 3), (3, 9, 4), (5, 12, 13)]
# each option once: a program takes seconds to make
OPTIONS: list[dict[str, Any]] = [
    {},
    {
        "norm": "sym_undirected",
        "self_loop": "extra",
        "residual": True,
        "k": 0.5,
        "edge_temperature": 0.1,
        "edge_decay": 1.0,
    },
    {
        "norm": "sym_count",
        "self_loop": "exclude",
        "use_affinity_as_weight": True,
        "normalize_prior": False,
        "keep_format": False,
    },
]


def pdgr(**options: Any) -> PDGR:
    torch.manual_seed(0)
    return PDGR(C, D, **{"k": 20, "edge_hidden": 7, **options})


def maps(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, channels, height, width, generator=random) for channels in (C, D))  # type: ignore[return-value]


def of_any_size() -> tuple[dict[int, Any], dict[int, Any]]:
    dims = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=2, max=64), 3: Dim("width", min=2, max=64)}
    return dims, dims


def exported(module: PDGR, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(module, maps(*SIZES[0]), dynamic_shapes=of_any_size(), strict=strict)


@pytest.mark.promise("C21")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_program_of_any_size_is_exported(options, strict):
    module = pdgr(**options)
    program = exported(module, strict).module()
    for size in SIZES:
        assert torch.equal(program(*maps(*size)), module(*maps(*size)))


class Selection(nn.Module):
    def forward(self, prior: Tensor) -> tuple[Tensor, Tensor]:
        nodes, grid = prior.flatten(2).transpose(1, 2), (prior.shape[2], prior.shape[3])
        index, score = ops.knn_graph(nodes, grid, 9, pad=True, return_score=True)
        return ops.sort_by_score(index, score)


@pytest.mark.parametrize("strict", [False, True])
def test_a_selection_of_any_size_is_exported(strict):
    given = maps(*SIZES[0])[1:]
    program = torch.export.export(Selection(), given, dynamic_shapes=of_any_size()[1:], strict=strict).module()
    for size in SIZES:
        prior = maps(*size)[1]
        assert all(torch.equal(*pair) for pair in zip(program(prior), Selection()(prior), strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_make_fx_follows_symbolic_sizes_forward_and_back(options):
    module = pdgr(**options)
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def forward(parameters: dict[str, Tensor], features: Tensor, prior: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (features, prior))

    def backward(parameters: dict[str, Tensor], features: Tensor, prior: Tensor) -> tuple[Tensor, ...]:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        return torch.autograd.grad(forward(leaves, features, prior).square().sum(), list(leaves.values()))

    for function, grad in ((forward, False), (backward, True)):
        with torch.set_grad_enabled(grad):
            traced = make_fx(function, tracing_mode="symbolic")(parameters, *maps(*SIZES[0]))
            for size in SIZES[::2]:
                torch.testing.assert_close(traced(parameters, *maps(*size)), function(parameters, *maps(*size)))


def test_make_fx_follows_the_selection():
    traced = make_fx(Selection(), tracing_mode="symbolic")(maps(*SIZES[0])[1])
    for size in SIZES[::2]:
        prior = maps(*size)[1]
        assert torch.equal(traced(prior)[0], Selection()(prior)[0])


RUN = """
import sys
import torch
import torch._inductor.codecache  # torch 2.10 forgets it when it loads a package
import drseg_core.ops

given, expected = torch.load(sys.argv[2], weights_only=True)
load = torch._inductor.aoti_load_package if sys.argv[1].endswith("aoti.pt2") else torch.export.load
program = load(sys.argv[1])
found = (program if sys.argv[1].endswith("aoti.pt2") else program.module())(*given)
torch.testing.assert_close(found, expected)
print(drseg_core.ops.last_backend("knn_graph"))
"""


def run_elsewhere(program: Path, module: PDGR) -> None:
    """A fresh process loads the program, and computes what the module does at another size."""
    given = maps(*SIZES[2])
    torch.save((given, module(*given).detach()), program.parent / "data.pt")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(program), str(program.parent / "data.pt")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] in ("native", "reference")


@pytest.mark.promise("C21")
def test_a_saved_program_runs_in_another_process(tmp_path):
    module = pdgr()
    torch.export.save(exported(module), tmp_path / "program.pt2")
    run_elsewhere(tmp_path / "program.pt2", module)


PLAIN = """
import sys
import torch

for number in range(int(sys.argv[1])):
    given, expected = torch.load(f"data{number}.pt", weights_only=True)
    torch.testing.assert_close(torch.export.load(f"plain{number}.pt2").module()(*given), expected)
assert not any(name.startswith("drseg") for name in sys.modules), "drseg is imported"
"""


def test_decomposed_programs_need_no_drseg(tmp_path):
    for number, options in enumerate(OPTIONS):
        module, given = pdgr(**options), maps(*SIZES[2])
        with torch.no_grad():
            program = exported(module)
            plain = program.run_decompositions(torch.export.default_decompositions() | ops.decompositions())
        assert any("drseg" in str(node.target) for node in program.graph.nodes)
        assert not any("drseg" in str(node.target) for node in plain.graph.nodes)
        for size in SIZES:
            torch.testing.assert_close(plain.module()(*maps(*size)), module(*maps(*size)))
        torch.export.save(plain, tmp_path / f"plain{number}.pt2")
        torch.save((given, module(*given).detach()), tmp_path / f"data{number}.pt")
    result = subprocess.run(
        [sys.executable, "-c", PLAIN, str(len(OPTIONS))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr


def test_a_decomposed_program_of_one_size_refuses_others():
    module, given = pdgr(), maps(*SIZES[0])
    with torch.no_grad():
        plain = torch.export.export(module, given).run_decompositions(ops.decompositions()).module()
    torch.testing.assert_close(plain(*given), module(*given))
    with pytest.raises(AssertionError, match="Guard failed"):
        plain(*maps(*SIZES[3]))


@pytest.mark.parametrize("radius", [None, 2.3])
@pytest.mark.parametrize("form", ["additive", "gauss", "multiplicative", "product"])
def test_the_decomposed_selection_is_the_selection(form, radius):
    class One(nn.Module):
        def forward(self, prior: Tensor) -> tuple[Tensor, Tensor]:
            options = {"decay": 0.7, "form": form, "include_self": False, "radius": radius}
            return ops.knn_graph(prior, (4, 5), 6, return_score=True, pad=True, **options)

    random = torch.Generator().manual_seed(0)
    prior = torch.randint(-3, 4, (2, 20, 7), generator=random).float()
    prior[0, 3], prior[1, 4] = torch.nan, 0
    plain = torch.export.export(One(), (prior,)).run_decompositions(ops.decompositions()).module()
    with ops.use_backend("reference"):
        index, score = One()(prior)
    found, value = plain(prior)
    assert torch.equal(found, index)
    torch.testing.assert_close(value, score, equal_nan=True, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_aot_inductor_compiles_a_program(tmp_path):
    module = pdgr()
    with torch.no_grad():
        program = exported(module)
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    package = str(tmp_path / "aoti.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=quick)
    run_elsewhere(Path(package), module)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph = pdgr()

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        return self.graph(features, prior)


NO_FORM = "prepare_prior: {0} has no form for this op; expected torch.export or torch.compile, got {0}"


def test_traces_and_scripts_are_refused_in_one_line(tmp_path):
    features, prior = maps(2, 3, 4)
    for module in (pdgr(), Host()):
        with pytest.raises(TypeError, match=f"^{re.escape(NO_FORM.format('torch.jit.trace'))}$"):
            torch.jit.trace(module, (features, prior))
        with pytest.raises(
            TypeError, match="^PDGR: TorchScript cannot compile it; expected torch.export, got torch.jit"
        ):
            torch.jit.script(module)
        assert module(features, prior).isfinite().all()
    # a function is TorchScript's own to refuse
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments"):
        torch.jit.script(ops.graph_propagate)


@pytest.mark.parametrize("strict", [False, True])
def test_onnx_is_refused_in_one_line(strict, monkeypatch):
    # what torch.onnx.export does first, which needs a package of its own for the rest
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(Exception, match=re.escape(NO_FORM.format("ONNX"))):
        torch.export.export(Host(), maps(2, 3, 4), strict=strict)
