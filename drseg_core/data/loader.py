# SPDX-License-Identifier: Apache-2.0
"""The endless stream of training batches.

The sample at position ``p`` of the stream is ``permutation(seed, p // N)[p % N]`` for N samples, and its augmentation
draws from a generator seeded by ``(seed, p)``. So the stream does not depend on how many processes read it, and
starting at position ``p`` continues exactly what an earlier stream would have given.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from drseg_core.data.dataset import SegmentationDataset
from drseg_core.data.transforms import augment
from drseg_core.errors import DatasetError, DRSegError, ResourceError

# keys that keep the streams of order and augmentation apart
_ORDER, _AUGMENT = 1, 2


class TrainingBatch(NamedTuple):
    """One batch.

    ``image`` (B, 3, S, S) is float32 in [0, 1], ``mask`` (B, S, S) uint8 with 255 = ignore. ``position`` is the number
    of samples drawn before this batch, over all processes.
    """

    image: Tensor
    mask: Tensor
    position: int


class _Failure(NamedTuple):
    """A sample that could not be made. It is sent as text: some exceptions cannot be sent between processes."""

    kind: str
    message: str


class _Augmented(Dataset[Any]):
    """Samples by their position in the stream."""

    def __init__(self, dataset: SegmentationDataset, crop_size: int, color_jitter: bool, seed: int) -> None:
        self.dataset = dataset
        self.crop_size = crop_size
        self.color_jitter = color_jitter
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            key = np.random.SeedSequence([self.seed, _ORDER, epoch])
            self._order = np.random.default_rng(key).permutation(len(self.dataset))
            self._epoch = epoch
        return int(self._order[offset])

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor] | _Failure:
        index = self.index(position)
        try:
            sample = self.dataset[index]
            key = np.random.SeedSequence([self.seed, _AUGMENT, position]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(key[0] >> np.uint64(1)))
            return augment(sample, crop_size=self.crop_size, color_jitter=self.color_jitter, generator=generator)
        except DRSegError as error:
            return _Failure("data", str(error))
        except MemoryError:
            return _Failure("memory", f"training_batches: {self.dataset.sample_name(index)} does not fit in memory")
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return _Failure("data", f"training_batches: {self.dataset.sample_name(index)} cannot be read: {reason}")


def _collate(samples: list[tuple[Tensor, Tensor] | _Failure]) -> tuple[Tensor, Tensor] | _Failure:
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
    image, mask = zip(*samples, strict=True)
    return torch.stack(image), torch.stack(mask)


def _start_worker(worker: int) -> None:
    # an interrupt goes to the whole process group, and only the main process answers it; SIGTERM's handler is torch's,
    # whatever the main process has
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _positions(start: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    share = batch_size // world_size
    while True:
        first = start + rank * share
        yield list(range(first, first + share))
        start += batch_size


def training_batches(
    dataset: SegmentationDataset,
    *,
    crop_size: int,
    batch_size: int,
    seed: int,
    start: int = 0,
    color_jitter: bool = True,
    workers: int = 0,
    timeout: float = 120.0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[TrainingBatch]:
    """Endless augmented batches; a pure function of ``(seed, position)``.

    Draws from no global random state. Closing the iterator ends its workers.

    Args:
        dataset: the samples.
        crop_size: side S of the square crops in pixels.
        batch_size: images per step over all processes; ``world_size`` must divide it. Process ``rank`` gets slice
            ``rank`` of every batch. So all processes together see the same as a single one.
        seed: seed of order and augmentation.
        start: position to begin at; ``position + batch_size`` of the last batch that was used continues exactly.
        color_jitter: distort colours.
        workers: loading processes; 0 loads in this one.
        timeout: seconds to wait for a batch from the workers.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: an argument is out of range.
        DatasetError: the data set is empty, or a sample cannot be read; the message names it.
        ResourceError: a worker died, or gave nothing within ``timeout``.
    """
    if crop_size < 1 or batch_size < 1 or start < 0 or seed < 0 or workers < 0 or timeout <= 0:
        raise ValueError(
            "training_batches: an argument is out of range; expected crop_size, batch_size >= 1, start, seed, workers "
            f">= 0, timeout > 0, got {crop_size}, {batch_size}, {start}, {seed}, {workers}, {timeout}"
        )
    if not 0 <= rank < world_size or batch_size % world_size:
        raise ValueError(
            "training_batches: batch_size cannot be split; expected a multiple of world_size, 0 <= rank < world_size, "
            f"got batch_size {batch_size}, rank {rank}, world_size {world_size}"
        )
    if len(dataset) == 0:
        raise DatasetError("training_batches: dataset is empty; expected at least one sample")
    augmented = _Augmented(dataset, crop_size, color_jitter, seed)
    loader = DataLoader(
        augmented,
        batch_sampler=_positions(start, batch_size, rank, world_size),
        num_workers=workers,
        collate_fn=_collate,
        timeout=timeout if workers else 0,
        worker_init_fn=_start_worker,
        # without one of its own the loader draws from the global generator
        generator=torch.Generator(),
    )
    own = rank * (batch_size // world_size)
    return _batches(loader, augmented, start, batch_size, own)


def _batches(
    loader: DataLoader[Any], augmented: _Augmented, position: int, batch_size: int, own: int
) -> Iterator[TrainingBatch]:
    stream = iter(loader)
    try:
        while True:
            try:
                batch = next(stream)
            except RuntimeError as error:
                # torch reports dead and silent workers as RuntimeError, with their pids
                first = augmented.dataset.sample_name(augmented.index(position + own))
                raise ResourceError(
                    f"training_batches: loading stopped at position {position}, batch from {first} on: "
                    + " ".join(str(error).split())
                ) from None
            if isinstance(batch, _Failure):
                raise (ResourceError if batch.kind == "memory" else DatasetError)(batch.message)
            yield TrainingBatch(batch[0], batch[1], position)
            position += batch_size
    finally:
        del stream
