# SPDX-License-Identifier: Apache-2.0
"""Small models like those of other people: with the engine in its place they compute and train as without it."""

from __future__ import annotations

import pytest
import torch

from tests.hosts import gsnet, lposs, rskt


def test_lposs_refines_as_with_its_own_graph_and_solver() -> None:
    assert lposs.main() < 1e-10


def test_rskt_trains_as_with_the_literal_module() -> None:
    engine, literal = rskt.main(steps=20)
    assert engine == pytest.approx(literal, rel=1e-3)
    # and it learns, the engine's parameters among the rest
    assert engine[-1] < 0.6 * engine[0]
    torch.manual_seed(0)
    host = rskt.Host()
    before = {name: value.clone() for name, value in host.pdgr.state_dict().items()}
    rskt.losses(host, 2)
    assert all(not torch.equal(value, before[name]) for name, value in host.pdgr.state_dict().items())


def test_gsnet_shares_one_graph_between_its_stages() -> None:
    found = gsnet.main()
    engine = [name for name in found if name.startswith("pdgr.")]
    assert len(engine) == 11 and "general.weight" in found and not any("specialist" in name for name in found)
    for name, (one, other) in found.items():
        # gradients of the edge MLP are small differences of large sums
        close = 1e-4 if name.startswith("pdgr.edge") else 1e-5
        assert float((one - other).abs().max()) <= close * float(other.abs().max()) + 1e-9, name
