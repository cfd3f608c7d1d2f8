# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from drseg_core.data import open_dataset
from drseg_core.data.synthetic import (
    CLASS_NAMES,
    HELD_OUT,
    HELD_OUT_IDS,
    SEEN_NAMES,
    SyntheticDataset,
    SyntheticOptions,
    render_scene,
    write_scenes,
)
from drseg_core.data.synthetic.shapes import COLORS, KINDS
from drseg_core.errors import ConfigError, DatasetError


def test_vocabulary():
    assert len(CLASS_NAMES) == 37 and len(set(CLASS_NAMES)) == 37
    assert CLASS_NAMES[0] == "bare soil" and CLASS_NAMES[:31] == SEEN_NAMES and CLASS_NAMES[31:] == HELD_OUT
    assert set(CLASS_NAMES[1:]) == {f"{c} {k}" for c in COLORS for k in KINDS}
    # every colour and every kind is held out exactly once, and seen five times
    assert {n.split()[0] for n in HELD_OUT} == set(COLORS) and {n.split()[1] for n in HELD_OUT} == set(KINDS)


def test_scene_is_a_pure_function():
    first = render_scene(5, seed=3)
    for _ in range(2):
        np.random.seed(0)
        again = render_scene(5, seed=3)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (render_scene(6, seed=3), render_scene(5, seed=4), render_scene(5, seed=3, split="val")):
        assert not np.array_equal(first[1], other[1])


def test_vocabularies_show_what_they_say():
    seen = np.stack([render_scene(i)[1] for i in range(120)])
    full = np.stack([render_scene(i, vocabulary="full")[1] for i in range(150)])
    assert set(np.unique(seen)) == set(range(31))
    count = np.bincount([label for mask in full for label in np.unique(mask)], minlength=37)
    assert count[1:].min() > 0
    held, rest = count[list(HELD_OUT_IDS)].mean(), count[1:31].mean()
    assert 0.6 < held / rest < 1.6
    assert 0.4 < (seen == 0).mean() < 0.8


def test_colors_stay_recognisable():
    base = np.array(list(COLORS.values()), float)
    names = list(COLORS)
    right = total = 0
    for i in range(60):
        image, mask = render_scene(i, vocabulary="full")
        for label in np.unique(mask)[1:]:
            pixel = np.median(image[mask == label], axis=0)
            right += names[int(np.abs(base - pixel).sum(1).argmin())] == CLASS_NAMES[label].split()[0]
            total += 1
    assert total > 200 and right / total > 0.9


@pytest.mark.parametrize("size", [(96, 160), 64, (32, 33), (400, 300)])
def test_any_size(size):
    image, mask = render_scene(0, size=size)
    height, width = size if isinstance(size, tuple) else (size, size)
    assert image.shape == (height, width, 3) and mask.shape == (height, width)
    assert image.dtype == mask.dtype == np.uint8 and mask.any() and image.std() > 5


def test_streamed_and_written_are_the_same(tmp_path):
    root = write_scenes(tmp_path / "seen", splits={"train": 3, "val": 2}, seed=7, size=64)
    for split, count in (("train", 3), ("val", 2)):
        folder = open_dataset(f"folder:{root}", split)
        stream = open_dataset(f"synthetic:seed=7,scenes={count},size=64,vocabulary=seen", split)
        assert len(folder) == len(stream) == count and folder.class_names == stream.class_names == SEEN_NAMES
        for a, b in zip((folder[i] for i in range(count)), (stream[i] for i in range(count)), strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask)
    assert len((root / "classes.txt").read_text().splitlines()) == 31
    assert len(open_dataset("synthetic:scenes=1,vocabulary=full").class_names) == 37
    assert [p.name for p in tmp_path.iterdir()] == ["seen"]


def test_write_refuses_what_is_not_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"mine exists"):
            write_scenes(tmp_path / "mine", splits={"val": 1}, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    write_scenes(tmp_path / "own", splits={"val": 3}, size=32)
    with pytest.raises(ConfigError, match="own exists"):
        write_scenes(tmp_path / "own", splits={"val": 1}, size=32)
    write_scenes(tmp_path / "own", splits={"val": 1}, size=32, overwrite=True)
    assert len(open_dataset(f"folder:{tmp_path / 'own'}", "val")) == 1


def test_fingerprint_tells_sets_apart():
    prints = {
        SyntheticDataset(SyntheticOptions(seed=s, scenes=n, size=32), split).fingerprint()
        for s in (0, 1)
        for n in (1, 2)
        for split in ("train", "val")
    }
    assert len(prints) == 8
    assert SyntheticDataset(SyntheticOptions(scenes=1)).fingerprint() in {
        SyntheticDataset(SyntheticOptions(scenes=1)).fingerprint()
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("synthetic:colour=red", "option 'colour' is unknown"),
        ("synthetic:seed=0,seed=1", "option 'seed' is unknown or repeated"),
        ("synthetic:seed=x", "seed is not a number.*'x'"),
        ("synthetic:vocabulary=half", "vocabulary is unknown.*'half'"),
        ("synthetic:world=flat", "world is unknown.*'flat'"),
        ("synthetic:domain=shifted", "domain is unknown; expected source, got 'shifted'"),
        ("synthetic:world=landscape,domain=mars", "domain is unknown; expected source or shifted, got 'mars'"),
        ("synthetic:scenes=0", "scenes is out of range"),
        ("synthetic:size=8", "out of range.*size >= 32"),
        ("synthetic:seed=-1", "out of range"),
        ("dlrsd", "spec is unknown"),
        ("folders:/tmp", "spec is unknown"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_dataset(spec)
    assert "\n" not in str(caught.value)
    assert open_dataset("synthetic:scenes=1,size=32")[0].image.shape == (3, 32, 32)


def test_bad_split():
    with pytest.raises(ConfigError, match="split is unknown.*'trian'"):
        open_dataset("synthetic:scenes=2", "trian")
    with pytest.raises((IndexError, DatasetError), match="out of range"):
        open_dataset("synthetic:scenes=2,size=32")[2]
