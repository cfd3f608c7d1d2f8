# SPDX-License-Identifier: Apache-2.0
"""Every promise has a test, every mark of a test names a promise, and docs/promises.md says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from promises import PAGE, Test, page, problems, promises, python_files, runs  # noqa: E402 - beside this file

Test.__test__ = False  # type: ignore[attr-defined]
CONTENT = {"promise": [{"id": "C1", "area": "Results", "says": "Right."}]}
CONTRACT = """
import pytest

class Contract:
    @pytest.mark.promise("C1")
    def test_right(self, call): ...

    @pytest.mark.promise("C1")
    def test_fast(self, call): ...
"""
SUBCLASS = """
from contract import Contract as _Base

class TestKernels(_Base):
    def test_fast(self, call): ...
"""


@pytest.fixture(scope="module")
def found() -> list[tuple[str, Test]]:
    return runs(python_files())


def test_every_promise_has_a_test_and_every_mark_a_promise(found):
    assert len(found) > 1500
    assert problems(promises(), found) == []


def test_the_page_is_made_of_them(found):
    expected = page(promises(), found)
    assert PAGE.read_text(encoding="utf-8") == expected, "run python tests/repo/promises.py"


def test_contracts_run_on_every_backend(found):
    """What the op's contract promises is found where Triton and CUDA inherit it."""
    files = {file for file, test in found if (test.file, test.name) == ("ops/contract.py", "test_gradcheck")}
    assert "ops/test_edge_weight.py" in files
    files = {file for file, test in found if (test.file, test.name) == ("ops/contract.py", "test_layouts")}
    # the kernels' own takes its place there
    assert files and not any("kernels/" in file for file in files)
    files = {file for file, test in found if test.name == "test_integer_lattice_is_exact"}
    assert {"ops/test_knn_graph.py", "kernels/contract_knn_graph.py"} <= files
    files = {file for file, test in found if test.name == "test_reference_gives_the_same_for_any_block"}
    assert "ops/test_knn_graph.py" in files and "kernels/contract_knn_graph.py" not in files


def test_a_class_that_inherits_holds_and_one_that_replaces_does_not():
    found = runs({"ops/contract.py": CONTRACT, "kernels/contract_x.py": SUBCLASS})
    assert [(file, test.name, test.promises) for file, test in found] == [
        ("kernels/contract_x.py", "test_fast", ()),
        ("kernels/contract_x.py", "test_right", ("C1",)),
    ]
    assert problems(CONTENT, found) == []
    assert "* On: Triton (interpreter)\n* `tests/ops/contract.py`: right\n" in page(CONTENT, found)
    # nothing runs a contract that nobody inherits
    assert problems(CONTENT, runs({"ops/contract.py": CONTRACT})) == ["C1 has no test"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def test_a(): ...", ["C1 has no test"]),
        (
            "import pytest\n@pytest.mark.gpu\n@pytest.mark.promise('C1')\ndef test_a(): ...",
            ["C1 has no test at every commit, and its not_held does not say so"],
        ),
        (
            "import pytest\n@pytest.mark.promise('C1', 'C2')\ndef test_a(): ...",
            ["tests/a/test_a.py::test_a holds C2, which nothing promises"],
        ),
        ("import pytest\npytestmark = [pytest.mark.slow, pytest.mark.promise('C1')]\ndef test_a(): ...", []),
        ("import pytest\n@pytest.mark.promise('C1')\nclass TestA:\n    def test_a(self): ...", []),
    ],
)
def test_what_is_missing_is_said(source, said):
    assert problems(CONTENT, runs({"a/test_a.py": source})) == said


def test_a_number_is_given_once():
    twice = {"promise": CONTENT["promise"] * 2}
    held = runs({"test_a.py": "import pytest\n@pytest.mark.promise('C1')\ndef test_a(): ..."})
    assert problems(twice, held) == ["C1 is promised twice"]
