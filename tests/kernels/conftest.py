# SPDX-License-Identifier: Apache-2.0
"""The kernels' contracts: on a CUDA device with ``--gpu``, without it under Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# the contract of an op lies with the op's own tests
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]
pytest.register_assert_rewrite("contract", "oracle", "edges", "test_knn_graph")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A contract class runs on the kernels, for each of its variants."""
    if metafunc.cls is None or not hasattr(metafunc.cls, "subject"):
        return
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["triton"])
    if "variant" in metafunc.fixturenames:
        variants = metafunc.cls.subject.variants
        metafunc.parametrize("variant", variants, ids=["-".join(map(str, v.values())) or "plain" for v in variants])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The interpreter takes a tenth of a second per program, so of a contract's parameters it runs those combinations
    in which at most one differs from its first value; a device runs them all."""
    if config.getoption("--gpu"):
        return
    first: dict[str, dict[str, object]] = {}
    kept, dropped = [], []
    for item in items:
        # the hook sees the tests of every folder
        if not item.path.name.startswith("contract_"):
            kept.append(item)
            continue
        callspec = getattr(item, "callspec", None)
        given = dict(callspec.params) if callspec is not None else {}
        usual = first.setdefault(item.nodeid.split("[")[0], given)
        changed = sum(given[key] is not usual[key] and given[key] != usual[key] for key in given)
        (dropped if changed > 1 else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
