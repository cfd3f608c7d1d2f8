# SPDX-License-Identifier: Apache-2.0
"""A flipped bit that no decoder notices is found by the manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from drseg_core.data import open_dataset
from drseg_core.data.synthetic import write_scenes
from drseg_core.errors import DatasetError


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    root = write_scenes(tmp_path / "scenes", splits={"val": 2}, size=48)
    files = sorted(root.glob("val/*/*"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(root)}" for path in files]
    (root / "manifest.sha256").write_text("\n".join(lines) + "\n")
    return root


def test_an_intact_set_opens(scenes):
    assert len(open_dataset(f"folder:{scenes}", "val")) == 2


@pytest.mark.promise("C35")
def test_a_flipped_bit_is_found(scenes):
    path = sorted(scenes.glob("val/images/*"))[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"{path.name} has changed; expected SHA-256 .* got"):
        open_dataset(f"folder:{scenes}", "val")


def test_a_file_the_manifest_does_not_know_is_refused(scenes):
    lines = (scenes / "manifest.sha256").read_text().splitlines()
    (scenes / "manifest.sha256").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(DatasetError, match="is not in manifest.sha256"):
        open_dataset(f"folder:{scenes}", "val")
