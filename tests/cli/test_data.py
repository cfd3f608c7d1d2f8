# SPDX-License-Identifier: Apache-2.0
"""``drseg data``, and every benchmark set's miniature through training and evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from drseg_core.data.benchmarks import BENCHMARKS
from drseg_core.data.protocols import PROTOCOLS
from tests.cli.test_exit_codes import check
from tests.data.miniatures import NAMES, save, write_raw, write_release
from tests.data.test_archives import zip_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The eight miniatures under one root."""
    folder = tmp_path_factory.mktemp("sets")
    for name in NAMES:
        write_release(name, folder, count=1)
    return folder


@pytest.fixture(scope="module")
def trained(root, small, tmp_path_factory):
    """A run on DLRSD."""
    from drseg_core.cli.main import main

    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *small, "--data", f"dlrsd:{root}", "--out", str(out), "--device", "cpu"]) == 0
    return out


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dlrsd"])
def test_every_set_trains(drseg, root, small, tmp_path, name):
    words = ["--train.iterations", 1, "--train.batch_size", 1, "--model.fusion.kind", "none", "--device", "cpu"]
    code, text, errors = drseg("train", *small, *words, "--data", f"{name}:{root}", "--out", tmp_path / "run")
    assert code == 0, errors
    assert f"--data {name}:{root} --split val" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_set_is_scored(drseg, trained, root, tmp_path, name):
    out = tmp_path / "m.json"
    code, text, errors = drseg("evaluate", trained, "--data", f"{name}:{root}", "--protocol", "clean", "--out", out)
    assert code == 0, errors
    result = json.loads(out.read_text())
    view = PROTOCOLS["clean"].sets[name]
    assert list(result["per_class"]) == list(view.class_names)
    assert result["data"]["split"] == view.split and f"protocol clean: split {view.split}" in text
    assert result["protocol"]["name"] == "clean" and result["protocol"]["views"]["edge"] == 640
    assert result["mIoU_convention"] == "present" and result["trained_on"] == f"dlrsd:{root}"


@pytest.mark.parametrize("protocol", ["rskt", "ovrs"])
def test_the_other_protocols(drseg, trained, root, tmp_path, protocol):
    out = tmp_path / "m.json"
    words = ["--data", f"vaihingen:{root}", "--protocol", protocol, "--out", out]
    assert drseg("evaluate", trained, *words)[0] == 0
    assert json.loads(out.read_text())["protocol"]["views"]["resize"] == {"rskt": "short", "ovrs": "square"}[protocol]


def test_the_mean_of_the_protocol_is_the_one_that_is_reported(drseg, trained, root, tmp_path, monkeypatch):
    from drseg_core.evaluation import evaluate as module

    original = module.evaluate

    def told_apart(*arguments, **options):
        # of a miniature, whose truth shows every class, all means are the same
        return {**original(*arguments, **options), "mIoU_conventions": {"present": 30.0, "union": 20.0, "all": 10.0}}

    monkeypatch.setattr(module, "evaluate", told_apart)
    out = tmp_path / "m.json"
    code, text, _ = drseg("evaluate", trained, "--data", f"loveda:{root}", "--protocol", "segearth", "--out", out)
    result = json.loads(out.read_text())
    assert code == 0 and result["mIoU_convention"] == "union" and len(result["per_class"]) == 7
    assert result["mIoU"] == 20.0 and "mIoU 20.00 %" in text
    assert result["ignored_pixels"] > 64


def test_splits_without_a_protocol(drseg, trained, root, tmp_path):
    for split in ("all", "train"):
        out = tmp_path / f"{split}.json"
        assert drseg("evaluate", trained, "--data", f"isaid:{root}", "--split", split, "--out", out)[0] == 0
        result = json.loads(out.read_text())
        assert result["data"]["split"] == split and result["protocol"] is None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--protocol", "mine"], 2, ["expected one of rskt, clean, ovrs, segearth"]),
        (["--protocol", "rskt", "--split", "val"], 2, ["--split is fixed by --protocol rskt"]),
        (["--protocol", "rskt", "--mode", "tile"], 2, ["--mode is fixed by --protocol rskt"]),
        (["--protocol", "rskt", "--tile-size", 32], 2, ["--tile-size is fixed"]),
        (["--protocol", "segearth"], 2, ["protocol segearth: set is not covered", "'dlrsd'"]),
        (["--split", "dev"], 2, ["split is unknown"]),
    ],
)
def test_protocol_refusals(drseg, trained, root, tmp_path, words, code, said):
    out = tmp_path / "m.json"
    check(drseg("evaluate", trained, "--data", f"dlrsd:{root}", "--out", out, *words), code, *said)
    assert not out.exists()


def test_clean_does_not_score_what_was_trained_on(drseg, root, small, tmp_path):
    run = tmp_path / "run"
    words = ["--train.iterations", 1, "--train.batch_size", 1, "--model.fusion.kind", "none"]
    assert drseg("train", *small, *words, "--data", f"udd5:{root}", "--out", run)[0] == 0
    out = tmp_path / "m.json"
    check(
        drseg("evaluate", run, "--data", f"udd5:{root}", "--protocol", "clean", "--out", out),
        2,
        "trained on udd5",
        "--split val",
    )
    assert drseg("evaluate", run, "--data", f"udd5:{root}", "--protocol", "rskt", "--out", out)[0] == 0


def test_prepare_then_check_then_read(drseg, tmp_path):
    write_raw("loveda", tmp_path / "raw")
    sets = tmp_path / "sets"
    code, text, errors = drseg("data", "prepare", "loveda", "--raw", tmp_path / "raw", "--out", sets)
    assert code == 0, errors
    assert " train 1 pairs" in text and f"next: drseg data check loveda {sets}" in text
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    code, text, errors = drseg("data", "check", "loveda", sheet.parent / "sets", "--out", report, "--sheet", sheet)
    assert code == 0, errors
    assert "train: 1 images, 1 masks; 1 of 40 x 48" in text and "4 files verified" in text
    assert json.loads(report.read_text())["problems"] == [] and Image.open(sheet).format == "PNG"
    check(drseg("data", "check", "loveda", sets, "--out", report), 2, "--out exists")
    check(drseg("data", "check", "loveda", sets, "--sheet", sheet), 2, "exists")
    assert drseg("data", "check", "loveda", sets, "--out", report, "--overwrite", "--split", "val")[0] == 0
    assert list(json.loads(report.read_text())["splits"]) == ["val"]


def test_prepare_with_other_patches(drseg, tmp_path):
    write_raw("potsdam", tmp_path / "raw")
    words = ["--raw", tmp_path / "raw", "--out", tmp_path / "sets", "--patch", 128, "--stride", 64, "--edges", "shift"]
    code, text, errors = drseg("data", "prepare", "potsdam", *words)
    # 300 x 530: 4 rows of 8
    assert code == 0 and "  val 32 pairs" in text, errors


@pytest.mark.promise("C49")
def test_check_says_all_that_is_wrong_and_is_3(drseg, tmp_path):
    root = write_release("udd5", tmp_path, splits=("val",), count=3)
    save(root / "UDD5/val/gt/val_0.png", np.full((32, 40), 9, np.uint8))
    (root / "UDD5/val/gt/val_1.png").unlink()
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    result = drseg("data", "check", "udd5", root, "--out", report, "--sheet", sheet)
    check(result, 3, "has 2 problems; the first: ")
    assert {finding["kind"] for finding in json.loads(report.read_text())["problems"]} == {"pair", "ids"}
    assert "problem: pair" in result[1] and "problem: ids" in result[1] and sheet.is_file()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["data"], 2, ["prepare,check"]),
        (["data", "fly"], 2, ["fly"]),
        (["data", "check", "dlrsd"], 2, ["drseg data check: error", "ROOT"]),
        (["data", "prepare", "dlrsd", "--raw", "x"], 2, ["drseg data prepare: error", "--out"]),
        (["data", "prepare", "dlrsd", "--raw", "x", "--out", "y", "--edges", "odd"], 2, ["edges", "odd"]),
        (["data", "prepare", "nope", "--raw", "x", "--out", "y"], 2, ["name is unknown", "dlrsd"]),
        (["data", "prepare", "dlrsd", "--raw", "x", "--out", "y"], 3, ["x is not a folder"]),
        (["data", "prepare", "potsdam", "--raw", "x", "--out", "y", "--patch", 3], 2, ["--patch"]),
        (["data", "check", "nope", "x"], 2, ["set is unknown"]),
        (["data", "check", "dlrsd", "x"], 3, ["x is not a folder"]),
    ],
)
def test_refusals(drseg, monkeypatch, tmp_path, words, code, said):
    monkeypatch.chdir(tmp_path)
    check(drseg(*words), code, *said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("C37")
def test_an_archive_that_climbs_out_is_3(drseg, tmp_path):
    (tmp_path / "raw").mkdir()
    zip_of(tmp_path / "raw/VDD.zip", ("../evil", b"1"))
    check(drseg("data", "prepare", "vdd", "--raw", tmp_path / "raw", "--out", tmp_path / "sets"), 3, "'../evil' climbs")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("action", ["", "prepare", "check"])
def test_help(drseg, action):
    code, text, _ = drseg("data", *filter(None, [action]), "--help")
    assert code == 0 and text.startswith(f"usage: drseg data {action}".rstrip()) and "examples:" in text
    assert "None" not in text
    if action:
        assert all(name in text for name in BENCHMARKS)


def test_an_error_inside_shows_where_with_debug(drseg, tmp_path):
    errors = drseg("data", "check", "dlrsd", tmp_path / "absent", "--debug")[2]
    assert errors.startswith("drseg: error") and "Traceback" in errors


@pytest.mark.parametrize("option", ["--field", "--background"])
def test_options_of_polygons_with_a_raster_of_labels_are_refused(drseg, tmp_path, option):
    # before all work: there is no file
    words = ["data", "tile", "scene.tif", "labels.tif", "--out", tmp_path / "set", option, "class"]
    said = f"data tile: {option} is for polygons; expected none with the raster labels.tif, got 'class'"
    check(drseg(*words), 2, said)
