# SPDX-License-Identifier: Apache-2.0
"""A scene, its map by a small untrained model, and a browser that looks at pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from drseg_core.config.load import load_config, override
from drseg_core.evaluation.inference import Predictor
from drseg_core.models.build import build_model
from drseg_core.scenes.predict import predict_scene
from drseg_core.scenes.synthetic import write_synthetic_scene

SMALL = {
    "model.clip.image_size": 32,
    "model.dino.image_size": 32,
    "model.rotations": 1,
    "model.graph.k": 5,
    "model.graph.decay": 0.5,
}
NAMES = ["bare soil", "<script>alert(1)</script>", "pond"]
WIDTH, HEIGHT, SIDE, OVERLAP = 700, 600, 256, 64


class Mapped(NamedTuple):
    """A scene, its map, and what made it."""

    scene: Path
    map: Path
    predictor: Predictor


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Mapped:
    folder = tmp_path_factory.mktemp("mapped")
    scene = write_synthetic_scene(folder / "scene.tif", width=WIDTH, height=HEIGHT, collar=20)
    torch.manual_seed(0)
    model = build_model(override(load_config("tiny"), SMALL).model).eval()
    with torch.no_grad():
        # initial weights tell no two classes apart
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    words = [("bare soil",), ("roof",), ("pond",)]
    predictor = Predictor(model, NAMES[:1] + ["roof"] + NAMES[2:], synonyms=words, mode="tile", tile_size=SIDE)
    predictor.overlap = OVERLAP
    predict_scene(predictor, scene, folder / "map.tif", class_names=NAMES, scores=True, progress=False)
    return Mapped(scene, folder / "map.tif", predictor)


# no longer: its driver keeps an event loop running in this thread, which tests of other files cannot have
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, as Debian has it, without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install 'drseg[dev]')")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, timeout=120_000)
        yield opened
        opened.close()
