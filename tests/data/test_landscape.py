# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from drseg_core.data import open_dataset
from drseg_core.data.synthetic import class_names, held_out_ids, render_scene
from drseg_core.data.synthetic.landscape import CLASS_NAMES, COLORS, GROUNDS, HELD_OUT, KINDS, SEEN_NAMES, THIN
from drseg_core.data.synthetic.shapes import _grown


def scene(index, **options):
    return render_scene(index, world="landscape", **options)


def test_vocabulary():
    assert class_names("seen", "landscape") == SEEN_NAMES and class_names("full", "landscape") == CLASS_NAMES
    assert len(set(CLASS_NAMES)) == 25 and CLASS_NAMES[:21] == SEEN_NAMES and CLASS_NAMES[21:] == HELD_OUT
    assert held_out_ids("landscape") == (21, 22, 23, 24) and held_out_ids() == tuple(range(31, 37))
    assert {n.split()[0] for n in HELD_OUT} == set(COLORS) and {n.split()[1] for n in HELD_OUT} == set(KINDS)
    assert set(CLASS_NAMES[9:]) == {f"{c} {k}" for c in COLORS for k in KINDS}


def test_scene_is_a_pure_function_of_all_its_arguments():
    first = scene(5, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(first, scene(5, seed=3), strict=True))
    others = [scene(6, seed=3), scene(5, seed=4), scene(5, seed=3, split="val"), scene(5, seed=3, domain="shifted")]
    assert not any(np.array_equal(first[1], mask) for _, mask in others)


def test_every_class_occurs_and_no_held_out_one_in_training():
    seen = np.bincount(np.concatenate([scene(i)[1].ravel() for i in range(60)]), minlength=25)
    full = np.bincount(np.concatenate([scene(i, vocabulary="full")[1].ravel() for i in range(60)]), minlength=25)
    assert (seen[:21] > 0).all() and not seen[21:].any() and (full > 0).all()


def test_grounds_of_one_colour_differ_by_texture():
    """The colour of the means does not tell soil, ploughed field and rocky ground apart; local contrast does."""
    pixels = {name: [] for name in GROUNDS[:3]}
    for i in range(40):
        image, mask = scene(i)
        gray = image.astype(float).sum(axis=2)
        contrast = np.abs(np.diff(gray, axis=1))[:, :, None]
        for label, name in enumerate(GROUNDS[:3]):
            inside = mask[:, 1:] == label
            if inside.sum() > 400:
                colour = image[:, 1:][inside].mean(axis=0)
                pixels[name].append([*colour, float(contrast[inside].mean())])
    mean = {name: np.mean(rows, axis=0) for name, rows in pixels.items()}
    for name in ("ploughed field", "rocky ground"):
        assert np.abs(mean[name][:3] - mean["bare soil"][:3]).max() < 8
        assert mean[name][3] > 1.5 * mean["bare soil"][3]


def test_thin_and_small():
    """Nothing of a car, and little but crossings of a road, survives the loss of a few pixels on each side."""

    def eroded(inside, margin):
        return ~_grown(~inside, margin)

    thin = [np.isin(scene(i)[1], range(6, 6 + len(THIN))) for i in range(30)]
    cars = [np.isin(scene(i)[1], [c for c, name in enumerate(CLASS_NAMES) if name.endswith("car")]) for i in range(30)]
    assert sum(eroded(part, 3).sum() for part in thin) < 0.1 * sum(part.sum() for part in thin)
    assert sum(part.sum() for part in cars) > 0 and not any(eroded(part, 4).any() for part in cars)


def test_shadows_fall_on_every_ground():
    """Pixels beside a roof, on the side away from the sun, are darker than the ground they lie on."""
    darkened = set()
    for i in range(40):
        image, mask = scene(i)
        gray = image.astype(float).sum(axis=2)
        for ground in range(len(GROUNDS)):
            inside = mask == ground
            if inside.sum() < 300:
                continue
            darkened |= {ground} if (gray[inside] < 0.62 * np.median(gray[inside])).mean() > 0.02 else set()
    assert darkened == set(range(len(GROUNDS)))


def test_the_shifted_domain_is_another_one():
    source = np.stack([scene(i)[0] for i in range(30)]).astype(float)
    shifted = np.stack([scene(i, domain="shifted")[0] for i in range(30)]).astype(float)
    # haze: less contrast, more blue
    assert shifted.std() < 0.85 * source.std()
    assert (shifted[..., 2] - shifted[..., 0]).mean() > (source[..., 2] - source[..., 0]).mean() + 10


@pytest.mark.parametrize("size", [(96, 160), 64, (32, 33), (300, 200)])
@pytest.mark.parametrize("domain", ["source", "shifted"])
def test_any_size(size, domain):
    image, mask = scene(0, size=size, domain=domain)
    assert image.shape == (*(size if isinstance(size, tuple) else (size, size)), 3) and mask.shape == image.shape[:2]
    assert image.dtype == mask.dtype == np.uint8 and image.std() > 5


def test_by_specification():
    data = open_dataset("synthetic:world=landscape,domain=shifted,scenes=2,size=64,vocabulary=full", "val")
    assert data.class_names == CLASS_NAMES
    image, mask = scene(1, split="val", domain="shifted", size=64, vocabulary="full")
    assert torch.equal(data[1].mask, torch.from_numpy(mask))
    assert torch.equal(data[1].image, torch.from_numpy(image.transpose(2, 0, 1).copy()))
    prints = {
        open_dataset(f"synthetic:scenes=2{extra}").fingerprint()
        for extra in ("", ",world=landscape", ",world=landscape,domain=shifted")
    }
    assert len(prints) == 3
    assert data.sample_name(1) == "synthetic full landscape shifted val scene 1 of seed 0"
