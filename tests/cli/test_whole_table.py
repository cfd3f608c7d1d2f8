# SPDX-License-Identifier: Apache-2.0
"""All of Table 1 by one command, on miniatures of all sets: what is missing, how long it takes, and its page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from drseg_core.errors import ConfigError
from drseg_core.studies import expected_time, needs, paper, runner
from drseg_core.studies.expected_time import expected_seconds
from drseg_core.studies.plan import PlannedVariant, plan, plan_variant
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import training_study
from drseg_core.studies.whole_table import whole_table
from tests.data.miniatures import NAMES, write_release
from tests.studies.in_memory import learn_in_memory


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The eight miniatures under one root."""
    folder = tmp_path_factory.mktemp("sets")
    for name in NAMES:
        splits = ("train", "val", "all") if name in paper.TRAINED_ON else ("all",)
        write_release(name, folder, splits=splits, count=1)
    return folder


def settings(root: Path | str, **options) -> list[Setting]:
    return whole_table(
        "vitb,vitl", f"isaid:{root},dlrsd:{root}", str(root), **{"protocol": "rskt", "seeds": (0,), **options}
    )


def test_parts_are_in_the_paper_s_order() -> None:
    parts = settings("x")
    assert [one.part for one in parts] == ["dlrsd-vitb", "dlrsd-vitl", "isaid-vitb", "isaid-vitl"]
    assert [one.suffix for one in parts][0] == "-dlrsd-vitb" and all(len(one.tests) == 8 for one in parts)
    for one, key in zip(parts, paper.TABLE1, strict=True):
        published = training_study("table1", one).published
        assert published["DR-Seg"] == paper.TABLE1[key]["drseg"]
    clips = {
        variant.name: variant.options.get("model.clip.name") for variant in training_study("table1", parts[1]).variants
    }
    assert clips["sed"] == "convnext_large_d_320" and clips["catseg"] is None


@pytest.mark.parametrize(
    ("configs", "train", "message"),
    [
        ("vitb", "potsdam:x", "--train is no training set of Table 1"),
        ("tiny", "dlrsd:x", "Table 1 has no backbone drseg-tiny"),
        ("vitb,vitb", "dlrsd:x", "dlrsd and ViT-B are named twice"),
    ],
)
def test_refusals(configs: str, train: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        whole_table(configs, train, "x", protocol="rskt")


class TestNeeds:
    def test_an_empty_folder_needs_everything(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(needs, "located", lambda source: None)
        found = needs.needs(settings(tmp_path))
        assert not any(need.found for need in found)
        text = needs.text(found)
        for folder in ("DLRSD_split/train/imgs", "iSAID_split/train/D2masks", "UDD5/all/src", "VDD/gt", "uavid/Labels"):
            assert f"{tmp_path}/{folder}/*" in text
        for name in ("DLRSD/imgs", "iSAID/imgs", "Potsdam/imgs", "Vaihingen/imgs", "LoveDA/images_png"):
            assert f"{tmp_path}/{name}/*" in text
        for file in ("RSIB.pth", "RemoteCLIP-ViT-B-32.pt", "open_clip_model.safetensors", "--prior-v1 FILE"):
            assert file in text
        for name in ("ViT-B-16", "ViT-L-14-336", "convnext_base_w_320", "convnext_large_d_320", "dinov3.sat493m"):
            assert name in text
        assert text.endswith("17 of 17 missing") and text.count("https://") >= 17

    def test_what_is_there_is_found(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(needs, "located", lambda source: tmp_path)
        for name in ("RSIB.pth", "remote.pt"):
            (tmp_path / name).touch()
        given = {"prior_v1": str(tmp_path / "RSIB.pth"), "remote_clip": str(tmp_path / "remote.pt")}
        assert needs.text(needs.needs(settings(root, **given))).endswith("all 17 are here")
        given["prior_v1"] = str(tmp_path / "other.pth")
        missing = [need.what for need in needs.needs(settings(root, **given)) if not need.found]
        assert missing == ["prior vit_base_patch8_224"]

    def test_random_encoders_need_no_weights(self, root: Path) -> None:
        assert all(need.found for need in needs.needs(settings(root, quick=True)))
        assert len(needs.needs(settings(root, quick=True))) == 10

    def test_the_command(self, drseg, tmp_path: Path) -> None:
        words = ("--config", "vitb", "--train", f"dlrsd:{tmp_path}", "--test-all", tmp_path, "--out", tmp_path / "out")
        code, printed, err = drseg("study", "table1", *words, "--check")
        assert code == 3 and "missing  DLRSD, train: " in printed and "needs are missing" in err.splitlines()[-1]
        assert not (tmp_path / "out").exists()
        # without --check it stops before any training, too
        code, _, err = drseg("study", "table1", *words)
        assert code == 3 and "DLRSD_split/train" in err and not (tmp_path / "out").exists()


class TestTime:
    @pytest.fixture
    def planned(self, root: Path, tmp_path: Path) -> list[PlannedVariant]:
        setting = settings(root, quick=True, steps=3)[0]
        return list(plan(setting, training_study("table1", setting).variants, tmp_path))

    def test_steps_and_images_of_what_is_left(self, planned, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(expected_time, "_measured", lambda *given: asked.append(given) or (2.0, 0.5))
        # eight sets of one image, 17 classes at most; DLRSD and iSAID have one in each of their folders for all
        assert expected_seconds(planned, 1) == 8 * (3 * 2.0 + 8 * 0.5) == 2 * expected_seconds(planned, 2)
        assert {classes for _, classes, _ in asked} == {17}
        planned[0].folder.mkdir(parents=True)
        (planned[0].folder / runner.SCORES).write_text("{}")
        assert expected_seconds(planned, 1) == 7 * (3 * 2.0 + 8 * 0.5)
        count = len(asked)
        assert expected_seconds([*planned, *planned], 1) == 14 * 10.0 and len(asked) == count + 7

    def test_every_method_is_measured(self, planned) -> None:
        seconds = [expected_seconds([item], 1) for item in planned]
        assert all(0 < one < 60 for one in seconds) and len(set(seconds)) == 8


def _device(item: PlannedVariant) -> str | None:
    return item.setting.device


def test_processes_are_shared_out_over_devices(root: Path, tmp_path: Path) -> None:
    setting = settings(root, quick=True)[0]
    item = plan_variant(setting, training_study("table1", setting).variants[0], 0, tmp_path)
    tasks: list[runner.Task] = [(_device, (item,))] * 4
    assert [outcome.result for _, outcome in runner.run_tasks(tasks, 1, ["cpu"])] == 4 * ["cpu"]
    # a name that says which process it was
    found = {outcome.result for _, outcome in runner.run_tasks(tasks, 1, ["cpu", "cpu:0"])}
    assert found == {"cpu", "cpu:0"}
    assert item.on("cpu").folder == item.folder and setting.device is None


def test_the_whole_command_on_miniatures(drseg, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # trained for real on DLRSD, with a CLIP of either kind; every method is in the study of its own
    run = runner.run_variant

    def some(planned: PlannedVariant) -> dict[str, Any]:
        whole = "dlrsd" in planned.setting.part and planned.variant.name in ("drseg", "sed")
        return (run if whole else learn_in_memory)(planned)

    monkeypatch.setattr(runner, "run_variant", some)
    words = ["study", "table1", "--config", "vitb,vitl", "--train", f"dlrsd:{root},isaid:{root}", "--test-all", root]
    words += ["--out", tmp_path, "--quick", "--steps", "1", "--start-steps", "1", "--devices", "cpu"]
    code, printed, err = drseg(*words)
    assert code == 0, err
    assert "about " in err and "without reading and optimiser" in err
    page = (tmp_path / "table1.md").read_text()
    assert page in printed and "This is a quick run" in page
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    published = [row for row in rows if row[3] == "paper"]
    here = {(*row[:3],): row[4:] for row in rows if row[3] == "here"}
    assert len(published) == len(here) == 32
    assert published[-1] == [
        *("iSAID", "ViT-L", "DR-Seg", "paper"),
        *("29.67 / 52.90", "28.89 / 56.55", "18.90 / 36.98", "31.98 / 64.06", "94.61 / 97.02", "30.52 / 53.56"),
        *("33.42 / 59.82", "34.75 / 60.23", "37.84 / 60.14"),
    ]
    content = json.loads((tmp_path / "table1-dlrsd-vitl.json").read_text())
    (drseg_row,) = [one for one in content["variants"] if one["name"] == "drseg"]
    uavid = drseg_row["scores"]["0"]["uavid"]
    assert here["DLRSD", "ViT-L", "DR-Seg"][2] == f"{uavid['mIoU']:.1f} / {uavid['mACC']:.1f}"
    assert all(cells[-1].replace(".", "").replace(" / ", "").isdigit() for cells in here.values())
    assert "OVRS, " in page and "do not follow from their cells" in page
    assert {path.name for path in tmp_path.glob("table1*.md")} == {
        "table1.md",
        *(f"table1-{trained_on}-{backbone}.md" for trained_on in ("dlrsd", "isaid") for backbone in ("vitb", "vitl")),
    }
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/scores.json")}
    # of two training sets; the smallest encoders stand for both backbones
    assert len(kept) == 16
    assert drseg(*words)[0] == 0 and kept == {path: path.stat().st_mtime_ns for path in kept}


def test_options_of_the_whole_table(drseg, tmp_path: Path) -> None:
    given = ("--train", "dlrsd:x", "--test-all", "x", "--out", tmp_path / "out")
    for words, message in (
        (("table2", *given), "are for the whole of table1"),
        (("table1", "--train", "dlrsd:x", "--out", "x"), "are for the whole of table1"),
        (("table1", *given, "--data", "dlrsd:x"), "are for the whole of table1"),
        (("table1", "--check", "--out", "x"), "are for the whole of table1"),
        (("table1", *given, "--device", "cpu", "--devices", "cpu"), "--device and --devices exclude each other"),
        (("table1", *given, "--devices", "nought"), "name is unknown"),
        (("retention", "--quick", "--devices", "cpu", "--out", tmp_path / "out"), "devices do not belong to retention"),
    ):
        code, _, err = drseg("study", *words)
        assert code == 2 and message in err.splitlines()[-1], (words, err)


def test_a_part_is_no_other_study() -> None:
    one = settings("x")[0]
    assert dataclasses.replace(one, part="").suffix == "" and one.record()["tests"][0]["name"] == "potsdam"
