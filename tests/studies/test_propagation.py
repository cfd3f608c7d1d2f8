# SPDX-License-Identifier: Apache-2.0
"""The study of propagation: what is fitted on what, classifiers and features by hand, and what the page says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from drseg_core.config.load import load_config
from drseg_core.data import IGNORE
from drseg_core.errors import ConfigError, DatasetError
from drseg_core.models.window_maps import Windows
from drseg_core.studies import propagation as study
from drseg_core.studies.pieces import Fold, Piece, folds, read_pieces, synthetic_pieces
from drseg_core.studies.propagation import (
    CLASSIFIERS,
    CNN,
    COLOUR,
    DINO,
    DISTANCE,
    NONE,
    RANDOM,
    SETTINGS,
    cell_labels,
    colour_features,
    differences,
    fit_classifier,
    page,
    to_pixels,
)
from drseg_core.studies.setting import Setting


def write_piece(folder: Path, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{name}_image.png")
    Image.fromarray(mask).save(folder / f"{name}_mask.png")


def test_pieces_and_folds(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    mask = generator.integers(0, 4, (6, 9), dtype=np.uint8)
    mask[0, :2] = 0, 3
    for name in ("0", "1", "2"):
        write_piece(tmp_path / "many", name, image, mask)
    write_piece(tmp_path / "one", "a", image, mask)
    pieces = read_pieces(str(tmp_path))
    assert {name: [piece.name for piece in own] for name, own in pieces.items()} == {
        "many": ["0", "1", "2"],
        "one": ["a"],
    }
    piece = pieces["one"][0]
    assert piece.image.tolist() == image.transpose(2, 0, 1).tolist()
    assert piece.mask[0, :2].tolist() == [255, 2] and piece.mask.dtype == torch.uint8
    found = folds(pieces)
    assert [(fold.dataset, fold.test.name, [part.name for part in fold.train]) for fold in found] == [
        ("many", "0", ["1", "2"]),
        ("many", "1", ["0", "2"]),
        ("many", "2", ["0", "1"]),
        ("one", "a, left", ["a, right"]),
        ("one", "a, right", ["a, left"]),
    ]
    assert all(fold.classes == 3 for fold in found)
    left, right = found[3].test, found[4].test
    assert torch.equal(torch.cat((left.image, right.image), dim=2), piece.image) and left.mask.shape == (6, 4)
    # a half shares no memory with the other
    left.image.zero_()
    assert right.image.any() and piece.image.any()


def test_pieces_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pieces are missing; expected --pieces DIR or DRSEG_PIECES"):
        read_pieces(None)
    with pytest.raises(DatasetError, match="has no pieces"):
        read_pieces(str(tmp_path))
    image, mask = np.zeros((6, 9, 3), np.uint8), np.zeros((6, 9), np.uint8)
    write_piece(tmp_path / "one", "a", image, mask)
    with pytest.raises(DatasetError, match="one has no labels"):
        folds(read_pieces(str(tmp_path)))
    write_piece(tmp_path / "one", "a", image, mask[:5])
    with pytest.raises(DatasetError, match=r"another size; expected \(6, 9\), got \(5, 9\)"):
        read_pieces(str(tmp_path))
    (tmp_path / "one" / "a_mask.png").unlink()
    with pytest.raises(DatasetError, match="a_mask.png"):
        read_pieces(str(tmp_path))


def test_labels_of_cells() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 255, 2], [1, 1, 255, 255, 0]], dtype=torch.uint8)
    # cells of 2: three of four, three of four, half and cut; below all are cut to half
    assert cell_labels(mask, 2).tolist() == [[0, 1, 255], [255, 255, 255]]


def test_pixels_between_cells() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    found = to_pixels(logits, (2, 2), 4, torch.zeros(7, 8, dtype=torch.uint8))
    assert found.shape == (7, 8) and (found[:, :4] == 0).all() and (found[:, 4:] == 1).all()


def test_colour_by_hand() -> None:
    image = torch.zeros(3, 4, 8)
    image[0, :, 4:6] = 1.0
    found = colour_features(image, 4)
    # means 0 and 1/2, deviations 0 and 1/2 of one channel; the others are alike everywhere
    expected = torch.tensor([[-1.0, 1], [0, 0], [0, 0], [-1, 1], [0, 0], [0, 0]])
    assert torch.allclose(found.flatten(1), expected, atol=1e-6)


def test_prototypes_by_hand() -> None:
    rows = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 2.0], [0.0, 9.0]])
    label = torch.tensor([0, 0, 2, IGNORE])
    classify = fit_classifier("prototypes", rows, label, 3)
    known = rows[:3]
    standard = F.normalize((known - known.mean(0)) / known.std(0), dim=1)
    prototype = F.normalize(torch.stack((standard[:2].mean(0), standard[2])), dim=1)
    expected = standard @ prototype.T
    assert torch.allclose(classify(known)[:, [0, 2]], expected, atol=1e-6)
    # a class that was never seen is never chosen
    assert (classify(known)[:, 1] == -1).all() and classify(known).argmax(1).tolist() == [0, 0, 2]


def test_a_probe_is_the_least_of_its_loss() -> None:
    torch.manual_seed(0)
    rows, label = torch.randn(60, 5), torch.randint(0, 3, (60,))
    rows += F.one_hot(label, 5)
    weight = study._regression(rows, label, 3)
    weight.requires_grad_()
    loss = F.cross_entropy(rows @ weight[:-1] + weight[-1], label) + 0.005 * weight[:-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-4
    classify = fit_classifier("probe", rows, label, 4)
    assert (classify(rows).argmax(1) == label).float().mean() > 0.6 and (classify(rows)[:, 3] == -30).all()


@pytest.fixture(scope="module")
def measured() -> tuple[list[Fold], dict]:
    """Two quick folds with features that are the labels for one graph, and noise for the others."""
    torch.manual_seed(0)
    mask = torch.zeros(48, 48, dtype=torch.uint8)
    mask[:, 24:], mask[24:, :24] = 1, 2
    pieces = [Piece(str(i), torch.zeros(3, 48, 48, dtype=torch.uint8), mask.roll(8 * i, 1)) for i in range(2)]
    parted = [Fold("set", (pieces[1 - i],), pieces[i], 3) for i in range(2)]
    features = {}
    for piece in pieces:
        truth = F.one_hot(cell_labels(piece.mask, 8).clamp(max=2), 3).permute(2, 0, 1).float()
        noisy = truth + 0.8 * torch.randn(3, 6, 6)
        noise = torch.randn(8, 6, 6)
        features[id(piece)] = {
            DINO: truth,
            CNN: noisy,
            COLOUR: noise,
            DISTANCE: torch.ones(1, 6, 6),
            **{study._seeded(seed): noise.roll(seed + 1, 0) for seed in (0, 1)},
        }
    return parted, study._measure(parted, features, 8, (0, 1))


def test_a_graph_of_the_labels_is_best_and_rows_are_right(measured: tuple[list[Fold], dict]) -> None:
    _, found = measured
    assert set(found) == set(CLASSIFIERS) and set(next(iter(found.values()))) == {str(kind) for kind in SETTINGS}
    rows = found[f"prototypes of {CNN}"][str(SETTINGS[5])]
    assert set(rows) == {NONE, COLOUR, DISTANCE, CNN, DINO, study._seeded(0), study._seeded(1)}
    assert set(rows[DINO]) == {"set 0", "set 1", "set"}
    score = {graph: rows[graph]["set"]["mIoU"] for graph in rows}
    assert score[DINO] > score[NONE] + 3 and score[DINO] == max(score.values())
    assert "boundary" not in rows[DINO]["set"]
    first = found[f"prototypes of {CNN}"][str(SETTINGS[0])]
    assert all(0 <= row["set"]["boundary"] <= 100 for row in first.values())
    # of no graph all settings are the same, and it is the classifier itself
    assert all(by[NONE] == rows[NONE] for by in found[f"prototypes of {CNN}"].values())
    assert differences(rows, NONE, ["set 0", "set 1"], (0, 1), "mIoU") == pytest.approx(
        [rows[DINO][name]["mIoU"] - rows[NONE][name]["mIoU"] for name in ("set 0", "set 1")]
    )
    mean = [(rows[study._seeded(0)][name]["mIoU"] + rows[study._seeded(1)][name]["mIoU"]) / 2 for name in ("set 0",)]
    assert differences(rows, RANDOM, ["set 0"], (0, 1), "mIoU") == pytest.approx(
        [rows[DINO]["set 0"]["mIoU"] - mean[0]]
    )


def test_nothing_of_a_test_piece_reaches_its_classifier(measured: tuple[list[Fold], dict]) -> None:
    """Other labels of a test piece change no logits of it, other labels of its training pieces do."""
    parted, _ = measured
    features = {
        id(piece): {DINO: torch.randn(4, 6, 6), CNN: torch.randn(4, 6, 6)} for piece in (parted[0].test, parted[1].test)
    }
    fold = parted[0]
    logits = study._all_logits(fold, features, 8)
    assert logits.shape == (36, 3 * len(CLASSIFIERS))
    turned = fold.test._replace(mask=fold.test.mask.flip(0))
    again = features | {id(turned): features[id(fold.test)]}
    assert torch.equal(study._all_logits(fold._replace(test=turned), again, 8), logits)
    other = fold.train[0]._replace(mask=fold.train[0].mask.flip(0))
    again = features | {id(other): features[id(fold.train[0])]}
    assert not torch.equal(study._all_logits(fold._replace(train=(other,)), again, 8), logits)


def test_the_halves_of_an_image_see_nothing_of_each_other() -> None:
    """Features of one half are the same whatever stands in the other: no encoder, window or graph crosses."""
    piece = synthetic_pieces()["single"][0]
    changed = piece._replace(image=piece.image.clone())
    changed.image[..., 32:] = 255 - changed.image[..., 32:]
    encoders, windows = study._encoders((0,), quick=True)
    assert windows == Windows(4, 8, 1)
    maps = []
    for some in (piece, changed):
        left = folds({"single": [some]})[0].test
        maps.append(study._features(left, encoders, windows, torch.device("cpu")))
    assert maps[0].keys() == {DINO, CNN, study._seeded(0), COLOUR, DISTANCE}
    for name, value in maps[0].items():
        assert value.shape[1:] == (8, 4) and torch.equal(value, maps[1][name]), name


def test_features_are_kept_for_the_same_image_and_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = synthetic_pieces()["single"][0]
    encoders, windows = study._encoders((0,), quick=True)
    rest = (windows, torch.device("cpu"), tmp_path)
    first = study._kept_features(piece, encoders, *rest)
    made = list(tmp_path.iterdir())

    def again(*given: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patched:
        patched.setattr(study, "_features", again)
        kept = study._kept_features(piece, encoders, *rest)
        assert first.keys() == kept.keys() and all(torch.equal(first[name], kept[name]) for name in first)
        # the mask decides nothing of them, all else does
        study._kept_features(piece._replace(mask=piece.mask.flip(0)), encoders, *rest)
        other = piece._replace(image=piece.image.flip(2))
        others = {name: encoder for name, encoder in encoders.items() if name != CNN}
        for given in ((other, encoders, *rest), (piece, others, *rest), (piece, encoders, Windows(4, 8, 2), *rest[1:])):
            with pytest.raises(AssertionError, match="computed again"):
                study._kept_features(*given)
    assert list(tmp_path.iterdir()) == made and len(made) == 1


def test_the_page_says_what_was_found(measured: tuple[list[Fold], dict]) -> None:
    content = {
        "pieces": {"set": ["0", "1"]},
        "scored": ["set 0", "set 1"],
        "seeds": [0, 1],
        "window": [32, 8],
        "found": measured[1],
        "machine": "a machine",
        "seconds": 60,
        "command": "drseg study propagation",
        "commits": ["abc"],
    }
    text = page(content)
    assert "Real pieces: set (2 images)." in text and "`drseg study propagation`, commit abc" in text
    rows = measured[1][f"prototypes of {CNN}"][str(SETTINGS[0])]
    line = next(line for line in text.splitlines() if line.startswith(f"| {COLOUR} |"))
    apart = differences(rows, COLOUR, ["set 0", "set 1"], [0, 1], "mIoU")
    assert f"{rows[COLOUR]['set']['mIoU']:.1f}" in line
    assert f"{sum(apart) / 2:+.1f} ± {abs(apart[0] - apart[1]) / 2**0.5:.1f} ({sum(a > 0 for a in apart)} of 2)" in line
    assert text.count("By mIoU the graph of the real prior is") == len(CLASSIFIERS) and "trial" not in text


def test_the_page_of_a_trial_says_so(tmp_path: Path) -> None:
    """Drawn pictures and random encoders are called nothing else, in page, titles and values."""
    study.propagation(
        Setting(load_config("tiny"), "", (), quick=True, seeds=(0,)),
        tmp_path,
        command="drseg study propagation --quick",
    )
    heading, first, rest = (tmp_path / "propagation.md").read_text().split("\n\n", 2)
    assert heading == f"# {study.TITLE}"
    assert first == "**A trial of the program, not a result: drawn pictures, and small encoders with random weights.**"
    assert rest.startswith("Drawn pictures: several (2 images)")
    for name in ("eal piece", "eal prior", "eal less", "DINOv2", "EfficientNet", "ViT-S/14", "By mIoU"):
        assert name not in rest, name
    assert "| first small encoder, random |" in rest and "| second small encoder, random |" in rest
    content = json.loads((tmp_path / "propagation.json").read_text())
    assert content["quick"] is True and content["title"].endswith("(a trial)")


@pytest.mark.parametrize(
    ("apart", "said"),
    [
        ([5.0, 6, 7], "better than"),
        ([-5.0, -6, -7], "worse than"),
        ([-5.0, 6, 1], "not told from"),
        ([9.0], "not told"),
    ],
)
def test_in_words(apart: list[float], said: str) -> None:
    pieces = [f"piece {place}" for place in range(len(apart))]
    rows = {graph: {piece: {"mIoU": 10.0} for piece in pieces} for graph in (NONE, COLOUR, DISTANCE, CNN)}
    rows |= {study._seeded(0): rows[NONE], DINO: {p: {"mIoU": 10 + a} for p, a in zip(pieces, apart, strict=True)}}
    text = study._in_words(rows, pieces, [0])
    assert text.count(said) == 5 and "no graph" in text and "random ViT-S/14" in text
