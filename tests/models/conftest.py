# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from drseg_core.config.load import load_config
from drseg_core.config.schema import ModelConfig
from drseg_core.models.build import build_model
from drseg_core.models.drseg import DRSeg


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """The tiny preset on 64 px images, an 8 x 8 grid."""
    config = load_config("tiny").model
    return dataclasses.replace(
        config,
        clip=dataclasses.replace(config.clip, image_size=64),
        dino=dataclasses.replace(config.dino, image_size=64),
        graph=dataclasses.replace(config.graph, k=9),
    )


@pytest.fixture
def tiny(tiny_config: ModelConfig) -> DRSeg:
    return build_model(tiny_config)


@pytest.fixture
def variant(tiny_config: ModelConfig):
    """``variant("fusion", kind="mean")``: the tiny configuration with options of one part replaced."""

    def make(part: str | None = None, **options: Any) -> ModelConfig:
        if part is None:
            return dataclasses.replace(tiny_config, **options)
        return dataclasses.replace(tiny_config, **{part: dataclasses.replace(getattr(tiny_config, part), **options)})

    return make
