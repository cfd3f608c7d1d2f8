# SPDX-License-Identifier: Apache-2.0
"""Plant small changes that nobody chose, and list those that no test notices.

    python tests/mutants/generate.py --count 400            # a sample; what was run before is not run again
    python tests/mutants/generate.py --count 40 --only drseg_core/nn

One operator, comparison or number is another, or one statement is gone: in the modules, Triton kernels and C++ of all
files that have a named mutant. A change is killed where a test of its file fails: the files of tests that the named
mutants have, and the one that is named like it. What passes them is held against all tests of its part of the package.
Who survives is read by a person: a test is missing, or no test can tell (the result is the same, or a bound is only
looser).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import fcntl
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import run as planting  # noqa: E402 - beside this file

ROOT = planting.ROOT
_SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "/": "*",
    "//": "*", "%": "*", "and": "or", "or": "and", "&&": "||", "||": "&&",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
    "&": "|", "|": "&", "<<": ">>", ">>": "<<",
}  # fmt: skip
_CPP = re.compile(r"(?<= )(?:<=|>=|==|!=|&&|\|\||<<|>>|[<>+\-*/%&|])(?= )|(?<![\w.\"'])\d+(?![\w.'])")
_NO_CODE = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^#[^\n]*|template <[^;{]*?>(?=\n)', re.DOTALL | re.MULTILINE
)


def of_cpp(text: str) -> Iterator[tuple[int, int, str]]:
    """Begin, end and new text of each change of C++: its operators stand between spaces."""
    code = _NO_CODE.sub(lambda found: " " * len(found[0]), text)
    for found in _CPP.finditer(code):
        new = str(int(found[0]) + 1) if found[0].isdigit() else _SWAPS[found[0]]
        yield found.start(), found.end(), new


def of_python(text: str) -> Iterator[tuple[int, int, str]]:
    """Begin, end and new text of each change of Python; annotations, decorators and docstrings stay."""
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def place(line: int, column: int) -> int:
        begin = lines[line - 1]
        # columns of the syntax tree count bytes
        return begin + len(text[begin:].encode()[:column].decode())

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        return place(node.lineno, node.col_offset), place(node.end_lineno or 0, node.end_col_offset or 0)

    def between(left: ast.expr, right: ast.expr) -> Iterator[tuple[int, int, str]]:
        begin, end = span(left)[1], span(right)[0]
        found = re.search(r"not in|is not|[<>=!]=|//|\*\*|<<|>>|[-+*/%<>&|]|\w+", text[begin:end])
        if found and found[0] in _SWAPS:
            yield begin + found.start(), begin + found.end(), _SWAPS[found[0]]

    def walk(node: ast.AST) -> Iterator[tuple[int, int, str]]:
        if isinstance(node, ast.BinOp):
            yield from between(node.left, node.right)
        elif isinstance(node, ast.Compare):
            for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                yield from between(left, right)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(left, right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield span(node)[0], span(node.operand)[0], ""
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int):
            new = not node.value if isinstance(node.value, bool) else node.value + 1
            yield *span(node), str(new)
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield *span(node), "pass"
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child)

    yield from walk(ast.parse(text))


def once(text: str, begin: int, end: int) -> tuple[int, int]:
    """The lines around a place, as many as it takes to stand there once."""
    first, last = text.rfind("\n", 0, begin) + 1, text.find("\n", end)
    while text.count(text[first:last]) > 1:
        first = text.rfind("\n", 0, max(first - 1, 0)) + 1
        last = text.find("\n", last + 1)
    return first, last


def tests_of(file: str, named: list[planting.Mutant]) -> tuple[str, ...]:
    """Files of tests: those of its named mutants, and the one of its name."""
    found = [test.split("::")[0] for mutant in named if mutant.file == file for test in mutant.tests]
    found += [str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob(f"*/test_{Path(file).stem}.py")]
    # a contract runs in a process in which kernels are interpreted, which others are not for
    contracts = [name for name in found if "/contract_" in name]
    return tuple(sorted(set(contracts or found)))


def in_all_tests(mutant: planting.Mutant) -> planting.Mutant | None:
    """The same with every test of its part of the package; None where it has none of its own, or had them all."""
    parts = Path(mutant.file).parts
    found = sorted((ROOT / "tests" / parts[1]).glob("test_*.py")) if parts[0] == "drseg_core" else []
    tests = tuple(str(path.relative_to(ROOT)) for path in found)
    return dataclasses.replace(mutant, tests=tests) if set(tests) > set(mutant.tests) else None


def generated(count: int, seed: int, only: str = "") -> list[planting.Mutant]:
    """A sample of ``count`` changes, of every file about as many."""
    draw, named = random.Random(seed), planting.mutants()
    of_file = {}
    for file in sorted({mutant.file for mutant in named if only in mutant.file and "cuda" not in mutant.file}):
        text = (ROOT / file).read_text(encoding="utf-8")
        changes = list(of_python(text) if file.endswith(".py") else of_cpp(text))
        draw.shuffle(changes)
        of_file[file] = text, changes
    found: list[planting.Mutant] = []
    while len(found) < count and any(changes for _, changes in of_file.values()):
        for file, (text, changes) in of_file.items():
            if len(found) == count or not changes:
                continue
            begin, end, new = changes.pop()
            first, last = once(text, begin, end)
            before, after = text[first:last], text[first:begin] + new + text[end:last]
            line = text.count("\n", 0, begin) + 1
            what = f"line {line}: {text[begin:end].splitlines()[0]!r} is {new!r}"
            mutant = planting.Mutant(what, file, before, after, tests_of(file, named), every=False)
            if planting.problem(mutant) is None:
                found.append(mutant)
    return sorted(found, key=lambda mutant: mutant.file)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=400, help="so many changes")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--only", default="", help="in files in whose path this occurs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop then; what is left was not run")
    parser.add_argument("--jobs", type=int, default=2, help="so many at a time")
    args = parser.parse_args(words)
    chosen = generated(args.count, args.seed, args.only)
    planting.load()
    began, place = time.monotonic(), ROOT / "build" / "generated"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        said = planting.run(chosen, ROOT, place, args.jobs, False, args.seconds)
        passed = [mutant for mutant in chosen if said[f"{mutant.file}: {mutant.what}"] == "survived"]
        wider = list(filter(None, map(in_all_tests, passed)))
        # those of a part may take longer than those of a file
        planting.LONGEST *= 4
        again = planting.run(wider, ROOT, place, args.jobs, False, args.seconds - (time.monotonic() - began))
        said |= {what: state for what, state in again.items() if state != "not run"}
    for what, state in said.items():
        if state == "survived":
            print(f"survived: {what}")
    counts = ", ".join(f"{number} {state}" for state, number in Counter(said.values()).most_common())
    print(f"{len(said)} changes in {time.monotonic() - began:.0f} s: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
