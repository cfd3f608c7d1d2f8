# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates and hands over to a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.ops import _checks
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops.prepare_prior import registration


class PreparedPrior(NamedTuple):
    """Features of a prior with what normalises them: work shared by the selection and by linear maps.

    Args:
        scaled: (B, N, D) or (N, D), contiguous, each row times a power of two that brings its largest entry near one
            (float16: as given, its products cannot leave the range of float32).
        inverse_norm: (B, N) or (N,), float32 (float64 for float64 features): inverse L2 norms of the scaled rows, 0 for
            a zero row, NaN for a row with a non-finite value.

    Example:
        >>> import torch
        >>> from drseg_core.ops import knn_graph, prepare_prior
        >>> prepared = prepare_prior(torch.eye(4))
        >>> index, halves = knn_graph(prepared, (2, 2), 1), prepared.linear(torch.ones(8, 4))
        >>> index.flatten().tolist(), tuple(halves.shape)
        ([0, 1, 2, 3], (4, 8))
    """

    scaled: Tensor
    inverse_norm: Tensor

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear map of the L2-normalised rows, as ``torch.nn.functional.linear`` of them; NaN for a NaN norm.

        The norm is applied to the result, which is narrower than the rows.

        Args:
            weight: (E, D). bias: (E,).

        Returns:
            (B, N, E) or (N, E) in float32 (float64 where the features or ``weight`` are).
        """
        scaled, factor = self.scaled, self.inverse_norm[..., None]
        if scaled.dtype == torch.float16:
            scaled, factor = scaled.float() * factor, torch.ones_like(factor)
        result = F.linear(scaled.to(weight.dtype), weight)
        return result * factor if bias is None else torch.addcmul(bias.to(factor.dtype), result, factor)


def prepare_prior(prior: Tensor, *, backend: str | None = None) -> PreparedPrior:
    """Normalisation of a prior, done once for ``knn_graph`` and for the edge MLP. It carries no gradient.

    Args:
        prior: (B, N, D) or (N, D) features, float32, float64, float16 or bfloat16.
        backend: one of ``backend_names()``; None takes the best that can run.

    Raises:
        TypeError, ValueError: ``prior`` has the wrong type, dtype or rank, or no channels.
        BackendUnavailableError: the named backend cannot run here.

    Example:
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
    # the choice is not differentiable, and a frozen prior must not be kept alive by a graph
    return PreparedPrior(*registration.prepare_prior(prior.detach(), requested))
