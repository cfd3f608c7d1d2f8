# SPDX-License-Identifier: Apache-2.0
"""The properties of the ops on their Triton kernels; ``test_interpreter.py`` runs it, and ``--gpu`` on a device."""

from __future__ import annotations

import pytest
import test_properties
import torch
from edges import INTERPRETED, on_device
from test_properties import *  # noqa: F403
from test_selection_properties import *  # noqa: F403

from drseg_core import ops

# the first asks for float64, which the kernels leave to other backends; the other is given below
for _name in ("test_gradients_are_slopes", "backend"):
    del globals()[_name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", test_properties.OPS)
    metafunc.parametrize("backend", ["triton"])


@pytest.fixture(scope="module", autouse=True)
def on_kernels(request):
    if not INTERPRETED and not request.config.getoption("--gpu"):
        pytest.fail("set TRITON_INTERPRET=1, or pass --gpu")
    with pytest.MonkeyPatch.context() as patch, ops.use_backend("triton"):
        patch.setattr(test_properties, "DTYPES", (torch.float32,))
        for name in ("knn_graph", "prepare_prior", "csc", *test_properties.OPS):
            patch.setattr(ops, name, on_device(getattr(ops, name)))
        yield
