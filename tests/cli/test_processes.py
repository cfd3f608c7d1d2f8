# SPDX-License-Identifier: Apache-2.0
"""Evaluation by several processes, its run card, and models read from a folder that was given away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drseg_core import __version__
from drseg_core.checkpoints.pretrained import save_pretrained
from drseg_core.checkpoints.run import load_run
from drseg_core.data import open_dataset
from drseg_core.data.dataset import class_names_hash
from drseg_core.models.weights import weights_hash
from drseg_core.ops import backend_report
from tests.data.miniatures import write_release
from tests.forks import in_torchrun

# what may differ between one process and two
OWN = ("command", "processes", "run")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_release("vaihingen", tmp_path_factory.mktemp("sets"), count=3)


def result(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.promise("C50")
def test_two_processes_give_the_file_of_one(drseg, run, root, tmp_path):
    words = ["evaluate", str(run), "--data", f"vaihingen:{root}", "--protocol", "rskt", "--device", "cpu"]
    words += ["--batch-size", "2", "--boundary"]
    assert drseg(*words, "--out", tmp_path / "one.json")[0] == 0
    code, text, errors = in_torchrun([*words, "--out", str(tmp_path / "two.json")], tmp_path)
    assert code == 0, errors
    assert text.count("written: ") == 1 and text.count("mACC") == 1
    one, two = result(tmp_path / "one.json"), result(tmp_path / "two.json")
    assert set(one["boundary"]) == {"mIoU", "share", "per_class"} and "boundary mIoU" in text
    assert (one["processes"], two["processes"], one["images"]) == (1, 2, 3)
    assert {key: value for key, value in one.items() if key not in OWN} == {
        key: value for key, value in two.items() if key not in OWN
    }


@pytest.mark.promise("C39")
def test_the_run_card(drseg, run, root, tmp_path):
    out = tmp_path / "m.json"
    spec = f"vaihingen:{root}"
    code, text, _ = drseg("evaluate", run, "--data", spec, "--protocol", "rskt", "--out", out)
    card, loaded = result(out), load_run(run)
    names = open_dataset(spec, "all").class_names
    assert code == 0
    assert card["weights_sha256"] == weights_hash(loaded.model)
    assert card["class_names_sha256"] == class_names_hash(names)
    assert card["training_class_names_sha256"] == class_names_hash(loaded.class_names)
    assert card["protocol"]["name"] == "rskt" and card["protocol"]["views"]["edge"] == 640
    assert card["model"]["clip"]["name"] == "drseg-tiny" and card["model"]["graph"]["k"] == 3
    assert card["versions"]["drseg"] == __version__ and card["backends"] == json.loads(json.dumps(backend_report()))
    assert card["device"] == "cpu" and card["step"] == 2 and "command" in card
    assert card["data"]["sha256"] == open_dataset(spec, "all").fingerprint()
    assert f"weights {card['weights_sha256'][:12]}, class names {card['class_names_sha256'][:12]}" in text


def test_a_model_folder_is_scored_and_used_like_its_run(drseg, run, root, folder, tmp_path):
    model = save_pretrained(load_run(run), tmp_path / "model")
    cards = []
    for name, source in (("run", run), ("model", model)):
        out = tmp_path / f"{name}.json"
        assert drseg("evaluate", source, "--data", f"vaihingen:{root}", "--protocol", "rskt", "--out", out)[0] == 0
        cards.append(result(out))
    first, second = ({key: card[key] for key in card if key not in (*OWN, "trained_on")} for card in cards)
    assert first == second and cards[1]["trained_on"] == "folder"
    image = folder / "val" / "images" / "0.png"
    maps = [tmp_path / f"{name}.tif" for name in ("run", "model")]
    for source, out in zip((run, model), maps, strict=True):
        assert drseg("predict", source, image, "--out", out)[0] == 0
    assert maps[0].read_bytes() == maps[1].read_bytes()
