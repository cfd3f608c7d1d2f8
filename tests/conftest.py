# SPDX-License-Identifier: Apache-2.0
"""``--gpu`` lets the tests marked ``gpu`` run, and moves the kernels' contracts from the interpreter to the device."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests that need a CUDA device, and the kernels on it")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--gpu"):
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError(f"--gpu: no CUDA device; expected one, got torch {torch.__version__} without")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; runs with --gpu")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, object, object]:
    """An illegal access ends all later CUDA calls of its process; of pytest-xdist's workers a new one takes over."""
    report = yield
    fatal = call.excinfo is not None and "CUDA error" in str(call.excinfo.value)
    if fatal and "PYTEST_XDIST_WORKER" in os.environ:
        print(f"{item.nodeid}: {report.longreprtext}", file=sys.__stderr__, flush=True)  # type: ignore[attr-defined]
        os._exit(1)
    return report
