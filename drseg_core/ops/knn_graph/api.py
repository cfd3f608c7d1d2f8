# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates, prepares and hands over to a backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from drseg_core.ops import _checks, _dispatch
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops.knn_graph import registration
from drseg_core.ops.prepare_prior.api import PreparedPrior, prepare_prior, rows_of

FORMS = ("additive", "gauss", "multiplicative", "product")
PRECISIONS = ("exact",)

Form = Literal["additive", "gauss", "multiplicative", "product"]


def _check(
    prior: Tensor,
    grid: tuple[int, int],
    k: int,
    decay: float,
    form: str,
    include_self: bool,
    return_score: bool | str,
    pad: bool,
    precision: str,
    radius: float | None,
    rows: tuple[int, int] | None,
    check_finite: bool,
) -> None:
    op = "knn_graph"
    nodes, channels = prior.shape[-2:]
    if channels == 0:
        raise ValueError(f"{op}: prior has no channels; expected D >= 1, got shape {tuple(prior.shape)}")
    _checks.check_grid(op, grid, nodes)
    _checks.check_count(op, "k", k)
    _checks.check_number(op, "decay", decay)
    largest = torch.finfo(torch.float64 if prior.dtype == torch.float64 else torch.float32).max
    if decay > largest:
        raise ValueError(f"{op}: decay is too large; expected decay <= {largest:.4g}, got {decay}")
    _checks.check_choice(op, "form", form, FORMS)
    for name, flag in (
        ("include_self", include_self),
        ("pad", pad),
        ("check_finite", check_finite),
    ):
        _checks.check_flag(op, name, flag)
    if isinstance(return_score, str):
        if return_score != "rough":
            raise ValueError(f"{op}: return_score is unknown; expected True, False or 'rough', got {return_score!r}")
    else:
        _checks.check_flag(op, "return_score", return_score)
    _checks.check_choice(op, "precision", precision, PRECISIONS)
    if radius is not None:
        _checks.check_number(op, "radius", radius)
    if rows is not None:
        if not isinstance(rows, (tuple, list)) or len(rows) != 2:
            raise ValueError(f"{op}: rows is not a pair; expected (first, end), got {' '.join(repr(rows).split())}")
        first, end = (_checks.check_count(op, "rows", value) for value in rows)
        if not first <= end <= nodes:
            raise ValueError(f"{op}: rows is out of range; expected first <= end <= N = {nodes}, got {first}, {end}")
    if pad or nodes == 0:
        return
    candidates = nodes if include_self else nodes - 1
    if radius is not None and not torch.compiler.is_compiling():
        candidates = _in_corner(grid, radius) - (not include_self)
    if k > candidates:
        # a compiler traces no text of a size that may differ
        which = f"N = {nodes}" if radius is None else f"of a corner within radius {radius}"
        raise ValueError(
            f"{op}: k exceeds the candidates; expected k <= {candidates} ({which}), got {k}: pass pad=True or lower k"
        )


def _in_corner(grid: tuple[int, int], radius: float) -> int:
    """Cells within reach of a corner of the grid, which has the fewest."""
    height, width = (min(side, int(min(radius, side)) + 1) for side in grid)
    return sum(math.sqrt(y * y + x * x) <= radius for y in range(height) for x in range(width))


@overload
def knn_graph(
    prior: Tensor | PreparedPrior,
    grid: tuple[int, int],
    k: int,
    *,
    decay: float = ...,
    form: Form = ...,
    include_self: bool = ...,
    return_score: Literal[False] = ...,
    pad: bool = ...,
    precision: Literal["exact"] = ...,
    radius: float | None = ...,
    rows: tuple[int, int] | None = ...,
    check_finite: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def knn_graph(
    prior: Tensor | PreparedPrior,
    grid: tuple[int, int],
    k: int,
    *,
    decay: float = ...,
    form: Form = ...,
    include_self: bool = ...,
    return_score: Literal[True, "rough"],
    pad: bool = ...,
    precision: Literal["exact"] = ...,
    radius: float | None = ...,
    rows: tuple[int, int] | None = ...,
    check_finite: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def knn_graph(
    prior: Tensor | PreparedPrior,
    grid: tuple[int, int],
    k: int,
    *,
    decay: float = 1.0,
    form: Form = "additive",
    include_self: bool = True,
    return_score: bool | Literal["rough"] = False,
    pad: bool = False,
    precision: Literal["exact"] = "exact",
    radius: float | None = None,
    rows: tuple[int, int] | None = None,
    check_finite: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The k nodes of highest affinity for every node of a grid (arXiv 2604.02010, Eq. 7).

    ``cos_ij`` is the cosine of two features, ``delta_ij`` the distance of two cells over the longest on the grid. Nodes
    are ordered by

    * ``additive``: ``cos_ij - decay * delta_ij`` (the exponential and the linear reading of Eq. 7),
    * ``gauss``: ``cos_ij - decay * delta_ij**2``,
    * ``multiplicative``: ``max(cos_ij, 0) * exp(-decay * delta_ij)`` (the power reading),
    * ``product``: ``cos_ij * exp(-decay * delta_ij)``,

    equal scores by ascending index. Node ``i`` is cell ``(i // w, i % w)``. The N x N matrix is never stored.

    Args:
        prior: (B, N, D) or (N, D) features, float32, float64, float16 or bfloat16; need not be normalised. Or what
            ``prepare_prior`` made of them, if the normalised features are used elsewhere too.
        grid: (h, w) with ``h * w = N``.
        k: neighbours per node, at most N (N - 1 without the node itself) unless ``pad``.
        decay: strength of the spatial decay (lambda / gamma of Eq. 7), >= 0 and in the range of the scores' dtype.
        form: how cosine and distance are joined, see above.
        include_self: every node is one of its own k neighbours; otherwise never.
        return_score: return the scores too. ``sort_by_score`` orders by them, ``score_parts`` takes them apart. With
            ``rough`` they may be off by a thousandth, and only tell which slots are padding. A kernel that chooses by
            rounded features then need not compute them. The choice is the same.
        pad: fill up with the row's own index if there are fewer than k candidates (see ``padding_mask``).
        precision: ``exact`` ranks float32 affinities; it is the only one so far.
        radius: cells farther apart than this many cells are no candidates, >= 0; None is no limit. It needs ``pad`` if
            it leaves a node fewer than k candidates.
        rows: (first, end), the neighbours of nodes ``first`` to ``end - 1`` alone, among all nodes; None is all of
            them. So a large graph can be made in parts, each with memory for its own rows.
        check_finite: refuse non-finite features (synchronises a GPU) instead of containing them.
        backend: one of ``backend_names()``; None takes the best that can run.

    Returns:
        ``index`` (B, N, k) int32, each row ascending with its padding last; (B, end - first, k) of ``rows``. With
        ``return_score`` also ``score`` of the same shape, float32 (float64 for float64 features), ``-inf`` in padded
        slots. Neither carries a gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.
        NumericalError: ``check_finite`` found a non-finite feature.
        BackendUnavailableError: the named backend cannot run here.

    Note:
        A zero feature has cosine 0 with every node. Scores are equal if they are equal as computed. To every backend,
        features that differ by a power of two are the same. Parallel features of other lengths may have cosines that
        differ in the last bit. Which of them comes first may then differ between backends.

        A node with a non-finite feature is chosen by no other node. All its own slots hold its own index with score
        NaN. The other rows are as if it were not there, and are padded if fewer than k candidates are left.

        On the native backend ``rows`` have the bits that they have among all. Where the library multiplies, the last
        bits of scores may depend on the number of rows, and of images in the batch: on a GPU and in the reference.
        Under ``torch.use_deterministic_algorithms`` they do not depend on that of images.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import knn_graph
        >>> prior = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> knn_graph(prior, (2, 2), 2, decay=0.0).tolist()
        [[0, 1], [0, 1], [2, 3], [2, 3]]
    """
    nodes = rows_of("knn_graph", prior)
    grid, k, decay = _checks.numbers(grid), _checks.number(k), _checks.number(decay)
    radius = None if radius is None else _checks.number(radius)
    rows = None if rows is None else _checks.numbers(rows)
    _check(nodes, grid, k, decay, form, include_self, return_score, pad, precision, radius, rows, check_finite)
    requested = requested_backend("knn_graph", backend)
    if not torch.compiler.is_compiling():
        # if the named backend cannot run, the error is about this op, not about the preparation
        _dispatch.resolve("knn_graph", nodes, requested, {"nodes": nodes.shape[-2]})
    if check_finite:
        _checks.check_finite_rows("knn_graph", "prior", nodes)
    given = prior if isinstance(prior, PreparedPrior) else prepare_prior(prior, backend=backend)
    if return_score is True:
        given = given._replace(rounded=None, residual=None)
    arguments = given if nodes.dim() == 3 else [None if value is None else value[None] for value in given]
    reach = None if radius is None else float(radius)
    options = (*grid, k, float(decay), form, include_self, requested, reach, None if rows is None else list(rows))
    index, score = registration.knn_graph(*arguments, *options)
    if nodes.dim() == 2:
        index, score = index[0], score[0]
    return (index, score) if return_score else index


def padding_mask(index: Tensor, *, include_self: bool = True) -> Tensor:
    """False in the slots that ``knn_graph(pad=True)`` filled up with the row's own index, True elsewhere.

    Args:
        index: (B, N, K) or (N, K) neighbour indices of ``knn_graph``.
        include_self: as given to ``knn_graph``; if True, the first slot with the row's own index is a real neighbour.

    Returns:
        bool tensor of the shape of ``index``: the ``mask`` of ``edge_weight``.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import knn_graph, padding_mask
        >>> index = knn_graph(torch.ones(2, 3), (1, 2), 3, pad=True)
        >>> index.tolist(), padding_mask(index).tolist()
        ([[0, 1, 0], [0, 1, 1]], [[True, True, False], [True, True, False]])
    """
    _checks.check_tensor("padding_mask", "index", index, ("B", "N", "K"), _checks.INDEX_DTYPES)
    _checks.check_flag("padding_mask", "include_self", include_self)
    own = index == torch.arange(index.shape[-2], device=index.device, dtype=index.dtype)[:, None]
    return ~(own & (own.cumsum(-1) > 1)) if include_self else ~own
