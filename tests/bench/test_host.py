# SPDX-License-Identifier: Apache-2.0
"""Launches and host time without a card: what is counted, and that nothing was added to a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import host
from tests.emulator import emulated

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    environment = {
        **os.environ,
        "DRSEG_NATIVE": "0",
        emulated.VARIABLE: str(emulated.library()),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [sys.executable, "-W", "ignore", "-m", "bench", "host", "--child", "--repeats", "3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_operators_that_compute_are_counted_and_views_are_not():
    x = torch.randn(2, 3, 4)
    assert host.launches(lambda: x.transpose(1, 2).flatten().view(-1)) == {"copy_": 1}
    assert host.launches(lambda: torch.nn.functional.linear(x, x[0]).relu_()) == {"mm": 1, "clamp_min_": 1}
    assert host.launches(lambda: (x.mT[:, 1:].unsqueeze(0), torch.empty(3))) == {}


def test_launches_of_a_forward_and_of_a_step(found):
    """No more than now; fewer is welcome, and then the numbers here go down."""
    forward, step = (found[name]["launches"] for name in ("forward", "step"))
    assert forward["_linear_map_kernel_product"] == MAPS and step["_linear_map_kernel_product"] == MAPS + MAPS_BACK
    assert forward["_knn_graph_fwd_kernel_rounded"] == 1 and forward["_graph_layer_fwd_kernel"] == 2
    # without a gradient nothing goes against the edges
    assert not any("csc" in name for name in forward)
    assert step["_csc_kernel_place"] == 1 and step["_graph_layer_bwd_kernel_edges"] == 2
    # scores are products in float64 on a CPU: two copies of the rows, and one of the result
    own = 3
    assert forward["copy_"] == step["copy_"] == own
    assert sum(forward.values()) - own <= FORWARD and sum(step.values()) - own <= STEP
    assert all(one["us"] > 0 for one in found.values())


def test_launches_by_cuda_kernels(found):
    """One more than Triton's in a forward, LayerNorm's, and nine in a step, whose kernels do less in one."""
    forward, step = (found[f"{name}, CUDA C++"]["launches"] for name in ("forward", "step"))
    own = 3
    assert forward["CUDA C++"] == 5 and sum(forward.values()) - own <= FORWARD + 1
    assert step["CUDA C++"] == 15 and sum(step.values()) - own <= STEP + 9
    assert not any("graph_layer_fwd" in name or "edge_weight" in name for name in step)


def test_in_half_precision_weights_alone_are_cast(found):
    """Three weights forward and their gradients back; neither the prior nor the features, whatever reads them.

    Layers go by a dense matrix, in one launch more, with LayerNorm in two; none of them lists columns. Four copies are
    the CPU's: scores as above, and it multiplies other layouts of bfloat16.
    """
    own = 4
    # one or two less where the processor has no instructions for bfloat16
    assert found["forward, bfloat16"]["launches"]["copy_"] in (own + 2, own + 3)
    assert found["step, bfloat16"]["launches"]["copy_"] in (own + 5, own + 6 + 1)
    forward, step = (found[f"{name}, bfloat16"]["launches"] for name in ("forward", "step"))
    assert sum(forward.values()) <= FORWARD - MAPS + 3 + DENSE + own
    assert sum(step.values()) <= STEP - MAPS - MAPS_BACK + 6 + DENSE + own + 1
    assert forward["_graph_layer_dense_kernel_product"] == step["_graph_layer_dense_kernel_product"] == 2
    assert not any("csc" in name for name in forward)


# Of a linear map in float32 two launches, one more than of the library's. Three maps forward, five gradients. At usual
# sizes each of three gradients to weights has one more, which adds its pieces.
MAPS, MAPS_BACK = 3, 5
DENSE = 3
FORWARD, STEP = 10 + MAPS, 26 + MAPS + MAPS_BACK
