# SPDX-License-Identifier: Apache-2.0
"""The whole model: images per second and peak memory of a training step and of inference, and what each part takes.

    python -m bench model                             vitb and vitl; on a GPU in every precision, and compiled
    python -m bench model --config vitb --backend native --backend reference --out rows.jsonl
    python -m bench model --config vitb --mode inference --precision autocast --compiled yes --kept-prior
    python -m bench model --config tiny --mode training --precision autocast --compiled yes --device cpu

Random weights, random images, 17 classes. Under ``autocast`` the products are bfloat16. Every row comes from a process
of its own. Class names are encoded once, except in a training of their encoder. Times are wall-clock, with the host's
part. The parts are those of a step that is launched one operator at a time (``parts.py``), so a compiled row has none.
On a GPU they are times of kernels, and their sum over the step's time tells how busy the card is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench import memory, one_op, parts, record
from bench.command import command_parser, positive, rows_file
from bench.precision import PRECISIONS
from drseg_core.config.load import load_config, override
from drseg_core.config.validate import validate
from drseg_core.errors import DRSegError, MissingExtraError
from drseg_core.extras import require
from drseg_core.ops import last_backend, use_backend

MODES = ("inference", "training")
_PRECISIONS = ("float32", "autocast")
_CLASSES = 17


@dataclass(frozen=True)
class Job:
    """A row that is asked for.

    Args:
        config: preset or YAML file. overrides: dotted options on top of it.
        mode: ``inference`` or ``training``. precision: ``float32`` or ``autocast``.
        compiled: by ``torch.compile``. compiler: its backend.
        backend: of the ops; None takes what runs by default.
        channels_last: the convolutions' weights lie so.
        batch: images per call. repeats: timed calls.
        kept_prior: the prior's features are read from files (``drseg evaluate --prior-cache``), inference alone.
    """

    config: str
    overrides: dict[str, Any]
    mode: str
    precision: str
    compiled: bool
    compiler: str
    backend: str | None
    channels_last: bool
    batch: int
    repeats: int
    device: str
    kept_prior: bool = False

    @property
    def name(self) -> str:
        """Of the row's contender."""
        words = [self.backend or "engine"]
        words += ["compiled"] if self.compiled else []
        words += ["channels_last"] if self.channels_last else []
        return ", ".join(words + (["prior kept"] if self.kept_prior else []))

    def __str__(self) -> str:
        return " ".join((self.config, self.mode, self.precision, self.name))


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """The figures of a job, given by its fields, in a process that does nothing else."""
    from drseg_core.evaluation.compiled import compiled_network
    from drseg_core.models.build import build_model
    from drseg_core.models.prior_cache import prior_cache
    from drseg_core.training.loss import training_loss
    from drseg_core.training.optim import build_optimizer

    job = Job(**fields)
    torch.manual_seed(0)
    random_weights = {"model.clip.weights": None, "model.dino.weights": None}
    config = override(load_config(job.config), random_weights | job.overrides)
    # hundreds of millions of random numbers are drawn where they are needed
    with torch.device(job.device):
        model = build_model(config.model)
    model = model.to(job.device).train(job.mode == "training")
    if model.pdgr is None:
        raise ValueError(f"model: {job.config} has no PDGR; expected a fusion.kind with a prior")
    if job.channels_last:
        model = model.to(memory_format=torch.channels_last)
    network: Callable[..., Any] = model
    if job.compiled and job.mode == "inference" and job.compiler == "inductor":
        # as ``drseg predict --compile`` does it
        network = compiled_network(model, torch.device(job.device))
    elif job.compiled:
        network = torch.compile(model, backend=job.compiler)
    side, cuda = config.model.clip.image_size, job.device == "cuda"
    image = torch.rand(job.batch, 3, side, side, device=job.device)
    mask = torch.randint(0, _CLASSES, (job.batch, side, side), device=job.device)
    text = model.tokenize([f"class number {n}" for n in range(_CLASSES)])
    optimizer = build_optimizer(model.parameter_groups(config.train), config.train) if model.training else None
    precision = PRECISIONS[job.precision]
    if optimizer is None or not model.trains_text:
        with torch.no_grad(), precision.context(job.device):
            text = model.encode_text(text)

    def call() -> None:
        if optimizer is None:
            # as Predictor calls it
            with torch.no_grad(), precision.context(job.device):
                network(image, text)
            return
        with precision.context(job.device):
            output = network(image, text)
        with parts.part(parts.LOSS):
            loss = torch.stack([part.mean() for part in training_loss(output, mask, config.train)]).sum()
        loss.backward()
        with parts.part(parts.OPTIMIZER):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    with contextlib.ExitStack() as stack:
        stack.enter_context(use_backend(job.backend))
        if job.kept_prior:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="drseg-model-"))
            stack.enter_context(prior_cache(model, folder))
        # on a GPU the allocator and the libraries settle in the second and third
        for _ in range(3 if cuda else 1):
            call()
        made = memory.high_water()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(job.repeats):
            begin = now()
            call()
            seconds.append(now() - begin)
        peak = torch.cuda.max_memory_allocated() if cuda else max(made, memory.high_water())
        ran = {op: last_backend(op) for op in ("knn_graph", "edge_coefficient", "graph_layer")}
        taken: dict[str, float] | None = None
        if not job.compiled:
            with parts.named(model):
                taken = parts.milliseconds(call, job.device, 3 if cuda else 1)
    middle = statistics.median(seconds)
    spread = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8]).double())
    return {
        "p20_ms": 1000 * float(spread[0]),
        "p50_ms": 1000 * middle,
        "p80_ms": 1000 * float(spread[1]),
        "images_per_second": job.batch / middle,
        "parts_ms": taken,
        "pdgr_share": None if taken is None else taken["PDGR"] / sum(taken.values()),
        "process_mb": peak / 2**20,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "backends": ran,
    }


def jobs_of(args: argparse.Namespace, overrides: dict[str, Any]) -> list[Job]:
    """What is asked for, what takes a compiler last."""
    cuda = args.device == "cuda"
    return [
        Job(
            config, overrides, mode, precision, compiled == "yes", args.compiler, backend, args.channels_last,
            args.batch or (4 if cuda else 1), args.repeats, args.device, args.kept_prior and mode == "inference",
        )
        for compiled in args.compiled or (("no", "yes") if cuda else ("no",))
        for config in args.config or ("vitb", "vitl")
        for precision in args.precision or (_PRECISIONS if cuda else _PRECISIONS[:1])
        for mode in args.mode or MODES
        for backend in args.backend or (None,)
    ]  # fmt: skip


def text_of(row: dict[str, Any]) -> str:
    """A row for a reader: its figures, and the milliseconds of the parts below."""
    taken = row["parts_ms"] or {}
    share = "-" if row["pdgr_share"] is None else f"{100 * row['pdgr_share']:.1f}%"
    line = (
        f"{row['case']:8} {row['mode']:10} {row['dtype']:9} {row['name']:18} {row['images_per_second']:9.3f} "
        f"{row['p50_ms']:9.1f} {share:>6} {row['process_mb']:8.0f}"
    )
    return "\n".join([line, *(["         " + ", ".join(f"{k} {v:.1f}" for k, v in taken.items())] if taken else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("model", __doc__)
    parser.add_argument("--config", action="append", help="preset or YAML file; vitb and vitl by default")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="option, e.g. model.rotations=1"
    )
    parser.add_argument("--mode", choices=MODES, action="append", help="both by default")
    parser.add_argument("--precision", choices=_PRECISIONS, action="append", help="float32 by default, on a GPU both")
    parser.add_argument("--compiled", choices=("no", "yes"), action="append", help="no by default, on a GPU both")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    parser.add_argument("--backend", choices=one_op.backends(), action="append", help="of the ops")
    parser.add_argument("--kept-prior", action="store_true", help="inference reads the prior's features from files")
    parser.add_argument("--channels-last", action="store_true", help="weights of the convolutions too")
    parser.add_argument("--batch", type=positive, help="images per call; 1 by default, on a GPU 4")
    parser.add_argument("--repeats", type=positive, default=3, help="timed calls")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dry-run", action="store_true", help="list the rows and measure nothing")
    parser.add_argument("--out", type=rows_file, help="JSON-lines file to add the rows to")
    args = parser.parse_args(arguments)
    for name in ("batch", "repeats"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} is out of range; expected a number >= 1, got {value}")
    overrides = {}
    for given in args.set:
        key, found, value = given.partition("=")
        if not found:
            parser.error(f"--set {given} has no value; expected KEY=VALUE")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    jobs = jobs_of(args, overrides)
    try:
        for config in dict.fromkeys(job.config for job in jobs):
            validate(override(load_config(config), overrides))
    except DRSegError as error:
        print(f"model: {error}", file=sys.stderr)
        return error.exit_code
    if args.dry_run:
        print(*jobs, sep="\n")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("model: --device cuda cannot be used; expected a CUDA device, got a torch without", file=sys.stderr)
        return 5
    try:
        require("model", "model")
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        return 5
    failed = False
    print(
        f"{'config':8} {'mode':10} {'precision':9} {'backend':18} {'images/s':>9} {'ms':>9} {'PDGR':>6} {'peak MB':>8}"
        "; milliseconds of the parts below"
    )
    for job in jobs:
        try:
            figures = memory.in_child(__name__, "measure", asdict(job))
        except RuntimeError as error:
            print(f"model: {job}: {str(error).splitlines()[-1]}", file=sys.stderr)
            failed = True
            continue
        row = {
            "op": "model", "case": job.config, "mode": job.mode, "dtype": job.precision, "data": "random",
            "name": job.name, "sizes": {"batch": job.batch, "classes": _CLASSES},
            "overrides": overrides, "repeats": job.repeats, "compiled": job.compiled,
            **figures, **record.environment(job.device),
        }  # fmt: skip
        print(text_of(row), flush=True)
        if args.out:
            record.append(args.out, [row])
    return int(failed)
