# SPDX-License-Identifier: Apache-2.0
"""Pictures of studies, drawn from their numbers alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drseg_core.files import atomic_path
from drseg_core.studies.paper import SETS, Published
from drseg_core.studies.report import Scores, over_tests, spread
from drseg_core.studies.tables import TrainingStudy

INK, ACCENT, PAPER = "#3b4252", "#2a7fb8", "#b48a3c"
_log = logging.getLogger(__name__)


def pyplot() -> Any:
    """matplotlib without a display, or None with one line of log where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        _log.warning("study: no figure, matplotlib is not installed; expected pip install 'drseg[plots]'")
        return None
    return plt


def save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    pyplot().close(figure)


def draw_training_study(study: TrainingStudy, scores: Mapping[str, Scores], path: Path) -> None:
    """mIoU of every variant with its seeds and spread, and the paper's beside it where there is one; below them what
    the paper has set by set."""
    plt = pyplot()
    shown = [variant for variant in study.variants if scores.get(variant.name)]
    if plt is None or not shown:
        return
    has_paper = any(variant.paper and variant.paper.miou is not None for variant in shown)
    if study.axis is None:
        heights = [0.9 + 0.42 * len(shown)]
        width = 9.0 if has_paper else 6.0
        if study.published:
            heights.append(1.2 + 0.35 * len(study.published))
            width = 12.0
        figure, axes = plt.subplots(
            len(heights),
            2 if has_paper or study.published else 1,
            figsize=(width, sum(heights)),
            height_ratios=heights,
            sharey="row",
            squeeze=False,
        )
        titles = [variant.title for variant in shown]
        _dots(axes[0, 0], titles, [scores[variant.name] for variant in shown])
        axes[0, 0].set_xlabel("mIoU here, %")
        if has_paper:
            values = [variant.paper.miou if variant.paper else None for variant in shown]
            places = [place for place, value in enumerate(values) if value is not None]
            axes[0, 1].plot([values[place] for place in places], places, "o", color=PAPER)
            axes[0, 1].set_xlabel("mIoU in the paper, %")
            _ruled(axes[0, 1], len(values))
        axes[0, 0].invert_yaxis()
        if study.published:
            # below the title of the whole
            figure.tight_layout(h_pad=3, rect=(0, 0, 1, 0.96))
            for axis, metric, name in zip(axes[1], ("miou", "macc"), ("mIoU", "mACC"), strict=True):
                _heat(axis, study.published, metric)
                axis.set_title(f"{name} in the paper ({study.paper.partition(', mean')[0]}), %", fontsize=9)
    else:
        figure, axes = plt.subplots(1, 2 if has_paper else 1, figsize=(9.0 if has_paper else 5.0, 3.2), squeeze=False)
        _line(axes[0, 0], shown, scores)
        axes[0, 0].set(xlabel=study.axis, ylabel="mIoU here, %")
        if has_paper:
            known = [
                (variant.value, variant.paper.miou)
                for variant in shown
                if variant.paper and variant.paper.miou is not None
            ]
            axes[0, 1].plot([x for x, _ in known], [y for _, y in known], "o-", color=PAPER)
            axes[0, 1].set(xlabel=study.axis, ylabel="mIoU in the paper, %")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(study.title, fontsize=11)
    save(figure, path)


def _dots(axis: Any, titles: Sequence[str], variants: Sequence[Scores]) -> None:
    """The mean of each variant with its deviation, and every seed: dots, whose axis need not begin at 0."""
    for place, variant in enumerate(variants):
        found = spread(variant, "mIoU")
        if found is not None:
            axis.errorbar(found.mean, place, xerr=found.deviation or 0.0, fmt="o", color=ACCENT, ecolor=INK, capsize=3)
        seeds = [value for value in (over_tests(row, "mIoU") for row in variant.values()) if value is not None]
        axis.plot(seeds, [place] * len(seeds), "o", color="white", markeredgecolor=INK, markersize=3)
    axis.set_yticks(range(len(titles)), titles)
    _ruled(axis, len(titles))


def _ruled(axis: Any, rows: int) -> None:
    """A thin line for each row, so that a dot finds its name."""
    axis.set_ylim(-0.6, rows - 0.4)
    axis.grid(axis="y", color="#e5e9f0", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.1)


def _heat(axis: Any, published: Mapping[str, Published], metric: str) -> None:
    """Methods by sets, each set from its lowest to its highest value: sets are too far apart for one scale."""
    table = [getattr(row, metric) for row in published.values()]
    bounds = [(min(column), max(column)) for column in zip(*table, strict=True)]
    share = [[(value - low) / (high - low) for value, (low, high) in zip(row, bounds, strict=True)] for row in table]
    axis.imshow(share, cmap="Blues", vmin=-0.2, vmax=2.2, aspect="auto")
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=INK)
    axis.set_xticks(range(len(SETS)), SETS, fontsize=8)
    axis.set_yticks(range(len(published)), published)


def _line(axis: Any, shown: Sequence[Any], scores: Mapping[str, Scores]) -> None:
    found = [(variant.value, spread(scores[variant.name], "mIoU")) for variant in shown]
    x = [value for value, result in found if result is not None]
    y = [result.mean for _, result in found if result is not None]
    error = [result.deviation or 0.0 for _, result in found if result is not None]
    axis.errorbar(x, y, yerr=error, fmt="o-", color=ACCENT, ecolor=INK, capsize=3)
    for variant in shown:
        dots = [
            value for value in (over_tests(row, "mIoU") for row in scores[variant.name].values()) if value is not None
        ]
        axis.plot([variant.value] * len(dots), dots, "o", color="white", markeredgecolor=INK, markersize=4)
