# SPDX-License-Identifier: Apache-2.0
"""What ``__all__`` names has an example in its docstring, and every example is true.

The examples run in a folder that has what a reader has: data, a trained run, a scene, original archives.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drseg_core.testing import numerics

ROOT = Path(__file__).parents[2]


def public_modules() -> Iterator[ModuleType]:
    """Modules that say what is public; cases of ops are sizes to test and measure at."""
    for path in sorted((ROOT / "drseg_core").rglob("*.py")):
        if path.stem != "cases" and re.search(r"^__all__\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def public() -> dict[str, Any]:
    """Functions and classes by where they are defined."""
    named = [getattr(module, name) for module in public_modules() for name in module.__all__]
    named += vars(numerics).values()
    found = [value for value in named if inspect.isclass(value) or inspect.isroutine(value)]
    found = [value for value in found if value.__module__.startswith("drseg_core")]
    return {f"{value.__module__}.{value.__qualname__}": value for value in found}


PUBLIC = public()


def examples(name: str) -> doctest.DocTest:
    text = inspect.getdoc(PUBLIC[name]) or ""
    return doctest.DocTestParser().get_doctest(text, {}, name, inspect.getsourcefile(PUBLIC[name]), 0)


def test_the_public_names_were_found():
    parts = {name.split(".")[1] for name in PUBLIC}
    assert {"checkpoints", "config", "data", "errors", "evaluation", "models", "nn", "ops", "scenes"} <= parts
    assert "drseg_core.backends" in PUBLIC and "drseg_core.nn.pdgr.PDGR" in PUBLIC and len(PUBLIC) > 60


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_an_example(name):
    assert examples(name).examples, f"{name}: no example in its docstring; expected lines that begin with >>>"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_examples_are_true(here, name):
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(examples(name), out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("text", ["A thing.", ">>> 1 + 1\n3\n", ">>> int('a')\n0\n"])
def test_planted_faults_are_found(text):
    test = doctest.DocTestParser().get_doctest(text, {}, "planted", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(test, out=lambda line: None)
    assert not test.examples or runner.failures
