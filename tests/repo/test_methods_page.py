# SPDX-License-Identifier: Apache-2.0
"""docs/methods.md has every compared method, and the parameters that it really has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from drseg_core.config.load import load_config, override
from drseg_core.config.methods import METHODS, method_options, published_options
from drseg_core.models.build import build_model
from drseg_core.models.count import count_parameters

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
ENCODERS = ("clip", "dino", "remote", "total", "no_object", "logit_scale")


def rows() -> dict[str, list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {row[0]: row[1:] for row in table}


def test_every_method_is_there() -> None:
    assert (
        list(rows()) == [METHODS[name].title for name in ("catseg", "ovrs", "gsnet", "rskt", "sed", "san", "scan")]
        and len(METHODS) == 8
    )


@pytest.mark.parametrize("name", [name for name in METHODS if name != "drseg"])
def test_parameters(name: str) -> None:
    found = []
    for preset in ("vitb", "vitl"):
        config = load_config(preset)
        options = {**method_options(name), **published_options(name, config.model.clip.name)}
        if METHODS[name].published.prior == "v1":
            options.update({"model.dino.name": "vit_base_patch8_224", "model.dino.guidance_blocks": (3, 7)})
        model = override(config, options).model
        parts = {part: dataclasses.replace(getattr(model, part), weights=None) for part in ("clip", "dino", "remote")}
        with torch.device("meta"):
            counts = count_parameters(build_model(dataclasses.replace(model, **parts)))
        found.append(sum(count.total for part, count in counts.items() if part not in ENCODERS) / 1e6)
    text = rows()[METHODS[name].title][1].removesuffix(" M")
    digits = len(text.split(" / ")[0].partition(".")[2])
    assert text == " / ".join(f"{value:.{digits}f}" for value in found)
