# SPDX-License-Identifier: Apache-2.0
"""From fakes of the original archives to folders that read, with exactly the ids that the labels stand for."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drseg_core.data import open_dataset
from drseg_core.data.benchmarks import BENCHMARKS
from drseg_core.data.images import read_image, read_mask
from drseg_core.data.prepare import Options, patch_starts, prepare
from drseg_core.data.prepare import write as prepare_module
from drseg_core.data.prepare.labels import label_ids
from drseg_core.data.prepare.raw import RECIPES
from drseg_core.errors import ArchiveError, ConfigError, DatasetError
from tests.data.miniatures import NAMES, PATCHED, color_image, label_code, pack, random_ids, save, write_raw


def masks_of(name: str, root: Path, split: str) -> dict[str, np.ndarray]:
    folder = root / BENCHMARKS[name].folder(split)
    return {path.stem: read_mask(path) for path in sorted((folder / BENCHMARKS[name].masks).iterdir())}


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    truth = write_raw(name, tmp_path / "raw")
    done = prepare(name, tmp_path / "raw", tmp_path / "sets")
    expected: dict[str, dict[str, np.ndarray]] = {}
    for (split, key), ids in truth.items():
        part = expected.setdefault(split, {})
        if name in PATCHED:
            # 300 x 530: one row of two patches
            part.update({f"{key}_0_{left}": ids[:256, left : left + 256] for left in (0, 256)})
        else:
            part[key] = ids
    assert done.pairs == {split: len(part) for split, part in expected.items()}
    for split, part in expected.items():
        masks = masks_of(name, tmp_path / "sets", split)
        assert masks.keys() == part.keys()
        for key, ids in part.items():
            assert np.array_equal(masks[key], ids), key
        dataset = open_dataset(f"{name}:{tmp_path / 'sets'}", split)
        assert len(dataset) == len(part)
        for index in range(len(dataset)):
            # image and mask belong together: the class's own colour is the nearest
            image, mask, _ = dataset[index]
            color = np.array(BENCHMARKS[name].palette, int)
            distance = np.abs(image.numpy().transpose(1, 2, 0)[:, :, None].astype(int) - color).sum(-1)
            good = mask.numpy() != 255
            assert (distance.argmin(-1)[good] == mask.numpy()[good]).mean() > 0.8
    assert len(open_dataset(f"{name}:{tmp_path / 'sets'}", "all")) == sum(done.pairs.values())
    manifest = (done.folder / "manifest.sha256").read_text().splitlines()
    assert len(manifest) == 2 * sum(done.pairs.values())
    assert not [path for path in tmp_path.joinpath("sets").rglob(".*")]


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_archives_and_archives_in_archives(tmp_path, suffix):
    write_raw("potsdam", tmp_path / "plain")
    prepare("potsdam", tmp_path / "plain", tmp_path / "one")
    for part in ("2_Ortho_RGB", "5_Labels_all"):
        pack(tmp_path / "plain" / part, tmp_path / "inner" / f"{part}{suffix}")
    pack(tmp_path / "inner", tmp_path / "raw" / "Potsdam.zip")
    prepare("potsdam", tmp_path / "raw", tmp_path / "two")
    for kind in ("train", "val"):
        one, two = masks_of("potsdam", tmp_path / "one", kind), masks_of("potsdam", tmp_path / "two", kind)
        assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["Potsdam_split"]


@pytest.mark.promise("C37")
def test_an_archive_that_is_refused_leaves_nothing(tmp_path):
    from tests.data.test_archives import zip_of

    (tmp_path / "raw").mkdir()
    zip_of(tmp_path / "raw/LoveDA.zip", ("../Train/Rural/images_png/0.png", b"1"))
    with pytest.raises(ArchiveError, match="climbs out"):
        prepare("loveda", tmp_path / "raw", tmp_path / "sets")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_stopped_preparation_goes_on(tmp_path, monkeypatch):
    write_raw("isaid", tmp_path / "files")
    pack(tmp_path / "files", tmp_path / "raw/iSAID.zip")
    whole = prepare("isaid", tmp_path / "raw", tmp_path / "whole")
    original, calls = prepare_module._save, []

    def stop(path, value):
        calls.append(path)
        if len(calls) > 3:
            raise KeyboardInterrupt
        original(path, value)

    out = tmp_path / "sets"
    monkeypatch.setattr(prepare_module, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare("isaid", tmp_path / "raw", out)
    assert not (out / "iSAID_split/manifest.sha256").exists()
    unpacked = list(out.glob(".isaid-unpacked/*"))
    assert len(unpacked) == 1
    kept = {path: path.stat().st_mtime_ns for path in (out / "iSAID_split").rglob("*.png")}
    assert len(kept) == 3
    monkeypatch.setattr(prepare_module, "_save", original)

    def never(*arguments):
        raise AssertionError("unpacked already")

    monkeypatch.setattr(prepare_module, "unpack", never)
    done = prepare("isaid", tmp_path / "raw", out)
    assert done.pairs == whole.pairs and done.written == 3
    # the pair whose image was missing is written again; the complete one is not
    complete = [path for path in kept if path.name == "P0000_0_0.png"]
    assert len(complete) == 2 and all(path.stat().st_mtime_ns == kept[path] for path in complete)
    left, right = out / "iSAID_split/manifest.sha256", tmp_path / "whole/iSAID_split/manifest.sha256"
    assert left.read_text() == right.read_text()
    assert not (out / ".isaid-unpacked").exists()


def test_a_finished_one_is_left_alone(tmp_path):
    write_raw("udd5", tmp_path / "raw")
    first = prepare("udd5", tmp_path / "raw", tmp_path / "sets")
    victim = next((tmp_path / "sets/UDD5/train/src").iterdir())
    victim.write_bytes(victim.read_bytes() + b"decoders do not mind")
    again = prepare("udd5", tmp_path / "raw", tmp_path / "sets")
    # new hashes would call the damage right
    assert again.pairs == first.pairs and again.written == 0
    with pytest.raises(DatasetError, match="has changed"):
        open_dataset(f"udd5:{tmp_path / 'sets'}", "train")


@pytest.mark.promise("C48")
def test_folders_it_does_not_own(tmp_path):
    write_raw("vdd", tmp_path / "raw")
    with pytest.raises(ConfigError, match="--out is inside --raw"):
        prepare("vdd", tmp_path / "raw", tmp_path / "raw/sets")
    (tmp_path / "sets/VDD").mkdir(parents=True)
    (tmp_path / "sets/VDD/mine").write_text("1")
    with pytest.raises(ConfigError, match="VDD exists; expected a new folder"):
        prepare("vdd", tmp_path / "raw", tmp_path / "sets")
    with pytest.raises(ConfigError, match="name is unknown"):
        prepare("nope", tmp_path / "raw", tmp_path / "sets")
    with pytest.raises(DatasetError, match="absent is not a folder"):
        prepare("vdd", tmp_path / "absent", tmp_path / "sets")
    write_raw("potsdam", tmp_path / "potsdam")
    prepare("potsdam", tmp_path / "potsdam", tmp_path / "sets", options=Options(64))
    with pytest.raises(ConfigError, match="was begun otherwise; expected .*'patch': 64.*got .*'patch': 32"):
        prepare("potsdam", tmp_path / "potsdam", tmp_path / "sets", options=Options(32))


def test_patches():
    # 38 tiles of 6000 x 6000 give the benchmark's 20,102
    assert 38 * len(patch_starts(6000, 256, 256, "drop")) ** 2 == 20_102
    # 14 test tiles give SegEarth's 2,016
    assert 14 * len(patch_starts(6000, 512, 512, "shift")) ** 2 == 2_016
    assert patch_starts(300, 256, 256, "drop") == [0] and patch_starts(300, 256, 256, "shift") == [0, 44]
    assert patch_starts(512, 256, 256, "shift") == [0, 256] and patch_starts(512, 256, 128, "drop") == [0, 128, 256]
    assert patch_starts(255, 256, 256, "shift") == []
    for options in (Options(8), Options(0), Options(64, 65), Options(64, 0), Options(None, 3), Options(64, -1)):
        with pytest.raises(ConfigError, match="--patch"):
            prepare("loveda", "raw", "out", options=options)


def test_shifted_patches_cover_the_image(tmp_path):
    truth = write_raw("vaihingen", tmp_path / "raw", size=(70, 100))
    prepare("vaihingen", tmp_path / "raw", tmp_path / "sets", options=Options(64, None, "shift"))
    seen = np.full((70, 100), 99, np.uint8)
    for name, mask in masks_of("vaihingen", tmp_path / "sets", "train").items():
        top, left = map(int, name.split("_")[-2:])
        seen[top : top + 64, left : left + 64] = mask
    assert np.array_equal(seen, truth["train", "vaihingen_area1"])


def test_patches_without_a_class_and_images_too_small(tmp_path):
    write_raw("isaid", tmp_path / "raw")
    for key, size in (("P0001", (256, 256)), ("P0002", (100, 300))):
        empty = np.full(size, 255, np.uint8)
        save(tmp_path / f"raw/train/images/{key}.png", np.zeros((*size, 3), np.uint8))
        save(tmp_path / f"raw/train/Semantic_masks/images/{key}_instance_color_RGB.png", label_code("isaid", empty))
    done = prepare("isaid", tmp_path / "raw", tmp_path / "sets")
    assert done.pairs == {"train": 2, "val": 2} and done.unlabelled_patches == 1 and done.too_small == 1


def test_a_split_without_labels_is_left_out(tmp_path):
    write_raw("uavid", tmp_path / "raw")
    save(tmp_path / "raw/uavid_test/seq21/Images/000000.png", np.zeros((8, 8, 3), np.uint8))
    done = prepare("uavid", tmp_path / "raw", tmp_path / "sets")
    assert done.pairs == {"train": 1, "val": 1} and done.unlabelled_splits == ["test"]


def test_sets_of_like_layout_are_told_apart(tmp_path):
    write_raw("udd5", tmp_path / "raw")
    write_raw("vdd", tmp_path / "raw")
    assert prepare("udd5", tmp_path / "raw", tmp_path / "sets").pairs == {"train": 1, "val": 1}
    assert prepare("vdd", tmp_path / "raw", tmp_path / "sets").pairs == {"test": 1, "train": 1}


def test_full_labels_come_before_eroded_ones(tmp_path):
    truth = write_raw("potsdam", tmp_path / "raw")
    for path in list((tmp_path / "raw/5_Labels_all").iterdir()):
        wrong = np.zeros_like(read_image(path))
        save(tmp_path / "raw/5_Labels_all_noBoundary" / f"{path.stem}_noBoundary.tif", wrong)
    prepare("potsdam", tmp_path / "raw", tmp_path / "sets")
    mask = masks_of("potsdam", tmp_path / "sets", "val")["potsdam_2_13_0_0"]
    assert np.array_equal(mask, truth["val", "potsdam_2_13"][:256, :256])


def test_the_contest_areas_are_the_validation_part():
    split = RECIPES["potsdam"].split
    tiles = ["2_10", "2_11", "2_12", "2_13", "2_14", "4_12", "4_15", "7_7", "7_13"]
    assert [split({"key": tile}) for tile in tiles] == ["train"] * 3 + ["val"] * 2 + ["train", "val", "train", "val"]
    areas = {area: RECIPES["vaihingen"].split({"key": str(area)}) for area in range(1, 39)}
    assert sum(split == "val" for split in areas.values()) == 17 and areas[37] == "train" and areas[38] == "val"


def refused(name: str, raw: Path, message: str, **options) -> None:
    out = raw.parent / "refused"
    with pytest.raises(DatasetError, match=message) as caught:
        prepare(name, raw, out, **options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert not list(out.rglob("manifest.sha256"))
    shutil.rmtree(out, ignore_errors=True)


def test_damage_in_the_originals(tmp_path):
    raw = tmp_path / "raw"
    (raw).mkdir()
    refused("potsdam", raw, "has no image of this set; expected files such as .*top_potsdam")
    write_raw("potsdam", raw)
    image = raw / "2_Ortho_RGB/top_potsdam_2_10_RGB.tif"
    label = raw / "5_Labels_all/top_potsdam_2_10_label.tif"
    good, good_label = image.read_bytes(), label.read_bytes()
    refused("potsdam", raw, "RGB.tif is too large; expected at most 1000 pixels, got 530 x 300", max_pixels=1000)
    image.write_bytes(good[: len(good) // 3])
    refused("potsdam", raw, "top_potsdam_2_10_RGB.tif is (damaged in rows|not an image or is cut short)")
    image.write_bytes(b"<html>")
    refused("potsdam", raw, "top_potsdam_2_10_RGB.tif is not an image.*first bytes b'<html>'")
    save(image, np.zeros((300, 520, 3), np.uint8))
    refused("potsdam", raw, "label.tif differs from its image in size; expected 300 x 520, got 300 x 530")
    image.write_bytes(good)
    save(label, np.zeros((300, 530), np.uint8))
    refused("potsdam", raw, "label.tif has 1 bands; expected 3 or 4 for labels of Potsdam")
    save(label, np.full((300, 530, 3), (9, 200, 30), np.uint8))
    refused("potsdam", raw, r"label.tif holds colours that are no class.*got 100.0%, most often \(9, 200, 30\)")
    label.unlink()
    shutil.copy(raw / "5_Labels_all/top_potsdam_2_13_label.tif", raw / "5_Labels_all/top_potsdam_2_11_label.tif")
    refused("potsdam", raw, "2 files have no partner: .*2_10_RGB.tif has no label.*2_11_label.tif has no image")
    (raw / "5_Labels_all/top_potsdam_2_11_label.tif").unlink()
    label.write_bytes(good_label)
    (raw / "copy").mkdir()
    shutil.copy(label, raw / "copy")
    refused("potsdam", raw, "are both potsdam_2_10; expected one")


@pytest.mark.parametrize("name, suffix", [("loveda", ".png"), ("vdd", ".JPG")])
def test_a_damaged_image_is_not_copied(tmp_path, name, suffix):
    write_raw(name, tmp_path / "raw")
    image = next(path for path in sorted((tmp_path / "raw").rglob(f"*{suffix}")) if "masks" not in str(path))
    image.write_bytes(image.read_bytes()[:-300])
    refused(name, tmp_path / "raw", f"{image.name} is damaged")


@pytest.mark.parametrize("name, first, last", [("dlrsd", 1, 17), ("loveda", 0, 7), ("udd5", 0, 4), ("vdd", 0, 6)])
def test_ids_that_are_no_class(tmp_path, name, first, last):
    write_raw(name, tmp_path / "raw")
    label = next(path for path in sorted((tmp_path / "raw").rglob("*.png")) if "mages" not in str(path))
    ids = read_mask(label)
    ids[3, 3] = last + 1
    save(label, ids)
    told = f"expected {first} to {last} or 255, got {last + 1}"
    refused(name, tmp_path / "raw", f"{label.name} holds ids that are no class; {told}")


def test_label_codes():
    udd5, recipe = BENCHMARKS["udd5"], RECIPES["udd5"]
    ids = random_ids(np.random.default_rng(0), 5, (16, 24), ignored=False)
    color = np.array(udd5.palette, np.uint8)[ids].transpose(2, 0, 1)
    assert np.array_equal(label_ids(color, udd5, recipe, "x"), ids)
    assert np.array_equal(label_ids(ids[None], udd5, recipe, "x"), ids)
    # a fourth band is the opacity
    assert np.array_equal(label_ids(np.concatenate([color, color[:1]]), udd5, recipe, "x"), ids)
    # a little off is still the class; single odd pixels are ignored; DLRSD's 0 is ignored
    assert np.array_equal(label_ids(np.clip(color.astype(int) + 8, 0, 255).astype(np.uint8), udd5, recipe, "x"), ids)
    large = np.zeros((3, 100, 100), np.uint8)
    large[:, 5, 5] = 77
    mask = label_ids(large, udd5, recipe, "x")
    assert mask[5, 5] == 255 and (mask == 4).sum() == 9999
    dlrsd = label_ids(np.array([[[0, 1, 17, 255]]], np.uint8), BENCHMARKS["dlrsd"], RECIPES["dlrsd"], "x")
    assert dlrsd.tolist() == [[255, 0, 16, 255]]


def test_images_of_one_and_four_bands(tmp_path):
    write_raw("isaid", tmp_path / "raw")
    gray = np.full((300, 530), 70, np.uint8)
    save(tmp_path / "raw/train/images/P0000.png", gray)
    save(tmp_path / "raw/val/images/P0003.png", np.dstack([gray] * 4))
    prepare("isaid", tmp_path / "raw", tmp_path / "sets")
    assert (read_image(tmp_path / "sets/iSAID_split/train/imgs/P0000_0_0.png") == 70).all()
    Image.fromarray(gray).convert("P").save(tmp_path / "raw/train/images/P0000.png")
    refused("isaid", tmp_path / "raw", "P0000.png has a palette; expected RGB or gray")


@pytest.mark.promise("C46")
def test_memory_is_that_of_a_strip(tmp_path):
    size = (2048, 512)
    ids = random_ids(np.random.default_rng(0), 6, size)
    save(tmp_path / "raw/top_potsdam_2_10_RGB.tif", color_image(np.random.default_rng(1), ids, "potsdam"))
    save(tmp_path / "raw/top_potsdam_2_10_label.tif", label_code("potsdam", ids))
    tracemalloc.start()
    prepare("potsdam", tmp_path / "raw", tmp_path / "sets", options=Options(128))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a strip of both, with its codes as integers, takes 3 MB, the whole images would take 40
    assert peak < 8e6


def test_what_was_done_is_written_down(tmp_path):
    write_raw("loveda", tmp_path / "raw")
    done = prepare("loveda", tmp_path / "raw", tmp_path / "sets")
    said = json.loads((done.folder / "prepare.json").read_text())
    assert said == {"set": "loveda", "patch": None, "stride": None, "edges": "drop", "pairs": {"train": 1, "val": 1}}
