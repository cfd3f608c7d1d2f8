# SPDX-License-Identifier: Apache-2.0
"""``drseg demo``: the whole path once, on synthetic scenes.

It runs the same commands as a user would, and prints each of them. The models are scored over the full vocabulary: the
names seen in training, and six unseen combinations of colour and object.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from drseg_core.checkpoints.run import load_run
from drseg_core.checkpoints.versions import library_versions
from drseg_core.config.load import load_config, override
from drseg_core.data import open_dataset
from drseg_core.data.palette import save_png
from drseg_core.data.synthetic import HELD_OUT, HELD_OUT_IDS, write_scenes
from drseg_core.errors import ConfigError, DRSegError
from drseg_core.evaluation.evaluate import evaluate
from drseg_core.evaluation.inference import Predictor
from drseg_core.evaluation.report import SheetRow, markdown_table, overlay_sheet
from drseg_core.files import write_text_atomic
from drseg_core.models.build import build_model
from drseg_core.scenes.synthetic import write_synthetic_scene
from drseg_core.studies import pdgr_speed

MARK = "made-by-drseg-demo.txt"
TRAINING_SCENES, TEST_SCENES = 400, 60
# Optimiser steps; together they take about three minutes on two cores.
DUAL_ENCODER_STEPS, DRSEG_STEPS = 2000, 350
MAP_CLASSES = ("bare soil", "red roof", "green roof", "blue pond", "green field", "gray court", "white car")


def run(out: Path, *, seed: int = 0) -> None:
    """Make scenes, train a dual encoder and DR-Seg on top of it, score both, map a GeoTIFF, time PDGR.

    Args:
        out: new or empty folder, or that of an earlier demo, which is replaced. Left there: ``results.json``,
            ``results.md``, ``overlay.png``, ``scene.tif`` with its map and the page ``map.html``, the scenes, both runs
            and the ranking.
        seed: decides the scenes, the initial weights and the order of the training.

    Raises:
        ConfigError: ``out`` holds something else.
    """
    _make_room(out)
    begin = time.perf_counter()
    seen, full = out / "scenes" / "seen", out / "scenes" / "full"
    print(f"demo: seed {seed}; everything is written to {out}")
    write_scenes(seen, splits={"train": TRAINING_SCENES, "val": TEST_SCENES}, seed=seed)
    write_scenes(full, splits={"val": TEST_SCENES}, seed=seed, vocabulary="full")

    dual_encoder, drseg, channels = out / "dual_encoder", out / "drseg", out / "channels.safetensors"
    data = ("--config", "tiny", "--data", f"folder:{seen}", "--seed", seed)
    # the dual encoder: image and text encoder from random weights, matched by cosine at every token
    _command(
        *("train", *data, "--out", dual_encoder, "--model.fusion.kind", "cosine", "--model.rotations", 1),
        *("--train.loss", "softmax", "--train.alignment_weight", 0, "--train.iterations", DUAL_ENCODER_STEPS),
    )
    _command("rank", dual_encoder, "--data", f"folder:{seen}", "--out", channels)
    _command(
        *("train", *data, "--out", drseg, "--init", dual_encoder, "--model.spsd.channels", channels),
        *("--train.clip_learning_rate_scale", 0.2, "--train.batch_size", 2, "--train.iterations", DRSEG_STEPS),
    )

    scores = _scores(dual_encoder, drseg, full, seed)
    save_png(out / "overlay.png", _overlays(dual_encoder, drseg, full))

    write_synthetic_scene(out / "scene.tif", seed=seed)
    scene, classes = out / "scene.tif", "; ".join(MAP_CLASSES)
    _command("predict", drseg, scene, "--classes", classes, "--out", out / "map.tif", "--scores", "--view")

    speed = pdgr_speed.compare()
    result = {
        "seed": seed,
        "scores": scores,
        "held_out": list(HELD_OUT),
        "pdgr": speed,
        "versions": library_versions(),
        "seconds": time.perf_counter() - begin,
    }
    table = _tables(scores, speed, seed)
    write_text_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")
    write_text_atomic(out / "results.md", table)
    print(f"\n{table}\nwritten to {out}: results.md, results.json, overlay.png, map.tif, map_overlay.png")
    print(f"demo: {result['seconds']:.0f} seconds; open this in a browser: {out / 'map.html'}")


def _make_room(out: Path) -> None:
    """An empty folder with the demo's mark, so that the next demo may replace it and nothing else."""
    if (out / MARK).is_file():
        shutil.rmtree(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"demo: out is not empty; expected a new or empty folder, got {out}")
    write_text_atomic(out / MARK, "Made by drseg demo, which replaces this folder when it runs again.\n")


def _command(*words: object) -> None:
    """Run one ``drseg`` command in this process, as it would be typed."""
    from drseg_core.cli.main import main

    arguments = [str(word) for word in words]
    print("\n$ drseg " + " ".join(f'"{word}"' if " " in word else word for word in arguments), flush=True)
    code = main(arguments)
    if code:
        # the command has said why
        error = DRSegError(f"demo: drseg {arguments[0]} stopped with exit code {code}")
        error.exit_code = code
        raise error


def _scores(dual_encoder: Path, drseg: Path, full: Path, seed: int) -> list[dict[str, Any]]:
    """The dual encoder before and after its training, and DR-Seg, on the test scenes; all 37 names as prompts."""
    print(f"\n{TEST_SCENES} test scenes, prompts: all 37 names", flush=True)
    dataset = open_dataset(f"folder:{full}", "val")
    untrained = override(load_config("tiny"), {"model.fusion.kind": "cosine", "model.rotations": 1})
    torch.manual_seed(seed)
    steps = {"untrained": 0, "dual encoder": DUAL_ENCODER_STEPS, "DR-Seg": DUAL_ENCODER_STEPS + DRSEG_STEPS}
    rows = []
    for name, source in (("untrained", None), ("dual encoder", dual_encoder), ("DR-Seg", drseg)):
        model = build_model(untrained.model).eval() if source is None else load_run(source).model
        held_out = set(HELD_OUT_IDS)
        subsets = {"seen": [i for i in range(37) if i not in held_out], "held-out": list(HELD_OUT_IDS)}
        result = evaluate(model, dataset.class_names, dataset, untrained.evaluation, subsets=subsets)
        rows.append(
            {
                "model": name,
                "steps": steps[name],
                "seen mIoU": result["subsets"]["seen"]["mIoU"],
                "held-out mIoU": result["subsets"]["held-out"]["mIoU"],
                "all mIoU": result["mIoU"],
                "pACC": result["pACC"],
                "seed": seed,
            }
        )
    return rows


def _overlays(dual_encoder: Path, drseg: Path, full: Path, count: int = 6) -> Any:
    dataset = open_dataset(f"folder:{full}", "val")
    predictors = [Predictor(load_run(run).model, dataset.class_names) for run in (dual_encoder, drseg)]
    rows = []
    for i in range(count):
        sample = dataset[i]
        before, after = (predictor(sample.image) for predictor in predictors)
        rows.append(SheetRow(sample.image, sample.mask, before.class_index, after.class_index, after.uncertainty))
    return overlay_sheet(rows, dataset.class_names)


def _tables(scores: list[dict[str, Any]], speed: list[dict[str, Any]], seed: int) -> str:
    pdgr = [
        {
            "PDGR": row["pass"],
            "literal PyTorch, ms": row["literal_ms"],
            "engine, ms": row["engine_ms"],
            "speed-up": f"{row['speedup']:.1f}x",
            "literal, MB": row["literal_mb"],
            "engine, MB": row["engine_mb"],
        }
        for row in speed
    ]
    return (
        f"# Demo, seed {seed}\n\nmIoU and pixel accuracy in percent on {TEST_SCENES} synthetic scenes with all 37 "
        f"names as prompts. The six held-out combinations ({', '.join(HELD_OUT)}) were never seen in training.\n\n"
        f"{markdown_table(scores)}\n"
        f"{speed[0]['size']}, float32, {speed[0]['threads']} CPU threads, memory above the loaded program.\n\n"
        f"{markdown_table(pdgr)}"
    )
