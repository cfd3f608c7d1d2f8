# SPDX-License-Identifier: Apache-2.0
"""``--method``: the comparison methods by the commands of everybody."""

from __future__ import annotations

import json

import pytest
import yaml

from drseg_core.config.methods import METHODS


@pytest.mark.parametrize("name", [name for name in METHODS if name != "drseg"])
def test_trains_and_evaluates(drseg, small, data, tmp_path, name):
    options = [word for word in small if word != "--config" and word != "tiny"]
    # --model.rotations belongs to the method here
    place = options.index("--model.rotations")
    del options[place : place + 2]
    code, _, err = drseg(
        "train", "--config", "tiny", "--method", name, *options, "--data", data, "--out", tmp_path / "r"
    )
    assert code == 0, err
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    for option, value in METHODS[name].options.items():
        found = config
        for part in option.split("."):
            found = found[part]
        assert found == value, option
    code, _, err = drseg("evaluate", tmp_path / "r", "--data", data, "--out", tmp_path / "m.json")
    assert code == 0, err
    assert json.loads((tmp_path / "m.json").read_text())["images"] == 3


def test_an_option_on_the_command_line_wins(drseg, data, tmp_path):
    words = ("--data", data, "--out", tmp_path / "r", "--print_config")
    for order in (("--method", "rskt", "--model.rotations", 1), ("--model.rotations", 1, "--method=rskt")):
        code, out, _ = drseg("train", "--config", "tiny", *order, *words)
        assert code == 0
        model = yaml.safe_load(out)["model"]
        assert model["rotations"] == 1 and model["fusion"]["branch"] == "prior" and model["aggregator"]["width"] == 24


def test_unknown_method(drseg, data, tmp_path):
    code, _, err = drseg("train", "--config", "tiny", "--method", "catsegg", "--data", data, "--out", tmp_path / "r")
    assert code == 2 and "name is unknown" in err.splitlines()[0] and "catseg" in err
    assert not (tmp_path / "r").exists()
