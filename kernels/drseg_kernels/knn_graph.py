# SPDX-License-Identifier: Apache-2.0
"""Neighbours of the highest affinity, in one of three ways that agree up to the rounding of dot products.

``on_chip`` keeps all scores of a row in registers (up to 1024 nodes); ``tiles`` lets the library multiply and merges
what it made; ``fused`` multiplies by itself, keeps the candidates only and leaves out what the decay rules out. The
choice is an argument, then the device's table, then a rule, as are the sizes. By rule it is ``tiles`` on every GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drseg_kernels._knn_fused import fused
from drseg_kernels._knn_on_chip import on_chip
from drseg_kernels._knn_sizes import (
    FUSED_NEIGHBOURS,
    ON_CHIP_NODES,
    STRATEGIES,
    Fused,
    OnChip,
    choose_fused,
    choose_on_chip,
    choose_strategy,
)
from drseg_kernels._knn_tiles import by_tiles
from drseg_kernels._launch import Configuration, Device, configuration_of, known_device

Sizes = Configuration | OnChip | Fused
_BELONGS: dict[type, str] = {Configuration: "tiles", OnChip: "on_chip", Fused: "fused"}


def _strategy(device: Device, nodes: int, k: int, strategy: str | None, configuration: Sizes | None) -> str:
    """The way to compute: as asked for, or that to which the sizes belong, or the device's."""
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"knn_graph: strategy is unknown; expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if configuration is not None:
        belongs = _BELONGS[type(configuration)]
        if strategy not in (None, belongs):
            raise ValueError(f"knn_graph: configuration is for {belongs}; expected one for {strategy}, got another")
        strategy = belongs
    strategy = strategy or choose_strategy(device, nodes, k)
    if strategy == "on_chip" and nodes > ON_CHIP_NODES:
        raise ValueError(f"knn_graph: too many nodes for on_chip; expected at most {ON_CHIP_NODES}, got {nodes}")
    if strategy == "fused" and k > FUSED_NEIGHBOURS:
        raise ValueError(f"knn_graph: too many neighbours for fused; expected at most {FUSED_NEIGHBOURS}, got {k}")
    return strategy


def sizes_of(device: torch.device, nodes: int, k: int, strategy: str | None = None) -> Sizes:
    """What a call without ``configuration`` takes."""
    way = _strategy(known_device(device), nodes, k, strategy, None)
    if way == "on_chip":
        return choose_on_chip(known_device(device), nodes, k)
    if way == "fused":
        return choose_fused(known_device(device), nodes, k)
    return configuration_of("knn_graph", device, nodes, k)


def knn_graph(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    k: int,
    form: str,
    include_self: bool,
    *,
    strategy: str | None = None,
    configuration: Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """Neighbours and scores of prepared features.

    The float32 products of ``tiles`` follow torch's precision setting: the caller turns TF32 off where the result must
    be exact. ``on_chip`` and ``fused`` never round float32 features.

    Args:
        prior: (B, N, D) float32, float16 or bfloat16.
        inverse_norm: (B, N) float32, NaN for a node that no other may choose.
        table: (h, w) float32 decay table, h * w = N.
        k: neighbours per node.
        form: ``additive``, ``gauss`` (both subtract the table), ``multiplicative`` or ``product``.
        include_self: the node itself is always, or never, among its neighbours.
        strategy: ``tiles``, ``on_chip`` (up to 1024 nodes) or ``fused`` (up to 960 neighbours); by default what the
            device's table says, then the rule.
        configuration: sizes of tiles and programs; by default those of the device's table, then a rule.

    Returns:
        ``index`` (B, N, k) int32, ascending in each row, and ``score`` (B, N, k) float32. Slots without a candidate
        come last and hold the row's own index with score ``-inf``, or NaN in a row that is not finite.

    Raises:
        ValueError: ``strategy`` is unknown, does not take so many nodes or neighbours, or ``configuration`` belongs to
            another.
    """
    batch, nodes, _ = prior.shape
    way = _strategy(known_device(prior.device), nodes, k, strategy, configuration)
    index = torch.empty(batch, nodes, k, dtype=torch.int32, device=prior.device)
    score = torch.empty(batch, nodes, k, dtype=torch.float32, device=prior.device)
    if index.numel() == 0:
        return index, score
    given = (prior.contiguous(), inverse_norm.contiguous(), table.contiguous(), form, include_self)
    sizes = configuration or sizes_of(prior.device, nodes, k, way)
    if isinstance(sizes, OnChip):
        on_chip(*given, sizes, index, score)
    elif isinstance(sizes, Fused):
        fused(*given, sizes, index, score)
    else:
        by_tiles(*given, sizes, index, score)
    return index, score
