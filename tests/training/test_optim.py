# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from drseg_core.config.load import load_config, override
from drseg_core.config.schema import TrainConfig
from drseg_core.data.synthetic import write_scenes
from drseg_core.models.build import build_model
from drseg_core.training.logs import read_log
from drseg_core.training.loop import train as train_run
from drseg_core.training.optim import (
    build_optimizer,
    learning_rate_factor,
    load_optimizer,
    movement,
    set_learning_rate,
    training_progress,
)


def test_progress_is_that_of_the_nearer_limit():
    steps = TrainConfig(iterations=100)
    assert training_progress(25, 1e9, steps) == 0.25
    both = TrainConfig(iterations=100, seconds=10)
    assert training_progress(25, 1.0, both) == 0.25
    assert training_progress(25, 5.0, both) == 0.5
    assert training_progress(25, 50.0, both) == 1.0
    assert training_progress(0, 0.0, TrainConfig(iterations=0)) == 1.0
    assert training_progress(0, 0.0, TrainConfig(seconds=0.0)) == 1.0


def test_cosine_falls_from_one_to_zero():
    train = TrainConfig()
    assert learning_rate_factor(0.0, 0, train) == 1.0
    assert learning_rate_factor(0.5, 50, train) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 100, train) == pytest.approx(0.0)
    assert learning_rate_factor(0.7, 70, TrainConfig(schedule="constant")) == 1.0


def test_warm_up_rises_linearly():
    train = TrainConfig(schedule="constant", warmup_iterations=4)
    assert [learning_rate_factor(0.1, i, train) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_groups_keep_their_ratio():
    weight = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": weight[:1], "lr": 1e-2, "weight_decay": 0.0}, {"params": weight[1:], "lr": 1e-4}]
    optimizer = build_optimizer(groups, TrainConfig(weight_decay=0.3))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-5]
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]


def test_movement_is_the_step_over_the_learning_rate():
    weight = [torch.nn.Parameter(torch.zeros(3)) for _ in range(4)]
    names = ("clip_decay", "clip_no_decay", "edge_decay", "head_decay")
    groups = [{"name": name, "params": [each], "lr": 0.1} for name, each in zip(names, weight, strict=True)]
    groups[2]["eps"] = 1e-5
    optimizer = build_optimizer(groups, TrainConfig(weight_decay=0.0))
    assert movement(optimizer) == {}
    gradient = [torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3), torch.tensor([1e-5, 3e-5, -1e-5]), None]
    for each, value in zip(weight, gradient, strict=True):
        each.grad = value
    optimizer.step()
    moved = movement(optimizer)
    # half of CLIP's numbers moved by the whole rate; what has no gradient is not counted
    assert moved == pytest.approx({"clip": 0.5**0.5, "edge": ((0.25 + 0.5625 + 0.25) / 3) ** 0.5}, rel=1e-5)
    # and that is what the step did
    assert weight[2].detach().square().mean().sqrt().item() / 0.1 == pytest.approx(moved["edge"], rel=1e-5)
    for each, value in zip(weight, gradient, strict=True):
        each.grad = None if value is None else -value
    before = weight[2].detach().clone()
    optimizer.step()
    step = (weight[2].detach() - before).square().mean().sqrt().item()
    assert step / 0.1 == pytest.approx(movement(optimizer)["edge"], rel=1e-4)


def test_the_edge_mlp_of_tiny_moves_as_far_as_the_rest(tmp_path):
    data = f"folder:{write_scenes(tmp_path / 'scenes', splits={'train': 8}, seed=0)}"
    options = {"model.rotations": 1, "train.batch_size": 2, "train.iterations": 6, "train.log_every": 3}
    moved = {}
    for name, changes in {"default": {}, "published": {"train.edge_eps": 1e-8}}.items():
        run = train_run(override(load_config("tiny"), options | changes), data, tmp_path / name, show_progress=False)
        moved[name] = [[row[f"movement_{part}"] for part in ("edge", "clip", "head")] for row in read_log(run)]
    assert len(moved["default"]) == 2
    for edge, clip, head in moved["default"]:
        assert edge >= 0.5 * max(clip, head)
    # with AdamW's own epsilon it stands still
    for edge, clip, head in moved["published"]:
        assert edge < 0.1 * min(clip, head)


def test_a_state_from_before_the_edge_group_loads():
    torch.manual_seed(0)
    model = build_model(load_config("tiny").model)
    train = TrainConfig()
    now = model.parameter_groups(train)
    # as it was: the MLP among the head's parameters, in the model's order
    place = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    edge = next(group for group in now if group["name"] == "edge_decay")
    former = [dict(group) for group in now if group is not edge]
    head = next(group for group in former if group["name"] == "head_decay")
    head["params"] = sorted([*head["params"], *edge["params"]], key=lambda each: place[id(each)])
    old = build_optimizer(former, train)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    old.step()
    new = build_optimizer(now, train)
    load_optimizer(new, old.state_dict(), model.parameters())
    assert [group["name"] for group in new.param_groups] == [group["name"] for group in now]
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])
    assert [group["eps"] for group in new.param_groups] == [1e-8] * len(now)
    again = build_optimizer(model.parameter_groups(train), train)
    load_optimizer(again, new.state_dict(), model.parameters())
    assert all(torch.equal(again.state[p]["exp_avg"], new.state[p]["exp_avg"]) for p in new.state)
