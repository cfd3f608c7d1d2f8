# SPDX-License-Identifier: Apache-2.0
"""CAT-Seg's aggregation, against the same written out with every window, class and filler of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.models.aggregator import Aggregator
from drseg_core.models.baselines.swin import LinearClassBlock, WindowBlock, WindowPair
from drseg_core.models.build import build_model

OPTIONS = {"kind": "swin", "heads": 2, "mlp_hidden": 32, "window": 4, "class_slots": 12}


def inputs(classes: int, grid: tuple[int, int], width: int = 16, embed: int = 12, batch: int = 2):
    return (
        torch.randn(batch, width, classes, *grid),
        torch.randn(batch, embed, *grid),
        torch.randn(classes, embed),
    )


def joined(layer: torch.nn.Linear, guidance: torch.nn.Linear, part: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of the query (0) or key (1) map of ``cat(x, guidance)``."""
    rows = slice(part * 16, part * 16 + 16)
    return torch.cat((layer.weight[rows], guidance.weight[rows]), 1), layer.bias[rows]


def one_by_one(block: WindowBlock, x: Tensor, guidance: Tensor, grid: tuple[int, int], shift: int) -> Tensor:
    """Each cell attends to the cells whose window is its own; windows begin at ``-window + shift``."""
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    side = min(*grid, block.window)
    # windows that begin `shift` later: what wraps around in Swin is a window of its own at the border
    own = [((row - shift) // side, (column - shift) // side) for row, column in cells]
    mask = torch.tensor([[a == b for b in own] for a in own])
    y = block.norm_attention(x)
    both = torch.cat((y, guidance[:, None].expand_as(y)), -1)
    query, key = (F.linear(both, *joined(block.query_key_value, block.query_key_guidance, part)) for part in (0, 1))
    value = F.linear(y, block.query_key_value.weight[32:], block.query_key_value.bias[32:])
    query, key, value = (part.unflatten(-1, (block.heads, -1)).transpose(2, 3) for part in (query, key, value))
    score = (query @ key.transpose(3, 4)) / query.shape[-1] ** 0.5
    mixed = score.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    x = x + block.out(mixed.transpose(2, 3).flatten(3))
    return x + block.mlp(block.norm_mlp(x))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (12, 8), (6, 9), (4, 10), (3, 3), (5, 5), (1, 7)])
def test_windows(grid: tuple[int, int], shifted: bool) -> None:
    block = WindowBlock(16, 2, 32, window=4, shifted=shifted).double()
    x = torch.randn(2, 3, grid[0] * grid[1], 16, dtype=torch.float64)
    guidance = torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    shift = 2 if shifted and min(grid) > 4 else 0
    torch.testing.assert_close(block(x, guidance, grid), one_by_one(block, x, guidance, grid, shift))


def test_the_published_size_has_four_windows_of_144_cells() -> None:
    pair = WindowPair(16, 4, 32, window=12)
    x = torch.randn(1, 1, 576, 16, requires_grad=True)
    guidance = torch.randn(1, 16, 24, 24)

    def reached(block) -> Tensor:
        (gradient,) = torch.autograd.grad(block(x)[0, 0, 0].sum(), x)
        return gradient[0, 0].abs().sum(-1).view(24, 24) > 0

    normal = pair.norm_guidance(guidance.flatten(2).transpose(1, 2))
    plain = reached(lambda x: pair.plain(x, normal, (24, 24)))
    assert plain[:12, :12].all() and plain.sum() == 144
    # the corner's shifted window begins half a window before the map: a quarter of it is there
    shifted = reached(lambda x: pair.shifted(x, normal, (24, 24)))
    assert shifted[:6, :6].all() and shifted.sum() == 36
    both = reached(lambda x: pair(x, guidance, (24, 24)))
    assert both[:12, :12].all() and both.sum() == 144


@pytest.mark.parametrize("classes", [1, 5, 12, 15])
def test_class_attention_with_every_filler(classes: int) -> None:
    block = LinearClassBlock(16, 2, 32, pooling=(2, 1), slots=12).double().eval()
    with torch.no_grad():
        for parameter in (block.filler, block.filler_guidance):
            parameter.normal_()
    x = torch.randn(2, classes, 20, 16, dtype=torch.float64)
    guidance = torch.randn(classes, 16, dtype=torch.float64)
    more = max(12 - classes, 0)
    z = x.transpose(1, 2)
    z = torch.cat((z, block.filler.expand(2, 20, more, 16)), 2)
    words = torch.cat((guidance, block.filler_guidance.expand(more, 16)))
    y = block.norm_attention(z)
    both = torch.cat((y, words.expand(2, 20, -1, -1)), -1)
    query, key = (F.linear(both, *joined(block.query_key_value, block.query_key_guidance, part)) for part in (0, 1))
    value = F.linear(y, block.query_key_value.weight[32:], block.query_key_value.bias[32:])
    query, key, value = (part.unflatten(-1, (2, -1)).transpose(2, 3) for part in (query, key, value))
    score = (F.elu(query) + 1) @ (F.elu(key) + 1).transpose(3, 4)
    mixed = (score / (score.sum(-1, keepdim=True) + 1e-6)) @ value
    z = z + mixed.transpose(2, 3).flatten(3)
    z = z + block.mlp(block.norm_mlp(z))
    torch.testing.assert_close(block(x, guidance, (5, 4)), x + z[:, :, :classes].transpose(1, 2))


def test_classes_attend_on_pooled_maps_in_training_only() -> None:
    block = LinearClassBlock(16, 2, 32, pooling=(2, 1), slots=12)
    x, guidance = torch.randn(1, 3, 36, 16), torch.randn(3, 16)
    seen: list[int] = []
    block.norm_mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    coarse = block.train()(x, guidance, (6, 6))
    fine = block.eval()(x, guidance, (6, 6))
    assert seen == [9, 36] and not torch.allclose(coarse, fine)


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (1, 1)])
@pytest.mark.parametrize("classes", [1, 5])
def test_any_grid_and_every_parameter_gets_a_gradient(grid: tuple[int, int], classes: int) -> None:
    aggregator = Aggregator(16, 12, layers=2, **OPTIONS)
    embedding, features, text = inputs(classes, grid)
    result = aggregator(embedding, features, text)
    assert result.shape == embedding.shape and torch.isfinite(result).all()
    result.square().mean().backward()
    for name, parameter in aggregator.named_parameters():
        assert parameter.grad is not None, name


def test_order_of_classes_and_images_does_not_matter() -> None:
    aggregator = Aggregator(16, 12, layers=2, **OPTIONS).double()
    embedding, features, text = (value.double() for value in inputs(6, (8, 8), batch=3))
    whole = aggregator(embedding, features, text)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    torch.testing.assert_close(aggregator(embedding[:, :, order], features, text[order]), whole[:, :, order])
    torch.testing.assert_close(aggregator(embedding[1:2], features[1:2], text), whole[1:2])


def test_sums_over_classes_are_float32_under_autocast() -> None:
    block = LinearClassBlock(16, 2, 32, pooling=(1, 1), slots=256)
    x, guidance = torch.randn(1, 9, 16, 16), torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = block._attend(x.transpose(1, 2), guidance)
    expected = block._attend(x.transpose(1, 2), guidance)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def test_in_the_model(variant) -> None:
    options = {"kind": "swin", "layers": 2, "heads": 4, "mlp_hidden": 96, "window": 4}
    model = build_model(variant("aggregator", **options))
    assert len(model.aggregator.spatial) == len(model.aggregator.classes) == 2
    names = ["water", "red roof", "bare soil"]
    logits = model(torch.rand(1, 3, 64, 64), model.tokenize(names)).logits
    assert logits.shape == (1, 3, 32, 32)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.aggregator.parameters())


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind is unknown; expected efficient, swin or conv, got 'other'"):
        Aggregator(16, 12, kind="other")
