# SPDX-License-Identifier: Apache-2.0
"""Kept features are those that would be computed, to the last bit, or are not used."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drseg_core.config.schema import DinoConfig
from drseg_core.errors import ConfigError, ResourceError
from drseg_core.models.build import build_model
from drseg_core.models.dino import DinoPrior
from drseg_core.models.prior_cache import PriorCache, prior_cache
from drseg_core.models.weights import load_weights, save_weights

CONFIG = DinoConfig(name="drseg-tiny", weights=None, image_size=64)
IMAGE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


class Holder:
    """Stands for a model: has a prior."""

    def __init__(self, config: DinoConfig = CONFIG) -> None:
        self.dino = DinoPrior(config)
        self.runs = 0
        self.dino.encoder.patch_embed.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.runs += 1


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def all_maps(prior: DinoPrior, image: Tensor = IMAGE, blocks: tuple[int, ...] = ()) -> list[Tensor]:
    maps = prior.maps(image, blocks)
    return [maps.features, *maps.guidance]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("blocks", [(), (1, 0)])
@pytest.mark.parametrize("options", [{}, {"features": "key"}, {"features": "value", "layer": 0}, {"layer": 0}])
def test_read_is_what_was_computed(tmp_path: Path, blocks: tuple[int, ...], options: dict[str, Any]) -> None:
    holder = Holder(dataclasses.replace(CONFIG, **options))
    plain = all_maps(holder.dino, blocks=blocks)
    with prior_cache(holder, tmp_path / "new" / "cache") as cache:
        first, second = (all_maps(holder.dino, blocks=blocks) for _ in range(2))
    assert same(plain, first) and same(plain, second)
    assert holder.runs == 2 and (cache.found, cache.computed) == (1, 1)
    assert holder.dino.cache is None and same(plain, all_maps(holder.dino, blocks=blocks)) and holder.runs == 3


def test_a_convolutional_prior_too(tmp_path: Path) -> None:
    model = Holder.__new__(Holder)
    model.dino = DinoPrior(DinoConfig(name="test_convnext", weights=None, image_size=64, normalization="imagenet"))
    plain = all_maps(model.dino)
    with prior_cache(model, tmp_path) as cache:
        assert same(plain, all_maps(model.dino)) and same(plain, all_maps(model.dino)) and cache.found == 1


def test_another_process_finds_it_and_weights_count_not_their_path(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    holder = Holder()
    with prior_cache(holder, tmp_path / "cache"):
        expected = all_maps(holder.dino)
    save_file({name: value.clone() for name, value in holder.dino.encoder.state_dict().items()}, tmp_path / "w")
    moved = Holder(dataclasses.replace(CONFIG, weights=str(tmp_path / "w"), seed=9, guidance_blocks=(0, 1)))
    with prior_cache(moved, tmp_path / "cache"):
        assert same(expected, all_maps(moved.dino)) and moved.runs == 0


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"features": "key"}, {"layer": 0}, {"normalization": "clip"}, {"image_size": 32}, {}],
    ids=lambda options: next(iter(options), "weight"),
)
def test_another_prior_reads_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    first = Holder()
    with prior_cache(first, tmp_path):
        all_maps(first.dino)
    other = Holder(dataclasses.replace(CONFIG, **options))
    if not options:
        other.dino.encoder.blocks[0].mlp.fc1.bias.data[0] += 1e-3
    expected = all_maps(other.dino)
    with prior_cache(other, tmp_path) as cache:
        assert same(expected, all_maps(other.dino))
    assert cache.found == 0 and len(files(tmp_path)) == 2


def test_other_images_batches_blocks_and_arithmetic_read_nothing(tmp_path: Path) -> None:
    holder = Holder()
    one_bit = IMAGE.clone()
    one_bit.view(torch.int32)[0, 0, 0, 0] ^= 1
    with prior_cache(holder, tmp_path) as cache:
        all_maps(holder.dino)
        for image in (IMAGE.flip(0), IMAGE[:1], one_bit, torch.cat([IMAGE, IMAGE[:1]])):
            all_maps(holder.dino, image)
        for blocks in ((0,), (1,), (0, 1), (1, 0)):
            all_maps(holder.dino, blocks=blocks)
        with torch.autocast("cpu", torch.bfloat16):
            all_maps(holder.dino)
        torch.set_num_threads(2)
        all_maps(holder.dino)
        torch.set_num_threads(1)
        assert (cache.found, cache.computed) == (0, 11)
        # the image that was resized to the same pixels is the same
        all_maps(holder.dino, IMAGE.clone())
        assert cache.found == 1


@pytest.mark.parametrize("behind", [0, 60], ids=["", "by a file system whose clock is behind"])
def test_a_full_folder_gives_up_what_no_longer_serves_and_nothing_else(
    tmp_path: Path, caplog: Any, logged: Any, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + behind)
    holder, images = Holder(), [torch.full((1, 3, 64, 64), value / 8) for value in range(5)]
    others = [tmp_path / "weights.safetensors", tmp_path / f"{'0' * 64}.json"]
    for path in others:
        path.write_bytes(bytes(50_000))
    with prior_cache(holder, tmp_path):
        all_maps(holder.dino, images[0])
        (first,) = set(files(tmp_path)) - set(others)
        size = first.stat().st_size
        all_maps(holder.dino, images[1])
    (second,) = set(files(tmp_path)) - {first, *others}
    for age, path in ((2000, first), (1000, second)):
        os.utime(path, (time.time() - age,) * 2)
    # room for three: the first image is read, so the second goes when the fourth comes
    with caplog.at_level(logging.WARNING), prior_cache(holder, tmp_path, 3 * size + size // 2) as cache:
        for image in (images[0], images[2], images[3]):
            all_maps(holder.dino, image)
        assert first.exists() and not second.exists() and len(files(tmp_path)) == 5 and not logged()
        # all three serve: an image more is computed and not kept, and that is said once
        expected = all_maps(holder.dino, images[4])
        assert same(expected, all_maps(holder.dino, images[4])) and len(files(tmp_path)) == 5
        assert (cache.found, cache.computed) == (1, 4)
    (line,) = logged()
    assert "is full" in line and all(path.exists() for path in others)
    with prior_cache(holder, tmp_path, 0) as cache:
        all_maps(holder.dino, images[4])
    # the bound is of the folder, whoever filled it
    assert cache.computed == 1 and files(tmp_path) == sorted(others)


def test_what_another_process_removes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, folder = Holder(), tmp_path / "cache"

    def removed(path: Path, *content: Any) -> None:
        save_weights(path, *content)
        # by one whose cache is full, or by a person, before this process asks for its size
        shutil.rmtree(folder)

    monkeypatch.setattr("drseg_core.models.prior_cache.save_weights", removed)
    with prior_cache(holder, folder, 10**6) as cache:
        expected = all_maps(holder.dino)
        cache.limit = 1
        assert not folder.exists() and same(expected, all_maps(holder.dino))
    assert (cache.found, cache.computed) == (0, 2)


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_image(path: Path) -> None:
    state, key = load_weights(path)
    save_weights(path, {name: value + 1 for name, value in state.items()}, {**key, "pixels_sha256": "0" * 64})


def foreign(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"features": torch.zeros(2, 96, 8, 8)}, path)


def without_features(path: Path) -> None:
    save_weights(path, {"other": torch.zeros(1)}, load_weights(path)[1])


@pytest.mark.promise("C29")
@pytest.mark.parametrize("spoil", [damaged, cut_short, emptied, of_another_image, foreign, without_features])
def test_what_cannot_be_trusted_is_computed_again(tmp_path: Path, spoil: Any, caplog: Any, logged: Any) -> None:
    holder = Holder()
    with prior_cache(holder, tmp_path):
        expected = all_maps(holder.dino)
    (path,) = files(tmp_path)
    sound = path.read_bytes()
    spoil(path)
    assert path.read_bytes() != sound
    with caplog.at_level(logging.WARNING), prior_cache(holder, tmp_path) as cache:
        assert same(expected, all_maps(holder.dino)) and cache.found == 0
    (line,) = logged()
    assert str(path) in line and "computed again" in line
    assert path.read_bytes() == sound


@pytest.mark.promise("C28")
def test_a_failure_to_write_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    import safetensors.torch

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    holder = Holder()
    with pytest.raises(ResourceError, match="cannot be written; .*No space left"), prior_cache(holder, tmp_path):
        all_maps(holder.dino)
    assert files(tmp_path) == [] and holder.dino.cache is None


def test_what_cannot_be_a_cache(tmp_path: Path, variant: Any) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="folder is a file"):
        PriorCache(tmp_path / "file", DinoPrior(CONFIG))
    with pytest.raises(ResourceError, match="folder cannot be made"):
        PriorCache(tmp_path / "file" / "cache", DinoPrior(CONFIG))
    with pytest.raises(ConfigError, match="limit is out of range; expected >= 0 bytes, got -1"):
        PriorCache(tmp_path / "cache", DinoPrior(CONFIG), -1)
    for kind in ("none", "cosine"):
        with (
            pytest.raises(ConfigError, match="no prior whose features"),
            prior_cache(build_model(variant("fusion", kind=kind)), tmp_path / "cache"),
        ):
            pass


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_the_whole_model_is_bit_equal(tmp_path: Path, variant: Any, guided: bool) -> None:
    config = variant("dino", image_size=128, guidance_blocks=(0, 1))
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, dino_guidance=guided))
    model = build_model(config).eval()
    image = torch.rand(2, 3, 50, 70)
    names = [["water", "red roof"], ["bare soil", "grass", "car"]]
    plain = [model(image, model.tokenize(some)) for some in names]
    for found in (1, 2):
        with prior_cache(model, tmp_path) as cache:
            kept = [model(image, model.tokenize(some)) for some in names]
        assert cache.found == found and len(files(tmp_path)) == 1
        assert all(torch.equal(a, b) for x, y in zip(plain, kept, strict=True) for a, b in zip(x, y, strict=True))
    shutil.rmtree(tmp_path)
