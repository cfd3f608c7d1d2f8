# SPDX-License-Identifier: Apache-2.0
"""Sizes of the fused ops on edges, and of the gradient to coefficients: what the rule gives on every device."""

from __future__ import annotations

import pytest
from drseg_kernels._launch import SMALLEST_SHARED, Device
from drseg_kernels._tile import WIDEST_ROW, options, rule

from bench.aot import REGISTERS_PER_BLOCK, TARGETS

DEVICES = [Device(target.name, target.l2_bytes, target.shared_bytes) for target in TARGETS]
INTERPRETER = Device("interpreter", 32 << 20, SMALLEST_SHARED)
OPS = ("edge_coefficient", "graph_layer", "graph_layer_rows", "graph_propagate_dot")


@pytest.mark.parametrize("device", [*DEVICES, INTERPRETER], ids=lambda device: device.name)
@pytest.mark.parametrize("op", OPS)
def test_the_rule_fits_every_device(op, device):
    for nodes in (1, 2, 31, 576, 1024, 1025, 65_536, 1_000_003):
        for k in (1, 4, 75, 512):
            for width in (0, 1, 3, 37, 231, 538, 4096):
                chosen = rule(op, device, nodes, k, width)
                assert chosen == rule(op, device, nodes, k, width)
                # the interpreter has no shared memory
                assert device is INTERPRETER or chosen.shared_bytes() <= SMALLEST_SHARED
                assert chosen.rows * chosen.columns <= 64 * 256 and 1 <= chosen.num_warps <= 8
                # a program gets the registers that it may take
                assert options(chosen)["maxnreg"] * 32 * chosen.num_warps <= REGISTERS_PER_BLOCK


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_rows_are_whole_where_a_program_can_hold_them(device):
    for width in (1, 37, 256, 384, 512):
        assert rule("graph_layer", device, 576, 75, width).columns >= width
    for width in (1, 384, 768, WIDEST_ROW):
        assert rule("graph_layer", device, 4096, 75, width).columns >= width
        assert rule("graph_layer_rows", device, 576, 75, width).columns >= width
