# SPDX-License-Identifier: Apache-2.0
"""What is promised, and which tests hold it: ``python tests/repo/promises.py`` writes ``docs/promises.md``.

The promises are in ``promises.toml``, the tests are those with ``@pytest.mark.promise("C28")``. Nothing is imported or
run: the tests are found in the syntax trees, those that a class inherits or a contract takes from another file too.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10 has pytest's
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "promises.md"

HEAD = """# What is promised, and which tests hold it

`python tests/repo/promises.py` makes this page, from `tests/repo/promises.toml` and from the marks at the tests
(`@pytest.mark.promise`). A test fails if a promise has no test, or a mark names no promise.

*On* names the implementations that a test runs on. *Interpreter* is Triton's, on a CPU. *Emulator* runs the CUDA
kernels on a CPU. With `pytest --gpu` both run on a GPU. If nothing else is said, a test runs at every commit
(`.ci/run`).
"""


@dataclass(frozen=True)
class Test:
    """A test as it stands in a file.

    Attributes:
        file: relative to ``tests``.
        name: of the function.
        promises: which it holds.
        marks: names of all its markers.
        arguments: what it asks for.
    """

    file: str
    name: str
    promises: tuple[str, ...]
    marks: frozenset[str]
    arguments: frozenset[str]


@dataclass
class _Class:
    bases: list[str]
    tests: dict[str, Test] = field(default_factory=dict)


@dataclass
class _File:
    tests: dict[str, Test] = field(default_factory=dict)
    classes: dict[str, _Class] = field(default_factory=dict)
    takes_all_of: list[str] = field(default_factory=list)
    leaves_out: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)


def _marks(decorators: list[ast.expr]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and texts of each ``pytest.mark.name(...)``."""
    for decorator in decorators:
        call = decorator if isinstance(decorator, ast.Call) else None
        name = ast.unparse(call.func if call else decorator)
        if name.startswith("pytest.mark."):
            texts = [node.value for node in (call.args if call else []) if isinstance(node, ast.Constant)]
            yield name.removeprefix("pytest.mark."), tuple(text for text in texts if isinstance(text, str))


def _read(file: str, text: str) -> _File:
    tree, found = ast.parse(text), _File()
    shared = [
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for mark in _marks(node.value.elts if isinstance(node.value, ast.List) else [node.value])
    ]

    def test(node: ast.FunctionDef, above: list[tuple[str, tuple[str, ...]]]) -> Test:
        marks = [*shared, *above, *_marks(node.decorator_list)]
        promises = dict.fromkeys(text for name, texts in marks if name == "promise" for text in texts)
        arguments = frozenset(argument.arg for argument in node.args.args)
        return Test(file, node.name, tuple(promises), frozenset(name for name, _ in marks), arguments)

    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.tests[node.name] = test(node, [])
        elif isinstance(node, ast.ClassDef):
            above = list(_marks(node.decorator_list))
            inside = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")]
            found.classes[node.name] = _Class(
                [ast.unparse(base) for base in node.bases], {part.name: test(part, above) for part in inside}
            )
        elif isinstance(node, ast.For) and isinstance(node.body[0], ast.Delete):
            texts = [part.value for part in ast.walk(node.iter) if isinstance(part, ast.Constant)]
            found.leaves_out.update(text for text in texts if isinstance(text, str))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*":
                    found.takes_all_of.append(f"{node.module}.py")
                elif alias.asname:
                    found.renamed[alias.asname] = alias.name
    return found


def runs(files: dict[str, str]) -> list[tuple[str, Test]]:
    """Every test that is run, with the file in which it is.

    Args:
        files: text of each Python file below ``tests``.
    """
    read = {file: _read(file, text) for file, text in files.items()}
    classes = {name: (file, found) for file, content in read.items() for name, found in content.classes.items()}
    by_name = {Path(file).name: content for file, content in read.items()}

    def inherited(file: str, name: str) -> dict[str, Test]:
        name = read[file].renamed.get(name, name)
        if name not in classes:
            return {}
        where, found = classes[name]
        tests: dict[str, Test] = dict(found.tests)
        for base in found.bases:
            for key, value in inherited(where, base).items():
                tests.setdefault(key, value)
        return tests

    result = []
    for file, content in read.items():
        if not Path(file).name.startswith(("test_", "contract_")):
            continue
        # what a contract takes from another file, and does not replace
        taken = {name: test for other in content.takes_all_of for name, test in by_name[other].tests.items()}
        taken = {name: test for name, test in taken.items() if name not in content.leaves_out}
        result += [(file, test) for test in {**taken, **content.tests}.values()]
        for name in content.classes:
            if name.startswith("Test"):
                result += [(file, test) for test in inherited(file, name).values()]
    return result


def _place(file: str, test: Test) -> str | None:
    """What the test runs on, where that is one of several."""
    if "gpu" in test.marks:
        return "a card"
    if Path(file).name.startswith("contract_cuda") or file.startswith("emulator/"):
        return "CUDA (emulator)"
    if Path(file).name.startswith("contract_"):
        return "Triton (interpreter)"
    return "reference, native" if test.arguments & {"backend", "call"} else None


def _often(test: Test) -> str:
    return "with a card" if "gpu" in test.marks else "in the deep run" if "deep" in test.marks else "at every commit"


def python_files() -> dict[str, str]:
    folder = ROOT / "tests"
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


def promises() -> dict[str, Any]:
    return tomllib.loads((HERE / "promises.toml").read_text(encoding="utf-8"))


def holders(found: list[tuple[str, Test]]) -> dict[str, list[tuple[str, Test]]]:
    """The tests of each promise that a mark names."""
    result = defaultdict(list)
    for file, test in found:
        for name in test.promises:
            result[name].append((file, test))
    return result


def problems(content: dict[str, Any], found: list[tuple[str, Test]]) -> list[str]:
    """Promises without a test, or with none at every commit and not a word of it; marks that name no promise."""
    names, held = [promise["id"] for promise in content["promise"]], holders(found)
    wrong = [f"{name} is promised twice" for name in sorted({name for name in names if names.count(name) > 1})]
    wrong += [f"{name} has no test" for name in names if not held[name]]
    for promise in content["promise"]:
        tests = [test for _, test in held[promise["id"]]]
        if tests and "at every commit" not in map(_often, tests) and not promise.get("not_held"):
            wrong.append(f"{promise['id']} has no test at every commit, and its not_held does not say so")
    for name in held.keys() - set(names):
        wrong += [f"tests/{test.file}::{test.name} holds {name}, which nothing promises" for _, test in held[name]]
    return wrong


def page(content: dict[str, Any], found: list[tuple[str, Test]]) -> str:
    held = holders(found)
    distinct = {(test.file, test.name) for name in held for _, test in held[name]}
    lines = [HEAD, f"{len(content['promise'])} promises, {len(distinct)} tests.", ""]
    for area in dict.fromkeys(promise["area"] for promise in content["promise"]):
        lines += [f"## {area}", ""]
        for promise in content["promise"]:
            if promise["area"] == area:
                lines += _section(promise, held[promise["id"]])
    if content.get("figure"):
        lines += ["## How far it goes", "", "| what | figure | command |", "|---|---|---|"]
        lines += [f"| {row['what']} | {row['figure']} | `{row['command']}` |" for row in content["figure"]]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _section(promise: dict[str, Any], held: list[tuple[str, Test]]) -> list[str]:
    lines = [f"**{promise['id']}.** {promise['says']}", ""]
    places = {part for file, test in held for part in (_place(file, test) or "").split(", ") if part}
    if places:
        lines.append(f"* On: {', '.join(sorted(places, key=_order))}")
    if promise.get("also"):
        lines.append(f"* Also: {promise['also']}")
    if promise.get("not_held"):
        lines.append(f"* Not held: {promise['not_held']}")
    tests: dict[str, dict[str, str]] = defaultdict(dict)
    for _, test in held:
        often = _often(test)
        tests[test.file][test.name] = "" if often == "at every commit" else f" ({often})"
    for file in sorted(tests):
        names = ", ".join(name.removeprefix("test_") + often for name, often in tests[file].items())
        lines.append(f"* `tests/{file}`: {names}")
    return [*lines, ""]


def _order(place: str) -> int:
    return ("reference", "native", "Triton (interpreter)", "CUDA (emulator)", "a card").index(place)


if __name__ == "__main__":
    content, found = promises(), runs(python_files())
    if wrong := problems(content, found):
        sys.exit("\n".join(wrong))
    PAGE.write_text(page(content, found), encoding="utf-8")
