# SPDX-License-Identifier: Apache-2.0
"""Names to text, an image to maps: against the steps one by one, and what must not matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.errors import ConfigError
from drseg_core.models.class_text import ClassText, class_logits, encode_classes
from drseg_core.models.clip import ClipEncoder
from drseg_core.models.dense_features import VARIANTS, DenseOptions, dense_features
from drseg_core.models.dino import DinoPrior, PriorMaps
from drseg_core.models.prompts import AERIAL_TEMPLATES
from drseg_core.models.zero_shot import ZeroShot
from drseg_core.nn import LabelPropagation

PATCH = 8


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    torch.manual_seed(0)
    config = ClipConfig(name="drseg-tiny", weights=None, image_size=32, guidance_blocks=(0, 1), trainable="all")
    found = ClipEncoder(config)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found.double().eval()


@pytest.fixture(scope="module")
def prior() -> DinoPrior:
    return DinoPrior(DinoConfig(name="drseg-tiny", weights=None, image_size=32, normalization="imagenet")).double()


@pytest.fixture(scope="module")
def fine_prior() -> DinoPrior:
    """Its grid has half CLIP's cells again: 6 x 6 in a window of 4 x 4 patches."""
    return DinoPrior(DinoConfig(name="drseg-tiny", weights=None, image_size=48, normalization="imagenet")).double()


def image(height: int = 32, width: int = 32, batch: int = 2, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=random, dtype=torch.float64)


def normalised(clip: ClipEncoder, picture: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (picture - mean) / deviation


# text


def literal_word(clip: ClipEncoder, word: str, templates: Any) -> Tensor:
    """One prompt after the other through the text tower."""
    import open_clip

    total = torch.zeros(clip.embed_dim, dtype=torch.float64)
    for template in templates:
        tokens = open_clip.tokenize([template.format(word)], clip.text.context_length)
        with torch.no_grad():
            feature = clip.text(tokens)[0]
        total += feature / feature.norm() / len(templates)
    return total / total.norm()


def test_words_are_means_over_templates_normalised_twice(clip: ClipEncoder) -> None:
    text = encode_classes(clip, ["road", ["tree", "bush, high"], "car, lorry"], background=["sky", "wall"])
    words = ["road", "tree", "bush", "car", "lorry", "sky", "wall"]
    assert text.counts == (1, 2, 2, 2) and len(AERIAL_TEMPLATES) > 5
    assert text.embedding.dtype == torch.float64
    for word, found in zip(words, text.embedding, strict=True):
        torch.testing.assert_close(found, literal_word(clip, word, AERIAL_TEMPLATES))
    single = encode_classes(clip, ["road"], ["a {}"]).embedding
    torch.testing.assert_close(single[0], literal_word(clip, "road", ["a {}"]))
    assert (single[0] - text.embedding[0]).abs().max() > 1e-3


def test_the_best_word_of_a_class_counts(clip: ClipEncoder) -> None:
    text = encode_classes(clip, ["road", ["tree", "bush"]], background=["sky", "wall", "mud"])
    features = torch.randn(2, clip.embed_dim, 3, 4, dtype=torch.float64)
    found = class_logits(features, text)
    assert found.shape == (2, 3, 3, 4)
    groups = [[0], [1, 2], [3, 4, 5]]
    for b, label, y, x in np.ndindex(2, 3, 3, 4):
        expected = max(float(features[b, :, y, x] @ text.embedding[word]) for word in groups[label])
        assert math.isclose(float(found[b, label, y, x]), expected, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.promise("C4")
def test_logits_stay_in_single_precision_under_autocast() -> None:
    text = ClassText(F.normalize(torch.randn(3, 16), dim=1), (1, 2))
    features = torch.randn(1, 16, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        low = class_logits(features, text)
    assert low.dtype == torch.float32 and torch.equal(low, class_logits(features, text))
    assert class_logits(features.half(), text).dtype == torch.float32


# one image


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_products_of_dense_features_with_text(clip: ClipEncoder, prior: DinoPrior, variant: str) -> None:
    model = ZeroShot(clip, prior, variant=variant, options=DenseOptions(class_share=0.7, beta=0.5))
    picture, text = image(32, 48), model.encode(["road", "tree, bush"])
    found = model(picture, text)
    guide = F.interpolate(prior.maps(picture).features, (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found.prior, guide)
    expected = dense_features(
        clip.visual,
        normalised(clip, picture),
        variant,
        prior=guide if variant == "proxyclip" else None,
        options=DenseOptions(class_share=0.7, beta=0.5),
    )
    torch.testing.assert_close(found.features, expected)
    torch.testing.assert_close(found.logits, class_logits(expected, text))
    assert found.logits.shape == (2, 2, 4, 6)


class ColorPrior(nn.Module):
    """A prior that sees each cell alone, so that turning the image turns its features."""

    def maps(self, picture: Tensor) -> PriorMaps:
        return PriorMaps(torch.cat([F.avg_pool2d(picture, PATCH), F.max_pool2d(picture, PATCH)], dim=1) - 0.6, ())


@pytest.mark.parametrize("variant", ["naclip", "proxyclip", "segearth"])
def test_a_turned_image_has_turned_maps(clip: ClipEncoder, variant: str) -> None:
    prior: Any = ColorPrior()
    model, once = (ZeroShot(clip, prior, variant=variant, rotations=count) for count in (4, 1))
    picture = image()
    straight = model.maps(picture)
    for turn in range(1, 4):
        turned = model.maps(torch.rot90(picture, turn, (2, 3)))
        torch.testing.assert_close(turned.features, torch.rot90(straight.features, turn, (2, 3)))
        alone = once.maps(torch.rot90(picture, turn, (2, 3))).features
        # CLIP itself is not so: its position embedding does not turn
        assert (alone - torch.rot90(once.maps(picture).features, turn, (2, 3))).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("variant", ["sclip", "proxyclip"])
def test_rotations_are_the_mean_of_four_orientations(
    clip: ClipEncoder, prior: DinoPrior, variant: str, size: tuple[int, int]
) -> None:
    picture = image(*size)
    model = ZeroShot(clip, prior, variant=variant, rotations=4)
    text = model.encode(["road", "tree"])
    found = model(picture, text)
    expected = torch.zeros_like(found.logits)
    for turn in range(4):
        turned = torch.rot90(normalised(clip, picture), turn, (2, 3))
        guide = {"prior": torch.rot90(found.prior, turn, (2, 3))} if variant == "proxyclip" else {}
        logits = class_logits(dense_features(clip.visual, turned, variant, **guide), text)
        expected += torch.rot90(logits, -turn, (2, 3)) / 4
    # the mean of the logits is that of the features
    torch.testing.assert_close(found.logits, expected)


@pytest.mark.promise("C7")
@pytest.mark.parametrize("rotations", [1, 4])
def test_a_batch_is_its_images_one_by_one(clip: ClipEncoder, prior: DinoPrior, rotations: int) -> None:
    model = ZeroShot(clip, prior, variant="proxyclip", rotations=rotations)
    picture, text = image(batch=3), model.encode(["road", "tree"])
    together = model(picture, text)
    for b in range(3):
        for whole, alone in zip(together, model(picture[b : b + 1], text), strict=True):
            torch.testing.assert_close(whole[b : b + 1], alone)


def test_maps_on_the_grid_of_the_prior(clip: ClipEncoder, fine_prior: DinoPrior) -> None:
    picture = image()
    own = fine_prior.maps(picture).features
    found = ZeroShot(clip, fine_prior, variant="clearclip", grid="prior").maps(picture)
    torch.testing.assert_close(found.prior, own)
    plain = dense_features(clip.visual, normalised(clip, picture), "clearclip")
    torch.testing.assert_close(found.features, F.interpolate(plain, (6, 6), mode="bilinear", align_corners=False))
    proxy = ZeroShot(clip, fine_prior, variant="proxyclip", grid="prior").maps(picture).features
    torch.testing.assert_close(proxy, dense_features(clip.visual, normalised(clip, picture), "proxyclip", prior=own))


def test_nothing_is_trained(clip: ClipEncoder, prior: DinoPrior) -> None:
    model = ZeroShot(clip, prior)
    assert not model.train().training and not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    output = model(image().requires_grad_(), model.encode(["road"]))
    assert not any(part.requires_grad for part in output)


# windows


def mirrored(length: int, place: int) -> int:
    if length == 1:
        return 0
    while not 0 <= place < length:
        place = -place if place < 0 else 2 * (length - 1) - place
    return place


def literal_windows(
    model: ZeroShot, picture: Tensor, side: int, overlap: int, cell: int, equal: bool
) -> tuple[Tensor, Tensor]:
    """Window by window, cell by cell: weighted means of features and prior."""
    _, _, height, width = picture.shape
    shown = [math.ceil(length / cell) for length in (height, width)]
    cells = side // cell
    padded = [max(length, cells) * cell for length in shown]
    rows, columns = ([mirrored(old, i) for i in range(new)] for old, new in zip((height, width), padded, strict=True))
    picture = picture[:, :, rows][..., columns]
    step = side - overlap
    starts = [sorted({*range(0, length - side, step), length - side}) for length in padded]
    sums: dict[tuple[int, int, int], list[Any]] = {}
    for top in starts[0]:
        for left in starts[1]:
            maps = model.maps(picture[:, :, top : top + side, left : left + side])
            for y in range(cells):
                for x in range(cells):
                    weight = 1.0
                    for place in (y, x):
                        edge = min(place, cells - 1 - place) + 0.5
                        fall = math.sin(math.pi / 2 * min(edge / max(overlap // cell, 1), 1)) ** 2
                        weight *= 1.0 if equal else np.float32(max(fall, 1e-3))
                    for part in range(2):
                        key = (part, top // cell + y, left // cell + x)
                        sums.setdefault(key, []).append((weight, maps[part][:, :, y, x]))
    found = []
    for part in range(2):
        lines = []
        for y in range(shown[0]):
            line = [sums[part, y, x] for x in range(shown[1])]
            lines.append(torch.stack([sum(w * v for w, v in cell) / sum(w for w, _ in cell) for cell in line], dim=-1))
        found.append(torch.stack(lines, dim=-2))
    return found[0], found[1]


@pytest.mark.parametrize("blend", ["smooth", "equal"])
@pytest.mark.parametrize(
    ("size", "side", "overlap"),
    [((64, 48), 32, 16), ((50, 71), 32, 8), ((70, 33), 32, 24), ((20, 90), 32, 0), ((5, 7), 32, 16), ((1, 3), 16, 8)],
)
def test_windows_are_weighted_means(
    clip: ClipEncoder, prior: DinoPrior, size: tuple[int, int], side: int, overlap: int, blend: Any
) -> None:
    model, picture = ZeroShot(clip, prior, variant="clearclip"), image(*size)
    found = model.windows(picture, side, overlap, batch_size=3, blend=blend)
    assert found.features.shape[2:] == (math.ceil(size[0] / PATCH), math.ceil(size[1] / PATCH))
    expected = literal_windows(model, picture, side, overlap, PATCH, blend == "equal")
    for part, right in zip(found, expected, strict=True):
        torch.testing.assert_close(part, right, rtol=1e-6, atol=1e-6)


def test_windows_on_the_grid_of_the_prior(clip: ClipEncoder, fine_prior: DinoPrior) -> None:
    model = ZeroShot(clip, fine_prior, variant="proxyclip", grid="prior")
    # windows of 48 pixels have 6 x 6 cells of the prior and of CLIP, of 96 pixels 6 x 6 cells of 16 pixels
    for side, overlap, cell in ((48, 24, 8), (96, 48, 16)):
        picture = image(120, 100, batch=1)
        found = model.windows(picture, side, overlap)
        expected = literal_windows(model, picture, side, overlap, cell, False)
        assert found.prior.shape[2:] == (math.ceil(120 / cell), math.ceil(100 / cell))
        for part, right in zip(found, expected, strict=True):
            torch.testing.assert_close(part, right, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="side does not fit the grid; .* that divides into 6 cells, got 40"):
        model.windows(image(), 40, 0)


def test_one_window_is_the_whole_image_and_their_number_does_not_matter(clip: ClipEncoder, prior: DinoPrior) -> None:
    model, picture = ZeroShot(clip, prior, rotations=4), image()
    for part, whole in zip(model.windows(picture, 32, 16), model.maps(picture), strict=True):
        torch.testing.assert_close(part, whole)
    picture = image(64, 72)
    for part, other in zip(
        model.windows(picture, 32, 16, batch_size=1), model.windows(picture, 32, 16, batch_size=50), strict=True
    ):
        torch.testing.assert_close(part, other)


def test_the_whole_way_without_a_prior_and_with_one(clip: ClipEncoder, prior: DinoPrior) -> None:
    model = ZeroShot(clip)
    maps = model.windows(image(40, 64), 32, 16)
    assert maps.prior is None and maps.features.dtype == torch.float64
    model = ZeroShot(clip, prior, variant="proxyclip")
    text = model.encode(["roof", "road"], background=["sky"])
    maps = model.windows(image(40, 64), 32, 16)
    logits = class_logits(maps.features, text)
    smoothed = LabelPropagation(k=9, gamma=3.0)(logits, maps.prior)
    assert logits.shape == smoothed.shape == (2, 3, 5, 8)
    # what neighbours say brings neighbours together
    assert smoothed.diff(dim=3).square().sum() < logits.diff(dim=3).square().sum()


# what is refused


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda clip, prior: ZeroShot(clip, variant="best"), ValueError, "variant is unknown"),
        (lambda clip, prior: ZeroShot(clip, rotations=2), ValueError, "rotations is unknown"),
        (lambda clip, prior: ZeroShot(clip, prior, grid="own"), ValueError, "grid is unknown"),
        (lambda clip, prior: ZeroShot(clip, variant="proxyclip"), ValueError, "prior is missing"),
        (lambda clip, prior: ZeroShot(clip, grid="prior"), ValueError, "prior is missing"),
        (lambda clip, prior: ZeroShot(clip).maps(image(30)), ValueError, "pixels have a wrong shape"),
        (lambda clip, prior: ZeroShot(clip).maps(image()[0]), ValueError, "image has a wrong shape"),
        (lambda clip, prior: ZeroShot(clip).maps(image().byte()), TypeError, "image has a wrong dtype"),
        (lambda clip, prior: ZeroShot(clip).windows(image()[:0], 32, 16), ValueError, "image has a wrong shape"),
        (lambda clip, prior: ZeroShot(clip).windows(image(), 30, 16), ValueError, "side does not fit"),
        (lambda clip, prior: ZeroShot(clip).windows(image(), 32, 12), ValueError, "overlap does not fit"),
        (lambda clip, prior: ZeroShot(clip).windows(image(), 32, 32), ValueError, "overlap does not fit"),
        (lambda clip, prior: ZeroShot(clip).windows(image(), 32, 16, batch_size=0), ValueError, "batch_size"),
        (lambda clip, prior: ZeroShot(clip).windows(image(), 32, 16, blend="no"), ValueError, "blend is unknown"),
        (lambda clip, prior: encode_classes(clip, "road"), TypeError, "classes has a wrong type"),
        (lambda clip, prior: encode_classes(clip, ["road"], "a {}"), TypeError, "templates has a wrong type"),
        (lambda clip, prior: encode_classes(clip, []), ConfigError, "classes is empty"),
        (lambda clip, prior: encode_classes(clip, ["road"], []), ConfigError, "templates is empty"),
        (lambda clip, prior: encode_classes(clip, ["road", []]), ConfigError, "a class is empty"),
        (lambda clip, prior: encode_classes(clip, [""]), ConfigError, "name is empty"),
        (lambda clip, prior: encode_classes(clip, ["road"], ["a road"]), ConfigError, "template is not usable"),
        (
            lambda clip, prior: class_logits(image(), ClassText(torch.ones(1, 4), (1,))),
            ValueError,
            "features have a wrong shape",
        ),
    ],
)
def test_wrong_arguments_are_named_in_one_line(
    clip: ClipEncoder, prior: DinoPrior, call: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        call(clip, prior)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value) and "got" in str(caught.value)
