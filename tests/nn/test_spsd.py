# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drseg_core.config.schema import SPSDConfig
from drseg_core.errors import CheckpointError
from drseg_core.nn.spsd import SPSD, RankingOptions, check_partition, rank_by_prototypes, split_by_score


def prototypes(seed: int, counts: tuple[int, ...], channels: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(sum(counts), channels, generator=generator, dtype=torch.float64)
    label = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return F.normalize(z, dim=1), label


def pair_mean(z: Tensor, label: Tensor, measure) -> Tensor:
    """Eq. 3, literally: the mean over all ordered pairs of different classes."""
    total, pairs = torch.zeros(z.shape[1], dtype=z.dtype), 0
    for m in range(len(z)):
        for n in range(len(z)):
            if label[m] != label[n]:
                total += measure(z[m], z[n])
                pairs += 1
    return total / pairs


def literal_entropy(z: Tensor, label: Tensor) -> Tensor:
    """Eq. 1-2, literally, with ReLU and dead channels uniform."""
    classes = int(label.max()) + 1
    entropy = []
    for channel in range(z.shape[1]):
        a = [sum(max(float(v), 0.0) for v in z[label == k, channel]) / int((label == k).sum()) for k in range(classes)]
        if sum(a) < 1e-8:
            entropy.append(math.log(classes))
        else:
            entropy.append(-sum(x / sum(a) * math.log(x / sum(a)) for x in a if x > 0))
    return torch.tensor(entropy, dtype=torch.float64)


@pytest.mark.promise("C1")
@pytest.mark.parametrize("counts", [(5, 5, 5), (1, 7), (2, 9, 4, 1)])
def test_entropy_is_equation_2(counts) -> None:
    z, label = prototypes(0, counts)
    z[:, 3] = -z[:, 3].abs()
    ranking = rank_by_prototypes(z, label, len(counts))
    torch.testing.assert_close(ranking.entropy, literal_entropy(z, label), rtol=1e-12, atol=1e-12)
    assert ranking.entropy[3] == pytest.approx(math.log(len(counts)), abs=0)


@pytest.mark.promise("C1")
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_product_closed_form_is_the_mean_over_pairs(seed: int, counts: list[int]) -> None:
    z, label = prototypes(seed, tuple(counts), channels=4)
    expected = pair_mean(z, label, lambda a, b: a * b)
    torch.testing.assert_close(rank_by_prototypes(z, label, len(counts)).similarity, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("counts", [(4, 4, 4), (1, 6, 3)])
@pytest.mark.parametrize("kind", ["neg_abs_diff", "sign_agreement", "rbf"])
def test_other_similarities_are_means_over_pairs(kind: str, counts: tuple[int, ...]) -> None:
    z, label = prototypes(3, counts)
    scale = pair_mean(z, label, lambda a, b: (a - b) ** 2).mean()
    measure = {
        "neg_abs_diff": lambda a, b: -(a - b).abs(),
        "sign_agreement": lambda a, b: a.sign() * b.sign(),
        "rbf": lambda a, b: torch.exp(-((a - b) ** 2) / scale),
    }[kind]
    found = rank_by_prototypes(z, label, len(counts), options=RankingOptions(similarity=kind)).similarity
    torch.testing.assert_close(found, pair_mean(z, label, measure), rtol=1e-10, atol=1e-13)


def test_rbf_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    z, label = prototypes(4, (5, 6, 7))
    options = RankingOptions(similarity="rbf")
    whole = rank_by_prototypes(z, label, 3, options=options).similarity
    monkeypatch.setattr("drseg_core.nn.spsd.PAIR_BLOCK", 1)
    torch.testing.assert_close(rank_by_prototypes(z, label, 3, options=options).similarity, whole)


def test_float32_input_is_computed_in_float64() -> None:
    z, label = prototypes(5, (50, 60, 70), channels=64)
    single = rank_by_prototypes(z.float(), label, 3)
    double = rank_by_prototypes(z.float().double(), label, 3)
    assert single.score.dtype == torch.float64
    assert torch.equal(single.score, double.score) and torch.equal(single.similarity, double.similarity)


def test_score_prefers_selective_and_discriminative_channels() -> None:
    # channel 0 fires for class 0 alone; channel 1 equally for both; channel 2 for neither
    z = torch.tensor([[1.0, 1.0, -1.0], [0.9, 1.0, -1.0], [-0.5, 1.0, -1.0], [-0.4, 1.0, -1.0]])
    label = torch.tensor([0, 0, 1, 1])
    ranking = rank_by_prototypes(z, label, 2)
    assert ranking.score.argmax() == 0
    assert ranking.split(1 / 3)[0].tolist() == [0]
    zero = rank_by_prototypes(z, label, 2, options=RankingOptions(dead_channel_entropy="zero"))
    assert zero.entropy[2] == 0 and ranking.entropy[2] == pytest.approx(math.log(2))


@pytest.mark.parametrize("activation", ["relu", "abs", "shift"])
def test_entropy_activation(activation: str) -> None:
    z, label = prototypes(6, (4, 5))
    a = {"relu": z.clamp_min(0), "abs": z.abs(), "shift": z - z.min(0).values}[activation]
    mean = torch.stack([a[label == k].mean(0) for k in range(2)])
    expected = torch.special.entr(mean / mean.sum(0)).sum(0)
    found = rank_by_prototypes(z, label, 2, options=RankingOptions(entropy_activation=activation)).entropy
    torch.testing.assert_close(found, expected)


def test_alpha_weighs_entropy_and_similarity() -> None:
    z, label = prototypes(7, (6, 6, 6))
    by_entropy = rank_by_prototypes(z, label, 3, options=RankingOptions(alpha=1.0))
    by_similarity = rank_by_prototypes(z, label, 3, options=RankingOptions(alpha=0.0))
    assert by_entropy.score.argmax() == by_entropy.entropy.argmin()
    assert by_similarity.score.argmax() == by_similarity.similarity.argmin()
    half = rank_by_prototypes(z, label, 3)
    torch.testing.assert_close(half.score, (by_entropy.score + by_similarity.score) / 2)
    assert half.score.min() >= 0 and half.score.max() <= 1


def test_ties_are_ordinal_or_shared() -> None:
    z = torch.tensor([[1.0, 1.0, 0.2, 1.0], [-1.0, -1.0, 0.2, -1.0]])
    label = torch.tensor([0, 1])
    ordinal = rank_by_prototypes(z, label, 2, options=RankingOptions(alpha=1.0))
    average = rank_by_prototypes(z, label, 2, options=RankingOptions(alpha=1.0, rank_ties="average"))
    torch.testing.assert_close(ordinal.score, torch.tensor([1.0, 2 / 3, 0.0, 1 / 3], dtype=torch.float64))
    torch.testing.assert_close(average.score, torch.tensor([2 / 3, 2 / 3, 0.0, 2 / 3], dtype=torch.float64))


def test_absent_classes_take_no_part_and_order_does_not_matter() -> None:
    z, label = prototypes(8, (5, 6))
    plain = rank_by_prototypes(z, label, 2)
    sparse = rank_by_prototypes(z, label * 4 + 1, 9)
    shuffled = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    mixed = rank_by_prototypes(z[shuffled], label[shuffled], 2)
    assert sparse.classes == 2
    torch.testing.assert_close(plain.score, sparse.score)
    torch.testing.assert_close(plain.similarity, mixed.similarity)


def test_configuration_serves_as_options() -> None:
    z, label = prototypes(9, (5, 5))
    config = SPSDConfig(alpha=0.3, similarity="rbf", rank_ties="average")
    options = RankingOptions(alpha=0.3, similarity="rbf", rank_ties="average")
    assert torch.equal(
        rank_by_prototypes(z, label, 2, options=config).score, rank_by_prototypes(z, label, 2, options=options).score
    )
    for field in dataclasses.fields(RankingOptions):
        assert getattr(SPSDConfig(), field.name) == getattr(RankingOptions(), field.name)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"prototype": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "prototype has a wrong dtype"),
        ({"label": torch.zeros(4)}, TypeError, "label has a wrong dtype"),
        ({"prototype": torch.ones(4)}, ValueError, "prototype has a wrong shape"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, ValueError, "label has a wrong shape"),
        ({"label": torch.tensor([0, 1, 2, 3])}, ValueError, "label is out of range"),
        ({"label": torch.tensor([0, -1, 0, 1])}, ValueError, "label is out of range"),
        ({"label": torch.tensor([1, 1, 1, 1])}, ValueError, "too few classes"),
        ({"prototype": torch.full((4, 3), float("nan"))}, ValueError, "not finite"),
        ({"num_classes": 1}, ValueError, "num_classes is too small"),
        ({"options": RankingOptions(alpha=1.5)}, ValueError, "alpha is out of range"),
        ({"options": RankingOptions(similarity="cosine")}, ValueError, "similarity is unknown"),
        ({"options": RankingOptions(entropy_activation="x")}, ValueError, "entropy_activation"),
        ({"options": RankingOptions(dead_channel_entropy="x")}, ValueError, "dead_channel"),
        ({"options": RankingOptions(rank_ties="x")}, ValueError, "rank_ties"),
    ],
)
def test_bad_input(change, error, text) -> None:
    arguments = {"prototype": torch.rand(4, 3), "label": torch.tensor([0, 0, 1, 2]), "num_classes": 3} | change
    with pytest.raises(error, match=text):
        rank_by_prototypes(**arguments)


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(st.integers(1, 40), st.integers(0, 10), st.integers(0, 1000))
def test_split_and_merge_are_exact(channels: int, tenths: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spsd = SPSD(channels, tenths / 10, torch.rand(channels, generator=generator))
    assert len(spsd.semantic_index) == channels * tenths // 10
    check_partition(spsd.semantic_index, spsd.structural_index, channels)
    x = torch.randn(2, channels, 3, 4, generator=generator)
    semantic, structural = spsd.split(x)
    assert torch.equal(spsd.merge(semantic, structural), x)
    other = torch.randn_like(structural)
    merged = spsd.merge(semantic, other)
    assert torch.equal(merged[:, spsd.structural_index], other)
    assert torch.equal(merged[:, spsd.semantic_index], semantic)


def test_split_by_score_takes_the_highest_and_the_lower_index_of_equals() -> None:
    score = torch.tensor([0.5, 0.9, 0.5, 0.1])
    semantic, structural = split_by_score(score, 0.5)
    assert semantic.tolist() == [0, 1] and structural.tolist() == [2, 3]


@pytest.mark.parametrize(("channels", "ratio", "semantic"), [(100, 0.29, 29), (50, 0.58, 29), (512, 0.5, 256)])
def test_the_share_of_channels_is_that_of_decimal_numbers(channels, ratio, semantic):
    # 0.29 times 100 is less than 29 in binary
    assert len(SPSD(channels, ratio).semantic_index) == semantic
    assert len(split_by_score(torch.rand(channels), ratio)[0]) == semantic


def test_ratio_zero_makes_all_channels_structural() -> None:
    spsd = SPSD(6, 0.0)
    x = torch.randn(1, 6, 2, 2)
    semantic, structural = spsd.split(x)
    assert semantic.shape == (1, 0, 2, 2) and torch.equal(structural, x)
    assert torch.equal(spsd.merge(semantic, structural), x)


def test_gradients_pass_through_split_and_merge() -> None:
    spsd = SPSD(5, 0.4, torch.rand(5))
    x = torch.randn(1, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: spsd.merge(*(part.sin() for part in spsd.split(v))), x)


def test_state_dict_carries_the_split() -> None:
    source, target = SPSD(8, 0.5, torch.rand(8)), SPSD(8, 0.5)
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 8, 2, 2)
    assert torch.equal(target.split(x)[0], source.split(x)[0])
    assert torch.equal(target.merge(*target.split(x)), x)
    assert sorted(source.state_dict()) == ["semantic_index", "structural_index"]


@pytest.mark.parametrize("semantic", [[0, 1, 2, 2], [0, 1, 2, 4], [0, 1, 2, -1], [0, 1, 2, 9]])
def test_state_dict_without_a_partition_is_refused(semantic: list[int]) -> None:
    spsd = SPSD(8, 0.5)
    state = spsd.state_dict() | {"semantic_index": torch.tensor(semantic)}
    with pytest.raises(CheckpointError, match="no partition"):
        spsd.load_state_dict(state)
    assert spsd.semantic_index.tolist() == [0, 1, 2, 3]


def test_one_of_two_lists_is_held_against_the_other():
    spsd, other = SPSD(8), SPSD(8)
    other.set_ranking(torch.arange(8.0))
    alone = {"semantic_index": other.semantic_index}
    with pytest.raises(CheckpointError, match="no partition"):
        spsd.load_state_dict(alone, strict=False)
    spsd.load_state_dict({"semantic_index": spsd.semantic_index.clone()}, strict=False)
    spsd.load_state_dict({}, strict=False)
    with torch.device("meta"):
        empty = SPSD(8)
    empty.load_state_dict(alone, strict=False, assign=True)


def test_bad_modules() -> None:
    with pytest.raises(ValueError, match="semantic_ratio"):
        SPSD(4, 1.5)
    with pytest.raises(ValueError, match="channels"):
        SPSD(0)
    with pytest.raises(ValueError, match="ranking has a wrong shape"):
        SPSD(4, ranking=torch.rand(5))
    with pytest.raises(ValueError, match="ranking is not finite"):
        SPSD(4).set_ranking(torch.tensor([0.0, 1.0, float("nan"), 2.0]))
    with pytest.raises(ValueError, match="features has a wrong shape"):
        SPSD(4).split(torch.rand(1, 5, 2, 2))
    with pytest.raises(ValueError, match="wrong widths"):
        SPSD(4).merge(torch.rand(1, 1, 2, 2), torch.rand(1, 3, 2, 2))


def test_one_part_alone_may_be_batched():
    spsd, x = SPSD(8), torch.randn(2, 8, 3, 3)
    semantic, structural = spsd.split(x)
    several = torch.func.vmap(lambda part: spsd.merge(part, structural))(torch.stack([semantic, -semantic]))
    assert torch.equal(several[0], x) and torch.equal(several[1], spsd.merge(-semantic, structural))


@pytest.mark.parametrize("ranking", [None, torch.tensor([0.0, 3.0, 1.0, 2.0, 0.5])], ids=["none", "given"])
def test_memory_without_values_gets_its_split_by_a_reset(ranking):
    x, expected = torch.randn(2, 5, 3, 3), SPSD(5, 0.4, ranking)
    with torch.device("meta"):
        spsd = SPSD(5, 0.4, ranking)
    spsd.to_empty(device="cpu")
    for index in spsd.buffers():
        index.fill_(2**40)
    spsd.reset_parameters()
    assert all(map(torch.equal, spsd.buffers(), expected.buffers()))
    assert spsd.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(spsd.merge(*spsd.split(x)), x)
