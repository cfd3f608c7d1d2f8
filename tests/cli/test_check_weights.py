# SPDX-License-Identifier: Apache-2.0
"""``drseg check-weights``: what is the same, what differs, what is not known, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip.pretrained
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from drseg_core.checkpoints import check_weights, known_weights
from drseg_core.checkpoints.checkpoint import file_hash
from drseg_core.checkpoints.known_weights import PICTURES, TOKEN_IDS, Known, known_values
from drseg_core.config.zero_shot import load_zero_shot
from drseg_core.models.clip import open_clip_model
from drseg_core.models.dino import DinoPrior
from drseg_core.models.weights import load_weights, save_weights
from tests.checkpoints.real import real_prior

Command = Callable[..., tuple[int, str, str]]
FILES = ("clip.safetensors", "prior.safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of the small encoders as others would publish them, and what they compute."""
    folder, preset = tmp_path_factory.mktemp("weights"), load_zero_shot("tiny")
    torch.manual_seed(0)
    clip = open_clip_model(preset.clip, True)[0].state_dict()
    prior = DinoPrior(preset.prior).encoder.state_dict()
    for name, state in zip(FILES, (clip, prior), strict=True):
        # initial weights tell no two images apart
        save_file({key: value + 0.1 * torch.randn_like(value.float()) for key, value in state.items()}, folder / name)
    return folder


def words(folder: Path, *more: Any) -> list[Any]:
    return ["check-weights", "tiny", "--clip", folder / FILES[0], "--prior", folder / FILES[1], "--offline", *more]


@pytest.fixture(scope="module")
def values(weights: Path) -> Path:
    from drseg_core.cli.main import main

    path = weights / "values.json"
    assert main([str(word) for word in words(weights, "--out", path)]) == 8
    return path


def changed(weights: Path, target: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    for file in FILES:
        state = load_file(weights / file)
        if file == name:
            change(state)
        save_file(state, target / file)
    return target


def lines(text: str, verdict: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{verdict} ")]


def exchange(first: str, second: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[first], state[second] = state[second].clone(), state[first].clone()

    return change


def swap_query_and_key(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        query, key, value = state[name].chunk(3)
        state[name] = torch.cat((key, query, value))

    return change


def test_what_is_not_known_is_said_so(drseg: Command, weights: Path) -> None:
    code, text, errors = drseg(*words(weights))
    assert code == 8 and "pictures are not best described by their own words" in errors
    assert len(lines(text, "same")) == len(TOKEN_IDS) and not lines(text, "DIFFERS")
    unknown = lines(text, "unknown")
    assert len(unknown) == 12 and all(line.endswith("no expected value is committed for it") for line in unknown)
    assert f"SHA-256 of CLIP: {file_hash(weights / FILES[0])};" in text
    assert f"SHA-256 of the prior: {file_hash(weights / FILES[1])};" in text
    (*_, odd) = lines(text, "ODD")
    assert odd.startswith("best prompt of the ") and "by far" in odd
    assert "3 the same, 0 differ, 12 not known" in text


def test_the_same_weights_are_the_same(drseg: Command, weights: Path, values: Path) -> None:
    code, text, _ = drseg(*words(weights, "--expected", values))
    assert code == 8 and len(lines(text, "same")) == 15 and "15 the same, 0 differ, 0 not known" in text


@pytest.mark.parametrize(
    ("file", "change", "differing"),
    [
        (FILES[0], swap_query_and_key("transformer.resblocks.1.attn.in_proj_weight"), {"SHA", "text", "scores"}),
        (
            FILES[0],
            swap_query_and_key("visual.transformer.resblocks.0.attn.in_proj_weight"),
            {"SHA", "image", "scores"},
        ),
        (FILES[0], exchange("visual.ln_pre.weight", "visual.ln_post.weight"), {"SHA", "image", "scores"}),
        (FILES[1], swap_query_and_key("blocks.1.attn.qkv.weight"), {"SHA", "prior"}),
        (FILES[1], exchange("blocks.0.norm1.weight", "blocks.0.norm2.weight"), {"SHA", "prior"}),
        (FILES[1], lambda state: state.update({"norm.bias": state["norm.bias"] + 1e-7}), {"SHA"}),
    ],
)
def test_other_weights_are_reported(
    drseg: Command, weights: Path, values: Path, tmp_path: Path, file: str, change: Any, differing: set[str]
) -> None:
    code, text, errors = drseg(*words(changed(weights, tmp_path, file, change), "--expected", values))
    found = lines(text, "DIFFERS")
    assert code == 4 and {line.split()[0].partition("-")[0] for line in found} == differing
    assert all("; expected " in line for line in found)
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert f"check-weights: {len(found)} values differ; expected those that are known, got others for " in line


def test_a_published_hash(drseg: Command, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip has the address of OpenAI's file, and the address its hash."""
    digest = file_hash(weights / FILES[0])
    for name, expected in (("ViT-tiny.safetensors", "same"), ("other.safetensors", "unknown")):
        (tmp_path / name).write_bytes((weights / FILES[0]).read_bytes())
        for published in (digest, "0" * 64):
            url = f"https://example.org/clip/models/{published}/ViT-tiny.safetensors"
            monkeypatch.setattr(open_clip.pretrained, "list_pretrained_tags_by_model", lambda name: ["openai"])
            monkeypatch.setattr(
                open_clip.pretrained,
                "get_pretrained_cfg",
                lambda name, tag, url=url: {"url": url} if tag == "openai" else {},
            )
            code, text, _ = drseg("check-weights", "tiny", "--clip", tmp_path / name, "--prior", "none")
            verdict = "DIFFERS" if expected == "same" and published != digest else expected
            assert code == (4 if verdict == "DIFFERS" else 8), text
            assert [line for line in lines(text, verdict) if line.startswith(f"SHA-256 of CLIP: {digest}")]


def test_the_hash_in_the_address_of_a_preset() -> None:
    clip = load_zero_shot("b").clip
    found = known_weights.published_hash(clip, f"{clip.name}, ViT-B-16.pt")
    assert found == "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
    assert known_weights.published_hash(clip, f"{clip.name}, openai") is None


def test_token_ids_that_differ(drseg: Command, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKEN_IDS, "a dog", [49406, 320, 1930, 49407])
    code, text, _ = drseg(*words(weights))
    assert code == 4 and lines(text, "DIFFERS")[0].startswith("token ids of 'a dog': [49406, 320, 1929, 49407]; exp")


def test_scores_of_a_published_picture(
    drseg: Command, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (300, 200), (200, 180, 20)).save(tmp_path / "CLIP.png")
    more = ("--picture", tmp_path / "CLIP.png", "--out", tmp_path / "values.json")
    code, text, _ = drseg(*words(weights, *more))
    assert code == 8 and [line for line in lines(text, "unknown") if line.startswith("scores of CLIP.png: ")]
    scores = json.loads((tmp_path / "values.json").read_text())["scores of CLIP.png"]
    assert len(scores) == 3 and sum(scores) == pytest.approx(1, abs=1e-3)
    clip = load_zero_shot("tiny").clip
    for shift, wanted in ((0.005, 8), (0.02, 4)):
        published = {"scores of CLIP.png": Known([scores[0] + shift, *scores[1:]], 0.01)}
        monkeypatch.setitem(known_weights._CLIP, (clip.name, str(weights / FILES[0])), published)
        assert drseg(*words(weights, *more[:2]))[0] == wanted
    code, _, errors = drseg(*words(weights, "--picture", tmp_path / "absent.png"))
    assert code == 3 and f"check_weights: picture {tmp_path / 'absent.png'} not found; expected an image file" in errors


def test_what_is_committed() -> None:
    preset = load_zero_shot("b")
    assert set(known_values(preset.clip, preset.prior)) == {f"token ids of {prompt!r}" for prompt in TOKEN_IDS}
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        clip = type(preset.clip)(name=name)
        value = known_values(clip, preset.prior)["scores of CLIP.png"].value
        assert sum(value) == pytest.approx(1, abs=1e-5) and value[0] > 0.99


def test_a_picture_best_described_by_its_own_words(
    drseg: Command, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_weights, "_scores", lambda model: torch.eye(4)[:2])
    code, text, _ = drseg(*words(weights))
    assert code == 0 and len(lines(text, "seen")) == 2 and not lines(text, "ODD")


@pytest.mark.parametrize(("first", "second", "verdict"), [(0.74, 0.2, "seen"), (0.74, 0.26, "ODD"), (0.41, 0.4, "ODD")])
def test_first_by_a_little_is_not_seen(
    drseg: Command, weights: Path, monkeypatch: pytest.MonkeyPatch, first: float, second: float, verdict: str
) -> None:
    scores = torch.tensor([[first, second, 0, 0], [second, first, 0, 0]])
    monkeypatch.setattr(check_weights, "_scores", lambda model: scores)
    code, text, errors = drseg(*words(weights))
    assert code == (0 if verdict == "seen" else 8) and len(lines(text, verdict)) == 2
    assert f"({first:.2f}), then" in lines(text, verdict)[0] and f"({second:.2f}); expected" in lines(text, verdict)[0]
    assert "by far: 0.5 more than the next" in text and ("0.5 more than the next" in errors) == (code == 8)


def test_pictures_are_what_they_are_called() -> None:
    circle, square = (draw(200) for draw in PICTURES.values())
    for image, inside, share in ((circle, (0.85, 0.1, 0.1), 3.14159 * 0.3**2), (square, (0.1, 0.2, 0.85), 0.55**2)):
        assert image.shape == (3, 200, 200) and image[:, 100, 100].tolist() == pytest.approx(inside)
        assert image[:, 0, 0].tolist() == image[:, -1, 100].tolist() == [1, 1, 1]
        assert float((image < 1).any(dim=0).float().mean()) == pytest.approx(share, abs=0.01)
    # a square has corners
    assert square[0, 48, 48] < 1 and circle[0, 48, 48] == 1


def test_refusals(drseg: Command, weights: Path, values: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: None)
    code, _, errors = drseg("check-weights", "b", "--offline")
    assert code == 4 and "open_clip_model.safetensors" in errors and "named by --prior FILE" in errors
    assert drseg("check-weights", "odd")[0] == 2
    assert drseg(*words(weights, "--out", values))[0] == 2
    assert drseg(*words(weights, "--out", values, "--overwrite"))[0] == 8
    for name, content in (("absent.json", None), ("list.json", "[1]"), ("text.json", "{")):
        if content is not None:
            (tmp_path / name).write_text(content)
        code, _, errors = drseg(*words(weights, "--expected", tmp_path / name))
        assert code == 4 and name in errors
    # a value that was to be compared and is not there
    (tmp_path / "more.json").write_text(json.dumps({"scores of other.png": [1.0]}))
    assert drseg(*words(weights, "--expected", tmp_path / "more.json"))[0] == 4
    code, _, errors = drseg("check-weights", "tiny", "--clip", weights / FILES[1])
    assert code == 4 and "does not fit" in errors


def test_random_weights_are_no_failure(drseg: Command) -> None:
    code, text, errors = drseg("check-weights", "zero-shot:tiny", "--prior", "none")
    assert code == 0 and "prior" not in "".join(lines(text, "unknown")) and "random weights" in errors


def test_the_real_prior_is_known(drseg: Command, tmp_path: Path) -> None:
    real = real_prior()
    known = ("check-weights", "tiny", "--prior-layer", real.layer, "--prior")
    code, text, _ = drseg(*known, f"{real.name}:{real.weights}")
    assert code == 0 and sum(line.startswith("prior feature") for line in lines(text, "same")) == 2
    state, facts = load_weights(str(real.weights))
    swap_query_and_key("blocks.2.attn.qkv.weight")(state)
    save_weights(tmp_path / "other.safetensors", state, facts)
    code, text, _ = drseg(*known, f"{real.name}:{tmp_path / 'other.safetensors'}")
    assert code == 4 and len(lines(text, "DIFFERS")) == 2
