# SPDX-License-Identifier: Apache-2.0
"""Proposals and true segments: who learns what, and the three losses against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from drseg_core.models.segmenter import Proposals
from drseg_core.training import matching
from drseg_core.training.matching import match, proposal_loss, sample, segments, uncertain_points


def halves() -> torch.Tensor:
    """(2, 8, 8): class 0 left and 2 right, with a column without a label; and an image of class 1 alone."""
    mask = torch.zeros(2, 8, 8, dtype=torch.uint8)
    mask[0, :, 4:], mask[0, :, 3], mask[1] = 2, 255, 1
    return mask


def logits_of(inside: torch.Tensor, strength: float = 20.0) -> torch.Tensor:
    return strength * (2 * inside.float() - 1)


@pytest.fixture
def centres(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points at the centres of all places, where nothing is interpolated."""
    rows = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy")
    centre = (torch.stack(rows, -1).flatten(0, 1) + 0.5) / 8
    monkeypatch.setattr(matching, "uncertain_points", lambda mask, count: centre.expand(len(mask), -1, -1))


def test_segments_are_the_classes_of_an_image() -> None:
    first, second = segments(halves())
    assert first.label.tolist() == [0, 2] and second.label.tolist() == [1]
    assert first.mask.shape == (2, 8, 8) and first.mask[0, :, :3].all() and first.mask.sum() == 8 * 7
    assert not first.mask[:, :, 3].any() and second.mask.all()


def test_the_best_of_all_assignments_is_found() -> None:
    torch.manual_seed(0)
    truth = segments(torch.randint(0, 3, (1, 8, 8)))[0]
    proposals = Proposals(torch.randn(1, 5, 8, 8), torch.randn(1, 5, 4))
    torch.manual_seed(1)
    first, second = match(proposals, 0, truth)
    torch.manual_seed(1)
    point = torch.rand(1, 64, 2)
    logit, inside = sample(proposals.mask[0], point), sample(truth.mask, point)
    cost = torch.empty(5, 3)
    for q, s in itertools.product(range(5), range(3)):
        share, true = logit[q].sigmoid(), inside[s]
        dice = 1 - (2 * (share * true).sum() + 1) / (share.sum() + true.sum() + 1)
        entropy = F.binary_cross_entropy_with_logits(logit[q], true)
        cost[q, s] = 5 * entropy + 5 * dice - 2 * proposals.score[0].softmax(-1)[q, truth.label[s]]
    best = min(itertools.permutations(range(5), 3), key=lambda chosen: sum(cost[q, s] for s, q in enumerate(chosen)))
    assert {(int(q), int(s)) for q, s in zip(first, second, strict=True)} == {(q, s) for s, q in enumerate(best)}


def test_right_proposals_cost_nothing_and_the_rest_is_no_object(centres: None) -> None:
    mask = halves()
    logits = torch.full((2, 4, 8, 8), -20.0)
    score = torch.zeros(2, 4, 4)
    score[:, :, 3] = 30.0
    for image, query, label in ((0, 2, 0), (0, 1, 2), (1, 3, 1)):
        logits[image, query] = logits_of(mask[image] == label)
        score[image, query] = 30 * F.one_hot(torch.tensor(label), 4)
    parts = proposal_loss([Proposals(logits, score)], mask)
    entropy, binary, dice = (float(part.mean()) for part in parts)
    assert entropy < 1e-6 and binary < 1e-6 and dice < 1e-6
    # three matched, five that are none
    assert float(parts[0].terms) == pytest.approx(3 + 0.1 * 5) and float(parts[1].terms) == float(parts[2].terms) == 3
    wrong = score.roll(1, dims=2)
    assert float(proposal_loss([Proposals(logits, wrong)], mask)[0].mean()) > 50


def test_losses_are_those_of_their_definitions(centres: None) -> None:
    """One segment and one proposal, so that no matching is left."""
    torch.manual_seed(0)
    mask = torch.full((1, 8, 8), 255)
    mask[0, :5] = 1
    logits, score = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 3)
    entropy, binary, dice = (float(part.mean()) for part in proposal_loss([Proposals(logits, score)], mask))
    true, share = (mask[0] == 1).float(), logits[0, 0].sigmoid()
    assert entropy == pytest.approx(2 * float(-score[0, 0].log_softmax(-1)[1]))
    assert binary == pytest.approx(5 * float(F.binary_cross_entropy_with_logits(logits[0, 0], true)))
    overlap = 1 - (2 * (share * true).sum() + 1) / (share.sum() + true.sum() + 1)
    assert dice == pytest.approx(5 * float(overlap))


def test_points_are_drawn_where_a_mask_is_uncertain() -> None:
    torch.manual_seed(0)
    mask = torch.full((1, 16, 16), 9.0)
    mask[:, :, 8:] = -9.0
    point = uncertain_points(mask, 400)
    assert point.shape == (1, 400, 2) and 0 <= point.min() and point.max() <= 1
    # between the middles of two columns, which are a sixteenth of all that is drawn: 75 of 1,200, and of 100 more
    between = (point[0, :, 0] - 0.5).abs() < 1 / 32
    assert 60 < int(between.sum()) < 110
    mask[:, :, 4:12] = 0.1
    assert (sample(mask, uncertain_points(mask, 400)).abs() < 1).float().mean() > 0.75


@pytest.mark.parametrize(("unlabelled", "terms"), [("left_out", 0.0), ("negative", 0.4)])
def test_images_without_a_label(unlabelled: str, terms: float) -> None:
    logits, score = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 4, 4, requires_grad=True)
    mask = torch.full((1, 8, 8), 255)
    parts = proposal_loss([Proposals(logits, score)], mask, unlabelled=unlabelled)
    assert [float(part.terms) for part in parts] == pytest.approx([terms, 0.0, 0.0])
    sum(part.mean() for part in parts).backward()
    assert torch.isfinite(score.grad).all() and bool(score.grad.any()) == (unlabelled == "negative")
    assert not logits.grad.any()


def test_a_nan_reaches_the_loss() -> None:
    """The training loop counts them; a matching that stops the run would not let it."""
    score = torch.full((1, 4, 4), float("nan"))
    parts = proposal_loss([Proposals(torch.randn(1, 4, 8, 8), score)], halves()[:1])
    assert not torch.isfinite(parts[0].total)
