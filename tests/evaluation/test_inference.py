# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drseg_core.errors import ConfigError, DatasetError, NumericalError
from drseg_core.evaluation.inference import Predictor
from drseg_core.models.tiling import blend_window, tile_starts
from tests.evaluation.fake import COLORS, ColorModel, Output, color_image

torch.set_num_threads(1)
NAMES = list(COLORS)


def labels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 4, (height, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.promise("C36")
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(length=st.integers(1, 300), side=st.sampled_from([16, 32, 64]), share=st.floats(0, 0.99))
def test_tiles_cover_an_axis(length, side, share):
    overlap = int(share * side)
    starts = tile_starts(length, side, overlap)
    assert starts == sorted(set(starts)) and starts[0] == 0
    covered = np.zeros(max(length, side), int)
    for start in starts:
        covered[start : start + side] += 1
        assert start + side <= max(length, side)
    assert covered.min() >= 1
    assert all(b - a <= side - overlap for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.promise("C36")
@pytest.mark.parametrize("overlap", [0, 1, 8, 16, 31])
def test_window_is_positive_symmetric_and_smooth(overlap):
    window = blend_window(32, overlap)
    assert (window > 0).all() and window.max() <= 1 and np.array_equal(window, window[::-1])
    assert overlap < 8 or np.abs(np.diff(window)).max() < 0.25


@pytest.mark.promise("C36")
@pytest.mark.parametrize("mode", ["whole", "tile"])
@pytest.mark.parametrize("size", [(50, 70), (33, 32), (32, 32), (5, 90), (1, 1), (40, 7)])
def test_pixelwise_model_gives_the_same_however_it_is_run(mode, size):
    truth = labels(*size)
    image = color_image(truth)
    predictor = Predictor(ColorModel(), NAMES, mode=mode, tile_size=32, overlap=12, batch_size=3)
    result = predictor(image)
    assert torch.equal(result.class_index, truth.to(torch.uint8)) and result.class_index.dtype == torch.uint8
    for value in (result.score, result.uncertainty):
        assert value.shape == size and value.dtype == torch.float32
    assert torch.allclose(result.uncertainty, image[0] / 255, atol=1e-6)


@pytest.mark.parametrize("mode", ["whole", "tile"])
def test_what_will_be_read_is_known_before(mode):
    image, asked = color_image(labels(70, 50)), []

    def read(*box):
        asked.append(box)
        top, bottom, left, right = box
        return image[:, top:bottom, left:right], None

    predictor = Predictor(ColorModel(), NAMES, mode=mode, tile_size=32, overlap=12)
    assert list(predictor.pieces(read, 70, 50))
    assert asked == [tuple(box) for box in predictor.reads(70, 50)]


@pytest.mark.promise("C6")
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 15), st.integers(1, 5))
def test_weights_sum_to_exactly_one(height, width, overlap, batch):
    # a bias this large makes every sigmoid exactly one: the score is then the sum of a pixel's weights
    predictor = Predictor(ColorModel(bias=200.0), NAMES, mode="tile", tile_size=16, overlap=overlap, batch_size=batch)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    rows = []
    for first, band in predictor.rows(lambda a, b: image[:, a:b], height, width):
        assert torch.all(band.score == 1)
        rows += range(first, first + len(band.score))
    assert rows == list(range(height))


@pytest.mark.promise("C36")
def test_tiled_scores_are_weighted_means():
    # a model that answers with the tile's number shows the weights themselves
    class Counter(ColorModel):
        def forward(self, image, text):
            self.batches.append(tuple(image.shape))
            value = torch.logit(torch.tensor(0.1 * len(self.batches)))
            return Output(value.expand(1, 1, *image.shape[-2:]), torch.zeros(1, 1, 4, 4))

    predictor = Predictor(Counter(), ["red"], mode="tile", tile_size=16, overlap=8, batch_size=1)
    score = predictor(torch.zeros(3, 24, 24, dtype=torch.uint8)).score.numpy()
    window = blend_window(16, 8).astype(float)
    first, second = np.zeros(24), np.zeros(24)
    first[:16], second[8:] = window, window
    # rows of tiles from the top, each from the left: a weight is a product of both axes'
    weights = [down[:, None] * across for down in (first, second) for across in (first, second)]
    expected = sum(0.1 * number * weight for number, weight in enumerate(weights, 1)) / sum(weights)
    assert np.allclose(score, expected, atol=1e-6)
    assert np.all(np.diff(score, axis=0) > -1e-6) and np.all(np.diff(score, axis=1) > -1e-6)


def test_whole_mode_enlarges_sigmoids_and_batches_equal_sizes():
    model = ColorModel(reduce=4)
    predictor = Predictor(model, NAMES, batch_size=2)
    sizes = [(32, 24), (32, 24), (32, 24), (16, 40), (32, 24)]
    images = [color_image(labels(*size, seed)) for seed, size in enumerate(sizes)]
    results = predictor.many(images)
    assert [b[0] for b in model.batches] == [2, 1, 1, 1]
    for image, result in zip(images, results, strict=True):
        output = ColorModel(reduce=4)(image[None].float() / 255, predictor.text)
        score = torch.nn.functional.interpolate(output.logits.sigmoid(), image.shape[-2:], mode="bilinear")[0]
        assert torch.allclose(result.score, score.amax(0), atol=1e-6)
        assert (result.class_index == score.argmax(0)).float().mean() > 0.999


@pytest.mark.parametrize("mode", ["whole", "tile"])
def test_ties_go_to_the_lowest_id(mode):
    predictor = Predictor(ColorModel(bias=200.0), NAMES, mode=mode, tile_size=16, overlap=4)
    assert not predictor(color_image(labels(20, 20))).class_index.any()


def test_text_is_encoded_once():
    class Once(ColorModel):
        count = 0

        def encode_text(self, tokens):
            Once.count += 1
            return super().encode_text(tokens)

    predictor = Predictor(Once(), ["red", "blue"])
    for _ in range(3):
        predictor(color_image(labels(8, 8)))
    assert Once.count == 1 and predictor.text.shape == (2, 3) and not predictor.text.requires_grad
    assert not predictor.model.training


def test_refusals():
    model = ColorModel()
    good = color_image(labels(8, 8))
    for options, message in [
        ({"mode": "slide"}, "mode is unknown"),
        ({"tile_size": 40}, "tile_size is not usable; expected a positive multiple of 16, got 40"),
        ({"tile_size": 0}, "tile_size is not usable"),
        ({"tile_size": 32, "overlap": 32}, "overlap is out of range; expected 0 <= overlap < 32, got 32"),
        ({"overlap": -1}, "overlap is out of range"),
        ({"batch_size": 0}, "batch_size is out of range"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            Predictor(model, NAMES, **options)
        assert isinstance(caught.value, ValueError) and caught.value.exit_code == 2
    with pytest.raises(DatasetError, match="'red' repeats"):
        Predictor(model, ["red", "red"])
    predictor = Predictor(model, NAMES)
    with pytest.raises(TypeError, match="image has a wrong dtype; expected uint8"):
        predictor(good.float())
    for shape in [(1, 8, 8), (8, 8), (3, 0, 8)]:
        with pytest.raises(ValueError, match="image has a wrong shape"):
            predictor(torch.zeros(shape, dtype=torch.uint8))
    broken = Predictor(ColorModel(bias=float("nan")), NAMES)
    with pytest.raises(NumericalError, match="logits are not finite"):
        broken(good)
    assert predictor(good).class_index.shape == (8, 8)
