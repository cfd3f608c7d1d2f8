# SPDX-License-Identifier: Apache-2.0
"""The kernels' contracts: on a CUDA device with ``--gpu``, without it under Triton's interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# the contract of an op lies with the op's own tests
sys.path[:0] = [str(HERE), str(ROOT / "tests" / "ops"), str(ROOT / "tests" / "emulator")]
from interpreted import INTERPRETED, Interpreted  # noqa: E402 - beside this file

pytest.register_assert_rewrite("contract", "oracle", "edges", "test_csc", "test_knn_graph")


if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_memory
    import interpreter_speed

    interpreter_speed.patch()
    interpreter_memory.patch()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A contract class runs on the kernels, for each of its variants."""
    if metafunc.cls is None or not hasattr(metafunc.cls, "subject"):
        return
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [metafunc.cls.which])
    if "variant" in metafunc.fixturenames:
        alone = hasattr(metafunc.function, "with_one_variant") and not metafunc.config.getoption("--gpu")
        variants = metafunc.cls.subject.variants[: 1 if alone else None]
        metafunc.parametrize("variant", variants, ids=["-".join(map(str, v.values())) or "plain" for v in variants])


def is_contract(item: pytest.Item) -> bool:
    """Whether the test waits for a contract that runs in a process of its own."""
    return item.path.name == "test_interpreter.py" and getattr(item, "originalname", "") == "test_contract"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The interpreter takes a tenth of a second per program, so of a contract's parameters it runs those combinations
    in which at most one differs from its first value; a device runs them all."""
    if config.getoption("--gpu"):
        return
    first: dict[str, dict[str, object]] = {}
    kept, dropped = [], []
    for item in items:
        # the hook sees the tests of every folder; the emulator of CUDA takes them all
        if not item.path.name.startswith("contract_") or item.path.name.startswith("contract_cuda"):
            kept.append(item)
            continue
        callspec = getattr(item, "callspec", None)
        given = dict(callspec.params) if callspec is not None else {}
        usual = first.setdefault(item.nodeid.split("[")[0], given)
        changed = sum(given[key] is not usual[key] and given[key] != usual[key] for key in given)
        (dropped if changed > 1 else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    # asked for at the end: they run beside all other tests; of several workers some run them, and begin with them
    items[:] = sorted(kept, key=is_contract, reverse=hasattr(config, "workerinput"))


def pytest_collection_finish(session: pytest.Session) -> None:
    chosen = [item.callspec.params["name"] for item in session.items if is_contract(item)]  # type: ignore[attr-defined]
    if chosen and not session.config.option.collectonly:
        # of several workers each has all tests, and runs some
        session.config.stash[INTERPRETED] = Interpreted([] if hasattr(session.config, "workerinput") else chosen)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if INTERPRETED in session.config.stash:
        session.config.stash[INTERPRETED].stop()
