# SPDX-License-Identifier: Apache-2.0
"""A data set, a configuration and child processes small enough to train in a second."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drseg_core.config.load import load_config, override
from drseg_core.config.schema import Config

CLASSES = ("bare soil", "red roof", "blue pond")
COLORS = np.array([[120, 100, 80], [200, 40, 40], [40, 60, 200]])


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_folder(root: Path, *, images: int = 5, size: int = 40, block: int = 8, seed: int = 0) -> Path:
    """Blocks of colour that say their class, with a border that is ignored."""
    generator = np.random.default_rng(seed)
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for split in ("train", "val"):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for index in range(images):
            side = size // block
            mask = np.kron(
                (generator.integers(0, min(side, 3), (side, side)) + index) % 3, np.ones((block, block), int)
            )
            mask = mask.astype(np.uint8)
            image = COLORS[mask] + generator.integers(-20, 20, (*mask.shape, 3))
            mask[0] = 255
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"folder:{write_folder(tmp_path_factory.mktemp('data') / 'blocks')}"


@pytest.fixture(scope="session")
def plain_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of one class each, which a small model learns in a minute's share."""
    return f"folder:{write_folder(tmp_path_factory.mktemp('data') / 'plain', images=12, block=40)}"


@pytest.fixture(scope="session")
def partly_labelled_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five images, three of them without any label."""
    folder = write_folder(tmp_path_factory.mktemp("data") / "partly")
    for index in (0, 2, 3):
        Image.fromarray(np.full((40, 40), 255, np.uint8)).save(folder / "train" / "masks" / f"{index}.png")
    return f"folder:{folder}"


@pytest.fixture(scope="session")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"folder:{write_folder(tmp_path_factory.mktemp('data') / 'others', seed=1)}"


@pytest.fixture(scope="session")
def config() -> Config:
    """The tiny model at 32 pixels; dropout, so that the random generators matter."""
    return override(
        load_config("tiny"),
        {
            "model.clip.image_size": 32,
            "model.dino.image_size": 32,
            "model.rotations": 1,
            "model.graph.k": 3,
            "model.graph.dropout": 0.2,
            "model.spsd.prototypes_per_class": 5,
            "model.decoder.initial_logit": 0.0,
            "train.iterations": 6,
            "train.batch_size": 2,
            "train.crop_size": 32,
            "train.learning_rate": 1e-3,
            "train.gradient_clip": 1.0,
            "train.color_jitter": True,
            "train.warmup_iterations": 0,
            "train.checkpoint_every": 2,
            "train.log_every": 2,
        },
    )


@pytest.fixture
def fork() -> Iterator[Callable[..., int]]:
    """``fork(function)`` runs it in a child process; ``fork(function, kill_after=s)`` kills it then.

    Returns what ``waitpid`` tells: 0, the exit code, or minus the signal.
    """
    children: list[int] = []

    def run(function: Callable[[], object], *, kill_after: float | None = None) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        children.remove(child)
        return os.waitstatus_to_exitcode(status)

    yield run
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
