# SPDX-License-Identifier: Apache-2.0
"""The device of this process and, under ``torchrun``, the processes it trains with."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drseg_core.device import select_device
from drseg_core.training.loss import LossSum

_PATIENCE = datetime.timedelta(days=30)


class Agreed(NamedTuple):
    """Over all processes: mean loss, terms of each of its parts, the main clock, a signal received anywhere."""

    loss: float
    terms: tuple[float, ...]
    elapsed: float
    signal: int


@dataclass(frozen=True)
class ProcessGroup:
    """This process among ``world_size``; a group of one communicates nothing."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Element-wise sum over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def broadcast(self, value: Tensor) -> Tensor:
        """The main process's tensor, in place."""
        if self.world_size > 1:
            dist.broadcast(value, src=0)
        return value

    def agree(self, loss: Sequence[LossSum], elapsed: float, received: int) -> Agreed:
        """What all processes must know alike in a step, in one exchange: otherwise their weights would part."""
        value = torch.zeros(3 + 2 * len(loss), dtype=torch.float64, device=self.device)
        value[0] = elapsed if self.is_main else 0.0
        value[1], value[2] = received == signal.SIGINT, received == signal.SIGTERM
        for place, part in enumerate(loss):
            value[3 + 2 * place], value[4 + 2 * place] = part.total.detach(), part.terms
        elapsed, interrupts, terminations, *sums = self.sum(value).tolist()
        terms = tuple(sums[1::2])
        mean = sum(total / max(count, 1.0) for total, count in zip(sums[::2], terms, strict=True))
        stop = signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0
        return Agreed(mean, terms, elapsed, int(stop))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with averaged gradients. Frozen tensors, the prior among them, stay out of all communication."""
        if self.world_size == 1:
            return model
        still = [name for name, value in model.named_parameters() if not value.requires_grad]
        still += [name for name, _ in model.named_buffers()]
        parallel = nn.parallel.DistributedDataParallel
        parallel._set_params_and_buffers_to_ignore_for_model(model, still)
        return parallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)


@contextlib.contextmanager
def process_group(device: str | None, *, patient: bool = False) -> Iterator[ProcessGroup]:
    """Join the processes that ``torchrun`` started (gloo on CPU, nccl on CUDA), or go alone.

    Args:
        device: the device; under CUDA each process takes one of its own.
        patient: they exchange words alone, and one may wait for the others for as long as it takes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield ProcessGroup(select_device(device))
        return
    chosen = select_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if patient:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    else:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield ProcessGroup(chosen, dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()
