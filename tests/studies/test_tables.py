# SPDX-License-Identifier: Apache-2.0
"""What the variants of every study are: they build, they differ, and each sweep holds the default."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from drseg_core.checkpoints.packaged import DINOV2, packaged_file
from drseg_core.checkpoints.run import plain_config
from drseg_core.config.load import override
from drseg_core.errors import ConfigError
from drseg_core.models.build import build_model
from drseg_core.studies import figures, paper
from drseg_core.studies.setting import ScoredSet, Setting, make_setting
from drseg_core.studies.tables import training_study, training_study_names

NAMES = training_study_names()


@pytest.fixture(scope="module")
def quick() -> Setting:
    return make_setting(quick=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_builds_and_is_one_of_its_kind(quick, name):
    study = training_study(name, quick)
    assert (
        len({variant.name for variant in study.variants})
        == len({variant.title for variant in study.variants})
        == len(study.variants)
        > 1
    )
    configs = [quick.variant_config(dict(variant.options), 0) for variant in study.variants]
    assert len({json.dumps(plain_config(config)) for config in configs}) == len(configs)
    assert study.reference is None or study.reference in {variant.name for variant in study.variants}
    with torch.device("meta"):
        for config in configs:
            build_model(config.model)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("sweep-")])
def test_every_sweep_holds_the_paper_s_configuration(name):
    setting = make_setting("vitl", tests=["x=folder:x"], data="folder:x")
    study = training_study(name, setting)
    (option,) = study.variants[0].options
    default = override(setting.config, {})
    for part in option.split("."):
        default = getattr(default, part)
    assert default in [variant.options[option] for variant in study.variants]
    assert (study.axis is not None) == all(variant.value is not None for variant in study.variants)


def test_the_paper_s_numbers_agree_with_each_other():
    """The full model is one row of every table; gathered by hand, so a slip of a digit shows here."""
    full = paper.PaperRow(40.33, 52.09, 56.36)
    assert full == paper.TABLE2["all"] == paper.TABLE3["drseg_v3"] == paper.TABLE4["ugaf"]
    assert full == paper.TABLE5[0.5] == paper.TABLE6[75]
    assert max(row.miou for table in (paper.TABLE2, paper.TABLE4) for row in table.values()) == full.miou
    assert [row.miou for row in paper.TABLE2.values()] == sorted(row.miou for row in paper.TABLE2.values())


@pytest.mark.parametrize(
    ("trained_on", "clip", "miou", "macc"),
    [
        ("dlrsd", "ViT-B-16-quickgelu", 45.00, 60.42),
        ("dlrsd", "ViT-L-14-336", 49.01, 64.90),
        ("isaid", "ViT-B-16", 33.89, 55.30),
        ("isaid", "ViT-L-14-336", 37.84, 60.14),
        # what the paper does not have
        ("synthetic", "drseg-tiny", 49.01, 64.90),
    ],
)
def test_the_means_of_the_paper_s_table_1(trained_on, clip, miou, macc):
    rows, of = paper.table1(trained_on, clip, ["synthetic"])
    assert (rows["drseg"].miou, rows["drseg"].macc) == (miou, macc)
    assert rows["drseg"].sets is None and len(rows) == 8
    whole = paper.table1(trained_on, clip, paper.SETS[::-1])[0]
    assert (whole["drseg"].miou, whole["drseg"].macc) == (miou, macc) and len(whole["drseg"].sets) == 8
    assert of.endswith("mean over its eight sets")


def test_table_2_without_ugaf_is_no_row_of_table_4(quick):
    variants = {variant.name: variant for variant in training_study("table2", quick).variants}
    for name in ("pdgr", "pdgr_spsd"):
        assert variants[name].options["model.fusion.kind"] == "replace"
        assert paper.TABLE2[name] not in paper.TABLE4.values()
    readings = {variant.name: variant for variant in training_study("table2-readings", quick).variants}
    assert readings["pdgr_replace"].options == variants["pdgr"].options
    assert readings["pdgr_spsd_replace"].options == variants["pdgr_spsd"].options
    assert readings["pdgr_spsd_ungated"].options == {"model.fusion.gate": "none"}
    assert readings["pdgr_sum"].paper == paper.TABLE2["pdgr"] and len(readings) == 6


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ("table2", {"pdgr_k1": "pdgr", "all_k1": "all"}),
        ("table3", {"drseg_v1_k1": "drseg_v1", "drseg_v3_k1": "drseg_v3"}),
        ("table6", {"k_1": "k_75"}),
    ],
)
def test_tables_about_the_graph_have_a_row_without_one(quick, table, names):
    """It is the row beside it with the node alone, and none of the paper's."""
    study = training_study(table, quick)
    variants = {variant.name: variant for variant in study.variants}
    for name, beside in names.items():
        assert variants[name].paper is None and variants[name].title.endswith("K 1")
        assert variants[name].options == {**variants[beside].options, "model.graph.k": 1}
        assert quick.variant_config(dict(variants[name].options), 0).model.graph.k == 1
    assert "K 1 are none of the paper's" in study.note
    assert sum(variant.options.get("model.graph.k") == 1 for variant in study.variants) == len(names)


def test_other_priors_change_the_prior_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("DRSEG_CACHE", str(tmp_path))
    setting = make_setting()
    study = training_study("table2-priors", setting)
    rows = {variant.name: variant for variant in study.variants}
    own = rows["pdgr"].options
    assert rows["pdgr_k1"].options == {**own, "model.graph.k": 1}
    assert rows["pdgr_constant"].options == {**own, "model.dino.features": "constant"}
    real, without = rows["pdgr_dinov2"], rows["pdgr_dinov2_k1"]
    assert without.options == {**real.options, "model.graph.k": 1}
    changed = real.options.items() - own.items()
    assert all(name.startswith("model.dino.") for name, _ in changed)
    # the grid of the configuration's prior: 128 pixels in patches of 8 are 16, and so are 224 in patches of 14
    assert (
        real.options["model.dino.image_size"] == 224 and real.options["model.dino.name"] == "vit_small_patch14_dinov2"
    )
    assert real.why_not == without.why_not == "DINOv2 is not here (make real fetches it)"
    packaged_file(DINOV2.name).parent.mkdir(parents=True)
    packaged_file(DINOV2.name).touch()
    assert all(variant.why_not is None for variant in training_study("table2-priors", setting).variants)


def test_every_row_of_the_paper_s_table_1():
    """All means follow from their cells but two, so a slip of a digit shows here."""
    assert [list(methods) for methods in paper.TABLE1.values()] == 4 * [
        ["scan", "san", "sed", "catseg", "ovrs", "gsnet", "rskt", "drseg"]
    ]
    off = {}
    for key, methods in paper.TABLE1.items():
        for name, row in methods.items():
            assert len(row.miou) == len(row.macc) == len(paper.SETS)
            for metric, cells, mean in (("mIoU", row.miou, row.mean_miou), ("mACC", row.macc, row.mean_macc)):
                if abs(sum(cells) / 8 - mean) > 0.0111:
                    off[key, name, metric] = mean, round(sum(cells) / 8, 2)
    assert off == {
        (("dlrsd", "ViT-B"), "ovrs", "mACC"): (54.51, 54.39),
        (("dlrsd", "ViT-L"), "gsnet", "mIoU"): (44.56, 44.59),
    }
    assert {row[:3]: row[3:] for row in paper.misprinted_means()} == off
    assert paper.TABLE1["isaid", "ViT-B"]["rskt"].miou[paper.SETS.index("udd5")] == 13.94
    assert paper.TABLE1["dlrsd", "ViT-L"]["sed"].macc[paper.SETS.index("vaihingen")] == 58.62


def test_table_1_explains_table_3():
    """The printed rows of GSNet and RSKT-Seg over the four sets of Table 3 are its rows with RS-DINOv1."""
    rows, _ = paper.table1("dlrsd", "ViT-L-14-336", ["potsdam", "vdd", "uavid", "udd5"])
    for name in ("gsnet", "rskt"):
        other = paper.TABLE3[f"{name}_v1"]
        assert rows[name].miou == pytest.approx(other.miou, abs=0.011)
        assert rows[name].macc == pytest.approx(other.macc, abs=0.011)
    assert rows["drseg"].miou == pytest.approx(paper.TABLE3["drseg_v3"].miou, abs=0.011)


def test_the_paper_s_table_1_over_the_sets_that_are_scored():
    setting = make_setting("vitl", data="dlrsd:x", tests=["p=potsdam:x", "vdd:x"], protocol="rskt")
    study = training_study("table1", setting)
    found = {variant.name: variant.paper for variant in study.variants}
    assert found["drseg"].miou == pytest.approx((45.91 + 41.00) / 2, abs=0.006)
    assert found["sed"].macc == pytest.approx((37.95 + 51.34) / 2, abs=0.006)
    assert found["rskt"].sets == {"p": (37.14, 53.75), "vdd": (40.55, 58.75)}
    assert study.paper == "DLRSD, ViT-L, mean over potsdam, vdd"
    assert list(found)[-1] == "drseg" and len(found) == 8


def test_the_page_has_all_published_rows(quick):
    (section,) = [one for one in training_study("table1", quick).sections if one.title == "Table 1 as published"]
    assert len(section.rows) == 32
    sed = next(row for row in section.rows if row["method"] == "SED" and row["backbone"] == "ConvNeXt-L")
    assert (sed["trained on"], sed["vdd"], sed["mean"]) == ("DLRSD", "32.53 / 51.34", "40.18 / 53.13")
    assert "OVRS, DLRSD, ViT-B, mACC: 54.51 (of its cells 54.39)" in section.note
    assert "GSNet, DLRSD, ViT-L, mIoU: 44.56 (of its cells 44.59)" in section.note


class TestTable1:
    """Each method with its published prior and sizes; --matched gives all the configuration's."""

    @pytest.mark.parametrize(("backbone", "layers"), [("vitb", 3), ("vitl", 2)])
    def test_every_method_has_its_own(self, backbone, layers):
        setting = make_setting(
            backbone, data="dlrsd:x", tests=["potsdam:x"], prior_v1="w/RSIB.pth", remote_clip="w/remote.pt"
        )
        study = training_study("table1", setting)
        assert not any(variant.why_not for variant in study.variants)
        model = {one.name: setting.variant_config(dict(one.options), 0).model for one in study.variants}
        assert {name: one.dino.weights for name, one in model.items() if one.fusion.kind != "none"} == {
            "gsnet": "w/RSIB.pth",
            "rskt": "w/RSIB.pth",
            "drseg": "pretrained",
        }
        assert model["rskt"].dino.normalization == "clip" and model["rskt"].dino.guidance_blocks == (3, 7)
        sizes = {name: dataclasses.astuple(one.aggregator)[1:5] for name, one in model.items()}
        assert sizes["rskt"] == (layers, 128, 8, 384)
        assert sizes["catseg"] == sizes["ovrs"] == sizes["gsnet"] == (2, 128, 4, 512)
        assert sizes["sed"][:3] == (2, 128, 4) and model["drseg"] == setting.config.model
        assert [name for name, one in model.items() if one.decoder.remote_clip] == ["rskt"]
        assert (model["rskt"].remote.name, model["rskt"].remote.weights) == ("ViT-B-32-quickgelu", "w/remote.pt")
        (section,) = [one for one in study.sections if one.title == "What each method has"]
        row = {one["method"]: one for one in section.rows}["RSKT-Seg"]
        assert (row["prior"], row["layers"], row["heads"], row["MLP"], row["RemoteCLIP"]) == (
            "vit_base_patch8_224, RSIB.pth",
            str(layers),
            "8",
            "384",
            "ViT-B-32-quickgelu, remote.pt",
        )
        none = {"weights": None}
        for name in ("catseg", "gsnet", "rskt"):
            parts = {part: dataclasses.replace(getattr(model[name], part), **none) for part in ("clip", "dino")}
            remote = dataclasses.replace(model[name].remote, **none)
            with torch.device("meta"):
                built = build_model(dataclasses.replace(model[name], **parts, remote=remote))
            assert (built.remote is None) == (name != "rskt") and len(built.aggregator.spatial) == sizes[name][0]

    def test_what_is_not_given_is_not_run(self):
        setting = make_setting("vitl", data="dlrsd:x", tests=["potsdam:x"])
        study = training_study("table1", setting)
        reasons = {variant.name: variant.why_not for variant in study.variants if variant.why_not}
        assert list(reasons) == ["gsnet", "rskt"] and "--remote-clip" not in reasons["gsnet"]
        assert "--prior-v1" in reasons["rskt"] and "--remote-clip" in reasons["rskt"]
        row = {one["method"]: one for one in study.sections[0].rows}["RSKT-Seg"]
        assert row["prior"] == "vit_base_patch8_224, not given"

    @pytest.mark.parametrize(("trained_on", "layers"), [("dlrsd", 5), ("isaid", 3)])
    def test_layers_of_the_released_weights(self, trained_on, layers):
        given = {"data": f"{trained_on}:x", "tests": ["potsdam:x"], "prior_v1": "RSIB.pth", "remote_clip": "remote.pt"}
        setting = make_setting("vitb", released=True, **given)
        study = training_study("table1", setting)
        options = {variant.name: variant.options for variant in study.variants}
        assert options["rskt"]["model.aggregator.layers"] == layers
        plain = training_study("table1", make_setting("vitb", **given))
        assert {one.name: one.options for one in plain.variants if one.name != "rskt"} == {
            name: own for name, own in options.items() if name != "rskt"
        }
        assert "released weights;" in study.sections[0].note and "(--released)" in plain.sections[0].note
        assert setting.suffix == "-released"

    def test_matched_methods_have_what_the_configuration_has(self):
        setting = make_setting("vitb", data="dlrsd:x", tests=["potsdam:x"], prior_v1="RSIB.pth", matched=True)
        study = training_study("table1", setting)
        for variant in study.variants:
            model = setting.variant_config(dict(variant.options), 0).model
            assert variant.why_not is None and model.dino == setting.config.model.dino
            own = dataclasses.replace(model.aggregator, kind=setting.config.model.aggregator.kind)
            assert own == setting.config.model.aggregator and not model.decoder.remote_clip
        assert "--matched" in study.sections[0].note and setting.suffix == "-matched"
        assert make_setting(matched=True, prior_steps=1).suffix == "-matched-taught" and not make_setting().suffix


def test_the_figure_has_the_published_sets(quick, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    study = training_study("table1", quick)
    figures.draw_training_study(study, {"drseg": {0: {"source": {"mIoU": 1.0}}}}, tmp_path / "x.png")
    (figure,) = drawn
    shown = {axis.get_title(): [text.get_text() for text in axis.texts] for axis in figure.axes if axis.texts}
    last = study.published["DR-Seg"]
    for name, values in (("mIoU", last.miou), ("mACC", last.macc)):
        cells = shown[f"{name} in the paper (DLRSD, ViT-L), %"]
        assert len(cells) == 8 * 8 and cells[-8:] == [f"{value:.2f}" for value in values]
    figures.pyplot().close(figure)


def test_what_a_sweep_is_compared_with_is_the_configuration(quick):
    assert training_study("sweep-neighbours", quick).reference == "neighbours_33"
    full = make_setting("vitl", tests=["x=folder:x"], data="folder:x")
    assert training_study("sweep-neighbours", full).reference == "neighbours_75"
    other = dataclasses.replace(quick, config=override(quick.config, {"model.graph.k": 7}))
    assert training_study("sweep-neighbours", other).reference is None


@pytest.mark.parametrize(
    ("name", "option", "first", "others"),
    [
        ("edge-temperature", "edge_temperature", None, [1.0, 0.3, 0.1, 0.03]),
        ("edge-decay", "edge_decay", None, [0.5, 2.0, 8.0]),
        ("neighbour-share", "k", 33, [0.01, 0.03, 0.06, 0.13, 0.3]),
    ],
)
def test_options_of_the_start_are_compared_with_what_is_configured(quick, name, option, first, others):
    study = training_study(f"sweep-{name}", quick)
    found = [variant.options[f"model.graph.{option}"] for variant in study.variants]
    assert found == [first, *others] and study.reference == study.variants[0].name
    assert getattr(quick.config.model.graph, option) == first


def test_a_residual_that_starts_as_the_input(quick):
    study = training_study("sweep-residual-start", quick)
    configs = [quick.variant_config(dict(variant.options), 0).model.graph for variant in study.variants]
    assert [(graph.residual, graph.norm_scale) for graph in configs] == [
        (False, 1.0),
        (True, 1.0),
        (True, 0.0),
        (False, "match"),
    ]
    assert study.reference == study.variants[0].name
    residual = dataclasses.replace(quick, config=override(quick.config, {"model.graph.residual": True}))
    assert training_study("sweep-residual-start", residual).reference is None


def test_blocks_of_the_prior(quick):
    assert [variant.options["model.dino.layer"] for variant in training_study("sweep-dino-layer", quick).variants] == [
        None,
        0,
    ]
    full = make_setting("vitl", tests=["x=folder:x"], data="folder:x")
    variants = training_study("sweep-dino-layer", full).variants
    assert [variant.options["model.dino.layer"] for variant in variants] == [None, 17, 11, 5]


def test_a_second_clip_that_is_not_there(quick):
    full = make_setting("vitl", tests=["x=folder:x"], data="folder:x")
    reasons = [variant.why_not for variant in training_study("sweep-remote-clip", full).variants]
    assert reasons[0] is None and "--remote-clip" in reasons[1]
    full = dataclasses.replace(full, remote_clip="remote.pt")
    variants = training_study("sweep-remote-clip", full).variants
    assert variants[1].why_not is None and variants[1].options["model.remote.weights"] == "remote.pt"
    full = dataclasses.replace(full, remote_clip=None)
    given = dataclasses.replace(full, config=override(full.config, {"model.remote.weights": "remote.pt"}))
    assert all(variant.why_not is None for variant in training_study("sweep-remote-clip", given).variants)
    assert quick.start_config(0).model.decoder.remote_clip is False


def test_a_prior_that_is_not_there(quick):
    full = make_setting("vitl", tests=["x=folder:x"], data="folder:x")
    reasons = {variant.name: variant.why_not for variant in training_study("table3", full).variants}
    assert "--prior-v1" in reasons["drseg_v1"] and reasons["drseg_v3"] is None
    given = dataclasses.replace(full, prior_v1="rsib.pth")
    variants = {variant.name: variant for variant in training_study("table3", given).variants}
    assert variants["drseg_v1"].why_not is None and variants["drseg_v1"].options["model.dino.weights"] == "rsib.pth"
    assert all(variant.why_not is None for variant in training_study("table3", quick).variants)


class TestSetting:
    def test_published_weights_need_no_start(self):
        setting = make_setting("vitb", data="dlrsd:data", tests=["potsdam:data"])
        assert not setting.needs_start and setting.tests == (ScoredSet("potsdam", "potsdam:data"),)
        config = setting.variant_config({"model.graph.k": 20}, seed=3)
        assert config.train.iterations == 30_000 and config.train.batch_size == 8 and config.seed == 3
        assert config.train.clip_learning_rate_scale == 0.01 and config.model.graph.k == 20

    @pytest.mark.parametrize(
        ("protocol", "unlabelled"), [("rskt", "negative"), ("clean", "left_out"), (None, "left_out")]
    )
    def test_images_without_a_label_are_what_they_are_in_the_protocol_s_code(self, protocol, unlabelled):
        setting = make_setting("vitb", data="dlrsd:data", tests=["potsdam:data"], protocol=protocol)
        assert setting.variant_config({}, 0).train.unlabelled == unlabelled
        assert setting.variant_config({"train.unlabelled": "left_out"}, 0).train.unlabelled == "left_out"

    def test_random_weights_start_from_a_dual_encoder(self):
        setting = make_setting()
        assert setting.needs_start and setting.start_config(1).model.fusion.kind == "cosine"
        assert setting.start_config(1).train.iterations == 1500 and setting.start_config(1).seed == 1
        assert setting.variant_config({}, 1).train.iterations == 300
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
