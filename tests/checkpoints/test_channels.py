# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from drseg_core.checkpoints.channels import load_channels, save_channels
from drseg_core.errors import CheckpointError
from tests.training.test_rank_channels import rank


def test_the_file_gives_everything_back(tmp_path):
    found = rank()
    save_channels(tmp_path / "channels.safetensors", found)
    again = load_channels(tmp_path / "channels.safetensors", channels=8, backbone="pooled")
    for name in ("score", "semantic_index", "structural_index", "entropy", "similarity", "energy"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert again.metadata == found.metadata
    wanted = {"backbone", "weights_sha256", "dataset_sha256", "class_names", "alpha", "semantic_ratio", "seed"}
    assert wanted | {"prototypes_per_class"} <= set(again.metadata)


def test_another_share_of_the_same_ranking():
    found = rank()
    other = found.split_again(0.25)
    assert len(other.semantic_index) == 2 and other.metadata["semantic_ratio"] == 0.25
    assert set(other.semantic_index.tolist()) <= set(found.semantic_index.tolist())


def damaged(path: Path, **changes) -> Path:
    from safetensors.torch import load_file, save_file

    found = rank()
    save_channels(path, found)
    tensors = {**load_file(path), **{key: value for key, value in changes.items() if key != "metadata"}}
    metadata = {"drseg_channels": json.dumps({**found.metadata, **changes.get("metadata", {})})}
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantic_index": torch.tensor([0, 1, 2, 2])}, "no partition"),
        ({"structural_index": torch.tensor([4, 5, 6, 8])}, "no partition"),
        ({"score": torch.full((8,), torch.nan)}, "score is not usable"),
        ({"score": torch.ones(8, dtype=torch.long)}, "score is not usable"),
        ({"score": None}, "not a channel ranking"),
        ({"extra": torch.ones(1)}, "not a channel ranking"),
        ({"energy": torch.full((8,), -1.0)}, "energy is not usable"),
        ({"energy": torch.ones(7)}, "energy is not usable"),
        ({"metadata": {"format_version": 9}}, "expected at most 2, got 9"),
        ({"metadata": {"backbone": "ViT-B-16"}}, "expected backbone 'pooled', got 'ViT-B-16'"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_channels(damaged(tmp_path / "c.safetensors", **changes), channels=8, backbone="pooled")
    assert caught.value.exit_code == 4


def test_a_ranking_of_an_earlier_version_is_read(tmp_path):
    path = damaged(tmp_path / "c.safetensors", energy=None, metadata={"format_version": 1})
    found = load_channels(path)
    assert found.energy is None and torch.equal(found.score, rank().score)
    save_channels(tmp_path / "again.safetensors", found)
    assert load_channels(tmp_path / "again.safetensors").energy is None


def test_other_files_are_refused(tmp_path):
    save_channels(tmp_path / "c.safetensors", rank())
    with pytest.raises(CheckpointError, match="expected 9 channels, got 8"):
        load_channels(tmp_path / "c.safetensors", channels=9)
    with pytest.raises(CheckpointError, match="not found"):
        load_channels(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="not a channel ranking"):
        load_channels(tmp_path / "text")
    content = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="not a channel ranking"):
        load_channels(tmp_path / "c.safetensors")
