# SPDX-License-Identifier: Apache-2.0
"""How a protocol shows images to the model."""

from __future__ import annotations

import pytest
import torch

from drseg_core.data.protocols import PROTOCOLS, Views
from drseg_core.evaluation.inference import Predictor
from drseg_core.evaluation.views import ViewPredictor, resized_size
from drseg_core.models.clip import PIXEL_MEAN
from tests.evaluation.fake import COLORS, ColorModel, color_image

NAMES = list(COLORS)


def batches(views: Views, size: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes of what the model was shown."""
    model = ColorModel()
    ViewPredictor(model, NAMES, views, batch_size=3)(torch.zeros(3, *size, dtype=torch.uint8))
    return model.batches


def test_the_benchmark_sees_one_whole_image():
    assert batches(PROTOCOLS["rskt"].views, (256, 256)) == [(1, 3, 640, 640)]
    # UAVid and an elongated image: the long edge stops at 2560
    assert resized_size(2160, 3840, PROTOCOLS["rskt"].views) == (640, 1138)
    assert resized_size(100, 1000, PROTOCOLS["rskt"].views) == (256, 2560)


def test_the_public_code_stretches_what_it_pads():
    """VDD's shape: 4000 x 3000 is shown at 853 x 640 and padded to 864 x 640."""
    rskt, clean = PROTOCOLS["rskt"].views, PROTOCOLS["clean"].views
    assert batches(rskt, (300, 400)) == [(1, 3, 640, 864)] and batches(clean, (300, 400)) == [(1, 3, 640, 853)]
    # nothing to pad
    assert batches(rskt, (256, 256)) == batches(clean, (256, 256)) == [(1, 3, 640, 640)]
    label = torch.zeros(300, 400, dtype=torch.long)
    label[:, 300:] = 3
    stretched, plain = (ViewPredictor(ColorModel(), NAMES, views)(color_image(label)) for views in (rskt, clean))
    assert int((plain.class_index[150] == 3).nonzero()[0]) == 300
    # the border moves from 300 to 300 * 853.3 / 864 of 400, and the padding covers the last 5.1 pixels of 400
    assert int((stretched.class_index[150] == 3).nonzero()[0]) == 296
    assert (stretched.class_index[150, 300:394] == 3).all()
    grey = stretched.score[150, -4:]
    distance = sum((a - b) ** 2 for a, b in zip(PIXEL_MEAN, COLORS["dark"], strict=True))
    nearest = min(distance, *(sum((a - b) ** 2 for a, b in zip(PIXEL_MEAN, c, strict=True)) for c in COLORS.values()))
    torch.testing.assert_close(grey, torch.full((4,), 1 - 4 * nearest).sigmoid(), rtol=1e-4, atol=1e-4)


def test_ovrs_sees_four_windows_and_the_whole():
    assert batches(PROTOCOLS["ovrs"].views, (256, 256)) == [(3, 3, 384, 384), (1, 3, 384, 384), (1, 3, 640, 640)]
    assert resized_size(300, 100, PROTOCOLS["ovrs"].views) == (640, 640)


@pytest.mark.promise("C50")
def test_segearth_sees_nine_windows():
    assert batches(PROTOCOLS["segearth"].views, (512, 512)) == [(3, 3, 224, 224)] * 3
    assert resized_size(1080, 1280, PROTOCOLS["segearth"].views) == (378, 448)
    # lower than a window: windows of that height
    assert batches(Views(448, "long", window=224, stride=112, whole=False), (20, 80)) == [(3, 3, 112, 224)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_finds_large_objects(protocol):
    label = torch.zeros(60, 90, dtype=torch.long)
    label[20:45, 30:70] = 2
    prediction = ViewPredictor(ColorModel(), NAMES, PROTOCOLS[protocol].views)(color_image(label))
    assert prediction.class_index.shape == prediction.score.shape == prediction.uncertainty.shape == (60, 90)
    assert (prediction.class_index == label).float().mean() > 0.97
    assert prediction.class_index.dtype == torch.uint8


def test_without_resizing_and_windows_it_is_the_plain_predictor():
    image = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = Predictor(ColorModel(reduce=4), NAMES)(image)
    viewed = ViewPredictor(ColorModel(reduce=4), NAMES, Views(48, "square"))(image)
    assert torch.equal(plain.class_index, viewed.class_index)
    assert torch.allclose(plain.score, viewed.score, atol=1e-6)
    assert torch.allclose(plain.uncertainty, viewed.uncertainty, atol=1e-5)


def test_scores_are_averaged_windows_first_then_with_the_whole():
    class Counting(ColorModel):
        """Says how many pixels it was shown."""

        def forward(self, image, text):
            output = super().forward(image, text)
            value = torch.full_like(output.logits, 0.0 if image.shape[-1] == 32 else 4.0)
            value[:, 1:] = -9.0
            return output._replace(logits=value)

    views = Views(48, "square", window=32, stride=16)
    image = torch.zeros(3, 48, 48, dtype=torch.uint8)
    score = ViewPredictor(Counting(), NAMES, views)(image).score
    assert torch.allclose(score, torch.tensor((0.5 + torch.sigmoid(torch.tensor(4.0)).item()) / 2), atol=1e-5)
