# SPDX-License-Identifier: Apache-2.0
"""The table of the benchmark sets, and their one reader on miniatures."""

from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from drseg_core.data import open_dataset
from drseg_core.data.benchmark_dataset import BenchmarkDataset, RelabelledDataset
from drseg_core.data.benchmarks import BENCHMARKS, get_benchmark
from drseg_core.data.manifest import write_manifest
from drseg_core.data.prepare.labels import TOLERANCE
from drseg_core.data.prepare.raw import RECIPES
from drseg_core.errors import ConfigError, DatasetError
from tests.data.miniatures import CODED_BY_COLOR, NAMES, SUFFIX, write_release

CLASSES = {"dlrsd": 17, "isaid": 15, "potsdam": 6, "vaihingen": 6, "loveda": 8, "uavid": 8, "udd5": 5, "vdd": 7}


def test_class_counts_and_palettes():
    assert {name: len(benchmark.class_names) for name, benchmark in BENCHMARKS.items()} == CLASSES
    for benchmark in BENCHMARKS.values():
        assert len(benchmark.palette) == len(set(benchmark.palette)) == len(set(benchmark.class_names))
    assert set(RECIPES) == set(CLASSES)


def test_names_and_colors_verbatim():
    """A few of each, typed anew from the registration files."""
    for name, place, label, color in (
        ("dlrsd", 0, "airplane", (166, 202, 240)),
        ("dlrsd", 9, "mobile home", (90, 87, 255)),
        ("dlrsd", 16, "water", (0, 255, 255)),
        ("isaid", 0, "ship", (0, 0, 63)),
        ("isaid", 8, "small vehicle", (0, 0, 127)),
        ("isaid", 14, "harbor", (0, 100, 155)),
        ("potsdam", 0, "Impervious surfaces", (255, 255, 255)),
        ("vaihingen", 5, "Clutter/background", (255, 0, 0)),
        ("loveda", 0, "no-data", (255, 255, 255)),
        ("loveda", 7, "Agriculture", (139, 69, 19)),
        ("uavid", 5, "Moving car", (64, 0, 128)),
        ("udd5", 4, "Other", (0, 0, 0)),
        ("vdd", 5, "Roof", (192, 192, 128)),
    ):
        benchmark = BENCHMARKS[name]
        assert (benchmark.class_names[place], benchmark.palette[place]) == (label, color)
    lists = "\n".join(";".join(benchmark.class_names) for benchmark in BENCHMARKS.values())
    assert hashlib.sha256(lists.encode()).hexdigest()[:16] == "9e9c799c2a608fb2"


@pytest.mark.parametrize("name", CODED_BY_COLOR)
def test_colors_are_farther_apart_than_the_tolerance(name):
    colors = [*BENCHMARKS[name].palette, *RECIPES[name].ignored_colors]
    for one, other in combinations(colors, 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 2 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_every_miniature_reads(name, tmp_path):
    root = write_release(name, tmp_path)
    for split in ("train", "val", "all"):
        dataset = open_dataset(f"{name}:{root}", split)
        assert isinstance(dataset, BenchmarkDataset) and dataset.class_names == BENCHMARKS[name].class_names
        assert [dataset.sample_name(i).split("/")[-1] for i in range(2)] == [
            f"{split}_{i}{SUFFIX.get(name, '.png')}" for i in range(2)
        ]
        sample = dataset[1]
        assert sample.image.shape == (3, 32, 40) and sample.mask.shape == (32, 40)
        assert set(np.unique(sample.mask)) == {*range(CLASSES[name]), 255}
        assert len(dataset.fingerprint()) == 64


def test_all_is_the_union_where_it_has_no_folder(tmp_path):
    root = write_release("potsdam", tmp_path, splits=("train", "val"))
    names = [open_dataset(f"potsdam:{root}", "all").sample_name(i).split("/")[-1] for i in range(4)]
    assert names == ["train_0.png", "train_1.png", "val_0.png", "val_1.png"]
    assert len(open_dataset(f"potsdam:{write_release('potsdam', tmp_path, splits=('all',), count=1)}", "all")) == 1


def test_splits_keep_apart(tmp_path):
    root = write_release("isaid", tmp_path)
    files = [{pair.mask for pair in BenchmarkDataset("isaid", root, split).pairs} for split in ("train", "val", "all")]
    assert not files[0] & files[1] and not files[1] & files[2]


def test_what_is_missing_is_named(tmp_path):
    root = write_release("potsdam", tmp_path, splits=("all",))
    message = r"has no split train; expected Potsdam_split/train/imgs/\* and .* of .png.*, got all$"
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"potsdam:{root}", "train")
    with pytest.raises(DatasetError, match="vdd: .* has no split all; expected VDD/src.*, got nothing"):
        open_dataset(f"vdd:{root}", "all")
    with pytest.raises(DatasetError, match="is not a folder; expected DLRSD_split/val/imgs"):
        open_dataset(f"dlrsd:{tmp_path / 'nowhere'}", "val")
    with pytest.raises(DatasetError, match="is not a folder"):
        open_dataset("dlrsd:", "val")
    with pytest.raises(ConfigError, match="split is unknown; expected one of all, train, val, test, got 'dev'"):
        open_dataset(f"potsdam:{root}", "dev")
    with pytest.raises(ConfigError, match="NAME one of dlrsd, isaid.* got 'deepglobe:x'"):
        open_dataset("deepglobe:x")
    with pytest.raises(ConfigError, match="got 'deepglobe'"):
        get_benchmark("deepglobe")


def test_damage_is_named(tmp_path):
    root = write_release("loveda", tmp_path, splits=("all",))
    mask = root / "LoveDA/masks_png/all_1.png"
    good = mask.read_bytes()
    Image.fromarray(np.full((32, 40), 8, np.uint8)).save(mask)
    with pytest.raises(DatasetError, match="masks_png/all_1.png holds ids that are no class; expected 0 to 7 or 255"):
        open_dataset(f"loveda:{root}", "all")[1]
    mask.unlink()
    with pytest.raises(DatasetError, match="1 files have no partner.*images_png/all_1.png has no mask"):
        open_dataset(f"loveda:{root}", "all")
    mask.write_bytes(good)
    with pytest.raises(DatasetError, match="too large; expected at most 1279 pixels, got 40 x 32"):
        BenchmarkDataset("loveda", root, "all", max_pixels=1279)
    outside = tmp_path.parent / "outside.png"
    outside.write_bytes(good)
    mask.unlink()
    mask.symlink_to(outside)
    with pytest.raises(DatasetError, match="all_1.png is a link out of"):
        open_dataset(f"loveda:{root}", "all")


def test_the_manifest_of_the_set_counts_and_no_other(tmp_path):
    root = write_release("udd5", tmp_path)
    write_release("vdd", root)
    files = [path for path in (root / "UDD5").rglob("*") if path.is_file()]
    write_manifest(root / "UDD5", files)
    assert len(open_dataset(f"udd5:{root}", "val")) == len(open_dataset(f"vdd:{root}", "val")) == 2
    victim = root / "UDD5/val/src/val_0.JPG"
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DatasetError, match="val_0.JPG has changed; expected SHA-256"):
        open_dataset(f"udd5:{root}", "val")
    assert len(open_dataset(f"udd5:{root}", "train")) == 2


def test_relabelling(tmp_path):
    base = open_dataset(f"udd5:{write_release('udd5', tmp_path)}", "val")
    merged = RelabelledDataset(base, ("green", "built", "nothing"), {0: 0, 1: 1, 2: 1, 255: 2})
    old, new = base[0].mask.numpy(), merged[0].mask.numpy()
    for before, after in ((0, 0), (1, 1), (2, 1), (3, 255), (4, 255), (255, 2)):
        assert (new[old == before] == after).all() and (old == before).any()
    assert len(merged) == 2 and merged.sample_name(1) == base.sample_name(1)
    assert merged.fingerprint() != base.fingerprint()
    assert merged.fingerprint() != RelabelledDataset(base, ("a", "built", "nothing"), {0: 0}).fingerprint()
    with pytest.raises(DatasetError, match="another size than the protocol; expected 512 x 512, got 32 x 40"):
        RelabelledDataset(base, ("a",), {}, image_side=512)[0]
