# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from drseg_core.models.decoder import Decoder, GuidedConv, Stage


def test_split_convolution_equals_that_of_the_concatenation() -> None:
    layer = GuidedConv(5, 3, 4).double()
    x = torch.randn(2 * 6, 5, 7, 4, dtype=torch.float64, requires_grad=True)
    guidance = torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.cat((layer.conv.weight, layer.conv_guidance.weight), dim=1)
    expanded = guidance[:, None].expand(2, 6, 3, 7, 4).flatten(0, 1)
    expected = F.conv2d(torch.cat((x, expanded), dim=1), weight, padding=1)
    found = layer(x, guidance)
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(expected)
    inputs = (x, guidance, layer.conv.weight, layer.conv_guidance.weight)
    for own, other in zip(
        torch.autograd.grad(found, inputs, probe), torch.autograd.grad(expected, inputs, probe), strict=True
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (1, 1)])
@pytest.mark.parametrize("classes", [1, 3])
def test_logits_are_four_times_the_grid(grid: tuple[int, int], classes: int) -> None:
    decoder = Decoder(16, 20, widths=(8, 6), guidance_widths=(4, 3), guidance_hidden=(10, 9))
    embedding = torch.randn(2, 16, classes, *grid, requires_grad=True)
    guidance = (torch.randn(2, 20, *grid), torch.randn(2, 20, *grid))
    logits = decoder(embedding, guidance)
    assert logits.shape == (2, classes, 4 * grid[0], 4 * grid[1])
    logits.square().mean().backward()
    assert embedding.grad is not None
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name


def test_guidance_is_convolved_once_per_image() -> None:
    decoder = Decoder(16, 20, widths=(8, 6), guidance_widths=(4, 3), guidance_hidden=(10, 9))
    seen: list[int] = []
    for stage, project in zip(decoder.stages, decoder.guidance, strict=True):
        stage.join.conv_guidance.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        project.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    decoder(torch.randn(2, 16, 9, 4, 4), (torch.randn(2, 20, 4, 4), torch.randn(2, 20, 4, 4)))
    assert seen == [2, 2, 2, 2]


def test_classes_and_images_are_independent() -> None:
    decoder = Decoder(16, 20, widths=(8, 6), guidance_widths=(4, 3), guidance_hidden=(10, 9)).double()
    embedding = torch.randn(2, 16, 5, 4, 4, dtype=torch.float64)
    guidance = tuple(torch.randn(2, 20, 4, 4, dtype=torch.float64) for _ in range(2))
    whole = decoder(embedding, guidance)
    torch.testing.assert_close(decoder(embedding[:, :, 3:4], guidance), whole[:, 3:4])
    torch.testing.assert_close(decoder(embedding[1:], tuple(part[1:] for part in guidance)), whole[1:])


def test_the_correlation_is_joined_and_the_guidance_learns_nothing() -> None:
    widths = {"widths": (8, 6), "guidance_widths": (4, 3), "guidance_hidden": (10, 9)}
    decoder = Decoder(16, 20, **widths, skip_correlation=True).double()
    embedding = torch.randn(2, 16, 5, 4, 4, dtype=torch.float64)
    guidance = tuple(torch.randn(2, 20, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    correlation = torch.randn(2, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    logits = decoder(embedding, guidance, correlation=correlation)
    # each class of an image has its own
    one = decoder(embedding[1:, :, 3:4], tuple(part[1:] for part in guidance), correlation=correlation[1:, 3:4])
    torch.testing.assert_close(one, logits[1:, 3:4])
    assert not torch.allclose(decoder(embedding, guidance), logits)
    logits.square().mean().backward()
    assert correlation.grad is not None and bool(correlation.grad.any((2, 3)).all())
    assert all(part.grad is None for part in guidance)


def test_paper_widths() -> None:
    decoder = Decoder(128, 1024)
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    assert shapes["stages.0.up.weight"] == (128, 96, 2, 2) and shapes["stages.1.up.weight"] == (64, 48, 2, 2)
    assert shapes["guidance.0.0.weight"] == (1024, 256, 2, 2) and shapes["guidance.1.0.weight"] == (1024, 128, 4, 4)
    assert shapes["guidance.0.1.weight"][0] == 32 and shapes["guidance.1.1.weight"][0] == 16
    assert shapes["stages.0.conv.weight"][0] == 64 and shapes["head.weight"] == (1, 32, 3, 3)
    assert decoder.stages[0].norm.num_groups == 4 and decoder.stages[1].norm.num_groups == 2


def test_guidance_cannot_take_the_whole_width() -> None:
    with pytest.raises(ValueError, match="guidance_widths is out of range"):
        Stage(8, 8, 4)


def test_logits_start_where_they_are_told_to() -> None:
    for start in (0.0, -4.0):
        decoder = Decoder(16, 20, widths=(8, 6), guidance_widths=(4, 3), initial_logit=start)
        assert decoder.head.bias is not None and decoder.head.bias.tolist() == [start]
