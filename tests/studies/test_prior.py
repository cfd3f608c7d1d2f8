# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from drseg_core.config.load import load_config, override
from drseg_core.errors import CheckpointError, ConfigError
from drseg_core.models.dino import DinoPrior
from drseg_core.studies.plan import plan_variant
from drseg_core.studies.prior import prior_file, structure_loss, teach_prior
from drseg_core.studies.runner import SCORES, load_variant, run_variant, train_priors, train_start
from drseg_core.studies.setting import make_setting
from drseg_core.studies.tables import Variant
from drseg_core.training.loop import train
from drseg_core.training.signals import TrainingStopped

DATA = "synthetic:world=landscape,scenes=4,size=64,seed=1000"


@pytest.fixture
def config():
    return dataclasses.replace(load_config("tiny").model.dino, image_size=64)


def test_structure_loss_by_hand():
    torch.manual_seed(0)
    tokens = torch.randn(1, 6, 2, 3, requires_grad=True)
    label = torch.tensor([[[0, 0, 1], [1, 1, 255]]])
    unit = F.normalize(tokens.flatten(2)[0].T, dim=1)
    terms = []
    for i, own in enumerate(label.flatten().tolist()):
        partners = [j for j, other in enumerate(label.flatten().tolist()) if j != i and other == own != 255]
        if partners:
            others = [j for j in range(6) if j != i]
            logit = {j: unit[i] @ unit[j] / 0.1 for j in others}
            total = torch.stack(list(logit.values())).logsumexp(0)
            terms.append(sum(total - logit[j] for j in partners) / len(partners))
    torch.testing.assert_close(structure_loss(tokens, label), torch.stack(terms).mean())
    nothing = structure_loss(tokens, torch.full((1, 2, 3), 255))
    nothing.backward()
    assert nothing == 0 and torch.equal(tokens.grad, torch.zeros_like(tokens))


def test_a_taught_prior_is_a_weight_file_and_knows_more(config, tmp_path):
    path = teach_prior(config, DATA, 30, tmp_path)
    taught, random = DinoPrior(dataclasses.replace(config, weights=str(path))), DinoPrior(config)
    from drseg_core.data import open_dataset
    from drseg_core.training.rank_channels import label_on_grid

    data = open_dataset(DATA, "train")
    image = torch.stack([data[i].image for i in range(4)]).float() / 255
    label = label_on_grid(torch.stack([data[i].mask for i in range(4)]), (8, 8))
    losses = [float(structure_loss(prior.maps(image).features, label)) for prior in (taught, random)]
    assert losses[0] < losses[1] - 0.3
    # once
    before = path.stat().st_mtime_ns
    assert teach_prior(config, DATA, 30, tmp_path) == path and path.stat().st_mtime_ns == before


def test_everything_that_decides_it_is_in_its_name(config):
    out = Path("out")
    names = {
        prior_file(changed, data, steps, out)
        for changed in (config, dataclasses.replace(config, seed=1))
        for data in (DATA, DATA + "1")
        for steps in (1, 2)
    }
    assert len(names) == 8
    # what is taken from the taught encoder teaches it nothing
    taken = dataclasses.replace(config, layer=0, features="key", guidance_blocks=(0, 0))
    assert prior_file(taken, DATA, 1, out) == prior_file(config, DATA, 1, out)


def test_all_that_have_a_prior_get_the_same_one(tmp_path):
    setting = make_setting(quick=True, prior_steps=2)
    baseline = Variant("baseline", "baseline", {"model.fusion.kind": "none"})
    variants = [Variant("a", "a", {}), Variant("b", "b", {"model.fusion.kind": "mean"})]
    weights = {
        plan_variant(setting, variant, seed, tmp_path).config.model.dino.weights
        for variant in variants
        for seed in (0, 1)
    }
    assert len(weights) == 1 and None not in weights
    assert plan_variant(setting, baseline, 0, tmp_path).config.model.dino.weights is None
    # variants without a prior are shared with studies of the random one, those with it are not
    plain = make_setting(quick=True)
    assert plan_variant(setting, baseline, 0, tmp_path).folder == plan_variant(plain, baseline, 0, tmp_path).folder
    assert (
        plan_variant(setting, variants[0], 0, tmp_path).folder != plan_variant(plain, variants[0], 0, tmp_path).folder
    )
    # wherever the studies lie
    elsewhere = plan_variant(setting, variants[0], 0, tmp_path / "elsewhere").folder
    assert elsewhere.name == plan_variant(setting, variants[0], 0, tmp_path).folder.name


def test_studies_that_moved_find_their_prior(tmp_path):
    setting = make_setting(quick=True, prior_steps=2, seeds=(0,))
    variant = Variant("drseg", "DR-Seg", {})
    there, here = tmp_path / "there", tmp_path / "here"
    train_start(plan_variant(setting, variant, 0, there))
    scores = run_variant(plan_variant(setting, variant, 0, there))
    there.rename(here)
    assert load_variant(plan_variant(setting, variant, 0, here)).config.model.dino.weights.startswith(str(here))
    (plan_variant(setting, variant, 0, here).folder / SCORES).unlink()
    assert run_variant(plan_variant(setting, variant, 0, here)) == scores


def test_scenes_of_its_own():
    setting = make_setting(prior_steps=5)
    assert setting.prior_data == setting.data + ",seed=1000" and setting.suffix == "-taught"


@pytest.mark.parametrize("options", [{"config": "vitl"}, {"data": "folder:x", "tests": ["folder:x"]}])
def test_refusals(options):
    with pytest.raises(ConfigError, match="prior_steps needs a random prior"):
        make_setting(prior_steps=5, **options)


def _stop(step):
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def test_studies_that_moved_in_the_middle_of_a_training_go_on(tmp_path):
    setting = make_setting(quick=True, prior_steps=2, seeds=(0,))
    variant = Variant("drseg", "DR-Seg", {})
    there, here, straight = tmp_path / "there", tmp_path / "here", tmp_path / "straight"
    train_start(plan_variant(setting, variant, 0, there))
    shutil.copytree(there, straight)
    planned = plan_variant(setting, variant, 0, there)
    train_priors([planned])
    with pytest.raises(TrainingStopped):
        train(
            planned.config,
            setting.data,
            planned.folder,
            init=planned.start.path,
            show_progress=False,
            on_step=_stop,
        )
    there.rename(here)
    assert run_variant(plan_variant(setting, variant, 0, here)) == run_variant(
        plan_variant(setting, variant, 0, straight)
    )
    assert (
        len(json.loads((plan_variant(setting, variant, 0, here).folder / "manifest.json").read_text())["resumed"]) == 1
    )


def test_another_prior_is_refused_in_the_middle_of_a_training(config, tmp_path):
    setting = make_setting(quick=True, prior_steps=2, seeds=(0,))
    plain = override(setting.config, {"model.dino.weights": str(teach_prior(config, DATA, 1, tmp_path))})
    with pytest.raises(TrainingStopped):
        train(plain, setting.data, tmp_path / "run", show_progress=False, on_step=_stop)
    other = override(plain, {"model.dino.weights": str(teach_prior(config, DATA, 2, tmp_path))})
    with pytest.raises(CheckpointError, match=r"model\.dino\.weights are not those that"):
        train(other, setting.data, tmp_path / "run", resume=True, show_progress=False)
