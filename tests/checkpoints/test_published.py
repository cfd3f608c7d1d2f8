# SPDX-License-Identifier: Apache-2.0
"""Weights that others publish: which they are, where they are looked for, and in which order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from drseg_core.checkpoints.encoders import choose_clip, choose_prior, load_encoders
from drseg_core.checkpoints.published import Published, fetched, published_clip, published_prior
from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.errors import CheckpointError, ConfigError
from drseg_core.models.clip import ClipEncoder
from drseg_core.models.dino import DinoPrior

CLIP = ClipConfig(name="ViT-B-16-quickgelu")


class Hub:
    """Repositories and a cache of files that are not on any network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.asked: list[str] = []
        self.published: set[str] = set()
        self.folder = folder
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.cached)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def path(self, repository: str, file: str) -> Path:
        return self.folder / repository.replace("/", "--") / file

    def cached(self, repository: str, file: str) -> str | None:
        path = self.path(repository, file)
        return str(path) if path.is_file() else None

    def download(self, repository: str, file: str) -> str:
        self.asked.append(f"{repository}/{file}")
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        if f"{repository}/{file}" not in self.published:
            raise huggingface_hub.errors.EntryNotFoundError("no such file")
        path = self.path(repository, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("weights")
        return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    return Hub(monkeypatch, tmp_path)


def two() -> list[Published]:
    found = [published_clip(CLIP), published_prior(DinoConfig())]
    return [source for source in found if source is not None]


def test_what_names_stand_for(tmp_path: Path) -> None:
    clip, prior = two()
    assert clip.place == "timm/vit_base_patch16_clip_224.openai" and clip.licence == "MIT (OpenAI)"
    assert prior.place == "timm/vit_large_patch16_dinov3.sat493m" and prior.licence == "dinov3-license"
    assert clip.files[0] == "open_clip_model.safetensors" and prior.files[0] == "model.safetensors"
    remote = published_clip(ClipConfig(name="ViT-L-14", weights="hub:owner/RemoteCLIP/weights/L-14.pt"))
    assert remote is not None and (remote.place, remote.files) == ("owner/RemoteCLIP", ("weights/L-14.pt",))
    assert remote.address == "https://huggingface.co/owner/RemoteCLIP"
    own = tmp_path / "own.pt"
    own.touch()
    for weights in (None, str(own)):
        assert published_clip(ClipConfig(weights=weights)) is None
        assert published_prior(DinoConfig(weights=weights)) is None


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_name_is_no_path(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What lies in the working folder under the name of a tag changes nothing, and nothing is asked of a network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    expected = two()
    for name in ("openai", "pretrained"):
        Path(name).mkdir() if kind == "folder" else Path(name).touch()
    assert two() == expected and len(expected) == 2
    for clip, prior in ((CLIP, DinoConfig()), (ClipConfig(name="drseg-tiny", weights=None), DinoConfig())):
        with pytest.raises(CheckpointError, match="--offline never connects"):
            load_encoders(clip, prior, offline=True)
    assert hub.asked == []


def test_offline_reaches_the_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked of them, they never fetch."""
    import open_clip.pretrained
    import timm

    def fetch(*given: object, **options: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", fetch)
    monkeypatch.setattr(timm, "create_model", fetch)
    for encoder, config in ((ClipEncoder, CLIP), (DinoPrior, DinoConfig())):
        with pytest.raises(CheckpointError, match="are not here; expected a file, as offline is set"):
            encoder(config, offline=True)  # type: ignore[arg-type]


def test_the_cache_comes_first(hub: Hub) -> None:
    sources = two()
    hub.published = {f"{sources[0].place}/open_clip_pytorch_model.bin", f"{sources[1].place}/model.safetensors"}
    paths = fetched(sources)
    assert [path.name for path in paths] == ["open_clip_pytorch_model.bin", "model.safetensors"]
    # the better format was asked for first
    assert [name.rpartition("/")[2] for name in hub.asked][:2] == [
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
    ]
    hub.asked.clear()
    assert fetched(sources) == paths == fetched(sources, offline=True) and hub.asked == []


def test_retries_are_not_printed(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CheckpointError):
        fetched(two())
    assert hub.asked and not any("Retrying" in record.getMessage() for record in caplog.records)
    # and only while weights are fetched
    logging.getLogger("huggingface_hub").warning("another")
    assert "another" in caplog.messages


def test_all_licences_are_shown_before_the_first_download(
    hub: Hub, caplog: pytest.LogCaptureFixture, logged: Callable[[], list[str]]
) -> None:
    with caplog.at_level(logging.INFO, "drseg_core"), pytest.raises(CheckpointError) as caught:
        fetched(two())
    assert [line.rpartition("licence: ")[2] for line in logged()] == [
        "MIT (OpenAI)",
        "dinov3-license",
    ]
    assert "\n" not in str(caught.value) and "EntryNotFoundError: no such file" in str(caught.value)
    caplog.clear()
    with caplog.at_level(logging.INFO, "drseg_core"), pytest.raises(CheckpointError, match="never connects"):
        fetched(two(), offline=True)
    assert logged() == []


def test_only_what_is_missing_is_named(hub: Hub) -> None:
    clip, prior = two()
    hub.published = {f"{clip.place}/{clip.files[0]}"}
    with pytest.raises(CheckpointError) as caught:
        fetched([clip, prior])
    assert prior.place in str(caught.value) and clip.place not in str(caught.value)


def test_what_is_typed(tmp_path: Path) -> None:
    own = tmp_path / "a:b.pt"
    own.touch()
    assert choose_clip(CLIP, None) is CLIP and choose_clip(CLIP, "random").weights is None
    assert choose_clip(CLIP, str(own)).weights == str(own)
    assert choose_clip(CLIP, "laion2b_e16").weights == "laion2b_e16"
    named = choose_clip(CLIP, "ViT-B-32-quickgelu")
    assert (named.name, named.weights) == ("ViT-B-32-quickgelu", "openai")
    named = choose_clip(CLIP, f"ViT-L-14:{own}")
    assert (named.name, named.weights) == ("ViT-L-14", str(own))
    with pytest.raises(ConfigError, match="ViT-H-14 has no weights openai; expected ViT-H-14:WEIGHTS"):
        choose_clip(CLIP, "ViT-H-14")
    prior = choose_prior(DinoConfig(layer=3), "vit_base_patch14_dinov2.lvd142m")
    assert (prior.weights, prior.normalization, prior.layer) == ("pretrained", "imagenet", None)
    assert choose_prior(prior, "vit_large_patch16_dinov3.sat493m").normalization == "sat"
    assert choose_prior(prior, f"vit_small_patch14_dinov2:{own}").weights == str(own)
    assert choose_prior(DinoConfig(), "none").name == "none" and choose_prior(DinoConfig(), "random").weights is None
    for choose in (choose_clip, choose_prior):
        with pytest.raises(CheckpointError, match="absent.pt not found; expected a file of weights"):
            choose(CLIP if choose is choose_clip else DinoConfig(), "absent.pt")  # type: ignore[arg-type]
