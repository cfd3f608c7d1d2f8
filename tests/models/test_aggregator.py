# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from drseg_core.models.aggregator import Aggregator, ClassBlock, GatedMLP, SpatialBlock


def inputs(classes: int, grid: tuple[int, int], width: int = 16, embed: int = 12, batch: int = 2):
    return (
        torch.randn(batch, width, classes, *grid),
        torch.randn(batch, embed, *grid),
        torch.randn(classes, embed),
    )


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (1, 1), (2, 3)])
@pytest.mark.parametrize("classes", [1, 5])
def test_any_grid_and_any_number_of_classes(grid: tuple[int, int], classes: int) -> None:
    aggregator = Aggregator(16, 12, layers=2, heads=2, mlp_hidden=24)
    embedding, features, text = inputs(classes, grid)
    result = aggregator(embedding, features, text)
    assert result.shape == embedding.shape and torch.isfinite(result).all()


@pytest.mark.promise("C22")
@pytest.mark.parametrize("classes", [1, 3])
def test_every_parameter_gets_a_gradient(classes: int) -> None:
    aggregator = Aggregator(16, 12, layers=2, heads=4, mlp_hidden=24)
    aggregator(*inputs(classes, (5, 4))).square().mean().backward()
    for name, parameter in aggregator.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.promise("C6")
def test_order_of_classes_and_images_does_not_matter() -> None:
    aggregator = Aggregator(16, 12, layers=2, heads=2, mlp_hidden=24).double()
    embedding, features, text = (value.double() for value in inputs(6, (4, 4), batch=3))
    whole = aggregator(embedding, features, text)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    torch.testing.assert_close(aggregator(embedding[:, :, order], features, text[order]), whole[:, :, order])
    images = torch.tensor([2, 0, 1])
    torch.testing.assert_close(aggregator(embedding[images], features[images], text), whole[images])


@pytest.mark.promise("C7")
def test_images_do_not_see_each_other() -> None:
    aggregator = Aggregator(16, 12, layers=1, heads=2, mlp_hidden=24).double()
    embedding, features, text = (value.double() for value in inputs(3, (4, 4)))
    whole = aggregator(embedding, features, text)
    torch.testing.assert_close(aggregator(embedding[:1], features[:1], text), whole[:1])


def test_every_cell_of_an_odd_grid_is_seen() -> None:
    """From a corner: the cells of the last row and column too, which fill no pair."""
    block = SpatialBlock(16, 2, 24).double()
    x = torch.randn(1, 1, 49, 16, dtype=torch.float64)
    guidance = torch.randn(1, 16, 7, 7, dtype=torch.float64)
    whole = block(x, guidance, (7, 7))
    for cell in (6, 42, 48):
        changed = x.clone()
        changed[0, 0, cell] += torch.randn(16, dtype=torch.float64)
        assert (block(changed, guidance, (7, 7))[0, 0, 0] - whole[0, 0, 0]).abs().max() > 1e-6


def test_spatial_block_keeps_classes_apart() -> None:
    block = SpatialBlock(16, 2, 24).double()
    x = torch.randn(2, 4, 20, 16, dtype=torch.float64)
    guidance = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    whole = block(x, guidance, (5, 4))
    torch.testing.assert_close(block(x[:, 2:3], guidance, (5, 4)), whole[:, 2:3])


def test_split_projections_equal_those_of_the_concatenation() -> None:
    # q(cat(x, g)) == q_x(x) + q_g(g), which is what lets guidance stay one per image
    block = ClassBlock(16, 2, 24)
    x, guidance = torch.randn(5, 3, 16), torch.randn(3, 16)
    query = block.query_key_value(x)[..., :16] + block.query_key_guidance(guidance)[..., :16]
    weight = torch.cat((block.query_key_value.weight[:16], block.query_key_guidance.weight[:16]), dim=1)
    joined = torch.cat((x, guidance.expand(5, 3, 16)), dim=-1)
    expected = torch.nn.functional.linear(joined, weight, block.query_key_value.bias[:16])
    torch.testing.assert_close(query, expected)


def test_gated_mlp() -> None:
    mlp = GatedMLP(8, 12)
    x = torch.randn(3, 8) * 5
    torch.testing.assert_close(mlp(x), mlp.fc3(mlp.fc1(x).clamp(0, 6) * mlp.fc2(x)))


def test_no_layers_pass_the_embedding_through() -> None:
    embedding, features, text = inputs(3, (4, 4))
    assert Aggregator(16, 12, layers=0, heads=2)(embedding, features, text) is embedding


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="expected a divisor of 16, got 3"):
        Aggregator(16, 12, heads=3)
