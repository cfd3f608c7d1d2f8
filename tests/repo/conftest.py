# SPDX-License-Identifier: Apache-2.0
"""A folder that has what a reader of docstrings and pages has: data, a trained run, a scene, original archives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from drseg_core.checkpoints.pretrained import save_pretrained
from drseg_core.checkpoints.run import load_run
from drseg_core.config.load import override
from drseg_core.ops import _dispatch
from drseg_core.scenes.synthetic import write_synthetic_scene
from drseg_core.training.loop import train
from tests.checkpoints.test_pretrained import Hub
from tests.data.miniatures import write_raw, write_release
from tests.training.conftest import config, data

__all__ = ["config", "data"]


@pytest.fixture(scope="session")
def place(config, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "place"
    shutil.copytree(data.removeprefix("folder:"), folder / "data")
    run = train(override(config, {"train.iterations": 1}), data, folder / "run", device="cpu", show_progress=False)
    save_pretrained(load_run(run), folder / "folder")
    write_synthetic_scene(folder / "scene.tif", width=60, height=40)
    write_raw("udd5", folder / "raw")
    write_release("udd5", folder / "datasets")
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch) -> Iterator[None]:
    """A copy of the place as the current folder, one thread, and a hub that is not on any network."""
    shutil.copytree(place, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(huggingface_hub, "HfApi", type("Hub", (Hub,), {"asked": [], "store": tmp_path / "hub"}))
    # a backend that an example registers ends with it
    for name in ("_tables", "_names"):
        monkeypatch.setattr(_dispatch, name, type(getattr(_dispatch, name))(getattr(_dispatch, name)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    _dispatch.table.cache_clear()
