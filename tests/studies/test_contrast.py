# SPDX-License-Identifier: Apache-2.0
"""The stand-in for CLIP that learns from captions: what it sees, what it never sees, and that it comes out the same."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from drseg_core.config.load import override
from drseg_core.data import IGNORE, open_dataset
from drseg_core.errors import ConfigError
from drseg_core.models.weights import load_weights
from drseg_core.studies import contrast
from drseg_core.studies.contrast import caption, contrastive_loss, draw_crops, present, pretrain
from drseg_core.studies.plan import plan_variant
from drseg_core.studies.runner import train_start
from drseg_core.studies.setting import BARE, make_setting
from drseg_core.studies.tables import DRSEG
from drseg_core.studies.zero_shot import clip_model

# one crop is a whole scene of it
DATA = "synthetic:world=landscape,scenes=6,size=48"
SETTING = make_setting(quick=True, start="contrast", start_steps=2)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "BATCH", 4)
    monkeypatch.setattr(draw_crops, "__defaults__", (4,))


def trained(path: Path, seed: int = 0) -> bytes:
    config = override(SETTING.config, {**BARE, "seed": seed})
    return pretrain(config, DATA, 2, path).read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    first = trained(tmp_path / "a.safetensors")
    torch.rand(7)
    assert trained(tmp_path / "b.safetensors") == first
    assert trained(tmp_path / "c.safetensors", seed=1) != first


def test_where_a_class_is_in_an_image_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels inside each image, with the classes that are present kept, change no byte; another class does."""
    kept = type(open_dataset(DATA, "train")).__getitem__

    def change(how: str) -> None:
        def changed(self, index):
            sample = kept(self, index)
            mask = torch.full_like(sample.mask, int(sample.mask[0, 0]))
            classes = sample.mask.unique()
            # one pixel of each class, and one class everywhere else
            mask.view(-1)[: len(classes)] = classes
            if how == "others":
                mask[-1, -1] = (int(classes[-1]) + 1) % 21
            return sample._replace(mask=mask)

        monkeypatch.setattr(type(open_dataset(DATA, "train")), "__getitem__", changed)

    first = trained(tmp_path / "a.safetensors")
    change("places")
    assert trained(tmp_path / "b.safetensors") == first
    change("others")
    assert trained(tmp_path / "c.safetensors") != first


def test_crops_are_of_the_image_and_names_of_the_crop() -> None:
    dataset = open_dataset("synthetic:world=landscape,scenes=1,size=100", "train")
    sample, crops = dataset[0], draw_crops(dataset, torch.Generator().manual_seed(0), 3)
    assert crops.image.shape == (3, 3, 48, 48)
    windows = sample.image.unfold(1, 48, 1).unfold(2, 48, 1)
    for image, names in zip(crops.image, crops.names, strict=True):
        turned = [torch.rot90(image, turn, (1, 2)) for turn in range(4)]
        found = [(windows == one[:, None, None]).all((0, 3, 4)).nonzero() for one in turned]
        ((top, left),) = torch.cat(found).tolist()
        assert names == present(sample.mask[top : top + 48, left : left + 48], dataset.class_names)
    assert len({tuple(names) for names in crops.names}) > 1


def test_captions() -> None:
    mask = torch.tensor([[2, 2], [IGNORE, 0]], dtype=torch.uint8)
    assert present(mask, ["a", "b", "c"]) == ["a", "c"]
    generator, clip = torch.Generator().manual_seed(0), clip_model_of_seed().clip
    found = {caption(["a", "b", "c"], clip, generator) for _ in range(100)}
    prompts = {f"A photo of a {name} in the scene" for name in "abc"}
    assert found == prompts | {" ".join(order) for order in itertools.permutations("abc")}
    assert caption([], clip, generator) == "A photo of a ground in the scene"
    # of many names as many as the text encoder reads
    names = open_dataset(SETTING.data, "train").class_names
    longest = [caption(names, clip, generator) for _ in range(20)]
    assert clip.tokenize(longest, "{}").shape == (20, clip.text.context_length)


def clip_model_of_seed():
    from drseg_core.checkpoints.run import model_of

    return model_of(override(SETTING.config, BARE))


def test_the_loss_by_hand() -> None:
    image = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    text = torch.eye(2)
    r = 2 * 0.5**0.5
    rows = [-math.log(math.exp(2) / (math.exp(2) + 1)), math.log(2)]
    columns = [-math.log(math.exp(2) / (math.exp(2) + math.exp(r))), -math.log(math.exp(r) / (1 + math.exp(r)))]
    found = contrastive_loss(image, text, torch.tensor(2.0).log())
    assert float(found) == pytest.approx((sum(rows) / 2 + sum(columns) / 2) / 2, rel=1e-5)


def test_positions_are_learned_on_the_grid_of_a_crop_and_read_on_that_of_the_model() -> None:
    clip = clip_model_of_seed().clip
    before = clip.visual.positional_embedding
    native = contrast.coarse_positions(clip, 32)
    assert native == (16, 16) and clip.visual.native_grid == (4, 4) and clip.visual.positional_embedding.shape[0] == 17
    coarse = clip.visual.positional_embedding.detach().clone()
    contrast.restore_positions(clip, native)
    after = clip.visual.positional_embedding
    assert after.shape == before.shape and torch.equal(after[0], coarse[0])
    # means over the table stay
    assert torch.allclose(after[1:].mean(0), coarse[1:].mean(0), atol=0.05)


def test_it_learns_what_is_in_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four pictures with names of their own, the loss falls well below that of a guess."""
    dataset = open_dataset(DATA, "train")
    crops = contrast.Crops(
        torch.stack([dataset[i].image for i in range(4)]), [["grass"], ["hedge"], ["orchard"], ["tank"]]
    )
    monkeypatch.setattr(contrast, "draw_crops", lambda *_: crops)
    losses = []
    real = contrast.contrastive_loss

    def noted(*given: torch.Tensor) -> torch.Tensor:
        losses.append(real(*given))
        return losses[-1]

    monkeypatch.setattr(contrast, "contrastive_loss", noted)
    config = override(SETTING.config, BARE)
    pretrain(config, DATA, 40, tmp_path / "a.safetensors")
    assert losses[-1] < 0.5 * math.log(4)


def test_studies_that_ask_share_one_file(tmp_path: Path) -> None:
    planned = plan_variant(SETTING, DRSEG, 0, tmp_path)
    path = train_start(planned)
    assert path is not None and path.parent == tmp_path / "runs" and path.name.startswith("contrast-0-")
    made = path.stat().st_mtime_ns
    model = clip_model(planned)
    assert path.stat().st_mtime_ns == made and not model.training
    state = load_weights(path)[0]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # the kind of study, what is trained after it and the threads decide nothing of it; seed, data and steps do
    same = dataclasses.replace(SETTING, config=override(SETTING.config, {"train.iterations": 9}))
    assert plan_variant(same, DRSEG, 0, tmp_path).start.path == path
    assert plan_variant(SETTING, DRSEG, 1, tmp_path).start.path != path
    for other in ({"contrast_steps": 3}, {"data": DATA}):
        assert plan_variant(dataclasses.replace(SETTING, **other), DRSEG, 0, tmp_path).start.path != path
    # variants that start from it are others than those that start from the dense one
    dense = plan_variant(dataclasses.replace(SETTING, start="dense"), DRSEG, 0, tmp_path)
    assert dense.folder != planned.folder and dense.start.path != path


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="start is not usable; expected dense or contrast"):
        make_setting(start="captions")
    assert SETTING.suffix == "-contrast" and SETTING.record()["start_steps"] == 2
    dense = make_setting(start_steps=9)
    assert (dense.start_steps, dense.contrast_steps) == (9, 2000) and make_setting(start="contrast").start_steps == 1500
    assert make_setting().suffix == "" and make_setting().record()["start"] == "dense"
