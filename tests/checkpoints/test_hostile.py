# SPDX-License-Identifier: Apache-2.0
"""Files that somebody made to harm: their checksums are right, and what they say is not. A line refuses each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drseg_core.checkpoints.check_weights import read_values
from drseg_core.checkpoints.checkpoint import DESCRIPTION, content_hash, newest_checkpoint, open_checkpoint
from drseg_core.checkpoints.pretrained import from_pretrained, save_pretrained
from drseg_core.checkpoints.run import load_run
from drseg_core.config.load import override
from drseg_core.errors import CheckpointError, DRSegError
from drseg_core.models.weights import load_weights
from drseg_core.scenes.sources import list_scenes
from drseg_core.training.loop import train

DEEP = "[" * 100_000
WRONG: tuple[Any, ...] = (None, True, -1.5, "text", [], [1], {}, {"a": 1})


@pytest.fixture(scope="module")
def run(config, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(override(config, {"train.iterations": 1}), data, folder, show_progress=False)


@pytest.fixture(scope="module")
def model(run, tmp_path_factory) -> Path:
    return save_pretrained(load_run(run), tmp_path_factory.mktemp("given") / "model")


def sealed(path: Path, description: dict[str, Any]) -> None:
    """With the checksum that fits."""
    content = {key: value for key, value in description.items() if key != "sha256"}
    path.write_text(json.dumps({**content, "sha256": content_hash(content)}))


def lies(path: Path, description: dict[str, Any]) -> Iterator[str]:
    """Each field left out, and with every other kind of content, one at a time."""
    for name in description.keys() - {"sha256"}:
        sealed(path, {key: value for key, value in description.items() if key != name})
        yield f"without {name}"
        for value in WRONG:
            if (name, value) == ("config", {}):
                # that of the default model, whose weights are asked of the hub
                continue
            sealed(path, {**description, name: value})
            yield f"{name} {value!r}"
    sealed(path, description)


def outcomes(path: Path, description: dict[str, Any], load: Callable[[], object]) -> dict[str, int]:
    """How many lies were refused, and how many are no matter."""
    found = {"refused": 0, "loaded": 0}
    for what in lies(path, description):
        try:
            load()
        except DRSegError as error:
            assert isinstance(error, CheckpointError) and "\n" not in str(error), what
            found["refused"] += 1
        except BaseException as error:
            raise AssertionError(what) from error
        else:
            found["loaded"] += 1
    return found


@pytest.mark.promise("C53")
def test_what_a_checkpoint_says_is_looked_at(run):
    path = newest_checkpoint(run).path
    description = json.loads((path / DESCRIPTION).read_text())
    found = outcomes(path / DESCRIPTION, description, lambda: load_run(path))
    # empty lists and dictionaries are of the right kind
    assert found["refused"] >= 50 and open_checkpoint(path).step == 1


@pytest.mark.promise("C53")
def test_what_a_model_folder_says_is_looked_at(model):
    description = json.loads((model / "config.json").read_text())
    found = outcomes(model / "config.json", description, lambda: from_pretrained(model))
    assert found["refused"] >= 50


@pytest.mark.promise("C53")
@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/dev/zero", "sub/config.json", "pipe", "model.safetensors\n"]
)
def test_a_model_folder_names_files_of_its_own_alone(model, name):
    description = json.loads((model / "config.json").read_text())
    sealed(model / "config.json", {**description, "files": {**description["files"], name: "0" * 64}})
    try:
        with pytest.raises(CheckpointError, match="names .*; expected files that save_pretrained writes") as caught:
            from_pretrained(model)
        assert "\n" not in str(caught.value)
    finally:
        sealed(model / "config.json", description)


@pytest.mark.promise("C53")
def test_a_file_that_never_ends_is_not_read(model):
    (model / "classes.txt").rename(model / "kept")
    os.mkfifo(model / "classes.txt")
    try:
        with pytest.raises(CheckpointError, match="names 'classes.txt'"):
            from_pretrained(model)
    finally:
        (model / "kept").replace(model / "classes.txt")


@pytest.mark.promise("C53")
def test_json_that_is_nested_without_end(run, model, tmp_path):
    path = newest_checkpoint(run).path / DESCRIPTION
    for file, load in (
        (path, lambda: load_run(run)),
        (model / "config.json", lambda: from_pretrained(model)),
        (tmp_path / "values.json", lambda: read_values(tmp_path / "values.json")),
        (tmp_path / "scenes.json", lambda: list_scenes([str(tmp_path / "scenes.json")])),
    ):
        before = file.read_bytes() if file.exists() else None
        file.write_text(DEEP)
        with pytest.raises(DRSegError) as caught:
            load()
        assert "\n" not in str(caught.value) and caught.value.exit_code in (3, 4)
        if before is not None:
            file.write_bytes(before)


@pytest.mark.promise("C53")
def test_a_header_of_weights_that_is_nested_without_end(tmp_path):
    text = DEEP.encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="damaged header"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.promise("C53")
def test_an_onnx_file_does_not_lead_elsewhere(tmp_path):
    onnx = pytest.importorskip("onnx")
    from drseg_core.checkpoints.from_onnx import dinov2_from_onnx

    secret = tmp_path / "secret"
    secret.write_bytes(torch.ones(4).numpy().tobytes())
    (tmp_path / "model").mkdir()
    for place in ("../secret", str(secret), "secret"):
        tensor = onnx.TensorProto(name="embeddings.cls_token", dims=[4], data_type=onnx.TensorProto.FLOAT)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)
        graph = onnx.helper.make_graph([], "small", [], [], [tensor])
        path = tmp_path / "model" / "m.onnx"
        path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
        with pytest.raises(CheckpointError, match="its weights inside, got tensors in other files"):
            dinov2_from_onnx(path)
