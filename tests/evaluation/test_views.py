# SPDX-License-Identifier: Apache-2.0
"""How a protocol shows images to the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from drseg_core.data.protocols import PROTOCOLS, Views
from drseg_core.evaluation.inference import Predictor
from drseg_core.evaluation.views import ViewPredictor, resized_size
from drseg_core.models.pixel_statistics import PIXEL_MEAN
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


def test_ovrs_gives_what_its_public_code_computes():
    """Logits are enlarged to the window, then made scores, which the other order would round off at borders."""

    class Steep(ColorModel):
        def forward(self, image, text):
            output = super().forward(image, text)
            return output._replace(logits=40 * output.logits)

    label = (torch.arange(640)[:, None] // 37 + torch.arange(640) // 53) % 4
    image, views = color_image(label), PROTOCOLS["ovrs"].views
    found = ViewPredictor(Steep(reduce=16), NAMES, views)(image)

    # as that code has it: unfold, model, fold, and the whole at the size of a window
    model, text = Steep(reduce=16), torch.tensor(list(COLORS.values()))
    pixels = image[None].float() / 255
    unfold = torch.nn.Unfold(384, stride=256)
    windows = unfold(pixels)[0].T.view(-1, 3, 384, 384)
    logits = [model(shown, text).logits for shown in (windows, pixels)]
    each, whole = (F.interpolate(x, 384, mode="bilinear", align_corners=False).sigmoid() for x in logits)
    whole = F.interpolate(whole, 640, mode="bilinear", align_corners=False)
    fold = torch.nn.Fold(640, 384, stride=256)
    mean = fold(each.flatten(1).T[None]) / fold(unfold(torch.ones(1, 1, 640, 640)))
    score = ((mean + whole) / 2)[0]
    torch.testing.assert_close(found.score, score.amax(0), rtol=0, atol=1e-5)
    assert (found.class_index == score.argmax(0)).float().mean() > 0.9999

    # the test can tell the two orders apart
    each, whole = (F.interpolate(x.sigmoid(), 384, mode="bilinear", align_corners=False) for x in logits)
    whole = F.interpolate(whole, 640, mode="bilinear", align_corners=False)
    mean = fold(each.flatten(1).T[None]) / fold(unfold(torch.ones(1, 1, 640, 640)))
    assert (((mean + whole) / 2)[0].amax(0) - score.amax(0)).abs().max() > 0.1


@pytest.mark.promise("C50")
def test_segearth_averages_logits():
    """As its public code does; scores of logits 9 and -3 would have the mean 0.52 instead of 0.95."""

    class Changing(ColorModel):
        def forward(self, image, text):
            output = super().forward(image, text)
            bright = image.mean((1, 2, 3)) > 0.5
            value = torch.where(bright, 9.0, -3.0)[:, None, None, None].expand_as(output.logits).clone()
            value[:, 1:] = -9.0
            return output._replace(logits=value)

    image = torch.zeros(3, 24, 48, dtype=torch.uint8)
    image[:, :, 24:] = 255
    views = Views(48, "long", window=24, stride=24, whole=False, mean_of="logits")
    assert PROTOCOLS["segearth"].views.mean_of == views.mean_of and PROTOCOLS["ovrs"].views.mean_of == "scores"
    score = ViewPredictor(Changing(), NAMES, views)(image).score
    torch.testing.assert_close(score[:, 24:], torch.full((24, 24), 9.0).sigmoid())
    overlapping = Views(36, "square", window=24, stride=12, whole=False, mean_of="logits")
    square = torch.zeros(3, 36, 36, dtype=torch.uint8)
    square[:, :, 18:] = 255
    score = ViewPredictor(Changing(), NAMES, overlapping)(square).score
    torch.testing.assert_close(score[:, 14:22], torch.full((36, 8), 3.0).sigmoid())
