# SPDX-License-Identifier: Apache-2.0
"""A loss that processes can share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossSum(NamedTuple):
    """A loss before division: the mean is ``total / terms``, and 0 where ``terms`` is 0."""

    total: Tensor
    terms: Tensor

    def mean(self) -> Tensor:
        return self.total / self.terms.clamp(min=1)
