# SPDX-License-Identifier: Apache-2.0
"""The study without training: scores by hand, no leak into a classifier, what is kept, and what the page says."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from drseg_core.config.schema import DinoConfig
from drseg_core.evaluation.metrics import ConfusionMatrix
from drseg_core.models.dino import DinoPrior
from drseg_core.studies import controls, training_free_page
from drseg_core.studies import training_free as study
from drseg_core.studies.controls import edge_weights, neighbours, spread
from drseg_core.studies.pieces import folds, synthetic_pieces
from drseg_core.studies.setting import make_setting
from drseg_core.studies.training_free import CNN_PROTOTYPES, DINO_PROTOTYPES, NO_GRAPH, Seen, Way, scores, ways

GRID = (6, 6)
COUNT = 36


@pytest.fixture(scope="module")
def seen() -> Seen:
    torch.manual_seed(0)
    label = torch.randint(4, (3, 3)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    pixels = F.one_hot(label.flatten(), 5).double() * 64
    priors = {
        controls.DISTANCE: controls.constant_prior(GRID),
        controls.COLOUR: torch.randn(8, *GRID),
        controls.ORACLE: controls.oracle_prior(pixels, GRID),
    }
    return Seen(F.one_hot(label.flatten(), 5) + 1.2 * torch.randn(COUNT, 5), pixels, priors)


def test_ways_are_the_whole_grid_and_begin_with_none() -> None:
    found = ways([controls.DISTANCE, controls.COLOUR, controls.ORACLE])
    assert found[0] == NO_GRAPH and len(set(found)) == len(found) == 1 + 4 * 3 + 2 * 4 * 4 * 3 + 4 * 4 * 3
    assert Way(controls.COLOUR, 20, 0.0, "exp(cos / 0.1)", 4) in found


def test_scores_of_one_way_by_hand(seen: Seen) -> None:
    """Each way is what its name says, counted as the project counts; no graph is the encoder's own argmax."""
    centre = seen.logits.mean(dim=0)
    found = scores([seen], [centre], ["set"], seed=2)
    assert found["image"] == [found["pooled"]]
    place = {Way(*way): number for number, way in enumerate(found["ways"])}
    for way in (
        NO_GRAPH,
        Way(controls.COLOUR, 8, 0.0, "learned start", 2),
        Way(controls.ORACLE, 4, 1.0, "exp(cos / 0.1)", 4),
        Way(controls.DISTANCE, 75, 1.0, "flat", 1),
    ):
        for view, logits in enumerate((seen.logits, seen.logits - centre)):
            if way != NO_GRAPH:
                prior = seen.priors[way.prior]
                graph = neighbours(prior, way.k, way.decay)
                (logits,) = spread(logits, graph, edge_weights(way.weights, prior, graph, 2), (way.steps,))
            confusion = ConfusionMatrix(5)
            truth = seen.pixels.argmax(dim=1).to(torch.uint8)
            confusion.update(logits.argmax(dim=1).to(torch.uint8), truth)
            assert found["pooled"][place[way]][view] == pytest.approx(confusion.mean_iou(), abs=1e-3), (way, view)


def test_labels_decide_truth_and_oracle_alone(seen: Seen) -> None:
    """With another truth all logits that were spread over other graphs are the same, to the last bit."""
    turned = seen._replace(pixels=seen.pixels.flip(0))
    values = [list(study._all_spread(one.logits, one.priors, 0)) for one in (seen, turned)]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    turned = turned._replace(priors={**seen.priors, controls.ORACLE: controls.oracle_prior(turned.pixels, GRID)})
    values[1] = list(study._all_spread(turned.logits, turned.priors, 0))
    for way, a, b in zip(ways(list(seen.priors))[1:], *values, strict=True):
        assert torch.equal(a, b) or way.prior == controls.ORACLE
    assert not all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_each_prior_is_of_what_it_says() -> None:
    tiny = DinoConfig(name="drseg-tiny", weights=None, image_size=64, normalization="imagenet", seed=3)
    random, real = (DinoPrior(dataclasses.replace(tiny, seed=seed)) for seed in (3, 4))
    image, own, pixels = torch.rand(1, 3, 32, 32), torch.randn(5, 4, 4), torch.rand(16, 3).round(decimals=1)
    given = {"image": image, "own": own, "pixels": pixels, "random": random, "real": real}

    def changed(**others: Any) -> set[str]:
        before, after = (study._priors(grid=(4, 4), **{**given, **new}) for new in ({}, others))
        assert list(before) == [name for name in controls.CONTROLS if name != controls.NONE]
        return {name for name in before if not torch.equal(before[name], after[name])}

    assert changed() == set()
    assert changed(image=1 - image) == {controls.COLOUR, controls.RANDOM, controls.REAL}
    assert changed(own=-own) == {controls.OWN}
    assert changed(pixels=pixels.flip(1)) == {controls.ORACLE}
    # weights that follow a seed are random
    assert changed(random=real) == {controls.RANDOM} and changed(real=random) == {controls.REAL}


def test_sets_are_pooled_by_themselves(seen: Seen) -> None:
    """Two images of one set are one confusion; of two sets, whose classes differ, each has its own."""
    centre = torch.zeros(5)
    other = seen._replace(logits=seen.logits.flip(0))
    apart = scores([seen, other], [centre] * 2, ["a", "b"], 0)
    together = scores([seen, other], [centre] * 2, ["a", "a"], 0)
    mean = [(a[0] + b[0]) / 2 for a, b in zip(*apart["image"], strict=True)]
    assert [row[0] for row in apart["pooled"]] == pytest.approx(mean, abs=2e-3)
    assert together["image"] == apart["image"] and together["pooled"] != apart["pooled"]


def test_intervals_by_hand() -> None:
    apart = torch.tensor([[1.0, 2, 3, 6], [3.0, 2, 5, 2]], dtype=torch.float64)
    mean, half = training_free_page.interval(apart)
    by_image = [2.0, 2, 4, 4]
    assert mean == 3 and half == pytest.approx(3.182446 * math.sqrt(sum((x - 3) ** 2 for x in by_image) / 3) / 2)
    assert math.isnan(training_free_page.interval(apart[:, :1])[1])


def test_nothing_of_a_test_piece_reaches_its_classifier_and_no_edge_leaves_it() -> None:
    """Other labels of a test piece change no logits of it; other pixels of a fitted piece change no graph of it."""
    pieces = synthetic_pieces()
    parted = folds(pieces)
    torch.manual_seed(0)
    feature = {("e", id(fold.test)): torch.randn(6, *GRID) for fold in parted}
    fold = parted[0]
    logits, centre = study._prototype_logits(fold, "e", feature, GRID)
    assert logits.shape == (COUNT, fold.classes) and centre.shape == (fold.classes,)
    turned = fold.test._replace(mask=fold.test.mask.flip(0))
    feature["e", id(turned)] = feature["e", id(fold.test)]
    again = study._prototype_logits(fold._replace(test=turned), "e", feature, GRID)
    assert torch.equal(again[0], logits) and torch.equal(again[1], centre)
    trained = fold.train[0]._replace(mask=fold.train[0].mask.flip(0))
    feature["e", id(trained)] = feature["e", id(fold.train[0])]
    other = study._prototype_logits(fold._replace(train=(trained,)), "e", feature, GRID)
    assert not torch.equal(other[0], logits)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies")
    patch = pytest.MonkeyPatch()
    # fewer graphs are enough to see that all of it runs
    patch.setattr(study, "WEIGHTS", ("flat", "learned start", "exp(cos / 0.1)"))
    patch.setattr(study, "DECAYS", (1.0,))
    problems = study.training_free(make_setting(quick=True), out, command="drseg study training-free")
    patch.undo()
    assert problems == {}
    return out


def test_a_trial_says_so_and_has_every_encoder(trial: Path) -> None:
    page = (trial / "training-free.md").read_text()
    heading, first, _ = page.split("\n\n", 2)
    assert heading == f"# {study.TITLE}" and first == f"**{training_free_page.TRIAL}**"
    content = json.loads((trial / "training-free.json").read_text())
    assert content["title"].endswith("(a trial)") and content["quick"] is True
    assert list(content["found"]) == [study.CONTRAST, study.CLEAR, study.DENSE, DINO_PROTOTYPES, CNN_PROTOTYPES]
    for own in content["found"].values():
        for rows in own["heads"].values():
            assert list(rows) == list(controls.CONTROLS) and rows[controls.NONE][0]["gain"] == [0, 0]
    # a random encoder is called nothing else
    assert "DINOv2" not in page and "EfficientNet" not in page and "`drseg study training-free`, commit" in page
    assert (trial / "training-free.png").is_file()


def test_what_is_measured_is_kept(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*given: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(study, "measure_landscapes", again)
    monkeypatch.setattr(study, "measure_pieces", again)
    before = json.loads((trial / "training-free.json").read_text())
    setting = make_setting(quick=True)
    assert study.training_free(setting, trial, command="drseg study training-free") == {}
    assert json.loads((trial / "training-free.json").read_text())["found"] == before["found"]


def test_the_page_has_five_lines_and_the_numbers_of_its_json(trial: Path) -> None:
    content = json.loads((trial / "training-free.json").read_text()) | {"quick": False}
    page = training_free_page.page(content)
    lines = [line for line in page.splitlines() if line[:2] in {"1.", "2.", "3.", "4.", "5."}]
    assert len(lines) == 5
    row = content["found"][study.CONTRAST]["heads"][training_free_page.FEW][controls.REAL][0]
    gains = [own["heads"][training_free_page.FEW][controls.REAL][0]["gain"] for own in content["found"].values()]
    up, down = sum(mean > half for mean, half in gains), sum(-mean > half for mean, half in gains)
    assert (
        f"gains with {up} of 5 encoders and loses with {down} ({row['gain'][0]:+.1f} ± {row['gain'][1]:.1f}, "
        in lines[1]
    )
    assert f"| captions alone | DINOv2 | {row['mIoU'][0]:.1f} | {row['gain'][0]:+.1f} ± {row['gain'][1]:.1f}" in page


def test_a_real_prior_that_is_not_here_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRSEG_CACHE", str(tmp_path))
    setting = make_setting(pieces="somewhere")
    assert study.published_prior(setting, 224) is None and study.real_folds(setting) == []
    found = study._priors(
        torch.rand(1, 3, 48, 48), GRID, torch.rand(4, *GRID), torch.ones(COUNT, 2), lambda *_: [0], None
    )
    assert list(found) == [name for name in controls.CONTROLS if name not in (controls.NONE, controls.REAL)]
