# SPDX-License-Identifier: Apache-2.0
"""The grid cut into patches of neighbouring nodes, and what bounds every score between two patches.

Nodes that are close to each other have much the same neighbours, so a decay that falls with the distance rules out
whole patches; rows of the grid would reach too far sideways. Everything here is made on the device, without a wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """How a grid of nodes is cut; the patches at its ends may be ragged.

    Args:
        grid: (h, w). height, width: of a patch.
    """

    grid: tuple[int, int]
    height: int
    width: int

    @property
    def down(self) -> int:
        return -(-self.grid[0] // self.height)

    @property
    def across(self) -> int:
        return -(-self.grid[1] // self.width)

    @property
    def count(self) -> int:
        return self.down * self.across

    def order(self, device: torch.device) -> Tensor:
        """(patches, nodes of a patch) int32: the nodes of each, -1 where it reaches beyond the grid."""
        h, w = self.grid
        node = torch.arange(h * w, dtype=torch.int32, device=device).view(h, w)
        beyond = (0, self.across * self.width - w, 0, self.down * self.height - h)
        whole = F.pad(node, beyond, value=-1).view(self.down, self.height, self.across, self.width)
        # a kernel reads it as it lies, and a reshape may leave it as it was
        return whole.transpose(1, 2).reshape(self.count, self.height * self.width).contiguous()

    def window(self, nodes: int, side: int) -> tuple[int, int]:
        """Patches down and across of the part of the grid in which a row looks first.

        About so many nodes at least, and as many patches as a square of ``side``, where the grid has them.
        """
        wanted = -(-nodes // (self.height * self.width))
        while side * side < wanted:
            side += 1
        down = min(side, self.down)
        across = min(-(-side * side // down), self.across)
        return min(-(-side * side // across), self.down), across

    def windows(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """(patches, 2) int32: the first patch of a window around each, moved to lie within the grid, and its own place
        among those of the window."""
        y = torch.arange(self.down, dtype=torch.int32, device=device)[:, None]
        x = torch.arange(self.across, dtype=torch.int32, device=device)
        top = (y - size[0] // 2).clamp(0, self.down - size[0])
        left = (x - size[1] // 2).clamp(0, self.across - size[1])
        return torch.stack([top * self.across + left, (y - top) * size[1] + x - left], dim=-1).view(self.count, 2)

    def reach(self, table: Tensor, subtracts: bool) -> Tensor:
        """(down, across) float32: the decay that helps a score most, of two nodes in patches so far apart.

        The smallest entry where the table is subtracted, else the largest in size. The table may hold anything.
        """
        sizes = -table if subtracts else table.abs()
        window = (2 * self.height - 1, 2 * self.width - 1)
        around = (self.height - 1, self.width - 1)
        most = F.max_pool2d(sizes[None], window, (self.height, self.width), around)[0]
        return -most if subtracts else most

    def longest(self, length: Tensor) -> Tensor:
        """(B, patches): the largest of ``length`` (B, N) in each."""
        shape = (self.height, self.width)
        most = F.max_pool2d(length.view(-1, *self.grid), shape, shape, ceil_mode=True)
        return most.view(length.shape[0], self.count)


def cut(grid: tuple[int, int], nodes: int) -> Patches:
    """Patches of so many nodes (a power of two): the squarest that are not a quarter more than the fewest possible."""
    found = [Patches(grid, 1 << n, nodes >> n) for n in range(nodes.bit_length())]
    fewest = min(patches.count for patches in found)
    found = [patches for patches in found if 4 * patches.count <= 5 * fewest]
    return min(found, key=lambda patches: (patches.height + patches.width, patches.count))


def lengths(prior: Tensor, inverse_norm: Tensor) -> Tensor:
    """(B, N) float32 norms of the features times ``inverse_norm``: 1 but for rounding where that is what it says.

    No candidate has a node that is not finite, so its length is 0; one too long for float32 is infinite.
    """
    length = torch.linalg.vector_norm(prior, dim=-1, dtype=torch.float32) * inverse_norm.abs()
    length = length.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return torch.where(inverse_norm.isnan(), 0.0, length)


def slack(channels: int) -> float:
    """By what factor a computed dot product may exceed the product of the computed lengths, at most.

    With u = 2**-24 a sum of D products is off by less than D u of the sum of their sizes if each step rounds to
    nearest, by less than 2 D u if it cuts off (as matrix units may); the two lengths together by D u. Eight times D u,
    and eight more for the products around them, leaves more than twice that.
    """
    return 1.0 + 8 * (channels + 8) * 2.0**-24
