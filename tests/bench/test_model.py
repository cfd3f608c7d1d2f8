# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the whole model: its rows, and which part an operator and a kernel belong to."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from bench import memory, model, parts, report
from drseg_core.evaluation import compiled
from drseg_core.extras import installed
from drseg_core.models.dino import DinoPrior

SMALL = ["model.clip.image_size=32", "model.dino.image_size=32", "model.graph.k=5"]
TINY = ["--config", "tiny", "--device", "cpu", "--repeats", "1", *(word for one in SMALL for word in ("--set", one))]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come from this process; another one takes seconds to start."""

    def measured(module: str, function: str, job: dict[str, Any]) -> dict[str, Any]:
        assert module == model.__name__ and function == "measure"
        return json.loads(json.dumps(model.measure(json.loads(json.dumps(job)))))

    monkeypatch.setattr(memory, "in_child", measured)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_every_kind(here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "folder" / "model.jsonl"
    given = [*TINY, "--precision", "autocast", "--channels-last", "--compiler", "eager", "--out", str(out)]
    assert model.main([*given, "--precision", "float32"]) == 0
    assert model.main([*given, "--compiled", "yes", "--mode", "training"]) == 0
    torch._dynamo.reset()
    rows = rows_of(out)
    found = [(row["mode"], row["dtype"], row["compiled"]) for row in rows]
    assert len(set(found)) == len(found) == 5
    for row in rows:
        assert row["name"] == ("engine, compiled, channels_last" if row["compiled"] else "engine, channels_last")
        assert row["images_per_second"] > 0 and row["process_mb"] > 0 and "commit" in row and row["case"] == "tiny"
        if row["compiled"]:
            assert row["parts_ms"] is None and row["pdgr_share"] is None
            continue
        always = {"CLIP image", "prior", "SPSD", "PDGR", "UGAF", "aggregator", "decoder"}
        training = {"CLIP text", "loss", "optimizer"} if row["mode"] == "training" else set()
        assert row["parts_ms"].keys() == always | training | {"rest"}
        assert row["pdgr_share"] == pytest.approx(row["parts_ms"]["PDGR"] / sum(row["parts_ms"].values()))
    printed = capsys.readouterr().out
    assert "CLIP image" in printed and "engine, compiled" in printed
    table = "\n".join(report._model_table(rows))
    assert "tiny, training, autocast | engine, compiled, channels_last" in table and "| - |" in table


def test_kept_features_and_the_compiled_model_of_predict(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out, made = tmp_path / "rows.jsonl", []
    monkeypatch.setattr(compiled, "compiled_network", lambda network, device: made.append(device.type) or network)
    assert model.main([*TINY, "--mode", "inference", "--kept-prior", "--compiled", "yes", "--out", str(out)]) == 0
    (row,) = rows_of(out)
    assert row["name"] == "engine, compiled, prior kept" and made == ["cpu"]
    computed, real = [], DinoPrior._maps
    monkeypatch.setattr(DinoPrior, "_maps", lambda self, *given: computed.append(1) or real(self, *given))
    assert model.main([*TINY, "--mode", "inference", "--kept-prior"]) == 0
    assert len(computed) == 1
    assert model.main([*TINY, "--mode", "inference"]) == 0
    assert len(computed) > 2
    # a training sees no image twice
    assert model.main([*TINY, "--kept-prior", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "tiny inference float32 engine, prior kept", "tiny training float32 engine",
    ]  # fmt: skip


def test_frozen_text_is_no_part_of_a_training(here: None, tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    assert model.main([*TINY, "--set", "model.clip.trainable=none", "--mode", "training", "--out", str(out)]) == 0
    (row,) = rows_of(out)
    assert "CLIP text" not in row["parts_ms"] and "decoder" in row["parts_ms"]


def test_a_dry_run_lists_what_a_gpu_is_asked_for(capsys: pytest.CaptureFixture[str]):
    assert model.main(["--device", "cuda", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and lines[0] == "vitb inference float32 engine"
    # what has to be compiled comes last
    assert [line.endswith("compiled") for line in lines] == [False] * 8 + [True] * 8
    assert model.main(["--device", "cpu", "--dry-run", "--backend", "reference"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{config} {mode} float32 reference" for config in ("vitb", "vitl") for mode in model.MODES
    ]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    if not torch.cuda.is_available():
        assert model.main(["--device", "cuda"]) == 5 and "CUDA device" in capsys.readouterr().err
    model.require.cache_clear()
    monkeypatch.setattr("drseg_core.extras.installed", lambda name: name != "open_clip_torch" and installed(name))
    try:
        assert model.main(TINY) == 5
    finally:
        model.require.cache_clear()
    assert "open_clip_torch is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "nope"], "nope not found; expected a YAML file or one of paper, tiny"),
        (["--set", "model.foo=1"], "model.foo"),
        (["--set", "model.graph.gamma=0"], "model.graph.gamma"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_before_any_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str, more: list[str]
):
    monkeypatch.setattr(memory, "in_child", lambda *_: pytest.fail("a row is measured"))
    assert model.main([*TINY, *words, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("model: ") and said in err and err.count("\n") == 1 and "ConfigError" not in err


def test_a_row_that_fails_is_told_and_the_others_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    figures = {"p50_ms": 1.0, "images_per_second": 1.0, "pdgr_share": None, "parts_ms": None, "process_mb": 1.0}

    def measured(module: str, function: str, job: dict[str, Any]) -> dict[str, Any]:
        if job["mode"] == "inference":
            raise RuntimeError("first line\nout of memory")
        return figures

    monkeypatch.setattr(memory, "in_child", measured)
    assert model.main(TINY) == 1
    captured = capsys.readouterr()
    assert "model: tiny inference float32 engine: out of memory" in captured.err and "training" in captured.out


def test_the_batch_is_larger_on_a_gpu():
    given = {"config": None, "mode": None, "precision": None, "compiled": None, "compiler": "inductor"}
    args = argparse.Namespace(
        **given, backend=None, channels_last=False, kept_prior=False, batch=None, repeats=1, device="cuda"
    )
    assert {job.batch for job in model.jobs_of(args, {})} == {4}
    args.device = "cpu"
    assert {job.batch for job in model.jobs_of(args, {})} == {1}


class Model(nn.Module):
    """Two parts that do a product each, and one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion, self.between, self.decoder = (nn.Linear(256, 256) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.between(self.fusion(x)))


def test_the_way_back_belongs_to_the_part_that_was_there_first():
    net, x = Model(), torch.randn(2048, 256, requires_grad=True)

    def calls(stop: str) -> dict[str, float]:
        for name in ("fusion", "decoder"):
            getattr(net, name).requires_grad_(name != stop)

        def step() -> None:
            y = net(x)
            with parts.part(parts.LOSS):
                loss = y.square().mean()
            loss.backward()

        with parts.named(net):
            return parts.milliseconds(step, "cpu", 2)

    found = calls("nothing")
    assert list(found) == ["UGAF", "decoder", "loss", "rest"] and min(found.values()) > 0
    assert "forward" not in vars(net.fusion)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as taken, parts.named(net):
        net(x).sum().backward()
    made = [event for event in taken.events() if event.name == "aten::mm"]
    # two products on the way back of each of the three
    assert len(made) == 6
    seen = {event.sequence_nr: parts._part_of(event, {}) for event in taken.events() if event.name == "aten::addmm"}
    assert sorted(seen.values()) == ["UGAF", "decoder", "rest"]
    assert sorted(parts._part_of(event, seen) for event in made) == sorted([*seen.values()] * 2)


@dataclass
class Kernel:
    name: str
    duration: float


@dataclass
class Event:
    """What a profile has of an operator."""

    name: str
    start: float
    sequence_nr: int = -1
    scope: int = 0
    cpu_parent: Event | None = None
    kernels: list[Kernel] = field(default_factory=list)
    self_cpu_time_total: float = 1.0
    device_type: DeviceType = DeviceType.CPU

    @property
    def time_range(self) -> argparse.Namespace:
        return argparse.Namespace(start=self.start)


def test_kernels_belong_to_the_part_of_their_operator():
    range_name = f"{parts._PREFIX}PDGR"
    # the range's mirror is no kernel; one that is launched without an operator is linked to the range
    region = Event(range_name, 0, scope=7, kernels=[Kernel(range_name, 100.0), Kernel("launched", 2.0)])
    forward = Event("aten::mm", 1, sequence_nr=5, cpu_parent=region, kernels=[Kernel("gemm", 10.0)])
    outside = Event("aten::sum", 3, sequence_nr=6, kernels=[Kernel("reduce", 3.0)])
    engine = Event(f"{parts._ENGINE}: MmBackward0", 4, sequence_nr=5)
    back = Event("MmBackward0", 5, sequence_nr=5, scope=1, cpu_parent=engine)
    product = Event("aten::mm", 6, cpu_parent=back, kernels=[Kernel("gemm", 20.0)])
    mirror = replace(region, device_type=DeviceType.CUDA, kernels=[Kernel("twice", 50.0)])
    events = [product, back, engine, outside, forward, region, mirror]
    assert parts.attributed(events, on_gpu=True) == {"PDGR": 32.0, "rest": 3.0}
    assert math.isclose(sum(parts.attributed(events, on_gpu=False).values()), 6.0)
    # of two operators with one number, the later made the node
    late = Event("aten::view", 2, sequence_nr=5, kernels=[])
    assert parts.attributed([*events, late], on_gpu=True) == {"PDGR": 12.0, "rest": 23.0}
