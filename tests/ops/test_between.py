# SPDX-License-Identifier: Apache-2.0
"""``knn_between`` on every backend of ``knn_graph``, against all cosines in float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from drseg_core import ops
from drseg_core.errors import BackendUnavailableError
from drseg_core.ops import knn_between
from drseg_core.ops.between import _side_by_side

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    row["backend"]
    for row in ops.backend_report()
    if row["op"] == "knn_graph" and row["device"] == "cpu" and row["available"]
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton" and request.node.callspec.params.get("dtype") == torch.float64:
        pytest.skip("Triton's kernels take no float64")
    with ops.use_backend(request.param):
        yield request.param
    assert ops.last_backend("knn_graph") == request.param


def lattice(*shape: int, seed: int = 0) -> Tensor:
    """Features of one length whose products are exact on every backend, with many ties."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def expected(query: Tensor, prior: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of every row, ascending; a stable sort keeps the lower index of equal cosines."""
    query, prior = query.double(), prior.double()
    cosine = (query / query.norm(dim=-1, keepdim=True)) @ (prior / prior.norm(dim=-1, keepdim=True)).mT
    # of equal sums, not of equal quotients
    index = cosine.mul(2**20).round().argsort(dim=-1, descending=True, stable=True)[..., :k].sort(dim=-1).values
    return index, cosine.gather(-1, index)


@pytest.mark.promise("C8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "rows, candidates, k", [(1, 1, 1), (1, 9, 4), (7, 3, 3), (20, 20, 5), (41, 13, 6), (3, 40, 33), (13, 1, 1)]
)
def test_the_nearest_of_another_set(rows, candidates, k, dtype, backend):
    query, prior = lattice(2, rows, 16).to(dtype), lattice(2, candidates, 16, seed=1).to(dtype)
    given = query.clone(), prior.clone()
    index, score = knn_between(query, prior, k, return_score=True)
    neighbour, cosine = expected(query, prior, k)
    assert index.dtype == torch.int32 and torch.equal(index.long(), neighbour)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(score.double(), cosine, rtol=0, atol=1e-6)
    # without scores, and one sample alone
    assert torch.equal(knn_between(query, prior, k), index)
    assert torch.equal(knn_between(query[1], prior[1], k), index[1])
    assert torch.equal(query, given[0]) and torch.equal(prior, given[1])


@pytest.mark.skipif(INTERPRETED, reason="thousands of rows take minutes in the interpreter")
@pytest.mark.parametrize("rows, candidates, channels", [(900, 700, 40), (2500, 1100, 128)])
def test_many_rows(rows, candidates, channels, backend):
    if backend == "triton":
        pytest.skip("interpreted")
    random = torch.Generator().manual_seed(0)
    query, prior = (torch.randn(1, count, channels, generator=random) for count in (rows, candidates))
    index, score = knn_between(query, prior, 10, return_score=True)
    _, cosine = expected(query, prior, 10)
    assert (index >= 0).all() and (index < candidates).all() and (index.diff(dim=-1) > 0).all()
    # whichever of two that round to one, the scores in order are the best there are
    torch.testing.assert_close(score.double().sort(dim=-1).values, cosine.sort(dim=-1).values, rtol=0, atol=2e-6)


def test_opposite_sets_choose_each_other_all_the_same(backend):
    # every row is nearer to all of its own set than to any of the other
    query = torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0]])
    index, score = knn_between(query, -query, 3, return_score=True)
    assert index.tolist() == [[0, 1, 2]] * 3 and (score < -0.9).all() and (score >= -1 - 1e-6).all()


@pytest.mark.promise("C11")
def test_what_is_not_finite_and_what_has_no_candidate(backend):
    query, prior = lattice(5, 8), lattice(4, 8, seed=1)
    query[1, 3], prior[2, 0] = torch.inf, torch.nan
    index, score = knn_between(query, prior, 6, return_score=True, pad=True)
    healthy = [0, 2, 3, 4]
    assert index[healthy].tolist() == [[0, 1, 3, -1, -1, -1]] * 4
    assert score[healthy][:, :3].isfinite().all() and (score[healthy][:, 3:] == -torch.inf).all()
    assert (index[1] == -1).all() and score[1].isnan().all()
    zero = knn_between(torch.zeros(1, 8), prior, 2, return_score=True)
    assert zero[0].tolist() == [[0, 1]] and zero[1].tolist() == [[0.0, 0.0]]


@pytest.mark.promise("C14")
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_choose(shape):
    batch, rows, candidates = shape
    query, prior = torch.ones(batch, rows, 5), torch.ones(batch, candidates, 5)
    index, score = knn_between(query, prior, 2, return_score=True, pad=True)
    assert index.shape == score.shape == (batch, rows, 2)
    assert (index == -1).all() and (score == -torch.inf).all()


def test_no_gradient_and_one_graph_for_a_compiler():
    query, prior = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    index, score = knn_between(query, prior, 3, return_score=True)
    assert not score.requires_grad
    compiled = torch.compile(lambda *sets: knn_between(*sets, 3), backend="eager", fullgraph=True)
    assert torch.equal(compiled(query, prior), index)

    class Nearest(torch.nn.Module):
        def forward(self, query: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
            return knn_between(query, prior, 3, return_score=True)

    given = query.detach(), prior.detach()
    plain = torch.export.export(Nearest(), given).run_decompositions(ops.decompositions()).module()
    assert torch.equal(plain(*given)[0], index)
    torch.testing.assert_close(plain(*given)[1], score)


ONE = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: knn_between(ONE.int(), ONE, 1), TypeError, "query has .*dtype"),
        (lambda: knn_between(ONE, ONE.double(), 1), TypeError, "prior has another dtype than query; expected torch.f"),
        (lambda: knn_between(ONE, ONE[0], 1), ValueError, r"prior has .*; expected .*\(2, 3, 4\)"),
        (lambda: knn_between(ONE, ONE[..., :2], 1), ValueError, r"prior has .*got \(2, 3, 2\)"),
        (lambda: knn_between(ONE[..., :0], ONE[..., :0], 1), ValueError, "query has no channels; expected D >= 1"),
        (lambda: knn_between(ONE, ONE, 4), ValueError, "k exceeds the candidates; expected k <= N = 3, got 4"),
        (lambda: knn_between(ONE, ONE, -1), ValueError, "knn_between: k "),
        (lambda: knn_between(ONE, ONE, 1, pad="yes"), TypeError, "pad must be a flag"),  # type: ignore[call-overload]
        (lambda: knn_between(ONE, ONE, 1, backend="none"), ValueError, "backend"),
        (lambda: knn_between(ONE, ONE, 1, backend="cuda"), BackendUnavailableError, "knn_graph: backend cuda "),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message) as found:
        call()
    assert "\n" not in str(found.value)


def test_what_fills_the_last_grid_chooses_nothing():
    """Rows of zeros would tie with everything, and a GPU would compute all of their scores in float32."""
    random = torch.Generator().manual_seed(0)
    query, prior = (ops.prepare_prior(torch.randn(2, n, 8, generator=random)) for n in (7, 5))
    both = _side_by_side(query, prior)
    # two grids of each sample: 5 rows, then 2 and three that are none
    inverse = both.inverse_norm.view(2, 2, 2, 5)
    assert torch.equal(inverse[:, 1, 0, :2], query.inverse_norm[:, 5:]) and inverse[:, 1, 0, 2:].isnan().all()
    assert torch.equal(inverse[:, :, 1], prior.inverse_norm[:, None].expand(-1, 2, -1))
    assert inverse.isnan().sum() == 6 and both.scaled.isfinite().all()
