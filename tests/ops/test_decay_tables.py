# SPDX-License-Identifier: Apache-2.0
"""The table of the spatial decay is made once and kept, and not too many of them are."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from drseg_core import ops
from drseg_core.ops.knn_graph import reference, registration


@pytest.mark.promise("C46")
def test_the_decay_table_is_made_once(monkeypatch):
    made = []
    make = reference.decay_table
    monkeypatch.setattr(reference, "decay_table", lambda *arguments: made.append(arguments) or make(*arguments))
    registration._kept.clear()
    prior = torch.randn(1, 6, 5)
    with torch.inference_mode():
        first = ops.knn_graph(prior, (2, 3), 3, return_score=True)
    for _ in range(3):
        assert all(map(torch.equal, ops.knn_graph(prior, (2, 3), 3, return_score=True), first))
    assert len(made) == 1
    ops.knn_graph(prior.double(), (2, 3), 3)
    ops.knn_graph(prior, (3, 2), 3)
    ops.knn_graph(prior, (2, 3), 3, decay=2.0)
    ops.knn_graph(prior, (2, 3), 3, form="gauss")
    ops.knn_graph(prior, (2, 3), 3, radius=1.5)
    assert len(made) == 6
    monkeypatch.setattr(registration, "_MOST_KEPT", 6)
    for decay in (3.0, 4.0, 5.0):
        ops.knn_graph(prior, (2, 3), 3, decay=decay)
    assert len(registration._kept) == 6


class _SlowTables(dict[Any, Tensor]):
    """What other threads would do between two steps of one, they do here."""

    def __len__(self) -> int:
        count = super().__len__()
        time.sleep(1e-3)
        return count

    def __iter__(self) -> Any:
        keys = super().__iter__()
        time.sleep(1e-3)
        return keys


def test_threads_keep_no_more_tables_than_one(monkeypatch):
    kept = _SlowTables()
    monkeypatch.setattr(registration, "_kept", kept)
    monkeypatch.setattr(registration, "_MOST_KEPT", 4)
    like, sizes = torch.ones(1), []

    def ask(thread: int) -> None:
        for n in range(10):
            registration.decay_table((2, 3), float(10 * thread + n), "additive", like)
            sizes.append(len(kept))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert max(sizes) == len(kept) == 4
