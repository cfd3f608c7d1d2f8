# SPDX-License-Identifier: Apache-2.0
"""``--gpu`` lets the tests marked ``gpu`` run, and moves the kernels' contracts from the interpreter to the device;
``--cpuinfo FILE`` gives the processor another name."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from drseg_core.checkpoints import versions
from drseg_core.processor import prepare

# before torch is loaded: beside other processes threads that spin make tests many times as long
prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests that need a CUDA device, and the kernels on it")
    parser.addoption("--cpuinfo", type=Path, metavar="FILE", help="what is read in place of /proc/cpuinfo")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """``logged()``: messages of this package. Those of others, such as asyncio of earlier tests, come at any time."""
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("drseg_core")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test draws the same numbers in every run, also without a seed: which tests a worker had before differs."""
    import numpy as np
    import torch

    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """The folders of a module's fixture go with it: those of a whole run would fill a disk."""
    if fixturedef.scope != "module" or "tmp_path_factory" not in fixturedef.argnames:
        return (yield)
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    before, made = set(base.iterdir()), []
    # registered before the fixture's own, it runs after that
    fixturedef.addfinalizer(lambda: [shutil.rmtree(path, ignore_errors=True) for path in made])
    try:
        return (yield)
    finally:
        made += set(base.iterdir()) - before


def share_cores(workers: int) -> None:
    """Let each of several workers of pytest-xdist compute on its part of the cores."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def first_backward() -> None:
    """Let autograd begin: once AOTInductor has compiled a program it would have threads, and no child could use it."""
    import torch

    torch.zeros(1, requires_grad=True).sum().backward()


def same_cases() -> None:
    """Let Hypothesis draw the same cases in every run.

    Some of its numbers are constants out of the modules that are loaded, which files that a worker had before decide.
    """
    providers = sys.modules.get("hypothesis.internal.conjecture.providers")
    if hasattr(providers, "_get_local_constants") and not os.environ.get("DRSEG_DEEP"):
        none = providers.Constants()
        providers._get_local_constants = lambda: none


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile`` the tests of a file stay with one worker, as its fixtures do; a kernel's contract, which
    has a process of its own, is a file by itself. Files come in the order of the collection: contracts first."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "::test_contract[contract_" in nodeid else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return LoadFiles(config, log)


def pytest_configure(config: pytest.Config) -> None:
    # what a shell starts in the background, or with nohup, ignores them, and so would every process that a test stops
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    if hasattr(config, "workerinput"):
        share_cores(config.workerinput["workercount"])
    if config.getoption("--cpuinfo"):
        versions.CPUINFO = config.getoption("--cpuinfo")
    if not config.getoption("--gpu"):
        return
    # what cuBLAS needs to be deterministic, read when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError(f"--gpu: no CUDA device; expected one, got torch {torch.__version__} without")


# files that take a minute and more: one that began last would keep one of two workers waiting
LONG = tuple(
    f"tests/{name}.py::"
    for name in "cli/test_study nn/test_export training/test_resume ops/test_knn_graph cli/test_many scenes/test_many "
    "models/test_overfit cli/test_whole_table".split()
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    same_cases()
    first_backward()
    # in any order of the rest: what takes longest begins first
    items.sort(key=lambda item: ("::test_contract[contract_" not in item.nodeid, not item.nodeid.startswith(LONG)))
    if config.getoption("--gpu"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; runs with --gpu")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """On a lent device a run may be stopped before its end, so pytest-xdist's workers say at once what failed. After an
    illegal access every later call of a process fails: a new worker takes over."""
    report = yield
    if report.failed and item.config.getoption("--gpu") and "PYTEST_XDIST_WORKER" in os.environ:
        print(f"FAILED {item.nodeid}\n{report.longreprtext}\n", file=sys.__stderr__, flush=True)
        text = "" if call.excinfo is None else str(call.excinfo.value)
        if "CUDA error" in text or "Triton Error [CUDA]" in text:
            os._exit(1)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With ``--durations`` also the files of tests that take longest, of which single tests do not tell."""
    if not config.getoption("durations"):
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("slowest files of tests")
    for file, taken in seconds.most_common(40):
        terminalreporter.write_line(f"{taken:7.1f} s {file}")
    terminalreporter.write_line(f"{sum(seconds.values()):7.1f} s in all")
