# SPDX-License-Identifier: Apache-2.0
"""What plants small changes changes code alone, and each change by itself."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "mutants"))
import generate  # noqa: E402 - of the folder mutants
import run as planting  # noqa: E402 - of the same

PYTHON = '''"""Words with 1 + 2."""


@decorated(3 > 2)
def ä(a: int | None, b=4):
    # not 5 < 6
    check(a)
    if a is not None and not (a) <= b:
        raise ValueError("7 + 8")
    return -a // b
'''
CPP = """#include <a>  // 1 + 2
/* 3 < 4 */
template <typename T, int N = 5>
const char* f(T a) { return a + 6 << N ? "7 == 8" : g<9>(a1 && b2); }
"""


def changed(text: str, changes) -> list[str]:
    """The line that differs, of each change."""
    found = []
    for begin, end, new in changes:
        after = text[:begin] + new + text[end:]
        found += [line.strip() for line in after.splitlines() if line not in text.splitlines()]
    return found


def test_python():
    found = changed(PYTHON, generate.of_python(PYTHON))
    assert all(ast.parse(PYTHON[:begin] + new + PYTHON[end:]) for begin, end, new in generate.of_python(PYTHON))
    assert Counter(found) == Counter(
        [
            "def ä(a: int | None, b=5):",
            "pass",  # the call
            "if a is None and not (a) <= b:",
            "if a is not None or not (a) <= b:",
            "if a is not None and (a) <= b:",
            "if a is not None and not (a) < b:",
            "pass",  # the error
            "return a // b",
            "return -a * b",
        ]
    )


def test_cpp():
    found = changed(CPP, generate.of_cpp(CPP))
    assert found == [
        'const char* f(T a) { return a - 6 << N ? "7 == 8" : g<9>(a1 && b2); }',
        'const char* f(T a) { return a + 7 << N ? "7 == 8" : g<9>(a1 && b2); }',
        'const char* f(T a) { return a + 6 >> N ? "7 == 8" : g<9>(a1 && b2); }',
        'const char* f(T a) { return a + 6 << N ? "7 == 8" : g<10>(a1 && b2); }',
        'const char* f(T a) { return a + 6 << N ? "7 == 8" : g<9>(a1 || b2); }',
    ]


def test_lines_that_stand_there_once():
    text = "a\nb\nc\na\nb\nd\n"
    begin = text.rindex("b")
    first, last = generate.once(text, begin, begin + 1)
    assert text[first:last] == "a\nb\nd" or text.count(text[first:last]) == 1


def test_what_passes_its_own_tests_meets_all_of_its_part():
    mutant = planting.Mutant("what", "drseg_core/config/load.py", "a", "b", ("tests/config/test_load.py",), every=False)
    wider = generate.in_all_tests(mutant)
    assert wider is not None and {*mutant.tests, "tests/config/test_ranges.py"} <= set(wider.tests)
    assert generate.in_all_tests(wider) is None
    kernel = planting.Mutant("what", "kernels/drseg_kernels/csc.py", "a", "b", ("tests/kernels/contract_csc.py",))
    assert generate.in_all_tests(kernel) is None


def test_a_sample():
    some = generate.generated(140, 1)
    assert some == generate.generated(140, 1) != generate.generated(140, 2)
    assert [said for said in map(planting.problem, some) if said is not None] == []
    assert all(mutant.tests and not mutant.every for mutant in some)
    # every file has its part, C++ and Triton kernels too
    of_file = Counter(mutant.file for mutant in some)
    assert max(of_file.values()) <= 3 and {file.split("/")[0] for file in of_file} == {"csrc", "drseg_core", "kernels"}
