# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from drseg_core.config.schema import EvaluationConfig
from drseg_core.data import Sample, SegmentationDataset
from drseg_core.data.dataset import class_names_hash
from drseg_core.data.palette import save_png
from drseg_core.errors import ConfigError, DatasetError
from drseg_core.evaluation.evaluate import evaluate
from drseg_core.evaluation.report import SheetRow, markdown_table, overlay_sheet
from tests.evaluation.fake import COLORS, ColorModel, color_image

NAMES = list(COLORS)


class Colors(SegmentationDataset):
    """Images that the color model reads perfectly, apart from planted errors in the truth."""

    class_names = ("ground", "roof", "meadow")

    def __init__(self, count: int = 5) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        size = (20, 24) if index % 3 else (18, 30)
        mask = torch.randint(0, 3, size, generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        image = color_image(mask)
        mask[0] = 255
        if index == 1:
            mask[:] = 255
        if index == 2:
            mask[1:3] = (mask[1:3] + 1) % 3
        return Sample(image, mask, f"{index}")

    def fingerprint(self) -> str:
        return "colors"


@pytest.mark.parametrize("mode", ["whole", "tile"])
def test_evaluate(mode):
    config = EvaluationConfig(mode=mode, tile_size=16, overlap=4, batch_size=2)
    subsets = {"roofs": [1], "none": [3]}
    result = evaluate(ColorModel(), NAMES, Colors(), config, subsets=subsets, progress=False)
    assert json.loads(json.dumps(result)) == result
    total = sum(int((s.mask != 255).sum()) for s in map(Colors().__getitem__, range(5)))
    confusion = np.array(result["confusion"])
    assert confusion.sum() == total and confusion.shape == (4, 4)
    assert math.isclose(result["pACC"], 100 * (total - 48) / total)
    assert 80 < result["mIoU"] < 100 and result["mIoU"] == result["mIoU_conventions"]["present"]
    assert result["mIoU_conventions"]["all"] < result["mIoU"]
    assert list(result["per_class"]) == NAMES and result["per_class"]["blue"] == {
        "iou": None, "accuracy": None, "pixels": 0,
    }  # fmt: skip
    assert result["subsets"]["roofs"]["mIoU"] == result["per_class"]["red"]["iou"]
    assert result["subsets"]["none"] == {"mIoU": None, "mACC": None, "classes": ["blue"]}
    assert result["images"] == 5 and result["images_all_ignored"] == 1 and result["ignored_pixels"] > 0


def test_nothing_to_score():
    class Ignored(Colors):
        def __getitem__(self, index: int) -> Sample:
            return super().__getitem__(1)

    result = evaluate(ColorModel(), NAMES, Ignored(1), progress=False)
    assert [result[key] for key in ("mIoU", "mACC", "fwIoU", "pACC")] == [None] * 4
    assert result["mIoU_conventions"] == {"present": None, "union": None, "all": None}
    assert list(result["per_class"]) == NAMES and result["images_all_ignored"] == 1


@pytest.mark.promise("C39")
def test_class_names_are_hashed():
    result = evaluate(ColorModel(), NAMES, Colors(1), progress=False)
    assert result["class_names_sha256"] == class_names_hash(NAMES) and len(class_names_hash(NAMES)) == 64
    other = evaluate(ColorModel(), NAMES[:3], Colors(1), progress=False)
    assert other["class_names_sha256"] != result["class_names_sha256"]


def test_refusals():
    with pytest.raises(ConfigError, match="class_names are too few; expected a name for each of 3 mask ids, got 2"):
        evaluate(ColorModel(), NAMES[:2], Colors(), progress=False)
    with pytest.raises(ConfigError, match="subset 'x' holds unknown ids"):
        evaluate(ColorModel(), NAMES, Colors(), subsets={"x": [4]}, progress=False)
    with pytest.raises(DatasetError, match="dataset is empty"):
        evaluate(ColorModel(), NAMES, Colors(0), progress=False)
    assert evaluate(ColorModel(), NAMES[:3], Colors(1), progress=False)["pACC"] == 100


def test_table():
    assert markdown_table([{"a": "x|y\nz", "b": 1.25}]) == "| a | b |\n|---|---:|\n| x\\|y z | 1.2 |\n"
    assert markdown_table([]) == "|  |\n||\n"


def test_overlay_sheet(tmp_path):
    from PIL import Image

    rows = [
        SheetRow(s.image, s.mask, None, s.mask.numpy(), torch.rand(s.mask.shape))
        for s in (Colors()[i] for i in range(2))
    ]
    sheet = overlay_sheet(rows, Colors.class_names, cell=64)
    assert sheet.dtype == np.uint8 and sheet.shape[0] == 24 + 2 * 68 and sheet.shape[1] > 4 * 68
    save_png(tmp_path / "sheet.png", sheet)
    assert np.array_equal(np.array(Image.open(tmp_path / "sheet.png")), sheet)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
