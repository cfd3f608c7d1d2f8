# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: the syntax trees of all sources are walked and every import is held to the rules below.

The rules are those of CONTRIBUTING.md: ``cli`` to ``studies``, to ``scenes``, ``training``, ``evaluation``, to
``checkpoints``, to ``models``, ``data``, to ``nn``, to ``ops``; kernels never know of the package; heavy libraries are
imported where they are used.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from drseg_core.extras import EXTRAS, module_name

ROOT = Path(__file__).parents[2]
PACKAGE = "drseg_core"

_BASE = {"errors", "extras", "files", "device", "config"}
_BLOCKS = _BASE | {"ops", "nn"}
_PARTS = _BLOCKS | {"models", "data"}
# part of the package -> parts it may import besides itself
MAY_IMPORT: dict[str, set[str]] = {
    # doors: the rooms behind them are entered when they are asked for
    "": {"errors", "ops", "nn", "processor", "checkpoints", "scenes"},
    "__main__": {"cli"},
    "errors": set(),
    "extras": {"errors"},
    "files": {"errors"},
    "device": {"errors"},
    "processor": set(),
    "config": {"errors", "extras", "files"},
    "ops": {"errors"},
    "nn": {"ops", "errors"},
    "testing": {"ops", "nn"},
    "models": _BLOCKS,
    "data": _BASE | {"nn"},
    "checkpoints": _PARTS,
    "training": _PARTS | {"checkpoints"},
    "evaluation": _PARTS,
    "scenes": _PARTS | {"checkpoints", "evaluation"},
    "view": _PARTS | {"checkpoints", "evaluation", "scenes"},
    "studies": _PARTS | {"checkpoints", "training", "evaluation", "scenes", "testing"},
    "cli": _PARTS | {"checkpoints", "training", "evaluation", "scenes", "view", "studies", "processor", ""},
}
# imported inside the function that needs them: importing the package stays quick, builds nothing, and works without the
# extras
LAZY = {module_name(library) for libraries in EXTRAS.values() for library in libraries} | {"triton", "drseg_kernels"}
# a class of it is derived from, and a command loads this module after it has made sure of the library
EAGER = {("drseg_core.cli.parsers", "jsonargparse")}
KERNELS_MAY_IMPORT = {"torch", "triton", "drseg_kernels", "__future__"} | set(sys.stdlib_module_names)


@dataclass(frozen=True)
class Import:
    """One imported module: ``lazy`` inside a function body, ``typing`` only for the type checker."""

    target: str
    line: int
    lazy: bool = False
    typing: bool = False


def _exists(module: str) -> bool:
    for base in (ROOT, ROOT / "kernels"):
        path = base.joinpath(*module.split("."))
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return True
    return False


def imports(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import of a source; ``from a import b`` counts as ``a.b`` where that is a module."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            lazy = True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing = True
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy, typing) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append(Import(inner if _exists(inner) else base, node.lineno, lazy, typing))
        called = isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__")
        if called and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            found.append(Import(node.args[0].value, node.lineno, lazy, typing))
        for child in ast.iter_child_nodes(node):
            visit(child, lazy, typing)

    visit(ast.parse(source), False, False)
    return found


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _ops_problem(module: str, target: str) -> str | None:
    """Rules inside ``ops``, and for who reaches into it."""
    inside = target.split(".")[2:]
    if part_of(module) != "ops":
        # a function of the package has the name of its op's folder
        public = not inside or len(inside) == 1 and not inside[0].startswith("_") or inside[1:] == ["api"]
        if public or part_of(module) == "nn" and inside[0] == "_checks":
            return None
        if part_of(module) == "testing" and inside[-1] in ("_cases", "cases"):
            return None
        return "only the public ops may be imported from outside"
    own = module.split(".")[2:]
    if not own or not inside:
        return None if not own else "an op does not import the package that gathers them"
    if inside[0].startswith("_"):
        return None if not own[-1].startswith("reference") else "a reference imports nothing of ours"
    if own[0].startswith("_"):
        return "what the ops share imports none of them"
    role, wanted = own[-1], inside[-1]
    if own == ["graph"]:
        return None if wanted == "api" else "a graph is made of the public ops"
    if own in (["scores"], ["between"]):
        known = wanted == "api" or inside == ["knn_graph", "reference"]
        return None if known else f"{own[0]} is made of the public ops and the decay table"
    if own[0] != inside[0]:
        # a fused op means the composition of others, and an op may call another
        return None if role == wanted in ("api", "reference", "cases") else "an op does not import another op"
    if role == "api" and wanted in ("reference", "registration"):
        return None
    if role == "registration" and wanted == "reference":
        return None
    return f"{role} does not import {wanted}"


def problem(module: str, found: Import) -> str | None:
    """Why ``module`` must not import this; None when it may."""
    target, root = found.target, found.target.split(".")[0]
    if root in ("tests", "bench") and module.split(".")[0] not in ("tests", root):
        return f"nothing imports {root}"
    if module.startswith("drseg_kernels"):
        return None if root in KERNELS_MAY_IMPORT else "a kernel imports torch and triton only"
    if not module.startswith(PACKAGE):
        return None
    if root in LAZY and not (found.lazy or found.typing) and (module, root) not in EAGER:
        return f"{root} is imported inside the function that needs it"
    if root == "drseg_kernels" and not re.fullmatch(r"drseg_core\.ops\._triton", module):
        return "only the backend of that name reaches a kernel"
    if root != PACKAGE:
        return None
    mine, theirs = part_of(module), part_of(target)
    if mine != theirs and theirs not in MAY_IMPORT.get(mine, set()):
        return f"{mine or PACKAGE} does not import {theirs or PACKAGE}"
    if not mine and theirs != "errors" and not (found.lazy or found.typing):
        return f"{PACKAGE} imports its rooms when they are asked for"
    if mine == "scenes" and theirs == "evaluation" and target != f"{PACKAGE}.evaluation.inference":
        return "scenes imports nothing of evaluation but its inference"
    return _ops_problem(module, target) if theirs == "ops" else None


def sources() -> list[tuple[str, Path]]:
    found = []
    for base, folder in ((ROOT, PACKAGE), (ROOT / "kernels", "drseg_kernels"), (ROOT, "bench"), (ROOT, "tests")):
        for path in sorted((base / folder).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_every_import_goes_the_right_way():
    wrong = []
    modules = sources()
    assert len(modules) > 40
    for module, path in modules:
        for found in imports(path.read_text(encoding="utf-8"), module, path.stem == "__init__"):
            reason = problem(module, found)
            if reason:
                wrong.append(f"{path.relative_to(ROOT)}:{found.line}: imports {found.target}: {reason}")
    assert not wrong, "\n".join(wrong)


def test_every_part_of_the_package_has_a_rule():
    parts = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    parts |= {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert parts <= set(MAY_IMPORT)


FAULTS = [
    ("drseg_core", "from drseg_core.ops import knn_graph"),
    ("drseg_core", "def f():\n    from drseg_core.training.loop import train"),
    ("drseg_core.nn.pdgr", "from drseg_core.models import drseg"),
    ("drseg_core.nn.pdgr", "def f():\n    from drseg_core.training.loop import train"),
    ("drseg_core.nn.pdgr", "from drseg_core.ops.knn_graph.reference import prepare_prior"),
    ("drseg_core.nn.pdgr", "from drseg_core.ops.graph_propagate import registration"),
    ("drseg_core.nn.pdgr", "from ..ops.graph_propagate import registration"),
    ("drseg_core.nn.pdgr", "import drseg_kernels"),
    ("drseg_core.nn.pdgr", "def f():\n    import drseg_kernels"),
    ("drseg_core.models.clip", "import open_clip"),
    ("drseg_core.models.clip", "from timm.models import create_model"),
    ("drseg_core.models.clip", "class A:\n    import torchvision.transforms"),
    ("drseg_core.models.clip", "try:\n    import triton\nexcept ImportError:\n    pass"),
    ("drseg_core.models.clip", "from drseg_core.data import folder"),
    ("drseg_core.data.images", "from PIL import Image"),
    ("drseg_core.cli.train", "import jsonargparse"),
    ("drseg_core.models.clip", "from drseg_core.ops import _cases"),
    ("drseg_core.models.clip", "from drseg_core.testing import numerics"),
    ("drseg_core.data.loader", "from drseg_core.models.drseg import DRSeg"),
    ("drseg_core.models.clip", "from drseg_core.checkpoints import run"),
    ("drseg_core.checkpoints.run", "from drseg_core.training.loop import train"),
    ("drseg_core.training.loop", "from drseg_core.evaluation.metrics import ConfusionMatrix"),
    ("drseg_core.evaluation.evaluate", "import drseg_core.training.loop"),
    ("drseg_core.scenes.predict", "from drseg_core.evaluation.metrics import ConfusionMatrix"),
    ("drseg_core.scenes.predict", "from drseg_core.training import loop"),
    ("drseg_core.config.schema", "from drseg_core.nn.pdgr import PDGR"),
    ("drseg_core.errors", "from drseg_core.files import atomic_path"),
    ("drseg_core.training.loop", "from drseg_core.cli.main import main"),
    ("drseg_core.studies.speed", "from bench.run import gate"),
    ("drseg_core.testing.numerics", "import tests.ops.oracle"),
    ("drseg_core.testing.numerics", "from drseg_core.ops import _dispatch"),
    ("drseg_core.testing.numerics", "from drseg_core.studies import pdgr_speed"),
    ("drseg_core.nn.pdgr", "from drseg_core.testing import numerics"),
    ("drseg_core.training.loop", "from drseg_core.testing import numerics"),
    ("drseg_core.ops._dispatch", "from drseg_core.ops.knn_graph import registration"),
    ("drseg_core.ops.knn_graph.api", "from drseg_core.ops.edge_weight import reference"),
    ("drseg_core.ops.knn_graph.api", "from drseg_core.ops import graph_propagate"),
    ("drseg_core.ops.knn_graph.reference", "from drseg_core.ops._checks import check_tensor"),
    ("drseg_core.ops.knn_graph.registration", "from drseg_core.ops.knn_graph.api import knn_graph"),
    ("drseg_core.ops._triton", "import drseg_kernels.knn_graph"),
    ("drseg_core.ops.knn_graph.registration", "def f():\n    import drseg_kernels.knn_graph"),
    ("drseg_core.ops.graph_layer.reference", "from drseg_core.ops.graph_propagate import registration"),
    ("drseg_core.ops.graph", "from drseg_core.ops.csc import registration"),
    ("drseg_core.ops.between", "from drseg_core.ops.knn_graph import registration"),
    ("drseg_core.nn.pdgr", "from drseg_core.ops._dispatch import resolve"),
    ("drseg_core.ops.knn_graph.api", "def f():\n    import drseg_kernels.knn_graph"),
    ("drseg_core.ops.knn_graph.api", "import importlib\nimportlib.import_module('triton')"),
    ("drseg_kernels.knn_graph", "from drseg_core.testing import numerics"),
    ("drseg_kernels.knn_graph", "import numpy"),
    ("bench.compare", "from tests.ops import oracle"),
    ("drseg_kernels.knn_graph", "from bench import gate"),
]
ALLOWED = [
    ("drseg_core", "from drseg_core.errors import ConfigError"),
    (
        "drseg_core",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from drseg_core import nn",
    ),
    ("drseg_core.cli.main", "from drseg_core import __version__"),
    ("drseg_core.nn.pdgr", "from drseg_core.ops import knn_graph, padding_mask"),
    ("drseg_core.nn.pdgr", "from drseg_core.ops.knn_graph.api import padding_mask"),
    ("drseg_core.models.clip", "def f():\n    import open_clip"),
    ("drseg_core.models.clip", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import open_clip"),
    ("drseg_core.scenes.predict", "from drseg_core.evaluation.inference import Predictor"),
    ("drseg_core.ops.knn_graph.api", "from drseg_core.ops.knn_graph import registration"),
    ("drseg_core.ops._triton", "def f():\n    from drseg_kernels import knn_graph"),
    ("drseg_core.ops.knn_graph.api", "from drseg_core.ops.prepare_prior.api import prepare_prior"),
    ("drseg_core.ops.graph_layer.reference", "from drseg_core.ops.graph_propagate import reference"),
    ("drseg_core.ops.graph", "from drseg_core.ops.graph_propagate.api import graph_propagate"),
    ("drseg_kernels.knn_graph", "import torch\nimport triton.language as tl\nfrom drseg_kernels import _blocks"),
    ("drseg_core.testing.numerics", "from drseg_core.ops._cases import CASES"),
    ("drseg_core.testing.numerics", "from drseg_core.ops.knn_graph.cases import make_inputs"),
    ("drseg_core.studies.pdgr_speed", "from drseg_core.testing import numerics"),
    ("bench.run", "from drseg_core.testing import numerics"),
    ("bench.run", "from bench import jobs"),
    ("tests.bench.test_gate", "from bench import run"),
]


@pytest.mark.parametrize("module,source", FAULTS)
def test_planted_imports_are_refused(module, source):
    assert any(problem(module, found) for found in imports(source, module))


@pytest.mark.parametrize("module,source", ALLOWED)
def test_good_imports_are_not(module, source):
    assert imports(source, module) and not any(problem(module, found) for found in imports(source, module))


def test_native_sources_include_the_stable_interface_only():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert files
    # the last is the C interface below the others
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            included = re.match(r'\s*#\s*include\s*([<"])([^>"]+)', line)
            if not included:
                continue
            bracket, name = included.groups()
            if name == "emulator.h":
                # in its place for tests
                continue
            if bracket == '"':
                assert (ROOT / "csrc" / name).is_file(), f"{path.name}: {name}"
            elif "/" in name:
                assert name.startswith(stable), f"{path.name}: {name}"
            else:
                assert not name.startswith(("Python", "pybind")), f"{path.name}: {name}"
