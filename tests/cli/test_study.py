# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from drseg_core.studies.registry import STUDIES

SMALL = ("--quick", "--steps", "1", "--start-steps", "1")


def test_list(drseg):
    code, out, _ = drseg("study", "list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(STUDIES)
    assert {"channel-masking", "retention", "correlation-maps", "table1", "table6", "sweep-decay"} <= set(STUDIES)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", ["table2", "table4", "table6", "channel-masking", "retention", "activation-sparsity"])
def test_quick(drseg, out, name):
    code, printed, err = drseg("study", name, "--quick", "--out", out)
    assert code == 0, err
    content = json.loads((out / f"{name}.json").read_text())
    assert content["study"] == name and content["seeds"] == [0] and content["command"].startswith("drseg ")
    assert (out / f"{name}.md").read_text() in printed and (out / f"{name}.png").stat().st_size > 1000
    if name == "table4":
        cells = {cell["name"]: cell["scores"] for cell in content["cells"]}
        table2 = {cell["name"]: cell["scores"] for cell in json.loads((out / "table2.json").read_text())["cells"]}
        assert cells["ugaf"] == table2["all"] and cells["concat"] == table2["pdgr_spsd"]


def test_quick_maps(drseg, out):
    (out / "other.json").write_text("[]")
    code, printed, err = drseg("study", "correlation-maps", "--quick", "--out", out)
    assert code == 0, err
    assert "| source |" in printed and (out / "correlation-maps.png").stat().st_size > 1000
    index = (out / "index.md").read_text()
    assert "* [correlation-maps](correlation-maps.md): " in index and "other" not in index


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table9", "--out", "x"), "name is unknown"),
        (("table2",), "--out"),
        (("table2", "--out", "x", "--seeds", "a"), "seeds are not numbers"),
        (("table2", "--out", "x", "--jobs", "0"), "jobs is out of range"),
        (("table2", "--out", "x", "--steps", "0"), "steps is out of range"),
        (("table2", "--out", "x", "--data", "folder:y"), "tests are missing"),
    ],
)
def test_refusals(drseg, words, message):
    code, _, err = drseg("study", *words)
    assert code == 2 and message in err.splitlines()[0], err


def test_data_that_are_not_there_are_found_before_any_training(drseg, tmp_path):
    code, _, err = drseg("study", "table2", "--data", "folder:none", "--test", "folder:none", "--out", tmp_path / "out")
    assert code == 3 and "none" in err and not (tmp_path / "out").exists()


def test_an_out_that_is_no_folder(drseg, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = drseg("study", "table2", "--quick", "--out", out)
        assert code == 2 and "--out cannot be made" in err.splitlines()[0]


def test_a_configuration_that_is_another_method(drseg, tmp_path):
    path = tmp_path / "san.yaml"
    path.write_text("model: {proposals: {kind: side_adapter}}\n")
    code, _, err = drseg(
        "study", "table2", "--config", path, "--data", "folder:x", "--test", "folder:x", "--out", tmp_path
    )
    assert code == 2 and "comparison method" in err
