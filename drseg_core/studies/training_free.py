# SPDX-License-Identifier: Apache-2.0
"""Does the graph help without training? Zero-shot maps before and after propagation, for every control.

What is spread are logits, so nothing is learned after the encoder: a gain is the graph's, and none an adapter's. On
drawn landscapes the stand-ins for CLIP are asked by name. On real pieces, for which no CLIP is at hand, prototypes of
an encoder's features stand for class names, fitted on other pieces alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.checkpoints.checkpoint import file_hash
from drseg_core.checkpoints.packaged import DINOV2, EFFICIENTNET, packaged_file, packaged_prior
from drseg_core.checkpoints.versions import device_name, git_revision, library_versions
from drseg_core.config.schema import DinoConfig
from drseg_core.device import select_device
from drseg_core.files import write_text_atomic
from drseg_core.models.dense_features import dense_features
from drseg_core.models.dino import DinoPrior
from drseg_core.models.prior_cache import PriorCache
from drseg_core.models.segmenter import Segmenter
from drseg_core.nn.resample import resample
from drseg_core.studies import controls
from drseg_core.studies.controls import WEIGHTS, Neighbours, Weights
from drseg_core.studies.pieces import Fold, Piece, folds, read_pieces, synthetic_pieces
from drseg_core.studies.plan import PlannedVariant, plan
from drseg_core.studies.propagation import encoded, fit_classifier, nodes
from drseg_core.studies.runner import read_json
from drseg_core.studies.seeds import measure_seeds
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import DRSEG
from drseg_core.studies.zero_shot import class_text, clip_model, pixels_below, sampled

NAME, TITLE = "training-free", "Does the graph help without training?"
KS, DECAYS, STEPS = (4, 8, 20, 75), (0.0, 1.0), (1, 2, 4)
IMAGES, QUICK_IMAGES = 40, 2
CONTRAST, CLEAR, DENSE = "captions alone", "captions alone, ClearCLIP", "pixel labels"
# by the kind of the stand-in for CLIP and the form of its last block: as DR-Seg reads CLIP, and a form that reads CLIP
# better where nothing was trained on pixels
STAND_INS = {
    ("contrast", "value_residual"): CONTRAST,
    ("contrast", "clearclip"): CLEAR,
    ("dense", "value_residual"): DENSE,
}
DINO_PROTOTYPES, CNN_PROTOTYPES = "DINOv2, prototypes", "EfficientNet-lite0, prototypes"
# raised when the same models and images would give other scores
VERSION = 1
_log = logging.getLogger(__name__)


class Way(NamedTuple):
    """How logits are spread: by which graph, with which weights, how often."""

    prior: str
    k: int = 1
    decay: float = 1.0
    weights: Weights = "flat"
    steps: int = 1


NO_GRAPH = Way(controls.NONE)


def ways(priors: Sequence[str]) -> list[Way]:
    """All that are measured, the first of them no graph at all."""
    found = [NO_GRAPH]
    for prior in priors:
        # without decay equal cosines would be told apart by the numbers of their cells
        for decay in (1.0,) if prior in (controls.DISTANCE, controls.ORACLE) else DECAYS:
            # with equal cosines all of Eq. 7's weights are equal too
            for weights in WEIGHTS if prior != controls.DISTANCE else WEIGHTS[:1]:
                found += [Way(prior, k, decay, weights, steps) for k in KS for steps in STEPS]
    return found


def training_free(setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """Scores of every way to spread, for every encoder, seed and image; see the page that it writes.

    ``setting`` gives the landscapes, the seeds and, where there are any, real pieces. The published prior takes part
    where ``make real`` was run.
    """
    from drseg_core.studies import training_free_page

    begin = time.monotonic()
    found: dict[str, dict[str, dict[int, Any]]] = {}
    problems: dict[str, str] = {}
    commits: set[str] = set()
    real = published_prior(setting, 224)
    for start in ("contrast", "dense"):
        planned = plan(dataclasses.replace(setting, start=start), [DRSEG], out)
        # what is there of published weights decides what is measured
        measured = measure_seeds(f"{NAME}-{_digest(real)}", measure_landscapes, planned, jobs)
        commits |= set(measured.commits)
        problems |= {f"{start}, {seed}": problem for seed, problem in measured.problems.items()}
        for name, by_seed in measured.found.items():
            form, _, test = name.partition(": ")
            found.setdefault(STAND_INS[start, form], {})[test] = by_seed
    parted = real_folds(setting)
    if parted:
        kept = _kept_real(setting, parted, out)
        commits |= {kept["git"]} if kept["git"] else set()
        for title, by_seed in kept["found"].items():
            found[title] = {"real": by_seed}
    facts = {
        **setting.record(),
        "start": None,
        "start_steps": {CONTRAST: setting.contrast_steps, DENSE: setting.start_steps},
        "quick": setting.quick,
        "images": _images(setting),
        "pieces": [f"{fold.dataset} {fold.test.name}" for fold in parted],
        "published": real is not None and not setting.quick,
        "command": command,
        "commits": sorted(commits),
        "machine": f"{device_name(str(select_device(setting.device)))}, threads: {torch.get_num_threads()}",
        "seconds": round(time.monotonic() - begin),
        "versions": library_versions(),
    }
    title = f"{TITLE} (a trial)" if setting.quick else TITLE
    content = {"study": NAME, "title": title, **facts, "not_run": problems, **training_free_page.summary(found)}
    training_free_page.write(content, out)
    return problems


def published_prior(setting: Setting, side: int) -> DinoConfig | None:
    """DINOv2 at a size, if it is here; in a trial a small random encoder stands for it."""
    if setting.quick:
        return DinoConfig(name="drseg-tiny", weights=None, image_size=64, normalization="imagenet", seed=1000)
    if not packaged_file(DINOV2.name).is_file():
        _log.warning("%s: no published prior; expected make real, got none", NAME)
        return None
    return packaged_prior(DINOV2.name, image_size=side)


def _images(setting: Setting) -> int:
    return QUICK_IMAGES if setting.quick else IMAGES


def _digest(*configs: DinoConfig | None) -> str:
    """Of priors, told by the content of their weights."""
    content = [
        None if one is None else repr(dataclasses.replace(one, weights=one.weights and file_hash(Path(one.weights))))
        for one in configs
    ]
    return hashlib.sha256(repr((VERSION, content)).encode()).hexdigest()[:8]


# landscapes


class Seen(NamedTuple):
    """An image as it is spread: ``logits`` (N, T), ``pixels`` (N, T) below each cell, and a prior map by control."""

    logits: Tensor
    pixels: Tensor
    priors: Mapping[str, Tensor]


@torch.no_grad()
def measure_landscapes(planned: PlannedVariant) -> dict[str, Any]:
    """``{form: test set: scores}`` of the stand-in for CLIP of a seed, see :func:`scores`."""
    setting = planned.setting
    model = clip_model(planned)
    random = DinoPrior(dataclasses.replace(setting.config.model.dino, weights=None, seed=planned.seed))
    real = _with_cache(published_prior(setting, 224), planned.out)
    forms = [form for start, form in STAND_INS if start == setting.start]
    found = {}
    for test in setting.tests:
        dataset, _ = setting.open_test(test)
        text = class_text(model, dataset.class_names)
        seen: dict[str, list[Seen]] = {form: [] for form in forms}
        for place in sampled(dataset, _images(setting)):
            sample = dataset[place]
            image = sample.image[None].float() / 255
            for form in forms:
                feature = _read(model, image, form)
                grid = (feature.shape[1], feature.shape[2])
                pixels = pixels_below(sample.mask, grid, len(text))
                logits = nodes(feature) @ text.T
                seen[form].append(Seen(logits, pixels, _priors(image, grid, feature, pixels, random, real)))
        for form, own in seen.items():
            centre = torch.cat([one.logits for one in own]).mean(dim=0)
            found[f"{form}: {test.name}"] = scores(own, [centre] * len(own), [test.name] * len(own), planned.seed)
        _log.info("%s: seed %d on %s is scored", NAME, planned.seed, test.name)
    return found


def _read(model: Segmenter, image: Tensor, form: str) -> Tensor:
    """(C, h, w) features of an image (1, 3, H, W) in [0, 1], each of length 1."""
    side = (model.config.clip.image_size, model.config.clip.image_size)
    image = F.interpolate(image, size=side, mode="bilinear", align_corners=False)
    pixels = (image - model.clip.pixel_mean) / model.clip.pixel_deviation
    return dense_features(model.clip.visual, pixels, form)[0].float()


def _with_cache(config: DinoConfig | None, out: Path) -> DinoPrior | None:
    if config is None:
        return None
    prior = DinoPrior(config)
    prior.cache = PriorCache(out / "runs" / "prior-features", prior)
    return prior


def _priors(
    image: Tensor, grid: tuple[int, int], own: Tensor, pixels: Tensor, random: DinoPrior, real: DinoPrior | None
) -> dict[str, Tensor]:
    """The prior map (D, h, w) of every control for an image (1, 3, H, W) in [0, 1]."""
    found = {
        controls.DISTANCE: controls.constant_prior(grid),
        controls.COLOUR: controls.colour_and_position(image[0], grid),
        controls.RANDOM: random(image, grid)[0],
        controls.OWN: own,
    }
    if real is not None:
        found[controls.REAL] = real(image, grid)[0]
    return found | {controls.ORACLE: controls.oracle_prior(pixels, grid)}


# real pieces


def real_folds(setting: Setting) -> list[Fold]:
    """Of several images each is scored once; a single one is halved. None where no pieces or no encoders are here."""
    if setting.quick:
        return folds(synthetic_pieces())
    if setting.pieces is None or not all(packaged_file(one.name).is_file() for one in (DINOV2, EFFICIENTNET)):
        _log.warning("%s: no real pieces; expected --pieces DIR and make real", NAME)
        return []
    return folds(read_pieces(setting.pieces))


def _kept_real(setting: Setting, parted: Sequence[Fold], out: Path) -> dict[str, Any]:
    """:func:`measure_pieces`, out of a file where that has been done."""
    encoders = _real_encoders(setting)
    digest = hashlib.sha256(repr((_digest(*encoders.values()), setting.seeds)).encode())
    for fold in parted:
        for piece in (*fold.train, fold.test):
            digest.update(piece.image.numpy().tobytes() + piece.mask.numpy().tobytes())
    path = out / "runs" / f"{NAME}-real-{digest.hexdigest()[:12]}.json"
    content = read_json(path)
    if content is None:
        found = measure_pieces(parted, encoders, setting.seeds)
        # keys as JSON has them, read or measured
        content = json.loads(json.dumps({"git": git_revision(), "found": found}))
        write_text_atomic(path, json.dumps(content) + "\n")
    return content | {
        "found": {name: {int(seed): row for seed, row in rows.items()} for name, rows in content["found"].items()}
    }


def _real_encoders(setting: Setting) -> dict[str, DinoConfig]:
    if setting.quick:
        first = published_prior(setting, 64)
        assert first is not None
        return {DINO_PROTOTYPES: first, CNN_PROTOTYPES: dataclasses.replace(first, seed=1001)}
    return {
        DINO_PROTOTYPES: packaged_prior(DINOV2.name, image_size=336),
        CNN_PROTOTYPES: packaged_prior(EFFICIENTNET.name, image_size=336),
    }


@torch.no_grad()
def measure_pieces(
    parted: Sequence[Fold], encoders: Mapping[str, DinoConfig], seeds: Sequence[int]
) -> dict[str, dict[int, Any]]:
    """``{encoder: {seed: scores}}`` of prototypes on pieces. A seed is that of the random encoder and of Eq. 8.

    Every piece is squashed to the encoder's square, as the paper's protocol does, and its graph is its own: no edge
    leaves it, and no image of another piece is in its pass.
    """
    real = DinoPrior(encoders[DINO_PROTOTYPES])
    grid = real.grid
    side = (real.config.image_size, real.config.image_size)
    seen_by = {name: DinoPrior(config) for name, config in encoders.items()}
    seen_by |= {str(seed): DinoPrior(dataclasses.replace(real.config, weights=None, seed=seed)) for seed in seeds}

    def squashed(piece: Piece) -> Tensor:
        return F.interpolate(piece.image[None].float() / 255, size=side, mode="bilinear", antialias=True)

    # every piece is the test of one fold
    feature = {
        (name, id(fold.test)): resample(encoded(encoder, squashed(fold.test)), grid)[0].float()
        for name, encoder in seen_by.items()
        for fold in parted
    }
    found: dict[str, dict[int, Any]] = {}
    for name in encoders:
        logits, centres = zip(*(_prototype_logits(fold, name, feature, grid) for fold in parted), strict=True)
        for seed in seeds:
            seen = []
            for fold, own in zip(parted, logits, strict=True):
                pixels = pixels_below(fold.test.mask, grid, fold.classes)
                priors = {
                    controls.DISTANCE: controls.constant_prior(grid),
                    controls.COLOUR: controls.colour_and_position(squashed(fold.test)[0], grid),
                    controls.RANDOM: feature[str(seed), id(fold.test)],
                    controls.OWN: feature[name, id(fold.test)],
                    controls.REAL: feature[DINO_PROTOTYPES, id(fold.test)],
                    controls.ORACLE: controls.oracle_prior(pixels, grid),
                }
                seen.append(Seen(own, pixels, priors))
            found.setdefault(name, {})[seed] = scores(seen, centres, [fold.dataset for fold in parted], seed)
        _log.info("%s: %s on real pieces is scored", NAME, name)
    return found


def _prototype_logits(
    fold: Fold, name: str, feature: Mapping[tuple[str, int], Tensor], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(N, T) cosines of a test piece to class prototypes, and their means (T,) on the pieces these were fitted on."""
    rows = torch.cat([nodes(feature[name, id(piece)]) for piece in fold.train])
    label = torch.cat([_labels(piece.mask, grid, fold.classes) for piece in fold.train])
    classify = fit_classifier("prototypes", rows, label, fold.classes)
    return classify(nodes(feature[name, id(fold.test)])), classify(rows).mean(dim=0)


def _labels(mask: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """(N,) class with the most pixels below each cell; 255 where there are none."""
    pixels = pixels_below(mask, grid, classes)
    return torch.where(pixels.sum(dim=1) > 0, pixels.argmax(dim=1), 255)


# scores


def scores(seen: Sequence[Seen], centres: Sequence[Tensor], sets: Sequence[str], seed: int) -> dict[str, Any]:
    """mIoU in percent of every way, as logits are (``raw``) and less their mean of each class (``centred``).

    Args:
        seen: images.
        centres: (T,) for each image: what is subtracted from its logits, known without its labels.
        sets: the set that each image is of.
        seed: of the initial weights of Eq. 8.

    Returns:
        ``ways``; ``image``: of each image, of each way, raw and centred, over the classes in its own truth; ``pooled``:
        of each way over the images of a set together, mean over the sets.
    """
    priors = list(seen[0].priors)
    image: list[Any] = []
    total: dict[str, Tensor] = {}
    for one, centre, name in zip(seen, centres, sets, strict=True):
        counts = _counts(one, centre, seed)
        image.append(mean_iou(counts).tolist())
        total[name] = total[name] + counts if name in total else counts
    pooled = torch.stack([mean_iou(counts) for counts in total.values()]).mean(dim=0).tolist()
    return {"ways": [list(way) for way in ways(priors)], "image": _rounded(image), "pooled": _rounded(pooled)}


def _rounded(value: Any) -> Any:
    return [_rounded(one) for one in value] if isinstance(value, list) else round(value, 3)


def _counts(seen: Seen, centre: Tensor, seed: int) -> Tensor:
    """(ways, 2, T, T) pixels by truth and guess, raw and centred."""
    both = torch.cat((seen.logits, seen.logits - centre), dim=1)
    found = [both, *_all_spread(both, seen.priors, seed)]
    cells, classes = seen.pixels.shape
    guess = torch.stack(found).unflatten(2, (2, classes)).argmax(dim=3).transpose(1, 2).reshape(-1, cells)
    row = guess + classes * torch.arange(len(guess))[:, None]
    counts = torch.zeros(len(guess) * classes, classes)
    # pixels of an image stay far below what float32 counts exactly
    counts.index_add_(0, row.flatten(), seen.pixels.float().repeat(len(guess), 1))
    return counts.view(-1, 2, classes, classes).mT.double()


def _all_spread(x: Tensor, priors: Mapping[str, Tensor], seed: int) -> Iterator[Tensor]:
    """``x`` after every way but the first, in the order of :func:`ways`."""
    graphs: dict[tuple[str, float], Neighbours] = {}
    weights: dict[tuple[str, float, Weights], Tensor] = {}
    several: list[Tensor] = []
    for way in ways(list(priors))[1:]:
        if not several:
            prior, edges, key = priors[way.prior], (way.prior, way.decay), (way.prior, way.decay, way.weights)
            if edges not in graphs:
                graphs[edges] = controls.neighbours(prior, max(KS), way.decay)
            if key not in weights:
                weights[key] = controls.edge_weights(way.weights, prior, graphs[edges], seed)
            graph = graphs[edges].first(way.k)
            several = controls.spread(x, graph, weights[key][:, : way.k].contiguous(), STEPS)
        yield several.pop(0)


def mean_iou(counts: Tensor) -> Tensor:
    """(..., T, T) pixels by truth and guess to percent, over the classes in the truth."""
    hit, truth = counts.diagonal(dim1=-2, dim2=-1), counts.sum(dim=-1)
    iou = hit / (truth + counts.sum(dim=-2) - hit).clamp_min(1)
    there = truth > 0
    return 100 * (iou * there).sum(dim=-1) / there.sum(dim=-1).clamp_min(1)
