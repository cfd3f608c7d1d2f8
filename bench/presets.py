# SPDX-License-Identifier: Apache-2.0
"""The published presets on every benchmark set: one training step and one scored image, with random weights on the CPU.

    python -m bench presets --out bench/results/FOLDER/presets.jsonl
    python -m bench presets --preset vitl --set potsdam

Each command is a process of its own, on a miniature of the set in the layout of its release. Wall-clock seconds begin
with the interpreter: building the model and ranking the channels are most of them. A row is added as soon as it is
there. Needs up to ten GB of memory and four of disk.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import record
from bench.command import command_parser, rows_file
from drseg_core.data.benchmarks import BENCHMARKS

PRESETS = ("vitl", "vitb")
RANDOM = ("--model.clip.weights", "null", "--model.dino.weights", "null")
STEP = ("--train.iterations", "1", "--train.batch_size", "1", "--train.workers", "0", "--train.log_every", "1")
_SUFFIX = {"dlrsd": ".jpg", "udd5": ".JPG", "vdd": ".JPG"}
_BLOCK = 8


def write_miniature(name: str, root: Path, size: tuple[int, int] = (32, 40)) -> Path:
    """One image and mask (H, W) of the splits ``train`` and ``all``, as the release has them; returns ``root``."""
    benchmark = BENCHMARKS[name]
    table = np.array(benchmark.palette, np.uint8)
    height, width = size
    for split in ("train", "all"):
        folder = root / benchmark.folder(split)
        # every class, in blocks
        blocks = np.resize(np.arange(len(table), dtype=np.uint8), (-(-height // _BLOCK), -(-width // _BLOCK)))
        ids = np.kron(blocks, np.ones((_BLOCK, _BLOCK), np.uint8))[:height, :width]
        for part, suffix, value in (
            (benchmark.images, _SUFFIX.get(name, ".png"), table[ids]),
            (benchmark.masks, ".png", ids),
        ):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(value).save(folder / part / f"{split}_0{suffix}")
    return root


def measured(words: Sequence[str], output: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory (MiB) of one ``drseg`` command in a process of its own.

    Raises:
        RuntimeError: the command failed; the message ends with what it printed.
    """
    root = record.ROOT
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels")))}
    with open(output, "w") as file:
        actions = [(os.POSIX_SPAWN_DUP2, file.fileno(), stream) for stream in (1, 2)]
        command = [sys.executable, "-m", "drseg_core", *words, "--device", "cpu"]
        begin = time.monotonic()
        child = os.posix_spawn(sys.executable, command, environment, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - begin
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"drseg {words[0]}: failed; {output.read_text()}")
    return {"s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "process_mb": usage.ru_maxrss / 2**10}


def measure(preset: str, name: str) -> dict[str, Any]:
    """One row's figures: a training step and a scored image of set ``name`` under ``preset``.

    Raises:
        RuntimeError: a command failed.
    """
    with tempfile.TemporaryDirectory(prefix="drseg-presets-") as folder:
        place = Path(folder)
        data, run, scores = f"{name}:{write_miniature(name, place / 'sets')}", place / "run", place / "metrics.json"
        train = measured(
            ["train", "--config", preset, *RANDOM, *STEP, "--data", data, "--out", str(run)], place / "output"
        )
        evaluate = measured(
            ["evaluate", str(run), "--data", data, "--protocol", "rskt", "--out", str(scores)], place / "output"
        )
        manifest, card = json.loads((run / "manifest.json").read_text()), json.loads(scores.read_text())
    figures = {"train": train, "evaluate": evaluate}
    return {
        **{f"{command}_{key}": value for command, found in figures.items() for key, value in found.items()},
        "parameters": manifest["parameters"]["total"]["total"],
        "images": card["images"],
        "mIoU": card["mIoU"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("presets", __doc__)
    parser.add_argument("--preset", action="append", choices=PRESETS, help="both by default")
    parser.add_argument("--set", action="append", choices=tuple(BENCHMARKS), help="all by default")
    parser.add_argument("--out", type=rows_file, help="JSON-lines file to add the rows to")
    args = parser.parse_args(arguments)
    failed = False
    print(
        "| set | preset | train s | train MiB | evaluate s | evaluate MiB |\n|---|---|---:|---:|---:|---:|", flush=True
    )
    for preset in args.preset or PRESETS:
        for name in args.set or BENCHMARKS:
            try:
                figures = measure(preset, name)
            except RuntimeError as error:
                print(f"presets: {preset} {name}: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            row = {"op": "preset", "case": name, "preset": preset, **figures, **record.environment("cpu")}
            print(
                f"| {BENCHMARKS[name].title} | {preset} | {row['train_s']:.0f} | {row['train_process_mb']:.0f} "
                f"| {row['evaluate_s']:.0f} | {row['evaluate_process_mb']:.0f} |",
                flush=True,
            )
            if args.out:
                record.append(args.out, [row])
    return int(failed)
