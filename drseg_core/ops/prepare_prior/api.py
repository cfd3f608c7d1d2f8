# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates and hands over to a backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from drseg_core.ops import _checks
from drseg_core.ops._dispatch import requested_backend, takes_raw
from drseg_core.ops._registration import widest
from drseg_core.ops.linear_map.api import linear_map
from drseg_core.ops.prepare_prior import registration


class PreparedPrior(NamedTuple):
    """Scaled features of a prior with their inverse norms, computed once for the selection and for linear maps.

    Args:
        scaled: (B, N, D) or (N, D), contiguous. Each row is multiplied by the power of two that brings its largest
            entry near one. Rows of float16 stay as given, since their products cannot leave the range of float32.
        inverse_norm: (B, N) or (N,), float32 (float64 for float64 features): inverse L2 norms of the scaled rows, 0 for
            a zero row, NaN for a row with a non-finite value.
        rounded: (B, N, D) or (N, D), the scaled rows in float16, if a kernel chooses by them; otherwise None.
        residual: (B, N) or (N,), a bound on the length of a row's rounding error over the row's own length; None
            without ``rounded``.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import knn_graph, prepare_prior
        >>> prepared = prepare_prior(torch.eye(4))
        >>> index, (product, factor) = knn_graph(prepared, (2, 2), 1), prepared.project(torch.ones(8, 4))
        >>> index.flatten().tolist(), tuple(product.shape), tuple(factor.shape)
        ([0, 1, 2, 3], (4, 8), (4,))
    """

    scaled: Tensor
    inverse_norm: Tensor
    rounded: Tensor | None = None
    residual: Tensor | None = None

    def project(self, weight: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor | None]:
        """A linear map of the rows, and the factors that make it a map of the L2-normalised rows.

        The ops that weigh edges take both. They read the product anyway, and it is narrower than the rows.

        Args:
            weight: (E, D).
            backend: as in ``linear_map``.

        Returns:
            The product, (B, N, E) or (N, E), in the dtype of ``weight`` (under autocast: of autocast). And
            ``inverse_norm``, by which its rows are still to be multiplied; None if they are normalised already.

        Raises:
            TypeError, ValueError: ``weight``, or a field of this prior, has the wrong type, dtype, shape or device.
        """
        rows_of("project", self)
        scaled, factor = self.scaled, self.inverse_norm
        if scaled.dtype == torch.float16:
            # not scaled, so that a product could leave the range of float16
            unit = (scaled.float() * factor[..., None]).to(weight.dtype)
            return linear_map(unit, weight, backend=backend), None
        # autocast leaves float64 alone
        if not torch.is_autocast_enabled(scaled.device.type) or torch.float64 in (scaled.dtype, weight.dtype):
            scaled = scaled.to(weight.dtype)
        return linear_map(scaled, weight, backend=backend), factor


def rows_of(op: str, prior: Tensor | PreparedPrior) -> Tensor:
    """The features of a prior, as they are or prepared; fields that do not fit are refused by types and sizes."""
    if not isinstance(prior, PreparedPrior):
        _checks.check_tensor(op, "prior", prior, ("B", "N", "D"))
        return prior
    scaled = prior.scaled
    _checks.check_tensor(op, "prior.scaled", scaled, ("B", "N", "D"))
    rows, of_rows = tuple(scaled.shape[:-1]), "the shape of prior.scaled before D"
    fields: tuple[tuple[str, Any, torch.dtype, tuple[int, ...], str], ...] = (
        ("prior.inverse_norm", prior.inverse_norm, widest(scaled), rows, of_rows),
        ("prior.rounded", prior.rounded, torch.float16, tuple(scaled.shape), "the shape of prior.scaled"),
        ("prior.residual", prior.residual, torch.float32, rows, of_rows),
    )
    for name, value, dtype, shape, meaning in fields:
        if value is not None or name == "prior.inverse_norm":
            _checks.check_tensor(op, name, value, None, (dtype,))
            _checks.check_shape(op, name, value, shape, meaning)
            _checks.check_same_device(op, **{"prior.scaled": scaled, name: value})
    return scaled


def prepare_prior(prior: Tensor, *, backend: str | None = None) -> PreparedPrior:
    """Normalise a prior once, for ``knn_graph`` and for the edge MLP. The result carries no gradient.

    Args:
        prior: (B, N, D) or (N, D) features, float32, float64, float16 or bfloat16.
        backend: one of ``backend_names()``; None takes the best that can run.

    Raises:
        TypeError, ValueError: ``prior`` has the wrong type, dtype or rank, or no channels.
        BackendUnavailableError: the named backend cannot run here.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import prepare_prior
        >>> prepared = prepare_prior(torch.tensor([[3.0, 4.0]]))
        >>> (prepared.scaled * prepared.inverse_norm[:, None]).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    _checks.check_tensor("prepare_prior", "prior", prior, ("B", "N", "D"))
    if prior.shape[-1] == 0:
        raise ValueError(f"prepare_prior: prior has no channels; expected D >= 1, got shape {tuple(prior.shape)}")
    requested = requested_backend("prepare_prior", backend)
    rounds = prior.dtype == torch.float32 and takes_raw("prepare_prior", prior, requested)
    # the choice is not differentiable, and a frozen prior must not be kept alive by a graph
    scaled, inverse_norm, *others = registration.prepare_prior(prior.detach(), rounds, requested)
    return PreparedPrior(scaled, inverse_norm, *(others if rounds else ()))
