# SPDX-License-Identifier: Apache-2.0
"""What the cells of every study are: they build, they differ, and each sweep holds the default."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from drseg_core.config.load import override
from drseg_core.errors import ConfigError
from drseg_core.models.build import build_model
from drseg_core.studies import paper
from drseg_core.studies.setting import ScoredSet, Setting, make_setting
from drseg_core.studies.tables import training_study, training_study_names
from drseg_core.training.run import plain_config

NAMES = training_study_names()


@pytest.fixture(scope="module")
def quick() -> Setting:
    return make_setting(quick=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_builds_and_is_one_of_its_kind(quick, name):
    study = training_study(name, quick)
    assert len({cell.name for cell in study.cells}) == len({cell.title for cell in study.cells}) == len(study.cells) > 1
    configs = [quick.cell_config(dict(cell.options), 0) for cell in study.cells]
    assert len({json.dumps(plain_config(config)) for config in configs}) == len(configs)
    assert study.reference is None or study.reference in {cell.name for cell in study.cells}
    with torch.device("meta"):
        for config in configs:
            build_model(config.model)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("sweep-")])
def test_every_sweep_holds_the_paper_s_configuration(name):
    setting = make_setting("vitl", tests=["x=folder:x"], data="folder:x")
    study = training_study(name, setting)
    (option,) = study.cells[0].options
    default = override(setting.config, {})
    for part in option.split("."):
        default = getattr(default, part)
    assert default in [cell.options[option] for cell in study.cells]
    assert (study.axis is not None) == all(cell.value is not None for cell in study.cells)


def test_the_paper_s_numbers_agree_with_each_other():
    """The full model is one row of every table; gathered by hand, so a slip of a digit shows here."""
    full = paper.PaperRow(40.33, 52.09, 56.36)
    assert full == paper.TABLE2["all"] == paper.TABLE3["drseg_v3"] == paper.TABLE4["ugaf"]
    assert full == paper.TABLE5[0.5] == paper.TABLE6[75]
    assert max(row.miou for table in (paper.TABLE2, paper.TABLE4) for row in table.values()) == full.miou
    assert [row.miou for row in paper.TABLE2.values()] == sorted(row.miou for row in paper.TABLE2.values())


def test_a_prior_that_is_not_there(quick):
    full = make_setting("vitl", tests=["x=folder:x"], data="folder:x")
    reasons = {cell.name: cell.why_not for cell in training_study("table3", full).cells}
    assert "--prior-v1" in reasons["drseg_v1"] and reasons["drseg_v3"] is None
    given = dataclasses.replace(full, prior_v1="rsib.pth")
    cells = {cell.name: cell for cell in training_study("table3", given).cells}
    assert cells["drseg_v1"].why_not is None and cells["drseg_v1"].options["model.dino.weights"] == "rsib.pth"
    assert all(cell.why_not is None for cell in training_study("table3", quick).cells)


class TestSetting:
    def test_published_weights_need_no_start(self):
        setting = make_setting("vitb", data="dlrsd:data", tests=["potsdam:data"])
        assert not setting.needs_start and setting.tests == (ScoredSet("potsdam", "potsdam:data"),)
        config = setting.cell_config({"model.graph.k": 20}, seed=3)
        assert config.train.iterations == 30_000 and config.train.batch_size == 8 and config.seed == 3
        assert config.train.clip_learning_rate_scale == 0.01 and config.model.graph.k == 20

    def test_random_weights_start_from_a_dual_encoder(self):
        setting = make_setting()
        assert setting.needs_start and setting.start_config(1).model.fusion.kind == "cosine"
        assert setting.start_config(1).train.iterations == 1500 and setting.start_config(1).seed == 1
        assert setting.cell_config({}, 1).train.iterations == 300
        assert [test.name for test in setting.tests] == ["source", "shifted"]
        assert "domain=shifted" in setting.tests[1].spec and "domain" not in setting.data

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"data": "folder:x"}, "tests are missing"),
            ({"tests": ["a=folder:x", "a=folder:y"]}, "one name"),
            ({"seeds": (1, 1)}, "seeds are not usable"),
            ({"seeds": ()}, "seeds are not usable"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ConfigError, match=message):
            make_setting(**options)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("potsdam:data", ScoredSet("potsdam", "potsdam:data")),
            ("mine=folder:tiles", ScoredSet("mine", "folder:tiles")),
            ("synthetic:seed=1,scenes=2", ScoredSet("synthetic", "synthetic:seed=1,scenes=2")),
        ],
    )
    def test_names_of_test_sets(self, text, expected):
        assert make_setting(tests=[text]).tests == (expected,)
