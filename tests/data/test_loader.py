# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import os
import signal
import time

import pytest
import torch

from drseg_core.data import Sample, SegmentationDataset
from drseg_core.data.loader import training_batches
from drseg_core.data.transforms import augment, resized_size
from drseg_core.errors import DatasetError, ResourceError


class Numbered(SegmentationDataset):
    """Every pixel of sample ``i`` has the value ``i``; some samples misbehave."""

    class_names = ("a", "b")

    def __init__(self, count: int = 10, side: int = 8, bad: dict[int, str | signal.Signals] | None = None) -> None:
        self.count, self.side, self.bad = count, side, bad or {}

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return f"{self.count}"

    def sample_name(self, index: int) -> str:
        return f"/data/{index}.png"

    def __getitem__(self, index: int) -> Sample:
        what = self.bad.get(index)
        if what == "damaged":
            raise DatasetError(f"read_image: /data/{index}.png is damaged")
        if what == "unpicklable":

            class Local(Exception):
                def __init__(self, one, two):
                    super().__init__("odd\nerror")

            raise Local(1, 2)
        if isinstance(what, signal.Signals):
            os.kill(os.getpid(), what)
        if what == "hangs":
            time.sleep(600)
        value = torch.full((3, self.side, self.side), index, dtype=torch.uint8)
        return Sample(value, torch.full((self.side, self.side), index % 2, dtype=torch.uint8), self.sample_name(index))


def take(count: int, dataset=None, **options):
    options = {"crop_size": 8, "batch_size": 4, "seed": 0, **options}
    stream = training_batches(dataset or Numbered(), **options)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def ids(batches) -> list[int]:
    return [round(float(v) * 255) for b in batches for v in b.image[:, 0, 0, 0]]


def same(a, b) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.image, y.image) and torch.equal(x.mask, y.mask) and x.position == y.position


def scenes(count: int = 5):
    from drseg_core.data.synthetic import SyntheticDataset, SyntheticOptions

    return SyntheticDataset(SyntheticOptions(scenes=count, size=40))


def test_shapes():
    batch = take(1, scenes(), crop_size=32)[0]
    assert batch.image.shape == (4, 3, 32, 32) and batch.image.dtype == torch.float32
    assert batch.mask.shape == (4, 32, 32) and batch.mask.dtype == torch.uint8
    assert 0 <= batch.image.min() < batch.image.max() <= 1 and batch.position == 0


def test_every_epoch_is_a_permutation():
    seen = ids(take(5, color_jitter=False))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert seen[:10] != ids(take(3, color_jitter=False, seed=1))[:10]


def test_batch_larger_than_the_set():
    assert sorted(ids(take(1, Numbered(3), color_jitter=False, batch_size=9))) == sorted([0, 1, 2] * 3)


@pytest.mark.promise("C30")
def test_start_continues_exactly():
    full = take(6, scenes(), crop_size=32)
    same(full[3:], take(3, scenes(), crop_size=32, start=full[2].position + 4))


def test_an_image_is_augmented_anew_in_every_pass():
    images = [batch.image for batch in take(4, scenes(1), crop_size=32, batch_size=1)]
    assert not any(torch.equal(one, other) for one, other in zip(images, images[1:], strict=False))


def test_workers_do_not_matter():
    here = take(5, scenes(), crop_size=32)
    same(here, take(5, scenes(), crop_size=32, workers=1))
    same(here, take(5, scenes(), crop_size=32, workers=2))


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = take(2, scenes(), crop_size=32)
    assert torch.equal(state, torch.random.get_rng_state())
    take(1, scenes(), crop_size=32, workers=1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    same(first, take(2, scenes(), crop_size=32))


def test_ranks_share_a_batch():
    whole = take(3, scenes(), crop_size=32)
    parts = [take(3, scenes(), crop_size=32, rank=r, world_size=2) for r in range(2)]
    for i, batch in enumerate(whole):
        assert torch.equal(batch.image, torch.cat([p[i].image for p in parts]))
        assert {p[i].position for p in parts} == {batch.position}


@pytest.mark.promise("C35")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("damaged", r"^read_image: /data/3.png is damaged$"),
        ("unpicklable", r"/data/3.png cannot be read: Local: odd error"),
    ],
)
def test_bad_sample_is_named(workers, what, message):
    with pytest.raises(DatasetError, match=message) as caught:
        take(5, Numbered(bad={3: what}), workers=workers)
    assert "\n" not in str(caught.value)
    take(1, workers=workers)


@pytest.mark.promise("C35")
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGTERM])
def test_killed_worker(what):
    # of what the main process does about a signal, its workers inherit nothing
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(
            ResourceError, match=r"stopped at position \d+, batch from /data/\d.png on: .*worker"
        ) as caught:
            take(5, Numbered(bad={3: what}), workers=2, timeout=600)
    finally:
        signal.signal(signal.SIGTERM, before)
    # at once
    assert "\n" not in str(caught.value) and "timed out" not in str(caught.value)
    take(1, workers=1)


@pytest.mark.promise("C35")
def test_hanging_worker():
    # long before the worker goes on
    with pytest.raises(ResourceError, match=r"stopped at position .*timed out after 2"):
        take(5, Numbered(bad={3: "hangs"}), workers=1, timeout=2)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_size": 0},
        {"batch_size": 0},
        {"start": -1},
        {"seed": -1},
        {"workers": -1},
        {"timeout": 0},
        {"rank": 1},
        {"world_size": 3},
    ],
)
def test_bad_arguments_are_refused_at_once(options):
    with pytest.raises(ValueError, match="training_batches: .*expected"):
        training_batches(Numbered(), **{"crop_size": 8, "batch_size": 4, "seed": 0, **options})


def test_empty_set():
    with pytest.raises(DatasetError, match="dataset is empty"):
        training_batches(Numbered(0), crop_size=8, batch_size=4, seed=0)


def _augmented(sample: Sample, seed: int = 0, **options):
    return augment(sample, generator=torch.Generator().manual_seed(seed), **{"crop_size": 24, **options})


def _sample(height: int, width: int) -> Sample:
    mask = (torch.arange(height)[:, None] * 3 + torch.arange(width)) % 200
    mask = mask.to(torch.uint8)
    return Sample(mask.expand(3, -1, -1).clone(), mask, "x")


@pytest.mark.parametrize("height, width", [(24, 60), (48, 24)])
def test_crop_and_flip_move_image_and_mask_together(height, width):
    sample, flips, places = _sample(height, width), 0, set()
    windows = sample.mask.unfold(0, 24, 1).unfold(1, 24, 1)
    for seed in range(20):
        image, mask = _augmented(sample, seed, color_jitter=False)
        assert torch.equal((image[0] * 255).round().to(torch.uint8), mask)
        flipped = bool(mask[0, 1] < mask[0, 0])
        flips += flipped
        # the crop lies within the image
        place = (windows == (mask.flip(-1) if flipped else mask)).all(-1).all(-1).nonzero().tolist()
        assert len(place) == 1
        places.add(tuple(place[0]))
    assert 4 < flips < 16 and len(places) > 8


def test_same_size_is_not_resampled():
    sample = _sample(24, 24)
    image, mask = _augmented(sample, color_jitter=False)
    assert torch.equal(mask, sample.mask) or torch.equal(mask, sample.mask.flip(-1))


@pytest.mark.promise("C49")
@pytest.mark.parametrize("side", [25, 32, 50, 100, 128, 200, 250])
def test_a_resized_mask_lies_on_its_image(side):
    """Every pixel of a mask is the pixel of the image that its middle lies in."""
    mask = torch.arange(side, dtype=torch.uint8).repeat(side, 1)
    for turned in (False, True):
        given = mask.mT.clone() if turned else mask
        sample = Sample(given.expand(3, -1, -1).clone(), given, "x")
        for seed in range(2):
            image, found = _augmented(sample, seed, color_jitter=False, crop_size=64)
            image, found = (image[0].mT, found.mT) if turned else (image[0], found)
            # in pixels of the file; at the edges an image is blurred to one side
            off = (found - 255 * image)[:, 8:-8]
            assert off.mean().abs() < 0.02 and off.abs().max() <= 1


def test_elongated_images_are_padded():
    sample = Sample(torch.full((3, 4, 100), 50, dtype=torch.uint8), torch.ones(4, 100, dtype=torch.uint8), "x")
    image, mask = _augmented(sample, color_jitter=True, crop_size=48)
    assert mask.shape == (48, 48) and set(mask.unique().tolist()) == {1, 255}
    rows = int((mask[:, 0] == 1).sum())
    assert rows == resized_size(4, 100, 48)[0] < 48
    assert torch.all(image[:, rows:] == 128 / 255) and torch.all(mask[rows:] == 255)


def test_resized_sizes():
    assert resized_size(100, 100, 384) == (384, 384)
    assert resized_size(2160, 3840, 384) == (384, 683)
    assert resized_size(100, 1000, 384) == (133, 1333)
    assert resized_size(1, 5000, 16)[0] == 1


@pytest.mark.promise("C49")
def test_mask_values_are_never_mixed():
    mask = torch.zeros(50, 50, dtype=torch.uint8)
    mask[:, 25:] = 200
    _, result = _augmented(Sample(torch.zeros(3, 50, 50, dtype=torch.uint8), mask, "x"))
    assert set(result.unique().tolist()) <= {0, 200}


def test_color_jitter_changes_colours_only():
    sample = scenes()[0]
    plain, mask = _augmented(sample, 1, color_jitter=False, crop_size=40)
    results = [_augmented(sample, s, crop_size=40) for s in range(8)]
    assert all(0 <= r[0].min() and r[0].max() <= 1 for r in results)
    assert len({float(r[0].mean()) for r in results}) > 5
