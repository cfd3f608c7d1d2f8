# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of ``drseg_core.testing`` and of the cases run, and everything public has one."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

from drseg_core import testing

MODULES = ("drseg_core.ops._cases", *(f"drseg_core.testing{name}" for name in ("", ".cases", ".literal", ".memory")))


@pytest.mark.parametrize("name", [*MODULES, "drseg_core.testing.numerics"])
def test_examples_run(name: str):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_everything_public_has_an_example():
    given = [getattr(testing, name) for name in testing.__all__]
    given += [one for one in vars(testing.numerics).values() if inspect.isfunction(one)]
    ours = [one for one in given if getattr(one, "__module__", "").startswith("drseg_core.")]
    assert len(ours) > 15
    assert [one.__name__ for one in ours if ">>> " not in (one.__doc__ or "")] == []
