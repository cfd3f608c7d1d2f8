# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole maps: its row says what was timed, and maps that differ give none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import model as whole_model
from bench import probe, profile, scene_memory, scenes, tune
from drseg_core.evaluation.inference import Predictor
from tests.evaluation.fake import COLORS, ColorModel

pytest.importorskip("rasterio")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ColorModel:
    model = ColorModel()
    predictor = Predictor(model, list(COLORS), mode="tile", tile_size=32, overlap=8, batch_size=3)
    monkeypatch.setattr(scenes, "random_predictor", lambda preset, device: predictor)
    return model


def test_the_row(model: ColorModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert scenes.main(["--size", "90x70", "--repeats", "1", "--out", str(out)]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["op"] == "scene" and row["case"] == "90x70" and "device" in row
    assert row["share_of_model"] == pytest.approx(row["forward_s"] / row["threads_s"], abs=0.3)
    assert "of the model's speed" in capsys.readouterr().out
    # the forward passes that are timed alone are those of the maps, in each of two turns
    batches = model.batches
    assert len(batches) % 6 == 0 and sorted(batches) == sorted(6 * batches[: len(batches) // 6])


def test_maps_that_differ_give_no_row(model, tmp_path, monkeypatch, capsys):
    def other(predictor: Predictor, scene: Path, out: Path) -> float:
        out.write_text(out.name)
        return 1.0

    monkeypatch.setattr(scenes, "map_seconds", other)
    assert scenes.main(["--size", "90x70", "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert "the maps differ" in capsys.readouterr().err and not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        *((main, ["--size", size], f"argument --size: {size} is no size; expected WxH in pixels, such as 1536x1024")
          for main in (scenes.main, scene_memory.main) for size in ("axb", "10", "0x5", "5x-5", "5x5x5")),
        (scene_memory.main, ["--classes", "0"], "argument --classes: 0 is out of range; expected a number >= 1"),
        (scene_memory.main, ["--classes", "256"], "argument --classes: 256 is out of range; expected 1 to 255"),
        (scenes.main, ["--repeats", "a"], "argument --repeats: a is no whole number; expected one >= 1"),
        *((main, [option, "0"], f"argument {option}: 0 is out of range; expected a number >= 1")
          for main, options in ((whole_model.main, ("--batch", "--repeats")), (probe.main, ("--repeats",)),
                                (profile.main, ("--steps", "--most")), (tune.main, ("--repeats",)))
          for option in options),
    ],
)  # fmt: skip
def test_sizes_and_counts_that_are_none(command, arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        command(arguments)
    assert error.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(f"error: {said}")
