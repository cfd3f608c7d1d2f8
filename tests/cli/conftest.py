# SPDX-License-Identifier: Apache-2.0
"""A data set, a trained run, and the command in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from drseg_core.cli.main import main
from tests.forks import Fork

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.clip.image_size": 32,
    "model.dino.image_size": 32,
    "model.rotations": 1,
    "model.graph.k": 3,
    "model.spsd.prototypes_per_class": 5,
    "train.iterations": 2,
    "train.batch_size": 2,
    "train.crop_size": 32,
    "train.log_every": 1,
    "evaluation.tile_size": 32,
    "evaluation.overlap": 8,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Options that make the tiny preset smaller still."""
    return ["--config", "tiny", *(word for key, value in SMALL.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data") / "blocks"
    root.mkdir()
    (root / "classes.txt").write_text("bare soil\nred roof\nblue pond\n")
    color = np.array([[120, 100, 80], [200, 40, 40], [40, 60, 200]], np.uint8)
    for split in ("train", "val"):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for index in range(3):
            mask = np.kron(generator.integers(0, 3, (5, 5)), np.ones((8, 8), int)).astype(np.uint8)
            Image.fromarray(color[mask]).save(root / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def data(folder: Path) -> str:
    return f"folder:{folder}"


@pytest.fixture(scope="session")
def run(data: str, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", *small, "--data", data, "--out", str(out), "--device", "cpu"]) == 0
    return out


@pytest.fixture
def drseg(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``drseg("train", ...)`` in this process: exit code, stdout, stderr."""

    def call(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``process("train", ...)`` starts the command in a process of its own, which a test that fails does not leave."""
    running: list[subprocess.Popen[str]] = []

    def start(*words: Any) -> subprocess.Popen[str]:
        path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        started = subprocess.Popen(
            [sys.executable, "-m", "drseg_core", *map(str, words)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(started)
        return started

    yield start
    for started in running:
        with started:
            started.kill()


@pytest.fixture
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Fork]]:
    """``forked("train", ...)`` starts the command in a child of this process, which has all imports."""
    running: list[Fork] = []
    logs = tmp_path_factory.mktemp("said")

    def start(*words: Any) -> Fork:
        own = [logs / f"{len(running)}.{name}" for name in ("out", "err")]
        started = Fork(lambda: main([str(word) for word in words]), *own, seconds=300)
        running.append(started)
        return started

    yield start
    for started in running:
        started.kill()
        started.wait()
