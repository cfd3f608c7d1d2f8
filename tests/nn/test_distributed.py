# SPDX-License-Identifier: Apache-2.0
"""PDGR under DistributedDataParallel and FSDP2 (``fully_shard``): two processes on the CPU, every parameter with a
gradient in every step.

The ranks are children of the test's process; one that hangs is killed.
"""

from __future__ import annotations

import functools
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from drseg_core.nn import PDGR
from tests.forks import Fork

WORLD = 2
C, D = 6, 5
TIMEOUT = 600

# options of PDGR, grid, and the ranks whose every pixel is ignored by the loss
SCENARIOS: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, ...]]] = {
    "ordinary": ({}, (4, 5), ()),
    "affinity as weight": ({"use_affinity_as_weight": True, "norm": "sym_undirected"}, (4, 5), ()),
    "no neighbours": ({"k": 0}, (4, 5), ()),
    "every slot is padding": ({"self_loop": "exclude"}, (1, 1), ()),
    "one rank ignores all": ({}, (4, 5), (1,)),
    "both ranks ignore all": ({"residual": True}, (4, 5), (0, 1)),
    "one graph for two calls": ({}, (4, 5), ()),
}
WRAPPERS = ("replicated", "sharded", "sharded in parts")


def batch(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features, prior and loss weights of both ranks: the first half of the samples is rank 0's."""
    _, grid, ignoring = SCENARIOS[name]
    random = torch.Generator().manual_seed(4)
    features = torch.randn(2 * WORLD, C, *grid, generator=random)
    prior = torch.randn(2 * WORLD, D, *grid, generator=random)
    weight = torch.ones(2 * WORLD, 1, *grid)
    for rank in ignoring:
        weight[2 * rank : 2 * rank + 2] = 0
    return features, prior, weight


def model(name: str) -> nn.Module:
    torch.manual_seed(7)
    return PDGR(C, D, **{"k": 5, "edge_hidden": 4, **SCENARIOS[name][0]})


class Host(nn.Module):
    """A model of somebody's, with PDGR in it."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        return self.graph(features, prior)


def wrapped(how: str, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    if how == "replicated":
        return DistributedDataParallel(module, find_unused_parameters=False)
    # what is called beside the forward needs the whole parameters too
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "graph")
    return fully_shard(Host(module), mesh=mesh) if how == "sharded in parts" else module


def output_of(name: str, module: nn.Module, features: Tensor, prior: Tensor) -> Tensor:
    if name != "one graph for two calls":
        return module(features, prior)
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    module = module.graph if isinstance(inner, Host) else module
    graph = (inner.graph if isinstance(inner, Host) else inner).graph(prior)
    return module(features, graph=graph) + module(features.sin(), graph=graph)


def two_steps(name: str, module: nn.Module, features: Tensor, prior: Tensor, weight: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of two steps of SGD. The second one fails if the first left a parameter without."""
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    steps = []
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        loss = (output_of(name, module, features, prior).square() * weight).mean()
        loss.backward()
        optimiser.step()
        named = {re.sub(r"^(module|graph)\.", "", key): value.grad for key, value in module.named_parameters()}
        missing = [key for key, grad in named.items() if grad is None]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing)}")
        whole = {key: grad.full_tensor() if isinstance(grad, DTensor) else grad for key, grad in named.items()}
        steps.append({key: grad.clone() for key, grad in whole.items() if grad is not None})
    return steps


def work(rank: int, store: Path, results: Path) -> int:
    """What one rank does, for every scenario; returns an exit code."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    found, mesh = {}, init_device_mesh("cpu", (WORLD,))
    half = slice(2 * rank, 2 * rank + 2)
    for how in WRAPPERS:
        for name in SCENARIOS:
            module = wrapped(how, model(name), mesh)
            found[f"{how}: {name}"] = two_steps(name, module, *(part[half] for part in batch(name)))
    torch.save(found, results)
    dist.destroy_process_group()
    return 0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, list[dict[str, Tensor]]]]:
    folder = tmp_path_factory.mktemp("ddp")
    results = [folder / f"rank-{rank}.pt" for rank in range(WORLD)]
    processes = [
        Fork(
            functools.partial(work, rank, folder / "store", results[rank]),
            folder / f"rank-{rank}.log",
            seconds=TIMEOUT,
            environment={"GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(WORLD)
    ]
    for rank, process in enumerate(processes):
        assert process.wait() == 0, f"rank {rank}: {process.said[0]}"
    return [torch.load(result, weights_only=True) for result in results]


@pytest.mark.promise("C22")
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("how", WRAPPERS)
def test_gradients_are_those_of_the_joint_batch(how, name, ranks):
    expected = two_steps(name, model(name), *batch(name))
    silent = "edge_vector" if name in ("no neighbours", "every slot is padding") else None
    for step in range(2):
        first, second = (rank[f"{how}: {name}"][step] for rank in ranks)
        assert set(first) == set(expected[step]) == {key for key, _ in model(name).named_parameters()}
        for key, value in expected[step].items():
            assert torch.equal(first[key], second[key]), f"{key} differs between the ranks"
            scale = float(value.abs().max())
            torch.testing.assert_close(
                first[key], value, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=f"{key} is not the mean"
            )
        if silent:
            assert not first[silent].any()
        elif name == "both ranks ignore all":
            assert not any(value.any() for value in first.values())
        else:
            assert all(value.any() for value in first.values())
