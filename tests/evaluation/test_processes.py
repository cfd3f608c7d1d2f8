# SPDX-License-Identifier: Apache-2.0
"""Processes that share an evaluation count together what one counts alone."""

from __future__ import annotations

import threading

import pytest
import torch

from drseg_core.config.schema import EvaluationConfig
from drseg_core.evaluation.evaluate import evaluate
from tests.evaluation.fake import COLORS, ColorModel
from tests.evaluation.test_evaluate import Colors


class Threads:
    """Threads in the place of processes: ``of(rank)`` is one of them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.device = torch.device("cpu")
        self.parts: list[torch.Tensor] = []
        self.barrier = threading.Barrier(world_size)

    def of(self, rank: int) -> Member:
        return Member(self, rank)


class Member:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank = threads, rank
        self.world_size, self.device = threads.world_size, threads.device

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        assert value.dtype == torch.int64
        self.threads.parts.append(value.clone())
        self.threads.barrier.wait(30)
        return value.copy_(torch.stack(self.threads.parts).sum(0))


@pytest.mark.promise("C50")
@pytest.mark.parametrize("mode", ["whole", "tile"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_shared_equals_alone(mode, world_size, batch_size):
    """Five images: with batches of two, the fourth process has none."""
    options = EvaluationConfig(mode=mode, tile_size=16, overlap=4, batch_size=batch_size)

    def run(processes=None):
        return evaluate(
            ColorModel(), list(COLORS), Colors(), options, processes=processes, boundary=True, progress=False
        )

    group = Threads(world_size)
    found: dict[int, dict] = {}
    workers = [
        threading.Thread(target=lambda rank=rank: found.update({rank: run(group.of(rank))}))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    alone = run()
    assert alone["images_all_ignored"] == 1 and alone["ignored_pixels"] > 0
    assert 0 < alone["boundary"]["mIoU"] < 100
    assert [found[rank] for rank in range(world_size)] == [alone] * world_size


def test_every_batch_is_that_of_one_process():
    """Whole batches are shared, so no image meets others in its batch than it does alone."""
    options = EvaluationConfig(batch_size=2)
    alone = ColorModel()
    evaluate(alone, list(COLORS), Colors(), options, progress=False)
    shared = []
    for rank in (0, 1):
        model, member = ColorModel(), Threads(2).of(rank)
        member.sum = lambda value: value
        evaluate(model, list(COLORS), Colors(), options, processes=member, progress=False)
        shared += model.batches
    assert sorted(shared) == sorted(alone.batches)
