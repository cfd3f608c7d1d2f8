# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


def test_keys_and_values_are_reduced_apart() -> None:
    """Against RSKT-Seg's block written down: keys from the 2x2 convolution of the maps beside the guidance."""
    block = SpatialBlock(16, 2, 24).double()
    for parameter in block.parameters():
        # biases and norms must count too
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 36, 16, dtype=torch.float64)
    guidance = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    y = block.norm_attention(x).flatten(0, 1)
    beside = guidance.flatten(2).transpose(1, 2).repeat_interleave(3, dim=0)
    both = torch.cat((y, beside), dim=-1)
    query = F.linear(both, torch.cat((block.query.weight, block.query_guidance.weight), dim=1), block.query.bias)

    def reduced(tokens, weight, bias, norm):
        maps = F.conv2d(tokens.transpose(1, 2).unflatten(2, (6, 6)), weight, bias, stride=2)
        return norm(maps.flatten(2).transpose(1, 2))

    weight = torch.cat((block.reduce_key.weight, block.reduce_key_guidance.weight), dim=1)
    key = block.key(reduced(both, weight, block.reduce_key.bias, block.norm_key))
    value = block.value(reduced(y, block.reduce_value.weight, block.reduce_value.bias, block.norm_value))
    parts = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (query, key, value))
    mixed = block.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
    z = x + mixed.view_as(x)
    maps = block.mlp(block.norm_mlp(z)).flatten(0, 1).transpose(1, 2).unflatten(2, (6, 6))
    expected = z + block.depthwise(maps).flatten(2).transpose(1, 2).view_as(z)
    torch.testing.assert_close(block(x, guidance, (6, 6)), expected)


def test_initial_weights_are_rskt_seg_s() -> None:
    layer = Aggregator(128, 12, layers=1, heads=8, mlp_hidden=384)
    spatial, across = layer.spatial[0], layer.classes[0]
    # deviations of 0.02, and of the root of 2 over the outputs of a place
    wanted = {
        spatial.query: 0.02,
        spatial.key: 0.02,
        spatial.mlp.fc3: 0.02,
        across.query_key_value: 0.02,
        across.mlp.fc1: 0.02,
        spatial.reduce_key: (2 / (4 * 256)) ** 0.5,
        spatial.reduce_key_guidance: (2 / (4 * 256)) ** 0.5,
        spatial.reduce_value: (2 / (4 * 128)) ** 0.5,
        spatial.depthwise: (2 / 49) ** 0.5,
    }
    for module, deviation in wanted.items():
        assert float(module.weight.std()) == pytest.approx(deviation, rel=0.05)
        assert module.bias is None or not module.bias.any()
    # what is around the layers begins as PyTorch has it
    assert layer.project_text.bias.any()


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
