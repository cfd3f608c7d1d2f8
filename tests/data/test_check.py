# SPDX-License-Identifier: Apache-2.0
"""Every fault of a set is found and named, all of them in one go."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from drseg_core.data.benchmarks import BENCHMARKS
from drseg_core.data.check import check_data, overlay_sheet
from drseg_core.data.folder import FolderDataset
from drseg_core.data.images import read_mask
from drseg_core.data.manifest import write_manifest
from drseg_core.errors import ConfigError, DatasetError
from tests.data.miniatures import NAMES, save, write_release


def kinds(findings) -> list[str]:
    return sorted({finding.kind for finding in findings})


@pytest.mark.parametrize("name", NAMES)
def test_a_good_set(name, tmp_path):
    report = check_data(name, write_release(name, tmp_path, count=3))
    assert report.problems == [] and kinds(report.warnings) in ([], ["size"])
    content = json.loads(json.dumps(report.as_dict()))
    assert set(content["splits"]) == {"train", "val", "test", "all"}
    split = content["splits"]["val"]
    assert split["images"] == split["masks"] == split["readable"] == 3 and split["sizes"] == {"32 x 40": 3}
    assert list(split["pixels"]) == list(BENCHMARKS[name].class_names)
    assert sum(split["pixels"].values()) + split["ignored_pixels"] == 3 * 32 * 40
    masks = sorted((tmp_path / BENCHMARKS[name].folder("val") / BENCHMARKS[name].masks).iterdir())
    count = sum((read_mask(path) == 2).sum() for path in masks)
    assert split["pixels"][BENCHMARKS[name].class_names[2]] == count > 0


@pytest.mark.promise("C49")
def test_everything_that_is_wrong_is_found(tmp_path):
    root = write_release("dlrsd", tmp_path, splits=("val",), count=8)
    images, masks = root / "DLRSD_split/val/imgs", root / "DLRSD_split/val/D2masks"
    (masks / "val_0.png").unlink()
    (images / "val_1.jpg").unlink()
    image = images / "val_2.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    save(masks / "val_3.png", np.zeros((30, 40), np.uint8))
    save(masks / "val_4.png", np.zeros((32, 40, 3), np.uint8))
    save(masks / "val_5.png", np.full((32, 40), 99, np.uint8))
    save(images / "val_6.jpg", np.zeros((90, 90, 3), np.uint8))
    report = check_data("dlrsd", root, max_pixels=2000)
    said = {finding.message for finding in report.problems}
    for kind, words in (
        ("pair", "val_0.jpg has no mask"),
        ("pair", "val_1.png has no image"),
        ("file", "val_2.jpg is damaged"),
        ("size", "val_3.png differs from its image in size; expected 32 x 40, got 30 x 40"),
        ("file", "val_4.png has 3 bands (RGB)"),
        ("ids", "val_5.png holds ids that are no class; expected 0 to 16 or 255, got 99"),
        ("file", "val_6.jpg is too large; expected at most 2000 pixels, got 90 x 90"),
    ):
        assert any(f.kind == kind and words in f.message for f in report.problems), (words, said)
    assert len(report.problems) == 7
    assert report.splits["val"].images == 7 and len(report.splits["val"].readable) == 1
    assert report.as_dict()["splits"]["val"]["other_ids"] == {"99": 1280}


def test_ids_that_are_one_too_high(tmp_path):
    """As in the release's OVS_label folders."""
    root = write_release("isaid", tmp_path, splits=("all",), count=3)
    for path in (root / "iSAID/D2masks").iterdir():
        ids = read_mask(path)
        save(path, np.where(ids == 255, 255, ids + 1).astype(np.uint8))
    report = check_data("isaid", root)
    assert kinds(report.problems) == ["ids", "shifted"]
    message = next(f.message for f in report.problems if f.kind == "shifted")
    assert message.startswith("all: ids are one too high; expected 0 to 14, got 1 to 15 and never 0")


def test_a_wrong_id_is_no_shift(tmp_path):
    root = write_release("isaid", tmp_path, splits=("all",), count=3)
    path = root / "iSAID/D2masks/all_0.png"
    ids = read_mask(path)
    ids[0, 0] = 15
    save(path, ids)
    assert kinds(check_data("isaid", root).problems) == ["ids"]


def test_masks_with_a_palette(tmp_path):
    root = write_release("vdd", tmp_path, splits=("train",), count=3)
    for path in (root / "VDD/train/gt").iterdir():
        ids = read_mask(path)
        good = Image.fromarray(ids)
        # of 256 colours, or Pillow would store the ids, 255 among them, in 4 bits
        good.putpalette(np.resize(BENCHMARKS["vdd"].palette, (256, 3)).ravel().tolist())
        good.save(path)
        assert Image.open(path).mode == "P"
    report = check_data("vdd", root)
    assert report.problems == [] and kinds(report.warnings) == ["palette"]
    assert report.splits["train"].palette_masks == 3
    # what converters made of RGB labels: every class is 0 or 1
    for path in (root / "VDD/train/gt").iterdir():
        two = Image.fromarray((read_mask(path) % 2).astype(np.uint8))
        two.putpalette(np.resize([0, 0, 0, 128, 0, 0], 768).tolist())
        two.save(path)
    report = check_data("vdd", root)
    assert kinds(report.problems) == ["collapsed"] and "only ids 0; 1 of 7 classes" in report.problems[0].message


def test_the_manifest(tmp_path):
    root = write_release("uavid", tmp_path, splits=("train",))
    home = root / "uavid_split"
    write_manifest(home, [path for path in home.rglob("*.png")])
    report = check_data("uavid", root)
    assert report.problems == [] and report.manifests == {str(home): "4 files verified"}
    victim = home / "train/Labels/train_0.png"
    ids = read_mask(victim)
    ids[0, 0] = 1
    save(victim, ids)
    save(home / "train/Images/train_9.png", np.zeros((32, 40, 3), np.uint8))
    save(home / "train/Labels/train_9.png", np.zeros((32, 40), np.uint8))
    (home / "train/Images/train_1.png").unlink()
    (home / "train/Labels/train_1.png").unlink()
    report = check_data("uavid", root)
    assert kinds(report.problems) == ["manifest"] and report.manifests == {str(home): "5 problems"}
    said = " ".join(f.message for f in report.problems)
    for words in ("train_0.png has changed", "train_9.png is not in manifest", "train_1.png is missing"):
        assert words in said


def test_a_folder_of_ones_own(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "images/a.png", np.zeros((8, 8, 3), np.uint8))
        save(tmp_path / split / "masks/a.png", np.eye(8, dtype=np.uint8))
    (tmp_path / "classes.txt").write_text("field\nroad\n")
    report = check_data("folder", tmp_path)
    assert report.problems == report.warnings == [] and set(report.splits) == {"train", "val"}
    assert report.as_dict()["splits"]["val"]["pixels"] == {"field": 56, "road": 8}
    assert overlay_sheet(report).shape[2] == 3
    save(tmp_path / "val/masks/a.png", np.eye(8, dtype=np.uint8) * 2)
    assert kinds(check_data("folder", tmp_path, splits=["val"]).problems) == ["ids"]
    (tmp_path / "val/masks/a.png").unlink()
    (tmp_path / "val/masks").rmdir()
    assert kinds(check_data("folder", tmp_path, splits=["val"]).problems) == ["layout"]


def test_nothing_to_look_at(tmp_path):
    with pytest.raises(DatasetError, match="has no split; expected iSAID_split/train/imgs or iSAID/imgs"):
        check_data("isaid", tmp_path)
    with pytest.raises(DatasetError, match="has no split val"):
        check_data("isaid", tmp_path, splits=["val"])
    with pytest.raises(DatasetError, match="nowhere is not a folder"):
        check_data("isaid", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="set is unknown; expected folder, dlrsd"):
        check_data("nope", tmp_path)


def test_the_sheet_shows_the_colors_of_the_set(tmp_path):
    root = write_release("potsdam", tmp_path, splits=("val",), count=1)
    save(root / "Potsdam_split/val/imgs/val_0.png", np.zeros((32, 40, 3), np.uint8))
    half = np.repeat([[1] * 20 + [4] * 20], 32, axis=0).astype(np.uint8)
    save(root / "Potsdam_split/val/D2masks/val_0.png", half)
    sheet = overlay_sheet(check_data("potsdam", root), cell=160)
    building, car = (np.array(BENCHMARKS["potsdam"].palette[i]) for i in (1, 4))
    # image in the left cell, mask over it in the right one
    assert (sheet[80, 30] == 0).all()
    assert np.abs(sheet[80, 4 + 160 + 40] - building * 0.55).max() <= 1
    assert np.abs(sheet[80, 4 + 160 + 120] - car * 0.55).max() <= 1
    # and the legend has the full colours
    legend = sheet[:, 4 + 2 * 160 + 8 :].reshape(-1, 3)
    assert all((legend == color).all(1).any() for color in (building, car))


def own_set(root, masks, names="field\nroad\nroof\n"):
    for number, mask in enumerate(masks):
        save(root / f"train/images/{number}.png", np.full((*mask.shape, 3), 90 + number, np.uint8))
        save(root / f"train/masks/{number}.png", mask.astype(np.uint8))
    (root / "classes.txt").write_text(names)
    return check_data("folder", root)


def said(findings, kind) -> list[str]:
    return [finding.message for finding in findings if finding.kind == kind]


def test_masks_that_are_mostly_unknown(tmp_path):
    mask = np.full((10, 10), 255)
    mask[:3] = np.arange(30).reshape(3, 10) % 3
    report = own_set(tmp_path / "a", [mask])
    assert said(report.warnings, "255") == ["train: 70 % of the pixels are 255, which means unknown; is that meant?"]
    mask[:6] = np.arange(60).reshape(6, 10) % 3
    assert said(own_set(tmp_path / "b", [mask]).warnings, "255") == []
    report = own_set(tmp_path / "c", [np.full((4, 4), 255)])
    expected = "train: no mask has a labelled pixel; expected class ids, got 255 alone, which means unknown"
    assert said(report.problems, "unlabelled") == [expected] and report.warnings == []


def test_one_class_is_enough_to_score_and_not_to_train(tmp_path):
    own_set(tmp_path, [np.ones((4, 4))])
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    report = check_data("folder", tmp_path)
    assert said(report.warnings, "one") == [
        "train: masks hold one class, road; training needs at least 2 to rank channels, or model.spsd.semantic_ratio 0"
    ]
    assert report.problems == []


def test_masks_of_0_and_255(tmp_path):
    report = own_set(tmp_path, [np.eye(10) * 255], "field\nroad\n")
    (message,) = said(report.warnings, "255")
    assert message.startswith("train: masks hold 0 and 255 alone, 255 in 10 % of the pixels; 255 means unknown, so")


def test_numbers_with_gaps(tmp_path):
    report = own_set(tmp_path / "a", [np.arange(30).reshape(5, 6) % 3 * 10 + 10])
    (message,) = said(report.warnings, "gaps")
    assert message.startswith("train: the numbers have gaps (10; 20; 30); expected 0 to 2 in the order of classes.txt")
    assert said(own_set(tmp_path / "b", [np.arange(30).reshape(5, 6) % 3]).warnings, "gaps") == []


def test_the_cause_is_said_in_words_of_maps(tmp_path):
    save(tmp_path / "train/images/0.png", np.zeros((5, 6, 3), np.uint8))
    (tmp_path / "train/masks").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("field\n")
    for value, words in ((np.zeros((5, 6), np.uint16), "16-bit"), (np.zeros((5, 6, 3), np.uint8), "3 bands (RGB)")):
        Image.fromarray(value).save(tmp_path / "train/masks/0.png")
        (message,) = said(check_data("folder", tmp_path).problems, "file")
        assert words in message and "expected one 8-bit band of class ids" in message and "mode" not in message


def test_a_training_without_val_recommends_no_score(tmp_path, drseg, small):
    halves = (np.indices((32, 32))[0] > 15).astype(np.uint8)
    own_set(tmp_path / "set", [halves, halves], "field\nroad\n")
    words = ["train", *small, "--data", f"folder:{tmp_path / 'set'}", "--device", "cpu"]
    code, text, _ = drseg(*words, "--out", tmp_path / "run")
    assert code == 0 and "drseg evaluate" not in text and "next: drseg predict" in text and "has no val" in text
    shutil.copytree(tmp_path / "set" / "train", tmp_path / "set" / "val")
    code, text, _ = drseg(*words, "--out", tmp_path / "again")
    assert code == 0 and "next: drseg evaluate" in text


def test_images_that_are_not_read_are_named(tmp_path, caplog):
    """Those in sub-folders and of other suffixes; files that lie beside images are none."""
    masks = [np.arange(30).reshape(5, 6) % 3] * 2
    assert own_set(tmp_path, masks).warnings == []
    images = tmp_path / "train/images"
    for name in (
        ".hidden.bmp",
        "0.png.aux.xml",
        "0.tfw",
        "README.md",
        "Thumbs.db",
        "0.bmp",
        "thumbs/0.png",
        "notes/a.txt",
    ):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).touch()
    assert check_data("folder", tmp_path).warnings == []
    FolderDataset(tmp_path)
    assert caplog.messages == []
    for part in ("images", "masks"):
        (tmp_path / "train" / part / "a/b").mkdir(parents=True)
        (tmp_path / "train" / part / "0.png").rename(tmp_path / "train" / part / "a/b/0.png")
        (tmp_path / "train" / part / "7.BMP").touch()
    (images / "0.bmp").unlink()
    expected = [
        words
        for folder in (images, tmp_path / "train/masks")
        for words in (
            f"sub-folders of {folder} are not read: a (1 image)",
            f"{folder}: 7.BMP has a suffix that is not read; expected one of .png, .jpg, .jpeg, .tif, .tiff",
        )
    ]
    report = check_data("folder", tmp_path)
    assert said(report.warnings, "unread") == expected and report.problems == []
    assert len(FolderDataset(tmp_path)) == 1
    assert caplog.messages == [f"FolderDataset: {words}" for words in expected]


@pytest.mark.promise("C49")
def test_files_that_must_not_be_read_are_named_and_the_rest_is_checked(tmp_path):
    root = tmp_path / "set"
    own_set(root, [np.arange(30).reshape(5, 6) % 3] * 6)
    images, masks = root / "train/images", root / "train/masks"
    (tmp_path / "secret.png").touch()
    for path, target in ((images / "0.png", "gone.png"), (masks / "1.png", tmp_path / "secret.png")):
        path.unlink()
        path.symlink_to(target)
    save(images / "2.tif", np.zeros((5, 6, 3), np.uint8))
    (images / "3.png").unlink()
    (images / "3.png").mkdir()
    save(masks / "5.png", np.full((5, 6), 9, np.uint8))
    report = check_data("folder", root)
    assert [finding.message.replace(f"{root}/train/", "") for finding in report.problems] == [
        "images/0.png is a broken link; expected a file",
        "images/2.tif and images/2.png share a name; expected one file",
        "images/3.png is not a file; expected an image",
        f"masks/1.png is a link out of {root}; expected a file",
        "masks/5.png holds ids that are no class; expected 0 to 2 or 255, got 9",
    ]
    split = report.splits["train"]
    assert (split.images, split.masks, len(split.readable)) == (4, 5, 2)
    with pytest.raises(DatasetError, match="images/0.png is a broken link"):
        FolderDataset(root)
