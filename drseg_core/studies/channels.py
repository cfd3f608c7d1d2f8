# SPDX-License-Identifier: Apache-2.0
"""What single channels of CLIP do: the measurements behind the split into semantic and structural ones (SPSD)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drseg_core.checkpoints.channels import ChannelFile
from drseg_core.data import open_dataset
from drseg_core.models.weights import weights_hash
from drseg_core.studies import figures
from drseg_core.studies.output import mean_text, write_study
from drseg_core.studies.plan import PlannedVariant, plan
from drseg_core.studies.seeds import measure_seeds
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import DRSEG
from drseg_core.studies.zero_shot import SubsetScores, class_text, clip_model, token_features
from drseg_core.training.rank_channels import rank_channels

# as many as the paper masks channels on
IMAGES = 200
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def channel_masking(setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """Fig. 2: the zero-shot mIoU without one channel, less that with all, for every channel and test set."""
    measured = measure_seeds("channel-masking", _masked, plan(setting, [DRSEG], out), jobs)
    found = measured.found
    rows = []
    for name, by_seed in found.items():
        values = [value for row in by_seed.values() for value in row["change"]]
        rows.append(
            {
                "test set": name,
                "mIoU, all channels": statistics.fmean(row["all"] for row in by_seed.values()),
                "worst change": f"{min(values):+.2f}",
                "best change": f"{max(values):+.2f}",
                "channels that help": f"{100 * sum(v < 0 for v in values) / len(values):.0f} %",
                "channels that harm": f"{100 * sum(v > 0 for v in values) / len(values):.0f} %",
            }
        )
    text = (
        "Change of the zero-shot mIoU when one channel is taken from image and text; a channel helps where the mIoU "
        "falls without it. The paper's Fig. 2 shows both kinds on Potsdam."
    )

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 3), squeeze=False)
        for axis, (name, by_seed) in zip(axes[0], found.items(), strict=True):
            for seed, row in by_seed.items():
                axis.plot(sorted(row["change"]), label=f"seed {seed}")
            axis.axhline(0, color=figures.INK, linewidth=0.8)
            axis.set(title=name, xlabel="channels, by their effect", ylabel="change of mIoU without it")
            axis.legend(frameon=False)
        return figure

    title = "One channel less (Fig. 2)"
    return write_study("channel-masking", title, text, rows, measured, setting, out, command, draw)


def _masked(planned: PlannedVariant) -> dict[str, Any]:
    model = clip_model(planned)
    channels = model.clip.embed_dim
    subsets = torch.cat((torch.ones(1, channels), 1 - torch.eye(channels))).bool()
    return {
        name: {"all": scores[0], "change": [score - scores[0] for score in scores[1:]]}
        for name, scores in _scored(planned.setting, model, subsets)
    }


def retention(setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """Fig. 6: the zero-shot mIoU with the most semantic, and with the least semantic, share of the channels."""
    measured = measure_seeds("retention", _retained, plan(setting, [DRSEG], out), jobs)
    found = measured.found
    rows = []
    for name, by_seed in found.items():
        for place, share in enumerate(SHARES):
            pair = {side: [row[side][place] for row in by_seed.values()] for side in ("top", "bottom")}
            rows.append(
                {
                    "test set": name,
                    "share": f"{100 * share:.0f} %",
                    "most semantic": mean_text(pair["top"]),
                    "least semantic": mean_text(pair["bottom"]),
                    "top is better": f"{sum(a > b for a, b in zip(*pair.values(), strict=True))} of {len(by_seed)}",
                }
            )
    text = "Zero-shot mIoU with a share of the channels. In the paper's Fig. 6 the top beats the bottom at every share."

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 3), squeeze=False)
        for axis, (name, by_seed) in zip(axes[0], found.items(), strict=True):
            for side, color in (("top", figures.ACCENT), ("bottom", figures.PAPER)):
                values = torch.tensor([row[side] for row in by_seed.values()])
                label = "most semantic" if side == "top" else "least semantic"
                axis.plot([100 * share for share in SHARES], values.mean(0), "o-", color=color, label=label)
                axis.fill_between(
                    [100 * share for share in SHARES], values.amin(0), values.amax(0), color=color, alpha=0.2
                )
            axis.set(title=name, xlabel="channels kept, %", ylabel="zero-shot mIoU, %")
            axis.legend(frameon=False)
        return figure

    title = "A share of the channels (Fig. 6)"
    return write_study("retention", title, text, rows, measured, setting, out, command, draw)


def _retained(planned: PlannedVariant) -> dict[str, Any]:
    model = clip_model(planned)
    order = ranking(planned, model).score.argsort(descending=True, stable=True)
    counts = [max(1, round(share * len(order))) for share in SHARES]
    subsets = torch.zeros(2 * len(counts), len(order), dtype=torch.bool)
    for place, count in enumerate(counts):
        subsets[place, order[:count]] = True
        subsets[len(counts) + place, order[-count:]] = True
    return {
        name: {"top": scores[: len(counts)], "bottom": scores[len(counts) :]}
        for name, scores in _scored(planned.setting, model, subsets)
    }


def activation_sparsity(setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """How many classes, and how few pixels, a channel answers to, in the semantic and in the structural half."""
    measured = measure_seeds("activation-sparsity", _sparse, plan(setting, [DRSEG], out), jobs)
    found = measured.found
    rows = []
    for group in ("semantic", "structural"):
        row: dict[str, Any] = {"channels": group}
        for key, title in (("effective_classes", "classes it answers to"), ("pixel_sparsity", "sparsity over pixels")):
            means = [
                statistics.fmean(result[key][channel] for channel in result[group])
                for result in found["training set"].values()
            ]
            row[title] = mean_text(means, digits=2)
        rows.append(row)
    text = (
        "Classes it answers to: exp of the entropy of Eq. 2, from 1 to their number; the split of Eq. 4 looks at it, "
        "so its order is no finding. Sparsity over pixels: Hoyer's measure of max(z, 0), 0 for the same activation "
        "everywhere, 1 for a single pixel; the split does not look at it."
    )

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(1, 2, figsize=(8, 3))
        for axis, key, title in (
            (axes[0], "effective_classes", "classes it answers to"),
            (axes[1], "pixel_sparsity", "sparsity over pixels"),
        ):
            for group, color in (("semantic", figures.ACCENT), ("structural", figures.PAPER)):
                values = [r[key][c] for r in found["training set"].values() for c in r[group]]
                axis.hist(values, bins=20, alpha=0.6, color=color, label=group)
            axis.set(xlabel=title, ylabel="channels")
            axis.legend(frameon=False)
        return figure

    title = "Sparsity of channels"
    return write_study("activation-sparsity", title, text, rows, measured, setting, out, command, draw)


def _sparse(planned: PlannedVariant) -> dict[str, Any]:
    model = clip_model(planned)
    ranked = ranking(planned, model)
    found = {
        "effective_classes": ranked.entropy.exp().tolist(),
        "pixel_sparsity": _pixel_sparsity(planned.setting, model).tolist(),
        "semantic": ranked.semantic_index.tolist(),
        "structural": ranked.structural_index.tolist(),
    }
    return {"training set": found}


def ranking(planned: PlannedVariant, model: Any) -> ChannelFile:
    """The channels' ranking on the training set (Eq. 1-5)."""
    return rank_channels(
        model,
        open_dataset(planned.setting.data, "train"),
        planned.config.model.spsd,
        backbone=planned.config.model.clip.name,
        weights_hash=weights_hash(model.clip),
        seed=planned.seed,
        device=next(model.parameters()).device,
    )


def _pixel_sparsity(setting: Setting, model: Any) -> Tensor:
    """(C,) Hoyer's sparsity of the rectified, normalised features over the tokens of the training set."""
    total = square = None
    count = 0
    for feature, _ in token_features(model, open_dataset(setting.data, "train"), IMAGES):
        positive = (feature / feature.norm(dim=0, keepdim=True).clamp_min(1e-12)).clamp_min(0).double()
        total = positive.sum(1) if total is None else total + positive.sum(1)
        square = positive.square().sum(1) if square is None else square + positive.square().sum(1)
        count += feature.shape[1]
    assert total is not None and square is not None
    root = count**0.5
    # a channel that is never positive is as sparse as can be
    return torch.where(square > 0, (root - total / square.sqrt().clamp_min(1e-12)) / (root - 1), torch.ones_like(total))


def _scored(setting: Setting, model: Any, subsets: Tensor) -> list[tuple[str, list[float]]]:
    """Zero-shot mIoU of every subset of channels (S, C) on every test set."""
    found = []
    for test in setting.tests:
        dataset, _ = setting.open_test(test)
        scores = SubsetScores(subsets, class_text(model, dataset.class_names))
        for feature, pixels in token_features(model, dataset, IMAGES):
            scores.update(feature, pixels)
        found.append((test.name, scores.mean_iou()))
    return found
