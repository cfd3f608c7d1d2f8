# SPDX-License-Identifier: Apache-2.0
"""How long a study will take: a step and a forward pass of each method, measured before the first is trained."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch

from drseg_core.config.schema import Config, ModelConfig
from drseg_core.device import select_device
from drseg_core.models.build import build_model
from drseg_core.studies.plan import PlannedVariant
from drseg_core.studies.runner import SCORES, read_json
from drseg_core.training.loss import training_loss


def expected_seconds(planned: Sequence[PlannedVariant], processes: int) -> float:
    """Seconds that what is not complete will take in ``processes`` at a time, without reading and optimiser.

    Models have random weights and images are noise, so no file is read; variants of equal models are measured once.
    Batches are whole on CUDA and one image elsewhere, where time grows with their size.
    """
    # what trains beside others has its share of the threads
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // max(processes, 1)))
    try:
        return _expected_seconds(planned) / max(processes, 1)
    finally:
        torch.set_num_threads(threads)


def _expected_seconds(planned: Sequence[PlannedVariant]) -> float:
    """The same of one process, with as many threads as there are now."""
    known: dict[tuple[ModelConfig, int], tuple[float, float]] = {}
    total = 0.0
    for item in planned:
        if read_json(item.folder / SCORES) is not None:
            continue
        tests = [item.setting.open_test(test)[0] for test in item.setting.tests]
        classes = max(len(test.class_names) for test in tests)
        key = (item.config.model, classes)
        if key not in known:
            known[key] = _measured(item.config, classes, item.setting.device)
        step, forward = known[key]
        limit = item.config.train
        training = step * limit.iterations if limit.seconds is None else min(step * limit.iterations, limit.seconds)
        total += training + forward * sum(map(len, tests))
    return total


def _measured(config: Config, classes: int, device_name: str | None) -> tuple[float, float]:
    """Seconds of a training step, and of a forward pass of one image."""
    device = select_device(device_name)
    model_config = dataclasses.replace(
        config.model,
        **{part: dataclasses.replace(getattr(config.model, part), weights=None) for part in ("clip", "dino", "remote")},
    )
    with torch.device(device):
        model = build_model(model_config).train()
    cuda = device.type == "cuda"
    batch, side = config.train.batch_size if cuda else 1, config.train.crop_size
    image = torch.rand(batch, 3, side, side, device=device)
    mask = torch.randint(classes, (batch, side, side), device=device)
    tokens = model.tokenize([f"class {place}" for place in range(classes)])

    def step() -> None:
        parts = training_loss(model(image, tokens), mask, config.train)
        torch.stack([part.mean() for part in parts]).sum().backward()

    def forward() -> None:
        with torch.no_grad():
            model(image[:1], tokens)

    # the first on a card chooses its kernels
    train = _timed(step, device, warm=cuda) * config.train.batch_size / batch
    model.eval()
    return train, _timed(forward, device, warm=cuda)


def _timed(call: object, device: torch.device, *, warm: bool) -> float:
    assert callable(call)
    if warm:
        call()
        torch.cuda.synchronize(device)
    begin = time.monotonic()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - begin
