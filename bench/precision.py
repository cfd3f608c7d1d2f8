# SPDX-License-Identifier: Apache-2.0
"""What whole PDGR is measured in. The module's parameters are float32 in all of them.

float32    everything in float32
autocast   bfloat16 autocast around a float32 module: features and prior come in float32
bfloat16   the same, and both maps come in bfloat16, as backbones under autocast hand them over
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Dtypes of a step.

    Args:
        maps: of features and prior as they come.
        products: of the linear maps; where it is another than float32, autocast is on.
    """

    maps: torch.dtype
    products: torch.dtype

    @property
    def reduced(self) -> bool:
        return self.products != torch.float32

    def context(self, device: str) -> contextlib.AbstractContextManager[object]:
        """Around a forward pass; the backward pass runs outside."""
        return torch.autocast(device, self.products) if self.reduced else contextlib.nullcontext()


PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32),
    "autocast": Precision(torch.float32, torch.bfloat16),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16),
}
