# SPDX-License-Identifier: Apache-2.0
"""What the graph connects: how many neighbours of a node have its label, by prior, decay and number of neighbours.

Propagation can only help as far as neighbours belong together, so this is where to look when it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drseg_core.data import IGNORE
from drseg_core.device import select_device
from drseg_core.models.dino import DinoPrior
from drseg_core.nn.resample import resample
from drseg_core.ops import knn_graph, prepare_prior
from drseg_core.studies.output import mean_text, write_study
from drseg_core.studies.plan import PlannedVariant, plan
from drseg_core.studies.runner import train_priors
from drseg_core.studies.seeds import measure_seeds
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import DRSEG
from drseg_core.studies.zero_shot import clip_model, sampled
from drseg_core.training.rank_channels import dense_features, label_on_grid

IMAGES = 60
NEIGHBOURS = (4, 8, 16, 33, 75)
DECAYS = (0.0, 0.5, 1.0, 2.0, 4.0)
CHANCE, DISTANCE, CLIP = "any node", "distance alone", "CLIP's own features, decay 1"
LABELS = "the labels themselves"


def neighbour_purity(setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """Share of neighbours that have the node's own label, mean over the classes, without the node itself."""
    planned = plan(setting, [DRSEG], out)
    train_priors(planned)
    measured = measure_seeds("neighbour-purity", _purity, planned, jobs)
    found = measured.found
    rows = [
        {
            "test set": test,
            "graph": name,
            **{f"K {k}": mean_text([row[name][str(k)] for row in by_seed.values()]) for k in NEIGHBOURS},
        }
        for test, by_seed in found.items()
        for name in next(iter(by_seed.values()))
    ]
    explained = (
        "Percent of a node's K neighbours that have its label, mean over the classes. *any node* is the share that all "
        "nodes of an image have; only what lies above *distance alone* comes from the features, and nothing lies above "
        "*the labels themselves*."
    )

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(1, len(found), figsize=(4.8 * len(found), 3.4), squeeze=False)
        for axis, (test, by_seed) in zip(axes[0], found.items(), strict=True):
            for name in next(iter(by_seed.values())):
                values = torch.tensor([[row[name][str(k)] for k in NEIGHBOURS] for row in by_seed.values()]).mean(0)
                style = ":" if name in (CHANCE, DISTANCE, LABELS) else "-"
                axis.plot(NEIGHBOURS, values, style, marker="o", markersize=3, label=name)
            axis.set(title=test, xlabel="neighbours K", ylabel="same label, %", xscale="log")
            axis.set_xticks(NEIGHBOURS, [str(k) for k in NEIGHBOURS])
            axis.minorticks_off()
        axes[0, -1].legend(frameon=False, fontsize=7)
        return figure

    title = "What the graph connects"
    return write_study("neighbour-purity", title, explained, rows, measured, setting, out, command, draw)


def _purity(planned: PlannedVariant) -> dict[str, Any]:
    setting = planned.setting
    prior = DinoPrior(planned.config.model.dino).eval().to(select_device(setting.device))
    model = clip_model(planned)
    found = {}
    for test in setting.tests:
        dataset, _ = setting.open_test(test)
        counts: dict[str, PurityCounts] = {}
        for place in sampled(dataset, IMAGES):
            sample = dataset[place]
            with torch.no_grad():
                image = sample.image[None].to(prior.pixel_mean.device)
                clip = dense_features(model, image).cpu()
                grid = (clip.shape[2], clip.shape[3])
                seen = resample(prior.maps(image.float() / 255).features, grid).cpu()
            label = label_on_grid(sample.mask[None], grid)[0].flatten()
            for name, graph in _graphs(seen, clip, label.view(grid)).items():
                counts.setdefault(name, PurityCounts(len(dataset.class_names))).add(graph, label)
        found[test.name] = {name: part.shares() for name, part in counts.items()}
    return found


def _graphs(prior: Tensor, clip: Tensor, label: Tensor) -> Mapping[str, Tensor | None]:
    """Neighbours (N, K) of each kind of graph, best first, K the largest there is; None for every node of the image."""
    grid = (label.shape[0], label.shape[1])
    alone = torch.ones(1, 1, *grid)
    graphs: dict[str, Tensor | None] = {CHANCE: None, DISTANCE: _best_first(alone, grid, 1.0)}
    graphs.update({f"prior, decay {decay:g}": _best_first(prior, grid, decay) for decay in DECAYS})
    graphs[CLIP] = _best_first(clip, grid, 1.0)
    truth = torch.nn.functional.one_hot(label, IGNORE + 1).movedim(-1, 0)[None]
    graphs[LABELS] = _best_first(truth, grid, 1.0)
    return graphs


def _best_first(features: Tensor, grid: tuple[int, int], decay: float) -> Tensor:
    """(N, K) neighbours of (1, D, h, w) features without the node itself, by falling score."""
    nodes = features.flatten(2).transpose(1, 2).float()
    k = min(max(NEIGHBOURS), nodes.shape[1] - 1)
    index, score = knn_graph(prepare_prior(nodes), grid, k, decay=decay, include_self=False, return_score=True)
    order = score[0].argsort(dim=-1, descending=True, stable=True)
    return index[0].long().gather(-1, order)


class PurityCounts:
    """Sums over images: of each class its nodes, and of each K the neighbours that share their label."""

    def __init__(self, classes: int) -> None:
        self.nodes = torch.zeros(classes, dtype=torch.float64)
        self.same = {k: torch.zeros(classes, dtype=torch.float64) for k in NEIGHBOURS}

    def add(self, graph: Tensor | None, label: Tensor) -> None:
        """An image: neighbours (N, K) best first, or None for all nodes, and labels (N,), 255 where there is none.

        Neighbours without a label are no neighbours of the same one.
        """
        known = label != IGNORE
        own = label[known]
        self.nodes.index_add_(0, own, torch.ones_like(own, dtype=torch.float64))
        for k in NEIGHBOURS:
            if graph is None:
                same = (torch.bincount(own, minlength=len(self.nodes))[own] - 1) / max(len(label) - 1, 1)
            else:
                near = label[graph[known, :k]]
                same = (near == own[:, None]).double().mean(dim=1)
            self.same[k].index_add_(0, own, same.double())

    def shares(self) -> dict[str, float]:
        """Percent for each K, mean over the classes that have nodes."""
        there = self.nodes > 0
        return {str(k): 100 * float((same[there] / self.nodes[there]).mean()) for k, same in self.same.items()}
