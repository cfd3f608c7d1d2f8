# SPDX-License-Identifier: Apache-2.0
"""The whole model: images per second and peak memory of a training step and of inference, and PDGR's share of both.

    python -m bench model --config vitb --backend native --backend reference --out rows.jsonl

Random weights, random images, 17 classes, float32. Every row comes from a process of its own. The share is the
wall-clock time inside PDGR, backward included, over that of the call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import memory, one_op, record
from drseg_core.ops import last_backend, use_backend

MODES = ("inference", "training")
_CLASSES = 17


class Stopwatch:
    """Seconds spent inside a module, forward and backward."""

    def __init__(self, module: nn.Module, device: str) -> None:
        self.seconds, self._device, self._begin = 0.0, device, 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)
        module.register_full_backward_pre_hook(self._start)
        module.register_full_backward_hook(self._stop)

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _start(self, *_: Any) -> None:
        self._begin = self._now()

    def _stop(self, *_: Any) -> None:
        self.seconds += self._now() - self._begin


def measure(
    config_name: str, overrides: dict[str, Any], mode: str, backend: str | None, batch: int, repeats: int, device: str
) -> dict[str, Any]:
    """One row's figures, in a process that does nothing else.

    Args:
        config_name: preset or YAML file. overrides: dotted options on top of it.
        mode: ``inference`` or ``training``. backend: of the ops; None takes what runs by default.
        batch: images per call. repeats: timed calls.
    """
    from drseg_core.config.load import load_config, override
    from drseg_core.models.build import build_model
    from drseg_core.training.loss import training_loss
    from drseg_core.training.optim import build_optimizer

    torch.manual_seed(0)
    random_weights = {"model.clip.weights": None, "model.dino.weights": None}
    config = override(load_config(config_name), random_weights | overrides)
    model = build_model(config.model).to(device)
    model.train(mode == "training")
    side = config.model.clip.image_size
    image = torch.rand(batch, 3, side, side, device=device)
    mask = torch.randint(0, _CLASSES, (batch, side, side), device=device)
    tokens = model.tokenize([f"class number {n}" for n in range(_CLASSES)])
    if model.pdgr is None:
        raise ValueError(f"model: {config_name} has no PDGR; expected a fusion.kind with a prior")
    watch = Stopwatch(model.pdgr, device)
    optimizer = build_optimizer(model.parameter_groups(config.train), config.train) if mode == "training" else None
    with torch.no_grad():
        embedding = model.encode_text(tokens)

    def call() -> None:
        if optimizer is None:
            with torch.inference_mode():
                model(image, embedding)
            return
        loss = training_loss(model(image, tokens), mask, config.train)
        torch.stack([part.mean() for part in loss]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with use_backend(backend):
        call()
        made = memory.high_water()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, inside = [], []
        for _ in range(repeats):
            watch.seconds = 0.0
            begin = watch._now()
            call()
            seconds.append(watch._now() - begin)
            inside.append(watch.seconds)
        ran = {op: last_backend(op) for op in ("knn_graph", "edge_weight", "degree_normalize", "graph_propagate")}
    middle = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else max(made, memory.high_water())
    spread = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8]).double())
    return {
        "p20_ms": 1000 * float(spread[0]),
        "p50_ms": 1000 * middle,
        "p80_ms": 1000 * float(spread[1]),
        "images_per_second": batch / middle,
        "pdgr_share": statistics.median(inside) / middle,
        "process_mb": peak / 2**20,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "backends": ran,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", help="preset or YAML file; vitb and vitl by default")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="option, e.g. model.rotations=1"
    )
    parser.add_argument("--mode", choices=MODES, action="append", help="both by default")
    parser.add_argument("--backend", choices=one_op.backends(), action="append", help="of the ops")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON-lines file to add the rows to")
    args = parser.parse_args(arguments)
    for name in ("batch", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is out of range; expected a number >= 1, got {getattr(args, name)}")
    overrides = {}
    for given in args.set:
        key, found, value = given.partition("=")
        if not found:
            parser.error(f"--set {given} has no value; expected KEY=VALUE")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    failed = False
    print(f"{'config':8} {'mode':10} {'backend':10} {'images/s':>9} {'ms':>9} {'PDGR':>6} {'process MB':>11}")
    for config in args.config or ("vitb", "vitl"):
        for mode in args.mode or MODES:
            for backend in args.backend or (None,):
                try:
                    figures = memory.in_child(
                        __name__, "measure", config, overrides, mode, backend, args.batch, args.repeats, args.device
                    )
                except RuntimeError as error:
                    print(f"model: {config} {mode} {backend}: {str(error).splitlines()[-1]}", file=sys.stderr)
                    failed = True
                    continue
                row = {
                    "op": "model", "case": config, "mode": mode, "dtype": "float32", "data": "random",
                    "name": backend or "engine", "sizes": {"batch": args.batch, "classes": _CLASSES},
                    "overrides": overrides, "repeats": args.repeats,
                    **figures, **record.environment(args.device),
                }  # fmt: skip
                print(
                    f"{config:8} {mode:10} {backend or 'default':10} {row['images_per_second']:9.3f} "
                    f"{row['p50_ms']:9.0f} {100 * row['pdgr_share']:5.1f}% {row['process_mb']:11.0f}",
                    flush=True,
                )
                if args.out:
                    record.append(args.out, [row])
    return int(failed)
