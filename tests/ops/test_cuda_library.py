# SPDX-License-Identifier: Apache-2.0
"""The library of CUDA kernels is found, and says on what it runs. What they compute is in ``tests/kernels``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drseg_core import ops
from drseg_core.errors import BackendUnavailableError
from drseg_core.ops import _cuda


@pytest.fixture
def another_library(monkeypatch):
    def use(path) -> None:
        monkeypatch.setenv("DRSEG_NATIVE_CUDA_LIBRARY", str(path))
        monkeypatch.delenv("DRSEG_NATIVE", raising=False)
        _cuda._load.cache_clear()

    yield use
    monkeypatch.undo()
    _cuda._load.cache_clear()


BUILT = ("80+", "90a", "120a")


@pytest.mark.parametrize(
    "capability,built_for,runs",
    [
        ((8, 0), BUILT, True),
        ((8, 9), BUILT, True),
        ((9, 0), BUILT, True),
        ((10, 0), BUILT, True),
        ((12, 1), BUILT, True),
        ((7, 5), BUILT, False),
        # an `a` is for that device alone, and plain code for its major version
        ((12, 1), ("80", "120a"), False),
        ((12, 0), ("80", "120a"), True),
        ((8, 6), ("80",), True),
        ((8, 0), ("86",), False),
        ((9, 0), ("80",), False),
        ((9, 0), (), False),
    ],
)
def test_where_a_build_runs(capability, built_for, runs):
    assert _cuda.runs_on(capability, built_for) is runs


@pytest.mark.parametrize(
    "own,driver,reason",
    [
        (13000, 13020, None),
        # a newer minor version of the same major one runs too
        (13020, 13000, None),
        (12080, 13000, None),
        (13000, 12090, "the native CUDA library was built with CUDA 13; the driver is for CUDA 12"),
        (13000, 0, "the native CUDA library was built with CUDA 13; the driver is for CUDA 0"),
        # emulated
        (0, 0, None),
    ],
)
def test_a_driver_of_an_older_cuda_is_left_to_others(own, driver, reason):
    assert _cuda.too_old(own, driver) == reason


def test_the_driver_is_asked_for_where_there_is_a_device(monkeypatch):
    monkeypatch.setattr(_cuda, "_load", lambda: (None, ("80+",)))
    monkeypatch.setattr(_cuda, "LIBRARY", SimpleNamespace(lacks=lambda *symbols: None))
    monkeypatch.setattr(_cuda.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda.torch.cuda, "get_device_capability", lambda: (9, 0))
    for versions, reason in (((13000, 12090), "the driver is for CUDA 12"), ((13000, 13000), None)):
        monkeypatch.setattr(_cuda, "_versions", lambda versions=versions: versions)
        found = _cuda.why_not("cuda", "select")
        assert found is None if reason is None else found.endswith(reason)


def test_a_missing_library_is_said_by_name_alone(another_library, tmp_path, recwarn):
    another_library(tmp_path / "absent" / "libdrseg_native_cuda.so")
    reason = "native CUDA library not built: libdrseg_native_cuda.so is not in absent/"
    assert _cuda.why_not("cuda") == reason
    with pytest.raises(BackendUnavailableError, match=f"backend cuda cannot run on cpu: {reason}; expected one of"):
        ops.knn_graph(torch.ones(1, 4, 2), (2, 2), 2, backend="cuda")
    assert ops.knn_graph(torch.ones(1, 4, 2), (2, 2), 2).shape == (1, 4, 2)
    rows = [row for row in ops.backend_report() if row["op"] == "knn_graph" and row["backend"] == "cuda"]
    assert rows[0]["reason"] == reason and rows[0]["place"] is None
    # files that other tests left open are collected at any time
    assert not [said for said in recwarn if said.category is not ResourceWarning]


def test_another_library_in_its_place(another_library, tmp_path):
    path = tmp_path / "libdrseg_native_cuda.so"
    path.write_bytes(b"not a library")
    another_library(path)
    assert _cuda.why_not("cuda").startswith("native CUDA library does not load: ")
    another_library(Path(torch.__file__).parent / "lib" / "libc10.so")
    assert "drseg_native_cuda_built_for" in _cuda.why_not("cuda")


def test_left_out_by_choice(another_library, tmp_path, monkeypatch):
    another_library(tmp_path)
    monkeypatch.setenv("DRSEG_NATIVE", "0")
    assert _cuda.why_not("cuda") == "native CUDA library left out by DRSEG_NATIVE=0"
