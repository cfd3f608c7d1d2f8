# SPDX-License-Identifier: Apache-2.0
"""A model folder gives back the very same model, or says why not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from drseg_core.checkpoints import pretrained
from drseg_core.checkpoints.card import read_scores
from drseg_core.checkpoints.channels import load_channels
from drseg_core.checkpoints.licences import UNKNOWN, licence_notes
from drseg_core.checkpoints.pretrained import from_pretrained, load, push_to_hub, save_pretrained
from drseg_core.checkpoints.run import LoadedRun, load_run, training_data
from drseg_core.config.load import override
from drseg_core.config.schema import ClipConfig, DinoConfig, ModelConfig
from drseg_core.errors import CheckpointError, ConfigError, ResourceError
from drseg_core.models.clip import ARCHITECTURES
from drseg_core.models.dino import DinoPrior
from drseg_core.models.weights import weights_hash
from drseg_core.training.loop import train

NAMES = ["green meadow", "bare soil"]
FILES = {"README.md", "channels.safetensors", "classes.txt", "config.json", "manifest.json", "model.safetensors"}


@pytest.fixture(scope="module")
def run(config, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(override(config, {"train.iterations": 2}), data, folder, show_progress=False)


@pytest.fixture(scope="module")
def with_prior(config, data, tmp_path_factory) -> tuple[Path, Path]:
    """A run whose frozen prior came from a file, and the file."""
    home = tmp_path_factory.mktemp("private place")
    prior = DinoPrior(DinoConfig(name="drseg-tiny", weights=None, image_size=32, seed=7))
    file = home / "satellite.safetensors"
    save_file({name: value.clone() for name, value in prior.encoder.state_dict().items()}, file)
    options = override(config, {"train.iterations": 1, "model.dino.weights": str(file)})
    return train(options, data, home / "run", show_progress=False), file


def outputs(loaded: LoadedRun) -> list[torch.Tensor]:
    image = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = loaded.model(image, loaded.model.tokenize(NAMES))
    return [value for value in found if value is not None]


def equal(first: LoadedRun, second: LoadedRun) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(second), strict=True))


def test_round_trip_is_bit_equal(run, data, tmp_path):
    before = load_run(run)
    folder = save_pretrained(before, tmp_path / "model")
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    after = from_pretrained(folder)
    assert not after.model.training and after.step == 2 and after.class_names == before.class_names
    assert after.config == before.config and len(outputs(after)) == 4
    assert equal(before, after) and weights_hash(before.model) == weights_hash(after.model)
    # once more, from what was loaded: file by file the same, but for nothing
    again = save_pretrained(after, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_the_ranking_the_classes_and_the_origin_are_inside(run, tmp_path):
    folder = save_pretrained(load_run(run), tmp_path / "model")
    ranking = load_channels(folder / "channels.safetensors")
    model = from_pretrained(folder).model
    assert torch.equal(ranking.semantic_index, model.spsd.semantic_index)
    assert (folder / "classes.txt").read_text().splitlines() == ["bare soil", "red roof", "blue pond"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["spec"] == "folder" and manifest["data"]["samples"] == 5
    assert manifest["parameters"]["total"]["trainable"] > 0 and "command" not in manifest
    assert training_data(from_pretrained(folder)) == "folder"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "drseg" in file.metadata()


def test_a_prior_that_was_left_out_is_asked_for_and_checked(with_prior, tmp_path):
    run, file = with_prior
    before = load_run(run)
    folder = save_pretrained(before, tmp_path / "model")
    description = json.loads((folder / "config.json").read_text())
    assert description["config"]["model"]["dino"]["weights"] == "satellite.safetensors"
    assert list(description["left_out"]) == ["dino"]
    for path in folder.iterdir():
        assert b"private place" not in path.read_bytes(), path.name
    with pytest.raises(CheckpointError, match=r"satellite\.safetensors' not found"):
        from_pretrained(folder)
    after = from_pretrained(folder, weights={"dino": str(file)})
    assert equal(before, after)
    other = tmp_path / "other.safetensors"
    prior = DinoPrior(DinoConfig(name="drseg-tiny", weights=None, image_size=32, seed=8))
    save_file({name: value.clone() for name, value in prior.encoder.state_dict().items()}, other)
    with pytest.raises(CheckpointError, match="model.dino.weights are not those"):
        from_pretrained(folder, weights={"dino": str(other)})
    with pytest.raises(ConfigError, match="expected one of clip, dino, remote, got 'dyno'"):
        from_pretrained(folder, weights={"dyno": str(file)})


def test_a_prior_may_go_along(with_prior, tmp_path):
    run, _ = with_prior
    before = load_run(run)
    folder = save_pretrained(before, tmp_path / "model", include_frozen=True)
    assert json.loads((folder / "config.json").read_text())["left_out"] == {}
    assert equal(before, from_pretrained(folder))
    assert "| dino | drseg-tiny | satellite.safetensors |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["ugaf", "none"])
def test_a_second_clip_is_left_out_or_goes_along(config, data, tmp_path, kind):
    from open_clip.model import CLIP

    file = tmp_path / "RemoteCLIP.safetensors"
    state = CLIP(**ARCHITECTURES["drseg-tiny"]).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    options = {
        "train.iterations": 1,
        "model.fusion.kind": kind,
        "model.decoder.remote_clip": True,
        "model.remote.name": "drseg-tiny",
        "model.remote.weights": str(file),
        "model.remote.image_size": 32,
        "model.remote.guidance_blocks": [0, 1],
    }
    before = load_run(train(override(config, options), data, tmp_path / "run", show_progress=False))
    folder = save_pretrained(before, tmp_path / "model")
    whole = save_pretrained(before, tmp_path / "whole", include_frozen=True)
    assert list(json.loads((folder / "config.json").read_text())["left_out"]) == ["remote"]
    row = f"| remote | drseg-tiny | RemoteCLIP.safetensors | {UNKNOWN} |"
    assert f"{row} no, has to be fetched |" in (folder / "README.md").read_text()
    assert f"{row} yes |" in (whole / "README.md").read_text()
    assert equal(before, from_pretrained(folder, weights={"remote": str(file)}))
    file.rename(tmp_path / "elsewhere")
    assert equal(before, from_pretrained(whole))
    with pytest.raises(CheckpointError, match="'RemoteCLIP.safetensors' not found"):
        from_pretrained(folder)


@pytest.mark.promise("C29")
@pytest.mark.parametrize("name", ["model.safetensors", "channels.safetensors", "classes.txt", "config.json"])
def test_damage_is_noticed(run, tmp_path, name):
    folder = save_pretrained(load_run(run), tmp_path / "model")
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} (is|was not).* damaged") as caught:
        from_pretrained(folder)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read" if name != "config.json" else "config.json"):
        from_pretrained(folder)


def test_the_card_may_be_edited_and_a_newer_format_is_refused(run, tmp_path):
    folder = save_pretrained(load_run(run), tmp_path / "model")
    (folder / "README.md").write_text("mine\n")
    from_pretrained(folder)
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**description, "format_version": 2}))
    with pytest.raises(CheckpointError, match="newer format; expected at most 1, got 2"):
        from_pretrained(folder)


def test_a_folder_in_use_and_a_foreign_ranking_are_refused(run, tmp_path):
    loaded = load_run(run)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="folder is in use"):
        save_pretrained(loaded, tmp_path)
    ranking = load_channels(run / "channels.safetensors")
    other = dataclasses.replace(ranking, score=-ranking.score).split_again(0.5)
    with pytest.raises(CheckpointError, match="expected the ranking behind its split"):
        save_pretrained(loaded, tmp_path / "model", channels=other)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("late", [False, True])
def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch, late):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "file_hash" if late else "save_weights", full)
    with pytest.raises(ResourceError, match=r"model could not be written \(\[Errno 28\] No space left"):
        save_pretrained(load_run(run), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_from_the_hub(run, tmp_path, monkeypatch):
    import huggingface_hub

    folder = save_pretrained(load_run(run), tmp_path / "model")
    asked: list[tuple] = []

    def snapshot(name, **options):
        asked.append((name, options["revision"], options["local_files_only"], set(options["allow_patterns"])))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    loaded = from_pretrained("somebody/drseg-vitl", revision="v1", local_files_only=True)
    assert asked == [("somebody/drseg-vitl", "v1", True, FILES)]
    assert equal(loaded, load_run(run))

    def fail(*arguments, **options):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="cannot be fetched; .* got OSError: no route to host$"):
        from_pretrained("somebody/drseg-vitl")
    with pytest.raises(CheckpointError, match="not found; expected a folder, or owner/name on the hub"):
        from_pretrained(tmp_path / "absent")


class Hub:
    """Stands for huggingface_hub's ``HfApi``: notes what it is asked for, and keeps what it is sent in ``store``."""

    fails: dict[str, Exception] = {}
    asked: list[tuple] = []
    store: Path

    def __init__(self, token=None):
        self.token = token

    def _note(self, name, *facts):
        self.asked.append((name, self.token, *facts))
        if name in self.fails:
            raise self.fails[name]

    def whoami(self):
        self._note("whoami")

    def create_repo(self, repo_id, *, private, exist_ok):
        self._note("create_repo", repo_id, private, exist_ok)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, revision, commit_message):
        self._note("upload_folder", repo_id, revision, commit_message)
        sent = {path.name for path in Path(folder_path).iterdir()} & set(allow_patterns)
        self.store.mkdir(exist_ok=True)
        for path in self.store.iterdir():
            if path.name in delete_patterns and path.name not in sent:
                path.unlink()
        for name in sent:
            shutil.copy(Path(folder_path) / name, self.store)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    fake = type("Hub", (Hub,), {"fails": {}, "asked": [], "store": tmp_path / "hub"})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return fake


def test_a_run_goes_to_the_hub_and_comes_back(run, tmp_path, hub):
    for model in (run, load_run(run), run / "checkpoints" / "step-00000002"):
        hub.asked.clear()
        address = push_to_hub(model, "somebody/drseg", token="secret", revision="dev", message="two steps")
        assert address == "https://hub/somebody/drseg/commit/1"
        assert hub.asked == [
            ("whoami", "secret"),
            ("create_repo", "secret", "somebody/drseg", True, True),
            ("upload_folder", "secret", "somebody/drseg", "dev", "two steps"),
        ]
        assert {path.name for path in hub.store.iterdir()} == FILES
        assert equal(from_pretrained(hub.store), load_run(run))
    assert list((tmp_path / "scratch").iterdir()) == []
    assert all(b"secret" not in path.read_bytes() for path in hub.store.iterdir())


def test_a_finished_folder_goes_as_it_is(run, tmp_path, hub):
    folder = save_pretrained(load_run(run), tmp_path / "model")
    (folder / "README.md").write_text("mine\n")
    (folder / "diary.txt").write_text("dear diary")
    hub.store.mkdir()
    for name in ("channels.safetensors", "LICENSE"):
        (hub.store / name).write_text("of an earlier model")
    push_to_hub(folder, "somebody/drseg", private=False)
    assert hub.asked[1] == ("create_repo", None, "somebody/drseg", False, True)
    assert {path.name for path in hub.store.iterdir()} == FILES | {"LICENSE"}
    assert all((hub.store / name).read_bytes() == (folder / name).read_bytes() for name in FILES)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_an_earlier_model_had_is_gone(config, data, tmp_path, hub):
    options = override(config, {"train.iterations": 1, "model.fusion.kind": "none"})
    baseline = train(options, data, tmp_path / "run", show_progress=False)
    hub.store.mkdir()
    (hub.store / "channels.safetensors").write_text("of an earlier model")
    push_to_hub(baseline, "somebody/drseg")
    assert {path.name for path in hub.store.iterdir()} == FILES - {"channels.safetensors"}


@pytest.mark.promise("C39")
def test_the_card_tells_how_to_load_it_and_what_it_was_trained_on(with_prior, hub):
    run, _ = with_prior
    push_to_hub(run, "somebody/drseg")
    card = (hub.store / "README.md").read_text()
    assert card.startswith("---\n") and 'drseg.load("somebody/drseg")' in card
    assert 'weights={"dino": "FILE"}' in card and "| dino | drseg-tiny | satellite.safetensors |" in card
    manifest = json.loads((run / "manifest.json").read_text())
    total = manifest["parameters"]["total"]
    for line in (
        "| data | folder, 5 images |",
        f"| data SHA-256 | {manifest['data']['sha256']} |",
        "| steps | 1 of 2 crops of 32 px |",
        "| loss, precision | binary, float32 |",
        f"| parameters | {total['total']:,}, {total['trainable']:,} of them trained |",
        "bare soil, red roof, blue pond",
    ):
        assert line in card, line
    assert "private place" not in card and "None" not in card
    push_to_hub(run, "somebody/drseg", include_frozen=True)
    card = (hub.store / "README.md").read_text()
    assert "FILE" not in card and "has to be fetched" not in card
    assert from_pretrained(hub.store).config.model.dino.weights == "satellite.safetensors"


def test_the_card_shows_scores_of_this_model_only(run, with_prior, data, tmp_path, hub):
    from drseg_core.cli.main import main

    file = tmp_path / "metrics.json"
    assert main(["evaluate", str(run), "--data", data, "--out", str(file), "--device", "cpu"]) == 0
    push_to_hub(run, "somebody/drseg", results=[file])
    found = json.loads(file.read_text())
    row = f"| folder | val | 5 | none | {found['class_names_sha256'][:12]} | present | {found['mIoU']:.2f} % |"
    assert row in (hub.store / "README.md").read_text()
    # nothing over nothing, and a protocol
    found.update(mIoU=None, protocol={"name": "rskt"})
    file.write_text(json.dumps(found))
    (card,) = read_scores([file], found["weights_sha256"])
    assert (card["protocol"], card["mIoU"]) == ("rskt", "-")
    hub.asked.clear()
    with pytest.raises(
        ConfigError, match=r"metrics.json belongs to another model; expected weights \w{12}, got \w{12}$"
    ):
        push_to_hub(with_prior[0], "somebody/drseg", results=[file])
    for text in ("{}", "[]", "no JSON", None):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ConfigError, match="expected a file of drseg evaluate"):
            push_to_hub(run, "somebody/drseg", results=[file])
    assert {name for name, *_ in hub.asked} == {"whoami"}


@pytest.mark.parametrize("place", ["whoami", "create_repo", "upload_folder"])
def test_without_network_or_token(run, tmp_path, hub, place):
    from huggingface_hub.errors import LocalTokenNotFoundError

    error = LocalTokenNotFoundError("Token is required\nmore") if place == "whoami" else OSError("no route to host\n.")
    hub.fails[place] = error
    with pytest.raises(CheckpointError, match=r"a token with the right to write .* got (LocalToken|OSError)") as caught:
        push_to_hub(run, "somebody/drseg", token="secret")
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert hub.asked[-1][0] == place and not hub.store.exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_cannot_be_pushed(run, tmp_path, hub):
    for name in ("drseg", "a/b/c", "some body/drseg", "", "/drseg", "somebody/"):
        with pytest.raises(ConfigError, match="expected owner/name"):
            push_to_hub(run, name)
    folder = save_pretrained(load_run(run), tmp_path / "model")
    with pytest.raises(ConfigError, match="is a finished folder"):
        push_to_hub(folder, "somebody/drseg", include_frozen=True)
    with pytest.raises(ConfigError, match="is a finished folder"):
        push_to_hub(folder, "somebody/drseg", results=["metrics.json"])
    assert hub.asked == []
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        push_to_hub(folder, "somebody/drseg")
    with pytest.raises(CheckpointError):
        push_to_hub(tmp_path / "absent", "somebody/drseg")
    assert {name for name, *_ in hub.asked} == {"whoami"} and not hub.store.exists()


def test_load_takes_runs_checkpoints_and_folders(run, tmp_path):
    folder = save_pretrained(load_run(run), tmp_path / "model")
    paths = [run, run / "checkpoints" / "step-00000002", folder]
    first, *others = [load(path) for path in paths]
    assert all(equal(first, other) for other in others)


def test_licences():
    (clip, dino) = licence_notes(ModelConfig(), {"clip"})
    assert clip == {
        "part": "clip",
        "architecture": "ViT-L-14-336-quickgelu",
        "weights": "openai",
        "licence": "MIT (OpenAI)",
        "included": True,
    }
    assert (dino["licence"], dino["weights"], dino["included"]) == ("dinov3-license", "pretrained", False)
    local = ModelConfig(clip=ClipConfig(weights="RemoteCLIP-ViT-L-14.pt"), dino=DinoConfig(weights="sat.pth"))
    (clip, dino) = licence_notes(local, {"clip"})
    assert clip["licence"] == UNKNOWN
    assert dino["licence"] == "dinov3-license, if the file is the published one"
    nothing = ModelConfig(clip=ClipConfig(weights=None), dino=DinoConfig(name="drseg-tiny", weights=None))
    assert [note["licence"] for note in licence_notes(nothing, {"clip"})] == ["none: no published weights"] * 2
