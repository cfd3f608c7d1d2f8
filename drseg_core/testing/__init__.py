# SPDX-License-Identifier: Apache-2.0
"""What an implementation of PDGR is held against: by the tests, by the benchmark, and by code of others.

``LiteralPDGR`` and ``dense_pdgr`` are the paper's equations, ``CASES`` the sizes at which ops are tested and measured,
``make_inputs`` their seeded inputs, ``numerics`` how close is right.

    >>> from drseg_core import ops
    >>> from drseg_core.testing import CASES, make_inputs, numerics
    >>> inputs = make_inputs("graph_propagate", CASES[0])
    >>> right = ops.graph_propagate(**inputs, backend="reference").double()
    >>> numerics.compare_values(ops.graph_propagate(**inputs), right, 1e-5).problem is None
    True
"""

from drseg_core.testing import numerics
from drseg_core.testing.cases import (
    CASES,
    Case,
    dino_like_prior,
    generator,
    make_inputs,
    random_index,
    vit_like_prior,
)
from drseg_core.testing.literal import LiteralPDGR, dense_affinity, dense_neighbours, dense_pdgr
from drseg_core.testing.memory import high_water

__all__ = [
    "CASES",
    "Case",
    "LiteralPDGR",
    "dense_affinity",
    "dense_neighbours",
    "dense_pdgr",
    "dino_like_prior",
    "generator",
    "high_water",
    "make_inputs",
    "numerics",
    "random_index",
    "vit_like_prior",
]
