# SPDX-License-Identifier: Apache-2.0
"""What the repository says about itself is true, and its sources keep the rules that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import drseg_core

ROOT = Path(__file__).parents[2]
SOURCES = {".py", ".cpp", ".h", ".cu"}
TEXTS = SOURCES | {".md", ".toml", ".yaml", ".yml", ".txt", ".cff", ".in", ""}
LARGEST = 40_000
# nobody edits it: a line for each test
GENERATED = "docs/promises.md"


def _listed() -> list[Path]:
    """Files that git tracks or would; all of them outside of git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
        names = [name for name in names if not re.search(r"(^|/)(\.\w|build/|__pycache__|[^/]*\.egg-info)", name)]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


FILES = _listed()
TREE = ROOT / "docs" / "architecture.md"


def python(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders:
            yield path, ast.parse(path.read_text(encoding="utf-8"))


# the tree of docs/architecture.md


def tree_block(text: str) -> str | None:
    blocks = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return next((block for block in blocks if "drseg_core/" in block), None)


def _names(words: str) -> list[str]:
    """Words of a description that are paths."""
    words = re.sub(r"[(),;]|:(?=\s|$)", " ", words)
    found = [word.rstrip(".") for word in words.split()]
    shape = re.compile(r"[\w.*<>-][\w./*<>-]*(/|\.(py|cpp|h|cu|md|toml|yaml|txt|cff|png|json|jsonl))")
    return [word for word in found if shape.fullmatch(word)]


def tree_paths(block: str) -> list[tuple[str, list[str]]]:
    """Each path that a tree names, with the folders it may be meant to lie in.

    The first word of a line is an entry and lies in the last entry above it that is indented less.
    """
    found: list[tuple[str, list[str]]] = []
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        drawn = re.sub(r"[│├└─|`]", " ", line).rstrip()
        if not drawn:
            continue
        indent = len(drawn) - len(drawn.lstrip())
        entry, *rest = drawn.split(maxsplit=1)
        above = [(depth, path) for depth, path in above if depth < indent]
        parent = above[-1][1] if above else ""
        entry = entry.rstrip(":")
        found.append((entry, [parent]))
        folder = parent + entry if entry.endswith("/") else parent
        if entry.endswith("/"):
            above.append((indent, parent + entry))
        found.extend((name, [folder, parent, ""]) for name in _names(" ".join(rest)))
    return found


def missing_paths(block: str) -> list[str]:
    missing = []
    for name, folders in tree_paths(block):
        pattern = re.sub(r"<[^>]+>", "*", name).rstrip("/")
        places = [match for folder in folders for match in (ROOT / folder).glob(pattern)]
        if not any(place.is_dir() or not name.endswith("/") for place in places):
            missing.append(name)
    return missing


def test_the_tree_names_paths_that_exist():
    block = tree_block(TREE.read_text(encoding="utf-8"))
    assert block is not None
    assert len(tree_paths(block)) > 10
    assert missing_paths(block) == []


def test_every_folder_of_the_package_is_in_the_tree():
    block = tree_block(TREE.read_text(encoding="utf-8"))
    assert block is not None
    named = {name for name, _ in tree_paths(block)}
    assert {f"{path.parent.name}/" for path in (ROOT / "drseg_core").glob("*/__init__.py")} <= named


def test_a_path_that_is_gone_is_noticed():
    block = "setup.py  Makefile\ndrseg_core/   the package\n  ops/  _checks.py, knn_graph/ and <op>/api.py\n  {}\n"
    assert missing_paths(block.format("nn/    pdgr.py: a block")) == []
    for wrong in ("nm/    a block", "nn/    pdgr.py ugly.py: a block", "├── ops/absent.py", "nn/   see absent/ there"):
        assert len(missing_paths(block.format(wrong))) == 1, wrong
    assert missing_paths("drseg_core/\n  README.md\n") == ["README.md"]


# files


def test_licence_line():
    sources = [path for path in FILES if path.suffix in SOURCES]
    assert len(sources) > 60
    heads = {path: path.read_text(encoding="utf-8").splitlines()[:2] for path in sources}
    bare = [
        path for path, head in heads.items() if not any("SPDX-License-Identifier: Apache-2.0" in line for line in head)
    ]
    assert [str(path.relative_to(ROOT)) for path in bare] == []


def test_no_file_is_two_files():
    assert len(FILES) > 60
    texts = [path for path in FILES if path.suffix in TEXTS]
    assert [str(path.relative_to(ROOT)) for path in texts if path.stat().st_size > LARGEST] in ([], [GENERATED])


def test_no_path_of_a_developers_machine():
    # not in a longer path or an address; written in two pieces, or this file would find itself
    pattern = re.compile(r"(?<![\w.~/*$}-])/(?:" + "|".join(("work", "farm", "root", "home", "Users")) + ")/")
    assert pattern.search("see /" + "home/somebody/x") and not pattern.search("https://example.org/" + "home/x")
    found = []
    for path in FILES:
        if path.suffix in TEXTS:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if pattern.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_versions_agree():
    version = drseg_core.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d*)?", version)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'version = \{ attr = "drseg_core.__version__" \}', project) and 'dynamic = ["version"]' in project
    assert (
        re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1] == version
    )
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1] == version


# rules for sources

# what an autograd context may hold besides save_for_backward: plain options, never a tensor
CONTEXT = {"transpose", "backend", "norm", "eps", "apart", "activation", "undirected", "keep", "op"}


def asserts(tree: ast.AST) -> list[str]:
    return [f"line {node.lineno}: assert" for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def tensors_on_context(tree: ast.AST) -> list[str]:
    stores = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    found = [node for node in stores if isinstance(node.value, ast.Name) and node.value.id == "ctx"]
    found = [node for node in found if node.attr not in CONTEXT]
    named = [f"line {node.lineno}: ctx.{node.attr}" for node in found]
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr")
    return named + [
        f"line {call.lineno}: setattr" for call in calls if call.args and ast.unparse(call.args[0]) == "ctx"
    ]


def unsafe_loads(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {"pickle", "dill", "cloudpickle", "joblib"} & set(names):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load" and options.get("weights_only") != "True" or options.get("weights_only") == "False":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load") and "Safe" not in ast.unparse(
            node
        ):
            found.append(f"line {node.lineno}: {name}")
        if name.endswith("np.load") and options.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: {name} with pickle")
        if name in ("eval", "exec", "os.system"):
            found.append(f"line {node.lineno}: {name}")
    return found


def _check(rule: Callable[[ast.AST], list[str]], keep: Callable[[Path], bool] = lambda path: True) -> None:
    looked_at, found = 0, []
    for path, tree in python("drseg_core", "kernels"):
        if keep(path):
            looked_at += 1
            found += [f"{path.relative_to(ROOT)}: {line}" for line in rule(tree)]
    assert looked_at > 3 and found == []


@pytest.mark.promise("C44")
def test_no_assert_guards_what_a_user_passes():
    _check(asserts, lambda path: path.name in ("api.py", "_checks.py", "pdgr.py"))


@pytest.mark.promise("C15")
def test_autograd_contexts_hold_no_tensors():
    _check(tensors_on_context)


@pytest.mark.promise("C31")
def test_nothing_runs_code_from_a_file():
    _check(unsafe_loads)


@pytest.mark.promise("C31")
@pytest.mark.parametrize(
    "rule,source",
    [
        (asserts, "def f(x):\n    assert x.dim() == 3"),
        (tensors_on_context, "def f(ctx, x):\n    ctx.x = x"),
        (tensors_on_context, "def f(ctx, inputs):\n    x, ctx.norm, ctx.saved = inputs"),
        (tensors_on_context, "def f(ctx, x):\n    setattr(ctx, 'x', x)"),
        (unsafe_loads, "import torch\ntorch.load(path)"),
        (unsafe_loads, "import torch\ntorch.load(path, weights_only=False)"),
        (unsafe_loads, "import torch\ntorch.load(path, weights_only=safe)"),
        (unsafe_loads, "import yaml\nyaml.load(text)"),
        (unsafe_loads, "import yaml\nyaml.load(text, Loader=yaml.Loader)"),
        (unsafe_loads, "from pickle import loads"),
        (unsafe_loads, "import numpy as np\nnp.load(path, allow_pickle=True)"),
    ],
)
def test_planted_faults_are_found(rule, source):
    assert rule(ast.parse(source))


@pytest.mark.parametrize(
    "rule,source",
    [
        (tensors_on_context, "def f(ctx, inputs):\n    x, ctx.norm, ctx.eps = inputs\n    ctx.save_for_backward(x)"),
        (unsafe_loads, "import torch\ntorch.load(path, map_location='cpu', weights_only=True)"),
        (unsafe_loads, "import yaml\nyaml.safe_load(text)\nyaml.load(text, Loader=OurSafeLoader)"),
    ],
)
def test_good_code_is_not(rule, source):
    assert not rule(ast.parse(source))
