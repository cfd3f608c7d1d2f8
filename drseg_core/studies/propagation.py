# SPDX-License-Identifier: Apache-2.0
"""Labels spread over the graph of a real prior, on real labelled pieces, against graphs that need no prior.

It is the second half of a map from words, without its first: no weights of CLIP are at hand, so classifiers that were
fitted on other pieces stand for it. Windows, cells, graph and solver are those of ``drseg predict zero-shot``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.checkpoints.checkpoint import file_hash
from drseg_core.checkpoints.packaged import DINOV2, EFFICIENTNET, packaged_prior
from drseg_core.checkpoints.versions import device_name, git_revision, library_versions
from drseg_core.config.schema import DinoConfig
from drseg_core.data import IGNORE
from drseg_core.device import select_device
from drseg_core.evaluation.boundary import BoundaryCounts
from drseg_core.evaluation.metrics import ConfusionMatrix
from drseg_core.evaluation.report import markdown_table
from drseg_core.files import write_text_atomic
from drseg_core.models.dino import DinoPrior
from drseg_core.models.weights import load_weights, save_weights
from drseg_core.models.window_maps import Windows, blended_bands, mirrored
from drseg_core.nn.label_propagation import propagation_graph, solve_labels
from drseg_core.nn.resample import resample
from drseg_core.studies import figures
from drseg_core.studies.output import mean_text
from drseg_core.studies.pieces import Fold, Piece, folds, read_pieces, synthetic_pieces
from drseg_core.studies.setting import Setting
from drseg_core.training.rank_channels import label_on_grid

TITLE = "Labels spread over the graph of a real prior"
NONE, COLOUR, DISTANCE, RANDOM = "none", "colour", "distance alone", "random ViT-S/14"
DINO, CNN = "DINOv2 ViT-S/14", "EfficientNet-lite0"
GRAPHS = (NONE, COLOUR, DISTANCE, RANDOM, CNN, DINO)
CLASSIFIERS = {
    f"prototypes of {CNN}": (CNN, "prototypes"),
    f"linear probe of {CNN}": (CNN, "probe"),
    f"linear probe of {DINO}": (DINO, "probe"),
}
GAMMA = 3.0
# raised when features of the same piece and encoders would come out differently
VERSION = 1
METRICS = {"mIoU": "mIoU", "boundary": "boundary IoU"}

_log = logging.getLogger(__name__)


class GraphSetting(NamedTuple):
    """Neighbours, the spatial decay for each cell of distance, and the share of the neighbours."""

    k: int
    decay: float
    alpha: float

    def __str__(self) -> str:
        return f"K {self.k}, decay {self.decay:g}, alpha {self.alpha:g}"


# the command's first; 0.02 for a cell is a decay of 1 over the longest distance of 37 x 37 cells
SETTINGS = (
    GraphSetting(75, 0.16, 0.95),
    GraphSetting(75, 0.16, 0.8),
    GraphSetting(75, 0.16, 0.5),
    GraphSetting(75, 0.02, 0.8),
    GraphSetting(8, 0.16, 0.95),
    GraphSetting(8, 0.16, 0.8),
    GraphSetting(8, 0.02, 0.8),
)

TRIAL = "A trial of the program, not a result: drawn pictures, and small encoders with random weights."
_OF_A_TRIAL = {
    "Real pieces": "Drawn pictures",
    "Real less it": "First less it",
    "real less": "first less",
    "the real prior": "the first encoder",
    DINO: "first small encoder, random",
    CNN: "second small encoder, random",
    RANDOM: "other small encoders, random",
}
"""What stands in the page of a trial in the place of what was not there."""

Scores = dict[str, dict[str, float]]
"""Of one row: ``{piece or data set: {metric: percent}}``."""


def propagation(setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """mIoU and boundary IoU of three classifiers, whose logits spread over six graphs, none among them.

    ``setting`` gives the pieces, the device and the seeds of the random prior; ``jobs`` has nothing to divide.
    """
    start, revision = time.monotonic(), git_revision()
    pieces = synthetic_pieces() if setting.quick else read_pieces(setting.pieces)
    parted = folds(pieces)
    device = select_device(setting.device)
    encoders, windows = _encoders(setting.seeds, setting.quick)
    features = {id(piece): _kept_features(piece, encoders, windows, device, out / "runs") for piece in _each(parted)}
    found = _measure(parted, features, windows.cell, setting.seeds)
    facts: dict[str, Any] = {
        "quick": setting.quick,
        "pieces": {dataset: [piece.name for piece in own] for dataset, own in pieces.items()},
        "scored": [f"{fold.dataset} {fold.test.name}" for fold in parted],
        "seeds": list(setting.seeds),
        "window": [windows.cells * windows.cell, windows.cell],
        "command": command,
        "commits": [revision] if revision else [],
        "machine": f"{device_name(str(device))}, threads: {torch.get_num_threads()}",
        "seconds": round(time.monotonic() - start),
        "versions": library_versions(),
    }
    title = f"{TITLE} (a trial)" if setting.quick else TITLE
    content = {"study": "propagation", "title": title, **facts, "found": found}
    write_text_atomic(out / "propagation.json", json.dumps(content, indent=1) + "\n")
    write_text_atomic(out / "propagation.md", page(content))
    _draw(content, out / "propagation.png")
    return {}


# features


def _encoders(seeds: Sequence[int], quick: bool) -> tuple[dict[str, DinoPrior], Windows]:
    """The encoders by name, those of random weights for each seed, and windows that fit their patches."""
    if quick:
        windows = Windows(4, 8, 1)
        real = DinoConfig(name="drseg-tiny", weights=None, image_size=32, normalization="imagenet", seed=1000)
        cnn = dataclasses.replace(real, seed=1001)
    else:
        windows = Windows(24, 14, 6)
        real, cnn = (packaged_prior(source.name, image_size=336) for source in (DINOV2, EFFICIENTNET))
    random = {_seeded(seed): dataclasses.replace(real, weights=None, seed=seed) for seed in seeds}
    return {name: DinoPrior(config) for name, config in {DINO: real, CNN: cnn, **random}.items()}, windows


def _seeded(seed: int) -> str:
    return f"{RANDOM}, seed {seed}"


def _each(parted: Sequence[Fold]) -> Iterator[Piece]:
    # every piece is the test of one fold
    return (fold.test for fold in parted)


def _kept_features(
    piece: Piece, encoders: Mapping[str, DinoPrior], windows: Windows, device: torch.device, folder: Path
) -> dict[str, Tensor]:
    """:func:`_features`, out of a file where they were computed before: that takes most of the time."""
    digest = hashlib.sha256(repr((VERSION, windows, tuple(piece.image.shape))).encode())
    digest.update(piece.image.numpy().tobytes())
    for name, encoder in encoders.items():
        weights = encoder.config.weights
        config = dataclasses.replace(encoder.config, weights=weights and file_hash(Path(weights)))
        digest.update(repr((name, config)).encode())
    path = folder / f"propagation-{digest.hexdigest()[:12]}.safetensors"
    if not path.is_file():
        save_weights(path, _features(piece, encoders, windows, device), {"piece": piece.name})
    return load_weights(path)[0]


@torch.no_grad()
def _features(
    piece: Piece, encoders: Mapping[str, DinoPrior], windows: Windows, device: torch.device
) -> dict[str, Tensor]:
    """Maps (C, h, w) on the grid of cells by name: of all encoders, and of what needs none."""
    height, width = piece.mask.shape
    grid = (windows.cells, windows.cells)
    named = [encoder.to(device) for encoder in encoders.values()]

    def read(rows: Tensor, columns: Tensor) -> tuple[Tensor, None]:
        return piece.image[None, :, rows][..., columns].to(device).float() / 255, None

    def maps(image: Tensor) -> list[Tensor]:
        return [resample(encoded(encoder, image), grid) for encoder in named]

    bands = [band.parts for band in blended_bands(maps, read, height, width, windows, batch_size=4)]
    found = {
        name: torch.cat(part, dim=2)[0].cpu() for name, part in zip(encoders, zip(*bands, strict=True), strict=True)
    }
    h, w = windows.grid(height, width)
    _log.info("propagation: features of %s, %d x %d cells", piece.name, w, h)
    whole = piece.image[:, mirrored(height, h * windows.cell)][..., mirrored(width, w * windows.cell)].float() / 255
    return found | {COLOUR: colour_features(whole, windows.cell), DISTANCE: torch.ones(1, h, w)}


def encoded(encoder: DinoPrior, image: Tensor) -> Tensor:
    """The prior's features; of a convolutional network its last two stages side by side, each of length 1."""
    if hasattr(encoder.encoder.blocks[0], "attn"):
        return encoder.maps(image).features
    pixels = (image - encoder.pixel_mean) / encoder.pixel_deviation
    finer, last = encoder.encoder.forward_intermediates(pixels, indices=2, intermediates_only=True)
    return torch.cat((F.normalize(finer, dim=1), F.normalize(resample(last, finer.shape[2:]), dim=1)), dim=1)


def colour_features(image: Tensor, cell: int) -> Tensor:
    """(3, H, W) to (6, h, w): mean and deviation of each channel in each cell, all standardised over the image, since
    the cosines of colours as they are do not differ."""
    mean = F.avg_pool2d(image, cell)
    deviation = (F.avg_pool2d(image.square(), cell) - mean.square()).clamp_min(0).sqrt()
    return standardised(torch.cat((mean, deviation)))


def standardised(feature: Tensor) -> Tensor:
    """Each channel of (C, h, w) with mean 0 and mean square 1."""
    centred = feature - feature.mean(dim=(1, 2), keepdim=True)
    return centred / centred.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-6)


# classifiers


def fit_classifier(kind: str, rows: Tensor, label: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """A function of rows (N, C) to logits (N, T).

    Args:
        kind: ``prototypes``, cosines to the mean direction of each class; or ``probe``, multinomial regression.
        rows: (N, C) features to fit on.
        label: (N,) classes, 255 where there is none.
        classes: T; one that no row has is never chosen.
    """
    known = label != IGNORE
    rows, label = rows[known], label[known]
    mean, deviation = rows.mean(dim=0), rows.std(dim=0).clamp_min(1e-6)
    absent = torch.bincount(label, minlength=classes) == 0
    if kind == "prototypes":

        def standard(some: Tensor) -> Tensor:
            return F.normalize((some - mean) / deviation, dim=1)

        one_hot = F.one_hot(label, classes).to(rows.dtype)
        prototype = F.normalize(one_hot.T @ standard(rows), dim=1)
        # as far below as cosines go, and finite: a class without logits could not be spread
        return lambda some: (standard(some) @ prototype.T).masked_fill(absent, -1)
    weight = _regression((rows - mean) / deviation, label, classes)
    return lambda some: torch.addmm(weight[-1], (some - mean) / deviation, weight[:-1]).masked_fill(absent, -30)


def _regression(rows: Tensor, label: Tensor, classes: int, decay: float = 0.01) -> Tensor:
    """(C + 1, T) weights, the last row the bias: cross-entropy plus ``decay`` times half their squares, by L-BFGS."""
    weight = torch.zeros(rows.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(weight[-1], rows, weight[:-1]), label)
        loss = loss + 0.5 * decay * weight[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()


# graphs and scores


class _Counts:
    """What pieces add up to: by piece, and over a data set; outlines, which take longer, where they are shown."""

    def __init__(self, classes: int, outlines: bool) -> None:
        self.regions, self.outlines = ConfusionMatrix(classes), BoundaryCounts(classes) if outlines else None

    def add(self, guess: Tensor, mask: Tensor) -> None:
        self.regions.update(guess, mask)
        if self.outlines is not None:
            self.outlines.update(guess, mask)

    def scores(self) -> dict[str, float]:
        found = {"mIoU": self.regions.mean_iou()}
        return found if self.outlines is None else found | {"boundary": self.outlines.mean_iou()}


def _measure(
    parted: Sequence[Fold], features: Mapping[int, Mapping[str, Tensor]], cell: int, seeds: Sequence[int]
) -> dict[str, dict[str, dict[str, Scores]]]:
    """``{classifier: {graph setting: {graph: {piece or data set: {metric: percent}}}}}``."""
    rows: dict[tuple[str, str, str], Scores] = {}
    pooled: dict[tuple[str, str, str, str], _Counts] = {}

    def count(fold: Fold, row: tuple[str, str, str], logits: Tensor, grid: tuple[int, int]) -> None:
        guess, shown = to_pixels(logits, grid, cell, fold.test.mask), row[1] in ("", str(SETTINGS[0]))
        own = _Counts(fold.classes, shown)
        for counts in (own, pooled.setdefault((*row, fold.dataset), _Counts(fold.classes, shown))):
            counts.add(guess, fold.test.mask)
        rows.setdefault(row, {})[f"{fold.dataset} {fold.test.name}"] = own.scores()

    for fold in parted:
        own = features[id(fold.test)]
        grid = (own[DINO].shape[1], own[DINO].shape[2])
        logits = _all_logits(fold, features, cell)
        spread: dict[tuple[str, str], Tensor] = {("", NONE): logits}
        for kind in SETTINGS:
            for graph in (COLOUR, DISTANCE, CNN, DINO, *map(_seeded, seeds)):
                spread[str(kind), graph] = _spread(logits, own[graph], kind)
        for (kind_name, graph), value in spread.items():
            for classifier, part in zip(CLASSIFIERS, value.chunk(len(CLASSIFIERS), dim=1), strict=True):
                count(fold, (classifier, kind_name, graph), part, grid)
        _log.info("propagation: %s %s is scored", fold.dataset, fold.test.name)
    for (*row, dataset), counts in pooled.items():
        rows[row[0], row[1], row[2]][dataset] = counts.scores()
    return {
        classifier: {
            str(kind): {
                NONE: rows[classifier, "", NONE],
                **{
                    graph: rows[classifier, str(kind), graph]
                    for graph in (COLOUR, DISTANCE, CNN, DINO, *map(_seeded, seeds))
                },
            }
            for kind in SETTINGS
        }
        for classifier in CLASSIFIERS
    }


def _all_logits(fold: Fold, features: Mapping[int, Mapping[str, Tensor]], cell: int) -> Tensor:
    """(N, classifiers x T) logits of the cells of a test piece, side by side."""
    found = []
    for encoder, kind in CLASSIFIERS.values():
        rows = torch.cat([nodes(features[id(piece)][encoder]) for piece in fold.train])
        label = torch.cat([cell_labels(piece.mask, cell).flatten() for piece in fold.train])
        classifier = fit_classifier(kind, rows, label, fold.classes)
        found.append(classifier(nodes(features[id(fold.test)][encoder])))
    return torch.cat(found, dim=1)


def nodes(feature: Tensor) -> Tensor:
    """(D, h, w) to (hw, D) float32."""
    return feature.flatten(1).T.float().contiguous()


def cell_labels(mask: Tensor, cell: int) -> Tensor:
    """(H, W) to (h, w): the class of more than half of each cell, 255 where there is none."""
    height, width = mask.shape
    grid = (-(-height // cell), -(-width // cell))
    whole = F.pad(mask, (0, grid[1] * cell - width, 0, grid[0] * cell - height), value=IGNORE)
    return label_on_grid(whole[None], grid, "majority")[0]


def _spread(logits: Tensor, prior: Tensor, kind: GraphSetting) -> Tensor:
    graph = propagation_graph(nodes(prior), (prior.shape[1], prior.shape[2]), kind.k, gamma=GAMMA, decay=kind.decay)
    return solve_labels(logits, graph, alpha=kind.alpha)


def to_pixels(logits: Tensor, grid: tuple[int, int], cell: int, mask: Tensor) -> Tensor:
    """Logits (N, T) of cells to the class of each pixel (H, W), bilinearly between the cells."""
    maps = logits.T.reshape(1, -1, *grid)
    size = (grid[0] * cell, grid[1] * cell)
    large = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]
    return large[:, : mask.shape[0], : mask.shape[1]].argmax(dim=0).to(torch.uint8)


# the page


def _row(rows: Mapping[str, Scores], graph: str, seeds: Sequence[int]) -> list[Scores]:
    """The scores of a graph: of a random prior one for each seed, of the others one."""
    return [rows[_seeded(seed)] for seed in seeds] if graph == RANDOM else [rows[graph]]


def _mean(found: Sequence[Scores], names: Sequence[str], metric: str) -> float:
    return statistics.fmean(row[name][metric] for row in found for name in names)


def differences(
    rows: Mapping[str, Scores], graph: str, pieces: Sequence[str], seeds: Sequence[int], metric: str
) -> list[float]:
    """Of each piece: that of the real prior less that of a graph, of a random prior the mean over its seeds."""
    other = _row(rows, graph, seeds)
    return [rows[DINO][piece][metric] - _mean(other, [piece], metric) for piece in pieces]


def page(content: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    seeds, pieces, datasets = content["seeds"], content["scored"], list(content["pieces"])
    side, cell = content["window"]
    first = str(SETTINGS[0])
    trial = bool(content.get("quick"))
    parts = [
        f"# {TITLE}\n",
        *((f"**{TRIAL}**\n",) if trial else ()),
        f"Real pieces: {_listed(content['pieces'])}. Of several images each is scored once, with a classifier that was "
        "fitted on the others; a single one is cut into halves, each an image of its own, so no edge, window or "
        f"encoder reaches what the classifier saw. Cells of {cell} pixels in windows of {side}, the graph of "
        f"`drseg predict zero-shot` (gamma {GAMMA:g}, solved to the end), logits bilinear to pixels. "
        "A classifier stands for CLIP, whose weights are not at hand: prototypes are cosines to the mean direction of "
        "each class, a probe is multinomial regression on standardised features.\n",
        "*Graph*: whose cosines join the cells. *none*: the classifier alone. *colour*: mean and deviation of RGB in a "
        "cell, standardised over the image. *distance alone*: all cells alike. *random*: the encoder of the real prior "
        f"with random weights, seeds {', '.join(map(str, seeds))}.\n",
    ]
    for classifier, by_kind in content["found"].items():
        rows, table = by_kind[first], []
        for graph in GRAPHS:
            found = _row(rows, graph, seeds)
            line: dict[str, Any] = {"graph": graph}
            line |= {f"mIoU, {name}": _mean(found, [name], "mIoU") for name in datasets}
            for metric, title in METRICS.items():
                line[f"{title}, mean"] = _mean(found, datasets, metric)
                apart = differences(rows, graph, pieces, seeds, metric)
                line[f"real less it, {title}"] = None if graph == DINO else _signed(apart)
            table.append(line)
        parts += [f"## {classifier[0].upper()}{classifier[1:]}, {first}\n", markdown_table(table)]
        if not trial:
            parts.append(_in_words(rows, pieces, seeds))
    parts += [
        f"*Real less it*: {DINO} less the row, piece by piece: mean ± deviation over {len(pieces)} pieces, and in how "
        "many it is higher. Other columns are of whole data sets, so they differ by a little more or less.\n",
        "## Other graphs\n",
        "mIoU, mean over the data sets, then piece by piece; the first graph of each classifier is that above.\n",
        _other_settings(content),
        f"Seeds {', '.join(map(str, seeds))} of the random prior; all else has no chance in it. {content['machine']}; "
        f"{content['seconds'] / 60:.0f} minutes, without features that were kept from before.\n",
        f"`{content['command']}`, commit {', '.join(content['commits']) or '-'}\n",
    ]
    heading, *rest = parts
    return "\n".join([heading, *(_named(part, trial) for part in rest)])


def _named(text: str, trial: bool) -> str:
    """A text with the names of what was there."""
    for name, own in _OF_A_TRIAL.items() if trial else ():
        text = text.replace(name, own)
    return text


def _listed(pieces: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{name} ({len(own)} image{'s' if len(own) > 1 else ''})" for name, own in pieces.items())


def _signed(apart: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(apart):.1f}" if len(apart) > 1 else ""
    return f"{statistics.fmean(apart):+.1f}{spread} ({sum(value > 0 for value in apart)} of {len(apart)})"


def _in_words(rows: Mapping[str, Scores], pieces: Sequence[str], seeds: Sequence[int]) -> str:
    """What the table says of the real prior; a difference within two standard errors is not told from none."""
    told = []
    for graph in GRAPHS[:-1]:
        apart = differences(rows, graph, pieces, seeds, "mIoU")
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("inf")
        mean = statistics.fmean(apart)
        word = "better than" if mean > 2 * error else "worse than" if mean < -2 * error else "not told from"
        told.append(f"{word} {'no graph' if graph == NONE else graph}")
    return f"By mIoU the graph of the real prior is {', '.join(told)} (two standard errors over pieces).\n"


def _other_settings(content: Mapping[str, Any]) -> str:
    seeds, pieces, datasets, table = content["seeds"], content["scored"], list(content["pieces"]), []
    for classifier, by_kind in content["found"].items():
        for kind, rows in by_kind.items():
            line: dict[str, Any] = {"classifier": classifier, "graph": kind}
            for graph in GRAPHS:
                line[graph] = mean_text([_mean([row], datasets, "mIoU") for row in _row(rows, graph, seeds)])
            for graph in (NONE, COLOUR, DISTANCE, RANDOM):
                line[f"real less {graph}"] = _signed(differences(rows, graph, pieces, seeds, "mIoU"))
            table.append(line)
    return markdown_table(table)


def _draw(content: Mapping[str, Any], path: Path) -> None:
    plt = figures.pyplot()
    if plt is None:
        return
    seeds, pieces = content["seeds"], content["scored"]
    shown, trial = GRAPHS[:-1], bool(content.get("quick"))
    figure, axes = plt.subplots(1, len(content["found"]), figsize=(4.2 * len(content["found"]), 2.8), sharey=True)
    for axis, (classifier, by_kind) in zip(axes, content["found"].items(), strict=True):
        for place, graph in enumerate(shown):
            apart = differences(by_kind[str(SETTINGS[0])], graph, pieces, seeds, "mIoU")
            axis.barh(place, statistics.fmean(apart), color=figures.ACCENT, height=0.6)
            axis.plot(apart, [place] * len(apart), "o", color="white", markeredgecolor=figures.INK, markersize=4)
        axis.axvline(0, color=figures.INK, linewidth=0.8)
        axis.set_yticks(range(len(shown)), [_named(f"less {graph}", trial) for graph in shown])
        axis.set_title(_named(classifier, trial), fontsize=9)
        axis.set_xlabel(_named(f"mIoU of {DINO}'s graph less it, points", trial))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    if trial:
        figure.suptitle(TRIAL, fontsize=9)
    figure.tight_layout()
    figures.save(figure, path)
